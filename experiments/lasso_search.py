"""The problem of `experiments.group_lasso`: data, inner solution, derivative in the penalties, and searches over them.

A search is a generator of ``(x, gradient calls that finding x took)``, and is sent ``(validation error, z)`` of each.  Its own
arithmetic is NumPy's, which has nothing to compile while the clock runs.
"""

import math
from collections.abc import Generator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optuna
from scipy.stats import loguniform
from sklearn.model_selection import ParameterGrid, ParameterSampler

from bilevel_jax import Batch, Problem, hypergradient, linear_solve, nonsmooth
from bilevel_jax.hypergrad import implicit as by_linear_solve
from bilevel_jax.nonsmooth import Nonsmooth
from bilevel_jax.types import Array

#: Features of a group, and rows of each of the training, validation and test sets.
GROUP, ROWS = 20, 100
#: Searches look between this fraction of the least shared penalty that makes z = 0, and that penalty itself.
LOWEST = 0.01
#: How near 0 is to the subdifferential of a solved problem, relative to that penalty.
TOLERANCE = 1e-6

Search = Generator[tuple[np.ndarray, int], tuple[float, Array], None]


class Split(NamedTuple):
    """Three sets of (rows [n, p], targets [n])."""

    train: tuple[Array, Array]
    validation: tuple[Array, Array]
    test: tuple[Array, Array]


def draw(features: int, blocks: int, seed: int) -> Split:
    """Standard normal rows; the noise has half the norm of the signal."""
    random = np.random.default_rng(seed)
    rows = random.standard_normal((3 * ROWS, features))
    weights = np.zeros((blocks, features // blocks))
    weights[:, :5] = np.arange(1, 6)
    signal, noise = rows @ weights.ravel(), random.standard_normal(3 * ROWS)
    targets = signal + noise * np.linalg.norm(signal) / np.linalg.norm(noise) / 2
    return Split(*zip(jnp.asarray(rows.reshape(3, ROWS, -1)), jnp.asarray(targets.reshape(3, ROWS)), strict=True))


def fit(z: Array, x: Array, batch: tuple[Array, Array]) -> Array:
    """Half the squared error of each row."""
    del x
    rows, targets = batch
    return 0.5 * (rows @ z - targets) ** 2


def error(z: Array, batch: tuple[Array, Array]) -> Array:
    """Half the mean squared error."""
    return fit(z, z, batch).mean()


def smoothness(rows: Array) -> Array:
    """Of the error: the largest eigenvalue of its Hessian."""
    return jnp.linalg.norm(rows, 2) ** 2 / len(rows)


def penalty(features: int, sparse: bool) -> Nonsmooth:
    """``sum_j x_j |z_(j)|_2``; if sparse, the last entry of x weighs ``|z|_1``."""
    groups = np.arange(features) // GROUP
    if sparse:
        return nonsmooth.sparse_group_lasso(groups, lambda x: x[:-1], lambda x: x[-1])
    return nonsmooth.group_lasso(groups, lambda x: x)


def highest(train: tuple[Array, Array], sparse: bool) -> Array:
    """For each entry of x the least penalty, shared by those of its kind and without the other kind, that makes z = 0."""
    slope = jax.grad(error)(jnp.zeros(train[0].shape[1]), train)
    norms = jnp.linalg.norm(slope.reshape(-1, GROUP), axis=1)
    shared = jnp.full(norms.shape, norms.max())
    return jnp.append(shared, jnp.abs(slope).max()) if sparse else shared


class Solved(NamedTuple):
    """An inner solution, and what it took."""

    z: Array  # float [p]
    calls: Array  # int32 [], gradients
    residual: Array  # float [], bound on the distance of 0 to the subdifferential


def solve(
    term: Nonsmooth, train: tuple[Array, Array], x: Array, start: Array, bound: Array, tolerance: Array, limit: int = 100_000
) -> Solved:
    """The inner solution by proximal gradient steps with Nesterov's momentum, which starts anew where it points uphill.

    ``bound`` is the `smoothness` of the rows.  References: Beck, Teboulle, "A fast iterative shrinkage-thresholding algorithm
    for linear inverse problems", 2009; O'Donoghue, Candès, "Adaptive restart for accelerated gradient schemes", 2015, arXiv
    1204.3982.
    """

    def step(state: tuple[Array, ...]) -> tuple[Array, ...]:
        z, ahead, t, calls, _ = state
        new = term.prox(ahead - jax.grad(error)(ahead, train) / bound, 1 / bound, x)
        # bound (ahead - new) less the gradient at `ahead` is a subgradient of the penalty, and the gradient moves by as much
        residual = 2 * bound * jnp.linalg.norm(ahead - new)
        t = jnp.where(jnp.vdot(ahead - new, new - z) > 0, jnp.ones_like(t), t)
        later = (1 + jnp.sqrt(1 + 4 * t**2)) / 2
        return new, new + (t - 1) / later * (new - z), later, calls + 1, residual

    first = start, start, jnp.ones_like(bound), jnp.zeros((), jnp.int32), jnp.full_like(bound, jnp.inf)
    going = lambda state: (state[4] > tolerance) & (state[3] < limit)  # noqa: E731
    z, _, _, calls, residual = jax.lax.while_loop(going, step, first)
    return Solved(z, calls, residual)


def slope(term: Nonsmooth, split: Split, z: Array, x: Array) -> tuple[Array, Array]:
    """The derivative of the validation error in x at the inner solution z, and the gradient calls that it took.

    Entries of z that are 0 stay 0 when x moves a little; in the others the penalty is smooth.
    """
    alive = z != 0
    group_alive = jnp.repeat(alive.reshape(-1, GROUP).any(1), GROUP)

    def inner(z: Array, x: Array, batch: tuple[Array, Array]) -> Array:
        free = jnp.where(alive, z, 0.0)
        # a group that is 0 gets a constant norm, because its own has no derivative; entries that are 0 get a Hessian of 1
        return error(free, batch) + term.value(jnp.where(group_alive, free, 1.0), x) + 0.5 * jnp.sum((z - free) ** 2)

    method = by_linear_solve(linear_solve.cg(max_steps=2 * ROWS, rtol=TOLERANCE))
    _, gradient, stats = hypergradient(Problem(inner, fit), method)(z, x, Batch(split.train, split.validation))
    return gradient, stats.steps + 3  # the gradients of f and g, and the cross product


def grid(top: np.ndarray, evaluations: int, sparse: bool) -> Search:
    """Shared penalties, from the largest down; with an l1 term as many of either kind, all pairs."""
    kinds = ["groups"] * (len(top) - sparse) + ["single"] * sparse
    names = sorted(set(kinds))
    values = np.geomspace(1, LOWEST, math.floor(evaluations ** (1 / len(names)) + 1e-9))
    for point in ParameterGrid(dict.fromkeys(names, values)):
        yield top * np.array([point[kind] for kind in kinds]), 0


def at_random(top: np.ndarray, evaluations: int, seed: int) -> Search:
    """Independent penalties, their logarithms uniform."""
    names = [f"x{j}" for j in range(len(top))]
    for point in ParameterSampler(dict.fromkeys(names, loguniform(LOWEST, 1)), evaluations, random_state=seed):
        yield top * np.array([point[name] for name in names]), 0


def tpe(top: np.ndarray, evaluations: int, seed: int) -> Search:
    """Tree-structured Parzen estimator over the logarithms of the penalties."""
    study = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=seed))
    for _ in range(evaluations):
        trial = study.ask()
        fractions = [trial.suggest_float(f"x{j}", LOWEST, 1, log=True) for j in range(len(top))]
        value, _ = yield top * np.array(fractions), 0
        study.tell(trial, value)


def descent(x: np.ndarray, evaluations: int, rate: float, slope: Any) -> Search:
    """Projected steps along ``slope(z, x) -> (derivative, calls)``."""
    calls = 0
    for _ in range(evaluations):
        _, z = yield x, calls
        derivative, count = slope(z, x)
        x, calls = np.maximum(x - rate * np.asarray(derivative), 0.0), int(count)
