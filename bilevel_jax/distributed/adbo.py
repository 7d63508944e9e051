"""Asynchronous distributed bilevel optimization: the pure updates of its workers and of its master.

N workers hold data of their own; the problem in consensus form is::

    min  sum_i f_i(inner_i, outer_i)     s.t.  outer_i = consensus_outer  for all i,
         ({inner_i}, consensus_inner) = argmin  sum_i g_i(inner'_i, consensus_outer)  s.t.  inner'_i = consensus_inner'

The inner problem becomes ``inner_gap <= cut_tolerance``, where ``inner_gap`` is the squared distance of ({inner_i},
consensus_inner) to an estimate of its solution, and that is replaced by cutting planes.  Workers and master then descend in
the variables and ascend in the multipliers of the regularised Lagrangian::

    L = sum_i f_i(inner_i, outer_i) + sum_i consensus_multiplier_i' (outer_i - consensus_outer)
      + sum_l cut_multiplier_l (cut_outer_l' consensus_outer + sum_i cut_inner_il' inner_i + cut_consensus_l' consensus_inner
                                + cut_offset_l)  - sum_l cut_damping / 2 cut_multiplier_l^2
      - sum_i consensus_damping / 2 |consensus_multiplier_i|^2

Words, not letters: the v and z of the paper are *not* those of this library.  All variables are flattened once, when the
algorithm is made, into vectors: n numbers of the outer variable, m of the inner one; C is the room for cuts.

Who answers when is not decided here: `bilevel_jax.distributed.simulate` has a virtual clock, and
`bilevel_jax.distributed.cluster` real processes.

Reference: Jiao, Yang, Wu, Song, Jian, "Asynchronous distributed bilevel optimization", ICLR 2023, arXiv 2212.10048.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jax.flatten_util import ravel_pytree

from bilevel_jax import checks
from bilevel_jax.distributed.cuts import Cuts, add, drop_idle, rows, values
from bilevel_jax.distributed.rates import Rates, damping, filled
from bilevel_jax.optimisers import value_at
from bilevel_jax.oracles import losses
from bilevel_jax.trees import matmul, widen
from bilevel_jax.types import Array, Batch, Problem, Schedule, Vars


class Worker(NamedTuple):
    """What one worker holds beside its data: its variables, and what it last received."""

    outer: Array  # [n]
    inner: Array  # [m]
    consensus_multiplier: Array  # [n]
    cut_multiplier: Array  # [C]
    cut_inner: Array  # [C, m]
    received_at: Array  # int32 [], the master's iteration then; also the number of its draw


class Master(NamedTuple):
    """All that the master holds.  Any worker, and the whole run, can be brought back from it."""

    step: Array  # int32 [], iterations done
    consensus_outer: Array  # [n]
    consensus_inner: Array  # [m]
    outer: Array  # [N, n], as last answered
    inner: Array  # [N, m]
    consensus_multiplier: Array  # [N, n], as last sent
    received: Array  # [N, C], the cut multipliers that each worker holds
    received_at: Array  # int32 [N]
    cuts: Cuts
    estimate_multiplier: Array  # [N, m], of the last estimate
    inner_gap: Array  # [], at the last cut; the largest finite number before
    made: Array  # int32 [], cuts added so far
    refused: Array  # int32 [], cuts for which there was no room
    alive: Array  # bool [N], false once evicted


#: Rounds of the estimate, over all workers at once: ``(inner [N, m], consensus [m], multiplier [N, m]) -> inner [N, m]``.
Forward = Callable[[Array, Array, Array], Array]
#: ``(inner [N, m], cotangent [N, m]) -> (Hessian-vector products [N, m], cross products [N, n])``.
Backward = Callable[[Array, Array], tuple[Array, Array]]


class Adbo(NamedTuple):
    """The algorithm, as pure functions; `adbo` makes it."""

    init: Callable[..., Master]  # (workers=None) -> Master; workers: Vars of leaves [N, ...], where each worker starts
    work: Callable[[Worker, Batch], Worker]  # a step of one worker on a draw of its data
    estimate: Callable[
        ..., Array
    ]  # a worker's part of a round: (inner [m], consensus [m], multiplier [m], outer [n], batch, step)
    pull: Callable[[Array, Array, Array, Batch], tuple[Array, Array]]  # its derivative: (inner, cotangent, outer [n], batch)
    update: Callable[[Master, Array], Master]  # the master's iteration, once the answers of ``active [N]`` are recorded
    cut: Callable[[Master, Forward, Backward], Master]  # drop idle cuts, estimate, add a cut
    vars: Callable[[Master], Vars]  # consensus variables as the user's pytrees
    n_workers: int
    max_cuts: int
    cut_period: int
    last_cut: int
    estimate_rounds: int
    inner_size: int
    outer_size: int
    dtype: Any


def adbo(
    problem: Problem,
    start: Vars,
    rates: Rates,
    *,
    n_workers: int,
    max_cuts: int = 32,
    cut_period: int = 50,
    last_cut: int | None = None,
    cut_tolerance: Any = 1e-4,
    estimate_rounds: int = 1,
    penalty: Any = 1.0,
    warm_start: bool = False,
    newest: bool = False,
    cut_damping: Schedule | None = None,
    consensus_damping: Schedule | None = None,
) -> Adbo:
    """ADBO: workers step on their own data, a master that waits for some of them only, cutting planes for the inner problem.

    ``work``, worker i, both slopes at the old point (f_i rarely depends on both variables, and the paper does not say)::

        outer_i <- outer_i - rates.outer (d_outer f_i + consensus_multiplier_i)
        inner_i <- inner_i - rates.inner (d_inner f_i + sum_l cut_multiplier_l cut_inner_il)

    ``update``, the master, each line with the newest values (Gauss-Seidel)::

        consensus_outer <- consensus_outer - rates.consensus_outer (sum_l cut_multiplier_l cut_outer_l
                                                                     - sum_i consensus_multiplier_i)
        consensus_inner <- consensus_inner - rates.consensus_inner sum_l cut_multiplier_l cut_consensus_l
        cut_multiplier_l <- max(0, cut_multiplier_l + rates.cut (value of cut l - cut_damping cut_multiplier_l))
        consensus_multiplier_i <- consensus_multiplier_i + rates.consensus (outer_i - consensus_outer
                                  - consensus_damping consensus_multiplier_i)        for the workers that answered

    ``cut``, every ``cut_period`` iterations: cuts whose multiplier was 0 at the last two iterations go; the solution of the
    inner problem is estimated by ``estimate_rounds`` rounds; where the gap is above the tolerance, its linearisation is a new
    cut. A round is::

        worker  inner_i <- inner_i - rates.estimate_inner (d_inner g_i + multiplier_i + penalty (inner_i - consensus))
        master  consensus <- consensus - rates.estimate_consensus sum_i (penalty (consensus - inner_i) - multiplier_i)
        master  multiplier_i <- multiplier_i + rates.estimate_multiplier (inner_i - consensus)

    Without a live cut the consensus inner variable does not move.  SDBO, the synchronous method, is this one with all N
    answers awaited.

    Args:
        problem: the losses of one worker on its data.
        start: ``Vars(inner, outer)``, where everything starts; leaves of one dtype.  Multipliers start at 0.
        rates: step sizes.
        n_workers: N.
        max_cuts: C, room for cuts.  ``C (N m + n + m)`` numbers are kept, and read at every iteration.  When it is full, new
            cuts are refused and counted in ``Master.refused``.
        cut_period, last_cut: iterations from one cut to the next, and the iteration from which there are none (the theory wants
            an end; by default there is none).
        cut_tolerance: of the gap.  The gap scales with the square of the estimate's rates: choose it relative to that.
        estimate_rounds: K.
        penalty: of the estimate's augmented Lagrangian.
        warm_start: start the multipliers of an estimate at the last ones, not at 0 as published.  From 0 the constraint is
            biased towards the solution of the penalised problem, and the inner_i disagree for good; warm, they agree better.
        newest: use the inner_i of the same round in the step of the estimate's consensus, as public code does, not those
            of the round before, as the paper has it.
        cut_damping, consensus_damping: c1 and c2, numbers or functions of the iteration; by default `damping` of the rates.

    Raises:
        TypeError, ValueError: for counts that are not positive ints (a room of 0 cuts, no worker), rates and other numbers
            that are not positive, a start whose leaves are not floating-point arrays of one dtype.

    Cost: a worker's step is one outer gradient; a cut is K inner gradients, K Hessian-vector and K cross products a worker.

    Deviations: answers under way when a cut begins are waited for and recorded before it (a barrier waits for them anyway), so
    that each cut is taken at the inner variables that the workers hold, and no worker meets old coefficients with new
    multipliers; the message that follows an iteration then carries the new cut.  The derivative of the gap goes back through
    all rounds and through the estimate's consensus, exactly.  The estimate's model of g_i, of first order in the outer variable
    around the point of the cut, has the value and the derivative of g_i there, so nothing of it is left in the code.  (For K >
    1 the gap need not be convex in the outer variable, and the cut need not be an outer one.)

    Reference: Jiao, Yang, Wu, Song, Jian, "Asynchronous distributed bilevel optimization", ICLR 2023, arXiv 2212.10048.

    Example:
        >>> from bilevel_jax.distributed import simulate
        >>> from bilevel_jax.samplers import full
        >>> from bilevel_jax.types import Levels
        >>> toy = Problem(lambda z, x, b: ((z - x - b) ** 2).sum() / 2, lambda z, x, a: ((z - a) ** 2).sum() / 2)
        >>> A, B = jax.random.normal(jax.random.key(1), (2, 6, 3))
        >>> rates = Rates(0.02, 0.02, 0.02, 0.02, 0.1, 0.05, 0.3, 0.05, 0.3)
        >>> method = adbo(toy, Vars(jnp.zeros(3), None, jnp.zeros(3)), rates, n_workers=6, cut_period=20, max_cuts=64,
        ...               estimate_rounds=5, cut_damping=0.04, consensus_damping=0.002)
        >>> machines = simulate.Cluster(simulate.log_normal(0.03))
        >>> plan = simulate.schedule(machines, method, steps=3000, quorum=3, max_staleness=8)
        >>> go = jax.jit(simulate.simulate, static_argnums=(0, 1))
        >>> master, history = go(method, full(), plan, Levels(B, A), jax.random.key(0))
        >>> found = method.vars(master)  # the optimum: mean(A) for the inner variable, mean(A) - mean(B) for the outer one
        >>> inner, outer = found.inner - A.mean(0), found.outer - (A - B).mean(0)
        >>> bool(jnp.linalg.norm(inner) < 0.3), bool(jnp.linalg.norm(outer) < 0.3)
        (True, True)
    """
    N, C = checks.positive_int("n_workers", n_workers), checks.positive_int("max_cuts", max_cuts)
    cut_period, K = checks.positive_int("cut_period", cut_period), checks.positive_int("estimate_rounds", estimate_rounds)
    last_cut = 2**31 - 1 if last_cut is None else checks.positive_int("last_cut", last_cut, 0)
    checks.positive("penalty", penalty)
    rates = filled(rates)
    cut_damping = damping(rates.cut) if cut_damping is None else cut_damping
    consensus_damping = damping(rates.consensus) if consensus_damping is None else consensus_damping
    for name, value in (("cut_damping", cut_damping), ("consensus_damping", consensus_damping)):
        checks.positive(name, value, schedule=True)
    if not isinstance(cut_tolerance, Tracer) and not cut_tolerance >= 0:
        raise ValueError(f"cut_tolerance: got {cut_tolerance}, expected at least 0")
    (inner0, to_inner), (outer0, to_outer) = _flat("start.inner", start.inner), _flat("start.outer", start.outer)
    if inner0.dtype != outer0.dtype:
        raise TypeError(f"start: got {inner0.dtype} inner and {outer0.dtype} outer variables, expected one dtype")
    n, m, dtype = outer0.size, inner0.size, inner0.dtype
    g, f = losses(problem)

    def at(schedule: Any, step: Array) -> Array:
        return jnp.asarray(value_at(schedule, step)).astype(dtype)

    def init(workers: Vars | None = None) -> Master:
        inner, outer = jnp.tile(inner0, (N, 1)), jnp.tile(outer0, (N, 1))
        if workers is not None:
            for name, part, like in (("inner", workers.inner, start.inner), ("outer", workers.outer, start.outer)):
                if part is not None:
                    stacked = jax.tree.map(lambda leaf: jnp.zeros((N, *jnp.shape(leaf)), dtype), like)
                    checks.same_shapes(f"workers.{name}", part, stacked, f"start.{name} with a leading axis of {N} workers")
            inner = inner if workers.inner is None else jax.vmap(lambda tree: ravel_pytree(tree)[0])(workers.inner)
            outer = outer if workers.outer is None else jax.vmap(lambda tree: ravel_pytree(tree)[0])(workers.outer)

        def zeros(*shape: int) -> Array:
            return jnp.zeros(shape, dtype)

        return Master(
            step=jnp.zeros((), jnp.int32),
            consensus_outer=jnp.copy(outer0),
            consensus_inner=jnp.copy(inner0),
            outer=outer,
            inner=inner,
            consensus_multiplier=zeros(N, n),
            received=zeros(N, C),
            received_at=jnp.zeros(N, jnp.int32),
            cuts=Cuts(zeros(C, n), zeros(N, C, m), zeros(C, m), zeros(C), zeros(N, C), zeros(C), zeros(C), jnp.zeros(C, bool)),
            estimate_multiplier=zeros(N, m),
            inner_gap=jnp.full((), jnp.finfo(dtype).max, dtype),
            made=jnp.zeros((), jnp.int32),
            refused=jnp.zeros((), jnp.int32),
            alive=jnp.ones(N, bool),
        )

    def work(worker: Worker, batch: Batch) -> Worker:
        def loss(inner: Array, outer: Array) -> Array:
            return f(to_inner(inner), to_outer(outer), batch)

        d_inner, d_outer = jax.grad(loss, argnums=(0, 1))(worker.inner, worker.outer)
        t = worker.received_at
        outer = worker.outer - at(rates.outer, t) * (d_outer + worker.consensus_multiplier)
        inner = worker.inner - at(rates.inner, t) * (d_inner + matmul(worker.cut_multiplier, worker.cut_inner).astype(dtype))
        return worker._replace(outer=outer, inner=inner)

    def update(master: Master, active: Array) -> Master:
        t, cuts, multiplier = master.step, master.cuts, master.consensus_multiplier
        way_outer = matmul(cuts.multiplier, cuts.outer) - widen(rows(master.alive, multiplier)).sum(0)
        way_inner = matmul(cuts.multiplier, cuts.consensus)
        consensus_outer = master.consensus_outer - at(rates.consensus_outer, t) * way_outer.astype(dtype)
        consensus_inner = master.consensus_inner - at(rates.consensus_inner, t) * way_inner.astype(dtype)
        value = values(cuts, consensus_outer, consensus_inner, master.inner, master.alive)
        ascent = cuts.multiplier + at(rates.cut, t) * (value - at(cut_damping, t) * cuts.multiplier)
        cut_multiplier = jnp.where(cuts.live, jnp.maximum(ascent, jnp.zeros((), dtype)), jnp.zeros((), dtype))
        residual = master.outer - consensus_outer[None] - at(consensus_damping, t) * multiplier
        return master._replace(
            step=t + 1,
            consensus_outer=consensus_outer,
            consensus_inner=consensus_inner,
            consensus_multiplier=jnp.where(active[:, None], multiplier + at(rates.consensus, t) * residual, multiplier),
            cuts=cuts._replace(multiplier=cut_multiplier, before=cuts.multiplier),
            received=jnp.where(active[:, None], cut_multiplier[None], master.received),
            received_at=jnp.where(active, t + 1, master.received_at),
        )

    def slope(inner: Array, outer: Array, batch: Batch) -> Array:
        return jax.grad(lambda z: g(to_inner(z), to_outer(outer), batch))(inner)

    def estimate(inner: Array, consensus: Array, multiplier: Array, outer: Array, batch: Batch, step: Array) -> Array:
        pull = slope(inner, outer, batch) + multiplier + penalty * (inner - consensus)
        return inner - at(rates.estimate_inner, step) * pull

    def pull(inner: Array, cotangent: Array, outer: Array, batch: Batch) -> tuple[Array, Array]:
        return jax.vjp(lambda z, x: slope(z, x, batch), inner, outer)[1](cotangent)

    def cut(master: Master, forward: Forward, backward: Backward) -> Master:
        t, alive = master.step, master.alive
        rate, consensus_rate = at(rates.estimate_inner, t), at(rates.estimate_consensus, t)

        def close(consensus: Array, multiplier: Array, old: Array, new: Array) -> tuple[Array, Array]:
            """The master's part of a round; linear."""
            apart = penalty * (consensus[None] - (new if newest else old)) - multiplier
            consensus = consensus - consensus_rate * rows(alive, apart).sum(0)
            return consensus, multiplier + at(rates.estimate_multiplier, t) * (new - consensus[None])

        inner, consensus = master.inner, master.consensus_inner
        multiplier = master.estimate_multiplier if warm_start else jnp.zeros_like(inner)
        path = []
        for _ in range(K):
            new = forward(inner, consensus, multiplier)
            path.append((consensus, multiplier, inner, new))
            consensus, multiplier = close(consensus, multiplier, inner, new)
            inner = new

        apart, apart_consensus = rows(alive, master.inner - inner), master.consensus_inner - consensus
        parts, rest = (apart**2).sum(1), (apart_consensus**2).sum()
        gap = parts.sum() + rest

        # Backwards through the rounds, from the cotangents of ({inner_i}, consensus, {multiplier_i}); what the estimate starts
        # at is constant.
        d_inner, d_consensus, d_multiplier = -2 * apart, -2 * apart_consensus, jnp.zeros_like(inner)
        d_outer = jnp.zeros_like(master.consensus_outer)
        for before in reversed(path):
            to_consensus, to_multiplier, to_old, to_new = jax.vjp(close, *before)[1]((d_consensus, d_multiplier))
            cotangent = rows(alive, d_inner + to_new)
            hessian, cross = backward(before[2], cotangent)
            d_inner = to_old + cotangent - rate * (rows(alive, hessian) + penalty * cotangent)
            d_consensus = to_consensus + rate * penalty * cotangent.sum(0)
            d_multiplier = to_multiplier - rate * cotangent
            d_outer = d_outer - rate * rows(alive, cross).sum(0)

        fresh = Cuts(
            outer=d_outer,
            inner=2 * apart,
            consensus=2 * apart_consensus,
            offset=(
                widen(rest)
                - matmul(2 * apart_consensus, master.consensus_inner)
                - matmul(d_outer, master.consensus_outer)
                - cut_tolerance
            ).astype(dtype),
            share=parts - 2 * (apart * master.inner).sum(1),
            multiplier=jnp.zeros((), dtype),
            before=jnp.zeros((), dtype),
            live=jnp.array(True),
        )
        cuts = drop_idle(master.cuts)
        wanted = (gap > cut_tolerance) & jnp.isfinite(gap)
        cuts, placed = add(cuts, fresh, wanted)
        return master._replace(
            cuts=cuts,
            received=jnp.tile(cuts.multiplier, (N, 1)),
            estimate_multiplier=jnp.where(jnp.isfinite(gap), multiplier, master.estimate_multiplier),
            inner_gap=gap,
            made=master.made + placed.astype(jnp.int32),
            refused=master.refused + (wanted & ~placed).astype(jnp.int32),
        )

    def vars(master: Master) -> Vars:
        return Vars(inner=to_inner(master.consensus_inner), outer=to_outer(master.consensus_outer))

    return Adbo(init, work, estimate, pull, update, cut, vars, N, C, cut_period, last_cut, K, m, n, dtype)


def record(master: Master, outer: Array, inner: Array, answered: Array) -> Master:
    """Take in the answers ``outer [N, n]``, ``inner [N, m]`` of the workers in ``answered [N]``."""
    taken = answered[:, None]
    return master._replace(outer=jnp.where(taken, outer, master.outer), inner=jnp.where(taken, inner, master.inner))


def workers(master: Master) -> Worker:
    """What each worker holds, leaves ``[N, ...]``: the message from which a worker steps, or is brought back to life."""
    return Worker(
        master.outer, master.inner, master.consensus_multiplier, master.received, master.cuts.inner, master.received_at
    )


def rounds(method: Adbo, master: Master, batches: Batch) -> tuple[Forward, Backward]:
    """The rounds of a cut, vmapped over the workers of one device; ``batches`` has a leading axis of N."""
    x, t = master.consensus_outer, master.step
    forward = jax.vmap(lambda e, c, y, batch: method.estimate(e, c, y, x, batch, t), in_axes=(0, None, 0, 0))
    backward = jax.vmap(lambda e, cotangent, batch: method.pull(e, cotangent, x, batch))
    return lambda e, c, y: forward(e, c, y, batches), lambda e, cotangent: backward(e, cotangent, batches)


def evict(master: Master, who: Array) -> Master:
    """Drop the workers ``who``, bool [N], for good: neither their multipliers nor their terms of the cuts count from now on.

    What they added to ``cut_outer`` of the cuts that are live stays; new cuts are without it.
    """
    return master._replace(alive=master.alive & ~who)


def disagreement(master: Master) -> Vars:
    """The largest ``|inner_i - consensus_inner|`` and ``|outer_i - consensus_outer|`` over the workers: float []."""

    def largest(each: Array, consensus: Array) -> Array:
        apart = rows(master.alive, each - consensus[None])
        return jnp.sqrt((apart**2).sum(1).max())

    return Vars(inner=largest(master.inner, master.consensus_inner), outer=largest(master.outer, master.consensus_outer))


def _flat(name: str, tree: Any) -> tuple[Array, Callable[[Array], Any]]:
    tree = checks.floating(name, tree)
    kinds = {leaf.dtype for leaf in jax.tree.leaves(tree)}
    if len(kinds) > 1:
        raise TypeError(f"{name}: got leaves of dtypes {sorted(map(str, kinds))}, expected one dtype")
    return ravel_pytree(tree)
