"""Runs the solvers of a comparison over seeds, and writes what they did: config.json, history.csv, figure.png, figure.pdf.

Seeds run under vmap in one compiled program.  Seconds are those of a single-seed run timed apart, metrics excluded.  Rows
are written as soon as they are known, and the solver's state is saved from time to time, so that an interrupted run leaves
readable results, and goes on, bit for bit, with ``resume``.
"""

import dataclasses
import json
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
from tqdm import tqdm

from bilevel_jax import BilevelState, Carry, Levels, Problem, Result, Solver, Vars, begin, checks, resume, samplers, spent
from experiments.methods import METHODS, UNIT, Rates
from experiments.store import Options, Store

#: Seconds between two saves of the state of a running solver.
SAVE_EVERY = 60.0


class Task(NamedTuple):
    """What is compared on: a problem, its data, where to start, and what to measure."""

    name: str
    note: str  # printed in the figure
    problem: Problem
    data: Levels
    start: Vars
    measure: Callable[[Vars], dict[str, np.ndarray]]  # variables [seeds, ...] -> {metric: [seeds]}, off the clock
    labels: dict[str, str]  # metrics of the figure, with their axis labels
    log_work: bool = False  # logarithmic time and oracle calls in the figure
    extra: dict[str, Any] = {}  # noqa: RUF012 (written into config.json as it is)


def compare(
    make_task: Callable[[], Task], names: tuple[str, ...], rates: dict[str, Rates], options: Options, config: dict[str, Any]
) -> pd.DataFrame:
    """Run the solvers on the task, write everything into ``options.out``, and return the history.

    The task is made after the options and the folder have been checked: it may take minutes.
    """
    steps, evaluations = options.steps, options.evaluations
    if not names:
        raise SystemExit("--solvers: got none, expected at least one")
    if not steps or not evaluations:
        raise SystemExit(f"--steps and --evaluations: got {steps} and {evaluations}, expected numbers")
    for name, updates in (("--steps", steps), *((name, rates[name].updates or steps) for name in names)):
        if updates % evaluations:
            raise SystemExit(f"{name}: got {updates}, expected a multiple of --evaluations = {evaluations}")
    record = {**config, **dataclasses.asdict(options), "rates": {n: rates[n]._asdict() for n in names}}
    Store.check(options, record)
    task = make_task()
    for name in names:  # refuses, say, a batch size above the number of rows before anything is written
        solver, sampler = build(task, name, rates[name], options.batch_size)
        jax.eval_shape(lambda data, s=solver, m=sampler: begin(s, m, task.start, data, jax.random.key(0)), task.data)
    store = Store.open(options, record, task.extra)
    try:
        with _interruptible(), tqdm(total=len(names) * evaluations, unit="evaluation", file=sys.stderr) as bar:
            for name in names:
                updates, seeds = rates[name].updates or steps, options.seeds if METHODS[name].random else 1
                built = build(task, name, rates[name], options.batch_size)
                _run_one(task, name, *built, store, seeds, updates, evaluations, bar)
    except KeyboardInterrupt:
        print(f"\ninterrupted: what was computed is in {options.out}; go on with --resume", file=sys.stderr)
        raise SystemExit(130) from None
    finally:
        store.draw(f"{task.name}. {task.note}", task.labels, task.log_work)
    _report(store)
    return store.history()


def build(task: Task, name: str, rates: Rates, batch_size: int) -> tuple[Solver, samplers.Sampler]:
    """The solver of that name, and its sampler: uniform blocks, ragged ones masked; all the data if it is deterministic."""
    rows, method = _rows(task), METHODS[name]
    # A method's own batch size is cut down to the rows that there are; the user's is refused by the sampler.
    sizes = Levels(*(min(rates.batch_size, n) if rates.batch_size else batch_size for n in rows))
    blocks = Levels(*(samplers.blocks(n, size) for n, size in zip(rows, sizes, strict=True)))
    sampler = samplers.full() if method.full else samplers.uniform(sizes.inner, outer_batch_size=sizes.outer)
    return method.build(task.problem, rates, blocks), sampler


def _rows(task: Task) -> Levels:
    return Levels(*(jax.tree.leaves(part)[0].shape[0] for part in task.data))


def seconds(task: Task, solver: Solver, sampler: samplers.Sampler, steps: int, every: int) -> np.ndarray:
    """Seconds of a single-seed run at each evaluation, metrics and compilation excluded: ``[evaluations]``."""
    chunk = jax.jit(lambda carry, data: resume(solver, sampler, carry, data, steps=every)[0], donate_argnums=0)
    carry = begin(solver, sampler, task.start, task.data, jax.random.key(0))
    jax.block_until_ready(chunk(jax.tree.map(jnp.copy, carry), task.data))
    spent = []
    for _ in range(steps // every):
        tick = time.perf_counter()
        carry = jax.block_until_ready(chunk(carry, task.data))
        spent.append(time.perf_counter() - tick)
    return np.cumsum(spent)


def _run_one(
    task: Task,
    name: str,
    solver: Solver,
    sampler: samplers.Sampler,
    store: Store,
    seeds: int,
    steps: int,
    evaluations: int,
    bar: tqdm,
) -> None:
    every = steps // evaluations
    bar.set_description(name)
    if store.finished(name):
        bar.update(evaluations)
        return
    lanes = _lanes(METHODS[name].coin)
    start = jax.jit(lambda keys, data: lanes(lambda key: begin(solver, sampler, task.start, data, key), keys))
    chunk = jax.jit(lambda carry, data: lanes(lambda c: resume(solver, sampler, c, data, steps=every)[0], carry))
    for part in task.data:  # inside the compiled programs the data are traced, and cannot be checked
        checks.finite("data", part)
    keys = jax.vmap(jax.random.key)(jnp.arange(1, seeds + 1))
    carry = start(keys, task.data)
    clock = store.clock(name, lambda: seconds(task, solver, sampler, steps, every), every)
    carry, done = store.restore(name, carry)
    if done == 0:
        store.forget(name, -1)
        store.add(name, 0, np.zeros(seeds), 0.0, task.measure(carry.state.vars))
    bar.update(done // every)
    saved = time.monotonic()
    while done < steps:
        try:
            carry = jax.block_until_ready(chunk(carry, task.data))
            done += every
            row = task.measure(carry.state.vars)
        except KeyboardInterrupt:
            if int(carry.state.step) == store.last_step(name, seeds):
                store.save(name, carry)
            raise
        store.add(name, done, oracle_calls(task, solver, sampler, carry.state), clock[done // every - 1], row)
        bar.update(1)
        if done < steps and time.monotonic() - saved > SAVE_EVERY:
            store.save(name, carry)
            saved = time.monotonic()
    store.finish(name, np.asarray(carry.result))


def oracle_calls(task: Task, solver: Solver, sampler: samplers.Sampler, state: BilevelState) -> np.ndarray:
    """Oracle calls of a run so far, ``[seeds]``: gradients, Hessian-vector and cross products, counted on 64 rows.

    A call on other batches, or on all the data, counts as the number of blocks of 64 rows that it reads.
    """
    shapes = jax.eval_shape(lambda data: sampler.batches(data, jax.random.key(0), 0, 1), task.data)
    read = Levels(*(jax.tree.leaves(part)[0].shape[1] / UNIT for part in (shapes.inner, shapes.outer)))
    whole = Levels(*(samplers.blocks(n, UNIT) for n in _rows(task)))
    draw, full = spent(solver, state), solver.cost.full
    calls = read.inner * (draw.inner_gradient + draw.hessian_vector + draw.cross) + read.outer * draw.outer_gradient
    refreshes = whole.inner * (full.inner_gradient + full.hessian_vector + full.cross) + whole.outer * full.outer_gradient
    return np.asarray(calls + state.step * refreshes) + np.zeros(len(jax.tree.leaves(state.vars)[0]))


def _lanes(sequential: bool) -> Callable[[Callable[[Any], Carry], Any], Carry]:
    """Map a function of a key or a carry over seeds.  The step is shared, not mapped over, so that conditions on it stay
    conditions; a method that flips a coin of its own for each seed runs its seeds one after the other instead."""
    axes = Carry(BilevelState(None, 0, 0), 0, 0, 0)  # type: ignore[arg-type]

    def over(function: Callable[[Any], Carry], argument: Any) -> Carry:
        if not sequential:
            return jax.vmap(function, in_axes=(axes if isinstance(argument, Carry) else 0,), out_axes=axes)(argument)
        if not isinstance(argument, Carry):
            out = jax.lax.map(function, argument)
            return _with_step(out, out.state.step[0])
        step = argument.state.step
        out = jax.lax.map(lambda c: function(_with_step(c, step)), _with_step(argument, None))
        return _with_step(out, out.state.step[0])

    return over


def _with_step(carry: Carry, step: Any) -> Carry:
    return carry._replace(state=carry.state._replace(step=step))


def _report(store: Store) -> None:
    """Say which runs ended badly, and where everything is."""
    for name, codes in json.loads((store.out / "results.json").read_text()).items():
        bad = [seed for seed, code in enumerate(codes, 1) if code != Result.SUCCESSFUL.name]
        if bad:
            worst = Result[codes[bad[0] - 1]]
            print(f"{name}: seeds {bad} of {len(codes)} ended with {worst.name}: {worst.message}", file=sys.stderr)
    print(f"figure: {store.out / 'figure.png'}\nrows: {store.out / 'history.csv'}")


@contextmanager
def _interruptible() -> Iterator[None]:
    """Treat a request to terminate like Ctrl-C."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(signum: int, frame: Any) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
