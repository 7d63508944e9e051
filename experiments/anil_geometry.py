"""ANIL on small regressions in its two geometries, for `experiments.maml_theory`: a linear head adapts, or two layers do."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pandas as pd
from jax import lax

from bilevel_jax import Levels, Problem, Vars, run, samplers, solvers, tasks
from bilevel_jax.types import Array, PyTree

INPUTS, HIDDEN, ROWS, TASKS = 8, 8, 20, 24


def network(params: PyTree, rows: Array) -> Array:
    """Three tanh layers and a linear head to one number."""
    for name in ("first", "second"):
        rows = jnp.tanh(rows @ params[name])
    return rows @ params["head"]


def regression(z: PyTree, x: PyTree, data: tuple[Array, Array]) -> Array:
    """Half the mean squared error, and the l2 term that makes it strongly convex in the head."""
    del x
    rows, labels = data
    return 0.5 * ((network(z, rows) - labels) ** 2).mean() + 0.05 * (z["head"] ** 2).sum()


def error(z: PyTree, x: PyTree, data: tuple[Array, Array]) -> Array:
    """Half the mean squared error on the query data."""
    del x
    return 0.5 * ((network(z, data[0]) - data[1]) ** 2).mean()


REGRESSION = Problem(regression, error)


def draw_weights(key: Array) -> PyTree:
    """Normal, of a size that keeps the layers in their nonlinear range."""
    first, second, head = jax.random.split(key, 3)
    return {
        "first": jax.random.normal(first, (INPUTS, HIDDEN)) / INPUTS**0.5,
        "second": jax.random.normal(second, (HIDDEN, HIDDEN)) * 1.5 / HIDDEN**0.5,
        "head": jax.random.normal(head, (HIDDEN,)) / HIDDEN**0.5,
    }


def draw_regressions(key: Array) -> Levels:
    """Tasks of one network with heads of their own (teacher), support and query rows: ``[tasks, rows, ...]``."""
    body, heads, rows = jax.random.split(key, 3)
    teacher = draw_weights(body)
    own = jax.vmap(lambda k: teacher | {"head": 2 * draw_weights(k)["head"]})(jax.random.split(heads, TASKS))

    def level(key: Array) -> tuple[Array, Array]:
        features = jax.random.normal(key, (TASKS, ROWS, INPUTS))
        return features, jax.vmap(network)(own, features)

    return Levels(*map(level, jax.random.split(rows)))


#: Which leaves adapt, and the inner rate for N steps.
GEOMETRIES = {
    "strongly convex": (lambda path: "head" in path, lambda steps: 0.2),
    "nonconvex": (lambda path: "first" not in path, lambda steps: 0.2),
    "nonconvex, rate 1 / N": (lambda path: "first" not in path, lambda steps: 1.0 / steps),
}


def query_loss(adapted: tasks.Predicate, rate: float, steps: int, x: PyTree, data: Levels) -> Array:
    """Mean over the tasks, after the inner steps."""

    def one(support: PyTree, query: PyTree) -> Array:
        def step(z: PyTree, _: None) -> tuple[PyTree, None]:
            way = jax.grad(lambda part: regression(tasks.merge(part, x), x, support))(z)
            return jax.tree.map(lambda a, b: a - rate * b, z, way), None

        z, _ = lax.scan(step, tasks.select(x, adapted), None, length=steps)
        return error(tasks.merge(z, x), x, query)

    return jax.vmap(one)(data.inner, data.outer).mean()


def anil_curves(name: str, steps: int, updates: int, seeds: int, outer_rate: float = 0.1) -> pd.DataFrame:
    """Mean query loss of ANIL against updates on all tasks, constant outer rate; seeds under vmap."""
    adapted, rule = GEOMETRIES[name]
    rate = rule(steps)
    opts = Vars(inner=optax.sgd(rate), outer=optax.sgd(outer_rate))
    solver = solvers.anil(REGRESSION, opts, adapted=adapted, inner_steps=steps, loop="vmap")

    def loss(vars: Vars, data: Levels) -> dict[str, Array]:
        return {"loss": query_loss(adapted, rate, steps, vars.outer, data)}

    @jax.jit
    @jax.vmap
    def go(key: Array) -> dict[str, Array]:
        first, second = jax.random.split(key)
        start = Vars(outer=draw_weights(second))
        return run(solver, samplers.full(), start, draw_regressions(first), key, steps=updates, every=5, metrics=loss)[1]

    history = go(jax.random.split(jax.random.key(0), seeds))
    median = np.median(history["loss"], 0)
    step = np.asarray(history["step"][0])
    calls = step * sum(solver.cost.draw)
    return pd.DataFrame({"geometry": name, "N": steps, "rate": rate, "step": step, "calls": calls, "loss": median})


def at_equal(curves: pd.DataFrame, column: str) -> pd.DataFrame:
    """Loss of every curve of every geometry (columns) at the largest value of ``column`` that all its N reach (rows: N)."""

    def at_the_last(part: pd.DataFrame) -> pd.Series:
        common = last_common(part, column)
        return pd.Series({steps: np.interp(common, one[column], one["loss"]) for steps, one in part.groupby("N")})

    table = pd.DataFrame({name: at_the_last(part) for name, part in curves.groupby("geometry", sort=False)})
    return table.rename_axis(index="N")


def last_common(part: pd.DataFrame, column: str) -> float:
    """The largest value of the column that all N of a geometry reach."""
    return min(float(one[column].to_numpy().max()) for _, one in part.groupby("N"))
