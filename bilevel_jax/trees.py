"""Arithmetic on pytrees: norms, multiples, dtypes."""

from typing import Any

import jax
import jax.numpy as jnp

from bilevel_jax.types import Array, PyTree


def widest(tree: PyTree) -> Any:
    """The widest dtype among the leaves, float32 at least: that of norms, residuals and dense estimates."""
    kinds = [jnp.float32, *(leaf.dtype for leaf in jax.tree.leaves(tree))]
    return max(map(jnp.dtype, kinds), key=lambda kind: jnp.finfo(kind).bits)


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
