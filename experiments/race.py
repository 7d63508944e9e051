"""Solvers side by side until a number of seconds or of updates each, every one on data and samples of its own.

For what `experiments.harness` does not do: budgets in seconds, optimisers other than the schedules of the papers, data that are
cut for one batch size.  Writes config.json, history.csv and figure.png / figure.pdf.
"""

import dataclasses
import json
import math
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import pandas as pd

import bilevel_jax
from bilevel_jax import Levels, Result, Solver, Vars, begin, resume, spent
from bilevel_jax.samplers import Sampler
from bilevel_jax.types import Array
from experiments.figures import comparison
from experiments.methods import UNIT


class Entrant(NamedTuple):
    """A solver, and what it runs on."""

    solver: Solver
    sampler: Sampler
    data: Levels
    rows: Levels  # that a draw of either level reads: oracle calls are counted on `UNIT` rows
    chunk: int = 1  # updates in a call of the compiled program, which takes its time to test its results


@dataclasses.dataclass(frozen=True)
class Options:
    """Where to write."""

    out: Path = Path("results")
    """folder to write to"""
    overwrite: bool = False
    """delete what the folder holds"""


def race(
    entrants: dict[str, Entrant],
    start: Vars,
    measure: Callable[[Vars], dict[str, Array]],
    *,
    evaluations: int,
    seconds: float = math.inf,
    updates: float = math.inf,
    seed: int = 1,
) -> pd.DataFrame:
    """The history of the entrants: one row an entrant and evaluation, with the metrics of ``measure``.

    They take turns, a slice of the budget at a time: whatever else the machine does meanwhile, they share.  Seconds are those
    of the updates alone, compilation and metrics excluded.
    """
    if not math.isfinite(min(seconds, updates)):
        raise ValueError(f"seconds, updates: got {seconds} and {updates}, expected one that is finite")
    programs, carries, clock, rows = {}, {}, dict.fromkeys(entrants, 0.0), []
    for name, (solver, sampler, data, _, chunk) in entrants.items():
        carries[name] = begin(solver, sampler, start, data, jax.random.key(seed))
        advance = jax.jit(lambda c, d, s=solver, m=sampler, n=chunk: resume(s, m, c, d, steps=n)[0], donate_argnums=0)
        programs[name] = advance.lower(carries[name], data).compile()
    for part in range(evaluations + 1):
        for name, (solver, _, data, read, _) in entrants.items():
            while clock[name] < seconds * part / evaluations and carries[name].state.step < updates * part / evaluations:
                tick = time.perf_counter()
                carries[name] = jax.block_until_ready(programs[name](carries[name], data))
                clock[name] += time.perf_counter() - tick
            state, calls = carries[name].state, spent(solver, carries[name].state)
            inner = calls.inner_gradient + calls.hessian_vector + calls.cross
            rows.append(
                {
                    "solver": name,
                    "seed": seed,
                    "step": int(state.step),
                    "oracle_calls": float(read.inner * inner + read.outer * calls.outer_gradient) / UNIT,
                    "seconds": clock[name],
                    **{metric: float(value) for metric, value in jax.device_get(measure(state.vars)).items()},
                }
            )
    for name, carry in carries.items():
        if carry.result != Result.SUCCESSFUL:
            print(f"{name}: {Result(int(carry.result)).name}: {Result(int(carry.result)).message}")
    return pd.DataFrame(rows)


def prepare(options: Options) -> None:
    """Refuse a folder that holds a run already, before anything is computed."""
    known = options.out / "history.csv"
    if known.exists() and not options.overwrite:
        raise SystemExit(f"--out: {options.out} holds a run already: give another folder, or --overwrite")
    if options.overwrite and known.exists():
        shutil.rmtree(options.out)
    options.out.mkdir(parents=True, exist_ok=True)


def report(options: Options, rows: pd.DataFrame, labels: dict[str, str], title: str, **facts: Any) -> None:
    """Write what was done, the rows and the figure, and print the last row of every solver."""
    versions = {m.__name__: m.__version__ for m in (bilevel_jax, jax, np, pd)}
    known = {"settings": dataclasses.asdict(options), "facts": facts, "versions": versions}
    (options.out / "config.json").write_text(json.dumps(known, indent=2, default=str) + "\n")
    rows.to_csv(options.out / "history.csv", index=False)
    comparison(rows, labels, title, options.out / "figure")
    last = rows.groupby(["solver", "seed"], sort=False).last().groupby("solver", sort=False).median()
    print(last.to_string(float_format="{:.4g}".format))
    print(f"figure: {options.out / 'figure.png'}\nrows: {options.out / 'history.csv'}")
