"""Estimators: how the directions of an oracle are averaged or variance-reduced over the steps.

They wrap any oracle and know nothing about bilevel problems: ``Terms`` is to them a pair of trees, each with its own slot.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.flatten_util import ravel_pytree

from bilevel_jax import checks
from bilevel_jax.control_flow import cond
from bilevel_jax.optimisers import weight_at
from bilevel_jax.trees import narrow, widen
from bilevel_jax.types import Array, Batch, Estimator, PyTree, Schedule, Slot, Table, Terms, Vars


def total(terms: Terms) -> Vars:
    """The direction: the sum of its terms, variable by variable; None where there is no term."""

    def add(*parts: Any) -> Any:
        present = [p for p in parts if p is not None]
        return jax.tree.map(lambda *leaves: sum(leaves[1:], leaves[0]), *present) if present else None

    return Vars(*(add(*parts) for parts in zip(*terms, strict=True)))


def on_full(batch: Batch, name: str) -> Batch:
    """All the data as one draw, with the key of a draw.

    Raises:
        ValueError: if ``batch.full`` is missing, which ``name`` needs.
    """
    if batch.full is None:
        raise ValueError(f"batch.full: got None, expected the full data, which {name} needs for its refreshes")
    return Batch(inner=batch.full.inner, outer=batch.full.outer, key=batch.key)


def _zeros(oracle: Any, vars: Vars, batch: Batch) -> Terms:
    return jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), jax.eval_shape(oracle, vars, batch))


def _mix(weight: Any, new: PyTree, old: PyTree) -> PyTree:
    """``weight * new + (1 - weight) * old``, in the dtype of ``new``; exactly ``new`` when the weight is 1."""

    def leaf(n: Array, o: Array) -> Array:
        w = jnp.asarray(weight, n.dtype)
        return w * n + (1 - w) * o

    return jax.tree.map(leaf, new, old)


def plain() -> Estimator:
    """The direction of this draw alone: plain stochastic steps.  Cost: one oracle call an update."""

    def init(oracle: Any, vars: Vars, batch: Batch) -> tuple:
        del oracle, vars, batch
        return ()

    def update(oracle: Any, vars: Vars, batch: Batch, count: Array, state: tuple) -> tuple[Vars, tuple]:
        del count
        return total(oracle(vars, batch)), state

    return Estimator(init, update, is_plain=True)


class EmaState(NamedTuple):
    """What `ema` keeps."""

    mean: Vars  # moving average of the direction, shaped like the variables that move; float32 at least


def ema(theta: Schedule) -> Estimator:
    """Exponential moving average, ``m <- (1 - theta) m + theta D``, started at the first direction.

    Args:
        theta: weight of the new direction, a number in [0, 1] or a schedule of the number of updates, clipped to [0, 1].

    Cost: one oracle call an update.  Memory: one direction.
    """
    checks.unit_interval("theta", theta)

    def init(oracle: Any, vars: Vars, batch: Batch) -> EmaState:
        return EmaState(widen(total(_zeros(oracle, vars, batch))))

    def update(oracle: Any, vars: Vars, batch: Batch, count: Array, state: EmaState) -> tuple[Vars, EmaState]:
        weight = jnp.where(count == 0, 1.0, weight_at(theta, count))
        new = total(oracle(vars, batch))
        mean = _mix(weight, widen(new), state.mean)
        return narrow(mean, new), EmaState(mean)

    return Estimator(init, update)


class SagaState(NamedTuple):
    """What `saga` keeps: a table of terms, its mean, what the mean lacks, and the row that is yet to be written."""

    table: Table  # of Terms, leaves [slots, ...]: the last term seen of every block (small rows packed), but the pending row
    mean: Terms  # running mean of the table, pending row included; float32 at least
    lost: Terms  # what rounding has kept out of the mean so far
    row: Terms  # the pending row: the terms of the last draw, not yet in the table
    slot: tuple  # int32 [], one per level: where the pending row belongs


def saga() -> Estimator:
    """SAGA: ``D = new - table[i] + mean``, with one table per level of the problem.

    The table holds the terms themselves (products, not iterates).  Blocks are drawn uniformly and carry their weight in
    their loss (see `bilevel_jax.oracles.mean_loss`), so that the plain mean of the table is the full direction and ragged
    last blocks are exact.  The table starts at zero, which is unbiased too.

    *Deferred write.*  Reading row i and then writing it inside one loop body makes XLA copy the whole table at every step
    (8.5 ms against 0.2 ms on the data-cleaning problem).  So the row of an update waits in the state, and is written at the
    start of the next update, before the current row is read; ``flush`` writes it when a table is to be read from outside.

    The mean is kept up to date step by step, as a compensated sum (Kahan, "Further remarks on reducing truncation errors",
    1965).  A plain sum drifts from the mean of the table in proportion to the steps: on `bilevel_jax.testing.quadratic` in
    float32 the hypergradient at which SABA ends grew from 4e-4 after 20,000 updates to 4e-3 after 200,000.  What is left is
    the rounding of the change itself, about ``eps sqrt(steps) / blocks`` of its size while draws keep changing.

    Raises:
        ValueError: (when traced) if ``batch.slot`` is missing, or counts other blocks than the table has rows.

    Cost: one oracle call an update.  Memory: one direction per block and level, and three directions more a level.

    Reference: Defazio, Bach, Lacoste-Julien, "SAGA", 2014, arXiv 1407.0202; for the three directions of a bilevel problem
    Dagréou, Ablin, Vaiter, Moreau, 2022, arXiv 2201.13409 (SABA).
    """

    def slots(terms: Terms, batch: Batch) -> list[Slot | None]:
        """One slot per level that has terms."""
        found = []
        for name, part, slot in zip(terms._fields, terms, batch.slot or (None,) * len(terms), strict=True):
            if not jax.tree.leaves(part):
                found.append(None)
            elif not isinstance(slot, Slot):
                raise ValueError(
                    f"batch.slot.{name}: got {checks.shown(slot)}, expected a Slot(index, count), because saga keeps a table "
                    "of blocks"
                )
            else:
                found.append(slot)
        return found

    def init(oracle: Any, vars: Vars, batch: Batch) -> SagaState:
        zeros, _ = _pack(_zeros(oracle, vars, batch))
        found = slots(zeros, batch)

        def rows(part: Vars, slot: Slot | None) -> PyTree:
            count = slot.count if slot is not None else 0
            return jax.tree.map(lambda z: jnp.zeros((count, *z.shape), z.dtype), part)

        table = Table(Terms(*map(rows, zeros, found)))
        fresh = jax.tree.map(jnp.zeros_like, zeros)
        lost = jax.tree.map(jnp.zeros_like, widen(zeros))
        return SagaState(table, widen(zeros), lost, fresh, tuple(jnp.zeros((), jnp.int32) for _ in found))

    def update(oracle: Any, vars: Vars, batch: Batch, count: Array, state: SagaState) -> tuple[Vars, SagaState]:
        del count
        raw = oracle(vars, batch)
        new, unpack = _pack(raw)
        table = flush(state).table.rows
        parts, means, losts, indices = [], [], [], []
        for part, tab, mean, lost, slot in zip(new, table, state.mean, state.lost, slots(new, batch), strict=True):
            if slot is None:
                parts.append(part)
                means.append(mean)
                losts.append(lost)
                indices.append(jnp.zeros((), jnp.int32))
                continue
            held = {np.shape(t)[0] for t in jax.tree.leaves(tab)}
            if held != {slot.count}:
                raise ValueError(f"batch.slot: got slots of {slot.count} blocks, expected {held.pop()}, the rows of the table")
            old = jax.tree.map(lambda t, i=slot.index: lax.dynamic_index_in_dim(t, i, 0, keepdims=False), tab)
            change = jax.tree.map(jnp.subtract, widen(part), widen(old))
            parts.append(narrow(jax.tree.map(jnp.add, change, mean), part))
            step = jax.tree.map(lambda c, r, n=slot.count: c / n + r, change, lost)
            means.append(jax.tree.map(jnp.add, mean, step))
            losts.append(jax.tree.map(lambda r, after, before: r - (after - before), step, means[-1], mean))
            indices.append(slot.index)
        return total(unpack(Terms(*parts))), SagaState(Table(Terms(*table)), Terms(*means), Terms(*losts), new, tuple(indices))

    return Estimator(init, update, needs_means=True)


#: Rows of at most this many numbers are kept in one piece.
PACKED = 4096


def _pack(terms: Terms) -> tuple[Terms, Callable[[Terms], Terms]]:
    """Small rows of one dtype as one vector a level, and the way back.

    On small problems a step is a few dozen operations of under a microsecond, and a table a term would double their number
    (13 against 7 microseconds a step at 66 numbers a row on two cores); on large rows the copy would cost more than it saves.
    """
    packed, ways = [], []
    for part in terms:
        leaves = jax.tree.leaves(part)
        if len(leaves) > 1 and len({leaf.dtype for leaf in leaves}) == 1 and sum(leaf.size for leaf in leaves) <= PACKED:
            part, way = ravel_pytree(part)
        else:
            way = _same
        packed.append(part)
        ways.append(way)
    return Terms(*packed), lambda rows: Terms(*(way(row) for way, row in zip(ways, rows, strict=True)))


def _same(part: PyTree) -> PyTree:
    return part


def flush(state: SagaState) -> SagaState:
    """Write the pending row of a SAGA state into its table: do this before reading the table from outside."""
    table = Terms(
        *(
            jax.tree.map(lambda t, r, i=i: lax.dynamic_update_index_in_dim(t, r, i, 0), tab, row)
            for tab, row, i in zip(state.table.rows, state.row, state.slot, strict=True)
        )
    )
    return state._replace(table=Table(table))


class RecursiveState(NamedTuple):
    """What `sarah`, `page` and `storm` keep."""

    direction: Vars  # the running estimate; float32 at least
    vars: Vars  # the variables at the last update


def _recursive(estimate: Any, draw_calls: float, full_calls: float, *, needs_means: bool) -> Estimator:
    """SARAH, PAGE and STORM share a state: the last estimate, and the point where it was taken."""

    def init(oracle: Any, vars: Vars, batch: Batch) -> RecursiveState:
        return RecursiveState(widen(total(_zeros(oracle, vars, batch))), jax.tree.map(jnp.copy, vars))

    def update(oracle: Any, vars: Vars, batch: Batch, count: Array, state: RecursiveState) -> tuple[Vars, RecursiveState]:
        def widened(vars: Vars, batch: Batch) -> Terms:
            return widen(oracle(vars, batch))

        direction = estimate(widened, vars, batch, count, state)
        way = Vars(*(None if d is None else narrow(d, v) for d, v in zip(direction, vars, strict=True)))
        return way, RecursiveState(direction, vars)

    return Estimator(init, update, draw_calls, full_calls, needs_means)


def _difference(oracle: Any, vars: Vars, batch: Batch, state: RecursiveState) -> Vars:
    """``direction + D(new) - D(old)``, the same draw at both points."""
    new, old = total(oracle(vars, batch)), total(oracle(state.vars, batch))
    return jax.tree.map(lambda d, n, o: d + (n - o), state.direction, new, old)


def sarah(period: int) -> Estimator:
    """SARAH/SPIDER: every ``period`` updates the full direction, in between ``D <- D + D_ij(new) - D_ij(old)``.

    The refresh is a `jax.lax.cond` on the number of updates.  Under `jax.vmap` it stays one as long as that number is not
    mapped over (in `bilevel_jax.run` it never is); where it is, both branches run and every step pays a full pass.

    Args:
        period: updates from one refresh to the next, at least 1.

    Raises:
        TypeError, ValueError: if ``period`` is not an int of at least 1; (when traced) if ``batch.full`` is missing.

    Cost: two oracle calls on the draw in all but one of ``period`` updates, and one on the full data in that one.

    Reference: Nguyen, Liu, Scheinberg, Takáč, "SARAH", 2017, arXiv 1703.00102; on the bilevel directions Dagréou, Moreau,
    Vaiter, Ablin, "A lower bound and a near-optimal algorithm for bilevel empirical risk minimization", arXiv 2302.08766.
    """
    checks.positive_int("period", period)

    def estimate(oracle: Any, vars: Vars, batch: Batch, count: Array, state: RecursiveState) -> Vars:
        full = on_full(batch, "sarah")
        return cond(
            count % period == 0,
            lambda: total(oracle(vars, full)),
            lambda: _difference(oracle, vars, batch, state),
        )

    return _recursive(estimate, 2 * (1 - 1 / period), 1 / period, needs_means=True)


def page(probability: float) -> Estimator:
    """PAGE: SARAH whose refresh is decided at each update by a coin, drawn from ``batch.key``.

    The first update always refreshes.  The coin makes the condition differ from lane to lane, so under `jax.vmap` over keys
    every step pays a full pass: loop over seeds with `jax.lax.map` instead.

    Args:
        probability: of a refresh, in (0, 1] for convergence; b / (b + n + m) in the papers.  0 never refreshes again.  Not
            differentiable.

    Raises:
        ValueError: if the probability is outside [0, 1]; (when traced) if ``batch.key`` or ``batch.full`` is missing.

    Cost: with probability p one oracle call on the full data, otherwise two on the draw.

    Reference: Li, Bao, Zhang, Richtárik, "PAGE", 2021, arXiv 2008.10898; on the bilevel directions Chu, Xu, Yao, Zhang,
    "SPABA", 2024, arXiv 2405.18777.
    """
    checks.unit_interval("probability", probability)
    chance = checks.constant("probability", probability)

    def estimate(oracle: Any, vars: Vars, batch: Batch, count: Array, state: RecursiveState) -> Vars:
        full = on_full(batch, "page")
        if batch.key is None:
            raise ValueError("batch.key: got None, expected a key, from which page draws its coin")
        # A key of its own, so that the coin is independent of what a loss draws from batch.key.
        coin = jax.random.bernoulli(jax.random.fold_in(batch.key, 0x9A6E), jnp.asarray(chance, jnp.float32))
        return cond(
            (count == 0) | coin,
            lambda: total(oracle(vars, full)),
            lambda: _difference(oracle, vars, batch, state),
        )

    return _recursive(estimate, 2 * (1 - probability), probability, needs_means=True)


def storm(eta: Schedule) -> Estimator:
    """STORM: ``D <- D_ij(new) + (1 - eta) (D - D_ij(old))``, the same draw at both points.

    The first update returns the plain direction (public code starts from zero momentum, and so takes its first corrections
    at a wrong point).  ``eta = 1`` is `plain`, exactly.

    Args:
        eta: a number in [0, 1] or a schedule of the number of updates, clipped to [0, 1].

    Cost: two oracle calls an update.  Memory: one direction and one copy of the variables.

    Reference: Cutkosky, Orabona, "Momentum-based variance reduction in non-convex SGD", 2019, arXiv 1905.10018.
    """
    checks.unit_interval("eta", eta)

    def estimate(oracle: Any, vars: Vars, batch: Batch, count: Array, state: RecursiveState) -> Vars:
        new, old = total(oracle(vars, batch)), total(oracle(state.vars, batch))
        keep = 1 - jnp.where(count == 0, 1.0, weight_at(eta, count))
        return jax.tree.map(lambda n, o, d: n + keep.astype(n.dtype) * (d - o), new, old, state.direction)

    return _recursive(estimate, 2.0, 0.0, needs_means=False)
