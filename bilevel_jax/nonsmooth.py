"""Nonsmooth terms r(z, x) with their proximal operators, and projections: the catalogue for `bilevel_jax.projections`.

A term is a pair of functions; its weights may depend on x.  The projections are made for the whole vector of all the leaves
of a pytree, as the norm of a ball is that of the whole.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.flatten_util import ravel_pytree

from bilevel_jax import checks
from bilevel_jax.trees import widen, widest
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
        weights: ``w >= 0``: a number, an array of the shape of z, or a function of x to one; for a pytree z a number.  Weights
            that depend on x must be kept at 0 or above, by a projection of x: below, the prox moves away from 0.

    Raises:
        ValueError: for negative weights that are known.

    Example:
        >>> term = l1(lambda x: x)
        >>> z, x = jnp.array([3.0, -0.5]), jnp.array([1.0, 2.0])
        >>> float(term.value(z, x)), term.prox(z, 0.5, x).tolist()
        (4.0, [2.5, 0.0])
    """

    _not_negative("weights", weights)

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
        weights: ``w >= 0``: a number, an array ``[groups]``, or a function of x to one, kept at 0 or above as for `l1`.

    Raises:
        TypeError, ValueError: for groups that are not a vector of ints from 0 on, none of them empty, and negative weights that
            are known; (when traced) for another z.

    Example:
        >>> term = group_lasso([0, 0, 1], weights=lambda x: x)
        >>> z, x = jnp.array([3.0, 4.0, 1.0]), jnp.array([1.0, 2.0])
        >>> float(term.value(z, x)), [round(u, 3) for u in term.prox(z, 1.0, x).tolist()]
        (7.0, [2.4, 3.2, 0.0])
    """
    of, count = _groups(groups)
    _not_negative("weights", weights)

    def value(z: Array, x: PyTree) -> Array:
        norms = _norms(z, of, count)
        return (_at(weights, x, norms) * norms).sum().astype(z.dtype)

    def prox(point: Array, step: Array | float, x: PyTree) -> Array:
        norms = _norms(point, of, count)
        # max(0, 1 - step w / |z|) without a division by 0: a group of norm 0 stays there.
        threshold = _at(step, None, norms) * _at(weights, x, norms)
        kept = jnp.where(norms <= threshold, 0, 1 - threshold / jnp.where(norms == 0, 1, norms))
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


def constrained(term: Nonsmooth, projection: Callable[[PyTree], PyTree]) -> Nonsmooth:
    """r plus the indicator of a set, its prox taken as that of r followed by the projection.

    Exact for `zero` and any set, for `l1` and a box that holds 0 or a ball, and for `group_lasso` and a ball; not in general:
    the prox of a sum is not the composition (a group lasso and a box, say).

    Args:
        term: r.
        projection: on the set: `box`, `ball`, `simplex`, or your own.

    Example:
        >>> term = constrained(l1(1.0), box(0.0, 1.0))
        >>> term.prox(jnp.array([3.0, -0.5]), 0.5, None).tolist()
        [1.0, 0.0]
    """
    return Nonsmooth(term.value, lambda point, step, x: projection(term.prox(point, step, x)))


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
    if not isinstance(low, Tracer) and not isinstance(high, Tracer) and not (np.asarray(low) <= np.asarray(high)).all():
        raise ValueError(f"low: got {checks.shown(low)}, expected at most high = {checks.shown(high)}")

    def clipped(leaf: Array) -> Array:
        for name, end in (("low", low), ("high", high)):
            if np.shape(end) not in ((), np.shape(leaf)):
                raise ValueError(
                    f"{name}: got the shape {np.shape(end)}, expected a number or {np.shape(leaf)}, as the point has"
                )
        return jnp.clip(leaf, *(jnp.asarray(end).astype(leaf.dtype) for end in (low, high)))

    def projection(point: PyTree) -> PyTree:
        return jax.tree.map(clipped, point)

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
        leaves, wide = jax.tree.leaves(point), widest(point)
        largest = jnp.stack([jnp.abs(leaf).max(initial=0).astype(wide) for leaf in leaves]).max()
        unit = jnp.where(largest == 0, 1, largest)  # squares of the point over its largest entry do not overflow
        length = unit * _root(jnp.stack([((leaf.astype(wide) / unit) ** 2).sum() for leaf in leaves]).sum())
        scale = jnp.where(length <= radius, 1, jnp.asarray(radius, wide) / jnp.where(length == 0, 1, length))
        return jax.tree.map(lambda leaf: (leaf.astype(wide) * scale).astype(leaf.dtype), point)

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
        # in float32 at least, and less the maximum, to which the projection is indifferent but rounding is not
        wide = widest(point)
        flat, back = ravel_pytree(jax.tree.map(lambda leaf: leaf.astype(wide), point))
        flat = flat - flat.max()
        ordered = jnp.flip(jnp.sort(flat))
        ranks = jnp.arange(1, flat.size + 1, dtype=wide)
        excess = (jnp.cumsum(ordered) - jnp.asarray(total, wide)) / ranks
        last = jnp.where(ordered > excess, jnp.arange(flat.size, dtype=jnp.int32), 0).max()
        return jax.tree.map(lambda leaf, like: leaf.astype(like.dtype), back(jnp.maximum(flat - excess[last], 0)), point)

    return projection


def _at(weights: Any, x: PyTree, like: Array) -> Array:
    return jnp.asarray(weights(x) if callable(weights) else weights).astype(like.dtype)


def _nothing(z: PyTree) -> Array:
    """0 in the dtype of z, or the widest of its leaves."""
    kinds = {leaf.dtype for leaf in jax.tree.leaves(z)}
    return jnp.zeros((), kinds.pop() if len(kinds) == 1 else widest(z))


def _not_negative(name: str, weights: Any) -> None:
    if not callable(weights) and not isinstance(weights, Tracer) and (np.asarray(weights) < 0).any():
        raise ValueError(
            f"{name}: got {checks.shown(weights)}, expected numbers of at least 0: below, the prox moves away from 0"
        )


def _groups(groups: Any) -> tuple[np.ndarray, int]:
    of = np.asarray(groups)
    if of.ndim != 1 or not np.issubdtype(of.dtype, np.integer) or not of.size:
        raise TypeError(f"groups: got {of.dtype}{list(of.shape)}, expected a vector of ints, the group of each coordinate")
    present = np.unique(of)
    if not np.array_equal(present, np.arange(len(present))):
        raise ValueError(f"groups: got the numbers {checks.shown(present.tolist())}, expected 0, 1, ... without a gap")
    return of.astype(np.int32), len(present)


def _norms(z: Array, of: np.ndarray, count: int) -> Array:
    if np.shape(z) != of.shape:
        raise ValueError(f"z: got the shape {np.shape(z)}, expected {of.shape}, one coordinate for each entry of groups")
    return _root(jax.ops.segment_sum(widen(z) ** 2, of, count))


def _root(squares: Array) -> Array:
    """The square root, with the derivative 0 at 0: a point at the origin stays there under a prox or a projection."""
    none = squares == 0
    return jnp.where(none, 0, jnp.sqrt(jnp.where(none, 1, squares)))
