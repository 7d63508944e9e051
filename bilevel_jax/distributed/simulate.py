"""A virtual clock for distributed methods: who answers when, without waiting for it.

Delays do not depend on the iterates.  So `schedule` plays the events first (in NumPy, on one queue ordered by time, then
worker), and `simulate` runs the numerics of the whole run as one compiled program over what it found.  The n-th answer of
worker i takes the same time whatever happens before it: methods that are compared meet the same delays.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bilevel_jax import checks
from bilevel_jax.control_flow import cond, marked, scan
from bilevel_jax.distributed import adbo
from bilevel_jax.distributed.adbo import Adbo, Master, Worker
from bilevel_jax.distributed.clock import Clock
from bilevel_jax.results import Result, all_finite
from bilevel_jax.samplers import Sampler
from bilevel_jax.types import Array, Batch, Levels, Vars

#: ``(generator, count) -> seconds [count]``.
Delay = Callable[[np.random.Generator, int], np.ndarray]


def constant(seconds: float) -> Delay:
    """The same delay always."""
    _at_least("seconds", seconds, 0)
    return lambda random, count: np.full(count, float(seconds))


def log_normal(median: float, sigma: float = 1.0) -> Delay:
    """Log-normal delays: of mean ``median exp(sigma^2 / 2)``."""
    _at_least("median", median, 0)
    _at_least("sigma", sigma, 0)
    return lambda random, count: median * np.exp(sigma * random.standard_normal(count))


def pareto(least: float, exponent: float = 1.5) -> Delay:
    """Heavy-tailed delays, ``P(delay > s) = (least / s)^exponent``: of infinite variance for exponents up to 2."""
    _at_least("least", least, 0)
    checks.positive("exponent", exponent)
    return lambda random, count: least * (1 + random.pareto(exponent, count))


class Failure(NamedTuple):
    """Worker ``worker`` is lost at ``at`` virtual seconds, with the answer under way, and comes back at ``back``."""

    worker: int
    at: float
    back: float = np.inf


class Cluster(NamedTuple):
    """The machines: an answer of worker i takes ``slowdown[i] (compute + delay)`` virtual seconds."""

    delay: Delay
    compute: float = 0.0
    slowdown: Any = 1.0  # a number, or [N]
    failures: tuple[Failure, ...] = ()


def stragglers(n_workers: int, count: int, factor: float) -> np.ndarray:
    """Slowdowns ``[N]``: ``factor`` for the last ``count`` workers, 1 for the others.

    Example:
        >>> stragglers(4, 1, 10.0)
        array([ 1.,  1.,  1., 10.])
    """
    checks.positive_int("n_workers", n_workers)
    checks.positive_int("count", count, 0)
    checks.positive("factor", factor)
    if count > n_workers:
        raise ValueError(f"count: got {count} stragglers, expected at most n_workers = {n_workers}")
    return np.repeat([1.0, float(factor)], [n_workers - count, count])


class Schedule(NamedTuple):
    """What happens at each of T iterations, and at the end of each period of them, after which a cut may come."""

    seconds: Any  # float64 [T], the clock when the master's iteration is done
    active: Any  # bool [T, N], workers whose answers it waited for
    worked: Any  # bool [T, N], those of them whose answers are new: the others' came in before the last cut
    alive: Any  # bool [T, N], not evicted
    age: Any  # int32 [T, N], iterations since the last answer, when the iteration begins
    drained: Any  # bool [P, N], workers whose answers came in before the cut of the period
    present: Any  # bool [P, N], not evicted when the cut is done
    period_seconds: Any  # float64 [P], the clock when the period and its cut are done
    blocked: int  # the worker that the master waits for in vain, by which the run is shorter; -1 if none is, N if none is left


def schedule(
    cluster: Cluster,
    method: Adbo,
    *,
    steps: int,
    quorum: int,
    max_staleness: int,
    on_lost: str = "restore",
    seed: int = 0,
) -> Schedule:
    """Play the events of a run.

    The master goes on when at least ``quorum`` workers have answered and the last answer of every worker is less than
    ``max_staleness`` iterations old; ties in time are broken by the worker's index.  A cut is a barrier: answers under way
    come in, then all workers answer ``2 estimate_rounds`` times (the estimate, and back through it for its derivative).

    A worker that comes back is sent what it had been sent before: it does its step anew, and is merely late.

    Args:
        cluster: the machines.
        method: of `bilevel_jax.distributed.adbo.adbo`; its ``n_workers``, ``cut_period``, ``last_cut``, ``estimate_rounds``.
        steps: T, a multiple of ``method.cut_period``.
        quorum: S; with ``n_workers`` the method is synchronous (SDBO).
        max_staleness: tau.
        on_lost: ``"wait"`` or ``"restore"``: wait for a lost worker, once it is tau iterations old (here they are the same: it
            is back when its `Failure` says so); ``"evict"``: go on without it for good.
        seed: of the delays.

    Returns:
        The schedule; shorter than ``steps``, by whole periods, if the master waits for a worker that never comes back.

    Raises:
        TypeError, ValueError: for counts that are not positive ints, a quorum above N, a slowdown or a failure that fits no
            worker.

    Cost: none of the oracle; some 10 microseconds of the host an answer.

    Example:
        >>> from bilevel_jax.types import Problem
        >>> zeros = Vars(jnp.zeros(1), None, jnp.zeros(1))
        >>> rates = adbo.Rates(*(0.1,) * 6)
        >>> method = adbo.adbo(Problem(lambda z, x, b: 0.0, lambda z, x, a: 0.0), zeros, rates, n_workers=3, cut_period=2)
        >>> plan = schedule(Cluster(constant(1.0), slowdown=stragglers(3, 1, 2.5)), method, steps=4, quorum=2, max_staleness=9)
        >>> plan.seconds, plan.period_seconds  # a cut is two rounds of all
        (array([1. , 2. , 8.5, 9.5]), array([ 7.5, 16. ]))
    """
    N, period = method.n_workers, method.cut_period
    for name, value in (("steps", steps), ("quorum", quorum), ("max_staleness", max_staleness)):
        checks.positive_int(name, value)
    if steps % period:
        raise ValueError(f"steps: got {steps}, expected a multiple of the method's cut_period = {period}")
    if quorum > N:
        raise ValueError(f"quorum: got {quorum}, expected at most n_workers = {N}")
    if on_lost not in ("wait", "restore", "evict"):
        raise ValueError(f"on_lost: got {checks.shown(on_lost)}, expected 'wait', 'restore' or 'evict'")
    counts = steps + 1, 2 * method.estimate_rounds * (steps // period)
    seconds = [durations(cluster, N, count, seed, kind) for kind, count in enumerate(counts)]
    clock = Clock(seconds, cluster.failures, on_lost == "evict")
    rows, ends = [], []
    clock.send(np.ones(N, bool))
    for t in range(steps):
        age = clock.age.copy()
        worked = clock.wait(quorum, max_staleness)
        if worked is None:
            break
        rows.append((clock.now, clock.arrived & clock.alive, worked, clock.alive.copy(), age))
        answered = clock.proceed()
        if (t + 1) % period == 0:
            drained = clock.barrier(2 * method.estimate_rounds) if t + 1 < method.last_cut else np.zeros(N, bool)
            if drained is None:
                break
            ends.append((drained, clock.alive.copy(), clock.now))
        clock.send(answered)
    kept, none = len(ends) * period, np.zeros((0, N), bool)
    seconds, active, worked, alive, age = zip(*rows[:kept], strict=True) if kept else (none[:, 0], none, none, none, none)
    drained, present, period_seconds = zip(*ends, strict=True) if kept else (none, none, none[:, 0])
    arrays = map(np.array, (seconds, active, worked, alive, age, drained, present, period_seconds))
    return Schedule(*arrays, blocked=clock.blocked)


def barriers(cluster: Cluster, n_workers: int, rounds: int, *, seed: int = 0) -> np.ndarray:
    """The clock after each of ``rounds`` rounds in which all workers answer, float64 [rounds]: for synchronous methods.

    Example:
        >>> barriers(Cluster(constant(1.0), slowdown=stragglers(3, 1, 4.0)), 3, 2)
        array([4., 8.])
    """
    checks.positive_int("n_workers", n_workers)
    checks.positive_int("rounds", rounds)
    return durations(cluster, n_workers, rounds, seed, 0).max(0).cumsum()


def simulate(
    method: Adbo,
    sampler: Sampler,
    plan: Schedule,
    data: Levels,
    key: Array,
    *,
    workers: Vars | None = None,
    metrics: Callable[[Vars, Levels], dict[str, Array]] | None = None,
    loop: str = "auto",
) -> tuple[Master, dict[str, Array]]:
    """Run the numerics of a schedule: one scan, pure, to be jitted by its caller (``static_argnums=(0, 1)``).

    Args:
        method: of `bilevel_jax.distributed.adbo.adbo`.
        sampler: of a worker's draws from its own data; that of its step is number ``received_at``, that of a cut the iteration.
        plan: of `schedule`.
        data: ``Levels`` whose leaves have a leading axis of N workers, ``[N, rows, ...]``.
        key: typed key; worker i draws from ``fold_in(key, i)``.
        workers: where each worker starts, leaves ``[N, ...]``, if not at the method's start.
        metrics: ``(consensus variables, data) -> {name: array}``.
        loop: how the workers' steps are done: ``"vmap"``, all N at once, for accelerators; ``"scan"``, one after the other and
            only those whose answers are new; ``"auto"`` is scan on a CPU.

    Returns:
        The master, and a history of a row a period: ``step``, ``seconds``, ``inner_gap`` (as at the cut), ``cuts`` (live),
        ``made`` and ``refused`` (in all), ``inner_apart`` and ``outer_apart`` (`bilevel_jax.distributed.adbo.disagreement`),
        ``result`` (of `bilevel_jax.results.Result`; NONFINITE once a variable or the gap is) and the metrics.

    Raises:
        TypeError, ValueError: for data that are not those of N workers.

    Cost: a step of each worker that answers (under vmap of all N at each iteration), and the cuts of
    `bilevel_jax.distributed.adbo.adbo`.
    """
    N, period = method.n_workers, method.cut_period
    if not isinstance(data, Levels):
        raise TypeError(f"data: got {type(data).__name__}, expected Levels(inner=..., outer=...)")
    checks.arrays("data", data)
    data = jax.tree.map(jnp.asarray, data)
    for name, part in zip(Levels._fields, data, strict=True):
        checks.leading_axis(f"data.{name}", part, N, "one entry a worker")
        if any(leaf.shape[1:2] == (0,) for leaf in jax.tree.leaves(part)):
            raise ValueError(f"data.{name}: got workers without samples, expected at least one each")
    if loop not in ("auto", "vmap", "scan"):
        raise ValueError(f"loop: got {checks.shown(loop)}, expected 'auto', 'vmap' or 'scan'")
    kind = ("scan" if jax.default_backend() == "cpu" else "vmap") if loop == "auto" else loop
    keys = jax.vmap(lambda i: jax.random.fold_in(key, i))(jnp.arange(N))

    def draw(data: Levels, key: Array, number: Array) -> Batch:
        chosen = sampler.plan(data, key, number, 1)
        return sampler.gather(data, jax.tree.map(lambda leaf: leaf[0], chosen))

    def step(worker: Worker, data: Levels, key: Array) -> tuple[Array, Array]:
        moved = method.work(worker, draw(data, key, worker.received_at))
        return moved.outer, moved.inner

    def answer(master: Master, answered: Array) -> Master:
        held = adbo.workers(master)

        def one(_: None, i: Array) -> tuple[None, tuple[Array, Array]]:
            idle = held.outer[i], held.inner[i]
            return None, cond(answered[i], lambda: step(*jax.tree.map(lambda leaf: leaf[i], (held, data, keys))), lambda: idle)

        outer, inner = jax.vmap(step)(held, data, keys) if kind == "vmap" else scan(one, None, jnp.arange(N))[1]
        return adbo.record(master, outer, inner, answered)

    def iterate(master: Master, event: tuple[Array, Array, Array]) -> tuple[Master, None]:
        active, worked, alive = event
        master = answer(master._replace(alive=alive), worked)
        return method.update(master, active), None

    def row(master: Master, seconds: Array) -> dict[str, Array]:
        apart, found = adbo.disagreement(master), method.vars(master)
        fine = all_finite((found, apart)) & ~jnp.isnan(master.inner_gap)
        code = jnp.where(fine, jnp.int32(Result.SUCCESSFUL), jnp.int32(Result.NONFINITE))
        known = {"step": master.step, "seconds": seconds, "inner_gap": master.inner_gap, "cuts": master.cuts.live.sum()}
        known |= {"made": master.made, "refused": master.refused, "inner_apart": apart.inner, "outer_apart": apart.outer}
        return known | {"result": code} | (metrics(found, data) if metrics else {})

    def one_period(with_cut: bool) -> Callable[..., tuple[Master, dict[str, Array]]]:
        def body(master: Master, events: tuple) -> tuple[Master, dict[str, Array]]:
            each, drained, present, seconds = events
            master, _ = scan(iterate, master, each)
            if with_cut:
                master = answer(master, drained)._replace(alive=present)
                master = method.cut(master, *adbo.rounds(method, master, jax.vmap(draw)(data, keys, jnp.full(N, master.step))))
            return master, row(master, seconds)

        return body

    P = len(plan.period_seconds)
    each = jax.tree.map(lambda leaf: jnp.asarray(leaf).reshape(P, period, N), (plan.active, plan.worked, plan.alive))
    events = each, jnp.asarray(plan.drained), jnp.asarray(plan.present), jnp.asarray(plan.period_seconds, method.dtype)
    with_cut = min(P, max(0, (method.last_cut - 1) // period))  # cuts come after iterations below the last one
    master = marked(method.init(workers), key)
    first = jax.tree.map(lambda leaf: leaf[None], row(master, jnp.zeros((), method.dtype)))
    master, early = scan(one_period(True), master, jax.tree.map(lambda leaf: leaf[:with_cut], events))
    master, late = scan(one_period(False), master, jax.tree.map(lambda leaf: leaf[with_cut:], events))
    return master, jax.tree.map(lambda *parts: jnp.concatenate(parts), first, early, late)


class Traffic(NamedTuple):
    """Numbers sent so far at the end of each period, int64 [P]; times the bytes of one, that is what travels."""

    up: np.ndarray
    down: np.ndarray


def traffic(method: Adbo, plan: Schedule, made: Any) -> Traffic:
    """What workers and master have sent one another.

    Up, an answer is n + m numbers; a cut takes from each worker m for every round of the estimate, and m + n for every round
    back.  Down, a message to a worker that answered is n + C (its consensus multiplier, the cut multipliers); a cut takes to
    each worker n (the outer variable), 2 m a round and m a round back, then C multipliers, and m for a cut that is added.

    Args:
        method, plan: as of the run.
        made: int [P + 1], cuts added so far, as ``history["made"]`` has them.
    """
    n, m, C, K = method.outer_size, method.inner_size, method.max_cuts, method.estimate_rounds
    P = len(plan.period_seconds)
    answers = np.asarray(plan.worked).reshape(P, -1).sum(1) + np.asarray(plan.drained).sum(1)
    replies = np.asarray(plan.active).reshape(P, -1).sum(1)
    present = np.asarray(plan.present).sum(1) * (method.cut_period * np.arange(1, P + 1) < method.last_cut)
    up = answers * (n + m) + present * K * (2 * m + n)
    down = replies * (n + C) + present * (n + 3 * K * m + C + m * np.diff(np.asarray(made, np.int64)))
    return Traffic(np.cumsum(up), np.cumsum(down))


def durations(cluster: Cluster, n_workers: int, count: int, seed: int, kind: int) -> np.ndarray:
    """Seconds of the first answers of each worker, ``[N, count]``; a pure function of (seed, worker, kind, number)."""
    slowdown = np.asarray(cluster.slowdown, float)
    if slowdown.ndim and slowdown.shape != (n_workers,):
        raise ValueError(
            f"cluster.slowdown: got the shape {slowdown.shape}, expected a number or one entry for each of {n_workers} workers"
        )
    _at_least("cluster.compute", cluster.compute, 0)
    if not (slowdown > 0).all():
        raise ValueError(f"cluster.slowdown: got {slowdown.min()}, expected positive numbers")
    delays = [cluster.delay(np.random.default_rng([seed, i, kind]), count) for i in range(n_workers)]
    return np.broadcast_to(slowdown, n_workers)[:, None] * (cluster.compute + np.stack(delays))


def _at_least(name: str, value: float, least: float) -> None:
    if not value >= least:
        raise ValueError(f"{name}: got {value}, expected at least {least}")
