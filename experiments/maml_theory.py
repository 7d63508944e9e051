"""Theory of multi-step MAML and of ANIL, measured: closed forms, the bias of FOMAML, smoothness, and the two geometries.

Writes config.json, bias.csv, smoothness.csv, geometry.csv (one row an evaluation), equal_updates.csv, equal_calls.csv,
claims.csv and figure.png, figure.pdf.
"""

import dataclasses
import sys
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pandas as pd
import tyro
from matplotlib.ticker import LogLocator
from tqdm import tqdm

from bilevel_jax import Batch, Levels, Problem, Vars, run, samplers, solvers, tasks
from bilevel_jax.types import Array, PyTree
from experiments.anil_geometry import GEOMETRIES, anil_curves, at_equal, last_common
from experiments.figures import plt
from experiments.lower_bounds import claim, record, write
from experiments.rate_claims import decline

#: Smoothness of the cosines, and also the Lipschitz constant of their second derivative.
SMOOTHNESS = 1.0


@dataclasses.dataclass(frozen=True)
class Config:
    """Closed forms, bias, smoothness and geometries of meta-learning."""

    bias_rates: tuple[float, ...] = (1.0, 0.3, 0.1, 0.03, 0.01, 0.003, 0.001)
    """inner rates at which FOMAML is run to its end, with five inner steps"""
    smoothness_rate: float = 0.3
    """inner rate, in units of 1 / L, that does not fall with the number of inner steps"""
    smoothness_steps: tuple[int, ...] = (1, 2, 3, 5, 8, 12, 16)
    """inner steps at which the smoothness of the meta-objective is measured"""
    steps: tuple[int, ...] = (1, 3, 5, 10, 20)
    """inner steps of ANIL"""
    updates: int = 400
    """of ANIL, a multiple of 5"""
    seeds: int = 5
    """draws of tasks and starts, for ANIL"""
    out: Path = Path("results/maml_theory")
    """folder to write to"""


# ---- quadratics -------------------------------------------------------------------------------------------------------


def quadratic(z: Array, x: PyTree, data: dict[str, Array]) -> Array:
    """``(z - c)' A (z - c) / 2``, one task."""
    del x
    return 0.5 * (z - data["c"]) @ data["A"] @ (z - data["c"])


def draw_quadratics(count: int = 20, dim: int = 10, seed: int = 0) -> dict[str, Array]:
    """Tasks with eigenvalues from 0.1 to 1 in bases of their own, and standard normal optima."""
    rng = np.random.default_rng(seed)
    bases = np.linalg.qr(rng.normal(size=(count, dim, dim)))[0]
    A = np.einsum("tij,tj,tkj->tik", bases, rng.uniform(0.1, 1, (count, dim)), bases)
    return {"A": jnp.asarray((A + A.transpose(0, 2, 1)) / 2), "c": jnp.asarray(rng.normal(size=(count, dim)))}


class Closed(NamedTuple):
    """``mean H_i (x - c_i)`` with H_i = (I - a A_i)^2N A_i, the gradient of MAML; of FOMAML with the power N."""

    hessians: np.ndarray  # [tasks, dim, dim]
    centres: np.ndarray  # [tasks, dim]

    def gradient(self, x: Any) -> np.ndarray:
        return np.einsum("tij,tj->i", self.hessians, np.asarray(x) - self.centres) / len(self.centres)

    def zero(self) -> np.ndarray:
        return np.linalg.solve(self.hessians.sum(0), np.einsum("tij,tj->i", self.hessians, self.centres))

    def largest(self) -> float:
        """Eigenvalue of the mean."""
        return float(np.linalg.norm(self.hessians.mean(0), 2))


def closed(data: dict[str, Array], rate: float, steps: int, *, first_order: bool) -> Closed:
    """By powers of the matrices."""
    A, c = np.asarray(data["A"]), np.asarray(data["c"])
    power = np.linalg.matrix_power(np.eye(A.shape[-1]) - rate * A, steps if first_order else 2 * steps)
    return Closed(power @ A, c)


def end(data: dict[str, Array], rate: float, steps: int, *, first_order: bool, updates: int = 1000) -> tuple[Array, Array]:
    """Where MAML or FOMAML is after many updates with rate 1 / L, and how far the last one moved it."""
    outer = 1 / closed(data, rate, steps, first_order=first_order).largest()
    opts = Vars(inner=optax.sgd(rate), outer=optax.sgd(outer))
    solver = solvers.maml(Problem(quadratic, quadratic), opts, inner_steps=steps, first_order=first_order, loop="vmap")
    levels, start = Levels(data, data), Vars(outer=jnp.zeros(data["c"].shape[1]))

    @jax.jit
    def go() -> tuple[Array, Array]:
        state = run(solver, samplers.full(), start, levels, jax.random.key(0), steps=updates)[0].state
        batch = Batch(*jax.tree.map(lambda leaf: leaf[None], (data, data)))
        return state.vars.outer, jnp.linalg.norm(solver.update(state, batch).vars.outer - state.vars.outer)

    return go()


def bias(rates: tuple[float, ...], steps: int = 5) -> pd.DataFrame:
    """Gradient norm and distance to the optimum where MAML and FOMAML end, beside the closed form."""
    data, rows = draw_quadratics(), []
    for rate in rates:
        exact = closed(data, rate, steps, first_order=False)
        for first_order in (False, True):
            x, moved = end(data, rate, steps, first_order=first_order)
            theory = closed(data, rate, steps, first_order=first_order).zero()
            rows.append(
                {
                    "method": "fomaml" if first_order else "maml",
                    "rate": rate,
                    "gradient_norm": float(np.linalg.norm(exact.gradient(x))),
                    "closed_form": float(np.linalg.norm(exact.gradient(theory))),
                    "distance_to_optimum": float(np.linalg.norm(x - exact.zero())),
                    "distance_to_closed_form": float(np.linalg.norm(x - theory)),
                    "last_move": float(moved),
                }
            )
    return pd.DataFrame(rows)


def gradient_error(rate: float = 0.3, steps: int = 5) -> float:
    """Of one step of MAML, against the closed form."""
    data = draw_quadratics()
    x = jnp.asarray(np.random.default_rng(1).normal(size=data["c"].shape[1]))
    solver = solvers.maml(Problem(quadratic, quadratic), Vars(inner=optax.sgd(rate), outer=optax.sgd(1.0)), inner_steps=steps)
    batch = Batch(*jax.tree.map(lambda leaf: leaf[None], (data, data)))
    moved = x - solver.update(solver.init(Vars(outer=x), batch), batch).vars.outer
    return float(np.abs(moved - closed(data, rate, steps, first_order=False).gradient(x)).max())


# ---- smoothness -------------------------------------------------------------------------------------------------------


def cosine(z: Array, x: PyTree, phase: Array) -> Array:
    """``-cos(z - c)``: its second derivative goes from -L to L, with L = 1."""
    del x
    return -jnp.cos(z - phase)


def growth_constant(rate: float, steps: int) -> float:
    """C_L of the paper's bound ``(1 + a L)^2N L + C_L |grad l|``, with rho = L = 1."""
    more = 1 + rate * SMOOTHNESS
    return (more ** (steps - 1) * rate * SMOOTHNESS + more**steps * (more ** (steps - 1) - 1)) * more**steps


def smoothness(fixed: float, counts: tuple[int, ...]) -> pd.DataFrame:
    """Largest second derivative of the meta-objective of one task, over a grid of x, beside the bound on it.

    The grid has the maximum of the loss, where every inner step multiplies a displacement by 1 + a L.
    """
    grid, rows = jnp.pi * jnp.linspace(-1, 1, 2001), []
    for steps in counts:
        for name, rate in (("fixed", fixed / SMOOTHNESS), ("1 / (8 N L)", 1 / (8 * steps * SMOOTHNESS))):
            adapt = tasks.through_steps(Problem(cosine, cosine), optax.sgd(rate), steps, start=lambda vars: vars.outer)

            def gradient(x: Array, adapt: tasks.Adaptation = adapt) -> Array:
                return adapt.at(Vars(outer=x), Batch(jnp.zeros(()), jnp.zeros(()))).gradient

            second = np.abs(jax.jit(jax.vmap(jax.grad(gradient)))(grid))
            factor = (1 + rate * SMOOTHNESS) ** (2 * steps)
            bound = factor * SMOOTHNESS + growth_constant(rate, steps) * np.abs(np.sin(grid))
            rows.append(
                {
                    "rate_rule": name,
                    "N": steps,
                    "rate": rate,
                    "at_the_maximum": second[0],
                    "largest": second.max(),
                    "factor": factor,
                    "largest_over_bound": (second / bound).max(),
                }
            )
    return pd.DataFrame(rows)


def geometry(config: Config) -> pd.DataFrame:
    """The curves of all."""
    cases = [(name, steps) for name in GEOMETRIES for steps in config.steps]
    curves = [anil_curves(*case, config.updates, config.seeds) for case in tqdm(cases, unit="curve", file=sys.stderr)]
    return pd.concat(curves, ignore_index=True)


# ---- what it comes to -------------------------------------------------------------------------------------------------


def largest(table: pd.DataFrame, column: str) -> float:
    return float(table[column].to_numpy().max())


def claims(error_of_gradient: float, ends: pd.DataFrame, smooth: pd.DataFrame, curves: pd.DataFrame) -> list[dict[str, Any]]:
    """What the theory says of the tables, and whether it holds."""
    maml, biased = (ends.query("method == @name") for name in ("maml", "fomaml"))
    small = biased.nsmallest(2, "rate")
    order = np.diff(np.log(small["gradient_norm"])) / np.diff(np.log(small["rate"]))
    rows = [
        claim("MAML: gradient against the closed form, largest error", "=", 0, error_of_gradient, 1e-10),
        claim("MAML: distance of its end to the closed form, largest", "=", 0, largest(maml, "distance_to_closed_form"), 1e-10),
        claim(
            "FOMAML: distance of its end to the closed form, largest", "=", 0, largest(biased, "distance_to_closed_form"), 1e-10
        ),
        claim("FOMAML: order of its bias in the rate, at the smallest two", "=", 1, float(order[0]), 0.1),
        claim("smoothness over the paper's bound, largest", "<=", 1, largest(smooth, "largest_over_bound"), 1e-9),
    ]
    fixed, falling = (smooth.query("rate_rule == @name") for name in ("fixed", "1 / (8 N L)"))
    theory = 2 * np.log1p(fixed["rate"].iloc[0] * SMOOTHNESS)
    rows += [
        claim("smoothness at a fixed rate: log against N", "=", theory, decline(fixed["N"], fixed["largest"]), 0.05 * theory),
        claim("smoothness at the rate 1 / (8 N L), largest of all N", "<=", np.exp(0.25), largest(falling, "largest"), 1e-9),
    ]
    for column in ("step", "calls"):
        for name, losses in at_equal(curves, column).items():
            relation = "<=" if name == "strongly convex" else ">="
            what = "updates" if column == "step" else "oracle calls"
            ratio = losses.iloc[-1] / losses.iloc[0]
            rows.append(claim(f"ANIL, {name}: loss at equal {what}, most steps over fewest", relation, 1, ratio, 0))
    return rows


def draw(ends: pd.DataFrame, smooth: pd.DataFrame, curves: pd.DataFrame, path: Path) -> None:
    """Bias against the inner rate, smoothness against N, and the curves of ANIL against updates and calls."""
    figure, axes = plt.subplots(2, 4, figsize=(15, 6.6), layout="constrained")
    biased = ends.query("method == 'fomaml'")
    axes[0, 0].loglog(biased["rate"], biased["closed_form"], "-", color="#0072B2", label="closed form")
    axes[0, 0].loglog(biased["rate"], biased["gradient_norm"], "o", color="#D55E00", label="where FOMAML ends")
    axes[0, 0].set(xlabel="inner rate", ylabel="gradient norm", title="quadratics: bias of FOMAML, N = 5")
    for (name, part), color in zip(smooth.groupby("rate_rule", sort=False), ("#D55E00", "#0072B2"), strict=True):
        axes[1, 0].semilogy(part["N"], part["factor"], "-", color=color, label=f"(1 + a L)^2N, rate {name}")
        axes[1, 0].semilogy(part["N"], part["largest"], "o", color=color, label="measured")
    axes[1, 0].set(xlabel="inner steps N", ylabel="largest second derivative", title="cosines: smoothness over L")
    colors = ("#000000", "#0072B2", "#009E73", "#E69F00", "#D55E00", "#CC79A7")
    for column, (name, part) in enumerate(curves.groupby("geometry", sort=False), 1):
        for row, (along, label) in enumerate((("step", "updates"), ("calls", "oracle calls a task"))):
            axis = axes[row, column]
            for color, (steps, one) in zip(colors, part.groupby("N"), strict=False):
                axis.semilogy(one[along], one["loss"], color=color, label=f"N = {steps}")
            axis.set(xlabel=label, ylabel="query loss", title=f"ANIL, {name}")
            if along == "calls":
                common = last_common(part, along)
                axis.set(xlim=(0, common), ylim=(0.9 * part.query(f"{along} <= @common")["loss"].min(), 1))
            axis.yaxis.set_major_formatter("{x:.3g}")
            axis.yaxis.set_minor_locator(LogLocator(subs=(2, 5)))
            axis.yaxis.set_minor_formatter("{x:.2g}")
    for axis in axes.flat:
        axis.legend(frameon=False, fontsize=8)
        axis.title.set_fontsize(9)
        axis.grid(visible=True, which="major", alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    for ending in ("png", "pdf"):
        figure.savefig(path.with_suffix(f".{ending}"), dpi=150)
    plt.close(figure)


def check(config: Config) -> None:
    """Refuse what cannot be run."""
    for name in ("bias_rates", "smoothness_steps", "steps"):
        values = getattr(config, name)
        if len(set(values)) < 2 or not min(values) > 0:
            raise SystemExit(f"--{name.replace('_', '-')}: got {values}, expected at least two different positive numbers")
    if max(config.bias_rates) > 1:
        raise SystemExit(f"--bias-rates: got {max(config.bias_rates)}, expected at most 1 / L = 1")
    if config.updates < 5 or config.updates % 5:
        raise SystemExit(f"--updates: got {config.updates}, expected a positive multiple of 5")
    if config.seeds < 1:
        raise SystemExit(f"--seeds: got {config.seeds}, expected at least 1")
    if not config.smoothness_rate > 0:
        raise SystemExit(f"--smoothness-rate: got {config.smoothness_rate}, expected a positive number")


def main(config: Config) -> None:
    """Measure, print and write."""
    check(config)
    jax.config.update("jax_enable_x64", True)
    record(config, config.out)
    ends, smooth = bias(config.bias_rates), smoothness(config.smoothness_rate, config.smoothness_steps)
    curves = geometry(config)
    curves.to_csv(config.out / "geometry.csv", index=False)
    equal = {column: at_equal(curves, column).reset_index() for column in ("step", "calls")}
    found = pd.DataFrame(claims(gradient_error(), ends, smooth, curves))
    write(config.out, bias=ends, smoothness=smooth, equal_updates=equal["step"], equal_calls=equal["calls"], claims=found)
    draw(ends, smooth, curves, config.out / "figure")


if __name__ == "__main__":
    main(tyro.cli(Config))
