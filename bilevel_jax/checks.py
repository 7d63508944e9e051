"""Errors at the boundary, in one voice: the argument's name, what was given, what was expected.

Everything here looks at shapes and types only (but `finite`, which needs concrete data), so that it runs while a program
is traced and costs the compiled program nothing.
"""

import inspect
import reprlib
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer
from jax.custom_derivatives import SymbolicZero

from bilevel_jax.types import Array, Batch, PyTree, Vars


def positive_int(name: str, value: Any, least: int = 1) -> int:
    """Return ``value`` if it is an integer of at least ``least``, else raise TypeError or ValueError naming ``name``."""
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        raise TypeError(f"{name}: got {shown(value)} of type {type(value).__name__}, expected an int")
    if value < least:
        raise ValueError(f"{name}: got {value}, expected at least {least}")
    return int(value)


def unit_interval(name: str, value: Any) -> None:
    """Raise TypeError or ValueError if ``value`` is not a concrete number in [0, 1]; schedules and traced values pass."""
    if callable(value) or isinstance(value, Tracer):
        return
    if np.ndim(value) or not np.issubdtype(np.asarray(value).dtype, np.number):
        raise TypeError(f"{name}: got {shown(value)}, expected a number in [0, 1] or a schedule")
    if not 0 <= float(value) <= 1:
        raise ValueError(f"{name}: got {value}, expected a number in [0, 1]")


def positive(name: str, value: Any, *, schedule: bool = False) -> None:
    """Raise TypeError or ValueError unless ``value`` is a finite number above 0, a traced one, or, if allowed, a schedule."""
    if isinstance(value, Tracer) or (schedule and callable(value)):
        return
    if callable(value) or np.ndim(value) or not np.issubdtype(np.asarray(value).dtype, np.number):
        raise TypeError(f"{name}: got {shown(value)}, expected a positive number{' or a schedule' * schedule}")
    if not 0 < float(value) < np.inf:
        raise ValueError(f"{name}: got {value}, expected a positive number")


def number(name: str, value: Any, zero: bool = False) -> Any:
    """The value if it is a positive finite number (or 0, if ``zero``), else TypeError or ValueError; traced ones pass."""
    if isinstance(value, bool) or not isinstance(value, int | float | np.number | np.ndarray | jax.Array):
        raise TypeError(f"{name}: got {shown(value)} of type {type(value).__name__}, expected a number")
    known = not isinstance(value, Tracer) and np.ndim(value) == 0
    if known and not (0 < value < np.inf or (zero and value == 0)):
        raise ValueError(f"{name}: got {value}, expected a finite number {'of at least' if zero else 'above'} 0")
    return value


def constant(name: str, tree: PyTree) -> PyTree:
    """The same numbers, which custom derivative rules may close over: they must not be differentiated.

    Raises:
        TypeError: (when traced) if the derivative with respect to one of them is asked for.
    """

    @jax.custom_jvp
    def identity(value: Array) -> Array:
        return value

    @partial(identity.defjvp, symbolic_zeros=True)
    def _(primals: tuple, tangents: tuple) -> tuple:
        if not isinstance(tangents[0], SymbolicZero):
            raise TypeError(
                f"{name}: got a number that is differentiated, expected a constant: the result does not depend on it, or not "
                f"smoothly; pass jax.lax.stop_gradient({name})"
            )
        return primals[0], tangents[0]

    return jax.tree.map(lambda leaf: lax.stop_gradient(identity(leaf)) if isinstance(leaf, jax.Array) else leaf, tree)


def transformation(name: str, opt: Any) -> None:
    """Raise TypeError unless ``opt`` is an optax transformation."""
    if not (callable(getattr(opt, "init", None)) and callable(getattr(opt, "update", None))):
        raise TypeError(f"{name}: got {type(opt).__name__}, expected an optax transformation")


def kind(name: str, value: Any, wanted: Any, expected: str) -> None:
    """Raise TypeError unless ``value`` is an instance of ``wanted``, which the message calls ``expected``."""
    if not isinstance(value, wanted):
        raise wrong_kind(name, value, wanted, expected)


def wrong_kind(name: str, value: Any, wanted: Any, expected: str) -> TypeError:
    """The error; where ``value`` is a function that makes what is wanted, it asks whether it was to be called."""
    if not inspect.isfunction(value):
        given = (
            f"{shown(value)} of type {type(value).__name__}" if isinstance(value, str | int | float) else type(value).__name__
        )
        return TypeError(f"{name}: got {given}, expected {expected}")
    signature, hint = inspect.signature(value), ""
    if signature.return_annotation in (wanted, signature.empty) and value.__name__ != "<lambda>":
        needs = any(
            p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in signature.parameters.values()
        )
        hint = f": did you mean {value.__name__}({'...' * needs})?"
    return TypeError(f"{name}: got the function {value.__name__}, expected {expected}{hint}")


def takes(function: Any, count: int) -> bool:
    """Whether a value is a function that can be called with so many positional arguments."""
    if not callable(function):
        return False
    try:
        inspect.signature(function).bind(*range(count))
    except TypeError:
        return False
    except ValueError:  # of a builtin, whose signature is not known
        return True
    return True


def typed_key(name: str, key: Any) -> None:
    """Raise TypeError or ValueError unless ``key`` is one typed key."""
    if not isinstance(key, jax.Array) or not jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        given = describe(key) if is_array(key) else f"{shown(key)} of type {type(key).__name__}"
        raise TypeError(f"{name}: got {given}, expected a typed key, as jax.random.key(0) makes")
    if key.shape:
        raise ValueError(f"{name}: got an array of keys of shape {key.shape}, expected one key: map over them with jax.vmap")


def is_array(leaf: Any) -> bool:
    """Whether JAX takes a leaf for an array: of NumPy or JAX, traced or a shape alone, of numbers or typed keys.

    An attribute ``shape`` does not make an array: data frames and tensors of other packages have one, too.
    """
    if isinstance(leaf, np.ndarray | np.generic):
        numbers = leaf.dtype == np.bool_ or (jnp.issubdtype(leaf.dtype, np.number) and leaf.dtype.char not in "gG")
        return numbers and not isinstance(leaf, np.ma.MaskedArray)
    return isinstance(leaf, jax.Array | jax.ShapeDtypeStruct) or hasattr(leaf, "__jax_array__")


def describe(leaf: Any) -> str:
    """The dtype and shape of an array, as ``float32[3, 4]``; of anything else its type."""
    return f"{jnp.result_type(leaf)}{list(np.shape(leaf))}" if is_array(leaf) else type(leaf).__name__


def shown(value: Any) -> str:
    """A value in a message: numbers, strings and containers, cut short where they are long; of anything else its type.

    Example:
        >>> shown("saba"), shown(np.ones(9, np.float32)), shown([0] * 10_000)
        ("'saba'", 'float32[9]', '[0, 0, 0, 0, 0, 0, ...]')
    """
    plain = value is None or isinstance(value, bool | int | float | complex | str | list | tuple | dict)
    return reprlib.repr(value) if plain else describe(value)


def cut(value: Any, length: int = 100) -> str:
    """The text of a value, cut short where it is longer."""
    text = str(value)
    return text if len(text) <= length else text[:length] + " ..."


class _Bare(str):
    """Text that is printed without quotes within a pytree."""

    __repr__ = str.__str__


@contextmanager
def evaluating(function: str, **arguments: PyTree) -> Iterator[None]:
    """Note on an error of a user's function, while it is traced, what the function was called with."""
    try:
        yield
    except Exception as error:
        parts = []
        for name, tree in arguments.items():
            parts.append(f"{name}: {cut(jax.tree.map(lambda leaf: _Bare(describe(leaf)), tree), 300)}")
        error.add_note(f"while evaluating {function}({', '.join(parts)})")
        raise


def path_name(name: str, path: tuple) -> str:
    """``name`` followed by a pytree path, as in ``vars.inner['w']``."""
    return name + jax.tree_util.keystr(path)


#: How users of other packages get an array, by the package of a type.
_TO_ARRAY = {
    **dict.fromkeys(("pandas", "polars", "xarray"), "use .to_numpy()"),
    "scipy": "use .toarray(), or pass the indices and the values of its entries as arrays",
    **dict.fromkeys(("torch", "tensorflow"), "use .numpy()"),
}


def _no_array(name: str, leaf: Any) -> TypeError:
    """The error for a leaf that is no array, with the way to make it one."""
    package, given = type(leaf).__module__.split(".")[0], type(leaf).__name__
    if isinstance(leaf, bool | int | float | complex | list | tuple):
        hint = "make it one with jnp.asarray"
    elif package in _TO_ARRAY:
        given, hint = f"a {package} {given}", _TO_ARRAY[package]
    elif isinstance(leaf, np.ma.MaskedArray):
        hint = "use .filled(...), or a mask beside it"
    elif isinstance(leaf, np.ndarray | np.generic):
        given, hint = f"{given} of dtype {leaf.dtype}", "its entries must be numbers"
    else:
        hint = "keep other values outside of the pytree; the losses can close over them"
    return TypeError(f"{name}: got {given}, expected an array: {hint}")


def _plain(node: Any) -> bool:
    """Whether a node is a Python number or text, or a list or tuple of nothing else."""
    if type(node) in (list, tuple):
        return bool(node) and all(map(_plain, node))
    return isinstance(node, bool | int | float | complex | str) and not isinstance(node, np.generic)


def _whole(node: Any) -> bool:
    """Whether a node is one leaf: a list of numbers, of any depth, a tuple of numbers, and what yields its items once."""
    flat = type(node) is list or (type(node) is tuple and not any(type(item) in (list, tuple) for item in node))
    return (flat and _plain(node)) or isinstance(node, Iterator)


def arrays(name: str, tree: PyTree) -> None:
    """Raise TypeError unless all leaves of ``tree`` are arrays; a list or tuple of numbers counts as one leaf."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree, is_leaf=_whole):
        if not is_array(leaf):
            raise _no_array(path_name(name, path), leaf)


def floating(name: str, tree: PyTree) -> PyTree:
    """``tree`` with its leaves as `jax.numpy.asarray` makes them: float64 becomes float32 while ``jax_enable_x64`` is off.

    Raises:
        TypeError: unless ``tree`` has leaves and all of them are floating-point arrays.
    """
    arrays(name, tree)
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        if isinstance(leaf, jax.ShapeDtypeStruct):
            raise TypeError(f"{path_name(name, path)}: got {type(leaf).__name__}, expected an array with values")
    tree = jax.tree.map(jnp.asarray, tree)
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    if not leaves:
        raise TypeError(f"{name}: got {shown(tree)}, expected a pytree of floating-point arrays")
    keys = any(jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) for _, leaf in leaves)
    for path, leaf in leaves:
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            hint = (
                "take the parameters of a model without its random state, with flax.nnx as "
                "graphdef, params, rest = nnx.split(model, nnx.Param, ...)"
                if keys
                else "pass its real and imaginary parts"
                if jnp.issubdtype(leaf.dtype, jnp.complexfloating)
                else "convert it with .astype(jnp.float32)"
            )
            raise TypeError(f"{path_name(name, path)}: got {describe(leaf)}, expected a floating-point array: {hint}")
    return tree


def variables(vars: Any) -> Vars:
    """``Vars`` with leaves as `floating` makes them; None stays.

    Raises:
        TypeError: for anything but ``Vars``, and as `floating`.
    """
    kind("vars", vars, Vars, "Vars(inner=..., aux=..., outer=...)")
    return Vars(*(part if part is None else floating(f"vars.{n}", part) for n, part in zip(Vars._fields, vars, strict=True)))


def point(z: PyTree, x: PyTree, batch: Any) -> tuple[PyTree, PyTree, Batch]:
    """Where functions of (z, x, batch) are evaluated, with leaves as `jax.numpy.asarray` makes them.

    Raises:
        TypeError: for variables as `floating`, anything but a ``Batch``, and leaves that are neither arrays nor numbers.
    """
    z, x = floating("z", z), floating("x", x)
    kind("batch", batch, Batch, "Batch(inner=..., outer=...)")
    arrays(
        "batch", jax.tree.map(lambda leaf: np.asarray(leaf) if isinstance(leaf, int | float) else leaf, batch, is_leaf=_whole)
    )
    return z, x, jax.tree.map(jnp.asarray, batch)


def same_shapes(name: str, tree: PyTree, like: PyTree, like_name: str) -> None:
    """Raise ValueError unless ``tree`` has the structure, shapes and dtypes of ``like``."""
    got, expected = jax.tree.structure(tree), jax.tree.structure(like)
    if got != expected:
        raise ValueError(f"{name}: got the structure {cut(got)}, expected that of {like_name}, {cut(expected)}")
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(tree), jax.tree.leaves(like), strict=True):
        if np.shape(a) != np.shape(b) or jnp.result_type(a) != jnp.result_type(b):
            raise ValueError(f"{path_name(name, path)}: got {describe(a)}, expected {describe(b)} as in {like_name}")


def leading_axis(name: str, tree: PyTree, size: int, why: str) -> None:
    """Raise ValueError unless every leaf of ``tree`` has a leading axis of length ``size``."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        if np.ndim(leaf) == 0 or np.shape(leaf)[0] != size:
            raise ValueError(
                f"{path_name(name, path)}: got the shape {np.shape(leaf)}, expected a leading axis of length {size}, {why}"
            )


def rows(name: str, data: PyTree) -> int:
    """The number of samples of ``data``: the common leading axis of its leaves."""
    arrays(name, data)
    leaves = jax.tree_util.tree_leaves_with_path(data)
    if not leaves:
        raise ValueError(f"{name}: got {shown(data)}, expected a pytree of arrays with samples along the leading axis")
    sizes = {path_name(name, path): np.shape(leaf)[0] if np.ndim(leaf) else None for path, leaf in leaves}
    first, size = next(iter(sizes.items()))
    differ = {first: size} | {leaf: other for leaf, other in sizes.items() if other != size}
    if size is None or len(differ) > 1:
        two = dict(list(differ.items())[:2])
        raise ValueError(f"{name}: got leaves with leading axes {two}, expected one common number of samples")
    if size < 1:
        raise ValueError(f"{name}: got no samples, expected at least 1")
    return size


def finite(name: str, tree: PyTree) -> None:
    """Raise ValueError if a concrete floating-point leaf holds NaN or infinity (traced ones pass), TypeError as `arrays`."""
    arrays(name, tree)
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        if isinstance(leaf, Tracer) or not jnp.issubdtype(jnp.result_type(leaf), jnp.floating):
            continue
        with jax.ensure_compile_time_eval():  # the data may be concrete while the run around them is traced
            bad = int((~jnp.isfinite(leaf)).sum())
        if bad:
            raise ValueError(f"{path_name(name, path)}: got {bad} values that are NaN or infinite, expected finite values")
