"""Runs the solvers of a comparison over seeds, and writes what they did: config.json, history.csv, figure.png, figure.pdf.

Seeds run under vmap in one compiled program.  Seconds are those of a single-seed run timed apart, metrics excluded.  Rows
are written as soon as they are known, and the solver's state is saved from time to time, so that an interrupted run leaves
readable results, and goes on, bit for bit, with ``resume``.
"""

import dataclasses
import datetime
import json
import platform
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pandas as pd
from tqdm import tqdm

import bilevel_jax
from bilevel_jax import BilevelState, Carry, Levels, Problem, Result, Solver, Vars, begin, checks, resume, samplers, spent
from experiments.methods import METHODS, Rates

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


@dataclasses.dataclass(frozen=True)
class Options:
    """How much to run, and where to write it."""

    seeds: int = 10
    """runs of each solver, which differ in their samples"""
    batch_size: int = 64
    """rows of a block, of either level"""
    steps: int | None = None
    """updates of each solver (default: that of the data set)"""
    evaluations: int | None = None
    """how often to measure (default: that of the data set)"""
    step_size: float | None = None
    """step size of z and v, for all solvers (default: the best of the paper's grid for each)"""
    outer_ratio: float | None = None
    """step size of z over that of x, for all solvers (default: as for the step size)"""
    out: Path = Path("results")
    """folder to write to"""
    resume: bool = False
    """go on with an interrupted run in the same folder"""
    overwrite: bool = False
    """delete what the folder holds"""

    def __post_init__(self) -> None:
        for name in ("seeds", "batch_size", "steps", "evaluations"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise SystemExit(f"--{name.replace('_', '-')}: got {value}, expected at least 1")
        for name in ("step_size", "outer_ratio"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise SystemExit(f"--{name.replace('_', '-')}: got {value}, expected a positive number")
        if self.resume and self.overwrite:
            raise SystemExit("--resume and --overwrite: got both, expected at most one")


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
        store.draw(task)
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
    store: "Store",
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


#: Rows of the batches that oracle calls are counted on, whatever the batches of a solver.
UNIT = 64


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


@dataclasses.dataclass(frozen=True)
class Store:
    """The folder of a run."""

    out: Path

    @staticmethod
    def check(options: Options, record: dict[str, Any]) -> None:
        """Refuse a folder that holds something else, and settings that are not those of the run to resume."""
        out, path = options.out, options.out / "config.json"
        if options.overwrite and out.exists() and not path.exists() and any(out.iterdir()):
            raise SystemExit(f"--overwrite: got {out}, which holds no config.json of an earlier run: delete it yourself")
        if options.resume:
            if not path.exists():
                raise SystemExit(f"--resume: got {out}, expected a folder with the config.json of an interrupted run")
            settings, before = _settings(record), json.loads(path.read_text())["settings"]
            other = [k for k in settings if before.get(k) != settings[k]]
            if other:
                differ = ", ".join(f"{k}: {before.get(k)!r} then, {settings[k]!r} now" for k in other)
                raise SystemExit(f"--resume: the settings differ from those of the run in {out}: {differ}")
        elif path.exists() and not options.overwrite:
            raise SystemExit(f"--out: {out} holds a run already: give another folder, --resume or --overwrite")

    @staticmethod
    def open(options: Options, record: dict[str, Any], facts: dict[str, Any]) -> "Store":
        """Make the folder, or take up an earlier run in it, and write config.json: one session each time."""
        out, path = options.out, options.out / "config.json"
        if options.overwrite:
            shutil.rmtree(out, ignore_errors=True)
        out.mkdir(parents=True, exist_ok=True)
        device = jax.devices()[0]
        session = {
            "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "versions": {m.__name__: m.__version__ for m in (bilevel_jax, jax, optax, np, pd)},
            "machine": {"device": f"{device.platform}: {device.device_kind}", "python": platform.python_version()},
        }
        earlier = json.loads(path.read_text())["sessions"] if path.exists() else []
        known = {"settings": _settings(record), "facts": facts, "sessions": [*earlier, session]}
        _write(path, json.dumps(known, indent=2) + "\n")
        return Store(out)

    def history(self) -> pd.DataFrame:
        """The rows so far (a last line cut off by a kill is dropped)."""
        path = self.out / "history.csv"
        if not path.exists():
            return pd.DataFrame({"solver": [], "seed": [], "step": []})
        text = path.read_text()
        complete = text[: text.rfind("\n") + 1]
        if complete != text:
            _write(path, complete)
        return pd.read_csv(path)

    def last_step(self, name: str, seeds: int) -> int | None:
        """The last step of which the rows of all seeds are known."""
        rows: Any = self.history()
        counts = rows[rows["solver"] == name].groupby("step")["seed"].nunique()
        complete = counts.index[counts == seeds]
        return int(complete.max()) if len(complete) else None

    def add(self, name: str, step: int, calls: np.ndarray, clock: float, row: dict[str, np.ndarray]) -> None:
        """Write the rows of all seeds at a step, at once."""
        seeds = np.arange(1, len(next(iter(row.values()))) + 1)
        columns = {"solver": name, "seed": seeds, "step": step, "oracle_calls": calls, "seconds": clock}
        frame = pd.DataFrame({**columns, **row})
        path = self.out / "history.csv"
        with path.open("a") as file:
            file.write(frame.to_csv(index=False, header=not path.stat().st_size))

    def clock(self, name: str, measure: Callable[[], np.ndarray], every: int) -> np.ndarray:
        """The seconds of a solver, measured once and kept in timing.csv."""
        path = self.out / "timing.csv"
        known = pd.read_csv(path) if path.exists() else pd.DataFrame({"solver": [], "step": [], "seconds": []})
        mine: Any = known[known["solver"] == name]
        if not mine.empty:
            return mine["seconds"].to_numpy()
        spent = measure()
        rows = pd.DataFrame({"solver": name, "step": every * np.arange(1, len(spent) + 1), "seconds": spent})
        _write(path, (pd.concat([known, rows]) if len(known) else rows).to_csv(index=False))
        return spent

    @contextmanager
    def _manager(self, name: str) -> Iterator[Any]:
        import orbax.checkpoint as ocp  # slow to import, and needed only by long or interrupted runs

        with ocp.CheckpointManager(
            (self.out / "checkpoints" / name).absolute(), options=ocp.CheckpointManagerOptions(max_to_keep=1)
        ) as manager:
            yield manager

    def save(self, name: str, carry: Carry) -> None:
        """Save the state of a running solver."""
        import orbax.checkpoint as ocp

        with self._manager(name) as manager:
            manager.save(int(carry.state.step), args=ocp.args.StandardSave(carry))
            manager.wait_until_finished()

    def restore(self, name: str, template: Carry) -> tuple[Carry, int]:
        """The last saved state and its step (the template and 0 if there is none); later rows are dropped."""
        import orbax.checkpoint as ocp

        carry, step = template, 0
        if (self.out / "checkpoints" / name).exists():
            with self._manager(name) as manager:
                if manager.latest_step() is not None:
                    step = manager.latest_step()
                    shapes = jax.eval_shape(lambda: template)
                    carry = manager.restore(step, args=ocp.args.StandardRestore(shapes))
        self.forget(name, step)
        return carry, step

    def forget(self, name: str, after: int) -> None:
        """Drop the rows of a solver after a step, to be computed again."""
        if self.history().empty:  # also drops a line cut off
            return
        path = self.out / "history.csv"
        header, *lines = path.read_text().splitlines(keepends=True)
        kept = [line for line in lines if line.split(",")[0] != name or int(line.split(",")[2]) <= after]
        _write(path, "".join([header, *kept]))  # as text: not a digit changes

    def finished(self, name: str) -> bool:
        """Whether a solver has done all its steps, and its result codes are known."""
        path = self.out / "results.json"
        return path.exists() and name in json.loads(path.read_text())

    def finish(self, name: str, results: np.ndarray) -> None:
        """Keep the result codes of a solver that is done, and drop its checkpoint."""
        path = self.out / "results.json"
        known = json.loads(path.read_text()) if path.exists() else {}
        known[name] = [Result(int(code)).name for code in results]
        _write(path, json.dumps(known) + "\n")
        shutil.rmtree(self.out / "checkpoints" / name, ignore_errors=True)

    def draw(self, task: Task) -> None:
        """figure.png and figure.pdf from the rows so far."""
        from experiments.figures import comparison

        rows = self.history()
        if not rows.empty:
            comparison(rows, task.labels, f"{task.name}. {task.note}", self.out / "figure", log_work=task.log_work)


def _settings(record: dict[str, Any]) -> dict[str, Any]:
    """What must be the same when a run is resumed: not where it is written, nor how it is taken up."""
    return {k: v for k, v in json.loads(json.dumps(record, default=str)).items() if k not in ("out", "resume", "overwrite")}


def _write(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    part = path.with_name(path.name + ".part")
    part.write_text(text)
    part.replace(path)


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
