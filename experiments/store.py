"""The folder of a comparison: options, settings, rows, timings, checkpoints and result codes; whole after any interruption."""

import dataclasses
import datetime
import json
import platform
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
import pandas as pd

import bilevel_jax
from bilevel_jax import Carry, Result


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

    def draw(self, title: str, labels: dict[str, str], log_work: bool) -> None:
        """figure.png and figure.pdf from the rows so far."""
        from experiments.figures import comparison

        rows = self.history()
        if not rows.empty:
            comparison(rows, labels, title, self.out / "figure", log_work=log_work)


def _settings(record: dict[str, Any]) -> dict[str, Any]:
    """What must be the same when a run is resumed: not where it is written, nor how it is taken up."""
    return {k: v for k, v in json.loads(json.dumps(record, default=str)).items() if k not in ("out", "resume", "overwrite")}


def _write(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    part = path.with_name(path.name + ".part")
    part.write_text(text)
    part.replace(path)
