"""Regularised logistic regression as a bilevel problem, and its exact inner solution in float64.

Binary:    g_i = log(1 + exp(-y a'z)) + (1/2) sum_k exp(x_k) z_k^2         one weight a feature, z and x of shape [p]
Softmax:   g_i = cross-entropy(a'z, y) + (1/2) sum_c exp(x_c) |z_c|^2      one weight a class, z [p, classes], x [classes]

The outer losses are the same on held-out rows, without penalty.  Data of a level are ``(rows [n, p], labels [n])``.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import scipy.optimize
from jax import lax

from bilevel_jax import Levels, Problem
from bilevel_jax.types import Array


def _binary_fit(z: Array, data: tuple[Array, Array]) -> Array:
    rows, labels = data
    return jax.nn.softplus(-labels * (rows @ z))


def _softmax_fit(z: Array, data: tuple[Array, Array]) -> Array:
    rows, labels = data
    return optax.softmax_cross_entropy_with_integer_labels(rows @ z, labels)


def _penalty(z: Array, x: Array) -> Array:
    """(1/2) sum over the last axis of exp(x) z^2: per feature where z is a vector, per class where it is a matrix."""
    weights = jnp.exp(x) if z.ndim == 1 else jnp.exp(x)[None, :]
    return 0.5 * jnp.sum(weights * z**2)


#: Losses return one value a sample; the penalty enters every one of them whole.
binary = Problem(inner=lambda z, x, d: _binary_fit(z, d) + _penalty(z, x), outer=lambda z, x, d: _binary_fit(z, d))
softmax = Problem(inner=lambda z, x, d: _softmax_fit(z, d) + _penalty(z, x), outer=lambda z, x, d: _softmax_fit(z, d))


def inner_hessian(z: Array, x: Array, data: tuple[Array, Array]) -> Array:
    """The Hessian of the mean inner loss in z, as a matrix over the flattened z (rows of z are features)."""
    rows, labels = data
    n = rows.shape[0]
    if z.ndim == 1:
        s = jax.nn.sigmoid(labels * (rows @ z))
        return (rows * (s * (1 - s))[:, None]).T @ rows / n + jnp.diag(jnp.exp(x))
    p, classes = z.shape
    probability = jax.nn.softmax(rows @ z, axis=1)
    blocks = [
        [(rows * (probability[:, c] * ((c == d) - probability[:, d]))[:, None]).T @ rows / n for d in range(classes)]
        for c in range(classes)
    ]
    matrix = jnp.transpose(jnp.array(blocks), (2, 0, 3, 1)).reshape(p * classes, p * classes)
    return matrix + jnp.diag(jnp.tile(jnp.exp(x), p))


#: Largest entry of d_z g at which an inner solution counts as exact.
ACCURATE = 1e-9
in_float64 = functools.partial(jax.enable_x64, True)


class Exact(NamedTuple):
    """The value function and its gradient at x, with the inner solution: all float64."""

    value: Array  # h(x)
    gradient: Array  # grad h(x), like x
    inner: Array  # z*(x)
    residual: Array  # largest entry of d_z g at z*: says whether Newton converged


def exact(problem: Problem, data: Levels, *, iterations: int = 50, tolerance: float = 1e-13) -> Callable[..., Exact]:
    """``(x, z_guess) -> Exact`` by damped Newton steps on the inner problem and a direct solve of the adjoint.

    Needs 64-bit types enabled while it is traced and called.  The inner problem is strongly convex, so that Newton's method
    with backtracking converges from anywhere that the loss can be evaluated; from a guess so far off that it overflows it
    does not, and z = 0 is tried instead.  Read ``residual`` to know.
    """

    def g(z: Array, x: Array) -> Array:
        return problem.inner(z, x, data.inner).mean()

    def f(z: Array, x: Array) -> Array:
        return problem.outer(z, x, data.outer).mean()

    def solve(x: Array, guess: Array) -> Array:
        def step(state: tuple) -> tuple:
            z, slope, k = state
            direction = -jnp.linalg.solve(inner_hessian(z, x, data.inner), slope.ravel()).reshape(z.shape)
            value, decrease = g(z, x), jnp.vdot(slope, direction)

            def shorter(t: Array) -> Array:
                return t / 2

            def too_long(t: Array) -> Array:
                # the slack is rounding: at the solution no step decreases the value measurably
                return (g(z + t * direction, x) > value + 1e-4 * t * decrease + 1e-15 * jnp.abs(value)) & (t > 1e-8)

            t = lax.while_loop(too_long, shorter, jnp.ones(()))
            z = z + t * direction
            return z, jax.grad(g)(z, x), k + 1

        def go_on(state: tuple) -> Array:
            return (jnp.abs(state[1]).max() > tolerance) & (state[2] < iterations)

        return lax.while_loop(go_on, step, (guess, jax.grad(g)(guess, x), 0))[0]

    def evaluate(x: Array, guess: Array) -> Exact:
        z = solve(x, guess)
        failed = ~(jnp.abs(jax.grad(g)(z, x)).max() <= ACCURATE)  # also where it is NaN
        z = lax.cond(failed, lambda: solve(x, jnp.zeros_like(z)), lambda: z)
        fz, fx = jax.grad(f, argnums=(0, 1))(z, x)
        v = -jnp.linalg.solve(inner_hessian(z, x, data.inner), fz.ravel()).reshape(z.shape)
        slope, pullback = jax.vjp(lambda x: jax.grad(g)(z, x), x)
        return Exact(f(z, x), fx + pullback(v)[0], z, jnp.abs(slope).max())

    return evaluate


class Minimum(NamedTuple):
    """The reference optimum of h over a box."""

    value: float
    point: np.ndarray
    slope: float  # largest entry of the projected gradient there
    agree: int  # starts that ended within 1e-9 of the value
    starts: int


#: exp(36) is one over the rounding unit of float64: beyond it a larger or smaller x changes nothing.
BOX = 36.0


def minimise(evaluate: Callable[[np.ndarray, np.ndarray], Exact], starts: list[np.ndarray], guess: np.ndarray) -> Minimum:
    """Minimum of h in float64: L-BFGS-B in the box |x| <= `BOX` from each of the starts, and the lowest of the values.

    The box stands for all of R^d: x_k runs to +infinity where a feature is best left out, and to -infinity where it is best
    left alone, and h is flat there.  h is not convex, so that several starts are taken and their agreement is reported.
    Deterministic, and independent of the solvers that are compared.

    Raises:
        RuntimeError: if the inner problem is not solved to `ACCURATE` somewhere on the way.
    """
    found = []
    for start in starts:
        warm = {"z": np.asarray(guess)}

        def value_and_gradient(x: np.ndarray, warm: dict[str, np.ndarray] = warm) -> tuple[float, np.ndarray]:
            result = evaluate(x, warm["z"])
            if not result.residual <= ACCURATE:
                raise RuntimeError(
                    f"inner problem: got a residual of {result.residual} at x = {x}, expected at most {ACCURATE}"
                )
            warm["z"] = np.asarray(result.inner)
            return float(result.value), np.asarray(result.gradient)

        bounds = [(-BOX, BOX)] * start.size
        options = {"maxiter": 3000, "ftol": 0.0, "gtol": 1e-12, "maxcor": 20}
        end = scipy.optimize.minimize(value_and_gradient, start, jac=True, method="L-BFGS-B", bounds=bounds, options=options)
        slope = np.where(((end.x <= -BOX) & (end.jac > 0)) | ((end.x >= BOX) & (end.jac < 0)), 0.0, end.jac)
        found.append((float(end.fun), end.x, float(np.abs(slope).max())))
    value, point, slope = min(found, key=lambda one: one[0])
    return Minimum(value, point, slope, sum(one[0] < value + 1e-9 for one in found), len(starts))
