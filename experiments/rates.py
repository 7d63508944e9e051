"""Rates: error against oracle calls of every solver, and the slopes of theory, measured on quadratics with closed forms.

``python -m experiments.rates --out results/rates``

Everything in float64, deterministic given the keys.  Writes config.json, curves.csv (one row a solver, seed and evaluation),
table.csv (measured against theory, with a verdict computed from the numbers), chain.csv and work.csv of
`experiments.lower_bounds`, and figure.png, figure.pdf.
"""

import dataclasses
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pandas as pd
import tyro
from tqdm import tqdm

from bilevel_jax import Levels, Problem, Solver, Vars, begin, linear_solve, resume, samplers, solvers, spent
from bilevel_jax.testing import Quadratic, quadratic
from bilevel_jax.types import Array
from experiments import lower_bounds
from experiments.figures import STYLES, plt
from experiments.lower_bounds import record, write
from experiments.rate_claims import (
    accelerated,
    curvature,
    decay,
    double,
    floors,
    linear,
    single,
    sublinear,
    truncation,
    variance,
    warm_and_cold,
    zeroth_order,
)


@dataclasses.dataclass(frozen=True)
class Config:
    """Error against oracle calls of every solver, and a table of slopes."""

    seeds: int = 8
    """runs of each stochastic solver in the figure, which shows their root mean square"""
    repeats: int = 64
    """runs over which the table averages"""
    out: Path = Path("results/rates")
    """folder to write to"""


class Entry(NamedTuple):
    """A solver of the figure, with step sizes that suit the shipped quadratic (of condition 5, L = 1)."""

    make: Callable[[Problem], Solver]
    updates: int
    full: bool = False  # whether every draw is all the data; otherwise it is one sample of either level
    coin: bool = False  # whether its lanes branch differently under vmap


def entries(q: Quadratic) -> dict[str, dict[str, Entry]]:
    """All solvers, by family."""
    half, third = (decay(0.3, 1 / 2), decay(0.15, 1 / 2)), (decay(0.3, 1 / 3), decay(0.15, 1 / 3))
    # of the sweep for x and the linear solver, of the ten inner steps a sweep for z
    slow = decay(0.3, 1 / 2, 500), decay(0.09, 1 / 2, 50)
    constants: dict[str, Any] = dict(zip(("outer_strong_convexity", "outer_smoothness"), curvature(q), strict=True))
    constants |= {"smoothness": 1.0, "strong_convexity": 0.2}
    exact = 1.0, 0.3
    cg, fixed_point = linear_solve.cg(max_steps=3, rtol=0.0), linear_solve.richardson(steps=5, rate=1.0)
    return {
        "single loop": {
            "soba": Entry(single(solvers.soba, *half), 20000),
            "ma_soba": Entry(single(solvers.ma_soba, *half, theta=decay(0.6, 1 / 2)), 20000),
            "fsla": Entry(single(solvers.fsla, *half), 20000),
            "storm_soba": Entry(single(solvers.storm_soba, *third), 20000),
            "saba": Entry(single(solvers.saba, 0.2, 0.1), 6000),
            "srba": Entry(single(solvers.srba, 0.2, 0.1, period=64), 6000),
            "spaba": Entry(single(solvers.spaba, 0.2, 0.1, probability=1 / 64), 6000, coin=True),
        },
        "double loop, stochastic": {
            "bsa": Entry(double(solvers.bsa, decay(0.3, 1 / 2, 10), decay(0.1, 1 / 2), rate=0.9, terms=20), 4000, coin=True),
            "ttsa": Entry(double(solvers.ttsa, decay(0.3, 2 / 5), decay(0.15, 3 / 5), rate=0.9, terms=20), 10000, coin=True),
            "stocbio": Entry(double(solvers.stocbio, *slow, rate=0.9, terms=20), 4000),
            "amigo": Entry(double(solvers.amigo, *slow, aux_rate=decay(0.3, 1 / 2, 50)), 4000),
            "stable": Entry(double(solvers.stable, *half, strong_convexity=0.1, tau=decay(0.6, 1 / 2)), 4000),
            "sustain": Entry(double(solvers.sustain, *third, rate=0.9, terms=20), 10000, coin=True),
            "mrbo": Entry(double(solvers.mrbo, *third, rate=0.9, terms=20), 10000),
            "vrbo": Entry(double(solvers.vrbo, 0.2, 0.1, rate=0.9, terms=20, period=3, inner_steps=11), 500),
        },
        "deterministic": {
            "aid_cg": Entry(double(solvers.aid_bio, *exact, inner_steps=5, linear_solver=cg), 300, full=True),
            "aid_fp": Entry(double(solvers.aid_bio, *exact, inner_steps=5, linear_solver=fixed_point), 300, full=True),
            "ba": Entry(double(solvers.ba, *exact), 300, full=True),
            "hoag": Entry(double(solvers.hoag, *exact, tolerance=lambda t: 0.1 * 0.9**t), 300, full=True),
            "accbio": Entry(lambda problem: solvers.accbio(problem, **constants), 100, full=True),
            "accbio_bg": Entry(lambda problem: solvers.accbio_bg(problem, **constants), 200, full=True),
            "itd_bio": Entry(double(solvers.itd_bio, *exact, inner_steps=20), 100, full=True),
            "fo_itd_bio": Entry(double(solvers.fo_itd_bio, *exact, inner_steps=20), 100, full=True),
            "pzobo": Entry(double(solvers.pzobo, 1.0, 0.1, inner_steps=20, directions=20, radius=1e-3), 400, full=True),
        },
        "first order, and for many inner solutions": {
            "meha": three(solvers.meha, 0.5, 0.3, 0.2, 2000, gamma=1.0, c_low=100.0, p=0.2),
            "f2sa": three(solvers.f2sa, 0.9, 0.9, 0.1, 400),
            "f2ba": three(solvers.f2ba, 0.9, 0.9, 0.1, 400),
            "f2sa_p": Entry(double(solvers.f2sa_p, 0.9, 0.1, inner_steps=20), 400, full=True),
            "bome": three(solvers.bome, 1.0, 0.02, 0.02, 2000, inner_steps=20),
            "pbgd": three(solvers.pbgd, 1.0, 0.3, 0.003, 4000, multiplier=100.0, inner_steps=20),
            "bvfim": three(solvers.bvfim, 0.5, 0.02, 0.02, 2000),
            "bvfsm": three(solvers.bvfsm, 0.5, 0.02, 0.02, 2000),
            "hjfbio": three(solvers.hjfbio, 0.3, 0.3, 0.1, 2000, radius=50.0),
            "fdehbo": three(solvers.fdehbo, 0.3, 0.3, 0.1, 2000, radius=50.0),
            "sl_bamm": three(solvers.sl_bamm, 0.3, 0.3, 0.1, 2000),
            "bda": Entry(double(solvers.bda, 0.9, 0.1, inner_steps=20), 400, full=True),
            "iaptt": three(solvers.iaptt, 0.9, 0.3, 0.1, 400, inner_steps=20),
        },
    }


def three(make: Callable[..., Solver], inner: float, aux: float, outer: float, updates: int, **own: Any) -> Entry:
    """A solver that steps all three variables, on all the data."""
    opts = Vars(*map(optax.sgd, (inner, aux, outer)))
    return Entry(lambda problem: make(problem, opts, **own), updates, full=True)


MORE_STYLES = {
    "stable": ("#000000", ":"),
    "ba": ("#882255", "-"),
    "fo_itd_bio": ("#44AA99", "-."),
    "accbio": ("#D55E00", "-"),
    "accbio_bg": ("#E69F00", "--"),
    "bvfim": ("#999933", "-"),
    "bvfsm": ("#999933", "--"),
    "hjfbio": ("#0072B2", "-"),
    "fdehbo": ("#0072B2", ":"),
    "sl_bamm": ("#000000", "-"),
    "bda": ("#882255", "-"),
    "iaptt": ("#AA4499", "--"),
}


def trace(entry: Entry, q: Quadratic, seeds: int, rows: int = 50) -> tuple[np.ndarray, np.ndarray]:
    """Oracle calls on single samples, and hypergradient norms over that at the start: ``[rows]`` and ``[seeds, rows]``."""
    solver, samples = entry.make(q.problem), Levels(*(jax.tree.leaves(part)[0].shape[0] for part in q.data))
    sampler, read = (samplers.full(), samples.inner) if entry.full else (samplers.uniform(1), 1)
    full = solver.cost.full
    each = samples.inner * (full.inner_gradient + full.hessian_vector + full.cross) + samples.outer * full.outer_gradient

    def one(key: Array, data: Levels) -> tuple[Array, Array]:
        def chunk(carry: Any, _: None) -> tuple[Any, tuple[Array, Array]]:
            carry = resume(solver, sampler, carry, data, steps=entry.updates // rows)[0]
            state = carry.state
            calls = read * sum(spent(solver, state)) + each * state.step.astype(jnp.float32)
            return carry, (calls, jnp.linalg.norm(q.gradient(state.vars.outer)))

        first = begin(solver, sampler, q.start._replace(aux=None), data, key)  # a second inner iterate starts at z, v at 0
        _, (calls, norms) = jax.lax.scan(chunk, first, None, length=rows)
        return calls, norms / jnp.linalg.norm(q.gradient(q.start.outer))

    def lanes(keys: Array, data: Levels) -> tuple[Array, Array]:
        return jax.lax.map(lambda k: one(k, data), keys) if entry.coin else jax.vmap(one, in_axes=(0, None))(keys, data)

    calls, errors = jax.jit(lanes)(jax.random.split(jax.random.key(1), 1 if entry.full else seeds), q.data)
    return np.asarray(calls[0]), np.asarray(errors)


def curves(q: Quadratic, seeds: int) -> pd.DataFrame:
    """One row a solver, seed and evaluation."""
    rows = []
    every = [(family, name, entry) for family, part in entries(q).items() for name, entry in part.items()]
    for family, name, entry in tqdm(every, unit="solver", file=sys.stderr):
        calls, errors = trace(entry, q, seeds)
        for seed, lane in enumerate(errors):
            rows += [
                {"family": family, "solver": name, "seed": seed, "oracle_calls": c, "error": e}
                for c, e in zip(calls, lane, strict=True)
            ]
    return pd.DataFrame(rows)


def draw(runs: pd.DataFrame, path: Path) -> None:
    """Root mean square of the error against oracle calls, one panel a family, with lines at the rates of theory."""
    families = runs["family"].unique()
    figure, axes = plt.subplots(1, len(families), figsize=(17, 4.8), layout="constrained")
    for axis, family in zip(axes, families, strict=True):
        part = runs.query("family == @family")
        for name in part["solver"].unique():
            log = part.query("solver == @name").groupby("oracle_calls")["error"].agg(lambda e: np.log((e**2).mean()) / 2)
            calls = np.log(np.asarray(log.index))
            near = np.round(calls / 0.15)  # evaluations that would be drawn on top of each other are averaged
            x, y = (np.exp([line[near == n].mean() for n in np.unique(near)]) for line in (calls, np.asarray(log)))
            color, style = (STYLES | MORE_STYLES)[name]
            axis.loglog(x, y, style, color=color, label=name, linewidth=1.6)
        if len(set(part["seed"])) > 1:
            calls = np.array([2e4, 4e5])
            for n, style in ((4, ":"), (3, "--")):
                axis.loglog(calls, 0.005 * (calls / 4e5) ** (-1 / n), style, color="grey", label=f"slope -1/{n}", linewidth=1)
        axis.set(title=family, xlabel="oracle calls (on one sample)")
        axis.legend(frameon=False, fontsize=8, loc="lower left", ncols=2 if len(set(part["solver"])) > 7 else 1)
        axis.grid(visible=True, which="major", alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    axes[1].set_ylim(bottom=4e-4)
    axes[0].set_ylabel("norm of the hypergradient over that at the start")
    for ending in ("png", "pdf"):
        figure.savefig(path.with_suffix(f".{ending}"), dpi=150)
    plt.close(figure)


# ---- the command ------------------------------------------------------------------------------------------------------


def yardstick() -> Quadratic:
    """The shipped quadratic, of condition 5."""
    return quadratic(jax.random.key(2), dtype=jnp.float64)


def table(config: Config, runs: pd.DataFrame, chain: pd.DataFrame, work: pd.DataFrame) -> pd.DataFrame:
    """Measured against theory."""
    q, steep = yardstick(), quadratic(jax.random.key(0), condition=20.0, dtype=jnp.float64)
    gapped = quadratic(jax.random.key(0), inner_dim=5, outer_dim=3, condition=20.0, dtype=jnp.float64)
    noisy = quadratic(jax.random.key(0), noise=0.1, dtype=jnp.float64)
    round_ = quadratic(jax.random.key(0), inner_dim=5, outer_dim=5, condition=2.0, noise=0.15, dtype=jnp.float64)
    rows = truncation(gapped, 1 / 20) + variance(noisy, 1 / 5, 4 * config.repeats) + accelerated(steep, 1 / 20)
    rows += warm_and_cold(q) + floors(q, 1 / 5) + zeroth_order(round_, config.repeats)
    rows += linear(runs) + sublinear(round_, config.repeats)
    return pd.DataFrame(rows + lower_bounds.claims(chain, work))


def main(config: Config) -> None:
    """Measure, print and write."""
    jax.config.update("jax_enable_x64", True)
    record(config, config.out)
    runs = curves(yardstick(), config.seeds)
    draw(runs, config.out / "figure")
    runs.to_csv(config.out / "curves.csv", index=False)
    chain, work = lower_bounds.zero_chain(), lower_bounds.work(lower_bounds.Config())
    write(config.out, chain=chain, work=work, table=table(config, runs, chain, work))


if __name__ == "__main__":
    main(tyro.cli(Config))
