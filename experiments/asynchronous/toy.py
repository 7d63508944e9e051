"""A quadratic whose solution is known: what ADBO's cuts, their number and the start of their multipliers come to.

Six workers, variables of 3 numbers, A_i and B_i standard normal::

    f_i = 1/2 |inner - A_i|^2        g_i = 1/2 |inner - outer - B_i|^2

so that z*(x) = x + mean(B), the gradient of h is x - x* with x* = mean(A) - mean(B) (for the mean of the f_i), and z*(x*) =
mean(A).  Everything starts at 0.
"""

import itertools
import sys
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
from tqdm import tqdm

from bilevel_jax import Levels, Problem, Vars, samplers
from bilevel_jax.distributed import simulate
from bilevel_jax.distributed.adbo import Adbo, Rates, adbo
from bilevel_jax.types import Array
from experiments.figures import plt
from experiments.logistic import in_float64

WORKERS, QUORUM, STALENESS, DIM, STEPS = 6, 3, 8, 3, 3000
RATES = Rates(0.02, 0.02, 0.02, 0.02, 0.1, 0.05, 0.3, 0.3 / WORKERS, 0.3)
PROBLEM = Problem(
    inner=lambda inner, outer, b: 0.5 * jnp.sum((inner - outer - b) ** 2),
    outer=lambda inner, outer, a: 0.5 * jnp.sum((inner - a) ** 2),
)


class Setting(NamedTuple):
    """How cuts are made."""

    estimate_rounds: int
    cut_period: int
    warm_start: bool


SETTINGS = tuple(itertools.starmap(Setting, itertools.product((1, 5), (10, 50), (False, True))))


def method(setting: Setting, steps: int = STEPS) -> Adbo:
    """ADBO with room for all cuts."""
    zeros = jnp.zeros(DIM)
    return adbo(
        PROBLEM,
        Vars(zeros, None, zeros),
        RATES,
        n_workers=WORKERS,
        max_cuts=steps // setting.cut_period,
        cut_damping=0.04,
        consensus_damping=0.002,
        **setting._asdict(),
    )


def data(seed: int) -> Levels:
    """B_i and A_i of a seed, float64 ``[N, dim]``."""
    B, A = np.random.default_rng(seed).normal(size=(2, WORKERS, DIM))
    return Levels(jnp.asarray(B), jnp.asarray(A))


def errors(vars: Vars, data: Levels) -> dict[str, Array]:
    """The norm of the hypergradient, |x - x*|, and the distance of the inner variable to z*(x*)."""
    A, B = data.outer.mean(0), data.inner.mean(0)
    return {"hypergradient": jnp.linalg.norm(vars.outer - (A - B)), "inner_error": jnp.linalg.norm(vars.inner - A)}


def trace(setting: Setting, seeds: int, steps: int = STEPS) -> pd.DataFrame:
    """The history of a setting, a row a seed and period."""
    parts = []
    with in_float64():
        made, machines = method(setting, steps), simulate.Cluster(simulate.log_normal(0.03))
        go = jax.jit(lambda plan, data, key: simulate.simulate(made, samplers.full(), plan, data, key, metrics=errors)[1])
        for seed in range(seeds):
            plan = simulate.schedule(machines, made, steps=steps, quorum=QUORUM, max_staleness=STALENESS, seed=seed)
            history = jax.device_get(go(plan, data(seed), jax.random.key(seed)))
            parts.append(pd.DataFrame(history).assign(seed=seed))
    return pd.concat(parts).assign(**setting._asdict())


def main(out: Path, seeds: int) -> pd.DataFrame:
    """Every setting over the seeds: history.csv, table.csv and a figure."""
    history = pd.concat([trace(setting, seeds) for setting in tqdm(SETTINGS, unit="setting", file=sys.stderr)])
    history.to_csv(out / "history.csv", index=False)
    keys = list(Setting._fields)
    start = history.groupby([*keys, "seed"]).first()
    ends = history.groupby([*keys, "seed"]).last()
    table = ends[["hypergradient", "inner_error", "outer_apart", "inner_apart", "inner_gap", "made", "cuts"]]
    table = table.assign(of_start=ends["hypergradient"] / start["hypergradient"]).groupby(keys).agg(["median", "min", "max"])
    table.to_csv(out / "table.csv")
    print(table.xs("median", axis=1, level=1).to_string(float_format="{:.3g}".format))
    draw(history, out / "figure")
    print(f"figure: {out / 'figure.png'}\nrows: {out / 'history.csv'}")
    return history


def draw(history: pd.DataFrame, path: Path) -> None:
    """Hypergradient and disagreement against iterations."""
    labels = {"hypergradient": "|grad h| = |x - x*|", "inner_apart": "largest |inner_i - consensus|"}
    labels |= {"outer_apart": "largest |outer_i - consensus|"}
    figure, axes = plt.subplots(1, 3, figsize=(13, 4.4), layout="constrained")
    for axis, (column, label) in zip(axes, labels.items(), strict=True):
        for color, (key, part) in zip(plt.cm.Paired(range(8)), history.groupby(list(Setting._fields)), strict=True):  # type: ignore[attr-defined]
            K, period, warm = key  # type: ignore[misc]
            groups = part[part["step"] > 0].groupby("step")[column]
            name = f"{K} round{'s' * (K > 1)}, every {period}, multipliers {'kept' if warm else 'from 0'}"
            axis.plot(groups.median().index, groups.median(), "-" if warm else "--", color=color, label=name, linewidth=1.5)
        axis.set(yscale="log", xlabel="iterations of the master", ylabel=label)
        axis.grid(visible=True, which="major", alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
    figure.suptitle(
        f"ADBO on a quadratic with a known solution, simulated; medians over {history['seed'].nunique()} seeds", fontsize=10
    )
    for ending in ("png", "pdf"):
        figure.savefig(path.with_suffix(f".{ending}"), dpi=150)
    plt.close(figure)
