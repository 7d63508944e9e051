"""Single-loop solvers with second-order oracles: SOBA and its relatives, each a composition that reads like its paper.

All move z, v and x together along the three directions of `bilevel_jax.oracles.implicit` (or another oracle of the same
kind, given as ``oracle``), and share one signature, ``name(problem, opts, *, own parameters)``.  `default_opts` gives the
step sizes of the papers.
"""

from collections.abc import Callable

import optax

from bilevel_jax import checks
from bilevel_jax.estimators import page, saga, sarah, storm
from bilevel_jax.optimisers import moving_average
from bilevel_jax.oracles import aggregated, implicit
from bilevel_jax.solvers.steps import three
from bilevel_jax.sweep import descend, sweep
from bilevel_jax.types import Oracle, Problem, Schedule, Solver, Vars

MakeOracle = Callable[[Problem], Oracle]


def soba(problem: Problem, opts: Vars, *, oracle: MakeOracle = implicit) -> Solver:
    """SOBA: ``z -= a Dz; v -= a Dv; x -= c Dx``, all three at the old point, on one inner and one outer draw.

    Args:
        problem: inner and outer loss.
        opts: optax transformations of z, v and x.  Paper: sgd with steps ~ t^-1/2 (the submitted version: t^-2/5 for z and
            v, t^-3/5 for x), the same for z and v because they share one conditioning.
        oracle: `implicit`, or ``functools.partial(implicit, mode="forward")``.

    Raises:
        TypeError, ValueError: for an optimiser that is missing for one of the variables.

    Cost of an update: one inner gradient, one Hessian-vector product, one cross product, one outer gradient pair.

    Reference: Dagréou, Ablin, Vaiter, Moreau, "A framework for bilevel optimization that enables stochastic and global
    variance reduction algorithms", NeurIPS 2022, arXiv 2201.13409.

    Example:
        >>> import jax
        >>> from bilevel_jax import run, samplers, testing
        >>> from bilevel_jax.solvers import default_opts
        >>> q = testing.quadratic(jax.random.key(0))
        >>> solver = soba(q.problem, default_opts(soba, 0.3, 0.3, 0.15))
        >>> carry, _ = run(solver, samplers.uniform(4), q.start, q.data, jax.random.key(1), steps=100)
        >>> int(carry.state.step), solver.cost.draw.hessian_vector
        (100, 1.0)
    """
    return sweep(descend(oracle(problem), three(opts)))


def ma_soba(problem: Problem, opts: Vars, *, theta: Schedule = 0.1, oracle: MakeOracle = implicit) -> Solver:
    """MA-SOBA: SOBA whose x moves along a moving average, ``d <- (1 - theta) d + theta Dx``.

    Deviation: x moves along the *new* average, the paper's x along the previous one (a shift by one step, which lets the
    average be an ordinary optax link).  With ``theta = 1`` this is SOBA, exactly.

    Args:
        problem, opts, oracle: as for `soba`.  Paper: steps ~ t^-1/2.
        theta: weight of the new direction, in (0, 1], or a schedule, clipped to [0, 1]; the paper ties it to the step,
            theta ~ c_t.

    Raises:
        TypeError, ValueError: for a missing optimiser, and theta outside [0, 1].

    Cost of an update: as `soba`.  Memory: one more vector like x, in float32 at least.

    Reference: Chen, Xiao, Balasubramanian, "Optimal algorithms for stochastic bilevel optimization under relaxed smoothness
    conditions", JMLR 2024, arXiv 2306.12067.

    Example:
        >>> from bilevel_jax.solvers import default_opts
        >>> problem = Problem(lambda z, x, a: ((z - x) ** 2).sum(), lambda z, x, b: (z**2).sum())
        >>> ma_soba(problem, default_opts(ma_soba, 0.1, 0.1, 0.1), theta=0.2).draws
        1
    """
    checks.unit_interval("theta", theta)
    opts = three(opts)
    return sweep(descend(oracle(problem), opts._replace(outer=optax.chain(moving_average(theta), opts.outer))))


def saba(problem: Problem, opts: Vars, *, oracle: MakeOracle = implicit) -> Solver:
    """SABA: SOBA with SAGA on all three directions: constant steps, and linear convergence where h is PL.

    Args:
        problem, opts, oracle: as for `soba`.  Paper: constant steps.

    Raises:
        TypeError, ValueError: for a missing optimiser; (in ``init``) for batches without slots.

    Cost of an update: as `soba`.  Memory: ``n_b (2 p + d) + m_b (p + d)`` floats for n_b inner and m_b outer blocks, p and
    d the sizes of z and x.

    Reference: Dagréou, Ablin, Vaiter, Moreau, NeurIPS 2022, arXiv 2201.13409.  Deviations: blocks instead
    of single samples, and the weight of a ragged last block, which the public code gets wrong, is exact here.

    Example:
        >>> import jax
        >>> from bilevel_jax import run, samplers, testing
        >>> from bilevel_jax.solvers import default_opts
        >>> q = testing.quadratic(jax.random.key(0))
        >>> solver = saba(q.problem, default_opts(saba, 0.2, 0.2, 0.1))
        >>> _, history = run(solver, samplers.uniform(5), q.start, q.data, jax.random.key(1), steps=1000, metrics=q.metrics)
        >>> bool(history["gradient_norm"][-1] < 1e-3 * history["gradient_norm"][0])
        True
    """
    return sweep(descend(oracle(problem), three(opts), estimator=saga()))


def srba(problem: Problem, opts: Vars, *, period: int, oracle: MakeOracle = implicit) -> Solver:
    """SRBA: SARAH on all three directions; constant steps, (n+m)^1/2 / eps oracle calls, near-optimal for finite sums.

    Args:
        problem, opts, oracle: as for `soba`.  Paper: constant steps.
        period: updates from one full pass to the next; about (n + m) / (2 batch size) in the public benchmark.

    Raises:
        TypeError, ValueError: for a missing optimiser and for ``period`` below 1.

    Cost of an update: two of `soba`'s, and a full pass in every ``period``-th instead.

    Deviation: the theory projects v on a ball that holds v* (recalled, not checked against the text; the public code does not
    project).  For that, give v the optimiser ``optax.chain(optax.sgd(rate), project(ball(radius)))`` of
    `bilevel_jax.projections` and `bilevel_jax.nonsmooth`.

    Reference: Dagréou, Moreau, Vaiter, Ablin, "A lower bound and a near-optimal algorithm for bilevel empirical risk
    minimization", AISTATS 2024, arXiv 2302.08766.

    Example:
        >>> from bilevel_jax.solvers import default_opts
        >>> problem = Problem(lambda z, x, a: ((z - x) ** 2).sum(), lambda z, x, b: (z**2).sum())
        >>> srba(problem, default_opts(srba, 0.1, 0.1, 0.1), period=10).cost.full.cross
        0.1
    """
    return sweep(descend(oracle(problem), three(opts), estimator=sarah(period)))


def spaba(problem: Problem, opts: Vars, *, probability: float, oracle: MakeOracle = implicit) -> Solver:
    """SPABA: SRBA whose full passes are decided by a coin (PAGE).

    Args:
        problem, opts, oracle: as for `soba`.  Paper: constant steps.
        probability: of a full pass; about batch / (batch + n + m).

    Raises:
        TypeError, ValueError: for a missing optimiser and a probability outside [0, 1].

    Cost of an update: with the given probability a full pass, otherwise two of `soba`'s.  Under `jax.vmap` over keys every
    update pays the full pass: loop over seeds with `jax.lax.map`.

    Deviation: as in `srba`, v is not projected on a ball.

    Reference: Chu, Xu, Yao, Zhang, "SPABA: a single-loop and probabilistic stochastic bilevel algorithm achieving optimal
    sample complexity", ICML 2024, arXiv 2405.18777.

    Example:
        >>> from bilevel_jax.solvers import default_opts
        >>> problem = Problem(lambda z, x, a: ((z - x) ** 2).sum(), lambda z, x, b: (z**2).sum())
        >>> spaba(problem, default_opts(spaba, 0.1, 0.1, 0.1), probability=0.25).cost.draw.cross
        1.5
    """
    return sweep(descend(oracle(problem), three(opts), estimator=page(probability)))


def storm_soba(
    problem: Problem, opts: Vars, *, eta: Schedule = lambda t: (t + 1.0) ** (-2 / 3), oracle: MakeOracle = implicit
) -> Solver:
    """SOBA with STORM on all three directions: the fully single-loop relative of SUSTAIN.

    Args:
        problem, opts, oracle: as for `soba`.  Theory: steps ~ t^-1/3.
        eta: weight of the plain direction, a number in [0, 1] or a schedule; theory: t^-2/3.  1 is SOBA, exactly.

    Raises:
        TypeError, ValueError: for a missing optimiser and eta outside [0, 1].

    Cost of an update: two of `soba`'s.

    Reference: no single paper; the estimator is that of Cutkosky, Orabona, "Momentum-based variance reduction in non-convex
    SGD", NeurIPS 2019, arXiv 1905.10018.

    Example:
        >>> from bilevel_jax.solvers import default_opts
        >>> problem = Problem(lambda z, x, a: ((z - x) ** 2).sum(), lambda z, x, b: (z**2).sum())
        >>> storm_soba(problem, default_opts(storm_soba, 0.1, 0.1, 0.1)).cost.draw.inner_gradient
        2.0
    """
    return sweep(descend(oracle(problem), three(opts), estimator=storm(eta)))


def fsla(
    problem: Problem, opts: Vars, *, eta: Schedule = lambda t: (t + 1.0) ** (-1 / 2), oracle: MakeOracle = implicit
) -> Solver:
    """FSLA: z, then v at the new z, then x at the new (z, v) along a STORM estimate; each on a draw of its own.

    The estimate starts at the first direction, where public code starts it at zero.

    Args:
        problem, opts, oracle: as for `soba`.  Paper: all steps ~ t^-1/2.
        eta: weight of the plain direction of x, a number in [0, 1] or a schedule; paper: t^-1/2.

    Raises:
        TypeError, ValueError: for a missing optimiser and eta outside [0, 1].

    Cost of an update: one inner gradient, one Hessian-vector product, two cross products, three outer gradient pairs.

    Reference: Li, Gu, Huang, "A fully single loop algorithm for bilevel optimization without Hessian inverse", AAAI 2022,
    arXiv 2112.04660.

    Example:
        >>> from bilevel_jax.solvers import default_opts
        >>> problem = Problem(lambda z, x, a: ((z - x) ** 2).sum(), lambda z, x, b: (z**2).sum())
        >>> tuple(fsla(problem, default_opts(fsla, 0.1, 0.1, 0.1)).cost.draw)
        (1.0, 1.0, 2.0, 3.0)
    """
    opts, directions = three(opts), oracle(problem)
    return sweep(
        descend(directions, Vars(inner=opts.inner)),
        descend(directions, Vars(aux=opts.aux)),
        descend(directions, Vars(outer=opts.outer), estimator=storm(eta)),
    )


def sl_bamm(problem: Problem, opts: Vars, *, weight: Schedule = lambda t: 0.1 * (t + 1.0) ** -0.25) -> Solver:
    """sl-BAMM: SOBA on the inner loss ``(1 - mu_t) g + mu_t f``, which needs f, not g, strongly convex in z.

    Args:
        problem, opts: as for `soba`.  Paper: all three steps fall with the weight; `default_opts` makes constant ones.
        weight: mu_t in [0, 1], a number or a schedule, clipped to [0, 1]; paper: falling like (t + 1)^-e.

    Raises:
        TypeError, ValueError: for a missing optimiser and a weight outside [0, 1].

    Cost of an update: one inner gradient, one Hessian-vector product, one cross product and two outer gradient pairs, the
    second for the products with the second derivatives of f.

    Reference: Liu, Liu, Yao, Zeng, Zhang, "Averaged method of multipliers for bi-level optimization without lower-level strong
    convexity", ICML 2023, arXiv 2302.03407.

    Example:
        >>> from bilevel_jax.solvers import default_opts
        >>> problem = Problem(lambda z, x, a: ((z - x) ** 2).sum(), lambda z, x, b: (z**2).sum())
        >>> tuple(sl_bamm(problem, default_opts(sl_bamm, 0.1, 0.1, 0.1)).cost.draw)
        (1.0, 1.0, 1.0, 2.0)
    """
    return sweep(descend(aggregated(problem, weight), three(opts)))
