"""Draws the pictures of the documentation, from computations with the library: ``python docs/draw.py``."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import optax
from matplotlib.patches import FancyBboxPatch

from bilevel_jax import Batch, Levels, Problem, Vars, hypergradient, run, samplers, solvers
from bilevel_jax.hypergrad import implicit

jax.config.update("jax_enable_x64", True)
plt.rcParams.update(
    {
        "svg.fonttype": "path",
        "svg.hashsalt": "docs",
        "font.size": 9,
        "axes.titlesize": 9.5,
        "axes.spines.top": False,
        "axes.spines.right": False,
    }
)
PICTURES = Path(__file__).parent / "pictures"
BLUE, RED, GREEN, ORANGE, GREY = "#0072B2", "#D55E00", "#009E73", "#E69F00", "#777777"  # told apart by all


def save(figure: Any, name: str) -> None:
    PICTURES.mkdir(exist_ok=True)
    figure.savefig(PICTURES / f"{name}.svg", facecolor="white", metadata={"Date": None})
    plt.close(figure)


def rows(key: Any, count: int) -> tuple[Any, Any]:
    """Points on a line, and labels that follow their sign most of the time."""
    first, second = jax.random.split(key)
    points = jax.random.normal(first, (count,))
    return points, jnp.where(jax.random.uniform(second, (count,)) < jax.nn.sigmoid(2.0 * points + 0.7), 1.0, -1.0)


def solved(problem: Problem, data: Levels, grid: Any, steps: int = 60) -> Any:
    """z*(x) at every x of a grid, by Newton's method on the one inner variable."""

    def g(z: Any, x: Any) -> Any:
        return problem.inner(z, x, data.inner).mean()

    def one(x: Any) -> Any:
        step = lambda _, z: z - jnp.clip(jax.grad(g)(z, x) / jax.hessian(g)(z, x), -0.5, 0.5)  # noqa: E731
        return jax.lax.fori_loop(0, steps, step, jnp.zeros(()))

    return jax.jit(jax.vmap(one))(grid)


def penalty() -> tuple[Problem, Levels]:
    """One weight z of a logistic regression, and its penalty exp(x), chosen on held-out rows."""

    def fit(z: Any, batch: Any) -> Any:
        points, labels = batch
        return jax.nn.softplus(-labels * points * z)

    data = Levels(rows(jax.random.key(4), 12), rows(jax.random.key(5), 40))
    return Problem(lambda z, x, d: fit(z, d) + 0.5 * jnp.exp(x) * z**2, lambda z, x, d: fit(z, d)), data


def waves() -> tuple[Problem, Levels]:
    """``z*(x) = sin 2x``, and an outer loss in which both variables appear."""
    nothing = jnp.zeros(())
    return Problem(
        lambda z, x, _: 0.5 * (z - jnp.sin(2 * x)) ** 2, lambda z, x, _: 0.5 * (z + 1) ** 2 + 0.5 * (x - 0.5) ** 2
    ), Levels(nothing, nothing)


def landscape() -> None:
    """Inner curves, the curve of their minima, and the outer loss along it."""
    problem, data = penalty()
    x, z = jnp.linspace(-6, 2, 161), jnp.linspace(-0.5, 5, 111)
    best = solved(problem, data, x)
    g = jax.vmap(lambda x: jax.vmap(lambda z: problem.inner(z, x, data.inner).mean())(z))(x)
    h = jax.vmap(lambda z, x: problem.outer(z, x, data.outer).mean())(best, x)
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(9.6, 3.0), layout="constrained")
    for at, color in zip((20, 60, 100, 130), (BLUE, GREEN, ORANGE, RED), strict=True):
        left.plot(z, g[at], color=color, label=f"x = {float(x[at]):.3g}")
        for axis, point in (
            (left, (best[at], problem.inner(best[at], x[at], data.inner).mean())),
            (middle, (x[at], best[at])),
            (right, (x[at], h[at])),
        ):
            axis.plot(*point, "o", color=color, zorder=3)
    left.set(xlabel="z", ylabel="g(z, x)", title="the inner problem: g(·, x) at four x", ylim=(0.3, 1.7))
    left.legend(frameon=False, loc="upper right")
    above = g - g.min(1, keepdims=True)
    middle.contour(
        x, z, jnp.log10(above + 1e-6).T, levels=jnp.linspace(-3, 0.5, 8), colors=GREY, linewidths=0.6, linestyles="-"
    )
    middle.plot(x, best, color="black", linewidth=2)
    middle.set(xlabel="x", ylabel="z", title="z*(x), and how far g is above it", ylim=(-0.5, 5))
    right.plot(x, h, color="black", linewidth=2)
    low = int(h.argmin())
    right.plot(x[low], h[low], "*", color="black", markersize=12)
    right.set(xlabel="x", ylabel="h(x) = f(z*(x), x)", title="the outer problem: f along that curve")
    save(figure, "landscape")


def derivatives() -> None:
    """The hypergradient, and the partial derivative that it is mistaken for."""
    problem, data = waves()
    x = jnp.linspace(-1.5, 1.5, 151)
    z = solved(problem, data, x)
    batch = Batch(*data)
    h, slope, _ = jax.vmap(lambda z, x: hypergradient(problem, implicit())(z, x, batch))(z, x)
    partial_slope = jax.vmap(lambda z, x: jax.grad(lambda x: problem.outer(z, x, data.outer).mean())(x))(z, x)
    figure, (left, right) = plt.subplots(1, 2, figsize=(8.4, 3.0), layout="constrained")
    left.plot(x, h, color="black", linewidth=2, label="h(x) = f(z*(x), x)")
    right.plot(x, slope, color="black", linewidth=2, label="dh/dx, the hypergradient")
    right.plot(x, partial_slope, color=RED, label="d_x f, the partial derivative")
    right.plot(x, slope - partial_slope, color=BLUE, linestyle="--", label="d2_xz g v, the way through z*(x)")
    right.axhline(0, color=GREY, linewidth=0.8)
    for values, color, label in ((slope, "black", "where dh/dx = 0"), (partial_slope, RED, "where d_x f = 0")):
        at = x[1:][(values[:-1] < 0) & (values[1:] >= 0)][0]  # from falling to rising
        right.plot(at, 0, "o", color=color, zorder=3)
        left.plot(at, jnp.interp(at, x, h), "o", color=color, zorder=3, label=label)
    left.set(xlabel="x", title="one outer loss, two stopping points")
    right.set(xlabel="x", title="the slope of h, and its two parts")
    for axis in (left, right):
        axis.legend(frameon=False)
    save(figure, "derivatives")


def families() -> None:
    """One problem, three ways to move x: paths, and error against oracle calls."""
    problem, data = penalty()
    grid = jnp.linspace(-6, 2, 8001)
    curve = solved(problem, data, grid)
    outer = jax.vmap(lambda z: problem.outer(z, 0.0, data.outer).mean())(curve)
    best = grid[outer.argmin()]
    sgd = lambda **rates: Vars(**{name: optax.sgd(rate) for name, rate in rates.items()})  # noqa: E731
    methods = {
        "implicit: soba": (solvers.soba(problem, sgd(inner=0.6, aux=0.6, outer=3.0)), BLUE, "-"),
        "unrolled: itd_bio, 5 steps": (solvers.itd_bio(problem, sgd(inner=0.6, outer=3.0), inner_steps=5), GREEN, "-"),
        "value function: f2sa_p": (
            solvers.f2sa_p(problem, sgd(inner=0.6, outer=3.0), inner_steps=5, multiplier=20.0),
            RED,
            "-",
        ),
    }
    figure, (left, right) = plt.subplots(1, 2, figsize=(8.4, 3.2), layout="constrained")
    left.plot(grid, curve, color="black", linewidth=1, label="z*(x)")
    for name, (solver, color, style) in methods.items():
        metrics = lambda vars, data: {"x": vars.outer, "z": vars.inner}  # noqa: E731
        go = jax.jit(partial(run, solver, samplers.full(), steps=800, every=1, metrics=metrics))
        _, history = go(Vars(jnp.ones(()), None, jnp.zeros(())), data, jax.random.key(0))
        calls = history["step"] * sum(solver.cost.draw)
        left.plot(history["x"], history["z"], style, color=color, label=name)
        right.plot(calls, jnp.abs(history["x"] - best), style, color=color, label=name)
    left.plot(best, jnp.interp(best, grid, curve), "*", color="black", markersize=12)
    left.set(xlabel="x", ylabel="z", title="paths from (x, z) = (0, 1)", xlim=(-4.5, 0.3), ylim=(-0.1, 2.6))
    right.set(xlabel="oracle calls", ylabel="|x - x*|", title="distance to the solution", yscale="log", xlim=(0, 3200))
    left.legend(frameon=False)
    right.legend(frameon=False)
    save(figure, "families")


def box(axis: Any, left: float, bottom: float, width: float, height: float, text: str, color: str = "white") -> None:
    style = "round,pad=0,rounding_size=0.08"
    axis.add_patch(FancyBboxPatch((left, bottom), width, height, boxstyle=style, facecolor=color, edgecolor="#444444"))
    axis.text(left + width / 2, bottom + height / 2, text, ha="center", va="center", fontsize=8, linespacing=1.4)


def arrow(axis: Any, start: tuple[float, float], end: tuple[float, float]) -> None:
    axis.annotate("", end, start, arrowprops={"arrowstyle": "-|>", "color": "#444444", "shrinkA": 0, "shrinkB": 0})


def flow() -> None:
    """How batches flow through an update."""
    figure, axis = plt.subplots(figsize=(9.6, 5.6), layout="constrained")
    axis.set(xlim=(-0.05, 12.05), ylim=(0, 7.1))
    axis.axis("off")
    data, state, code = "#DCEBF7", "#F7E8D3", "#E3F1EA"
    note = partial(axis.text, fontsize=8, color="#333333", ha="center", va="center", linespacing=1.4)

    box(axis, 0, 6.2, 2.1, 0.8, "data: Levels\ninner, outer", data)
    box(axis, 0, 5.2, 2.1, 0.7, "key, number of the draw", data)
    box(axis, 2.9, 5.5, 2.3, 1.2, "sampler\nplan(...) makes choices\ngather(...) reads rows", code)
    arrow(axis, (2.1, 6.6), (2.9, 6.3))
    arrow(axis, (2.1, 5.55), (2.9, 5.8))
    for shift in (0.3, 0.15, 0.0):
        text = (
            ""
            if shift
            else "batches: Batch, leaves [draws, ...]\ninner, outer, key, slot, weight\n(full: all the data, not stacked)"
        )
        box(axis, 6.0 + shift, 5.4 + shift, 3.6, 1.2, text, data)
    arrow(axis, (5.2, 6.1), (6.0, 6.1))

    axis.add_patch(
        FancyBboxPatch(
            (2.3, 3.25), 7.4, 1.3, boxstyle="round,pad=0,rounding_size=0.08", facecolor="#FAFAFA", edgecolor="#999999"
        )
    )
    note(6.0, 4.35, "solver.update(state, batches) = sweep(stage, stage, ...): each at the variables that the last one left")
    box(axis, 0, 3.3, 1.8, 1.2, "state: BilevelState\nstep\nvars\nstages", state)
    for place, text in ((2.7, "stage 1"), (5.3, "stage 2"), (7.9, "stage 3")):
        box(axis, place, 3.4, 1.4, 0.7, text, code)
    box(axis, 10.2, 3.3, 1.8, 1.2, "BilevelState\nstep + 1\nvars\nstages", state)
    for start, end in ((1.8, 2.7), (4.1, 5.3), (6.7, 7.9), (9.3, 10.2)):
        arrow(axis, (start, 3.75), (end, 3.75))
    for middle in (4.7, 7.3):
        note(middle, 3.95, "vars")
    arrow(axis, (7.5, 5.4), (7.5, 4.55))
    note(8.75, 4.95, "each stage takes its own draws")

    for start, end in (((2.7, 3.4), (0.1, 2.62)), ((4.1, 3.4), (11.9, 2.62))):
        axis.plot(*zip(start, end, strict=True), color="#999999", linewidth=0.8, linestyle=":")
    axis.add_patch(
        FancyBboxPatch((0, 0.05), 12, 2.55, boxstyle="round,pad=0,rounding_size=0.08", facecolor="#FAFAFA", edgecolor="#999999")
    )
    note(6.0, 2.4, "one stage: descend(oracle, opts, estimator=...)")
    box(axis, 0.2, 1.05, 1.3, 0.9, "vars: Vars\na Batch\nstep", state)
    box(axis, 2.0, 1.05, 1.75, 0.9, "oracle.terms\nwhich direction", code)
    box(axis, 4.3, 1.05, 1.6, 0.9, "Terms\ninner: Vars\nouter: Vars", data)
    box(axis, 6.4, 1.05, 1.75, 0.9, "estimator.update\nhow it is averaged", code)
    box(axis, 8.6, 1.05, 1.6, 0.9, "opts: Vars of optax\nhow far to go", code)
    box(axis, 10.6, 1.05, 1.2, 0.9, "new vars", state)
    for start, end in ((1.5, 2.0), (3.75, 4.3), (5.9, 6.4), (8.15, 8.6), (10.2, 10.6)):
        arrow(axis, (start, 1.5), (end, 1.5))
    note(5.1, 0.78, "of the variables\nthat move")
    note(8.38, 2.12, "direction: Vars")
    box(axis, 6.4, 0.2, 3.8, 0.42, "state of the stage: DescendState(estimator, opts)", state)
    for place in (7.27, 9.4):
        arrow(axis, (place, 0.62), (place, 1.05))
    save(figure, "flow")


if __name__ == "__main__":
    drawings: tuple[Callable[[], None], ...] = (landscape, derivatives, families, flow)
    for draw in drawings:
        draw()
