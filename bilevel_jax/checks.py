"""Errors at the boundary, in one voice: the argument's name, what was given, what was expected.

Everything here looks at shapes and types only (but `finite`, which needs concrete data), so that it runs while a program
is traced and costs the compiled program nothing.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from bilevel_jax.types import PyTree


def positive_int(name: str, value: Any, least: int = 1) -> int:
    """Return ``value`` if it is an integer of at least ``least``, else raise TypeError or ValueError naming ``name``."""
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        raise TypeError(f"{name}: got {value!r} of type {type(value).__name__}, expected an int")
    if value < least:
        raise ValueError(f"{name}: got {value}, expected at least {least}")
    return int(value)


def unit_interval(name: str, value: Any) -> None:
    """Raise TypeError or ValueError if ``value`` is not a concrete number in [0, 1]; schedules and traced values pass."""
    if callable(value) or isinstance(value, Tracer):
        return
    if np.ndim(value) or not np.issubdtype(np.asarray(value).dtype, np.number):
        raise TypeError(f"{name}: got {value!r}, expected a number in [0, 1] or a schedule")
    if not 0 <= float(value) <= 1:
        raise ValueError(f"{name}: got {value}, expected a number in [0, 1]")


def positive(name: str, value: Any, *, schedule: bool = False) -> None:
    """Raise TypeError or ValueError unless ``value`` is a finite number above 0, a traced one, or, if allowed, a schedule."""
    if isinstance(value, Tracer) or (schedule and callable(value)):
        return
    if callable(value) or np.ndim(value) or not np.issubdtype(np.asarray(value).dtype, np.number):
        raise TypeError(f"{name}: got {value!r}, expected a positive number{' or a schedule' * schedule}")
    if not 0 < float(value) < np.inf:
        raise ValueError(f"{name}: got {value}, expected a positive number")


def transformation(name: str, opt: Any) -> None:
    """Raise TypeError unless ``opt`` is an optax transformation."""
    if not (callable(getattr(opt, "init", None)) and callable(getattr(opt, "update", None))):
        raise TypeError(f"{name}: got {type(opt).__name__}, expected an optax transformation")


def describe(leaf: Any) -> str:
    """The dtype and shape of a leaf, as ``float32[3, 4]``."""
    return f"{jnp.result_type(leaf)}{list(np.shape(leaf))}"


def path_name(name: str, path: tuple) -> str:
    """``name`` followed by a pytree path, as in ``vars.inner['w']``."""
    return name + jax.tree_util.keystr(path)


def floating(name: str, tree: PyTree) -> None:
    """Raise TypeError unless ``tree`` has leaves and all of them are floating-point arrays."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    if not leaves:
        raise TypeError(f"{name}: got {tree!r}, expected a pytree of floating-point arrays")
    for path, leaf in leaves:
        if not hasattr(leaf, "dtype") or not hasattr(leaf, "shape"):
            raise TypeError(f"{path_name(name, path)}: got {type(leaf).__name__}, expected an array")
        if leaf.dtype == np.float64 and not jax.enable_x64.value:
            raise TypeError(
                f"{path_name(name, path)}: got {leaf.dtype}{list(leaf.shape)} while jax_enable_x64 is off, which would round "
                "it in silence; expected float32, or jax.config.update('jax_enable_x64', True)"
            )
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            raise TypeError(f"{path_name(name, path)}: got {describe(leaf)}, expected a floating-point array")


def same_shapes(name: str, tree: PyTree, like: PyTree, like_name: str) -> None:
    """Raise ValueError unless ``tree`` has the structure, shapes and dtypes of ``like``."""
    got, expected = jax.tree.structure(tree), jax.tree.structure(like)
    if got != expected:
        raise ValueError(f"{name}: got the structure {got}, expected that of {like_name}, {expected}")
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
    leaves = jax.tree_util.tree_leaves_with_path(data)
    if not leaves:
        raise ValueError(f"{name}: got {data!r}, expected a pytree of arrays with samples along the leading axis")
    sizes = {path_name(name, path): np.shape(leaf)[0] if np.ndim(leaf) else -1 for path, leaf in leaves}
    if -1 in sizes.values() or len(set(sizes.values())) != 1:
        raise ValueError(f"{name}: got leaves with leading axes {sizes}, expected one common number of samples")
    size = next(iter(sizes.values()))
    if size < 1:
        raise ValueError(f"{name}: got no samples, expected at least 1")
    return size


def finite(name: str, tree: PyTree) -> None:
    """Raise ValueError if a concrete floating-point leaf holds NaN or infinity; traced leaves pass."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        if isinstance(leaf, Tracer) or not jnp.issubdtype(jnp.result_type(leaf), jnp.floating):
            continue
        with jax.ensure_compile_time_eval():  # the data may be concrete while the run around them is traced
            bad = int((~jnp.isfinite(leaf)).sum())
        if bad:
            raise ValueError(f"{path_name(name, path)}: got {bad} values that are NaN or infinite, expected finite values")
