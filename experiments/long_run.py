"""A long run that may be killed at any moment: data cleaning with SABA, saved as it goes, and guarded against divergence.

``python -m experiments.long_run --dataset mnist --out results/long_run`` runs; the same command again goes on where it stopped.
``python -m experiments.long_run --kills 10 --out results/kills`` runs once without interruption, and once with that many kills
(SIGKILL: at any moment since the start of the process, in the midst of the updates, and while a checkpoint is being written);
then it compares the two bit for bit, and prints what happened.

Writes config.json, run.json, history.csv, checkpoints and figure.png / figure.pdf; with ``--kills`` two folders of these, and
kills.csv.
"""

import dataclasses
import itertools
import random
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import cache, partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pandas as pd
import tyro
from tqdm import tqdm

from bilevel_jax import Carry, Levels, Result, Solver, Vars, guard, samplers, solvers
from bilevel_jax.checkpoints import Progress, run_long, tensorboard
from bilevel_jax.results import frozen
from bilevel_jax.types import Array
from experiments import data_cleaning
from experiments.figures import plt
from experiments.lower_bounds import record


@dataclasses.dataclass(frozen=True)
class Config:
    """Data cleaning with SABA, for as long as you like."""

    dataset: Literal["digits", "mnist", "fashion_mnist"] = "digits"
    """digits is bundled; the others are downloaded, or found through BILEVEL_JAX_DATA"""
    steps: int = 100_000
    """updates; more of them than last time take the run further"""
    every: int = 500
    """updates from one row of the history to the next"""
    save_every: int = 5000
    """updates from one checkpoint to the next"""
    batch_size: int = 64
    """rows of a block, of either level"""
    step_size: float = 0.1
    """step size of z and v"""
    outer_step_size: float = 1000.0
    """step size of x"""
    diverging: Literal["stop", "halve"] = "stop"
    """what to do when numbers become too large: stop at the last good state, or go on from it with half the step sizes"""
    limit: float = 1e6
    """what is too large"""
    tensorboard: bool = False
    """write the rows for TensorBoard, too (needs tensorboardX)"""
    kills: int = 0
    """kill the run so often, and compare it with one that was not"""
    seed: int = 1
    """of the draws, and of the moments of the kills"""
    out: Path = Path("results/long_run")
    """folder to write to, and to go on in"""

    def __post_init__(self) -> None:
        for name, least in (("steps", 1), ("every", 1), ("save_every", 1), ("batch_size", 1), ("kills", 0)):
            if (value := getattr(self, name)) < least:
                raise SystemExit(f"--{name.replace('_', '-')}: got {value}, expected at least {least}")
        for name in ("steps", "save_every"):
            if (value := getattr(self, name)) % self.every:
                raise SystemExit(f"--{name.replace('_', '-')}: got {value}, expected a multiple of --every = {self.every}")
        for name in ("step_size", "outer_step_size", "limit"):
            if not (value := getattr(self, name)) > 0:
                raise SystemExit(f"--{name.replace('_', '-')}: got {value}, expected a positive number")


#: As they are written on the command line.
OPTIONS = {field.name.replace("_", "-") for field in dataclasses.fields(Config)}


def solver_of(config: Config, problem: Any) -> Solver:
    """SABA with constant steps, guarded as the user chose."""

    def build(scale: Array | float) -> Solver:
        steps = (config.step_size, config.step_size, config.outer_step_size)
        return solvers.saba(problem, Vars(*(optax.sgd(scale * step) for step in steps)))

    if config.diverging == "stop":
        return guard(build(1.0), limit=config.limit)
    return guard(build, halvings=20, limit=config.limit)


def go(config: Config, report: Callable[[Progress], None] | None = None) -> tuple[Carry, dict[str, np.ndarray]]:
    """The run, or what is left of it."""
    cleaning = data_cleaning.Config(dataset=config.dataset)
    task = data_cleaning.task(cleaning, data_cleaning.load(cleaning))

    def metrics(vars: Vars, data: Levels) -> dict[str, Array]:
        loss = task.problem.outer(vars.inner, vars.outer, data.outer).mean()
        return {"validation_loss": loss, "mean_weight": jax.nn.sigmoid(vars.outer).mean()}

    try:
        return run_long(
            solver_of(config, task.problem),
            samplers.uniform(config.batch_size),
            task.start,
            task.data,
            jax.random.key(config.seed),
            folder=config.out,
            steps=config.steps,
            every=config.every,
            save_every=config.save_every,
            metrics=metrics,
            report=report,
        )
    except ValueError as error:
        name, _, wrong = str(error).partition(": ")
        option = {"folder": "out"}.get(name, name.replace("_", "-"))
        raise SystemExit(f"--{option}: {wrong}" if option in OPTIONS else f"long_run: {error}") from None


def run(config: Config) -> None:
    """Run with a progress bar, and draw."""
    note = cache(partial(record, config, config.out))  # once the run is accepted: the folder may hold another one
    bars = tqdm(total=config.steps, unit="update", unit_scale=True, file=sys.stderr)
    boards = tensorboard(config.out / "tensorboard") if config.tensorboard else nullcontext(lambda progress: None)
    with boards as board, bars as bar:

        def report(progress: Progress) -> None:
            note()
            if not bar.n:  # what earlier sessions did says nothing about the pace of this one
                bar.n = bar.initial = max(progress.step - config.every, 0)
            bar.update(progress.step - bar.n)
            bar.set_postfix(loss=f"{progress.row['validation_loss']:.4g}")
            board(progress)

        carry, history = go(config, report)
    note()
    draw(history, config.out / "figure")
    last = int(history["step"][-1])
    print(f"step {last} of {config.steps}: validation loss {history['validation_loss'][-1]:.5g}")
    if carry.result != Result.SUCCESSFUL:
        result, ended = Result(int(carry.result)), "stopped" if bool(frozen(carry.state)) else "went on with smaller steps"
        print(f"{result.name}: {result.message}; the run {ended}", file=sys.stderr)
    print(f"figure: {config.out / 'figure.png'}\nrows: {config.out / 'history.csv'}")


def draw(history: dict[str, np.ndarray], path: Path) -> None:
    """The metrics against the updates."""
    names = [name for name in history if name != "step"]
    figure, axes = plt.subplots(1, len(names), figsize=(4.8 * len(names), 3.4), layout="constrained")
    for axis, name in zip(axes, names, strict=True):
        axis.plot(history["step"], history[name], color="#D55E00")
        axis.set_xlabel("updates")
        axis.set_ylabel(name.replace("_", " "))
        axis.grid(visible=True, alpha=0.25)
    for ending in ("png", "pdf"):
        figure.savefig(path.with_suffix(f".{ending}"), dpi=150)
    plt.close(figure)


class Kill(NamedTuple):
    """What was found in the folder of a run after a kill."""

    aim: str
    seconds: float  # since the start of the process
    last_row: int  # steps; -1 where there is none
    last_checkpoint: int
    saving: bool  # whether it left a checkpoint half written


def kill(command: Sequence[str], folder: Path, aim: str, delay: float, patience: float = 120.0) -> Kill | None:
    """Start a run, kill it, and say what it left; None if it ended before.

    Args:
        command: starts the run, or takes it up, in ``folder``.
        aim: "start": ``delay`` seconds after the start of the process; "updates": so long after its first new row; "save": so
            long after it has begun to write a checkpoint.
        delay: in seconds.
        patience: how long to wait for what is aimed at, in seconds.

    Raises:
        RuntimeError: if the run fails by itself, or patience runs out.
    """
    ready = {"start": lambda: True, "updates": _new_row(folder), "save": lambda: bool(_half_written(folder) - left)}
    left = _half_written(folder)
    log = folder.parent / f"{folder.name}.log"
    with log.open("w") as file:
        began = time.monotonic()
        process = subprocess.Popen(command, stdout=file, stderr=file)
        try:
            while process.poll() is None and not ready[aim]():
                if time.monotonic() - began > patience:
                    raise RuntimeError(f"aim: got no {aim!r} within {patience} seconds, see {log}")
                time.sleep(0.001)
            time.sleep(delay)
            if process.poll() is not None:
                if process.returncode:
                    raise RuntimeError(f"the run failed by itself: {log.read_text()[-2000:]}")
                return None
        finally:
            process.kill()
            process.wait()
    saving = bool(_half_written(folder) - left)
    return Kill(aim, time.monotonic() - began, last_row(folder), last_checkpoint(folder), saving)


def last_row(folder: Path) -> int:
    """The step of the last whole row of the history; -1 if there is none."""
    path = folder / "history.csv"
    lines = path.read_text().splitlines(keepends=True)[1:] if path.exists() else []
    return max((int(line.split(",")[0]) for line in lines if line.endswith("\n")), default=-1)


def last_checkpoint(folder: Path) -> int:
    """The step from which a run would go on: that of the last whole checkpoint; 0 if there is none."""
    return max((int(path.name) for path in (folder / "checkpoints").glob("*") if path.name.isdigit()), default=0)


def _half_written(folder: Path) -> set[str]:
    return {path.name for path in (folder / "checkpoints").glob("*") if not path.name.isdigit() and path.is_dir()}


def _new_row(folder: Path) -> Callable[[], bool]:
    """Whether the history has grown since it was taken up, by which it becomes another file."""
    path, seen = folder / "history.csv", {}
    before = path.stat().st_ino if path.exists() else None

    def grown() -> bool:
        if not path.exists() or (stat := path.stat()).st_ino == before:
            return False
        return stat.st_size > seen.setdefault(stat.st_ino, stat.st_size)

    return grown


def differences(one: Config, other: Config) -> list[str]:
    """In what two finished runs differ, down to the bit: rows, and leaves of the carry."""
    found = [] if (one.out / "history.csv").read_bytes() == (other.out / "history.csv").read_bytes() else ["history.csv"]
    leaves = [jax.tree_util.tree_leaves_with_path(go(config)[0]) for config in (one, other)]
    for (path, a), (_, b) in zip(*leaves, strict=True):
        if jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
            a, b = jax.random.key_data(a), jax.random.key_data(b)
        if np.asarray(a).tobytes() != np.asarray(b).tobytes():
            found.append(jax.tree_util.keystr(path))
    return found


def kills(config: Config) -> pd.DataFrame:
    """The experiment with kills: a row a kill.

    Raises:
        SystemExit: if the run that was killed differs from the one that was not, or ended before it was killed often enough.
    """
    if (config.out / "uninterrupted").exists() or (config.out / "killed").exists():
        raise SystemExit(f"--out: {config.out} holds runs already: give another folder")
    config.out.mkdir(parents=True, exist_ok=True)
    whole, cut = (dataclasses.replace(config, kills=0, out=config.out / name) for name in ("uninterrupted", "killed"))
    began = time.monotonic()
    subprocess.run(command(whole), check=True, capture_output=True)
    seconds = time.monotonic() - began
    chance, rows = random.Random(config.seed), []
    # A session of updates is cut after half its share of the whole, on average, so that all kills find something to kill.
    spans = {"start": 0.5 * seconds, "updates": 0.5 * seconds / config.kills, "save": 0.02}
    for _, aim in tqdm(zip(range(config.kills), itertools.cycle(spans), strict=False), total=config.kills, unit="kill"):
        row = kill(command(cut), cut.out, aim, chance.uniform(0, spans[aim]))
        if row is None:
            raise SystemExit(f"--steps: got {config.steps}, which were done after {len(rows)} kills, expected more")
        rows.append(row)
    subprocess.run(command(cut), check=True, capture_output=True)
    table = pd.DataFrame(rows, index=pd.RangeIndex(1, len(rows) + 1, name="kill"))
    table.to_csv(config.out / "kills.csv")
    print(table.to_string(float_format="{:.2f}".format))
    differ = differences(whole, cut)
    if differ:
        raise SystemExit(f"the run that was killed differs from the uninterrupted one in {differ}")
    print(f"{config.kills} kills: rows and carry are those of the uninterrupted run, bit for bit")
    return table


def command(config: Config) -> list[str]:
    """The command line of a run."""
    options = {"--" + k.replace("_", "-"): str(v) for k, v in dataclasses.asdict(config).items() if k != "tensorboard"}
    flag = ["--tensorboard"] if config.tensorboard else []
    return [sys.executable, "-m", "experiments.long_run", *itertools.chain(*options.items()), *flag]


def main(config: Config) -> None:
    """Run, or run and kill."""
    if config.kills:
        kills(config)
    else:
        run(config)


if __name__ == "__main__":
    main(tyro.cli(Config, description=Config.__doc__))
