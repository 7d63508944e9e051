"""Toy problems with known solutions whose inner loss is not strongly convex, of `experiments.nonconvex`.

``merely_convex``: ``f = |x - z2|^2 / 2 + |z1 - 1|^2 / 2``, ``g = |z1|^2 / 2 - x' z1``, z = (z1, z2): the inner solutions are a
plane, because z2 is free.

``sine``: ``f = |x - 2|^2 + |z - 4|^2``, ``g = sum_i sin(x_i + z_i - 2)``, z in a box: every inner problem has many minimisers,
all of them global.  x has one entry an entry of z (variant A), or one in all (variant B).

``lasso``: ``f = sum z``, ``g = |z - a|^2 / 2 + sum_i x_i |z_i|``, x in [0, 1], a = 1/n in the first half, -1/n in the second.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from bilevel_jax import Batch, Levels, Problem, Vars, nonsmooth, samplers
from bilevel_jax.nonsmooth import Nonsmooth
from bilevel_jax.projections import project, proximal_sgd
from bilevel_jax.types import Array

#: The losses need no data.
NOTHING = Levels(np.zeros(1, np.float32), np.zeros(1, np.float32))
TARGET = 2.0  # a, and every entry of c, of sine
BOX = 10.0
Projection = Callable[[Any], Any] | None


class Case(NamedTuple):
    """A problem with what is known of it."""

    problem: Problem  # g without its nonsmooth part
    start: Vars
    error: Callable[[Any, Any], Array]  # (z, x) -> the largest relative error of x and of the parts of z
    value: float  # f*
    term: Nonsmooth | None = None  # the nonsmooth part of g
    projections: tuple[Projection, Projection] = (None, None)  # on the sets of z and of x

    def inner(self, rate: Any) -> Any:
        """Steps of an iterate of z: gradient, prox, projection."""
        if self.term is not None:
            return proximal_sgd(rate, self.term)
        return optax.sgd(rate) if self.projections[0] is None else optax.chain(optax.sgd(rate), project(self.projections[0]))

    def outer(self, rate: Any) -> Any:
        """Steps of x."""
        return optax.sgd(rate) if self.projections[1] is None else optax.chain(optax.sgd(rate), project(self.projections[1]))

    @property
    def batch(self) -> Batch:
        """One draw."""
        draws = samplers.full().batches(NOTHING, jax.random.key(0), 0, 1)
        return Batch(draws.inner[0], draws.outer[0])


def apart(found: Array, wanted: Array) -> Array:
    """The relative error."""
    return jnp.linalg.norm(found - wanted) / jnp.linalg.norm(wanted)


# ---- merely convex ----------------------------------------------------------------------------------------------------


def merely_convex(n: int) -> Case:
    """x [n], z [2, n]; the solution is 1 in all entries."""

    def error(z: Array, x: Array) -> Array:
        return jnp.stack([apart(part, jnp.ones(n)) for part in (x, z[0], z[1])]).max()

    problem = Problem(
        inner=lambda z, x, batch: 0.5 * (z[0] ** 2).sum() - (x * z[0]).sum(),
        outer=lambda z, x, batch: 0.5 * ((x - z[1]) ** 2).sum() + 0.5 * ((z[0] - 1) ** 2).sum(),
    )
    return Case(problem, Vars(inner=jnp.full((2, n), 0.01), outer=jnp.full(n, 0.01)), error, 0.0)


# ---- sine -------------------------------------------------------------------------------------------------------------


class SineSolution(NamedTuple):
    """Of variant B; variant A is n times that of n = 1."""

    phase: float  # x + z_i - c_i, a minimiser of the sine
    x: float
    z: float
    value: float


def sine_solution(n: int) -> SineSolution:
    """At a given minimiser ``C = -pi/2 + 2 k pi`` f is a quadratic of x, least n (C - 2a)^2 / (1 + n): the C nearest to 2a."""
    turns = np.round((2 * TARGET + np.pi / 2) / (2 * np.pi))
    phase = float(-np.pi / 2 + 2 * np.pi * turns)
    x = ((1 - n) * TARGET + n * phase) / (1 + n)
    return SineSolution(phase, x, phase + TARGET - x, n * (phase - 2 * TARGET) ** 2 / (1 + n))


def sine(n: int, *, shared: bool = False) -> Case:
    """x [n], or with ``shared`` x [1] (variant B), z [n]; the start is x = -6, z = 0."""
    solution, dim = sine_solution(n if shared else 1), 1 if shared else n

    def error(z: Array, x: Array) -> Array:
        return jnp.maximum(apart(x, jnp.full(dim, solution.x)), apart(z, jnp.full(n, solution.z)))

    problem = Problem(
        inner=lambda z, x, batch: jnp.sin(x + z - TARGET).sum(),
        outer=lambda z, x, batch: ((x - TARGET) ** 2).sum() + ((z - 2 * TARGET) ** 2).sum(),
    )
    start = Vars(inner=jnp.zeros(n), outer=jnp.full(dim, -6.0))
    value = solution.value * (1 if shared else n)
    return Case(problem, start, error, value, projections=(nonsmooth.box(-BOX, BOX), None))


# ---- lasso ------------------------------------------------------------------------------------------------------------


def lasso_data(n: int) -> Array:
    """a."""
    return jnp.where(jnp.arange(n) < n // 2, 1.0, -1.0) / n


def lasso_inner(x: Array) -> Array:
    """z*(x)."""
    return nonsmooth.soft(lasso_data(x.size), x)


def lasso_value(x: Array) -> Array:
    """f(z*(x), x)."""
    return lasso_inner(x).sum()


def outside(x: Array) -> Array:
    """The distance of x to the solutions, [1/n, 1] in the first half and 0 in the second, relative to that of x = 0."""
    n = x.size
    first = jnp.arange(n) < n // 2
    return jnp.linalg.norm(jnp.where(first, jnp.maximum(1 / n - x, 0), x)) * jnp.sqrt(2.0 * n)


def lasso(n: int, start: float | None = None) -> Case:
    """x, z [n], n even, all at ``start`` (default 1); f* = -1/2.

    The error is the larger of that of z, and of the distance of x to the *set* of its solutions.
    """
    best = jnp.minimum(lasso_data(n), 0)

    def error(z: Array, x: Array) -> Array:
        return jnp.maximum(apart(z, best), outside(x))

    a = lasso_data(n)
    problem = Problem(
        inner=lambda z, x, batch: 0.5 * ((z - a) ** 2).sum(),
        outer=lambda z, x, batch: z.sum(),
    )
    at = jnp.full(n, 1.0 if start is None else float(start))
    projections = None, nonsmooth.box(0.0, 1.0)
    return Case(problem, Vars(inner=at, outer=at), error, -0.5, nonsmooth.l1(lambda x: x), projections)


def rescaled_lasso(n: int, start: float | None = None) -> Case:
    """The same in units of 1/n: u = n z, w = n x in [0, n], f = sum u, so that data and f have the slope 1.

    Starts at w = n unless given; the error is that of z and x.
    """
    plain, a = lasso(n), n * lasso_data(n)
    problem = Problem(
        inner=lambda u, w, batch: 0.5 * ((u - a) ** 2).sum(),
        outer=lambda u, w, batch: u.sum(),
    )
    at = jnp.full(n, float(n if start is None else start))
    projections = None, nonsmooth.box(0.0, float(n))
    error = lambda u, w: plain.error(u / n, w / n)  # noqa: E731
    return Case(problem, Vars(inner=at, outer=at), error, -0.5 * n, plain.term, projections)


# ---- the recurrences of the public code of MEHA ------------------------------------------------------------------------


def released_merely_convex(n: int = 10, limit: int = 725) -> tuple[int, Array, Array]:
    """Iterations until ``|x - 1| < 0.01``, x and z there, of the public code: f is *multiplied* by c_k.

    Steps, weights and the order theta, z, x are those of that code; it starts theta at 0.
    """
    start = merely_convex(n).start

    def step(carry: tuple[Array, ...]) -> tuple[Array, ...]:
        k, theta, z, x = carry
        weight = 0.6 * (k + 1.0) ** 0.49
        theta = theta - 0.009 * (jnp.stack([theta[0] - x, jnp.zeros(n)]) + 0.2 * (theta - z))
        pull = 0.2 * (z - theta)
        z = z - 0.1 * (weight * jnp.stack([z[0] - 1, z[1] - x]) + jnp.stack([z[0] - x, jnp.zeros(n)]) - pull)
        x = x - 0.012 * (weight * (x - z[1]) - z[0] + theta[0])
        return k + 1, theta, z, x

    def going(carry: tuple[Array, ...]) -> Array:
        k, _, _, x = carry
        return (jnp.linalg.norm(x - 1) >= 1e-2) & (k < limit)  # a norm that grows with n, unlike `apart`

    k, _, z, x = jax.lax.while_loop(going, step, (jnp.zeros(()), jnp.zeros((2, n)), start.inner, start.outer))
    return int(k), x, z


def released_sine(steps: int = 300, *, frozen: bool = True) -> tuple[float, float]:
    """x and z after the steps of the public code: f is multiplied by c_k; ``frozen``: theta stays at 0, as in its logs."""

    def step(carry: tuple[Array, ...], k: Array) -> tuple[tuple[Array, ...], None]:
        theta, x, z = carry
        weight = 50 * (k + 1.0) ** 0.48
        if not frozen:
            theta = theta - 1e-3 * (jnp.cos(x + theta - TARGET) + 0.005 * (theta - z))
        x = x - 5e-4 * (weight * 2 * (x - TARGET) + jnp.cos(x + z - TARGET) - jnp.cos(x + theta - TARGET))
        z = z - 5e-4 * (weight * 2 * (z - 2 * TARGET) + jnp.cos(x + z - TARGET) - 0.005 * (z - theta))
        return (theta, x, jnp.clip(z, -BOX, BOX)), None

    first = jnp.zeros(()), jnp.full((), -6.0), jnp.zeros(())
    (_, x, z), _ = jax.lax.scan(step, first, jnp.arange(steps, dtype=float))
    return float(x), float(z)
