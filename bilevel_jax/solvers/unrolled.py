"""Unrolled solvers: the inner problem is replaced by some steps on it, and the derivative goes through them."""

from bilevel_jax import checks
from bilevel_jax.hypergrad import gaussian
from bilevel_jax.solvers.steps import two
from bilevel_jax.stages import unroll
from bilevel_jax.sweep import sweep
from bilevel_jax.types import Problem, Solver, Vars


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
        truncate, checkpoint: as for `bilevel_jax.hypergrad.iterative`.
        fresh: whether every inner step takes a draw of its own; the paper's method is deterministic.

    Raises:
        TypeError, ValueError: for optimisers that are missing or not wanted, and counts out of range.

    Cost of an update: D inner gradients, as many Hessian-vector and cross products as are differentiated, one outer gradient
    pair.

    Reference: Ji, Yang, Liang, "Bilevel optimization: convergence analysis and enhanced design", ICML 2021, arXiv 2010.07962,
    Algorithm 1.

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
    return sweep(unroll(problem, two(opts), inner_steps, truncate=0, jacobian=estimate, fresh=fresh))
