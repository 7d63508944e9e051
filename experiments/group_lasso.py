"""A penalty for each group of features, chosen on validation rows: MEHA against searches, for the group lasso.

``python -m experiments.group_lasso --out results/group_lasso``

Inner problem: least squares on the training rows plus ``sum_j x_j |z_(j)|_2`` over the groups of z, and with ``--penalty
sparse_group`` plus ``x_last |z|_1``.  Outer problem: least squares on the validation rows, over x >= 0.  Synthetic data:
standard normal rows, true weights that begin with 1, 2, 3, 4, 5 and are 0 otherwise, noise of half the norm of the signal.

Grid search (shared penalties), random search and TPE (a penalty for each group) solve the inner problem, to 1e-6, at every x
that they try, and so does projected descent along the implicit derivative.  MEHA does not: it is judged by its own z, and by
the inner solution at its x.  A gradient call is a gradient in z of the error on 100 rows: a proximal gradient step, or a
product with the Hessian.  Seconds are those of the processor, compilation and measurements excluded.  Float64.
"""

import dataclasses
import json
import math
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optuna
import pandas as pd
import sklearn
import tyro
from matplotlib.ticker import LogLocator
from tqdm import tqdm

import bilevel_jax
from bilevel_jax import Carry, Levels, Problem, Solver, Vars, begin, nonsmooth, resume, samplers, solvers
from bilevel_jax.nonsmooth import Nonsmooth
from bilevel_jax.projections import project, proximal_sgd
from bilevel_jax.types import Array
from experiments import lasso_search as search
from experiments.figures import plt
from experiments.lasso_search import GROUP, TOLERANCE, Solved, Split

Name = Literal["grid", "random", "tpe", "implicit", "meha"]
#: How often MEHA is measured.
POINTS = 50


@dataclasses.dataclass(frozen=True)
class Config:
    """Penalties of the (sparse) group lasso: MEHA against searches."""

    features: tuple[int, ...] = (600,)
    """sizes of z: multiples of 20, the size of a group"""
    penalty: Literal["group", "sparse_group"] = "group"
    """the group lasso alone, or with an l1 term, of which the weight is chosen too"""
    methods: tuple[Name, ...] = ("grid", "random", "tpe", "implicit", "meha")
    """which methods to compare"""
    blocks: int = 1
    """in how many equal parts of z the true weights begin with 1, 2, 3, 4, 5"""
    evaluations: int = 100
    """inner problems that each method but MEHA solves"""
    start: float = 0.5
    """where MEHA and implicit differentiation start: fraction of the least shared penalty that makes z = 0"""
    rate: float = 0.3
    """step size of x of implicit differentiation"""
    updates: int = 2000
    """updates of MEHA, a multiple of 50"""
    alpha: float = 0.3
    """step size of x of MEHA"""
    gamma: float = 10.0
    """parameter of the envelope of MEHA"""
    c_low: float = 10.0
    """penalty c_low (k + 1)^p of MEHA"""
    p: float = 0.25
    """exponent of the penalty of MEHA"""
    seeds: int = 5
    """runs, which differ in their data"""
    first_seed: int = 1
    """seed of the first of them"""
    out: Path = Path("results/group_lasso")
    """folder to write to"""

    def __post_init__(self) -> None:
        for name in ("blocks", "evaluations", "start", "rate", "updates", "alpha", "gamma", "c_low", "seeds"):
            if not getattr(self, name) > 0:
                raise SystemExit(f"--{name.replace('_', '-')}: got {getattr(self, name)}, expected a positive number")
        for name in ("features", "methods"):
            if not getattr(self, name):
                raise SystemExit(f"--{name}: got none, expected at least one")
        for size in self.features:
            if size < GROUP or size % math.lcm(GROUP, self.blocks):
                raise SystemExit(f"--features: got {size}, expected multiples of {GROUP}, the size of a group, and of --blocks")
        if self.updates % POINTS:
            raise SystemExit(f"--updates: got {self.updates}, expected a multiple of {POINTS}")
        if not 0 <= self.p < 0.5:
            raise SystemExit(f"--p: got {self.p}, expected a number in [0, 0.5)")

    @property
    def sparse(self) -> bool:
        """Whether there is an l1 term."""
        return self.penalty == "sparse_group"

    @property
    def fraction(self) -> float:
        """Of each kind of penalty at the start, so that z is not 0 there: at 0 nothing would ever move x."""
        return self.start / (1 + self.sparse)


def meha(term: Nonsmooth, config: Config, smoothness: Levels) -> Solver:
    """Steps of z and of theta by the smoothness of what they descend, given that of the two errors."""
    opts = Vars(
        inner=proximal_sgd(1 / (smoothness.inner + smoothness.outer / config.c_low), term),
        aux=proximal_sgd(1 / (smoothness.inner + 1 / config.gamma), term),
        outer=optax.chain(optax.sgd(config.alpha), project(nonsmooth.box(0.0, jnp.inf))),
    )
    problem = Problem(inner=search.fit, outer=search.fit)
    return solvers.meha(problem, opts, gamma=config.gamma, c_low=config.c_low, p=config.p, nonsmooth=term)


class Programs(NamedTuple):
    """What is compiled once for a size of z."""

    solve: Callable[..., Solved]
    slope: Callable[..., tuple[Array, Array]]
    start: Callable[..., Carry]
    advance: Callable[..., Carry]
    error: Callable[..., Array]


def programs(config: Config, features: int) -> Programs:
    """For a size of z."""
    term = search.penalty(features, config.sparse)

    def start(x: Array, data: Levels, smoothness: Levels) -> Carry:
        vars = Vars(inner=jnp.zeros(features), outer=x)
        return begin(meha(term, config, smoothness), samplers.full(), vars, data, jax.random.key(0))

    def advance(carry: Carry, data: Levels, smoothness: Levels) -> Carry:
        return resume(meha(term, config, smoothness), samplers.full(), carry, data, steps=config.updates // POINTS)[0]

    parts = partial(search.solve, term), partial(search.slope, term), start, advance, search.error
    return Programs(*map(jax.jit, parts))


def timed(function: Callable[..., Any], *args: Any) -> tuple[Any, float]:
    """The result of a call, and the seconds of the processor that it took, which a busy machine does not change much."""
    tick = time.process_time()
    result = jax.block_until_ready(function(*args))
    return result, time.process_time() - tick


Row = dict[str, Any]


def searched(name: Name, run: Programs, split: Split, config: Config, top: Array, seed: int) -> list[Row]:
    """The best solution so far, by its validation error, at every x that a search tries; each solve starts from the last."""
    bound, tolerance = search.smoothness(split.train[0]), TOLERANCE * top[0]
    z = jnp.zeros(split.train[0].shape[1])
    compiled = run.solve(split.train, top, z, bound, tolerance), run.slope(split, z, top)
    jax.block_until_ready(compiled)
    least, count = np.asarray(top), config.evaluations
    proposals = {
        "grid": lambda: search.grid(least, count, config.sparse),
        "random": lambda: search.at_random(least, count, seed),
        "tpe": lambda: search.tpe(least, count, seed),
        "implicit": lambda: search.descent(config.fraction * least, count, config.rate, partial(run.slope, split)),
    }[name]()
    rows, calls, best, test = [], 0, math.inf, math.inf
    found, seconds = timed(next, proposals)
    while found is not None:
        x, spent = found
        solved, more = timed(run.solve, split.train, x, z, bound, tolerance)
        if not solved.residual <= tolerance:
            raise RuntimeError(f"{name}: the inner problem is solved to {float(solved.residual):.2g} only at x = {x}")
        z, calls, value = solved.z, calls + spent + int(solved.calls), float(run.error(solved.z, split.validation))
        seconds += more
        if value < best:
            best, test = value, float(run.error(z, split.test))
        rows.append(row(name, len(rows) + 1, calls, seconds, best, test))
        found, more = timed(step, proposals, (value, z))
        seconds += more
    return rows


def step(proposals: search.Search, told: tuple[float, Array]) -> tuple[np.ndarray, int] | None:
    """The next proposal, None after the last."""
    try:
        return proposals.send(told)
    except StopIteration:
        return None


def trained(run: Programs, split: Split, config: Config, top: Array) -> list[Row]:
    """MEHA, measured at its own z, and at the inner solution for its x, of which the work is then added.

    The latter is found from z = 0, as if x were all that is known: where penalties are 0 there are many inner solutions, and
    the ones near MEHA's z also fit the validation rows.
    """
    data = Levels(split.train, split.validation)
    bounds = Levels(*(search.smoothness(part[0]) for part in data))
    zero, tolerance = jnp.zeros(split.train[0].shape[1]), TOLERANCE * top[0]
    carry, rows, seconds = run.start(config.fraction * top, data, bounds), [], 0.0
    compiled = run.advance(carry, data, bounds), run.solve(split.train, top, zero, bounds.inner, tolerance)
    jax.block_until_ready(compiled)
    for point in range(1, POINTS + 1):
        carry, more = timed(run.advance, carry, data, bounds)
        seconds += more
        updates = point * (config.updates // POINTS)
        own, x = carry.state.vars.inner, carry.state.vars.outer
        solved, more = timed(run.solve, split.train, x, zero, bounds.inner, tolerance)
        exact = jnp.where(solved.residual <= tolerance, solved.z, jnp.nan)  # unsolved is never taken for a solution
        calls = 3 * updates  # of g at theta and at z, and of f at z
        for name, z, extra in (("meha", exact, solved.calls), ("meha, own z", own, 0)):
            errors = (float(run.error(z, part)) for part in (split.validation, split.test))
            rows.append(row(name, updates, calls + int(extra), seconds + more * (name == "meha"), *errors))
    return rows


def row(method: str, step: int, calls: int, seconds: float, validation: float, test: float) -> Row:
    """Of the history."""
    return {
        "method": method,
        "step": step,
        "gradient_calls": calls,
        "seconds": seconds,
        "validation_error": validation,
        "test_error": test,
    }


def compare(config: Config) -> pd.DataFrame:
    """The history of all methods, sizes and seeds."""
    rows: list[Row] = []
    work = [(size, name) for size in config.features for name in config.methods]
    with tqdm(total=len(work) * config.seeds, unit="run", file=sys.stderr) as bar:
        for size in config.features:
            run = programs(config, size)
            for seed in range(config.first_seed, config.first_seed + config.seeds):
                split = search.draw(size, config.blocks, seed)
                top = search.highest(split.train, config.sparse)
                for name in config.methods:
                    bar.set_postfix_str(f"{size} {name}")
                    made = trained(run, split, config, top) if name == "meha" else searched(name, run, split, config, top, seed)
                    rows += [{"features": size, "seed": seed, **line} for line in made]
                    bar.update()
    return pd.DataFrame(rows)


def ends(history: pd.DataFrame) -> pd.DataFrame:
    """The last row of every run, and the work after which its validation error stays within 1 % of that."""
    rows = []
    for _, run in history.groupby(["features", "method", "seed"], sort=False):
        away = np.abs(run["validation_error"] / run["validation_error"].iloc[-1] - 1).to_numpy() > 0.01
        settled = np.flatnonzero(np.r_[True, away])[-1]
        work = {f"{name}_to_1%": run[name].iloc[settled] for name in ("seconds", "gradient_calls")}
        rows.append(run.iloc[-1].drop("step").to_dict() | work)
    return pd.DataFrame(rows)


def summary(history: pd.DataFrame) -> pd.DataFrame:
    """Mean and standard deviation over the seeds of what every run ends with."""
    table = ends(history).drop(columns="seed").groupby(["features", "method"], sort=False).agg(["mean", "std"])
    table.columns = [name if kind == "mean" else f"{name}_std" for name, kind in table.columns]
    return table.reset_index()


COLORS = {
    "grid": "#000000",
    "random": "#999933",
    "tpe": "#E69F00",
    "implicit": "#332288",
    "meha": "#D55E00",
    "meha, own z": "#D55E00",
}
LINES = {"meha": ("-", "meha, inner solution at its x"), "meha, own z": ("--", "meha, own z")}


def draw(config: Config, history: pd.DataFrame) -> None:
    """Validation and test error against seconds and gradient calls, one row of panels a size: means over the seeds."""
    sizes = config.features
    figure, axes = plt.subplots(len(sizes), 4, figsize=(13, 2.9 * len(sizes)), squeeze=False, layout="constrained")
    for line, size in zip(axes, sizes, strict=True):
        panels = [(work, metric) for work in ("seconds", "gradient_calls") for metric in ("validation_error", "test_error")]
        for axis, (work, metric) in zip(line, panels, strict=True):
            means: Any = history[history["features"] == size].groupby(["method", "step"], sort=False)[[work, metric]].mean()
            for name in history["method"].unique():
                style, label = LINES.get(name, ("-", name))
                part = means.loc[name]
                axis.plot(part[work], part[metric], style, color=COLORS[name], label=label, linewidth=1.6)
            axis.set(xscale="log", xlabel=work.replace("_", " "), yscale="log", ylabel=metric.replace("_", " "))
            axis.yaxis.set_major_formatter("{x:g}")
            axis.yaxis.set_minor_locator(LogLocator(subs=(2, 3, 5)))  # of more of them the labels would overlap
            axis.yaxis.set_minor_formatter("{x:g}")
            axis.set_title(f"{size} features")
            axis.title.set_fontsize(9)
            axis.grid(visible=True, which="major", alpha=0.25)
            axis.spines[["top", "right"]].set_visible(False)
    handles, names = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=6, frameon=False)
    title = f"{config.penalty.replace('_', ' ')} lasso, {search.ROWS} rows a set, groups of {GROUP}"
    figure.suptitle(
        f"{title}; best so far by validation error (meha: the current x), mean of {config.seeds} seeds", fontsize=10
    )
    for ending in ("png", "pdf"):
        figure.savefig(config.out / f"figure.{ending}", dpi=110)
    plt.close(figure)


def main(config: Config) -> pd.DataFrame:
    """Run the comparison, write and print it."""
    jax.config.update("jax_enable_x64", True)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    config.out.mkdir(parents=True, exist_ok=True)
    versions = {m.__name__: m.__version__ for m in (bilevel_jax, jax, optax, optuna, sklearn, np, pd)}
    device = f"{jax.devices()[0].platform}: {jax.devices()[0].device_kind}"
    known = {"settings": dataclasses.asdict(config), "versions": versions, "device": device}
    (config.out / "config.json").write_text(json.dumps(known, indent=2, default=str) + "\n")
    history = compare(config)
    table = summary(history)
    history.to_csv(config.out / "history.csv", index=False)
    table.to_csv(config.out / "table.csv", index=False)
    draw(config, history)
    print(table.to_string(index=False, float_format="{:.4g}".format))
    return table


if __name__ == "__main__":
    main(tyro.cli(Config))
