"""The Moreau envelope of the inner loss as a function, solved to high precision: what MEHA's theory is measured by."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from bilevel_jax import checks
from bilevel_jax.control_flow import marked, while_loop
from bilevel_jax.nonsmooth import Nonsmooth, zero
from bilevel_jax.oracles import losses
from bilevel_jax.results import Result
from bilevel_jax.trees import norm, scaled
from bilevel_jax.types import Array, Batch, Problem, PyTree

Projection = Callable[[PyTree], PyTree]


class Envelope(NamedTuple):
    """The Moreau envelope ``m_gamma(z, x) = min_theta g(theta, x) + |theta - z|^2 / (2 gamma)`` at a point."""

    point: PyTree  # theta*, like z
    value: Array  # float [], m_gamma
    gap: Array  # float [], g(z, x) - m_gamma >= 0: 0 where z is stationary for g(., x), for gamma < 1 / rho
    code: Array  # int32 [], a `bilevel_jax.Result`
    steps: Array  # int32 [], proximal gradient steps


def envelope(
    problem: Problem,
    z: PyTree,
    x: PyTree,
    batch: Batch,
    *,
    gamma: float,
    rate: float,
    nonsmooth: Nonsmooth | None = None,
    projection: Projection | None = None,
    tolerance: float | None = None,
    max_steps: int = 100_000,
) -> Envelope:
    """The envelope by proximal gradient steps on its strongly convex problem, started at z.

    Args:
        problem: f, and the smooth part of g.
        z, x: the point.
        batch: one draw; all the data where the envelope of the whole loss is wanted.
        gamma: its parameter, below 1 / rho where g is rho-weakly convex in z.
        rate: step size, at most ``1 / (L + 1 / gamma)``.
        nonsmooth: the nonsmooth part r of g.
        projection: on the set Z of z, if there is one and no r; with both, `bilevel_jax.nonsmooth.constrained`.
        tolerance: on ``|theta+ - theta| / rate``, by default ``eps^(3/4) (1 + |z|)``.
        max_steps: a bound on the steps.

    Returns:
        An ``Envelope``; codes: SUCCESSFUL, MAX_STEPS_REACHED (the tolerance was not met), NONFINITE.

    Raises:
        TypeError, ValueError: for anything but a ``Problem``, numbers that are not positive, and both a term and a projection.

    Cost: one inner gradient a step, two inner values.

    Reference: Liu, Liu, Yao, Zeng, Zhang, "Moreau envelope for nonconvex bi-level optimization: a single-loop and Hessian-free
    solution strategy", ICML 2024, arXiv 2405.09927.

    Example:
        >>> problem = Problem(lambda z, x, a: 0.5 * ((z - x) ** 2).sum(), lambda z, x, b: 0.0 * z.sum())
        >>> at = envelope(problem, jnp.full(1, 3.0), jnp.ones(1), Batch(), gamma=1.0, rate=0.5)
        >>> round(float(at.point[0]), 4), round(float(at.value), 4), round(float(at.gap), 4)  # theta* = 2, m = 1/2 + 1/2
        (2.0, 1.0, 1.0)
    """
    g, _ = losses(problem)
    z, x, batch = checks.point(z, x, batch)
    checks.positive("gamma", gamma)
    checks.positive("rate", rate)
    if nonsmooth is not None and projection is not None:
        raise ValueError("projection: got one beside nonsmooth, expected nonsmooth=constrained(term, projection)")
    if nonsmooth is not None and not isinstance(nonsmooth, Nonsmooth):
        raise TypeError(f"nonsmooth: got {type(nonsmooth).__name__}, expected a term of bilevel_jax.nonsmooth")
    max_steps, term = checks.positive_int("max_steps", max_steps), nonsmooth or zero()
    land = projection or (lambda point: point)
    z, x = marked((z, x))
    size = norm(z)
    target = tolerance if tolerance is not None else float(jnp.finfo(size.dtype).eps) ** 0.75 * (1 + size)

    def step(theta: PyTree) -> PyTree:
        pull = scaled(1 / gamma, jax.tree.map(jnp.subtract, theta, z))
        way = jax.tree.map(jnp.add, jax.grad(g)(theta, x, batch), pull)
        return land(term.prox(jax.tree.map(jnp.subtract, theta, scaled(rate, way)), rate, x))

    def body(carry: tuple[PyTree, Array, Array]) -> tuple[PyTree, Array, Array]:
        theta, _, count = carry
        new = step(theta)
        return new, norm(jax.tree.map(jnp.subtract, new, theta)) / rate, count + 1

    start = (z, jnp.full_like(size, jnp.finfo(size.dtype).max), jnp.int32(0))
    theta, moved, count = while_loop(lambda c: (c[1] > target) & (c[2] < max_steps), body, start)

    def inner(at: PyTree) -> Array:
        return (g(at, x, batch) + term.value(at, x)).astype(size.dtype)

    apart = norm(jax.tree.map(jnp.subtract, theta, z))
    value = inner(theta) + apart**2 / (2 * gamma)
    gap = inner(z) - value
    code = jnp.where(moved <= target, Result.SUCCESSFUL, Result.MAX_STEPS_REACHED)
    code = jnp.where(jnp.isfinite(moved) & jnp.isfinite(gap), code, Result.NONFINITE).astype(jnp.int32)
    return Envelope(theta, value, gap, code, count)


def residual(
    problem: Problem,
    z: PyTree,
    x: PyTree,
    batch: Batch,
    *,
    multiplier: Any,
    gamma: float,
    rate: float,
    nonsmooth: Nonsmooth | None = None,
    projections: tuple[Projection | None, Projection | None] = (None, None),
    tolerance: float | None = None,
    max_steps: int = 100_000,
) -> Array:
    """MEHA's residual R_k, the distance to stationarity of ``f + c (g - m_gamma)`` over the constraints.

    As a proximal gradient residual, ``|u - P(u - s G)| / s`` for u = (z, x), G the gradient of the smooth part, P the proximal
    and projection step, and s = rate / c.  Without constraints and nonsmooth part it is |G|.

    Args:
        problem, z, x, batch, gamma, rate, nonsmooth: as for `envelope`.
        multiplier: c, such as the ``c_low (k + 1)^p`` of update k.
        projections: on the sets of z and of x.
        tolerance, max_steps: as for `envelope`.

    Returns:
        R_k, float []; NaN where the envelope was not solved.

    Raises:
        TypeError, ValueError: as `envelope`.

    Cost: that of `envelope`, two inner gradients and one outer gradient pair.

    Reference: as `envelope`, the residual of its convergence theorem.

    Example:
        >>> problem = Problem(lambda z, x, a: 0.5 * ((z - x) ** 2).sum(), lambda z, x, b: z.sum() + x.sum())
        >>> at = residual(problem, jnp.ones(1), jnp.ones(1), Batch(outer=jnp.zeros(1)), multiplier=5.0, gamma=1.0, rate=0.5)
        >>> round(float(at), 4)  # z is the inner solution: grad f = (1, 1) is left
        1.4142
    """
    g, f = losses(problem)
    z, x, batch = checks.point(z, x, batch)
    z, x = marked((z, x))
    checks.positive("multiplier", multiplier)
    known = envelope(
        problem,
        z,
        x,
        batch,
        gamma=gamma,
        rate=rate,
        nonsmooth=nonsmooth,
        projection=projections[0],
        tolerance=tolerance,
        max_steps=max_steps,
    )
    theta, term = known.point, nonsmooth or zero()
    (gz, gx), tx = jax.grad(g, argnums=(0, 1))(z, x, batch), jax.grad(g, argnums=1)(theta, x, batch)
    fz, fx = jax.grad(f, argnums=(0, 1))(z, x, batch)
    rz, rt = (jax.grad(term.value, argnums=1)(at, x) for at in (z, theta))
    pull = scaled(1 / gamma, jax.tree.map(jnp.subtract, z, theta))
    slopes = jax.tree.map(jnp.subtract, gz, pull), jax.tree.map(lambda a, b, c, d: a - b + (c - d), gx, tx, rz, rt)
    step = rate / jnp.asarray(multiplier, known.value.dtype)
    down = [
        jax.tree.map(lambda u, d, w: u - step.astype(u.dtype) * d - jnp.asarray(rate, u.dtype) * w, *parts)
        for parts in ((z, fz, slopes[0]), (x, fx, slopes[1]))
    ]
    down[0] = term.prox(down[0], rate, x)
    landed = [(land or (lambda u: u))(u) for land, u in zip(projections, down, strict=True)]
    moved = norm([jax.tree.map(jnp.subtract, a, b) for a, b in zip((z, x), landed, strict=True)])
    return jnp.where(known.code == jnp.int32(Result.SUCCESSFUL), moved / step, jnp.nan)
