"""Measures that several claims share: rows of an experiment's own table, ends of runs, and the way to a level."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pandas as pd

from experiments.claims.claim import Found
from experiments.claims.saved import Saved

RELATIONS = {"=": "equal to", "<=": "at most", ">=": "at least"}


def gap(row: Any) -> float:
    """By how much a row of an experiment's table of claims misses what theory says."""
    theory, measured = float(row["theory"]), float(row["measured"])
    return {"=": abs(measured - theory), "<=": measured - theory, ">=": theory - measured}[row["relation"]]


def row(name: str, file: str, claim: str) -> Callable[[Saved], Found]:
    """A row of a table that an experiment writes, judged again from its numbers: within twice the tolerance it holds in part."""

    def measure(saved: Saved) -> Found:
        found = saved.row(name, file, claim)
        missed, tolerance = gap(found), float(found["tolerance"])
        words = f"{RELATIONS[found['relation']]} {short(found['theory'])}"
        parts = {f"{words}, to {tolerance:.2g}" if tolerance else words: bool(missed <= tolerance)}
        if tolerance and missed > tolerance:
            parts[f"{words}, to {2 * tolerance:.2g}"] = bool(missed <= 2 * tolerance)
        return Found(short(found["measured"]), parts)

    return measure


def rows(name: str, file: str, claims: Mapping[str, str]) -> Callable[[Saved], Found]:
    """Several rows of such a table, by what each is called here: all, some, or none of them within their tolerances."""

    def measure(saved: Saved) -> Found:
        found = {words: saved.row(name, file, claim) for words, claim in claims.items()}
        ours = "; ".join(f"{words} {short(r['measured'])}" for words, r in found.items())
        parts = {
            f"{words} {RELATIONS[r['relation']]} {short(r['theory'])}": bool(gap(r) <= float(r["tolerance"]))
            for words, r in found.items()
        }
        return Found(ours, parts)

    return measure


def short(number: Any) -> str:
    """Three significant digits."""
    return "rounding error" if number == -np.inf else f"{float(number):.3g}"


def medians(table: pd.DataFrame, column: str, along: str = "step") -> pd.DataFrame:
    """Medians over the seeds, an index the evaluations, a column a solver; a run that diverged counts as infinitely bad."""
    table = table.assign(value=table[column].fillna(np.inf))
    return table.pivot_table(index=along, columns="solver", values="value", aggfunc="median")


def at_end(table: pd.DataFrame, column: str, by: str = "solver") -> pd.Series:
    """Medians over the seeds at the end of each run."""
    last = table.sort_values("step", kind="stable").groupby([by, "seed"]).tail(1)
    return last.assign(value=last[column].fillna(np.inf)).groupby(by)["value"].median()


def first_below(table: pd.DataFrame, column: str, level: float, along: str) -> pd.Series:
    """Where the medians over the seeds are first at or below a level, by solver; infinite where they never are."""
    found = {}
    for solver, part in table.groupby("solver"):
        middle = part.assign(value=part[column].fillna(np.inf)).groupby("step")[["value", along]].median()
        there = middle[middle["value"] <= level]
        found[solver] = float(there[along].iloc[0]) if len(there) else np.inf
    return pd.Series(found)
