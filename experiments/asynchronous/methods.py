"""The methods that are compared: ADBO and SDBO on a virtual clock, and three that are synchronous or have no workers.

What a synchronous method computes does not depend on how long it takes: it runs once a seed, and `timed` looks up when each of
its rounds was over on the machines in question.  A round is a message to every worker and an answer of every worker.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pandas as pd

from bilevel_jax import Carry, Levels, Solver, Vars, begin, resume, samplers, solvers, spent
from bilevel_jax.distributed import d_soba, fednest, per_agent, ring, simulate
from bilevel_jax.distributed.adbo import Adbo
from bilevel_jax.distributed.fednest import rounds, sent_bytes
from bilevel_jax.distributed.gossip import sent_bytes as gossip_bytes
from bilevel_jax.distributed.simulate import Cluster, Schedule
from bilevel_jax.samplers import Sampler
from bilevel_jax.types import Array
from experiments.asynchronous.problems import FASTER, Case, Draw, Faster, measure

Method = Literal["adbo", "sdbo", "fednest", "d_soba", "saba"]
#: Rows of a block of SABA, of either level.
BATCH = 64
#: Oracle calls of an update of SABA, each on a block.
CALLS = 4


#: Updates of a baseline in a row of the history, in which SDBO does 50 iterations: FedNest takes 9.5 rounds each on average.
EVERY: dict[Method, int] = {"fednest": 5, "d_soba": 50, "saba": 200}


class Rate(NamedTuple):
    """Step sizes of a baseline; z and v (in FedNest: the terms of the series) have the same."""

    inner: Any
    outer: Any


#: Step sizes of the baselines: the lowest mean outer loss at the end of seed 0, which is in no figure, on `GRID` (``--tune``).
BEST: dict[str, dict[str, Rate]] = {
    "digits": {"fednest": Rate(0.3, 1000.0), "d_soba": Rate(0.3, 1000.0), "saba": Rate(0.3, 10.0)},
    "mnist": {"fednest": Rate(0.3, 1000.0), "d_soba": Rate(0.3, 1000.0), "saba": Rate(0.1, 10.0)},
    # Lower after 250 iterations, but diverging later: FedNest (0.1, 1000), and in one seed MNIST's (0.3, 1000) of D-SOBA.
    "fashion_mnist": {"fednest": Rate(0.03, 1000.0), "d_soba": Rate(0.1, 1000.0), "saba": Rate(0.03, 10.0)},
    "ijcnn1": {"fednest": Rate(1.0, 1.0), "d_soba": Rate(1.0, 1.0), "saba": Rate(1.0, 1.0)},
    # SABA's own best, (0.3, 1), has neighbours that diverge.
    "covtype": {"fednest": Rate(1.0, 1.0), "d_soba": Rate(1.0, 1.0), "saba": Rate(0.1, 0.1)},
}
GRID = {
    "cleaning": [Rate(a, b) for a in (0.003, 0.01, 0.03, 0.1, 0.3) for b in (10.0, 1000.0)],
    "regularisation": [Rate(a, b) for a in (0.01, 0.03, 0.1, 0.3, 1.0) for b in (0.1, 1.0)],
}


def master(case: Case) -> Callable[[Draw, Schedule, Array], dict[str, np.ndarray]]:
    """The run of ADBO (or SDBO) on a draw along a schedule: its history, a row a period.  Compiled once."""

    @jax.jit
    def go(draw: Draw, plan: Schedule, key: Array) -> dict[str, Array]:
        method = case.method(draw.start)
        found = partial(_measure, draw=draw)
        return simulate.simulate(method, samplers.full(), plan, draw.data, key, workers=draw.workers, metrics=found)[1]

    return lambda draw, plan, key: jax.device_get(go(draw, plan, key))


def _measure(vars: Vars, data: Levels, draw: Draw) -> dict[str, Array]:
    del data
    return measure(vars, draw)


def distributed(method: Adbo, plan: Schedule, history: dict[str, np.ndarray]) -> pd.DataFrame:
    """The rows of a run of ADBO or SDBO, with seconds and bytes."""
    sent, size = simulate.traffic(method, plan, history["made"]), np.dtype(method.dtype).itemsize
    known = {name: np.asarray(history[name]) for name in history}
    known["seconds"] = np.append(0.0, plan.period_seconds)
    return pd.DataFrame(known | {"bytes_up": np.append(0, sent.up) * size, "bytes_down": np.append(0, sent.down) * size})


class Baseline(NamedTuple):
    """A solver of the library, on the draws of a case."""

    build: Callable[[Rate], Solver]
    sampler: Sampler
    data: Callable[[Draw], Levels]
    mean: Callable[[Vars], Vars]  # of the variables that are measured
    updates: int
    every: int  # updates in a row of the history


def baseline(case: Case, name: Method) -> Baseline:
    """FedNest, D-SOBA on a ring, or centralised SABA on the pooled rows."""
    N, problem, every = case.size.workers, case.problem, EVERY[name]
    updates = every * (case.size.steps // case.settings.cut_period)
    if name == "fednest":
        build = lambda rate: fednest(problem, inner_rate=rate.inner, outer_rate=rate.outer, neumann_rate=rate.inner)  # noqa: E731
        return Baseline(build, samplers.full(), lambda draw: draw.data, lambda vars: vars, updates, every)
    if name == "d_soba":
        build = lambda rate: d_soba(problem, _sgd(rate), ring(N))  # noqa: E731
        mean = lambda vars: jax.tree.map(lambda leaf: leaf.mean(0), vars)  # noqa: E731
        return Baseline(build, per_agent(samplers.full()), lambda draw: draw.data, mean, updates, every)
    pooled = lambda draw: jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), draw.data)  # noqa: E731
    return Baseline(
        lambda rate: solvers.saba(problem, _sgd(rate)), samplers.uniform(BATCH), pooled, lambda vars: vars, updates, every
    )


def _sgd(rate: Rate) -> Vars:
    return Vars(optax.sgd(rate.inner), optax.sgd(rate.inner), optax.sgd(rate.outer))


class Program(NamedTuple):
    """A baseline, compiled once for all draws and step sizes."""

    begin: Callable[[Rate, Draw, Array], Carry]
    chunk: Callable[[Rate, Carry, Draw], tuple[Carry, Array]]  # also the Hessian-vector products so far
    measure: Callable[[Carry, Draw], dict[str, Array]]


def compiled(made: Baseline) -> Program:
    """Begin, a chunk of updates, and the metrics, jitted."""
    build, sampler, data = made.build, made.sampler, made.data

    def chunk(rate: Rate, carry: Carry, draw: Draw) -> tuple[Carry, Array]:
        carry, _ = resume(build(rate), sampler, carry, data(draw), steps=made.every)
        return carry, spent(build(rate), carry.state).hessian_vector

    return Program(
        jax.jit(lambda rate, draw, key: begin(build(rate), sampler, draw.start, data(draw), key)),
        jax.jit(chunk, donate_argnums=1),
        jax.jit(lambda carry, draw: measure(made.mean(carry.state.vars), draw)),
    )


def trace(case: Case, name: Method, made: Baseline, program: Program, rate: Rate, draw: Draw, seed: int) -> pd.DataFrame:
    """The rows of a baseline, with rounds (and bytes) so far; `timed` adds the seconds."""
    rate = rate._replace(outer=rate.outer / case.settings.scale**2)
    carry, products, rows = program.begin(rate, draw, jax.random.key(seed)), 0.0, []
    for part in range(1 + made.updates // made.every):
        if part:
            carry, products = program.chunk(rate, carry, draw)
        step = part * made.every
        known = {"step": step, **_travelled(case, name, step, int(products), draw), "result": int(carry.result)}
        rows.append(known | {key: float(value) for key, value in program.measure(carry, draw).items()})
    return pd.DataFrame(rows)


def _travelled(case: Case, name: Method, step: int, products: int, draw: Draw) -> dict[str, int]:
    """Rounds and bytes after so many updates and products; D-SOBA's all count as up: they go to neighbours."""
    N, start = case.size.workers, draw.start
    if name == "fednest":
        none, one = (sent_bytes(start, N, inner_rounds=1, products=count) for count in (0, 1))
        both, more = none * step + (one - none) * products, N * start.inner.nbytes * step  # down: z of the series is one more
        taken = rounds(inner_rounds=1, products=0) * step + products
        return {"rounds": taken, "bytes_up": (both - more) // 2, "bytes_down": (both + more) // 2}
    if name == "d_soba":
        shapes = jax.eval_shape(
            lambda vars: jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (N, *leaf.shape)), vars),
            start._replace(aux=start.inner),
        )
        return {"rounds": step, "bytes_up": step * gossip_bytes(ring(N), shapes), "bytes_down": 0}
    return {"rounds": 0, "bytes_up": 0, "bytes_down": 0}


def timed(case: Case, name: Method, rows: pd.DataFrame, machines: Cluster, seed: int) -> pd.DataFrame:
    """The rows with the seconds of their rounds.

    SABA runs on one machine without delays: an update reads `CALLS` blocks, and a row takes it what a row takes a worker, whose
    step reads all its validation rows in `Cluster.compute` seconds.
    """
    if name == "saba":
        assert case.size.rows
        seconds = rows["step"] * CALLS * BATCH * machines.compute / case.size.rows
    else:
        clock = simulate.barriers(machines, case.size.workers, int(rows["rounds"].iloc[-1]), seed=seed)
        seconds = np.append(0.0, clock)[rows["rounds"]]
    return rows.assign(seconds=seconds).drop(columns="rounds")


def search(case: Case, name: Method, draw: Draw, machines: Cluster, max_staleness: int) -> pd.DataFrame:
    """The mean outer loss at the end of every point of the grid, on one draw; infinite where the run diverged."""
    if name == "adbo":
        method, size = case.method(draw.start), case.size
        plan = simulate.schedule(machines, method, steps=size.steps, quorum=size.active, max_staleness=max_staleness)

        @jax.jit
        def end(point: Faster, draw: Draw, plan: Schedule) -> Vars:
            made = case.method(draw.start, point)
            master, _ = simulate.simulate(made, samplers.full(), plan, draw.data, jax.random.key(0), workers=draw.workers)
            return made.vars(master)

        points: Any = FASTER
        ends = (end(point, draw, plan) for point in points)
    else:
        made = baseline(case, name)
        program, points = compiled(made), GRID[case.task]

        def last(rate: Rate) -> Vars:
            carry = program.begin(rate, draw, jax.random.key(0))
            for _ in range(made.updates // made.every):
                carry, _ = program.chunk(rate, carry, draw)
            return made.mean(carry.state.vars)

        ends = (last(rate) for rate in points)
    rows = []
    for point, vars in zip(points, ends, strict=True):
        loss = float(_outer_loss(case, vars, draw.data))
        rows.append({"method": name, "loss": loss if np.isfinite(loss) else np.inf, **point._asdict()})
    return pd.DataFrame(rows)


def _outer_loss(case: Case, vars: Vars, data: Levels) -> Array:
    features, labels = data.outer
    flat = features.reshape(-1, features.shape[-1]), labels.reshape(-1)
    return jnp.mean(jnp.asarray(case.problem.outer(vars.inner, vars.outer, flat)))
