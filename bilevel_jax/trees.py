"""Arithmetic on pytrees: norms, multiples, dtypes."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from bilevel_jax.types import Array, PyTree


def widest(tree: PyTree) -> Any:
    """The widest dtype among the leaves, float32 at least: that of norms, residuals and dense estimates."""
    kinds = [jnp.float32, *(leaf.dtype for leaf in jax.tree.leaves(tree))]
    return max(map(jnp.dtype, kinds), key=lambda kind: jnp.finfo(kind).bits)


def widen(tree: PyTree) -> PyTree:
    """A tree in float32 at least: the dtype of running means, and of sums over samples, tasks, steps, agents and blocks.

    Such a sum in bfloat16 stops growing after a few hundred terms.  The rounding to the narrow dtype is written out, because
    XLA may leave it out inside a fusion; a mean would then follow other numbers than those that are stored in its table.
    """

    def leaf(value: Array) -> Array:
        kind = jnp.finfo(value.dtype)
        return value if kind.bits >= 32 else lax.reduce_precision(value.astype(jnp.float32), kind.nexp, kind.nmant)

    return jax.tree.map(leaf, tree)


def narrow(tree: PyTree, like: PyTree) -> PyTree:
    """A tree in the dtypes of another one of its structure: the way back from `widen`."""
    return jax.tree.map(lambda leaf, other: leaf.astype(other.dtype), tree, like)


def matmul(a: Array, b: Array) -> Array:
    """``a @ b`` of one dtype, summed and returned in float32 at least."""
    return jnp.matmul(a, b, preferred_element_type=widest((a, b)))


def norm(tree: PyTree) -> Array:
    """The Euclidean norm of all the numbers in a pytree, in float32 at least."""
    leaves, wide = jax.tree.leaves(tree), widest(tree)
    return jnp.sqrt(sum(jnp.vdot(leaf.astype(wide), leaf.astype(wide)) for leaf in leaves))


def scaled(factor: Any, tree: PyTree) -> PyTree:
    """A tree times a number, in its own dtypes."""
    return jax.tree.map(lambda leaf: leaf * jnp.asarray(factor).astype(leaf.dtype), tree)


def over(divisor: Any, tree: PyTree) -> PyTree:
    """A tree over a number, in its own dtypes."""
    return jax.tree.map(lambda leaf: leaf / jnp.asarray(divisor).astype(leaf.dtype), tree)
