"""Double-loop solvers: z by several steps, v by a linear solver, then x.

They move z and x with the optimisers given (``opts.aux`` stays None: v is solved for), in sweeps that read like their papers:
inner steps, linear system, outer step, each at the variables that the last one left.  Stochastic ones take a draw of their own
for every gradient and every Hessian-vector product.
"""

from collections.abc import Callable
from typing import Any

from bilevel_jax import checks
from bilevel_jax.linear_solve import LinearSolver, cg, neumann, random_neumann, richardson
from bilevel_jax.oracles import implicit
from bilevel_jax.solvers.steps import two
from bilevel_jax.stages import solve_aux, solve_inner
from bilevel_jax.sweep import descend, sweep
from bilevel_jax.types import Problem, Schedule, Solver, Vars


def aid_bio(
    problem: Problem, opts: Vars, *, inner_steps: int = 10, linear_solver: LinearSolver | None = None, warm: bool = True
) -> Solver:
    """AID-BiO: D inner steps, N steps of a linear solver for v, one outer step; z and v start where they were.

    Args:
        problem: inner and outer loss.
        opts: optax transformations of z and x; aux None.  Paper: constant steps, at most 1/L for z.  That of z starts anew,
            momentum and counts of schedules, in every sweep.
        inner_steps: D, of the order of the condition number in theory; all on one draw.
        linear_solver: by default ten steps of conjugate gradients; ``richardson(steps=N, rate=...)`` is AID-FP.
        warm: whether v starts where it was.  From 0 a small number of steps stalls at a biased point.

    Raises:
        TypeError, ValueError: for optimisers that are missing or not wanted, and numbers out of range.

    Cost of an update: D inner gradients, the applications of the solver (13 at most by default), one cross product, two outer
    gradient pairs.

    Reference: Ji, Yang, Liang, "Bilevel optimization: convergence analysis and enhanced design", ICML 2021, arXiv 2010.07962
    (AID-BiO).

    Example:
        >>> import jax, optax
        >>> from bilevel_jax import run, samplers, testing
        >>> q = testing.quadratic(jax.random.key(0))
        >>> solver = aid_bio(q.problem, Vars(inner=optax.sgd(1.0), outer=optax.sgd(0.3)))
        >>> _, history = run(solver, samplers.full(), q.start, q.data, jax.random.key(1), steps=60, metrics=q.metrics)
        >>> bool(history["gradient_norm"][-1] < 2e-4 * history["gradient_norm"][0])
        True
    """
    opts, inner_steps = two(opts), checks.positive_int("inner_steps", inner_steps)
    solver = cg(max_steps=10) if linear_solver is None else linear_solver
    checks.kind("linear_solver", solver, LinearSolver, "a solver of bilevel_jax.linear_solve")
    directions = implicit(problem)
    return sweep(
        descend(directions, Vars(inner=opts.inner), steps=inner_steps, fresh=False, restart=True),
        solve_aux(problem, solver, warm=warm),
        descend(directions, Vars(outer=opts.outer)),
    )


def ba(
    problem: Problem,
    opts: Vars,
    *,
    inner_steps: Schedule = lambda t: (t + 1.0) ** 0.25,
    linear_solver: LinearSolver | None = None,
) -> Solver:
    """BA: inner steps whose number grows with the sweeps, an accurate linear solve from 0, one outer step.

    Args:
        problem, opts: as for `aid_bio`.
        inner_steps: number of inner steps of sweep t, rounded up.  The default grows like that of the paper for nonconvex h.
            (Recalled, not checked against the text: (t + 1)^1/4 / 2 for nonconvex h, (t + 1)^1/2 / 2 for convex h.)
        linear_solver: by default conjugate gradients to a relative residual of the root of the machine epsilon.

    Raises:
        TypeError, ValueError: as for `aid_bio`.

    Cost of an update: that many inner gradients (the state counts them: see `bilevel_jax.results.spent`), the applications of
    the solver, one cross product, two outer gradient pairs.

    Not reverse-differentiable: the number of inner steps is that of a `jax.lax.while_loop`.  Forward mode works.

    Reference: Ghadimi, Wang, "Approximation methods for bilevel programming", 2018, arXiv 1802.02246, the first of its
    methods, without acceleration or noise.

    Example:
        >>> import optax
        >>> problem = Problem(lambda z, x, a: ((z - x) ** 2).sum(), lambda z, x, b: (z**2).sum())
        >>> ba(problem, Vars(inner=optax.sgd(0.1), outer=optax.sgd(0.1))).draws
        3
    """
    opts = two(opts)
    if not callable(inner_steps):
        checks.positive_int("inner_steps", inner_steps)
    solver = cg(max_steps=100) if linear_solver is None else linear_solver
    checks.kind("linear_solver", solver, LinearSolver, "a solver of bilevel_jax.linear_solve")
    return sweep(
        solve_inner(problem, opts.inner, max_steps=inner_steps),
        solve_aux(problem, solver, warm=False),
        descend(implicit(problem), Vars(outer=opts.outer)),
    )


def hoag(
    problem: Problem, opts: Vars, *, tolerance: Schedule = lambda t: 0.1 / (t + 1.0) ** 2, max_steps: int = 1000
) -> Solver:
    """HOAG: inner problem and linear system solved to a tolerance that falls with the sweeps, both started where they were.

    Deviation: the step of x is that of ``opts.outer``; the paper also adapts it to the observed decrease of h.

    Args:
        problem, opts: as for `aid_bio`.
        tolerance: of ``|d_z g|`` and of ``|d2_zz g v + d_z f|`` in sweep t, summable; not differentiable.  Where it falls
            below the rounding of the gradients, every sweep takes ``max_steps``.
        max_steps: most inner steps, and most steps of conjugate gradients, in a sweep.

    Raises:
        TypeError, ValueError: as for `aid_bio`.

    Cost of an update: as many inner gradients and Hessian-vector products as the tolerance takes (declared: the most;
    counted in the state), one cross product, two outer gradient pairs.

    Not reverse-differentiable: the number of inner steps is that of a `jax.lax.while_loop`.  Forward mode works.

    Reference: Pedregosa, "Hyperparameter optimization with approximate gradient", ICML 2016, arXiv 1602.02355.

    Example:
        >>> import optax
        >>> problem = Problem(lambda z, x, a: ((z - x) ** 2).sum(), lambda z, x, b: (z**2).sum())
        >>> hoag(problem, Vars(inner=optax.sgd(0.1), outer=optax.sgd(0.1)), max_steps=50).cost.draw.inner_gradient
        51.0
    """
    opts = two(opts)
    size = tolerance if callable(tolerance) else lambda step: checks.constant("tolerance", tolerance)
    return sweep(
        solve_inner(problem, opts.inner, max_steps=max_steps, tolerance=size),
        solve_aux(problem, lambda step: cg(max_steps=max_steps, rtol=0.0, atol=size(step))),
        descend(implicit(problem), Vars(outer=opts.outer)),
    )


def bsa(problem: Problem, opts: Vars, *, rate: Schedule, inner_steps: int = 10, terms: int = 10) -> Solver:
    """BSA: inner stochastic steps, a randomly truncated Neumann product for v, one outer step.

    Args:
        problem, opts: as for `aid_bio`.  Paper: steps ~ t^-1/2.
        rate: of the Neumann product, at most 1/L; a number or a schedule of the sweep.
        inner_steps: inner steps; the paper lets their number grow with t.
        terms: Q, number of values of the random length.

    Raises:
        TypeError, ValueError: as for `aid_bio`.

    Cost of an update: ``inner_steps`` inner gradients, (terms - 1) / 2 Hessian-vector products on average, one cross product,
    two outer gradient pairs.

    Reference: Ghadimi, Wang, "Approximation methods for bilevel programming", 2018, arXiv 1802.02246, its stochastic method.
    Public code moves x before z; here z first, as in the paper.

    Example:
        >>> import optax
        >>> problem = Problem(lambda z, x, a: ((z - x) ** 2).sum(), lambda z, x, b: (z**2).sum())
        >>> bsa(problem, Vars(inner=optax.sgd(0.1), outer=optax.sgd(0.1)), rate=0.1).cost.draw.hessian_vector
        4.5
    """
    return _three(problem, opts, inner_steps, lambda a: random_neumann(terms=terms, rate=a, fresh=True), rate)


def ttsa(problem: Problem, opts: Vars, *, rate: Schedule, terms: int = 10) -> Solver:
    """TTSA: `bsa` with one inner step a sweep, and two time scales: z moves with steps ~ t^-2/5, x with ~ t^-3/5.

    Args:
        problem, opts: as for `aid_bio`; the exponents must differ, or it is another method.  A set for x is a link of its
            optimiser: see `bilevel_jax.projections`.
        rate, terms: as for `bsa`.

    Raises:
        TypeError, ValueError: as for `aid_bio`.

    Cost of an update: one inner gradient, (terms - 1) / 2 Hessian-vector products on average, one cross product, two outer
    gradient pairs.

    Reference: Hong, Wai, Wang, Yang, "A two-timescale framework for bilevel optimization: complexity analysis and application
    to actor-critic", SIAM J. Optim. 2023, arXiv 2007.05170.

    Example:
        >>> import optax
        >>> problem = Problem(lambda z, x, a: ((z - x) ** 2).sum(), lambda z, x, b: (z**2).sum())
        >>> ttsa(problem, Vars(inner=optax.sgd(0.1), outer=optax.sgd(0.1)), rate=0.1).cost.draw.inner_gradient
        1.0
    """
    return bsa(problem, opts, rate=rate, inner_steps=1, terms=terms)


def stocbio(
    problem: Problem,
    opts: Vars,
    *,
    rate: Schedule,
    inner_steps: int = 10,
    terms: int = 10,
    batches: tuple[int, ...] | None = None,
) -> Solver:
    """stocBiO: inner stochastic steps from the last z, a Neumann sum over independent batches for v, one outer step.

    Args:
        problem, opts: as for `aid_bio`.  Paper: constant steps.
        rate: eta of the sum, at most 1/L; a number or a schedule of the sweep.
        inner_steps: D.
        terms: Q, number of factors.
        batches: draws that each factor averages over, that applied first foremost; by default one.  Paper: see
            `bilevel_jax.linear_solve.nested_batches`.

    Raises:
        TypeError, ValueError: as for `aid_bio`.

    Cost of an update: D inner gradients, ``terms`` Hessian-vector products (or the sum of ``batches``), one cross product,
    two outer gradient pairs.

    Reference: Ji, Yang, Liang, "Bilevel optimization: convergence analysis and enhanced design", ICML 2021, arXiv 2010.07962
    (stocBiO).  The sum has all its terms and its factor, and every factor its own batch; public code of the authors
    has neither.  Deviation: d_x f is taken on the sample of the cross product, not on that of d_z f.

    Example:
        >>> import optax
        >>> problem = Problem(lambda z, x, a: ((z - x) ** 2).sum(), lambda z, x, b: (z**2).sum())
        >>> tuple(stocbio(problem, Vars(inner=optax.sgd(0.1), outer=optax.sgd(0.1)), rate=0.1, terms=5).cost.draw)
        (10.0, 5.0, 1.0, 2.0)
    """
    make = lambda eta: neumann(terms=terms, rate=eta, fresh=True, batches=batches)  # noqa: E731
    return _three(problem, opts, inner_steps, make, rate)


def amigo(problem: Problem, opts: Vars, *, aux_rate: Schedule, inner_steps: int = 10, aux_steps: int = 10) -> Solver:
    """AmIGO: inner stochastic steps on z, stochastic gradient steps on v with one right-hand side, one outer step; all warm.

    Args:
        problem, opts: as for `aid_bio`.
        aux_rate: step size of v; a number or a schedule of the sweep.
        inner_steps, aux_steps: T and N.

    Raises:
        TypeError, ValueError: as for `aid_bio`.

    Cost of an update: T inner gradients, N Hessian-vector products, one cross product, two outer gradient pairs.

    Reference: Arbel, Mairal, "Amortized implicit differentiation for stochastic bilevel optimization", ICLR 2022, arXiv
    2111.14580.

    Example:
        >>> import optax
        >>> problem = Problem(lambda z, x, a: ((z - x) ** 2).sum(), lambda z, x, b: (z**2).sum())
        >>> tuple(amigo(problem, Vars(inner=optax.sgd(0.1), outer=optax.sgd(0.1)), aux_rate=0.1).cost.draw)
        (10.0, 10.0, 1.0, 2.0)
    """
    checks.positive_int("aux_steps", aux_steps)
    return _three(problem, opts, inner_steps, lambda a: richardson(steps=aux_steps, rate=a, fresh=True), aux_rate)


def _three(problem: Problem, opts: Vars, inner_steps: int, make: Callable[[Any], LinearSolver], rate: Schedule) -> Solver:
    """Inner steps, linear system, outer step, each on draws of its own."""
    opts, directions, inner_steps = two(opts), implicit(problem), checks.positive_int("inner_steps", inner_steps)
    linear = (lambda step: make(rate(step))) if callable(rate) else make(rate)
    return sweep(
        descend(directions, Vars(inner=opts.inner), steps=inner_steps),
        solve_aux(problem, linear),
        descend(directions, Vars(outer=opts.outer)),
    )
