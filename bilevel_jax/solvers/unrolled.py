"""Unrolled solvers: the inner problem is replaced by some steps on it, and the derivative goes through them."""

from bilevel_jax import checks
from bilevel_jax.hypergrad import gaussian
from bilevel_jax.oracles import aggregated
from bilevel_jax.solvers.steps import three, two
from bilevel_jax.stages import unroll
from bilevel_jax.sweep import same, sweep
from bilevel_jax.types import Problem, Schedule, Solver, Vars


def itd_bio(
    problem: Problem,
    opts: Vars,
    *,
    inner_steps: int = 10,
    truncate: int | None = None,
    checkpoint: str = "sqrt",
    fresh: bool = False,
) -> Solver:
    """ITD-BiO: D inner steps from the last z, one outer step along the derivative of f through them.

    The bias (1 - a mu)^D of a hypergradient through D steps of size a does not vanish with the sweeps.

    Args:
        problem: inner and outer loss.
        opts: optax transformations of z and x; aux None.  Paper: constant steps, at most 1/L for z.
        inner_steps: D.
        truncate, checkpoint: as for `bilevel_jax.hypergrad.iterative`.  A derivative through a run is truncated, too: it goes
            through the last ``truncate`` steps of each path.
        fresh: whether every inner step takes a draw of its own; the paper's method is deterministic.

    Raises:
        TypeError, ValueError: for optimisers that are missing or not wanted, and counts out of range.

    Cost of an update: D inner gradients, as many Hessian-vector and cross products as are differentiated, one outer gradient
    pair.

    Reference: Ji, Yang, Liang, "Bilevel optimization: convergence analysis and enhanced design", ICML 2021, arXiv 2010.07962
    (ITD-BiO).

    Example:
        >>> import jax, optax
        >>> from bilevel_jax import run, samplers, testing
        >>> q = testing.quadratic(jax.random.key(0))
        >>> solver = itd_bio(q.problem, Vars(inner=optax.sgd(1.0), outer=optax.sgd(0.3)), inner_steps=60)
        >>> _, history = run(solver, samplers.full(), q.start, q.data, jax.random.key(1), steps=60, metrics=q.metrics)
        >>> bool(history["gradient_norm"][-1] < 1e-4 * history["gradient_norm"][0])
        True
    """
    checks.positive_int("inner_steps", inner_steps)
    return sweep(unroll(problem, two(opts), inner_steps, truncate=truncate, checkpoint=checkpoint, fresh=fresh))


def fo_itd_bio(problem: Problem, opts: Vars, *, inner_steps: int = 10, fresh: bool = False) -> Solver:
    """First-order ITD-BiO: the outer step goes along ``d_x f(z^D, x)`` alone, as if z^D did not depend on x.

    Args:
        problem, opts, inner_steps, fresh: as for `itd_bio`.

    Raises:
        TypeError, ValueError: as for `itd_bio`; (in ``init``) for an outer loss that does not depend on x directly.

    Cost of an update: D inner gradients and one outer gradient pair.

    Reference: Ji, Yang, Liang, ICML 2021, arXiv 2010.07962, experiments.

    Example:
        >>> import optax
        >>> problem = Problem(lambda z, x, a: ((z - x) ** 2).sum(), lambda z, x, b: ((z - x) ** 2).sum())
        >>> fo_itd_bio(problem, Vars(inner=optax.sgd(0.1), outer=optax.sgd(0.1))).cost.draw.hessian_vector
        0.0
    """
    return itd_bio(problem, opts, inner_steps=inner_steps, truncate=0, fresh=fresh)


def pzobo(
    problem: Problem,
    opts: Vars,
    *,
    inner_steps: int = 10,
    directions: int = 1,
    radius: float = 1e-2,
    fresh: bool = False,
) -> Solver:
    """PZOBO: `itd_bio` with the Jacobian of the inner steps estimated by differences of whole paths along Gaussian directions.

    Args:
        problem, opts, inner_steps: as for `itd_bio`.
        directions, radius: see `bilevel_jax.hypergrad.gaussian`; the noise is about dim x / directions of the squared gradient.
        fresh: whether every inner step takes a draw of its own, the same for all paths (PZOBO-S).

    Raises:
        TypeError, ValueError: as for `itd_bio`.

    Cost of an update: (directions + 1) D inner gradients and one outer gradient pair.

    Reference: Sow, Ji, Liang, "On the convergence theory for Hessian-free bilevel algorithms", NeurIPS 2022, arXiv 2110.07004.
    The directions are not normalised: see `bilevel_jax.hypergrad.gaussian`.

    Example:
        >>> import optax
        >>> problem = Problem(lambda z, x, a: ((z - x) ** 2).sum(), lambda z, x, b: (z**2).sum())
        >>> pzobo(problem, Vars(inner=optax.sgd(0.1), outer=optax.sgd(0.1)), directions=3).cost.draw.inner_gradient
        40.0
    """
    checks.positive_int("inner_steps", inner_steps)
    estimate = gaussian(directions, radius)
    return sweep(unroll(problem, two(opts), inner_steps, checkpoint="none", jacobian=estimate, fresh=fresh))


def bda(
    problem: Problem,
    opts: Vars,
    *,
    inner_steps: int = 10,
    weight: Schedule = lambda k: 0.5 / (k + 1.0),
    fresh: bool = False,
) -> Solver:
    """BDA: D inner steps along ``(1 - mu_k) d_z g + mu_k d_z f``, always from one start; x along the derivative through them.

    Where g has several minimisers in z, the aggregated steps lead to the one that f prefers; plain unrolling stays at the
    component of its start that g does not see.

    Args:
        problem: inner and outer loss.
        opts: optax transformations of z and x; aux None.
        inner_steps: D.
        weight: mu of inner step k = 0, 1, ..., a number in [0, 1] or a schedule that falls to 0, clipped to [0, 1]; paper:
            ~ 1 / (k + 1).
        fresh: whether every inner step takes a draw of its own; the paper's method is deterministic.

    Returns:
        A solver whose ``vars.aux`` holds the start of the path: z_0, unless it is given.

    Raises:
        TypeError, ValueError: for optimisers that are missing or not wanted, and numbers out of range.

    Cost of an update: D inner gradients, D Hessian-vector and D cross products, D + 1 outer gradient pairs (and D products with
    the second derivatives of f, which are not counted).

    Reference: Liu, Mu, Yuan, Zeng, Zhang, "A generic first-order algorithmic framework for bi-level programming beyond
    lower-level singleton", ICML 2020, arXiv 2006.04045.

    Example:
        >>> import optax
        >>> problem = Problem(lambda z, x, a: ((z - x) ** 2).sum(), lambda z, x, b: (z**2).sum())
        >>> bda(problem, Vars(inner=optax.sgd(0.1), outer=optax.sgd(0.1)), inner_steps=3).cost.draw.outer_gradient
        4.0
    """
    checks.positive_int("inner_steps", inner_steps)
    from_start = unroll(
        problem, two(opts), inner_steps, direction=aggregated(problem, weight), start=lambda vars: vars.aux, fresh=fresh
    )
    return sweep(from_start, aux=same)


def iaptt(problem: Problem, opts: Vars, *, inner_steps: int = 10, pessimistic: bool = True, fresh: bool = False) -> Solver:
    """IAPTT: D inner steps from a learned start z_0; x and z_0 along the derivative of f at the worst iterate of the path.

    ``min over (x, z_0) of max_{1 <= k <= D} f(z_k(x, z_0), x)``: the start makes up for the local minima of a nonconvex g, and
    the maximum keeps f honest at iterates that have not converged.

    Args:
        problem: inner and outer loss.
        opts: optax transformations of z, z_0 (as aux) and x.
        inner_steps: D.
        pessimistic: False takes the last iterate instead: the learned start alone.
        fresh: whether every inner step takes a draw of its own; the paper's method is deterministic.

    Returns:
        A solver whose ``vars.aux`` holds z_0, which starts at z unless it is given, and ``vars.inner`` the iterate chosen.

    Raises:
        TypeError, ValueError: for optimisers that are missing, and numbers out of range.

    Cost of an update: D inner gradients, D Hessian-vector and D cross products, D + 1 outer gradient pairs (D of them values).

    Reference: Liu, Liu, Zeng, Zhang, "Towards gradient-based bilevel optimization with non-convex followers and beyond",
    NeurIPS 2021, arXiv 2110.00455.

    Example:
        >>> import optax
        >>> problem = Problem(lambda z, x, a: ((z - x) ** 2).sum(), lambda z, x, b: (z**2).sum())
        >>> iaptt(problem, Vars(*map(optax.sgd, (0.1, 0.1, 0.1))), inner_steps=3).cost.draw.outer_gradient
        4.0
    """
    checks.positive_int("inner_steps", inner_steps)
    path = unroll(problem, three(opts), inner_steps, start=lambda vars: vars.aux, pessimistic=pessimistic, fresh=fresh)
    return sweep(path, aux=same)
