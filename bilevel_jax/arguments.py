"""Arguments of a decorated function: by position or by name, arrays apart from static values."""

import functools
import inspect
from collections.abc import Callable, Hashable
from inspect import Parameter
from typing import Any, NamedTuple, TypeAlias

import jax
import numpy as np

from bilevel_jax.types import Array

#: The value of a leaf that is not an array, and its type, because 1 equals True; empty for an array.
Static: TypeAlias = tuple[Hashable, ...]


class Call(NamedTuple):
    """Arguments without their arrays: hashable, so that `jax.jit` takes it as a static argument."""

    form: Any  # jax.tree_util.PyTreeDef of (positional arguments, named arguments)
    static: tuple[Static, ...]  # one per leaf
    #: Per positional argument, how it is passed to another function: by this name, by position if "", not at all if None.
    names: tuple[str | None, ...] | None = None
    dropped: frozenset[str] = frozenset()  # named arguments that the other function does not get

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

    def apply_other(self, function: Callable[..., Any], first: tuple, leaves: list[Any]) -> Any:
        """The same for the other function."""
        positional, named = self.fill(leaves)
        roles = ("",) * len(positional) if self.names is None else self.names
        given = list(zip(roles, positional, strict=True))
        named = {name: value for name, value in named.items() if name not in self.dropped}
        return function(*first, *(v for r, v in given if r == ""), **{r: v for r, v in given if r}, **named)


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
        statics.append(() if _is_array(leaf) else (leaf, type(leaf)))
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
    theirs = {p.name: p for p in other.parameters if p.kind is not p.POSITIONAL_ONLY}
    options = [p for p in parameters + own.keyword_only if p.name not in theirs and p.default is not p.empty]
    dropped = frozenset() if other.takes_names else frozenset(p.name for p in options)
    unknown = [p for p in parameters if p.name not in theirs and p.name not in dropped]
    by_name = not own.variadic and (other.takes_names or not unknown) and (bool(theirs) or other.takes_names)
    room = len(other.positional) - 1

    def role(place: int, p: Parameter) -> str | None:
        if by_name:
            return None if p.name in dropped else p.name
        return None if p.name in dropped and place >= room and not other.variadic else ""

    names = tuple(role(place, p) for place, p in enumerate(parameters))
    wanted = [
        p for p in parameters + own.keyword_only if p.name in theirs and theirs[p.name].default is p.empty is not p.default
    ]

    def bind(*args: Any, **kwargs: Any) -> tuple[tuple, Call, list[Any]]:
        if own.variadic and kwargs and other.signature is not None and not other.variadic:  # names are those of optimality
            init = {p.name: kwargs.pop(p.name) for p in own.positional[:1] if p.name in kwargs}
            args = (*init.values(), *args)
            bound = other.signature.bind(*args, **kwargs)
            args, kwargs = bound.args, bound.kwargs
        if own.signature is not None:
            bound = own.signature.bind(*args, **kwargs)
            for p in wanted:  # with a default that the optimality lacks; other defaults are left to the two functions
                bound.arguments.setdefault(p.name, p.default)
            args, kwargs = bound.args, bound.kwargs
        init, positional = args[:has_init], args[has_init:]
        call, leaves = split(positional, kwargs, tuple(p.name for p in parameters))
        if not own.variadic:
            call = call._replace(names=names[: len(positional)], dropped=dropped)
        if other.signature is not None:
            try:
                call.apply_other(other.signature.bind, (None,), leaves)
            except TypeError as error:
                raise TypeError(
                    f"optimality: {error}; expected a function of the solution and the parameters of solve (an option of solve "
                    "alone must have a default)"
                ) from None
        return init, call, leaves

    return bind


class _Signature(NamedTuple):
    signature: inspect.Signature | None  # None where Python does not know it
    positional: list[Parameter]
    keyword_only: list[Parameter]
    variadic: bool  # whether there is *args, or the signature is not known
    takes_names: bool  # whether there is **kwargs

    @property
    def parameters(self) -> list[Parameter]:
        """Of an optimality: all but the solution."""
        return (self.positional + self.keyword_only)[1:]

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
    first, parameters = solve.positional[0].name, {p.name for p in optimality.parameters}
    if optimality.variadic or solve.takes_names or first.startswith("init"):
        return first not in parameters
    if {p.name for p in solve.positional[1:] + solve.keyword_only} & parameters or first in parameters:
        return first not in parameters
    required = [sum(p.default is p.empty for p in ps) for ps in (solve.positional + solve.keyword_only, optimality.parameters)]
    return required[0] > required[1]


def _is_array(leaf: Any) -> bool:
    """Whether a leaf is an array of numbers or keys, or a number that has a derivative: what is traced."""
    if isinstance(leaf, np.ndarray | np.generic):
        return leaf.dtype.kind in "biufcV" if leaf.dtype.kind != "V" else leaf.dtype.names is None
    return isinstance(leaf, Array | float | complex)
