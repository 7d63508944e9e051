"""Solvers that use first derivatives only: penalties, barriers and the Moreau envelope.

`bilevel_jax.value_oracles` says what ``vars.inner`` and ``vars.aux`` hold in each; ``aux`` starts at z unless it is given.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer

from bilevel_jax import checks
from bilevel_jax.nonsmooth import Nonsmooth
from bilevel_jax.oracles import implicit
from bilevel_jax.projections import term_of
from bilevel_jax.solvers.steps import three, two
from bilevel_jax.stages import assign
from bilevel_jax.sweep import descend, same, sweep
from bilevel_jax.trees import narrow, widen
from bilevel_jax.types import Array, Problem, PyTree, Schedule, Solver, Vars
from bilevel_jax.value_oracles import barrier, differences, interior, moreau, penalty, quadratic, stencil, value_function


def meha(
    problem: Problem,
    opts: Vars,
    *,
    gamma: float,
    c_low: float = 1.0,
    p: float = 0.49,
    rho: float | None = None,
    nonsmooth: Nonsmooth | None = None,
) -> Solver:
    """MEHA: theta, then x, then z, one first-order step each; f weighs 1/c_k with ``c_k = c_low (k + 1)^p``.

    ::

        theta+ = prox_{eta r(x, .)} ( theta - eta [d_z gs(x, theta) + (theta - z) / gamma] )
        x+     = Proj ( x - alpha [d_x f(x, z) / c_k + d_x g(x, z) - d_x g(x, theta+)] )
        z+     = prox_{beta r(x+, .)} ( z - beta [d_z f(x+, z) / c_k + d_z gs(x+, z) - (z - theta+) / gamma] )

    Neither convexity nor a single minimiser of g in z is needed, and no second derivative.  Where g is not convex the problem
    solved is the relaxed one, in which z is any inner stationary point.  The bias at c_k is O(1 / c_k).

    Args:
        problem: f, and the smooth part gs of g.
        opts: optax transformations of z (beta), theta (eta) and x (alpha): constant steps.  Constraints are links of a chain
            (`bilevel_jax.projections.project`, for z and theta alike).  Theory asks for eta <= 2 / (L + 2 / gamma - rho) and
            small enough alpha and beta.
        gamma: parameter of the envelope; theory: below 1 / (2 rho), any for convex g.
        c_low, p: of c_k; theory: 0 <= p < 1/2.  With p = 0 the infeasibility does not vanish; a large c_low holds z to the
            basin of the inner problem in which it starts.
        rho: weak convexity of g in z, if known: then gamma is checked.
        nonsmooth: r(z, x), of `bilevel_jax.nonsmooth`; the optimisers of z and theta are then made by
            `bilevel_jax.projections.proximal_sgd` of the same term, so that each prox has the step of its gradient.  For a set
            beside r see `bilevel_jax.nonsmooth.constrained`.

    Raises:
        TypeError, ValueError: for optimisers that are missing, numbers out of range, gamma above 1 / (2 rho), and optimisers of
            z and theta that are not those of ``nonsmooth`` (what is inside an `optax.chain` is not seen).

    Cost of an update: four inner gradients and two outer gradient pairs.

    Reference: Liu, Liu, Yao, Zeng, Zhang, "Moreau envelope for nonconvex bi-level optimization: a single-loop and Hessian-free
    solution strategy", ICML 2024, arXiv 2405.09927.  The paper is deterministic; here each of the three steps
    takes a draw of its own.  The authors' public code multiplies f by c_k instead, among other differences: not followed.

    Example:
        >>> import optax
        >>> from bilevel_jax import run, samplers, testing
        >>> q = testing.quadratic(jax.random.key(0))
        >>> solver = meha(q.problem, Vars(*map(optax.sgd, (0.5, 0.3, 0.2))), gamma=1.0, c_low=100.0, p=0.2)
        >>> start = q.start._replace(aux=None)
        >>> _, history = run(solver, samplers.full(), start, q.data, jax.random.key(1), steps=2000, metrics=q.metrics)
        >>> bool(history["gradient_norm"][-1] < 0.1 * history["gradient_norm"][0])
        True
    """
    opts = three(opts)
    for name, value in (("gamma", gamma), ("c_low", c_low), *((("rho", rho),) if rho is not None else ())):
        checks.positive(name, value)
    if callable(p) or isinstance(p, str):
        raise TypeError(f"p: got {checks.shown(p)}, expected a number in [0, 1/2)")
    if not isinstance(p, Tracer) and not 0 <= p < 0.5:
        raise ValueError(f"p: got {p}, expected a number in [0, 1/2)")
    if rho is not None and not isinstance(gamma * rho, Tracer) and 2 * gamma * rho > 1:
        raise ValueError(f"gamma: got {gamma}, expected at most 1 / (2 rho) = {1 / (2 * rho):g}, as the theory asks")
    for name in ("inner", "aux"):
        if term_of(getattr(opts, name)) is not nonsmooth:
            wanted = "no proximal_sgd without nonsmooth=" if nonsmooth is None else "proximal_sgd(rate, nonsmooth)"
            raise ValueError(f"opts.{name}: got another proximal step than that of nonsmooth, expected {wanted}")

    def multiplier(k: Array) -> Array:
        return c_low * (k + 1.0) ** p

    move = partial(descend, moreau(problem, multiplier, gamma=gamma, nonsmooth=nonsmooth))
    return sweep(move(Vars(aux=opts.aux)), move(Vars(outer=opts.outer)), move(Vars(inner=opts.inner)), aux=same)


def f2sa(
    problem: Problem,
    opts: Vars,
    *,
    multiplier: Schedule = lambda k: 10.0 * (k + 1.0) ** (1 / 7),
    inner_steps: int = 10,
) -> Solver:
    """F2SA: T steps of z on g and of y on ``g + f / lam``, then x along ``d_x f(y) + lam (d_x g(y) - d_x g(z))``.

    For g strongly convex in z: where it has many minimisers, z stays at the one near its start.

    Args:
        problem: inner and outer loss.
        opts: optax transformations of z, y and x.  Paper, with noise in both levels: steps ~ k^-5/7 for y and x, ~ k^-4/7 for
            z, and lam ~ k^1/7.  The direction of y is here the paper's over lam, so that its step is ~ k^-4/7, like that of z;
            both are at most 1/L.  Deviation of the public benchmark: its step of x is ~ k^-4/7.
        multiplier: lam, a number or a schedule of the update.  The bias is O(1 / lam); log10(lam) digits are lost.
        inner_steps: T, each on a draw of its own.

    Raises:
        TypeError, ValueError: for optimisers that are missing, and numbers out of range.

    Cost of an update: 2 T + 2 inner gradients and T + 1 outer gradient pairs.

    Reference: Kwon, Kwon, Wright, Nowak, "A fully first-order method for stochastic bilevel optimization", ICML 2023, arXiv
    2301.10945, Algorithm 1.  Their F3SA is a sweep of the same two stages with ``estimator=storm(...)``.  The exponents
    agree with the rate in the abstract, a squared gradient of K^-2/7; they were not checked against the theorem.

    Example:
        >>> import optax
        >>> problem = Problem(lambda z, x, a: ((z - x) ** 2).sum(), lambda z, x, b: (z**2).sum())
        >>> f2sa(problem, Vars(*map(optax.sgd, (0.1, 0.1, 0.1)))).cost.draw.inner_gradient
        22.0
    """
    checks.positive_int("inner_steps", inner_steps)
    opts, move = three(opts), partial(descend, penalty(problem, multiplier))
    return sweep(move(opts._replace(outer=None), steps=inner_steps), move(Vars(outer=opts.outer)), aux=same)


def f2ba(problem: Problem, opts: Vars, *, multiplier: float = 100.0, inner_steps: int = 10) -> Solver:
    """F2BA: `f2sa` with a fixed multiplier, deterministic: its inner steps share one draw, and their momentum starts anew.

    Args:
        problem, opts, inner_steps: as for `f2sa`.  Paper: constant steps; theory: lam ~ kappa^3 / eps, T ~ kappa log kappa.
            With ``optax.sgd(rate, momentum, nesterov=True)`` for z and y the inner loops are accelerated.
        multiplier: lam.

    Raises:
        TypeError, ValueError: as `f2sa`.

    Cost of an update: as `f2sa`.

    Reference: Chen, Ma, Zhang, "Near-optimal nonconvex-strongly-convex bilevel optimization with fully first-order oracles",
    JMLR 2025, arXiv 2306.14853.

    Example:
        >>> import optax
        >>> problem = Problem(lambda z, x, a: ((z - x) ** 2).sum(), lambda z, x, b: (z**2).sum())
        >>> f2ba(problem, Vars(*map(optax.sgd, (0.1, 0.1, 0.1)))).draws
        2
    """
    checks.positive_int("inner_steps", inner_steps)
    opts, move = three(opts), partial(descend, penalty(problem, multiplier))
    return sweep(
        move(opts._replace(outer=None), steps=inner_steps, fresh=False, restart=True), move(Vars(outer=opts.outer)), aux=same
    )


def f2sa_p(problem: Problem, opts: Vars, *, multiplier: Schedule = 100.0, order: int = 2, inner_steps: int = 10) -> Solver:
    """F2SA-p: T steps of every y_k on ``g + s_k f``, then x along the difference of order p of d_x of their minima.

    The default among first-order solvers where g is strongly convex in z: p = 2 has a bias of O(lam^-2) at the cost of F2SA.
    Where g is flat along a direction that f sees, ``g - f / lam`` has no minimum, and the y of that node diverges.

    Args:
        problem: inner and outer loss.
        opts: optax transformations of the y_k (one for all) and of x; aux None.  Steps at most 1/L.
        multiplier: lam > k L_f / mu for the largest k, p / 2: a number or a schedule of the update.
        order: p, 1 or even.
        inner_steps: T, each on a draw of its own.

    Returns:
        A solver whose ``vars.aux`` holds the y_k (leaves ``[nodes, ...]``), and ``vars.inner`` their interpolation at s = 0,
        which is z*(x) up to O(lam^-p) (for p = 1 the y at s = 0 itself).

    Raises:
        TypeError, ValueError: for optimisers that are missing or not wanted, and numbers out of range.

    Cost of an update: n (T + 1) inner gradients and n (T + 1) outer gradient pairs, n = 2 for p = 1, else p.

    Reference: Chen, Li, Chayti, Zhang, "Faster gradient methods for highly-smooth stochastic bilevel optimization", ICLR 2026,
    arXiv 2509.02937.  The released code also normalises the direction of x, and starts all y_k at their mean: not followed.

    Example:
        >>> import optax
        >>> from bilevel_jax import run, samplers, testing
        >>> q = testing.quadratic(jax.random.key(0))
        >>> solver = f2sa_p(q.problem, Vars(inner=optax.sgd(0.9), outer=optax.sgd(0.1)), inner_steps=20)
        >>> start = q.start._replace(aux=None)
        >>> _, history = run(solver, samplers.full(), start, q.data, jax.random.key(1), steps=200, metrics=q.metrics)
        >>> bool(history["gradient_norm"][-1] < 1e-2 * history["gradient_norm"][0])
        True
    """
    checks.positive_int("inner_steps", inner_steps)
    opts, move = two(opts), partial(descend, differences(problem, multiplier, order))
    _, _, at_zero = stencil(order)

    def interpolate(vars: Vars) -> Vars:
        mean = lambda leaf: jnp.tensordot(jnp.asarray(at_zero, leaf.dtype), leaf, 1)  # noqa: E731
        return vars._replace(inner=narrow(jax.tree.map(mean, widen(vars.aux)), vars.aux))

    def copies(z: PyTree) -> PyTree:
        return jax.tree.map(lambda leaf: jnp.stack([leaf] * len(at_zero)), z)

    return sweep(move(Vars(aux=opts.inner), steps=inner_steps), move(Vars(outer=opts.outer)), assign(interpolate), aux=copies)


def bome(problem: Problem, opts: Vars, *, inner_steps: int = 10, eta: float = 0.5, control: str = "gradient") -> Solver:
    """BOME: w by T gradient steps on g from y, then y and x along ``grad f + lam grad q``, ``q = g(y, x) - g(w, x)``.

    Args:
        problem: inner and outer loss.
        opts: optax transformations of w, y and x: paper, sgd, the same for y and x.
        inner_steps: T, all on one draw.
        eta, control: see `bilevel_jax.value_oracles.barrier`.

    Returns:
        A solver whose ``vars.inner`` holds w, and ``vars.aux`` y.  Deterministic: use it on all the data.

    Raises:
        TypeError, ValueError: for optimisers that are missing, and numbers out of range.

    Cost of an update: T + 2 inner gradients and one outer gradient pair.

    Reference: Liu, Ye, Wright, Stone, Liu, "BOME! Bilevel optimization made easy: a simple first-order approach", NeurIPS 2022,
    arXiv 2209.08709, Algorithm 1.

    Example:
        >>> import optax
        >>> problem = Problem(lambda z, x, a: ((z - x) ** 2).sum(), lambda z, x, b: (z**2).sum())
        >>> bome(problem, Vars(*map(optax.sgd, (0.1, 0.1, 0.1)))).cost.draw.inner_gradient
        12.0
    """
    return _ahead(problem, opts, barrier(problem, eta=eta, control=control), inner_steps)


def pbgd(problem: Problem, opts: Vars, *, multiplier: Schedule = 10.0, inner_steps: int = 10) -> Solver:
    """V-PBGD: w by T gradient steps on g from y, then y and x along ``grad [f + lam (g(y, x) - g(w, x))]``, w constant.

    Args:
        problem: inner and outer loss.
        opts: optax transformations of w, y and x.  The direction of y is the paper's over lam: its step a there is a lam here.
        multiplier: lam, a number or a schedule of the update; the bias is O(1 / lam).
        inner_steps: T, all on one draw.

    Returns:
        A solver whose ``vars.inner`` holds w, and ``vars.aux`` y.

    Raises:
        TypeError, ValueError: as `bome`.

    Cost of an update: T + 2 inner gradients and one outer gradient pair.

    Reference: Shen, Chen, "On penalty-based bilevel gradient descent method", ICML 2023, arXiv 2302.05185.

    Example:
        >>> import optax
        >>> problem = Problem(lambda z, x, a: ((z - x) ** 2).sum(), lambda z, x, b: (z**2).sum())
        >>> pbgd(problem, Vars(*map(optax.sgd, (0.1, 0.1, 0.1)))).draws
        2
    """
    return _ahead(problem, opts, penalty(problem, multiplier), inner_steps)


def _ahead(problem: Problem, opts: Vars, oracle: Any, inner_steps: int) -> Solver:
    """w starts at y, takes its steps on g, and stands for the inner solution while y and x move together."""
    checks.positive_int("inner_steps", inner_steps)
    opts = three(opts)
    return sweep(
        assign(lambda vars: vars._replace(inner=vars.aux)),
        descend(implicit(problem), Vars(inner=opts.inner), steps=inner_steps, fresh=False, restart=True),
        descend(oracle, opts._replace(inner=None)),
        aux=same,
    )


def bvfim(
    problem: Problem,
    opts: Vars,
    *,
    inner_steps: int = 10,
    regularisation: Schedule = lambda k: 1.01**-k,
    strength: Schedule = lambda k: (k + 1.0) ** -0.25,
    slack: Schedule = lambda k: (k + 1.0) ** -0.5,
) -> Solver:
    """BVFIM: z by T steps on ``g + mu |z|^2 / 2``; y, from z, by T steps on f and a logarithmic barrier; then x.

    The barrier, ``-tau log(sigma + min (g + mu |.|^2 / 2) - g(y))``, keeps y near the inner solutions; no second derivatives,
    and no single solution needed.

    Args:
        problem: inner and outer loss.
        opts: optax transformations of z, y and x.  The curvature that y meets grows like the multiplier of g, at most 10 tau /
            sigma: its steps must fall with that, or be small from the start.
        inner_steps: T, all on one draw.
        regularisation, strength, slack: mu, tau and sigma, numbers or schedules of the update that fall to 0, sigma faster
            than tau.  In the paper's toy experiments all fall like 1.01^-k: then 10 tau / sigma does not grow, and x keeps the
            bias of a penalty of that size.

    Returns:
        A deterministic solver: use it on all the data.  ``vars.inner`` holds z, and ``vars.aux`` y, which is the answer.

    Raises:
        TypeError, ValueError: for optimisers that are missing, and numbers out of range.

    Cost of an update: 3 T + 2 inner gradients and T + 1 outer gradient pairs.

    Reference: Liu, Liu, Yuan, Zeng, Zhang, "A value-function-based interior-point method for non-convex bi-level optimization",
    ICML 2021, arXiv 2106.07991.  Deviations: one mu for both levels; `bilevel_jax.value_oracles.interior` goes on as its
    tangent beyond the boundary.

    Example:
        >>> import optax
        >>> problem = Problem(lambda z, x, a: ((z - x) ** 2).sum(), lambda z, x, b: (z**2).sum())
        >>> bvfim(problem, Vars(*map(optax.sgd, (0.1, 0.1, 0.1)))).cost.draw.inner_gradient
        32.0
    """
    return _by_value(problem, opts, interior(strength, slack), regularisation, inner_steps)


def bvfsm(
    problem: Problem,
    opts: Vars,
    *,
    inner_steps: int = 10,
    regularisation: Schedule = lambda k: 1.01**-k,
    width: Schedule = lambda k: (k + 1.0) ** -0.5,
) -> Solver:
    """BVFSM with the quadratic penalty: `bvfim` with ``max(gap, 0)^2 / (2 sigma)`` in place of the barrier.

    Args:
        problem, opts, inner_steps, regularisation: as for `bvfim`; the curvature that y meets grows as sigma falls.
        width: sigma, a number or a schedule of the update that falls to 0; the bias of x falls with it.

    Returns, Raises, Cost of an update: as `bvfim`.

    Reference: Liu, Liu, Zeng, Zhang, Zhang, "Value-function-based sequential minimization for bi-level optimization", TPAMI
    2023, arXiv 2110.04974.  Its other penalties are one function each: see `bilevel_jax.value_oracles.value_function`.

    Example:
        >>> import optax
        >>> problem = Problem(lambda z, x, a: ((z - x) ** 2).sum(), lambda z, x, b: (z**2).sum())
        >>> bvfsm(problem, Vars(*map(optax.sgd, (0.1, 0.1, 0.1)))).draws
        3
    """
    return _by_value(problem, opts, quadratic(width), regularisation, inner_steps)


def _by_value(problem: Problem, opts: Vars, slope: Any, regularisation: Schedule, inner_steps: int) -> Solver:
    checks.positive_int("inner_steps", inner_steps)
    opts, move = three(opts), partial(descend, value_function(problem, slope, regularisation))
    loop = partial(move, steps=inner_steps, fresh=False, restart=True)
    return sweep(
        loop(Vars(inner=opts.inner)),
        assign(lambda vars: vars._replace(aux=vars.inner)),
        loop(Vars(aux=opts.aux)),
        move(Vars(outer=opts.outer)),
        aux=same,
    )
