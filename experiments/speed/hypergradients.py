"""The command: ``python -m experiments.speed hypergradients --help``.  What the columns mean: see the package."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
import pandas as pd
import tyro

from bilevel_jax.results import Result
from experiments.speed import implicit, torch_worker, unrolled
from experiments.speed.cases import Case
from experiments.speed.conditions import conditions, installed, load
from experiments.speed.timing import Program, build, interleave, pinned, temporary_bytes

NAMES = (*implicit.VARIANTS, *unrolled.VARIANTS, *torch_worker.IMPLICIT, *torch_worker.UNROLLED)
TINY = unrolled.Sizes(examples=16, layers=(5, 4, 3), steps=9)


@dataclass(frozen=True)
class Settings:
    """Time of one hypergradient, by this library and by others, beside what one would write by hand."""

    tables: tuple[Literal["implicit", "unrolled"], ...] = ("implicit", "unrolled")
    """Hypergradients at a given inner solution, and through 100 inner steps."""
    sizes: tuple[tuple[int, int], ...] = ((5_000, 200), (20_000, 1_000))
    """Rows and features of the implicit cases."""
    only: tuple[str, ...] = ()
    """Variants to time, beside the floor; all by default."""
    repeats: int = 11
    """Measurements of each variant, of which the median is reported."""
    torch_python: str = sys.executable
    """Interpreter of an environment with torch, torchopt and higher."""
    out: Path = Path("results/speed")
    """Folder for hypergradients.csv and hypergradients.json."""
    quick: bool = False
    """Tiny sizes, to see that everything runs."""
    pin: bool = False
    """Keep to one core, where process time is the work done."""


class Others(NamedTuple):
    """Variants of another process: ``run(name, path or None)``, see `torch_worker`."""

    run: Callable[[str, str | None], float | None]
    names: tuple[str, ...]
    left_out: dict[str, str]
    versions: dict[str, str]
    folder: str


def main(args: Sequence[str] | None = None) -> None:
    """Measure, print and write."""
    settings = tyro.cli(Settings, args=args, prog="python -m experiments.speed hypergradients", description=Settings.__doc__)
    _check(settings)
    settings.out.mkdir(parents=True, exist_ok=True)
    left_out, rows = {}, []
    with pinned(settings.pin):
        config = conditions(settings)
        config["versions"] |= installed(("jaxopt", "optimistix", "lineax"))
        for case in cases(settings):
            with torch_variants(settings.torch_python, case) as others:
                found, missing = measure(case, others, settings.only, settings.repeats)
                config["versions"] |= others.versions
            left_out |= missing
            rows += found
            print(f"\n{case.name}\n{_text(pd.DataFrame(found))}", flush=True)
    pd.DataFrame(rows).to_csv(settings.out / "hypergradients.csv", index=False)
    config |= {"left_out": left_out, "load_at_end": load()}
    (settings.out / "hypergradients.json").write_text(json.dumps(config, indent=2) + "\n")
    for name, why in left_out.items():
        print(f"left out: {name}: {why}")
    print(f"\n{config['device']} ({config['processor']}), {config['usable_cores']} core(s), jax {config['versions']['jax']}")


def _check(settings: Settings) -> None:
    if settings.repeats < 1:
        raise ValueError(f"repeats: got {settings.repeats}, expected at least 1")
    if unknown := set(settings.only) - set(NAMES):
        raise ValueError(f"only: got {sorted(unknown)}, expected some of {list(NAMES)}")
    if shutil.which(settings.torch_python) is None:
        raise ValueError(f"torch_python: got {settings.torch_python!r}, expected a Python interpreter")


def cases(settings: Settings) -> Iterator[Case]:
    """One after the other: a large one is dropped before the next is made."""
    if "implicit" in settings.tables:
        for rows, features in ((40, 5),) if settings.quick else settings.sizes:
            yield implicit.case(rows, features)
    if "unrolled" in settings.tables:
        yield unrolled.case(TINY if settings.quick else unrolled.Sizes())


def measure(case: Case, others: Others, only: Sequence[str], repeats: int) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """One row a variant, all timed in turn; and which are left out, and why."""

    def wanted(name: str) -> bool:
        return not only or name in (*only, case.floor)

    built, left_out = {}, {name: why for name, why in others.left_out.items() if wanted(name)}
    for name in filter(wanted, case.variants):
        try:
            built[name] = build(jax.jit(case.variants[name]()), *case.args)
        except ImportError as error:
            left_out[name] = str(error)
    programs = {name: Program(lambda _, call=built.call: call(*case.args), None, 1) for name, built in built.items()}
    for name in filter(wanted, others.names):
        programs[name] = Program(lambda _, name=name: others.run(name, None), None, 1)
    times = interleave(programs, repeats, least_seconds=0.05)

    rows = []
    for name, program in programs.items():
        if name in built:
            gradient, residual, code = program.carry
            said = {"residual": float(residual) / case.scale, "result": Result(int(code)).name if code >= 0 else ""}
            cost = {"memory_mib": temporary_bytes(built[name].call) / 2**20, "compile_s": built[name].seconds}
        else:
            path = f"{others.folder}/gradient.npy"
            cost = {"memory_mib": others.run(name, path), "compile_s": np.nan}
            gradient, said = np.load(path), {"residual": np.nan, "result": ""}
        wall = times[name].wall / 1e3
        low, median, high = np.quantile(wall, (0.25, 0.5, 0.75))
        speed = {"wall_ms": median, "best_ms": wall.min(), "spread": (high - low) / median}
        over = dict(zip(("wall_over_floor", "process_over_floor"), times[name].over(times[case.floor]), strict=True))
        if name not in built:
            over["process_over_floor"] = np.nan  # the work is done in another process
        error = np.linalg.norm(np.asarray(gradient, float) - case.reference) / np.linalg.norm(case.reference)
        rows.append({"case": case.name, "variant": name, **speed, **over, "error": error, **said, **cost})
    return rows, left_out


@contextmanager
def torch_variants(python: str, case: Case, worker_file: str = torch_worker.__file__) -> Iterator[Others]:
    """The variants of `torch_worker`, whose process answers while the block lasts."""
    with tempfile.TemporaryDirectory() as folder:
        np.savez(f"{folder}/case.npz", allow_pickle=False, **case.arrays)
        command = [python, "-W", "ignore", worker_file, f"{folder}/case.npz"]
        env = {"OMP_WAIT_POLICY": "passive"} | os.environ  # on a busy machine threads that wait actively take 10 times as long
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env) as worker:
            why, versions = _answer(worker)
            left_out = {name: reason for name, reason in why.items() if reason is not None}
            yield Others(partial(_run, worker), tuple(name for name in why if name not in left_out), left_out, versions, folder)
            worker.communicate()  # the end of its input


def _run(worker: Any, name: str, path: str | None) -> float | None:
    print(json.dumps([name, path]), file=worker.stdin, flush=True)
    return _answer(worker)


def _answer(worker: Any) -> Any:
    if not (line := worker.stdout.readline()):
        raise RuntimeError(f"{worker.args[0]}: the process of the torch variants ended without an answer; see its error above")
    return json.loads(line)


def _text(table: pd.DataFrame) -> str:
    return table.drop(columns="case").to_string(index=False, float_format=lambda value: f"{value:.3g}")
