"""Linear systems ``A u = b`` with the matrix given as a function: ``solve(matvec, rhs, guess=None, key=None) -> (u, Stats)``.

In a bilevel problem ``A = d2_zz g`` and ``b = -d_z f``, and the solution is the v of the library's signs.  What a solver meets
in the numbers never raises: it returns a code, a residual, and a solution without NaN.

Deterministic solvers are differentiated implicitly, ``du = A^-1 (db - dA u)`` with the same solver started at 0: forward and
reverse, to any order, in the right-hand side and in whatever ``matvec`` closes over, but not in the guess.  Stochastic ones
(fresh samples, or a key) are differentiated as they are written.

Iterates and scalars are kept in float32 at least; ``matvec`` is given the dtypes of ``rhs``.  On accelerators that round the
factors of float32 products, solve under ``jax.default_matmul_precision("highest")``: rounded products are not symmetric.
"""

import importlib
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.flatten_util import ravel_pytree

from bilevel_jax import checks
from bilevel_jax.results import Result, all_finite
from bilevel_jax.types import Array, PyTree


class Stats(NamedTuple):
    """How a solve ended."""

    code: Array  # int32 [], a `bilevel_jax.Result`
    residual: Array  # float [], |A u - b|_2 recomputed at the end, where the solver does not call it an estimate
    steps: Array  # int32 [], applications of A that were done


class LinearSolver(NamedTuple):
    """``solve(matvec, rhs, guess=None, key=None) -> (solution, Stats)``, pytrees in the structure and dtypes of ``rhs``.

    With ``draws > 0`` the solver calls ``matvec(u, k)``, k = 0, ..., draws - 1, so that every application can use a sample of
    its own; otherwise it calls ``matvec(u)``.
    """

    solve: Callable[..., tuple[PyTree, Stats]]
    applications: float  # of A in a call, on average or at most; nan where that depends on the system
    draws: int = 0


class _CG(NamedTuple):
    u: Array  # float [n], iterate
    r: Array  # float [n], b - A u, by recursion
    p: Array  # float [n], direction
    rr: Array  # float [], r'r
    scale: Array  # float [], largest |A p| / |p| seen, a lower bound of |A|
    best: Array  # float [n], the iterate of smallest true residual, among those checked
    least: Array  # float [], that residual
    residual: Array  # float [], the true residual at the last check
    failures: Array  # int32 [], checks since the true residual halved that had been asked for by the recursive one
    steps: Array  # int32 []
    total: Array  # int32 [], applications of A
    code: Array  # int32 [], -1 as long as nothing has happened
    checking: Array  # bool [], whether A goes to the iterate next (check), or to the direction (step)
    done: Array  # bool []


def cg(*, max_steps: int, rtol: Any = None, atol: Any = 0.0, damping: Any = 0.0, check_every: int = 50) -> LinearSolver:
    """Conjugate gradients for a symmetric positive definite A: ``|A u - b| <= atol + rtol |b|``, tested on the true residual.

    A small fixed ``max_steps`` is a normal use (AID): MAX_STEPS_REACHED is then information.  Every pass of the loop applies
    A once, to the direction (a step) or to the iterate (a check), so that under `jax.vmap` no lane pays for another's checks.

    Args:
        max_steps: most steps.
        rtol, atol: relative and absolute tolerance; numbers, traced ones too.  rtol: by default the square root of the
            machine epsilon of ``rhs``.
        damping: d >= 0 of ``(A + d I) u = b``.
        check_every: steps from one check of the true residual to the next; the guess and the end are always checked.

    Returns:
        A solver.  Codes: SUCCESSFUL; MAX_STEPS_REACHED (last iterate); NEGATIVE_CURVATURE (``p'Ap <= eps |A| |p|^2``:
        the iterate before the step, however small its residual); STAGNATION (three times the residual of the recursion met the
        tolerance and the true one did not: the best iterate); BREAKDOWN (a scalar under- or overflowed); NONFINITE (A gave
        NaN: the last finite iterate).  A right-hand side of 0 gives 0, whatever the guess.

    Raises:
        TypeError, ValueError: for numbers out of range; (when traced) if the guess or ``matvec(u)`` is not shaped like rhs.

    Cost: one application a step, one for the guess, one a check.

    Reference: Hestenes, Stiefel, "Methods of conjugate gradients for solving linear systems", 1952; for bilevel problems Ji,
    Yang, Liang, "Bilevel optimization: convergence analysis and enhanced design", 2021, arXiv 2010.07962.

    Example:
        >>> u, stats = cg(max_steps=10).solve(lambda u: jnp.array([1.0, 4.0]) * u, jnp.ones(2))
        >>> u.round(6).tolist(), Result(int(stats.code)).name, int(stats.steps)
        ([1.0, 0.25], 'SUCCESSFUL', 3)
    """
    checks.positive_int("max_steps", max_steps)
    checks.positive_int("check_every", check_every)
    _numbers(zero=True, rtol=0.0 if rtol is None else rtol, atol=atol, damping=damping)
    rtol, atol = _still((rtol, atol))

    def iterate(A: Any, b: Array, guess: Array | None, eps: float, key: Any) -> tuple[Array, Stats]:
        del key
        rr = _dot(b, b)
        target = _cast(atol, rr) + _cast(eps**0.5 if rtol is None else rtol, rr) * _norm(b)

        def step(s: _CG, Ap: Array) -> _CG:
            pAp, pp = _dot(s.p, Ap), _dot(s.p, s.p)
            scale = jnp.maximum(s.scale, jnp.sqrt(_dot(Ap, Ap) / pp))
            alpha = s.rr / pAp
            u, r = s.u + alpha * s.p, s.r - alpha * Ap
            rr = _dot(r, r)
            p = r + rr / s.rr * s.p
            scalars = (s.rr > 0) & (pp > 0) & jnp.isfinite(s.rr + pp + pAp)
            code = _first(
                (~all_finite(Ap), Result.NONFINITE),
                (~scalars, Result.BREAKDOWN),
                (pAp <= eps * scale * pp, Result.NEGATIVE_CURVATURE),
                (~(jnp.isfinite(rr) & all_finite((u, p))), Result.BREAKDOWN),
                (s.steps + 1 >= max_steps, Result.MAX_STEPS_REACHED),
                default=s.code,
            )
            check = (jnp.sqrt(rr) <= target) | ((s.steps + 1) % check_every == 0) | (code >= 0)
            new = s._replace(u=u, r=r, p=p, rr=rr, scale=scale, steps=s.steps + 1)
            new = _where(code > Result.MAX_STEPS_REACHED, s, new)
            return new._replace(code=code, checking=check)

        def check(s: _CG, Au: Array) -> _CG:
            r = b - Au
            residual, uAu = _norm(r), _dot(s.u, Au)
            better = residual < s.least
            best, least = jnp.where(better, s.u, s.best), jnp.where(better, residual, s.least)
            claimed = jnp.where(jnp.sqrt(s.rr) <= target, s.failures + 1, s.failures)
            failures = jnp.where(residual <= s.least / 2, 0, claimed)
            code = _first(
                (s.code > Result.MAX_STEPS_REACHED, s.code),
                (~all_finite(Au), Result.NONFINITE),
                (uAu < -eps * _norm(s.u) * _norm(Au), Result.NEGATIVE_CURVATURE),  # of a good guess, where there is no step
                (residual <= target, Result.SUCCESSFUL),
                (failures >= 2, Result.STAGNATION),
                default=s.code,
            )
            u, residual = _where(code == Result.STAGNATION, (best, least), (s.u, residual))
            p = s.p + (r - s.r)  # p = r + beta p_old was made with the r of the recursion: exchange that for the true one
            s = s._replace(u=u, r=r, p=p, rr=_dot(r, r), best=best, least=least, residual=residual, failures=failures)
            return s._replace(code=code, checking=jnp.array(False), done=code >= 0)

        def apply(s: _CG) -> _CG:
            s = s._replace(total=s.total + 1)
            return lax.cond(s.checking, check, step, s, A(jnp.where(s.checking, s.u, s.p)))

        zeros, inf, count, no = jnp.zeros_like(b), jnp.full_like(rr, jnp.inf), jnp.int32(0), jnp.array(False)
        begin = _CG(zeros, b, b, rr, 0 * rr, zeros, inf, inf, count, count, count, jnp.int32(-1), jnp.sqrt(rr) <= target, no)
        if guess is not None:  # the first check turns r = p = 0 into b - A guess
            begin = begin._replace(u=guess, r=zeros, p=zeros, rr=inf, checking=~no)
        end = lax.while_loop(lambda s: ~s.done, apply, begin)
        return end.u, Stats(end.code, end.residual, end.total)

    return _implicit(iterate, max_steps + max_steps // check_every + 2.0, symmetric=True, damping=damping)


def neumann(*, terms: int, rate: Any, fresh: bool = False, batches: tuple[int, ...] | None = None) -> LinearSolver:
    """Neumann sum (SHIA): ``u = rate sum_{q=0}^{terms} prod_{k<q} (I - rate A_k) b``, by nested products in one pass.

    For a fixed A, ``u = A^-1 (I - (I - rate A)^{terms+1}) b``: a bias of (1 - rate mu)^{terms+1} relative to the solution.

    Args:
        terms: number of factors; the sum has one summand more.
        rate: a positive number, at most 1/L, or a traced one.
        fresh: whether every application uses a sample of its own, by ``matvec(u, k)``.
        batches: with ``fresh``, how many samples are averaged in each factor, in the order of application: ``terms`` ints, by
            default ones.  ``A_0`` is the mean over the first ``batches[0]`` samples, and so on: see `nested_batches`.

    Returns:
        A solver, which ignores the guess, of ``sum(batches)`` draws if ``fresh``.  The residual is an estimate, the norm of
        the last summand over the rate: for a fixed A that is the residual of the sum without it.  Codes: SUCCESSFUL; DIVERGED
        (the last summand is larger than the first: rate too large; the sum as far as it was finite); NONFINITE.

    Raises:
        TypeError, ValueError: as for `cg`; for ``batches`` that are not ``terms`` positive ints, or not ``fresh``.

    Cost: ``terms`` applications, or ``sum(batches)``.

    Reference: Ji, Yang, Liang, "Bilevel optimization: convergence analysis and enhanced design", 2021, arXiv 2010.07962,
    Algorithm 3.

    Example:
        >>> u, stats = neumann(terms=2, rate=0.5).solve(lambda u: u, jnp.ones(1))
        >>> u.tolist()  # 0.5 (1 + 1/2 + 1/4)
        [0.875]
    """
    checks.positive_int("terms", terms)
    _numbers(rate=rate)
    if batches is not None and not fresh:
        raise ValueError("batches: got them without fresh=True, expected None, because all samples are then the same")
    batches = (1,) * terms if batches is None else tuple(checks.positive_int("batches", count) for count in batches)
    if len(batches) != terms:
        raise ValueError(f"batches: got {len(batches)} of them, expected one a factor, {terms}")
    total = sum(batches)
    weights, ends = np.repeat([1 / count for count in batches], batches), np.isin(np.arange(1, total + 1), np.cumsum(batches))
    rate = rate if fresh else _still(rate)

    def iterate(A: Any, b: Array, guess: Array | None, eps: float, key: Any) -> tuple[Array, Stats]:
        del guess, key
        eta = _cast(rate, b)

        def sample(carry: tuple, x: tuple) -> tuple[tuple, None]:
            r, s, product, fine = carry
            k, weight, end = x
            product += weight * A(r, k)
            new = r - eta * product
            fine &= all_finite(s + new)
            return (*_where(end & fine, (new, s + new, jnp.zeros_like(b)), (r, s, product)), fine), None

        start = (b, b, jnp.zeros_like(b), jnp.array(True))
        xs = jnp.arange(total, dtype=jnp.int32), _cast(weights, b), jnp.asarray(ends)
        (r, s, _, fine), _ = lax.scan(sample, start, xs)
        code = _verdict(_norm(r) > (1 + eps**0.5) * _norm(b), fine)
        return eta * s, Stats(code, _norm(r), jnp.int32(total))

    return _written(iterate, total, total) if fresh else _implicit(iterate, terms, symmetric=False)


def nested_batches(terms: int, *, rate: float, strong_convexity: float, blocks: int = 1) -> tuple[int, ...]:
    """The decreasing batches of stocBiO for `neumann`: ``blocks terms (1 - rate mu)^q`` in factor q = 0, ..., terms - 1.

    The factor that is applied first gets the largest batch, because all the others multiply its error.  Numbers are rounded
    up, so that the bound of the paper on the variance holds.

    Args:
        terms: number of factors Q.
        rate: the rate eta of the sum.
        strong_convexity: mu, with ``rate mu <= 1``.
        blocks: the batch size B of the paper, in draws.

    Returns:
        ``terms`` ints of at least 1.

    Raises:
        TypeError, ValueError: for numbers out of range.

    Reference: Ji, Yang, Liang, 2021, arXiv 2010.07962, ``|B_{Q+1-j}| = B Q (1 - eta mu)^{j-1}``.

    Example:
        >>> nested_batches(4, rate=0.5, strong_convexity=1.0)
        (4, 2, 1, 1)
    """
    checks.positive_int("terms", terms)
    checks.positive_int("blocks", blocks)
    _numbers(rate=rate, strong_convexity=strong_convexity)
    if rate * strong_convexity > 1:
        raise ValueError(f"rate: got {rate}, expected at most 1 / strong_convexity = {1 / strong_convexity}")
    sizes = blocks * terms * (1 - rate * strong_convexity) ** np.arange(terms)
    return tuple(max(1, int(np.ceil(size - 1e-9))) for size in sizes)


def random_neumann(*, terms: int, rate: Any, fresh: bool = False) -> LinearSolver:
    """Randomly truncated Neumann series (HIA): ``u = terms rate prod_{k<p} (I - rate A_k) b``, p uniform on 0..terms-1.

    One product, not a sum; over p its mean for a fixed A is ``A^-1 (I - (I - rate A)^terms) b``.

    Args:
        terms: number of values of p.
        rate: a positive number, at most 1/L, or a traced one.
        fresh: whether every application uses a sample of its own: A_k is then ``matvec(u, k)``, with ``draws = terms``
            (the last of which is never used, as p < terms).

    Returns:
        A solver that draws p from ``key`` and ignores the guess.  The residual is an estimate, the norm of the product.
        Codes: SUCCESSFUL; DIVERGED (the product is larger than b; the product as far as it was finite); NONFINITE.

    Raises:
        TypeError, ValueError: as for `cg`; (when traced) without a key.

    Cost: p applications, (terms - 1) / 2 on average; under `jax.vmap` over keys terms - 1.

    Reference: Ghadimi, Wang, "Approximation methods for bilevel programming", 2018, arXiv 1802.02246, Algorithm 3.

    Example:
        >>> solver = random_neumann(terms=2, rate=0.5)
        >>> keys = jax.random.split(jax.random.key(0), 100)
        >>> us = jax.vmap(lambda key: solver.solve(lambda u: u, jnp.ones(1), key=key)[0])(keys)
        >>> sorted(set(us[:, 0].tolist()))
        [0.5, 1.0]
    """
    checks.positive_int("terms", terms)
    _numbers(rate=rate)

    def iterate(A: Any, b: Array, guess: Array | None, eps: float, key: Any) -> tuple[Array, Stats]:
        del guess
        if key is None:
            raise ValueError("key: got None, expected a key, from which random_neumann draws the number of its factors")
        p = jax.random.randint(key, (), 0, terms, jnp.int32)
        eta = _cast(rate, b)

        def factor(carry: tuple, k: Array) -> tuple[tuple, None]:
            r = lax.cond(k < p, lambda r: r - eta * A(r, k), lambda r: r, carry[0])
            fine = carry[1] & all_finite(r)
            return (jnp.where(fine, r, carry[0]), fine), None

        (r, fine), _ = lax.scan(factor, (b, jnp.array(True)), jnp.arange(terms - 1, dtype=jnp.int32))
        code = _verdict(_norm(r) > (1 + eps**0.5) * _norm(b), fine)
        return terms * eta * r, Stats(code, _norm(r), p)

    return _written(iterate, (terms - 1) / 2, terms if fresh else 0)


def richardson(*, steps: int, rate: Any, fresh: bool = False) -> LinearSolver:
    """Gradient steps (AID-FP, AmIGO): ``u <- u - rate (A_k u - b)`` from the guess, or from 0.

    From 0 and for a fixed A, ``steps`` of them are the Neumann sum of ``steps`` summands.

    Args:
        steps: number of steps.
        rate: a positive number, below 2/L, or a traced one.
        fresh: whether every step uses a sample of its own: A_k is then ``matvec(u, k)``, and ``draws = steps``.

    Returns:
        A solver.  With ``fresh`` the residual is an estimate, that of the last sample before its step.  Codes: SUCCESSFUL;
        DIVERGED (the residual has grown, with ``fresh`` by more than ``|b|``; last finite iterate); NONFINITE.

    Raises:
        TypeError, ValueError: as for `cg`.

    Cost: ``steps`` applications, and without ``fresh`` one for the residual.

    Reference: Arbel, Mairal, "Amortized implicit differentiation for stochastic bilevel optimization", 2022, arXiv 2111.14580.

    Example:
        >>> u, stats = richardson(steps=3, rate=0.5).solve(lambda u: u, jnp.ones(1))
        >>> u.tolist(), stats.residual.tolist()
        ([0.875], 0.125)
    """
    checks.positive_int("steps", steps)
    _numbers(rate=rate)
    rate = rate if fresh else _still(rate)

    def iterate(A: Any, b: Array, guess: Array | None, eps: float, key: Any) -> tuple[Array, Stats]:
        del key
        eta = _cast(rate, b)
        u, first, last, fine = _march(lambda u, previous, r: u + eta * r, A, b, guess, steps)
        if fresh:
            return u, Stats(_verdict(last > first + _norm(b), fine), last, jnp.int32(steps))
        residual, most = _norm(b - A(u)), first + eps**0.5 * _norm(b)
        return u, Stats(_verdict((last > most) | (residual > most), fine), residual, jnp.int32(steps + 1))

    return _written(iterate, steps, steps) if fresh else _implicit(iterate, steps + 1.0, symmetric=False)


def heavy_ball(*, steps: int, smoothness: Any, strong_convexity: Any) -> LinearSolver:
    """Heavy ball (AccBiO): ``u_{t+1} = u_t - lam (A u_t - b) + th (u_t - u_{t-1})``, with ``u_1 = u_0`` the guess or 0.

    ``lam = 4 / (sqrt L + sqrt mu)^2``, ``th = max((1 - sqrt(lam mu))^2, (1 - sqrt(lam L))^2)``: about as fast as conjugate
    gradients in the worst case, ``(sqrt k - 1) / (sqrt k + 1)`` a step with k = L / mu, without a scalar product.

    Args:
        steps: number of steps.
        smoothness, strong_convexity: L >= mu > 0, bounds of the eigenvalues of a symmetric A; numbers, traced ones too.

    Returns:
        A solver.  Codes: SUCCESSFUL; DIVERGED (the residual has grown by more than 2 steps + 1, which correct constants do
        not allow; last finite iterate); NONFINITE.

    Raises:
        TypeError, ValueError: as for `cg`.

    Cost: ``steps`` applications, and one for the residual.

    Reference: Ji, Liang, "Lower bounds and accelerated algorithms for bilevel optimization", 2023, arXiv 2102.03926.

    Example:
        >>> u, stats = heavy_ball(steps=60, smoothness=4.0, strong_convexity=1.0).solve(
        ...     lambda u: jnp.array([1.0, 4.0]) * u, jnp.ones(2)
        ... )
        >>> u.round(5).tolist()
        [1.0, 0.25]
    """
    checks.positive_int("steps", steps)
    _numbers(smoothness=smoothness, strong_convexity=strong_convexity)
    if isinstance(smoothness, int | float) and isinstance(strong_convexity, int | float) and smoothness < strong_convexity:
        raise ValueError(f"smoothness: got {smoothness}, expected at least strong_convexity, {strong_convexity}")

    def iterate(A: Any, b: Array, guess: Array | None, eps: float, key: Any) -> tuple[Array, Stats]:
        del key
        L, mu = (_cast(value, b) for value in _still((smoothness, strong_convexity)))
        lam = 4 / (jnp.sqrt(L) + jnp.sqrt(mu)) ** 2
        th = jnp.maximum((1 - jnp.sqrt(lam * mu)) ** 2, (1 - jnp.sqrt(lam * L)) ** 2)

        u, first, last, fine = _march(lambda u, previous, r: u + lam * r + th * (u - previous), A, b, guess, steps)
        residual, most = _norm(b - A(u)), (2 * steps + 1) * first + eps**0.5 * _norm(b)
        return u, Stats(_verdict((last > most) | (residual > most), fine), residual, jnp.int32(steps + 1))

    return _implicit(iterate, steps + 1.0, symmetric=True)


def dense(*, positive_definite: bool = True, damping: Any = 0.0) -> LinearSolver:
    """Direct solution of a small system: A by its columns, then Cholesky, or LU where A is not positive definite.

    Args:
        positive_definite: whether A is symmetric positive definite.  If it turns out not to be, the solution is that by LU,
            with the code NEGATIVE_CURVATURE.  False: LU, and derivatives that do not assume symmetry.
        damping: d >= 0 of ``(A + d I) u = b``.

    Returns:
        A solver, which ignores the guess.  Codes: SUCCESSFUL; NEGATIVE_CURVATURE; SINGULAR (a pivot vanishes to the precision,
        or the residual is large; the solution is 0 where there is no finite one); NONFINITE (solution 0).

    Raises:
        TypeError, ValueError: as for `cg`.

    Cost: as many applications as unknowns, and one for the residual: ``applications`` is nan.  Under `jax.vmap` both
    factorisations are computed.

    Reference: Golub, Van Loan, "Matrix computations", 1983, chapters 3 and 4.

    Example:
        >>> u, stats = dense().solve(lambda u: jnp.array([[2.0, 1.0], [1.0, 2.0]]) @ u, jnp.array([3.0, 3.0]))
        >>> u.round(6).tolist(), Result(int(stats.code)).name
        ([1.0, 1.0], 'SUCCESSFUL')
    """
    _numbers(zero=True, damping=damping)

    def factor(A: Any, n: int, dtype: Any, eps: float) -> Callable[..., tuple[Array, Stats]]:
        matrix = jax.vmap(A, out_axes=1)(jnp.eye(n, dtype=dtype))
        lower = jnp.linalg.cholesky(matrix) if positive_definite else jnp.full_like(matrix, jnp.nan)
        definite = jnp.isfinite(lower).all()
        order = jnp.arange(n, dtype=jnp.int32)
        factors, order = lax.cond(definite, lambda: (lower, order), lambda: jax.scipy.linalg.lu_factor(matrix))
        pivots = jnp.abs(jnp.diagonal(factors))
        pivots = jnp.where(definite, pivots**2, pivots)
        code = _first(
            (~jnp.isfinite(matrix).all(), Result.NONFINITE),
            (~(pivots.min() > n * eps * pivots.max()), Result.SINGULAR),
            (~definite & positive_definite, Result.NEGATIVE_CURVATURE),
            default=jnp.int32(Result.SUCCESSFUL),
        )

        def inverse(transpose: int, A: Any, b: Array) -> tuple[Array, Stats]:
            u = lax.cond(
                definite,
                lambda: jax.scipy.linalg.cho_solve((factors, True), b),
                lambda: jax.scipy.linalg.lu_solve((factors, order), b, trans=transpose),
            )
            u = jnp.where(jnp.isfinite(u).all(), u, jnp.zeros_like(u))
            residual = _norm(b - A(u))
            bad = ~(residual <= eps**0.25 * _norm(b))
            return u, Stats(jnp.where(bad, jnp.maximum(code, jnp.int32(Result.SINGULAR)), code), residual, jnp.int32(n + 1))

        return inverse

    def solve(matvec: Any, rhs: PyTree, guess: PyTree = None, key: Any = None) -> tuple[PyTree, Stats]:
        del key
        A, b, _, narrow, eps = _prepare(matvec, rhs, guess, damping)
        A, consts = jax.closure_convert(A, b)
        with jax.default_matmul_precision("highest"):
            # Factorised once, for the derivatives too.
            inverse = factor(lambda u: A(u, *lax.stop_gradient(consts)), b.size, b.dtype, eps)
            solves = partial(inverse, 0), partial(inverse, 1)
            u, stats = _linear(lambda u: A(u, *consts), b, *solves, positive_definite)
        return narrow(u), stats

    return LinearSolver(solve, float("nan"))


def auto(
    *,
    positive_definite: bool = True,
    dense_below: int = 512,
    max_steps: int = 1000,
    rtol: Any = None,
    atol: Any = 0.0,
    damping: Any = 0.0,
) -> LinearSolver:
    """`dense` for systems of at most ``dense_below`` unknowns; above, `cg`, or GMRES where A is not symmetric.

    The choice is made from shapes, when the call is traced.  The normal equations are never formed: they square the
    condition number.

    Args:
        positive_definite: whether A is symmetric positive definite.  False above ``dense_below`` needs lineax.
        dense_below: largest number of unknowns solved directly; 0 for none.
        max_steps, rtol, atol: of the iterative solvers, as for `cg`; GMRES starts anew every 20 applications.
        damping: d >= 0 of ``(A + d I) u = b``.

    Returns:
        A solver, whose codes are those of `dense`, `cg` or `from_lineax`.

    Raises:
        TypeError, ValueError: as for `cg`.
        ImportError: (when traced) if lineax is needed and not installed.

    Cost: that of `dense` or `cg`; ``applications`` is the larger one.

    Example:
        >>> u, stats = auto().solve(lambda u: {"w": 2 * u["w"]}, {"w": jnp.ones(3)})
        >>> u["w"].round(6).tolist()
        [0.5, 0.5, 0.5]
    """
    checks.positive_int("dense_below", dense_below, 0)
    small = dense(positive_definite=positive_definite, damping=damping)
    large = cg(max_steps=max_steps, rtol=rtol, atol=atol, damping=damping)

    def solve(matvec: Any, rhs: PyTree, guess: PyTree = None, key: Any = None) -> tuple[PyTree, Stats]:
        checks.floating("rhs", rhs)
        size = sum(leaf.size for leaf in jax.tree.leaves(rhs))
        if size <= dense_below:
            return small.solve(matvec, rhs, guess, key)
        if positive_definite:
            return large.solve(matvec, rhs, guess, key)
        why = f"auto: a system of {size} unknowns that is not positive definite, above dense_below={dense_below}"
        tolerance = max(float(jnp.finfo(leaf.dtype).eps) for leaf in jax.tree.leaves(rhs)) ** 0.5 if rtol is None else rtol
        gmres = _lineax(why).GMRES(rtol=tolerance, atol=atol, max_steps=-(-max_steps // 20), restart=20)
        return from_lineax(gmres, damping=damping).solve(matvec, rhs, guess, key)

    return LinearSolver(solve, max(dense_below + 1.0, large.applications))


def from_lineax(
    solver: Any, *, positive_definite: bool = False, symmetric: bool | None = None, damping: Any = 0.0
) -> LinearSolver:
    """A solver of lineax: CG, GMRES, BiCGStab, LU, and the others that take a square matrix given as a function.

    Args:
        solver: such as ``lineax.GMRES(rtol=1e-6, atol=1e-6)``.  Its tolerances hold entry by entry.
        positive_definite: whether A is symmetric positive definite; CG and Cholesky ask for it.
        symmetric: whether A is symmetric; by default what ``positive_definite`` says.
        damping: d >= 0 of ``(A + d I) u = b``.

    Returns:
        A solver.  Codes are those of lineax with these exceptions: NEGATIVE_CURVATURE if A, said to be positive definite, is
        not so in the plane of u and b (lineax calls that a success; on other planes it goes unseen, but by `cg`); SINGULAR if
        there is no finite solution (then the guess or 0 is returned), or if a success leaves a residual far above the
        tolerance; NONFINITE if A gives NaN.  ``steps`` is an upper estimate from lineax's own count.

    Raises:
        ImportError: if lineax is not installed.
        TypeError, ValueError: as for `cg`; for anything but a solver of lineax; for contradictory properties.

    Cost: that of the solver, and two applications.

    Reference: Rader, Lyons, Kidger, "Lineax: unified linear solves and linear least-squares in JAX and Equinox", 2023,
    arXiv 2311.17283.

    Example:
        >>> import lineax
        >>> u, stats = from_lineax(lineax.LU()).solve(lambda u: jnp.array([[0.0, 2.0], [1.0, 0.0]]) @ u, jnp.ones(2))
        >>> u.tolist()
        [1.0, 0.5]
    """
    lx = _lineax("from_lineax")
    if not isinstance(solver, lx.AbstractLinearSolver):
        raise TypeError(f"solver: got {type(solver).__name__}, expected a solver of lineax")
    if positive_definite and symmetric is False:
        raise ValueError("symmetric: got False, expected True or None, because positive_definite is True")
    _numbers(zero=True, damping=damping)
    solver = _still(solver)
    tags = lx.positive_semidefinite_tag if positive_definite else lx.symmetric_tag if symmetric else ()
    codes = {
        "max_steps_reached": Result.MAX_STEPS_REACHED,
        "stagnation": Result.STAGNATION,
        "breakdown": Result.BREAKDOWN,
        "singular": Result.SINGULAR,
        "conlim": Result.SINGULAR,
        "nonfinite_input": Result.NONFINITE,
    }
    rtol, atol, most = (getattr(solver, name, default) for name, default in (("rtol", 0.0), ("atol", 0.0), ("max_steps", None)))
    each = {"GMRES": getattr(solver, "restart", 0) + 1, "BiCGStab": 2}.get(type(solver).__name__, 1)

    def iterate(A: Any, b: Array, guess: Array | None, eps: float, key: Any) -> tuple[Array, Stats]:
        del key
        operator = lx.FunctionLinearOperator(A, jax.ShapeDtypeStruct(b.shape, b.dtype), tags)
        options = {} if guess is None else {"y0": guess}
        with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
            found = lx.linear_solve(operator, b, solver, options=options, throw=False)
        fine = all_finite(found.value)
        u = jnp.where(fine, found.value, jnp.zeros_like(b) if guess is None else guess)
        Au, Ab = A(u), A(b)
        residual, large = _norm(b - Au), _cast(atol, b) * b.size**0.5 + _cast(rtol, b) * _norm(b)
        # Curvature along u and b, and in their plane, where it is positive if the determinant of the form is.
        u_size, b_size = (jnp.where(_norm(v) > 0, _norm(v), jnp.ones_like(residual)) for v in (u, b))
        x, Ax, y, Ay = u / u_size, Au / u_size, b / b_size, Ab / b_size
        xAx, yAy, xAy = _dot(x, Ax), _dot(y, Ay), _dot(x, Ay)
        flat = (xAx < eps * _norm(Ax)) | (yAy < eps * _norm(Ay)) | (xAx * yAy < xAy**2 - eps**0.5 * _norm(Ax) * _norm(Ay))
        code = _first(
            (~all_finite((Au, Ab)), Result.NONFINITE),
            (_norm(b) == 0, Result.SUCCESSFUL),
            (flat & positive_definite, Result.NEGATIVE_CURVATURE),
            *((found.result == getattr(lx.RESULTS, theirs), ours) for theirs, ours in codes.items()),
            (~fine | ~(residual <= eps**0.25 * _norm(b) + 2 * large), Result.SINGULAR),
            default=jnp.int32(Result.SUCCESSFUL),
        )
        count = jnp.asarray(found.stats.get("num_steps", b.size), jnp.int32)
        return u, Stats(code, residual, each * count + 2)

    applications = float("nan") if most is None else each * most + 2.0
    return _implicit(iterate, applications, symmetric=symmetric or positive_definite, damping=damping)


#: ``(A, b, guess, eps, key) -> (u, Stats)`` on vectors, with ``A(u, k)``; eps is the machine epsilon of the products.
_Iterate = Callable[..., tuple[Array, Stats]]


def _prepare(matvec: Any, rhs: PyTree, guess: PyTree | None, damping: Any) -> tuple:
    """``A + d I``, b and the guess on vectors of one dtype, at least float32; the way back; eps.

    On one vector a step is a few operations, where every leaf would add its own (forty leaves: `cg` takes half the time).
    """
    checks.floating("rhs", rhs)
    dtypes = [leaf.dtype for leaf in jax.tree.leaves(rhs)]
    wide = max((np.dtype(np.float32), *dtypes), key=lambda d: jnp.finfo(d).bits)

    def ravel(tree: PyTree) -> tuple[Array, Any]:
        return ravel_pytree(jax.tree.map(lambda leaf: jnp.asarray(leaf, wide), tree))

    b, unravel = ravel(rhs)
    if guess is not None:
        checks.same_shapes("guess", guess, rhs, "rhs")
        guess = jnp.where(all_finite(guess), ravel(guess)[0], jnp.zeros_like(b))

    def narrow(u: Array) -> PyTree:
        return jax.tree.map(lambda leaf, like: leaf.astype(like.dtype), unravel(u), rhs)

    def apply(u: Array, *k: Array) -> Array:
        product = matvec(narrow(u), *k)
        checks.same_shapes("matvec(u)", product, rhs, "rhs")
        flat, _ = ravel(product)
        return flat if isinstance(damping, int | float) and damping == 0 else flat + _cast(damping, u) * u

    return apply, b, guess, narrow, max(float(jnp.finfo(d).eps) for d in dtypes)


def _checked(iterate: Callable[[Array, Array | None], tuple[Array, Stats]], b: Array, guess: Array | None) -> Any:
    """A right-hand side that is 0 starts at 0; one that is not finite gives 0 and the code NONFINITE."""
    fine = all_finite(b)
    b = jnp.where(fine, b, jnp.zeros_like(b))
    u, stats = iterate(b, None if guess is None else jnp.where((b == 0).all(), b, guess))
    residual = jnp.where(fine, stats.residual, jnp.full_like(stats.residual, jnp.nan))
    return u, Stats(_first((~fine, Result.NONFINITE), default=stats.code), residual, stats.steps)


def _linear(A: Any, b: Array, solve: Any, transpose_solve: Any, symmetric: bool) -> tuple[Array, Stats]:
    """``A^-1 b``: linear in b to the transformations of jax, whatever the solver does."""

    def inverse(solve: Any, A: Any, b: Array) -> tuple[Array, Stats]:
        return _checked(lambda b, _: solve(A, b), b, None)

    both = partial(inverse, solve), partial(inverse, transpose_solve)
    return lax.custom_linear_solve(A, b, *both, symmetric=symmetric, has_aux=True)


def _implicit(iterate: _Iterate, applications: float, *, symmetric: bool, damping: Any = 0.0) -> LinearSolver:
    """A deterministic solver: ``du = A^-1 (db - dA u)``."""

    def solve(matvec: Any, rhs: PyTree, guess: PyTree = None, key: Any = None) -> tuple[PyTree, Stats]:
        del key
        A, b, guess, narrow, eps = _prepare(matvec, rhs, guess, damping)
        A, consts = jax.closure_convert(A, b)  # one trace of matvec; all that may have a derivative becomes an argument

        def inverse(A: Any, b: Array) -> tuple[Array, Stats]:
            return iterate(lambda u, *_: A(u), b, None, eps, None)

        def from_zero(b: Array, consts: Any) -> tuple[Array, Stats]:
            return _linear(lambda u: A(u, *consts), b, inverse, inverse, symmetric)

        @jax.custom_jvp
        def from_guess(b: Array, guess: Array, consts: Any) -> tuple[Array, Stats]:
            return _checked(lambda b, guess: iterate(lambda u, *_: A(u, *consts), b, guess, eps, None), b, guess)

        @from_guess.defjvp
        def _(primals: tuple, tangents: tuple) -> tuple:
            """The rule of `_linear`, written out, because the systems of the derivatives must not start at the guess."""
            (b, _, consts), (db, _, dconsts) = primals, tangents
            u, stats = from_guess(*primals)
            _, change = jax.jvp(lambda b, consts: b - A(u, *consts), (b, consts), (db, dconsts))
            none: Any = np.zeros((), jax.dtypes.float0)
            return (u, stats), (from_zero(change, consts)[0], Stats(none, jnp.zeros_like(stats.residual), none))

        u, stats = from_zero(b, consts) if guess is None else from_guess(b, guess, consts)
        return narrow(u), stats

    return LinearSolver(solve, applications)


def _written(iterate: _Iterate, applications: float, draws: int) -> LinearSolver:
    """A stochastic solver, differentiated as it is written."""

    def solve(matvec: Any, rhs: PyTree, guess: PyTree = None, key: Any = None) -> tuple[PyTree, Stats]:
        A, b, guess, narrow, eps = _prepare(matvec, rhs, guess, 0.0)
        apply = A if draws else lambda u, k: A(u)
        u, stats = _checked(lambda b, guess: iterate(apply, b, guess, eps, key), b, guess)
        return narrow(u), stats

    return LinearSolver(solve, float(applications), draws)


def _march(step: Any, A: Any, b: Array, guess: Array | None, steps: int) -> tuple[Array, Array, Array, Array]:
    """``step(u, previous u, b - A u)`` from the guess or 0, as long as it is finite.

    Returns the last finite u, the first ``|b - A u|`` and that of the last finite step, and whether all were finite.
    """
    u = jnp.zeros_like(b) if guess is None else guess

    def body(carry: tuple, k: Array) -> tuple[tuple, Array]:
        u, previous, _, fine = carry
        r = b - A(u, k)
        new = step(u, previous, r)
        fine &= all_finite(new)
        return (*_where(fine, (new, u, _norm(r)), carry[:3]), fine), _norm(r)

    start = (u, u, jnp.zeros((), b.dtype), jnp.array(True))
    (u, _, last, fine), residuals = lax.scan(body, start, jnp.arange(steps, dtype=jnp.int32))
    return u, residuals[0], last, fine


def _verdict(grown: Array, fine: Array) -> Array:
    """Of a method without a tolerance."""
    return _first((grown, Result.DIVERGED), (~fine, Result.NONFINITE), default=jnp.int32(Result.SUCCESSFUL))


def _first(*cases: tuple[Array, Any], default: Array) -> Array:
    """The code of the first case that holds."""
    for condition, code in reversed(cases):
        default = jnp.where(condition, jnp.asarray(code, jnp.int32), default)
    return default


def _dot(a: Array, b: Array) -> Array:
    return jnp.vdot(a, b, precision=lax.Precision.HIGHEST)


def _norm(a: Array) -> Array:
    """The Euclidean norm, safe from under- and overflow, so 0 for 0 only; without a derivative, which 0 has not."""
    a = lax.stop_gradient(a)
    largest = jnp.abs(a).max(initial=0)
    unit = jnp.where((largest > 0) & jnp.isfinite(largest), largest, jnp.ones_like(largest))
    return unit * jnp.sqrt(_dot(a / unit, a / unit))


def _cast(value: Any, like: Array) -> Array:
    return jnp.asarray(value, like.dtype)


def _where(condition: Array, a: Any, b: Any) -> Any:
    return jax.tree.map(lambda x, y: jnp.where(condition, x, y), a, b)


def _still(tree: PyTree) -> PyTree:
    """Numbers that have no derivative, so that the rules may close over them."""
    return jax.tree.map(lambda leaf: lax.stop_gradient(leaf) if isinstance(leaf, jax.Array) else leaf, tree)


def _numbers(zero: bool = False, **values: Any) -> None:
    """Raise unless every value is a positive finite number (or 0, if ``zero``); arrays, which may be traced, pass."""
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, int | float | np.number | np.ndarray | jax.Array):
            raise TypeError(f"{name}: got {value!r} of type {type(value).__name__}, expected a number")
        if isinstance(value, int | float | np.number) and not (0 < value < np.inf or (zero and value == 0)):
            raise ValueError(f"{name}: got {value}, expected a finite number {'of at least' if zero else 'above'} 0")


def _lineax(why: str) -> Any:
    try:
        return importlib.import_module("lineax")
    except ImportError as error:
        raise ImportError(f"{why}: needs lineax, which is not installed: pip install lineax") from error
