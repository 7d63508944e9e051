"""Hyper-representation: features learned so that a ridge regression on them generalises (notebooks of the PZOBO paper).

``python -m experiments.hyper_representation --layers linear --out results/hyper``

Inner problem: ridge regression of the training targets on the features of x, z its coefficients.  Outer problem: the squared
error on validation rows.  Linear: the features are ``rows @ x``, and so are those that made the targets; deep: two sigmoid
layers.  Rows, true coefficients, true layers, and the starts of z and x are standard normal; the targets have noise .1.

As in the notebooks, z starts at the same point in every update, and x moves by Adam.  Measured: the outer loss after the inner
steps from there, which unrolled methods minimise, and with the exact ridge solution instead, which is the bilevel problem.
"""

import dataclasses
from collections.abc import Callable
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
import pandas as pd
import tyro

from bilevel_jax import (
    Batch,
    BilevelState,
    Levels,
    Problem,
    Solver,
    Vars,
    descend,
    linear_solve,
    samplers,
    solvers,
    sweep,
    unroll,
)
from bilevel_jax.hypergrad import Jacobian, gaussian, path
from bilevel_jax.oracles import losses
from bilevel_jax.types import Array, Calls, Oracle, PyTree, Terms
from experiments import figures
from experiments.race import Entrant, Options, prepare, race, report

Name = Literal["pzobo", "pzobo_unit", "itd_bio", "fo_itd_bio", "aid_fp", "aid_cg", "hozog"]
figures.STYLES |= {"pzobo_unit": ("#44AA99", "--"), "fo_itd_bio": ("#E69F00", "--"), "hozog": ("#000000", ":")}


class Setting(NamedTuple):
    """Of one of the two notebooks."""

    sizes: tuple[int, ...]  # of a row, and of each layer
    rows: int  # training rows, and as many validation rows
    ridge: float
    inner_rate: float
    inner_steps: int
    outer_rate: float  # of Adam
    radius: float  # of the differences of pzobo and hozog


SETTINGS = {
    "linear": Setting((64, 128), 500, 0.1, 1e-3, 20, 0.05, 0.01),
    "deep": Setting((256, 512, 256), 5000, 1e-3, 3e-4, 20, 0.01, 0.1),
}


@dataclasses.dataclass(frozen=True)
class Config(Options):
    """Features learned for ridge regression, at the settings of the PZOBO paper's notebooks."""

    layers: Literal["linear", "deep"] = "linear"
    """which notebook"""
    solvers: tuple[Name, ...] = ("pzobo", "pzobo_unit", "fo_itd_bio", "itd_bio", "aid_fp", "aid_cg", "hozog")
    """which methods to compare; pzobo_unit divides the estimate of pzobo by the dimension, as the paper's code does"""
    updates: int = 100
    """updates of each"""
    evaluations: int = 20
    """how often to measure"""
    inner_steps: int | None = None
    """inner steps, and steps for v, in an update (default: the notebook's)"""
    rows: int | None = None
    """training rows (default: the notebook's)"""
    directions: int = 1
    """random directions of pzobo in an update"""
    outer_rate: float | None = None
    """step size of Adam (default: the notebook's)"""
    seeds: int = 3
    """runs, which differ in data, starts and directions"""

    def __post_init__(self) -> None:
        for name in ("updates", "evaluations", "inner_steps", "rows", "directions", "outer_rate", "seeds"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise SystemExit(f"--{name.replace('_', '-')}: got {value}, expected a positive number")
        if not self.solvers:
            raise SystemExit("--solvers: got none, expected at least one")

    @property
    def setting(self) -> Setting:
        """The notebook's, with what was given instead."""
        given = {name: getattr(self, name) for name in ("inner_steps", "rows", "outer_rate")}
        return SETTINGS[self.layers]._replace(**{name: value for name, value in given.items() if value is not None})


def features(x: list[Array], rows: Array) -> Array:
    """``[n, row] -> [n, features]`` by the layers of x: a matrix, or two with sigmoids."""
    if len(x) == 1:
        return rows @ x[0]
    for layer in x:
        rows = jax.nn.sigmoid(rows @ layer)
    return rows


def regression(ridge: float) -> Problem:
    """z [features], x a list of layers, data (rows [n, row], targets [n])."""

    def error(z: Array, x: list[Array], batch: tuple[Array, Array]) -> Array:
        rows, targets = batch
        return 0.5 * (features(x, rows) @ z - targets) ** 2

    return Problem(inner=lambda z, x, batch: error(z, x, batch) + 0.5 * ridge * jnp.vdot(z, z), outer=error)


def draw(setting: Setting, key: Array) -> tuple[Levels, Vars]:
    """The data and the start."""

    def coefficients(key: Array) -> tuple[list[Array], Array]:
        keys = jax.random.split(key, len(setting.sizes))
        shapes = zip(setting.sizes, setting.sizes[1:], strict=False)
        return [jax.random.normal(k, s) for k, s in zip(keys, shapes, strict=False)], jax.random.normal(
            keys[-1], setting.sizes[-1:]
        )

    def level(key: Array) -> tuple[Array, Array]:
        first, second = jax.random.split(key)
        rows = jax.random.normal(first, (setting.rows, setting.sizes[0]))
        return rows, features(layers, rows) @ head + 0.1 * jax.random.normal(second, (setting.rows,))

    truth, start, inner, outer = jax.random.split(key, 4)
    layers, head = coefficients(truth)
    x, z = coefficients(start)
    return Levels(level(inner), level(outer)), Vars(z, None, x)


def hozog(problem: Problem, opts: Vars, *, inner_steps: int, radius: float) -> Solver:
    """Zeroth-order hypergradient ``(h(x + r u) - h(x)) u / r``, u ~ N(0, I), h the outer loss after the inner steps.

    Reference: Gu, Liu, Zhang, Geng, Huang, "Optimizing large-scale hyperparameters via automated learning algorithm", 2021,
    arXiv 2102.09026.
    """
    g, f = losses(problem)
    follow = path(opts.inner, inner_steps)

    def terms(vars: Vars, batch: Batch, step: Array) -> Terms:
        del step

        def value(x: PyTree) -> Array:
            return f(follow(lambda z, x, k: jax.grad(g)(z, x, batch), vars.inner, x), x, batch)

        leaves, form = jax.tree.flatten(vars.outer)
        assert batch.key is not None  # every sampler gives one
        keys = jax.random.split(batch.key, len(leaves))
        u = form.unflatten(jax.random.normal(k, leaf.shape, leaf.dtype) for k, leaf in zip(keys, leaves, strict=True))
        moved = jax.tree.map(lambda leaf, d: leaf + radius * d, vars.outer, u)
        slope = (value(moved) - value(vars.outer)) / radius
        return Terms(outer=Vars(outer=jax.tree.map(lambda d: slope * d, u)))

    oracle = Oracle(terms, lambda moved: Calls(inner_gradient=2.0 * inner_steps, outer_gradient=2.0))
    return sweep(descend(oracle, Vars(outer=opts.outer)))


def shrunk(jacobian: Jacobian) -> Jacobian:
    """The estimate divided by the size of each leaf of x: what comes of unit directions instead of Gaussian ones."""

    def at(end: Callable[[PyTree], PyTree], x: PyTree, key: Array) -> tuple[PyTree, Callable[[PyTree], PyTree]]:
        z, pull = jacobian.at(end, x, key)
        return z, lambda dz: jax.tree.map(lambda leaf: leaf / leaf.size, pull(dz))

    return Jacobian(at, jacobian.directions)


def restarted(solver: Solver, z: Array) -> Solver:
    """The solver with z started at the same point, and v at 0, in every update."""

    def update(state: BilevelState, batches: Batch) -> BilevelState:
        return solver.update(state._replace(vars=state.vars._replace(inner=z, aux=jnp.zeros_like(z))), batches)

    return solver._replace(update=update)


def build(name: Name, problem: Problem, config: Config) -> Solver:
    """The method of a name; fixed-point and conjugate-gradient steps for v are as many as inner steps."""
    setting = config.setting
    steps, radius = setting.inner_steps, setting.radius
    opts = Vars(inner=optax.sgd(setting.inner_rate), outer=optax.adam(setting.outer_rate))
    fixed_point = linear_solve.richardson(steps=steps, rate=setting.inner_rate)
    match name:
        case "pzobo":
            return solvers.pzobo(problem, opts, inner_steps=steps, directions=config.directions, radius=radius)
        case "pzobo_unit":
            estimate = shrunk(gaussian(config.directions, radius))
            return sweep(unroll(problem, opts, steps, truncate=0, jacobian=estimate, fresh=False))
        case "itd_bio":
            return solvers.itd_bio(problem, opts, inner_steps=steps)
        case "fo_itd_bio":
            return solvers.fo_itd_bio(problem, opts, inner_steps=steps)
        case "aid_fp":
            return solvers.aid_bio(problem, opts, inner_steps=steps, linear_solver=fixed_point)
        case "aid_cg":
            return solvers.aid_bio(problem, opts, inner_steps=steps, linear_solver=linear_solve.cg(max_steps=steps))
        case "hozog":
            return hozog(problem, opts, inner_steps=steps, radius=radius)


def measure(problem: Problem, setting: Setting, data: Levels, z: Array, x: list[Array]) -> dict[str, Array]:
    """The outer loss after the inner steps from z, and at the exact inner solution."""
    follow = path(optax.sgd(setting.inner_rate), setting.inner_steps)
    end = follow(lambda z, x, k: jax.grad(lambda z: problem.inner(z, x, data.inner).mean())(z), z, x)
    rows, targets = data.inner
    made = features(x, rows)
    normal = made.T @ made / len(rows) + setting.ridge * jnp.eye(len(z))
    exact = jnp.linalg.solve(normal, made.T @ targets / len(rows))
    return {
        "outer_loss": problem.outer(end, x, data.outer).mean(),
        "exact_outer_loss": problem.outer(exact, x, data.outer).mean(),
    }


def main(config: Config) -> pd.DataFrame:
    """Run the comparison."""
    prepare(config)
    setting = config.setting
    problem = regression(setting.ridge)
    measured = jax.jit(lambda x, data, z: measure(problem, setting, data, z, x))

    def one(seed: int) -> pd.DataFrame:
        levels, start = draw(setting, jax.random.key(seed))
        read = Levels(setting.rows, setting.rows)
        entrants = {
            name: Entrant(restarted(build(name, problem, config), start.inner), samplers.full(), levels, read)
            for name in config.solvers
        }
        return race(
            entrants,
            start,
            lambda vars: measured(vars.outer, levels, start.inner),
            evaluations=config.evaluations,
            updates=config.updates,
            seed=seed,
        )

    table = pd.concat([one(seed) for seed in range(1, config.seeds + 1)], ignore_index=True)
    sizes = " - ".join(map(str, setting.sizes))
    title = f"hyper-representation, {config.layers} {sizes}, {setting.rows} rows, {setting.inner_steps} inner steps"
    labels = {"outer_loss": "outer loss after the inner steps", "exact_outer_loss": "outer loss at the exact inner solution"}
    report(config, table, labels, title)
    return table


if __name__ == "__main__":
    main(tyro.cli(Config))
