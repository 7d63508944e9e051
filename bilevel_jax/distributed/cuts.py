"""Cutting planes in fixed room: what replaces the inner problem in ADBO."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from bilevel_jax.trees import matmul, widen
from bilevel_jax.types import Array


class Cuts(NamedTuple):
    """Cutting planes ``outer' consensus_outer + sum_i inner_i' inner_i + consensus' consensus_inner + offset + sum_i share_i
    <= 0``, of fixed room; a slot that is not live counts for nothing."""

    outer: Array  # [C, n]
    inner: Array  # [N, C, m]
    consensus: Array  # [C, m]
    offset: Array  # [C], the constant but for
    share: Array  # [N, C], what worker i adds to it
    multiplier: Array  # [C], at least 0
    before: Array  # [C], the multipliers one update ago
    live: Array  # bool [C]


def values(cuts: Cuts, consensus_outer: Array, consensus_inner: Array, inner: Array, alive: Array) -> Array:
    """The left-hand side of every cut, ``[C]``: positive where it is violated.  ``inner`` is [N, m], ``alive`` bool [N]."""
    products = jax.vmap(matmul)(cuts.inner, rows(alive, inner))  # a worker at a time: 20 times as fast as one einsum on a CPU
    total = (
        matmul(cuts.outer, consensus_outer)
        + products.sum(0)
        + matmul(cuts.consensus, consensus_inner)
        + widen(cuts.offset)
        + widen(rows(alive, cuts.share)).sum(0)
    )
    return total.astype(cuts.offset.dtype)


def drop_idle(cuts: Cuts) -> Cuts:
    """Free the slots of cuts whose multiplier was 0 at the last two iterations."""
    live = cuts.live & ((cuts.multiplier > 0) | (cuts.before > 0))
    return Cuts(
        rows(live, cuts.outer),
        jnp.where(live[None, :, None], cuts.inner, jnp.zeros((), cuts.inner.dtype)),
        rows(live, cuts.consensus),
        rows(live, cuts.offset),
        jnp.where(live[None], cuts.share, jnp.zeros((), cuts.share.dtype)),
        rows(live, cuts.multiplier),
        rows(live, cuts.before),
        live,
    )


def add(cuts: Cuts, fresh: Cuts, wanted: Array) -> tuple[Cuts, Array]:
    """Write a cut into the first free slot, if it is wanted and there is one."""
    placed = wanted & ~cuts.live.all()
    slot = jnp.where(placed, jnp.argmin(cuts.live), len(cuts.live))  # beyond the end: not written

    def write(name: str, room: Array, new: Array) -> Array:
        where = (slice(None), slot) if name in ("inner", "share") else slot  # those have the workers in front
        return room.at[where].set(new, mode="drop")

    return Cuts(*map(write, Cuts._fields, cuts, fresh)), placed


def rows(mask: Array, values: Array) -> Array:
    """Values ``[rows, ...]`` where the mask of the rows is true, 0 elsewhere (also where they are not finite)."""
    return jnp.where(mask.reshape(-1, *(1,) * (values.ndim - 1)), values, jnp.zeros((), values.dtype))
