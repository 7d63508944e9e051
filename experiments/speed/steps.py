"""Step times of solvers beside the floor, and SABA in the four programs that must not copy its tables."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
import pandas as pd

from bilevel_jax import Batch, BilevelState, Carry, Problem, Solver, Vars, begin, guard, resume, samplers, solvers
from bilevel_jax.results import all_finite
from bilevel_jax.types import Cost, Loss, Table
from experiments.speed.shapes import BATCH, FULL, QUICK, SHAPES, Shape
from experiments.speed.timing import Built, Program, build, copies, interleave, size_bytes

HOST_STEPS = 64  # batches drawn beforehand for the host loop: the steps of one of its calls


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
        steps += step_rows(shape, names, repeats)
        if "saba" in names:
            tables += table_rows(shape, repeats, seeds)
    return {"steps": pd.DataFrame(steps), "tables": pd.DataFrame(tables)} if tables else {"steps": pd.DataFrame(steps)}


def step_rows(shape: Shape, names: Sequence[str], repeats: int) -> list[dict[str, Any]]:
    """One row a solver: all as one scan with a donated carry, timed in turn."""
    programs, built = {}, {}
    for name in names:
        programs[name], built[name] = scan(SOLVERS[name](shape), shape)
    times = interleave(programs, repeats)
    rows = []
    for name in names:
        ratios = {}
        for other in ("floor", "soba"):
            ratios[f"wall_over_{other}"], ratios[f"process_over_{other}"] = times[name].over(times[other])
        held = {"data_mb": size_bytes(shape.data) / 1e6, "tables_mb": size_bytes(tables_of(programs[name].carry)) / 1e6}
        rows.append({"shape": shape.name, "solver": name} | times[name].row() | ratios | _cost(built[name]) | held)
        rows[-1]["finite"] = stayed_finite(programs[name].carry)
    return rows


def table_rows(shape: Shape, repeats: int, seeds: int) -> list[dict[str, Any]]:
    """One row a program of SABA."""
    saba = SOLVERS["saba"](shape)
    made = {"scan": scan(saba, shape), "host loop": host_loop(saba, shape)}
    made[f"vmap, {seeds} seeds"] = vmapped(saba, shape, seeds)
    made["guard"] = scan(guard(saba), shape)
    counts = {name: copies(built.text, tables_of(program.carry)) for name, (program, built) in made.items()}
    times = interleave({name: program for name, (program, _) in made.items()}, repeats)
    rows = []
    for name, (program, built) in made.items():
        ratios = dict(zip(("wall_over_scan", "process_over_scan"), times[name].over(times["scan"]), strict=True))
        row = {"shape": shape.name, "program": name, "copies": counts[name]} | times[name].row() | ratios | _cost(built)
        rows.append(row | {"finite": stayed_finite(program.carry)})
    return rows


def scan(solver: Solver, shape: Shape) -> tuple[Program, Built]:
    """``resume`` with a donated carry: the loop that `bilevel_jax.run` is made of."""
    sampler = samplers.uniform(BATCH)
    carry = begin(solver, sampler, shape.start, shape.data, jax.random.key(1))
    built = build(jax.jit(partial(resume, solver, sampler, steps=shape.chunk), donate_argnums=0), carry, shape.data)
    return Program(lambda carry: built.call(carry, shape.data)[0], carry, shape.chunk), built


def host_loop(solver: Solver, shape: Shape) -> tuple[Program, Built]:
    """A Python loop over a jitted update with a donated state, as `bilevel_jax.stream`; its batches are drawn beforehand."""
    sampler = samplers.uniform(BATCH)
    draw = jax.jit(lambda data, step: sampler.batches(data, jax.random.key(1), step, solver.draws)._replace(full=None))
    batches = [draw(shape.data, step) for step in range(HOST_STEPS)]
    state = solver.init(shape.start, batches[0])
    built = build(jax.jit(solver.update, donate_argnums=0), state, batches[0])

    def call(state: BilevelState) -> BilevelState:
        for batch in batches:
            state = built.call(state, batch)
        return state

    return Program(call, state, HOST_STEPS), built


def vmapped(solver: Solver, shape: Shape, seeds: int) -> tuple[Program, Built]:
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
