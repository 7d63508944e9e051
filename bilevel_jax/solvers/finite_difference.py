"""Single-loop methods by differences of gradients in place of Hessian-vector products, with v in a ball."""

from functools import partial

import optax

from bilevel_jax.nonsmooth import ball
from bilevel_jax.oracles import finite_difference
from bilevel_jax.projections import project
from bilevel_jax.solvers.single_loop import soba, storm_soba
from bilevel_jax.solvers.steps import three
from bilevel_jax.types import Problem, Schedule, Solver, Vars


def hjfbio(problem: Problem, opts: Vars, *, radius: float, scale: float | None = None) -> Solver:
    """HJFBiO: SOBA whose second derivatives are central differences of gradients, and whose v stays in a ball.

    Args:
        problem: inner and outer loss.
        opts: optax transformations of z, v and x.  Paper: constant steps.
        radius: of the ball of v, at least |v*|; theory: C_f / mu, a bound on |d_z f| over the strong convexity (PL constant).
        scale: of the differences: see `bilevel_jax.oracles.finite_difference`.

    Raises:
        TypeError, ValueError: for optimisers that are missing, and numbers that are not positive.

    Cost of an update: three inner gradients (two of them in z and x), one outer gradient pair.

    Reference: Huang, "Optimal Hessian/Jacobian-free nonconvex-PL bilevel optimization", ICML 2024, arXiv 2407.17823.

    Example:
        >>> problem = Problem(lambda z, x, a: ((z - x) ** 2).sum(), lambda z, x, b: (z**2).sum())
        >>> hjfbio(problem, Vars(*map(optax.sgd, (0.1, 0.1, 0.1))), radius=10.0).cost.draw.hessian_vector
        0.0
    """
    return soba(problem, _in_ball(opts, radius), oracle=partial(finite_difference, scale=scale))


def fdehbo(
    problem: Problem,
    opts: Vars,
    *,
    radius: float,
    eta: Schedule = lambda t: (t + 1.0) ** (-2 / 3),
    scale: float | None = None,
) -> Solver:
    """FdeHBO: `hjfbio` with STORM on all three directions.

    Args:
        problem, opts, radius, scale: as for `hjfbio`.  Theory: steps ~ t^-1/3.
        eta: weight of the plain direction, a number in [0, 1] or a schedule; theory: t^-2/3.

    Raises:
        TypeError, ValueError: as `hjfbio`; for eta outside [0, 1].

    Cost of an update: two of `hjfbio`'s.

    Reference: Yang, Xiao, Ji, "Achieving O(eps^-1.5) complexity in Hessian/Jacobian-free stochastic bilevel optimization",
    NeurIPS 2023, arXiv 2312.03807.

    Example:
        >>> problem = Problem(lambda z, x, a: ((z - x) ** 2).sum(), lambda z, x, b: (z**2).sum())
        >>> fdehbo(problem, Vars(*map(optax.sgd, (0.1, 0.1, 0.1))), radius=10.0).cost.draw.inner_gradient
        6.0
    """
    return storm_soba(problem, _in_ball(opts, radius), eta=eta, oracle=partial(finite_difference, scale=scale))


def _in_ball(opts: Vars, radius: float) -> Vars:
    """v is projected after each of its steps."""
    opts = three(opts)
    return opts._replace(aux=optax.chain(opts.aux, project(ball(radius))))
