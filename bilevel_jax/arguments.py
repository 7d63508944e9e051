"""Arguments of a decorated function: by position or by name, arrays apart from static values."""

import functools
import inspect
from collections.abc import Callable, Hashable
from inspect import Parameter
from typing import Any, NamedTuple, TypeAlias

import jax
import numpy as np

from bilevel_jax.types import Array

#: The value of a leaf that is no array, in a tuple of one; empty for an array.
Static: TypeAlias = tuple[Hashable, ...]


class Call(NamedTuple):
    """Arguments without their arrays: hashable, so that `jax.jit` takes it as a static argument."""

    form: Any  # jax.tree_util.PyTreeDef of (positional arguments, named arguments)
    static: tuple[Static, ...]  # one per leaf
    names: tuple[str | None, ...] = ()  # per positional argument, its name for `apply_by_name`; None: not passed on
    dropped: tuple[str, ...] = ()  # named arguments that `apply_by_name` does not pass on

    def fill(self, leaves: list[Any], statics: bool = True) -> tuple[tuple, dict[str, Any]]:
        """The arguments with these arrays; static values are left out (None) unless ``statics``."""
        rest = iter(leaves)
        return self.form.unflatten([(s[0] if statics else None) if s else next(rest) for s in self.static])

    def arrays_of(self, positional: tuple) -> list[Any]:
        """The leaves of other positional arguments, of the same structure, where these are arrays."""
        leaves = self.form.flatten_up_to((positional, {}))
        return [leaf for leaf, static in zip(leaves, self.static, strict=True) if not static]

    def apply(self, function: Callable[..., Any], first: tuple, leaves: list[Any]) -> Any:
        """``function(*first, *positional, **named)``"""
        positional, named = self.fill(leaves)
        return function(*first, *positional, **named)

    def apply_by_name(self, function: Callable[..., Any], first: tuple, leaves: list[Any]) -> Any:
        """The same with the positional arguments that have names passed by name."""
        positional, named = self.fill(leaves)
        if not self.names:
            return function(*first, *positional, **named)
        named = {name: value for name, value in named.items() if name not in self.dropped}
        return function(*first, **{n: value for n, value in zip(self.names, positional, strict=True) if n}, **named)


def split(positional: tuple, named: dict[str, Any], names: tuple[str, ...] = ()) -> tuple[Call, list[Any]]:
    """A call, and the arrays and numbers among the leaves of its arguments.

    Args:
        positional, named: the arguments, pytrees.
        names: of the positional arguments, for the message of an error.

    Raises:
        TypeError: for a leaf that is neither an array or number nor hashable.
    """
    leaves, form = jax.tree_util.tree_flatten_with_path((positional, named))
    statics: list[Static] = []
    for path, leaf in leaves:
        try:
            hash(() if _is_array(leaf) else leaf)
        except TypeError:
            key = names[path[1].idx] if path[0].idx == 0 and path[1].idx < len(names) else path[1]
            name = f"{getattr(key, 'key', key)}{jax.tree_util.keystr(path[2:])}"
            given = f"an array of dtype {leaf.dtype}" if isinstance(leaf, np.ndarray) else type(leaf).__name__
            raise TypeError(
                f"{name}: got {given}, expected an array of numbers, or a static value, which is hashable"
            ) from None
        statics.append(() if _is_array(leaf) else (leaf,))
    return Call(form, tuple(statics)), [leaf for _, leaf in leaves if _is_array(leaf)]


def by_position(function: Callable[..., Any]) -> Callable[..., Any]:
    """The same function with names resolved to positions by its signature, which may promise more names than it takes."""
    signature = _Signature.of(function).signature
    if signature is None:
        return function

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(*args, **kwargs)
        return function(*bound.args, **bound.kwargs)

    return call


def binder(solve: Callable[..., Any], optimality: Callable[..., Any]) -> Callable[..., tuple[tuple, Call, list[Any]]]:
    """``(*args, **kwargs) -> (init, call, arrays)`` for calls of ``solve``, whose parameters also go to ``optimality``.

    ``init`` is empty, or a tuple of one, the first argument of ``solve``; the call holds the other ones.  See
    `bilevel_jax.implicit_root` for the rules.
    """
    own, other = _Signature.of(solve), _Signature.of(optimality)
    has_init = _has_init(own, other)
    parameters = own.positional[has_init:]
    theirs = {p.name for p in other.positional[1:] + other.keyword_only}
    known = [p.name in theirs for p in parameters]
    by_name = not own.variadic and all(k or p.default is not p.empty for k, p in zip(known, parameters, strict=True))
    dropped = tuple(p.name for p in own.keyword_only if p.name not in theirs and p.default is not p.empty)

    def bind(*args: Any, **kwargs: Any) -> tuple[tuple, Call, list[Any]]:
        if own.variadic and kwargs and other.signature is not None and not other.variadic:  # names are those of optimality
            init = {p.name: kwargs.pop(p.name) for p in own.positional[:1] if p.name in kwargs}
            args = (*init.values(), *args)
            bound = other.signature.bind(*args, **kwargs)
            args, kwargs = bound.args, bound.kwargs
        if own.signature is not None:
            bound = own.signature.bind(*args, **kwargs)
            bound.apply_defaults()
            args, kwargs = bound.args, bound.kwargs
        init, positional = args[:has_init], args[has_init:]
        call, leaves = split(positional, kwargs, tuple(p.name for p in parameters))
        if by_name and any(known):
            names = tuple(p.name if k else None for k, p in zip(known, parameters, strict=True))
            call = call._replace(names=names, dropped=dropped)
        if other.signature is not None:
            try:
                call.apply_by_name(other.signature.bind, (None,), leaves)
            except TypeError as error:
                raise TypeError(
                    f"optimality: {error}; expected a function of the solution and the parameters of solve"
                ) from None
        return init, call, leaves

    return bind


class _Signature(NamedTuple):
    signature: inspect.Signature | None  # None where Python does not know it
    positional: list[Parameter]
    keyword_only: list[Parameter]
    variadic: bool  # whether there is *args, or the signature is not known
    takes_names: bool  # whether there is **kwargs

    @staticmethod
    def of(function: Callable[..., Any]) -> "_Signature":
        try:
            signature = inspect.signature(function)
        except (TypeError, ValueError):
            return _Signature(None, [], [], True, True)
        every = list(signature.parameters.values())
        positional = [p for p in every if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
        keyword_only = [p for p in every if p.kind is p.KEYWORD_ONLY]
        kinds = {p.kind for p in every}
        return _Signature(
            signature, positional, keyword_only, Parameter.VAR_POSITIONAL in kinds, Parameter.VAR_KEYWORD in kinds
        )


def _has_init(solve: _Signature, optimality: _Signature) -> bool:
    """Whether the first argument of a solver is its starting point, not a parameter."""
    if solve.variadic or not solve.positional:
        return solve.variadic
    own = [p.name for p in solve.positional + solve.keyword_only]
    parameters = [p.name for p in (optimality.positional + optimality.keyword_only)[1:]]
    if optimality.variadic or solve.takes_names or set(own) & set(parameters):
        return own[0] not in parameters
    return len(own) != len(parameters)


def _is_array(leaf: Any) -> bool:
    """Whether a leaf is a number or an array of numbers (or of keys), which JAX can trace."""
    if isinstance(leaf, np.ndarray | np.generic):
        return leaf.dtype.kind in "biufcV" if leaf.dtype.kind != "V" else leaf.dtype.names is None
    return isinstance(leaf, Array | bool | int | float | complex)
