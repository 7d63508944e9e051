"""Step times of solvers beside the floor, and SABA in the four programs that must not copy its tables."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pandas as pd

from bilevel_jax import Batch, BilevelState, Carry, Levels, Problem, Solver, Vars, begin, guard, resume, samplers, solvers
from bilevel_jax.results import all_finite
from bilevel_jax.types import Cost, Loss, Table
from experiments.speed.shapes import BATCH, FULL, QUICK, SHAPES, Shape
from experiments.speed.timing import Built, Program, build, copies, interleave, size_bytes

HOST_STEPS = 64  # batches drawn beforehand for the host loop: the steps of one of its calls
Made = tuple[Program, Built]


def floor(problem: Problem, rates: Vars) -> Solver:
    """SOBA by hand: the bare derivatives and plain SGD; no oracle, no estimator, no stage, no optax."""

    def mean(loss: Loss, z: Any, x: Any, data: Any, weight: Any) -> Any:
        values = loss(z, x, data)
        return values.mean() if weight is None else jnp.vdot(weight, values)

    def init(vars: Vars, batches: Batch) -> BilevelState:
        del batches
        vars = Vars(vars.inner, jnp.zeros_like(vars.inner), vars.outer)
        return BilevelState(jnp.zeros((), jnp.int32), jax.tree.map(jnp.copy, vars), ())

    def update(state: BilevelState, batches: Batch) -> BilevelState:
        draw = jax.tree.map(lambda leaf: leaf[0], batches._replace(full=None))
        z, v, x = state.vars
        inner = jax.grad(lambda z, x: mean(problem.inner, z, x, draw.inner, draw.weight.inner))
        dz, pullback = jax.vjp(inner, z, x)
        hv, cross = pullback(v)
        fz, fx = jax.grad(lambda z, x: mean(problem.outer, z, x, draw.outer, draw.weight.outer), argnums=(0, 1))(z, x)
        vars = Vars(z - rates.inner * dz, v - rates.aux * (hv + fz), x - rates.outer * (cross + fx))
        return BilevelState(state.step + 1, vars, ())

    return Solver(init, update, 1, Cost())


def _opts(shape: Shape) -> Vars:
    return Vars(*map(optax.sgd, shape.rates))


SOLVERS: dict[str, Callable[[Shape], Solver]] = {
    "floor": lambda shape: floor(shape.problem, shape.rates),
    "soba": lambda shape: solvers.soba(shape.problem, _opts(shape)),
    "ma_soba": lambda shape: solvers.ma_soba(shape.problem, _opts(shape)),
    "saba": lambda shape: solvers.saba(shape.problem, _opts(shape)),
    "srba": lambda shape: solvers.srba(shape.problem, _opts(shape), period=shape.period),
}


def measure(shapes: Sequence[str], names: Sequence[str], repeats: int, seeds: int, quick: bool) -> dict[str, pd.DataFrame]:
    """The two tables of the named shapes and solvers; floor and SOBA, which the ratios need, are always measured."""
    names = tuple(dict.fromkeys(("floor", "soba", *names)))
    steps, tables = [], []
    for name in shapes:
        shape = SHAPES[name]((QUICK if quick else FULL)[name])
        made = {name: scan(SOLVERS[name](shape), shape) for name in names}
        steps += step_rows(shape, made, repeats)
        if "saba" in made:
            tables += table_rows(shape, made["saba"], repeats, seeds)
    found = {"steps": pd.DataFrame(steps), "tables": pd.DataFrame(tables)}
    return {name: table for name, table in found.items() if len(table)}


def step_rows(shape: Shape, made: Mapping[str, Made], repeats: int) -> list[dict[str, Any]]:
    """One row a solver: all as one scan with a donated carry, timed in turn."""
    times = interleave({name: program for name, (program, _) in made.items()}, repeats)
    rows = []
    for name, (program, built) in made.items():
        ratios = {}
        for other in ("floor", "soba"):
            ratios[f"wall_over_{other}"], ratios[f"process_over_{other}"] = times[name].over(times[other])
        held = {"data_mb": size_bytes(shape.data) / 1e6, "tables_mb": size_bytes(tables_of(program.carry)) / 1e6}
        row = {"shape": shape.name, "solver": name} | times[name].row() | ratios | _cost(built) | held
        rows.append(row | {"finite": stayed_finite(program.carry)})
    return rows


def table_rows(shape: Shape, scanned: Made, repeats: int, seeds: int) -> list[dict[str, Any]]:
    """One row a program of SABA, whose scan is there already."""
    saba = SOLVERS["saba"](shape)
    made = {"scan": scanned, "host loop": host_loop(saba, shape)}
    made[f"vmap, {seeds} seeds"] = vmapped(saba, shape, seeds)
    made["guard"] = scan(guard(saba), shape)
    times = interleave({name: program for name, (program, _) in made.items()}, repeats)
    rows = []
    for name, (program, built) in made.items():
        ratios = dict(zip(("wall_over_scan", "process_over_scan"), times[name].over(times["scan"]), strict=True))
        row = {"shape": shape.name, "program": name, "copies": copies(built.text, tables_of(program.carry))}
        rows.append(row | times[name].row() | ratios | _cost(built) | {"finite": stayed_finite(program.carry)})
    return rows


def scan(solver: Solver, shape: Shape) -> Made:
    """``resume`` with a donated carry: the loop that `bilevel_jax.run` is made of."""
    sampler = samplers.uniform(BATCH)
    carry = begin(solver, sampler, shape.start, shape.data, jax.random.key(1))
    built = build(jax.jit(partial(resume, solver, sampler, steps=shape.chunk), donate_argnums=0), carry, shape.data)
    return Program(lambda carry: built.call(carry, shape.data)[0], carry, shape.chunk), built


def host_loop(solver: Solver, shape: Shape) -> Made:
    """A Python loop over a jitted update with a donated state, as `bilevel_jax.stream`; its batches are drawn beforehand."""
    sampler, rng = samplers.uniform(BATCH), np.random.default_rng(1)
    counts = [samplers.blocks(len(jax.tree.leaves(part)[0]), BATCH) for part in shape.data]
    draw = jax.jit(lambda data, plan: sampler.stack(data, plan)._replace(full=None))
    batches = []
    for _ in range(HOST_STEPS):
        block = Levels(*(jnp.asarray(rng.integers(0, count, solver.draws, np.int32)) for count in counts))
        batches.append(draw(shape.data, samplers.Plan(block, jax.random.key(1)[None])))
    state = solver.init(shape.start, batches[0])
    built = build(jax.jit(solver.update, donate_argnums=0), state, batches[0])

    def call(state: BilevelState) -> BilevelState:
        for batch in batches:
            state = built.call(state, batch)
        return state

    return Program(call, state, HOST_STEPS), built


def vmapped(solver: Solver, shape: Shape, seeds: int) -> Made:
    """The scan, vmapped over keys; a step is a step of one seed."""
    sampler = samplers.uniform(BATCH)
    keys = jax.random.split(jax.random.key(1), seeds)
    carry = jax.jit(jax.vmap(partial(begin, solver, sampler, shape.start), in_axes=(None, 0)))(shape.data, keys)
    many = jax.vmap(partial(resume, solver, sampler, steps=shape.chunk), in_axes=(0, None))
    built = build(jax.jit(many, donate_argnums=0), carry, shape.data)
    return Program(lambda carry: built.call(carry, shape.data)[0], carry, shape.chunk * seeds), built


def tables_of(tree: Any) -> list[Any]:
    """The leaves of the per-block tables of a state."""
    nodes = jax.tree.leaves(tree, is_leaf=lambda node: isinstance(node, Table))
    return [leaf for node in nodes if isinstance(node, Table) for leaf in jax.tree.leaves(node) if leaf.size]


def stayed_finite(carry: Any) -> bool:
    """Whether every number is finite, and no result code of the run says otherwise."""
    numbers = [leaf for leaf in jax.tree.leaves(carry) if jnp.issubdtype(leaf.dtype, jnp.floating)]
    return bool(all_finite(numbers)) and not (isinstance(carry, Carry) and bool(carry.result.any()))


def _cost(built: Built) -> dict[str, float]:
    return {"compile_s": built.seconds, "peak_mb": built.peak / 1e6}
