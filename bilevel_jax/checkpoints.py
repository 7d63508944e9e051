"""Long runs: `run_long` saves its carry and its history in a folder as it goes, and goes on from there after any interruption.

The folder holds ``run.json`` (what the run is), ``history.csv`` (a row an evaluation) and ``checkpoints`` (of orbax).  Draws
are functions of the key and their number, so that a run that was killed and taken up equals an uninterrupted one, bit for bit,
on the same kind of device and versions.

A `bilevel_jax.stream` is saved and taken up by hand, with `manager`, `save` and `restore`: its example shows how.

Needs orbax: ``pip install 'bilevel-jax[checkpoints]'``.
"""

import hashlib
import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

try:
    import fcntl
except ImportError:  # Windows: there two runs in one folder are not noticed
    fcntl = None

import jax
import jax.numpy as jnp
import numpy as np

from bilevel_jax import checks
from bilevel_jax.history import History, numbers, write
from bilevel_jax.loop import Carry, Metrics, begin, resume, row_of
from bilevel_jax.results import frozen
from bilevel_jax.samplers import Sampler
from bilevel_jax.types import Array, Levels, PyTree, Solver, Vars


class Progress(NamedTuple):
    """What `run_long` reports of a row."""

    step: int
    steps: int
    row: dict[str, float]  # as in the history
    seconds_left: float  # at the pace of this session; NaN before its first updates


def run_long(
    solver: Solver,
    sampler: Sampler,
    vars: Vars,
    data: Levels,
    key: Array,
    *,
    folder: str | Path,
    steps: int,
    every: int,
    save_every: int,
    metrics: Metrics | None = None,
    keep: int = 3,
    report: Callable[[Progress], None] | None = None,
) -> tuple[Carry, dict[str, np.ndarray]]:
    """`bilevel_jax.run` for hours: a host loop over a jitted chunk of ``every`` updates, that can be killed at any moment.

    Called again with the same arguments it goes on from the last checkpoint in ``folder``, and ends as if it had never been
    interrupted; with more ``steps`` it goes further.  Rows of the history after that checkpoint are computed again.  The row of
    a chunk is fetched, reported and written while the next chunk runs.  Checkpoints are written by a thread of orbax, whole or
    not at all; to begin one keeps the host for 7 to 25 ms (10 MB, on a CPU), and longer if the last is not written yet: the
    device does not wait where chunks take longer than that, and hardly where ``save_every`` is many chunks.

    Args:
        solver, sampler, vars, data, key, metrics: as for `bilevel_jax.run`.
        folder: made if it does not exist.  Anything else may lie in it, too.  While it runs, the run holds a lock in it (where
            the system has locks of files), which ends with the process, however that ends.
        steps: updates to do, a multiple of ``every``.
        every: updates from one row to the next.  The host needs about 0.1 ms a row: let a chunk take 10 ms or more.
        save_every: updates from one checkpoint to the next, a multiple of ``every``.  There is one at the end, too.
        keep: how many checkpoints are kept.
        report: called with a `Progress` after every row has been written, for a progress bar, say, or `tensorboard`.

    Returns:
        The carry at the end, and the history of ``1 + steps / every`` rows, read back from the folder.  When the solver is a
        `bilevel_jax.guard` that has frozen, the run stops there: the last ``step`` of the history is then less than ``steps``,
        and ``carry.result`` says why.

    Raises:
        TypeError, ValueError: for what `bilevel_jax.run` refuses, numbers that are not multiples of ``every``, and a folder
            that holds a run with other data, key, start, shapes, solver, rates, losses or metrics (programs are compared), or
            one of more steps, or that another process runs in; for metrics that are not real numbers, and where there are
            several processes of JAX, which would all write (one process may have many devices).
        ImportError: without orbax.

    Cost: ``steps`` times ``solver.cost``, and what is computed again after an interruption: at most ``save_every`` updates, or
    twice as many if a checkpoint was being written.  Memory: two copies of the carry while one of them is being saved.

    Example:
        >>> import optax, tempfile
        >>> from functools import partial
        >>> from bilevel_jax import samplers, solvers, testing
        >>> q = testing.quadratic(jax.random.key(0))
        >>> solver = solvers.soba(q.problem, Vars(*map(optax.sgd, (0.2, 0.2, 0.1))))
        >>> folder = tempfile.mkdtemp()
        >>> go = partial(run_long, solver, samplers.uniform(8), q.start, q.data, jax.random.key(1),
        ...              folder=folder, every=10, save_every=20)
        >>> _, history = go(steps=40)
        >>> carry, history = go(steps=60, report=lambda progress: print(progress.step, "of", progress.steps))
        50 of 60
        60 of 60
        >>> history["step"].tolist()
        [0, 10, 20, 30, 40, 50, 60]
    """
    steps, every = checks.positive_int("steps", steps), checks.positive_int("every", every)
    for name, value in (("steps", steps), ("save_every", checks.positive_int("save_every", save_every))):
        if value % every:
            raise ValueError(f"{name}: got {value}, expected a multiple of every = {every}")
    if jax.process_count() > 1:
        raise ValueError(f"folder: got {jax.process_count()} processes of JAX, which would all write it, expected one")
    _orbax()
    checks.positive_int("keep", keep)
    carry = begin(solver, sampler, vars, data, key)
    data = jax.tree.map(jnp.asarray, data)  # moved to the device once

    def row_at(carry: Carry, data: Levels) -> dict[str, Array]:
        return row_of(carry.state, metrics(carry.state.vars, sampler.whole(data)) if metrics else {})

    def chunk(carry: Carry, data: Levels) -> tuple[Carry, tuple[dict[str, Array], Array]]:
        carry, rows = resume(solver, sampler, carry, data, steps=every, metrics=metrics)
        return carry, (jax.tree.map(lambda leaf: leaf[0], rows), frozen(carry.state))

    program, folder = jax.jit(chunk, donate_argnums=0).lower(carry, data), Path(folder)
    history = History(folder / "history.csv", jax.eval_shape(row_at, carry, data))
    with _claimed(folder, _facts(carry, data, every, program)), manager(folder / "checkpoints", keep=keep) as saved:
        found = restore(saved, carry)
        carry = carry if found is None else found
        done = int(carry.state.step)
        if done > steps:
            raise ValueError(f"steps: got {steps}, expected at least {done}, which the run in {folder} has done already")
        if not history.take_up(done, every):
            first = jax.device_get(jax.jit(row_at)(carry, data))
            history.begin(first)
            if report is not None:
                report(Progress(0, steps, numbers(first), math.nan))
        if done < steps and not bool(frozen(carry.state)):
            carry = _drive(program.compile(), carry, data, saved, history, report, range(done, steps, every), save_every)
    return carry, history.columns()


def _drive(
    program: Any,
    carry: Carry,
    data: Levels,
    saved: Any,
    history: History,
    report: Callable[[Progress], None] | None,
    starts: range,
    save_every: int,
) -> Carry:
    """Run the chunks that begin at ``starts``; write, report and save what each has left while the next one runs."""
    copy, began, steps = jax.jit(lambda tree: jax.tree.map(jnp.copy, tree)), time.monotonic(), starts.stop
    carry = jax.device_put(carry, program.input_shardings[0][0])  # a restored one lies on one device

    def advance(carry: Carry, start: int) -> tuple[Carry, tuple]:
        carry, out = program(carry, data)
        step = start + starts.step
        due = copy(carry) if step % save_every == 0 or step >= steps else None  # the carry itself is given to the next chunk
        return carry, (step, out, due)

    for now, (step, out, due) in ahead(advance, carry, starts):
        carry = now
        row, stopped = jax.device_get(out)
        history.add(row)
        if stopped and due is None:  # the next chunk was on its way; in it nothing has moved but the count
            due = carry._replace(state=carry.state._replace(step=jnp.full_like(carry.state.step, step)))
        if due is not None:
            history.sync()
            save(saved, step, due)
        if report is not None:
            pace = (time.monotonic() - began) / (step - starts.start)
            report(Progress(step, steps, numbers(row), pace * (steps - step)))
        if stopped and due is not None:
            return due
    return carry


def ahead(advance: Callable[[Any, Any], tuple[Any, Any]], carry: Any, turns: Sequence[Any]) -> Iterator[tuple[Any, Any]]:
    """``carry, out = advance(carry, turn)`` for all turns; each ``out`` is given away once the next turn is on its way.

    So the device, which is told what to do ahead of time, is busy while the host looks at the last ``out``.
    """
    waiting = []
    for turn in turns:
        carry, out = advance(carry, turn)
        waiting.append(out)
        if len(waiting) > 1:
            yield carry, waiting.pop(0)
    for out in waiting:
        yield carry, out


@contextmanager
def manager(folder: str | Path, *, keep: int = 3) -> Iterator[Any]:
    """An orbax CheckpointManager that keeps the last checkpoints; it has written them all when the block is left.

    Args:
        folder: of its own, made if it does not exist.
        keep: how many checkpoints are kept.

    Raises:
        ImportError: without orbax.

    Example:
        A stream of a loader that is a function of the number of its first draw, cut after 30 of 40 updates and taken up:

        >>> import optax, tempfile
        >>> from bilevel_jax import readers, samplers, solvers, stream, testing
        >>> q, folder = testing.quadratic(jax.random.key(0)), tempfile.mkdtemp()
        >>> solver = solvers.soba(q.problem, Vars(*map(optax.sgd, (0.2, 0.2, 0.1))))
        >>> def go(updates):
        ...     start = begin(solver, samplers.uniform(8), q.start, q.data, jax.random.key(1)).state
        ...     with manager(folder) as saved:
        ...         state = restore(saved, start) or start
        ...         todo = range(int(state.step), updates)
        ...         batches = readers.from_arrays(samplers.uniform(8), q.data, jax.random.key(1), draws=solver.draws,
        ...                                       start=todo.start * solver.draws)
        ...         loader = (batch for _, batch in zip(todo, batches))
        ...         for state, row in stream(solver, state, loader, every=10):
        ...             save(saved, int(row["step"]), state)
        ...             print("saved", row["step"])
        >>> go(30)
        saved 10
        saved 20
        saved 30
        >>> go(40)
        saved 40
    """
    ocp, keep = _orbax(), checks.positive_int("keep", keep)
    options = ocp.CheckpointManagerOptions(max_to_keep=keep, cleanup_tmp_directories=True)
    with ocp.CheckpointManager(Path(folder).absolute(), options=options) as made:
        yield made


def save(manager: Any, step: int, tree: PyTree) -> None:
    """Begin to save a pytree.  It is written by a thread: the arrays may be donated at once, but only `manager` makes sure
    that the file is there.  Waits for the last save."""
    manager.save(step, args=_orbax().args.StandardSave(tree))


def restore(manager: Any, like: PyTree) -> PyTree:
    """The last pytree that was saved, or None.  ``like`` is a pytree of the same structure, shapes, dtypes and shardings."""
    if manager.latest_step() is None:
        return None
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), like)
    return manager.restore(manager.latest_step(), args=_orbax().args.StandardRestore(shapes))


def _orbax() -> Any:
    try:
        import orbax.checkpoint  # slow to import, and needed by long runs only
    except ImportError as error:
        raise ImportError("checkpoints: got no orbax, expected it: pip install 'bilevel-jax[checkpoints]'") from error
    return orbax.checkpoint


@contextmanager
def tensorboard(folder: str | Path) -> Iterator[Callable[[Progress], None]]:
    """A ``report`` of `run_long` that writes the rows as scalars for TensorBoard; they are all written when the block is left.

    Needs tensorboardX, which needs no TensorFlow: ``pip install 'bilevel-jax[tensorboard]'``.  A run that is taken up hides
    what an earlier session wrote after its last checkpoint.

    Args:
        folder: for the event files, those of several sessions of one run.

    Raises:
        ImportError: without tensorboardX.

    Example:
        ``with tensorboard("results/board") as report: run_long(..., report=report)``
    """
    try:
        from tensorboardX import SummaryWriter
    except ImportError as error:
        raise ImportError("tensorboard: got no tensorboardX, expected it: pip install 'bilevel-jax[tensorboard]'") from error
    writers: list[SummaryWriter] = []

    def report(progress: Progress) -> None:
        if not writers:
            writers.append(SummaryWriter(str(folder), purge_step=progress.step, flush_secs=10))
        for name, value in progress.row.items():
            if name != "step":
                writers[0].add_scalar(name, value, progress.step)

    try:
        yield report
    finally:
        for writer in writers:
            writer.close()


@contextmanager
def _claimed(folder: Path, facts: dict[str, Any]) -> Iterator[None]:
    """Note what the run in a folder is and hold the folder, or refuse one of another run or process."""
    _refuse(folder, facts)
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("a") as file:
        if fcntl is not None:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                wrong = f"folder: got {folder}, in which another process runs, expected another folder, or to wait for its end"
                raise ValueError(wrong) from None
        _refuse(folder, facts)  # as another process may have begun one since
        if not (folder / "run.json").exists():
            write(folder / "run.json", json.dumps(facts, indent=2) + "\n")
        yield


def _refuse(folder: Path, facts: dict[str, Any]) -> None:
    path = folder / "run.json"
    if path.exists():
        before = json.loads(path.read_text())
        other = [name for name in facts if before.get(name) != facts[name] and name != "jax"]
        if other == ["program"] and before["jax"] != facts["jax"]:
            other = ["jax"]
        if other:
            differ = "; ".join(_difference(name, before.get(name), facts[name]) for name in other)
            raise ValueError(f"folder: got {folder}, which holds another run, expected another folder: {differ}")
        return
    for name in ("history.csv", "checkpoints"):
        if (folder / name).exists():
            raise ValueError(f"folder: got {folder}, which holds {name} but no run.json, expected a new one, or that of a run")


def _facts(carry: Carry, data: Levels, every: int, program: Any) -> dict[str, Any]:
    """What must be the same when a run is taken up.  The program, as text, knows all rates and other constants."""
    values = hashlib.sha256()
    for leaf in jax.tree.leaves((carry, data)):
        numbers = np.ascontiguousarray(jax.random.key_data(leaf) if _is_key(leaf) else leaf)
        values.update(numbers.reshape(-1).view(np.uint8).data)
    return {
        "every": every,
        "shapes": {
            checks.path_name("", path): checks.describe(leaf)
            for path, leaf in jax.tree_util.tree_leaves_with_path({"carry": carry, "data": data})
        },
        "values": values.hexdigest(),
        "program": hashlib.sha256(program.as_text().encode()).hexdigest(),
        "jax": jax.__version__,
    }


def _difference(name: str, before: Any, now: Any) -> str:
    if name == "shapes":
        paths = [path for path in {**before, **now} if before.get(path) != now.get(path)]
        return ", ".join(f"{path} was {before.get(path)}, is {now.get(path)}" for path in paths[:3])
    if name == "values":
        return "the values of data, key or vars are not the same"
    if name == "program":
        return "the solver, its rates, the losses, the sampler or the metrics are not the same"
    return f"{name} was {before}, is {now}"


def _is_key(leaf: Any) -> bool:
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
