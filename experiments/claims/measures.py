"""Measures that several claims share: rows of an experiment's own table, ends of runs, and the way to a level."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pandas as pd

from experiments.claims.claim import Found
from experiments.claims.saved import Saved

#: Names of solvers and methods in the tables of results.
TITLES = {
    "aid_cg": "AID-CG", "aid_fp": "AID-FP", "amigo": "AmIGO", "anil": "ANIL", "bome": "BOME", "bsa": "BSA",
    "darts_first": "DARTS", "darts_second": "DARTS one step ahead", "d_soba": "D-SOBA", "f2ba": "F2BA", "f2sa": "F2SA",
    "f2sa_p": "F2SA-2", "fo_itd_bio": "first-order", "fomaml": "FOMAML", "fsla": "FSLA", "hoag": "HOAG", "hozog": "HOZOG",
    "imaml": "iMAML", "itd_bio": "ITD-BiO", "itd_truncated": "reverse", "ma_soba": "MA-SOBA", "maml": "MAML", "meha": "MEHA",
    "mrbo": "MRBO", "pbgd": "V-PBGD", "pzobo": "PZOBO", "pzobo_unit": "PZOBO of the public code", "reptile": "Reptile",
    "saba": "SABA", "soba": "SOBA", "srba": "SRBA", "stocbio": "stocBiO", "sustain": "SUSTAIN", "ttsa": "TTSA",
    "vrbo": "VRBO", "fixed_x": "x left at 0",
}  # fmt: skip
RELATIONS = {"=": "equal to", "<=": "at most", ">=": "at least"}


def gap(row: Any) -> float:
    """By how much a row of an experiment's table of claims misses what theory says."""
    theory, measured = float(row["theory"]), float(row["measured"])
    return {"=": abs(measured - theory), "<=": measured - theory, ">=": theory - measured}[row["relation"]]


def expected(row: Any) -> str:
    """What theory says of a row, in words."""
    tolerance = float(row["tolerance"])
    return f"{RELATIONS[row['relation']]} {row['theory']:.4g}" + (f", to {tolerance:.2g}" if tolerance else "")


def row(name: str, file: str, claim: str) -> Callable[[Saved], Found]:
    """A row of an experiment's own table, judged again from its numbers: within twice the tolerance it holds in part."""

    def measure(saved: Saved) -> Found:
        found = saved.row(name, file, claim)
        missed, tolerance = gap(found), float(found["tolerance"])
        parts = {expected(found): bool(missed <= tolerance)}
        if tolerance and missed > tolerance:
            parts["to twice that"] = bool(missed <= 2 * tolerance)
        return Found(f"{found['measured']:.4g}", parts)

    return measure


def rows(name: str, file: str, claims: Mapping[str, str]) -> Callable[[Saved], Found]:
    """Several rows of such a table, by what each is called here: all, some, or none of them within their tolerances."""

    def measure(saved: Saved) -> Found:
        found = {words: saved.row(name, file, claim) for words, claim in claims.items()}
        ours = "; ".join(f"{words} {short(r['measured'])}" for words, r in found.items())
        alone = len(found) == 1
        parts = {
            expected(r) if alone else f"{words} {expected(r)}": bool(gap(r) <= float(r["tolerance"]))
            for words, r in found.items()
        }
        return Found(ours, parts)

    return measure


def short(number: Any) -> str:
    """Three significant digits."""
    return "rounding error" if number == -np.inf else f"{float(number):.3g}"


def percent(share: Any, digits: int = 2) -> str:
    """A share of one in per cent."""
    return f"{100 * float(share):.{digits}f} %"


def sampling_error(accuracy: float, count: int) -> float:
    """Of an accuracy on so many samples: one standard deviation."""
    return float(np.sqrt(accuracy * (1 - accuracy) / count))


def higher(one: float, other: float, count: int) -> bool | None:
    """Whether an accuracy is higher than another; None where they differ by less than the sampling error of one of them."""
    return None if abs(one - other) < sampling_error(one, count) else bool(one > other)


def named(values: Any, titles: Mapping[str, str] | None = None) -> str:
    """Solvers with their values."""
    known = TITLES | dict(titles or {})
    return ", ".join(f"{known[str(name)]} {short(value)}" for name, value in values.items())


def medians(table: Any, column: str, along: str = "step") -> Any:
    """Medians over the seeds, an index the evaluations, a column a solver; a run that diverged counts as infinitely bad."""
    table = table.assign(value=table[column].fillna(np.inf))
    return table.pivot_table(index=along, columns="solver", values="value", aggfunc="median")


def at_end(table: Any, column: str, by: str = "solver") -> Any:
    """Medians over the seeds at the end of each run."""
    last = table.sort_values("step", kind="stable").groupby([by, "seed"]).tail(1)
    return last.assign(value=last[column].fillna(np.inf)).groupby(by)["value"].median()


def first_below(table: Any, column: str, level: float, along: str) -> Any:
    """Where the medians over the seeds are first at or below a level, by solver; infinite where they never are."""
    found = {}
    for solver, part in table.groupby("solver"):
        middle = part.assign(value=part[column].fillna(np.inf)).groupby("step")[["value", along]].median()
        there = middle[middle["value"] <= level]
        found[solver] = float(there[along].iloc[0]) if len(there) else np.inf
    return pd.Series(found)
