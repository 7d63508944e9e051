"""The command: ``python -m experiments.speed first_order --help``.  What the columns mean: see the package."""

import contextlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
import pandas as pd
import tyro

from bilevel_jax import samplers
from experiments.nonconvex_claims import MAKE
from experiments.nonconvex_methods import METHODS, Method, Setting, lanes, single
from experiments.nonconvex_problems import NOTHING, Case
from experiments.speed.conditions import conditions, load
from experiments.speed.timing import Program, interleave, pinned

WORKER = Path(__file__).with_name("boat_worker.py")
NAMES = ("MEHA", "BOME", "F2SA-2", "AID-CG")
#: boat-torch has the exponent of c_k built in.
BOAT_POWER = 0.25


@dataclass(frozen=True)
class Settings:
    """Time and oracle calls of first-order methods to one accuracy on two toy problems, MEHA of boat-torch among them."""

    problems: tuple[Literal["merely_convex", "sine"], ...] = ("merely_convex", "sine")
    """Of `experiments.nonconvex`."""
    dim: int = 1000
    """Size of x."""
    accuracy: float = 0.01
    """Relative error of x and of the parts of z, to be reached and kept."""
    limit: int = 1000
    """Updates after which a method counts as not having got there."""
    repeats: int = 11
    """Measurements of each method, of which the median is reported."""
    torch_python: str = sys.executable
    """Interpreter of an environment with boat-torch."""
    out: Path = Path("results/speed")
    """Folder for first_order.csv and first_order.json."""
    pin: bool = False
    """Keep to one core, where process time is the work done."""


def main(args: Sequence[str] | None = None) -> None:
    """Measure, print and write."""
    settings = tyro.cli(Settings, args=args, prog="python -m experiments.speed first_order", description=Settings.__doc__)
    for name in ("repeats", "dim", "limit"):
        if getattr(settings, name) < 1:
            raise ValueError(f"{name}: got {getattr(settings, name)}, expected at least 1")
    if shutil.which(settings.torch_python) is None:
        raise ValueError(f"torch_python: got {settings.torch_python!r}, expected a Python interpreter")
    settings.out.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []
    with pinned(settings.pin):
        config = conditions(settings)
        for problem in settings.problems:
            found, said = measure(problem, settings)
            config["versions"] |= said.pop("versions", {})
            config |= said
            rows += found
            print(f"\n{problem}\n{_text(pd.DataFrame(found))}", flush=True)
    pd.DataFrame(rows).to_csv(settings.out / "first_order.csv", index=False)
    config["load_at_end"] = load()
    (settings.out / "first_order.json").write_text(json.dumps(config, indent=2) + "\n")
    if "left_out" in config:
        print(f"left out: boat-torch: {config['left_out']}")
    print(f"\n{config['device']} ({config['processor']}), {config['usable_cores']} core(s), jax {config['versions']['jax']}")


def measure(problem: str, settings: Settings) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """One row a method, all timed in turn; and the versions of the other library, or why it is left out."""
    make, rows, programs = MAKE[problem], {}, {}
    case = make(settings.dim)
    tried = {name: (METHODS[problem][name], METHODS[problem][name].settings) for name in NAMES}
    method, known = tried["MEHA"]
    tried["MEHA, p = 1/4"] = method, [setting for setting in known if setting["p"] == BOAT_POWER]
    for name, (method, known) in tried.items():
        rows[name] = best(method, make(10), known, settings)
        programs[name] = Program(partial(updates(method, case, rows[name]), case.start), None, rows[name]["updates"])
    like = rows["MEHA, p = 1/4"]["setting"]
    wanted = {"problem": problem, "dim": settings.dim, "accuracy": settings.accuracy, "limit": settings.limit}
    wanted |= {name: like[name] for name in ("alpha", "beta", "eta", "gamma")} | {"c_low": like["c"]}
    with boat(settings.torch_python, wanted) as (said, run):
        if run is not None:
            found = {"reached": said["updates"] is not None, "updates": said["updates"] or settings.limit, "setting": wanted}
            for name, log in (("boat-torch MESO", True), ("boat-torch MESO, its loss log off", False)):
                rows[name] = found | {"calls": 6.0 * found["updates"], "end": said["end"]}
                programs[name] = Program(partial(run, log), None, found["updates"])
        times = interleave(programs, settings.repeats)
    table = []
    for name, row in rows.items():
        over, _ = times[name].over(times["MEHA"])
        spent = times[name].row()
        to = spent["wall_us"] * row["updates"] / 1e3
        cost = {"update_us": spent["wall_us"], "update_over_meha": over, "spread": spent["spread"], "to_accuracy_ms": to}
        if not row["reached"]:
            cost["to_accuracy_ms"] = np.inf
        table.append({"problem": problem, "method": name} | row | cost)
    return table, {key: said[key] for key in ("versions", "left_out") if key in said}


def best(method: Method, case: Case, known: list[Setting], settings: Settings) -> dict[str, Any]:
    """Of the settings that get there, that of the fewest oracle calls; both problems are separable: few dimensions will do."""
    found = lanes(method, case, known, single(case.start), settings.limit, settings.accuracy)
    kept, each, error = (np.asarray(part)[:, 0] for part in (found.kept, found.calls, found.error))
    calls = np.where(np.isfinite(kept), kept * each, np.inf)
    reached = bool(np.isfinite(calls).any())
    chosen = int(np.argmin(calls if reached else np.nan_to_num(error, nan=np.inf)))  # else the one that came closest
    number = int(kept[chosen]) if reached else settings.limit
    end = [float(np.mean(leaf[chosen])) for leaf in (found.vars.outer, getattr(found.vars, method.answer))]
    calls_in_all = float(number * each[chosen])
    return {"reached": reached, "updates": number, "calls": calls_in_all, "setting": known[chosen], "end": end}


def updates(method: Method, case: Case, row: dict[str, Any]) -> Callable[..., Any]:
    """The compiled run of so many updates from the start."""
    solver = method.make(case, **row["setting"])
    batches = samplers.full().batches(NOTHING, jax.random.key(0), 0, solver.draws)

    @jax.jit
    def go(start: Any, _: None) -> Any:
        state = solver.init(start, batches)
        return jax.lax.fori_loop(0, row["updates"], lambda _, s: solver.update(s, batches), state).vars

    return go


@contextmanager
def boat(python: str, case: dict[str, Any]) -> Iterator[tuple[dict[str, Any], Callable[..., None] | None]]:
    """What `boat_worker` says of a case, and a function that runs it once, while the block lasts; or why it is left out."""
    command = [python, "-W", "ignore", str(WORKER), json.dumps(case)]
    env = {"OMP_WAIT_POLICY": "passive"} | os.environ
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, text=True, env=env, **pipes) as worker:
        assert worker.stdin is not None
        assert worker.stdout is not None
        assert worker.stderr is not None
        first = worker.stdout.readline()
        if not first:
            yield {"left_out": worker.stderr.read().strip().rpartition("\n")[2]}, None
            return
        inputs, outputs = worker.stdin, worker.stdout

        def run(log: bool, _: None) -> None:
            print(json.dumps(log), file=inputs, flush=True)
            if not outputs.readline():
                raise RuntimeError(f"{python}: the process of boat-torch ended without an answer")

        yield json.loads(first), run
        with contextlib.suppress(BrokenPipeError):
            inputs.close()  # the end of its input


def _text(table: pd.DataFrame) -> str:
    return table.drop(columns=["problem", "setting", "end"]).to_string(index=False, float_format=lambda value: f"{value:.3g}")
