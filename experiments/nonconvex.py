"""MEHA and eleven other methods on toy problems with known solutions, where the inner loss is not strongly convex.

``python -m experiments.nonconvex --problem sine --out results/sine``

``merely_convex`` (the inner solutions are a plane), ``sine`` (every inner problem has many minimisers) and ``lasso`` (the inner
loss has a kink): see `experiments.nonconvex_problems`.  A method has solved a problem when the relative errors of x and of
every part of z are, and stay, at most 1 % (lasso: 2 %).  Each method gets the fastest of the settings that are tried for it; a
gradient call is an oracle call as the library counts them.

Writes config.json, table.csv (the comparison), runs.csv (errors along the runs), sizes.csv, rates.csv, claims.csv and, but for
``lasso``, settings.csv, ablation.csv and released_code.csv, for ``sine`` starts.csv and basins.csv, too; and figure.png,
figure.pdf.  Float64.
"""

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optuna
import pandas as pd
import tyro
from tqdm import tqdm

from bilevel_jax import Vars
from experiments import nonconvex_claims as claims
from experiments import nonconvex_figures as figures
from experiments import nonconvex_lasso as searches
from experiments.lower_bounds import record, write
from experiments.nonconvex_claims import MAKE
from experiments.nonconvex_methods import KNOWN, METHODS, Method, Setting, lanes, meha, seconds, single, trace
from experiments.nonconvex_problems import Case, released_merely_convex, released_sine

Problem = Literal["merely_convex", "sine", "lasso"]
#: The size of z that methods are compared on.
SMALL = {"merely_convex": 10, "sine": 1, "lasso": 10}
#: Starts of x and of z, each pair of them.
GRID = (-8.0, -4.0, 0.0, 4.0, 8.0)
#: The c_low of MEHA that are tried from every start.
C_LOW = (0.5, 1.0, 2.0, 3.0, 5.0, 10.0)
#: The size on which methods are timed, too, with the updates of the small problem: all entries do the same.
LARGE = 10_000


@dataclasses.dataclass(frozen=True)
class Config:
    """MEHA and others on toy problems with known solutions."""

    problem: Problem = "merely_convex"
    """which problem"""
    methods: tuple[str, ...] | None = None
    """which methods to compare (default: all; lasso: MEHA and searches)"""
    updates: int = 2000
    """updates of each method"""
    rate_updates: int = 5000
    """updates of the runs that measure rates"""
    sizes: tuple[int, ...] | None = None
    """sizes of z on which MEHA runs (default: 10 to 100,000; lasso, even: 10 to 1,000)"""
    evaluations: int = 200
    """evaluations of each search (lasso)"""
    seed: int = 0
    """of the searches (lasso)"""
    out: Path = Path("results/nonconvex")
    """folder to write to"""

    def __post_init__(self) -> None:
        for name in ("updates", "rate_updates", "evaluations"):
            if not getattr(self, name) > 0:
                raise SystemExit(f"--{name.replace('_', '-')}: got {getattr(self, name)}, expected a positive number")
        for size in self.sizes or ():
            if size < 1 or (self.problem == "lasso" and size % 2):
                wanted = "positive even numbers" if self.problem == "lasso" else "positive numbers"
                raise SystemExit(f"--sizes: got {size}, expected {wanted}")
        known = list(METHODS.get(self.problem, ()))
        for name in self.methods or ():
            if name not in known:
                wanted = f"some of {known}" if known else "none"
                raise SystemExit(f"--methods: got {name!r}, expected {wanted}, with --problem {self.problem}")

    @property
    def dims(self) -> tuple[int, ...]:
        """The sizes."""
        return self.sizes or ((10, 100, 1000) if self.problem == "lasso" else (10, 100, 1000, 10_000, 100_000))


def starts(case: Case, many: bool) -> Vars:
    """The start of the problem, and with ``many`` those of the grid after it: leaves ``[starts, ...]``."""
    if not many:
        return single(case.start)
    x, z = map(np.ravel, np.meshgrid(GRID, GRID))
    first = case.start
    return Vars(inner=jnp.append(first.inner, z)[:, None], outer=jnp.append(first.outer, x)[:, None])


def compare(problem: str, case: Case, names: list[str], updates: int) -> tuple[pd.DataFrame, pd.DataFrame, pd.DataFrame]:
    """One row a method, at the setting that solves the problem for the fewest gradient calls; the errors of these runs; and
    for ``sine`` one row a method, at the setting that solves it from the most starts of the grid.

    ``first``: the first time within 1 %, to stay or not, at the setting that is best by that.
    """
    rows, curves, successes = [], [], []
    for name in tqdm(names, unit="method", file=sys.stderr):
        method = METHODS[problem][name]
        settings = method.settings
        found = lanes(method, case, settings, starts(case, problem == "sine"), updates)
        errors = np.where(np.isnan(found.error), np.inf, found.error)
        best = int(np.lexsort((errors[:, 0], found.kept[:, 0] * found.calls[:, 0]))[0])
        kept, each = found.kept[best, 0], found.calls[best, 0]
        early = int(np.argmin(found.first[:, 0] * found.calls[:, 0]))
        took = [np.inf, np.inf]
        if np.isfinite(kept):
            took = [seconds(method, c, settings[best], int(kept), r) for c, r in ((case, 5), (MAKE[problem](LARGE), 2))]
        rows.append(
            {
                "method": name,
                "settings": len(settings),
                "solved": int(np.isfinite(found.kept[:, 0]).sum()),
                "updates": kept,
                "gradient_calls": kept * each,
                "seconds": took[0],
                "seconds_large": took[1] if name not in ("BVFIM", "BVFSM") else np.nan,  # their slopes depend on n
                "first_updates": found.first[early, 0],
                "first_calls": found.first[early, 0] * found.calls[early, 0],
                "error": errors[best, 0],
                **_end(found.vars, method, best),
                "calls_an_update": each,
                "setting": json.dumps(settings[best]),
            }
        )
        errors = trace(method, case, settings[best], min(updates, 3 * int(kept) if np.isfinite(kept) else updates))
        places = np.unique(np.append(0, np.geomspace(1, len(errors) - 1, 120).astype(int)))
        curves.append(
            pd.DataFrame({"method": name, "update": places, "gradient_calls": places * each, "error": errors[places]})
        )
        if problem == "sine":
            successes.append({"method": name, **_most(found.kept[:, 1:], found.calls[:, 1:], settings, updates)})
    return pd.DataFrame(rows), pd.concat(curves, ignore_index=True), pd.DataFrame(successes)


def _end(vars: Vars, method: Method, best: int) -> dict[str, float]:
    """The means of x and of the parts of z at the end."""
    z, x = getattr(vars, method.answer)[best, 0], vars.outer[best, 0]
    parts = {"z1_end": z[0].mean(), "z2_end": z[1].mean()} if z.ndim == 2 else {"z_end": z.mean()}
    return {"x_end": x.mean(), **parts}


def _most(kept: np.ndarray, calls: np.ndarray, settings: list[Setting], updates: int) -> dict[str, Any]:
    """The setting that solves the problem from the most starts, of several the fastest in all."""
    solved = np.isfinite(kept)
    best = int(np.lexsort((np.where(solved, kept, updates).sum(1), -solved.sum(1)))[0])
    fine = solved[best]
    return {
        "starts": len(fine),
        "solved": int(fine.sum()),
        "updates": np.median(kept[best][fine]) if fine.any() else np.inf,
        "gradient_calls": np.median((kept * calls)[best][fine]) if fine.any() else np.inf,
        "setting": json.dumps(settings[best]),
    }


def basins(case: Case, updates: int) -> pd.DataFrame:
    """Updates of MEHA to 1 % from every start, for some c_low: one row a pair."""
    settings = [KNOWN["sine"] | {"c": c} for c in C_LOW]
    kept = lanes(Method(meha, {}), case, settings, starts(case, True), updates).kept[:, 1:]
    z, x = np.meshgrid(GRID, GRID, indexing="ij")
    parts = [pd.DataFrame({"c_low": c, "x": x.ravel(), "z": z.ravel(), "updates": k}) for c, k in zip(C_LOW, kept, strict=True)]
    return pd.concat(parts, ignore_index=True)


def released(problem: str) -> pd.DataFrame:
    """Where the recurrences of the public code of MEHA end, and the solution."""
    if problem == "merely_convex":
        updates, x, z = released_merely_convex()
        return pd.DataFrame([{"updates": updates, "x": float(x[0]), "z1": float(z[0, 0]), "z2": float(z[1, 0])}])
    ends = {"stays at 0": released_sine(), "moves": released_sine(frozen=False)}
    return pd.DataFrame([{"theta": word, "x": x, "z": z} for word, (x, z) in ends.items()])


def smooth(config: Config) -> dict[str, pd.DataFrame]:
    """All tables of ``merely_convex`` or ``sine``."""
    problem, many = config.problem, config.problem == "sine"
    case = MAKE[problem](SMALL[problem])
    names = list(config.methods or METHODS[problem])
    table, runs, successes = compare(problem, case, names, config.updates)
    tables = {"table": table, "runs": runs, "sizes": claims.sizes(problem, config.dims)}
    tables["settings"] = claims.solved_settings(problem, 4 * config.updates)
    tables["ablation"] = claims.ablation(problem, case, starts(case, many), config.updates)
    tables["released_code"] = released(problem)
    return tables | ({"starts": successes, "basins": basins(case, config.updates)} if many else {})


def nonsmooth(config: Config) -> dict[str, pd.DataFrame]:
    """All tables of ``lasso``."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    table, runs = searches.compare(config.dims, config.evaluations, config.seed)
    return {"table": table, "runs": runs, "sizes": claims.sizes("lasso", config.dims)}


def main(config: Config) -> dict[str, pd.DataFrame]:
    """Run, print and write."""
    jax.config.update("jax_enable_x64", True)
    record(config, config.out)
    problem = config.problem
    tables = nonsmooth(config) if problem == "lasso" else smooth(config)
    n, setting = SMALL[problem], claims.STEADY[problem]
    setting = setting | {"c": n * setting["c"]} if problem == "lasso" else setting
    tables["rates"] = claims.rates(MAKE[problem](n), setting, config.rate_updates)
    found = claims.verdicts(problem, tables) + claims.rate_claims(problem, tables["rates"])
    tables["claims"] = pd.DataFrame(found)
    long = {name: tables.pop(name) for name in ("runs", "rates", "basins") if name in tables}
    for name, table in long.items():
        table.to_csv(config.out / f"{name}.csv", index=False)
    write(config.out, **tables)
    figures.draw(problem, tables | long, config.out / "figure")
    return tables | long


if __name__ == "__main__":
    main(tyro.cli(Config))
