"""Lower bounds: how fast any method can be, and how near AccBiO comes.

``python -m experiments.lower_bounds --out results/lower_bounds``

Two measurements, in float64, in about a minute.  *Zero chain*: from x = 0 on the worst case, a sweep of N inner steps and M
steps of the linear solver lets exactly N + M - 1 more entries of x move (the first sweep N + M), so that no method of that
kind can be near x* before it has spent as many products as x* has entries that count.  *Work*: oracle calls to a given
accuracy of AccBiO and of AID-BiO with gradient steps, against the strong convexity of either level.

Writes config.json, chain.csv (support of x), work.csv (one row a run), claims.csv (measured against theory) and figure.png,
figure.pdf.
"""

import dataclasses
import json
import math
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pandas as pd
import tyro
from tqdm import tqdm

import bilevel_jax
from bilevel_jax import (
    Levels,
    Solver,
    Vars,
    assign,
    begin,
    descend,
    implicit,
    linear_solve,
    resume,
    run,
    samplers,
    solve_aux,
    sweep,
)
from bilevel_jax.solvers import accbio, accbio_bg, aid_bio
from bilevel_jax.testing import Quadratic, dense_spectrum, worst_case, worst_case_ratio
from bilevel_jax.types import Array
from experiments.figures import plt

#: (N, M) of the zero chain.
COUNTS = ((1, 1), (2, 1), (1, 2), (2, 2), (3, 3))


@dataclasses.dataclass(frozen=True)
class Config:
    """Zero chain and work of the lower bounds."""

    outer: tuple[float, ...] = (0.1, 0.03, 0.01, 0.003)
    """strong convexity of h, where that of g is 0.3"""
    inner: tuple[float, ...] = (0.4, 0.2, 0.1, 0.05)
    """strong convexity of g, where that of h is at least 0.05"""
    tolerance: float = 1e-8
    """relative gap of h (worst case: relative squared distance to x*) at which the work is counted"""
    out: Path = Path("results/lower_bounds")
    """folder to write to"""


class Case(NamedTuple):
    """A problem with what the accelerated method must know, and the accuracy to reach."""

    problem: Quadratic
    weights: Array  # float64 [d], the error is sum(weights (x - x*)^2)
    L_x: float  # of h
    mu_x: float
    mu_g: float
    bound: float  # products before which no method is there; nan where none is known


def support(inner_steps: int, aux_steps: int, sweeps: int = 4, dim: int = 60) -> list[int]:
    """Entries of x above rounding after each sweep of gradient steps from z = v = 0 on the worst case.

    The rate 2 / Lg keeps the newest entries, which are products of rates, far above rounding.
    """
    q = worst_case(dim, dtype=jnp.float64)
    solver = sweep(
        assign(lambda vars: vars._replace(inner=jnp.zeros_like(vars.inner))),
        descend(implicit(q.problem), Vars(inner=optax.sgd(2.0)), steps=inner_steps, fresh=False),
        solve_aux(q.problem, linear_solve.richardson(steps=aux_steps, rate=2.0), warm=False),
        descend(implicit(q.problem), Vars(outer=optax.sgd(1.0))),
    )

    def reach(vars: Vars, data: Levels) -> dict[str, Array]:
        size = jnp.abs(vars.outer)
        return {"support": jnp.where(size > 1e-13 * size.max(), jnp.arange(1, dim + 1), 0).max()}

    go = lambda: run(solver, samplers.full(), q.start, q.data, jax.random.key(0), steps=sweeps, every=1, metrics=reach)  # noqa: E731
    _, history = jax.jit(go)()
    return history["support"][1:].tolist()


def zero_chain() -> pd.DataFrame:
    """Support of x after each sweep, measured and by the formula."""
    rows = []
    for n, m in COUNTS:
        for k, moved in enumerate(support(n, m), 1):
            rows.append({"N": n, "M": m, "sweep": k, "support": moved, "theory": k * (n + m - 1) + 1})
    return pd.DataFrame(rows)


def dense(mu_x: float, mu_g: float) -> Case:
    """The instance with a dense spectrum; the error is the gap of h."""
    q = dense_spectrum(outer_strong_convexity=mu_x, inner_strong_convexity=mu_g, dtype=jnp.float64)
    diagonal = jnp.diagonal(jax.jacobian(q.gradient)(q.start.outer))
    return Case(q, diagonal, float(diagonal.max()), mu_x, mu_g, math.nan)


def worst(mu_x: float, mu_g: float, tolerance: float, dim: int) -> Case:
    """The worst case; the error is the squared distance to x*."""
    q = worst_case(dim, outer_strong_convexity=mu_x, inner_strong_convexity=mu_g, dtype=jnp.float64)
    squares = np.asarray(q.solution.outer) ** 2
    left = 1 - np.cumsum(squares) / squares.sum()  # what is missing if all entries but the first are right
    bound = 1 + float(np.argmax(left <= tolerance))  # n products move at most n entries
    largest = float(jnp.linalg.eigvalsh(jax.jacobian(q.gradient)(q.start.outer))[-1])
    return Case(q, jnp.ones(dim), largest, mu_x, mu_g, bound)


def entries(mu_x: float, mu_g: float, tolerance: float) -> int:
    """Entries of the worst case beyond which what is missing is far below the tolerance."""
    return math.ceil(0.75 * math.log(tolerance) / math.log(worst_case_ratio(mu_x, mu_g)))


def accelerated_steps(case: Case, make: Callable[..., Solver] = accbio) -> Solver:
    """AccBiO with the constants of the case and its default numbers of steps, z and v from 0 in every sweep as in the paper."""
    return make(
        case.problem.problem,
        smoothness=1.0,
        strong_convexity=case.mu_g,
        outer_smoothness=case.L_x,
        outer_strong_convexity=case.mu_x,
        warm=False,
    )


def gradient_steps(case: Case) -> Solver:
    """AID-BiO with steps 1 / L on z, v and x, L / mu of them on z and on v, both started where they were."""
    count = math.ceil(1 / case.mu_g)
    opts = Vars(inner=optax.sgd(1.0), outer=optax.sgd(1 / case.L_x))
    fixed_point = linear_solve.richardson(steps=count, rate=1.0)
    return aid_bio(case.problem.problem, opts, inner_steps=count, linear_solver=fixed_point)


def sweeps_to(solver: Solver, case: Case, tolerance: float, limit: int = 10**6) -> int:
    """Sweeps until the error is at most ``tolerance`` times that of the start; raises if there are more than ``limit``."""
    q, sampler = case.problem, samplers.full()

    @jax.jit
    def go(start: Vars, data: Levels, weights: Array, best: Array) -> tuple[Array, Array]:
        error = lambda x: weights @ (x - best) ** 2  # noqa: E731
        target = tolerance * error(start.outer)
        carry = begin(solver, sampler, start, data, jax.random.key(0))
        going = lambda c: (error(c.state.vars.outer) > target) & (c.state.step < limit)  # noqa: E731
        carry = jax.lax.while_loop(going, lambda c: resume(solver, sampler, c, data, steps=1)[0], carry)
        return carry.state.step, error(carry.state.vars.outer) / target

    steps, left = go(q.start, q.data, case.weights, q.solution.outer)
    if not left <= 1:
        raise RuntimeError(f"the error is still {float(left):.3g} times the tolerance after {int(steps)} sweeps")
    return int(steps)


METHODS: dict[str, Callable[[Case], Solver]] = {
    "accbio": accelerated_steps,
    "accbio_bg": partial(accelerated_steps, make=accbio_bg),
    "aid_bio": gradient_steps,
}


def work(config: Config) -> pd.DataFrame:
    """One row a run: sweeps, oracle calls and calls that reveal an entry of the chain, with the bound on the latter."""
    pairs = {"mu_x": [(mu, 0.3) for mu in config.outer], "mu_g": [(0.05, mu) for mu in config.inner]}
    dim = max(entries(*pair, config.tolerance) for part in pairs.values() for pair in part)  # one shape, compiled once
    cases = [("dense", swept, dense(*pair)) for swept, part in pairs.items() for pair in part]
    cases += [("worst", swept, worst(*pair, config.tolerance, dim)) for swept, part in pairs.items() for pair in part]
    rows = []
    for instance, swept, case in tqdm(cases, unit="case", file=sys.stderr):
        for method, make in METHODS.items():
            if method == "accbio_bg" and (instance, swept) != ("dense", "mu_x"):
                continue
            solver = make(case)
            sweeps = sweeps_to(solver, case, config.tolerance)
            calls = solver.cost.draw
            rows.append(
                {
                    "instance": instance,
                    "swept": swept,
                    "method": method,
                    "mu_x": case.mu_x,
                    "mu_g": case.mu_g,
                    "dim": case.weights.size,
                    "L_x": case.L_x,
                    "sweeps": sweeps,
                    "oracle_calls": sweeps * sum(calls),
                    "products": sweeps * (calls.inner_gradient + calls.hessian_vector),
                    "bound": case.bound,
                }
            )
    return pd.DataFrame(rows)


def slope(x: Any, y: Any) -> float:
    """Of the line through the points, both axes logarithmic."""
    return float(np.polyfit(np.log(np.asarray(x)), np.log(np.asarray(y)), 1)[0])


def claim(name: str, relation: str, theory: float, measured: float, tolerance: float) -> dict[str, Any]:
    """A row of a table of claims ``measured = theory`` (or <=, >=): within the tolerance it holds, within two in part."""
    gap = {"=": abs(measured - theory), "<=": measured - theory, ">=": theory - measured}[relation]
    verdict = "holds" if gap <= tolerance else "holds in part" if gap <= 2 * tolerance else "does not hold"
    words = {"relation": relation, "theory": float(theory), "measured": float(measured), "tolerance": tolerance}
    return {"claim": name, **words, "verdict": verdict}


def claims(chain: pd.DataFrame, runs: pd.DataFrame) -> list[dict[str, Any]]:
    """What the theory says of the two tables, and whether it holds."""
    wrong = float(np.count_nonzero(chain["support"] != chain["theory"]))
    both = runs.query("instance == 'worst'")
    fast = both.query("method == 'accbio'")
    over, ratio = np.asarray(both["products"] / both["bound"]), np.asarray(fast["products"] / fast["bound"])
    rows = [
        claim("zero chain: sweeps k with a support other than k (N + M - 1) + 1", "=", 0, wrong, 0),
        claim("worst case: products over the lower bound, least of all runs", ">=", 1, over.min(), 0),
        claim("worst case, AccBiO: products over the bound, largest over least", "<=", 2, ratio.max() / ratio.min(), 0),
    ]
    part = fast.query("swept == 'mu_g'")
    bound, found = slope(part["mu_g"], part["bound"]), slope(part["mu_g"], part["products"])
    rows += [
        claim("worst case, lower bound: products against mu_g", "=", -1, bound, 0.1),
        claim("worst case, AccBiO: products against mu_g, the upper bound", ">=", -1.5, found, 0),
        claim("worst case, AccBiO: products against mu_g, the lower bound", "<=", bound, found, 0.1),
    ]
    for instance, swept, method in runs[["instance", "swept", "method"]].drop_duplicates().itertuples(index=False):
        part = runs.query("instance == @instance and swept == @swept and method == @method")
        accelerated, x = method != "aid_bio", part[swept]
        if swept == "mu_x":
            theory, tolerance, counted = -0.5 if accelerated else -1.0, 0.05, "sweeps"
        elif instance == "dense":
            theory, tolerance, counted = -1.5 if accelerated else -3.0, 0.15 if accelerated else 0.3, "products"
        else:  # not yet at its asymptotic slope: that of the condition numbers as they are
            sweeps = part["L_x"] ** (0.5 if accelerated else 1.0)
            theory, tolerance, counted = slope(x, sweeps * part["products"] / part["sweeps"]), 0.1, "products"
        name = f"{NAMES[instance]}, {LABELS[method]}: {counted} against {swept}"
        rows.append(claim(name, "=", theory, slope(x, part[counted]), tolerance))
    return rows


NAMES = {"dense": "dense spectrum", "worst": "worst case"}
LABELS = {"accbio": "AccBiO", "accbio_bg": "AccBiO-BG", "aid_bio": "AID-BiO, gradient steps"}
COLORS = {"accbio": "#0072B2", "accbio_bg": "#009E73", "aid_bio": "#D55E00"}


def draw(chain: pd.DataFrame, runs: pd.DataFrame, path: Path) -> None:
    """Support against sweeps, and work against the two strong convexities, with slopes."""
    figure, axes = plt.subplots(2, 2, figsize=(9.5, 7), layout="constrained")
    top, *others = axes.flat
    for color, (n, m) in zip(("#000000", "#0072B2", "#56B4E9", "#D55E00", "#009E73"), COUNTS, strict=True):
        part = chain.query("N == @n and M == @m")
        top.plot(part["sweep"], part["theory"], "-", color=color, linewidth=1)
        top.plot(part["sweep"], part["support"], "x" if (n, m) == (1, 2) else "o", color=color, label=f"N = {n}, M = {m}")
    top.set(xlabel="sweep k", ylabel="entries", title="zero chain: support of x; lines: k (N + M - 1) + 1")
    top.set_xticks(chain["sweep"].unique())
    panels = (
        ("dense", "mu_x", "sweeps", "dense spectrum: sweeps against mu of h"),
        ("dense", "mu_g", "products", "dense spectrum: products against mu of g"),
        ("worst", "mu_g", "products", "worst case: products against mu of g"),
    )
    for axis, (instance, swept, counted, title) in zip(others, panels, strict=True):
        both = runs.query("instance == @instance and swept == @swept")
        for method in both["method"].unique():
            part = both.query("method == @method")
            label = f"{LABELS[method]}: slope {slope(part[swept], part[counted]):.2f}"
            axis.loglog(part[swept], part[counted], "o-", color=COLORS[method], label=label)
        if instance == "worst":
            part = both.query("method == 'accbio'")
            label = f"lower bound: slope {slope(part[swept], part['bound']):.2f}"
            axis.loglog(part[swept], part["bound"], "k--", label=label)
        ticks = both[swept].unique()
        axis.set_xticks(ticks, labels=[f"{tick:g}" for tick in ticks])
        axis.minorticks_off()
        axis.set(xlabel="mu of h" if swept == "mu_x" else "mu of g", ylabel=counted, title=title)
    for axis in axes.flat:
        axis.legend(frameon=False, fontsize=8)
        axis.title.set_fontsize(9)
        axis.grid(visible=True, which="major", alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    for ending in ("png", "pdf"):
        figure.savefig(path.with_suffix(f".{ending}"), dpi=150)
    plt.close(figure)


def record(config: Any, out: Path) -> None:
    """Make the folder, and write what the run depends on."""
    out.mkdir(parents=True, exist_ok=True)
    versions = {m.__name__: m.__version__ for m in (bilevel_jax, jax, optax, np, pd)}
    device = f"{jax.devices()[0].platform}: {jax.devices()[0].device_kind}"
    known = {"settings": dataclasses.asdict(config), "versions": versions, "device": device}
    (out / "config.json").write_text(json.dumps(known, indent=2, default=str) + "\n")


def main(config: Config) -> None:
    """Measure, print and write."""
    jax.config.update("jax_enable_x64", True)
    record(config, config.out)
    chain, runs = zero_chain(), work(config)
    write(config.out, chain=chain, work=runs, claims=pd.DataFrame(claims(chain, runs)))
    draw(chain, runs, config.out / "figure")


def write(out: Path, **tables: pd.DataFrame) -> None:
    """Write and print the tables."""
    for name, table in tables.items():
        table.to_csv(out / f"{name}.csv", index=False)
        print(f"\n{name}\n{table.to_string(index=False, float_format=lambda value: f'{value:.4g}')}")


if __name__ == "__main__":
    main(tyro.cli(Config))
