"""What theory says of MEHA, measured on the problems of `experiments.nonconvex`: rates, ablations, and sizes."""

from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd

from bilevel_jax import Vars, moreau, samplers
from bilevel_jax.types import Array
from experiments.lower_bounds import claim, slope
from experiments.nonconvex_methods import KNOWN, METHODS, Method, Setting, lanes, meha, seconds, single
from experiments.nonconvex_problems import NOTHING, Case, lasso, merely_convex, sine

#: Below this a measured quantity is round-off.
FLOOR = 1e-11
#: Of the runs that measure rates: stable with every p.  For lasso c is c / n.
STEADY: dict[str, Setting] = {
    **KNOWN,
    "merely_convex": {"alpha": 0.1, "beta": 0.3, "eta": 0.5, "gamma": 5.0, "c": 0.5},
    "lasso": {**KNOWN["lasso"], "c": 2.0},
}
#: Gradients of the inner losses have this Lipschitz constant, in z.
SMOOTHNESS = 1.0
QUANTITIES = {"residual": "min R", "theta": "min |theta - theta*|", "gap": "gap"}


# ---- rates ------------------------------------------------------------------------------------------------------------


def rates(case: Case, setting: Setting, updates: int, powers: Iterable[float] = (0.0, 0.25, 0.49)) -> pd.DataFrame:
    """One row a power p and update, at 100 of them evenly spaced in logarithm: R_k, the gap, and how far theta is from theta*.

    Of R_k and of theta the least so far, over all updates.
    """
    places = np.unique(np.geomspace(1, updates, 100).astype(int))
    rows = []
    for p in powers:
        found = _measure(case, setting | {"p": p}, updates)
        table = {name: np.asarray(values) for name, values in found.items()}
        for name in ("residual", "theta"):
            table[name] = np.minimum.accumulate(table[name])
        rows.append(pd.DataFrame({"p": p, "update": places, **{k: v[places - 1] for k, v in table.items()}}))
    return pd.concat(rows, ignore_index=True)


def _measure(case: Case, setting: Setting, updates: int) -> dict[str, Array]:
    solver, batch, rate = meha(case, **setting), case.batch, 1 / (SMOOTHNESS + 1 / setting["gamma"])
    batches = samplers.full().batches(NOTHING, jax.random.key(0), 0, solver.draws)
    shared = {"gamma": setting["gamma"], "rate": rate, "nonsmooth": case.term, "tolerance": 1e-13}

    def body(state: Any, k: Array) -> tuple[Any, dict[str, Array]]:
        state = solver.update(state, batches)
        z, theta, x = state.vars
        c = setting["c"] * (k + 1.0) ** setting["p"]
        exact = moreau.envelope(case.problem, z, x, batch, projection=case.projections[0], **shared)
        r = moreau.residual(case.problem, z, x, batch, multiplier=c, projections=case.projections, **shared)
        return state, {"residual": r, "gap": exact.gap, "theta": jnp.sqrt(((theta - exact.point) ** 2).sum())}

    go = jax.jit(lambda start: jax.lax.scan(body, solver.init(start, batches), jnp.arange(updates, dtype=float))[1])
    return go(case.start)


def rate_claims(name: str, table: pd.DataFrame) -> list[dict[str, Any]]:
    """Slopes over the last decade of updates against the upper bounds: "not slower than".

    A quantity that has reached round-off has a slope of -inf.  With p = 0 the gap should *not* vanish, except where the inner
    problem and f agree at the solution, as in ``merely_convex``.
    """
    rows = []
    for p in table["p"].unique():
        part: Any = table[(table["p"] == p) & (table["update"] >= table["update"].max() / 10)]
        bounds = [("theta", "<=", -0.5), ("residual", "<=", -(1 - 2 * p) / 2)]
        if p > 0 or name != "merely_convex":
            bounds.append(("gap", "<=", -p) if p > 0 else ("gap", ">=", 0.0))
        for quantity, relation, bound in bounds:
            values = part[quantity].to_numpy()
            steep = -np.inf if abs(values[-1]) < FLOOR else slope(part["update"], np.maximum(values, FLOOR))
            rows.append(claim(f"p = {p:g}: {QUANTITIES[quantity]} against K, slope", relation, bound, steep, 0.05))
    return rows


# ---- ablations --------------------------------------------------------------------------------------------------------


def variants(problem: str) -> tuple[dict[str, Setting], dict[str, dict[str, Any]]]:
    """Changes of the numbers of `KNOWN`, and of the algorithm, one at a time, by name."""
    base = KNOWN[problem]
    gammas = (0.2, 5.0, 20.0) if problem == "merely_convex" else (0.1, 0.25, 0.49, 0.9, 2.0, 5.0)
    numbers = {"as it is": {}} | {f"p = {p:g}": {"p": p} for p in (0.0, 0.25, 0.4)}
    numbers["p = 0, ten times c_low"] = {"p": 0.0, "c": 10 * base["c"]}
    numbers |= {f"c_low = {base['c'] * factor:g}": {"c": base["c"] * factor} for factor in (0.1, 0.3, 3.0, 10.0)}
    # the step of theta at most 1 / (L + 1 / gamma)
    etas = {gamma: min(base["eta"], 1 / (SMOOTHNESS + 1 / gamma)) for gamma in gammas}
    numbers |= {f"gamma = {gamma:g}": {"gamma": gamma, "eta": eta} for gamma, eta in etas.items()}
    numbers |= {"f times c_k, not over it": {"c": 1 / base["c"], "p": -base["p"]}}
    algorithm = {"theta, z, x": {"z_first": True}, "theta to 50 steps": {"theta_steps": 50}}
    return {name: base | change for name, change in numbers.items()}, algorithm


def ablation(problem: str, case: Case, starts: Vars, updates: int) -> pd.DataFrame:
    """One row a variant: updates to 1 % from the first start, error there at the end, and how many of the others it solves."""
    numbers, algorithm = variants(problem)
    runs = [(list(numbers), list(numbers.values()), {})]
    runs += [([name], [KNOWN[problem]], change) for name, change in algorithm.items()]
    rows = []
    for names, settings, change in runs:
        method = Method(lambda case, change=change, **setting: meha(case, **setting, **change), {})
        found = lanes(method, case, settings, starts, updates)
        for name, kept, error in zip(names, found.kept, found.error, strict=True):
            others = {} if len(kept) == 1 else {"starts": len(kept) - 1, "solved": np.isfinite(kept[1:]).sum()}
            rows.append({"variant": name, "updates": kept[0], "error": error[0], **others})
    return pd.DataFrame(rows)


# ---- sizes ------------------------------------------------------------------------------------------------------------

_NAMES = ("alpha", "beta", "eta", "gamma", "c", "p")
#: Settings and sizes of ``sine``, variant B: (n, setting).
SHARED: tuple[tuple[int, Setting], ...] = tuple(
    (n, dict(zip(_NAMES, numbers, strict=True)))
    for n, numbers in (
        (1, (1.0, 0.3, 0.3, 0.45, 5.0, 0.49)),
        (1, (1.0, 0.3, 0.3, 2.0, 2.0, 0.49)),
        (1, (0.5, 0.3, 0.3, 2.0, 2.0, 0.49)),
        (2, (0.05, 0.3, 0.1, 2.0, 2.0, 0.49)),
        (10, (0.1, 0.1, 0.1, 0.45, 1.0, 0.49)),
        (10, (0.1, 0.3, 0.3, 2.0, 0.5, 0.49)),
        (100, (0.01, 0.1, 0.1, 0.45, 0.25, 0.25)),
    )
)
#: Of the others: for every n.
SEPARABLE: dict[str, list[Setting]] = {
    "merely_convex": [
        dict(zip(_NAMES, numbers, strict=True))
        for numbers in ((0.5, 0.3, 0.5, 1.0, 0.1, 0.49), (0.5, 0.1, 0.5, 5.0, 0.1, 0.49), (0.1, 0.3, 0.5, 5.0, 0.1, 0.49))
    ],
    "sine": [setting for n, setting in SHARED if n == 1],
    "lasso": [KNOWN["lasso"]],
}
MAKE = {"merely_convex": merely_convex, "sine": sine, "lasso": lasso}
METHOD = Method(meha, {})


def sizes(problem: str, dims: tuple[int, ...]) -> pd.DataFrame:
    """One row a size and setting: updates to 1 % (lasso: 2 %), and the seconds that they take."""
    updates, tolerance = (8000, 0.02) if problem == "lasso" else (1000, 0.01)
    rows = []
    for n in dims:
        case = MAKE[problem](n)
        settings = [s | {"c": s["c"] * n} for s in SEPARABLE[problem]] if problem == "lasso" else SEPARABLE[problem]
        found = lanes(METHOD, case, settings, single(case.start), updates if n < 10**4 else 300, tolerance)
        for number, (setting, kept) in enumerate(zip(settings, found.kept[:, 0], strict=True)):
            timed = number == 0 and np.isfinite(kept)
            took = seconds(METHOD, case, setting, int(kept), repeats=3) if timed else np.nan
            rows.append({"variant": "one x a z", "n": n, **setting, "updates": kept, "seconds": took})
    if problem == "sine":
        for n, setting in SHARED:
            case = sine(n, shared=True)
            found = lanes(METHOD, case, [setting], single(case.start), 8000)
            rows.append({"variant": "one x in all", "n": n, **setting, "updates": found.kept[0, 0], "seconds": np.nan})
    return pd.DataFrame(rows)


def solved_settings(problem: str, updates: int = 8000) -> pd.DataFrame:
    """How many settings of a grid solve the problem from its start."""
    grid: dict[str, tuple[float, ...]] = METHODS[problem]["MEHA"].grid
    rows = []
    if problem == "merely_convex":
        cases = [(10, merely_convex(10), grid)]
    else:
        cases = [(n, sine(n, shared=True), {**grid, "gamma": (gamma,)}) for n in (1, 10) for gamma in (0.45, 2.0)]
    for n, case, values in cases:
        values = values | ({"alpha": tuple(a / n for a in values["alpha"])} if problem == "sine" else {})
        settings = Method(meha, values).settings
        kept = lanes(METHOD, case, settings, single(case.start), updates).kept[:, 0]
        gamma = ", ".join(f"{gamma:g}" for gamma in values["gamma"])
        rows.append({"n": n, "gamma": gamma, "settings": len(settings), "solved": np.isfinite(kept).sum(), "best": kept.min()})
    return pd.DataFrame(rows)


# ---- verdicts ---------------------------------------------------------------------------------------------------------


def verdicts(problem: str, tables: dict[str, pd.DataFrame]) -> list[dict[str, Any]]:
    """What is claimed of the problem, against the tables of `experiments.nonconvex`."""
    sizes: Any = tables["sizes"]
    separable = sizes.query("variant == 'one x a z'")
    changing = [name for name in _NAMES if problem != "lasso" or name != "c"]
    ranges = separable.groupby(changing)["updates"].agg(["min", "max"])
    rows = [
        claim("MEHA at one setting: updates at one n over those at another", "=", 1, (ranges["max"] / ranges["min"]).max(), 0)
    ]
    if problem == "lasso":
        return [*rows, claim("MEHA: updates to 2 %, at most", "<=", 8000, separable["updates"].max(), 0)]
    code = tables["released_code"].iloc[0]
    if problem == "merely_convex":
        rows.append(claim("MEHA: updates, most of three settings and all n", "<=", 45, separable["updates"].max(), 0))
        rows.append(claim("public code of MEHA: updates, those of its log", "=", 113, code["updates"], 0))
        return rows + stuck()
    for n in (1, 10):
        found = sizes.query("variant == 'one x in all' and n == @n and gamma == 0.45")["updates"].max()
        rows.append(claim(f"MEHA, one x, n = {n}, gamma = 0.45: updates, at most", "<=", 8000, found, 0))
    rows.append(claim("public code of MEHA: x at the end, that of the least f", "=", 2.0, code["x"], 0.01))
    return rows


def stuck() -> list[dict[str, Any]]:
    """Methods that follow the inner problem alone leave z2 of ``merely_convex`` where it is."""
    case, start = merely_convex(10), 0.01
    ends = {}
    for name in ("ITD", "AID-CG"):
        ends[name] = lanes(METHODS["merely_convex"][name], case, [{"inner": 1.0, "outer": 0.3}], single(case.start), 1000).vars
    rows = [
        claim(f"{name}: z2 at the end, its start", "=", start, vars.inner[0, 0, 1].mean(), 1e-12) for name, vars in ends.items()
    ]
    return [claim("ITD: x at the end, (1 + z2) / 2", "=", (1 + start) / 2, ends["ITD"].outer.mean(), 1e-6), *rows]
