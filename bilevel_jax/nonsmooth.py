"""Nonsmooth terms r(z, x) with their proximal operators, and projections: the catalogue for `bilevel_jax.projections`.

A term is a pair of functions; its weights may depend on x.  The projections are made for the whole vector of all the leaves
of a pytree, as the norm of a ball is that of the whole.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

from bilevel_jax import checks
from bilevel_jax.types import Array, PyTree

#: A number, an array that broadcasts against its z, or a function of x to one of these.
Weights = float | Array | np.ndarray | Callable[[PyTree], Any]


class Nonsmooth(NamedTuple):
    """A term r(z, x), convex in z, whose derivative in x, where it exists, is that of ``value``.

    ``prox(point, step, x) = argmin_u r(u, x) + |u - point|^2 / (2 step)``, of the structure, shapes and dtypes of ``point``.
    """

    value: Callable[[PyTree, PyTree], Array]
    prox: Callable[[PyTree, Array | float, PyTree], PyTree]


def zero() -> Nonsmooth:
    """r = 0: its proximal operator is the identity."""
    return Nonsmooth(lambda z, x: _nothing(z), lambda point, step, x: point)


def l1(weights: Weights = 1.0) -> Nonsmooth:
    """``sum_i w_i |z_i|``: soft thresholding at ``step w_i``.

    Args:
        weights: ``w >= 0``: a number, an array of the shape of z, or a function of x to one; for a pytree z a number.

    Example:
        >>> term = l1(lambda x: x)
        >>> z, x = jnp.array([3.0, -0.5]), jnp.array([1.0, 2.0])
        >>> float(term.value(z, x)), term.prox(z, 0.5, x).tolist()
        (4.0, [2.5, 0.0])
    """

    def value(z: PyTree, x: PyTree) -> Array:
        none = _nothing(z)
        return sum(((_at(weights, x, leaf) * jnp.abs(leaf)).sum().astype(none.dtype) for leaf in jax.tree.leaves(z)), none)

    def prox(point: PyTree, step: Array | float, x: PyTree) -> PyTree:
        return jax.tree.map(lambda leaf: soft(leaf, _at(step, None, leaf) * _at(weights, x, leaf)), point)

    return Nonsmooth(value, prox)


def group_lasso(groups: Any, weights: Weights = 1.0) -> Nonsmooth:
    """``sum_j w_j |z_(j)|_2`` over groups of coordinates: each shrinks by ``step w_j`` along itself, to 0 if it is shorter.

    Args:
        groups: int ``[dim z]``, the group of each coordinate of z, 0, 1, ...; z is one vector.
        weights: ``w >= 0``: a number, an array ``[groups]``, or a function of x to one.

    Raises:
        TypeError, ValueError: for groups that are not a vector of ints from 0 on, none of them empty; (when traced) for
            another z.

    Example:
        >>> term = group_lasso([0, 0, 1], weights=lambda x: x)
        >>> z, x = jnp.array([3.0, 4.0, 1.0]), jnp.array([1.0, 2.0])
        >>> float(term.value(z, x)), [round(u, 3) for u in term.prox(z, 1.0, x).tolist()]
        (7.0, [2.4, 3.2, 0.0])
    """
    of, count = _groups(groups)

    def value(z: Array, x: PyTree) -> Array:
        return (_at(weights, x, z) * _norms(z, of, count)).sum()

    def prox(point: Array, step: Array | float, x: PyTree) -> Array:
        norms = _norms(point, of, count)
        # max(0, 1 - step w / |z|) without a division by 0: a group of norm 0 stays there.
        threshold = _at(step, None, point) * _at(weights, x, point)
        kept = jnp.where(norms > threshold, 1 - threshold / jnp.where(norms > 0, norms, 1), 0)
        return point * kept.astype(point.dtype)[of]

    return Nonsmooth(value, prox)


def sparse_group_lasso(groups: Any, group_weights: Weights = 1.0, l1_weights: Weights = 1.0) -> Nonsmooth:
    """``sum_j w_j |z_(j)|_2 + sum_i u_i |z_i|``: soft thresholding first, then the shrinkage of the groups.

    Args:
        groups, group_weights: as for `group_lasso`.
        l1_weights: as for `l1`.

    Raises:
        TypeError, ValueError: as for `group_lasso`.

    Reference: the order of the two is Friedman, Hastie, Tibshirani, "A note on the group lasso and a sparse group lasso", 2010,
    arXiv 1001.0736.

    Example:
        >>> term = sparse_group_lasso([0, 0], 1.0, 1.0)
        >>> [round(u, 3) for u in term.prox(jnp.array([4.0, 5.0]), 1.0, None).tolist()]
        [2.4, 3.2]
    """
    whole, single = group_lasso(groups, group_weights), l1(l1_weights)
    return Nonsmooth(
        lambda z, x: whole.value(z, x) + single.value(z, x),
        lambda point, step, x: whole.prox(single.prox(point, step, x), step, x),
    )


def soft(point: Array, threshold: Array | float) -> Array:
    """Soft thresholding, ``sign(p) max(|p| - threshold, 0)``."""
    return point - jnp.clip(point, -threshold, threshold)


# ---- projections: point -> point ---------------------------------------------------------------------------------------


def box(low: Any, high: Any) -> Callable[[PyTree], PyTree]:
    """The projection on ``low <= z <= high``.

    Args:
        low, high: numbers, or arrays of the shape of z; infinities are allowed.

    Raises:
        ValueError: if ``low`` exceeds ``high`` anywhere.

    Example:
        >>> box(0.0, 1.0)(jnp.array([-1.0, 0.5, 2.0])).tolist()
        [0.0, 0.5, 1.0]
    """
    if not (np.asarray(low) <= np.asarray(high)).all():
        raise ValueError(f"low: got {low}, expected at most high = {high}")

    def projection(point: PyTree) -> PyTree:
        return jax.tree.map(lambda leaf: jnp.clip(leaf, jnp.asarray(low, leaf.dtype), jnp.asarray(high, leaf.dtype)), point)

    return projection


def ball(radius: float) -> Callable[[PyTree], PyTree]:
    """The projection on ``|z|_2 <= radius``, the norm over all the leaves.

    Args:
        radius: a positive number.

    Raises:
        ValueError: for another radius.

    Example:
        >>> ball(1.0)(jnp.array([3.0, 4.0])).tolist()
        [0.6000000238418579, 0.800000011920929]
    """
    checks.positive("radius", radius)

    def projection(point: PyTree) -> PyTree:
        flat, back = ravel_pytree(point)
        norm = _root(flat @ flat)
        scale = jnp.where(norm > radius, jnp.asarray(radius, flat.dtype) / jnp.where(norm > 0, norm, 1), 1)
        return jax.tree.map(lambda leaf: leaf * scale.astype(leaf.dtype), back(flat))

    return projection


def simplex(total: float = 1.0) -> Callable[[PyTree], PyTree]:
    """The projection on ``z >= 0, sum z = total``, the sum over all the leaves: by sorting, O(d log d).

    optax has one too, but it changes the dtype where 64 bits are enabled.

    Args:
        total: a positive number.

    Raises:
        ValueError: for another total.

    Reference: Duchi, Shalev-Shwartz, Singer, Chandra, "Efficient projections onto the l1-ball for learning in high dimensions",
    ICML 2008.

    Example:
        >>> simplex()(jnp.array([1.0, 0.5, -1.0])).tolist()
        [0.75, 0.25, 0.0]
    """
    checks.positive("total", total)

    def projection(point: PyTree) -> PyTree:
        flat, back = ravel_pytree(point)
        ordered = jnp.flip(jnp.sort(flat))
        ranks = jnp.arange(1, flat.size + 1, dtype=flat.dtype)
        excess = (jnp.cumsum(ordered) - jnp.asarray(total, flat.dtype)) / ranks
        last = jnp.where(ordered > excess, jnp.arange(flat.size, dtype=jnp.int32), 0).max()
        return back(jnp.maximum(flat - excess[last], 0))

    return projection


def _at(weights: Any, x: PyTree, like: Array) -> Array:
    return jnp.asarray(weights(x) if callable(weights) else weights).astype(like.dtype)


def _nothing(z: PyTree) -> Array:
    """0 in the widest dtype of the leaves."""
    return jnp.zeros((), max((leaf.dtype for leaf in jax.tree.leaves(z)), key=lambda kind: jnp.finfo(kind).bits))


def _groups(groups: Any) -> tuple[np.ndarray, int]:
    of = np.asarray(groups)
    if of.ndim != 1 or not np.issubdtype(of.dtype, np.integer) or not of.size:
        raise TypeError(f"groups: got {of.dtype}{list(of.shape)}, expected a vector of ints, the group of each coordinate")
    present = np.unique(of)
    if not np.array_equal(present, np.arange(len(present))):
        raise ValueError(f"groups: got the numbers {present.tolist()}, expected 0, 1, ... without a gap")
    return of.astype(np.int32), len(present)


def _norms(z: Array, of: np.ndarray, count: int) -> Array:
    if np.shape(z) != of.shape:
        raise ValueError(f"z: got the shape {np.shape(z)}, expected {of.shape}, one coordinate for each entry of groups")
    return _root(jax.ops.segment_sum(z * z, of, count))


def _root(squares: Array) -> Array:
    """The square root, with the derivative 0 at 0: a point at the origin stays there under a prox or a projection."""
    above = squares > 0
    return jnp.where(above, jnp.sqrt(jnp.where(above, squares, 1)), 0)
