"""Linear systems ``A u = b`` with the matrix given as a function: ``solve(matvec, rhs, guess=None, key=None) -> (u, Stats)``.

In a bilevel problem ``A = d2_zz g`` and ``b = -d_z f``, and the solution is the v of the library's signs.  What a solver meets
in the numbers never raises: it returns a code, a residual, and a solution without NaN; a right-hand side of 0 gives 0, one that
is not finite 0 and NONFINITE.  Iterates whose squares overflow count as not finite.  Arguments out of range raise ValueError or
TypeError when a solver is made; a guess or a ``matvec(u)`` that is not shaped like ``rhs``, when the call is traced.  Numbers
(rates, tolerances, damping) may be traced; ``damping=d`` solves ``(A + d I) u = b``.

Deterministic solvers are differentiated implicitly, ``du = A^-1 (db - dA u)`` with the same solver started at 0: forward and
reverse, to any order, in the right-hand side and in whatever ``matvec`` closes over, but not in guess, rates or tolerances.
Stochastic ones (fresh samples, or a key) are differentiated as they are written.

Iterates and scalars are kept in float32 at least; ``matvec`` is given the dtypes of ``rhs``.  On accelerators that round the
factors of float32 products, solve under ``jax.default_matmul_precision("highest")``: rounded products are not symmetric.
"""

import importlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer
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
    failures: Array  # int32 [], how often the recursive residual has met the tolerance
    steps: Array  # int32 []
    total: Array  # int32 [], applications of A
    code: Array  # int32 [], -1 as long as nothing has happened
    checking: Array  # bool [], whether A goes to the iterate next (check), or to the direction (step)


def cg(*, max_steps: int, rtol: Any = None, atol: Any = 0.0, damping: Any = 0.0) -> LinearSolver:
    """Conjugate gradients for a symmetric positive definite A: ``|A u - b| <= atol + rtol |b|``, tested on the true residual.

    Args:
        max_steps: most steps; a small number is a normal use (AID), and MAX_STEPS_REACHED then information.
        rtol, atol: tolerances; by default the square root of the machine epsilon of ``rhs``, and 0.

    Returns:
        A solver.  Codes: SUCCESSFUL; MAX_STEPS_REACHED (last iterate); NEGATIVE_CURVATURE (``p'Ap <= eps |A| |p|^2``:
        the iterate before the step, however small its residual); STAGNATION (twice the residual of the recursion met the
        tolerance and the true one did not: the best iterate); BREAKDOWN (a scalar under- or overflowed); NONFINITE (A gave
        NaN: the last finite iterate).  A singular A whose null space b does not meet goes unseen.

    Cost: one application a step, one for the guess, one for each of at most two checks.

    Reference: Hestenes, Stiefel, "Methods of conjugate gradients for solving linear systems", 1952; for bilevel problems Ji,
    Yang, Liang, "Bilevel optimization: convergence analysis and enhanced design", 2021, arXiv 2010.07962.

    Example:
        >>> u, stats = cg(max_steps=10).solve(lambda u: jnp.array([1.0, 4.0]) * u, jnp.ones(2))
        >>> u.round(6).tolist(), Result(int(stats.code)).name, int(stats.steps)
        ([1.0, 0.25], 'SUCCESSFUL', 3)
    """
    checks.positive_int("max_steps", max_steps)
    atol, damping = _number("atol", atol, zero=True), _number("damping", damping, zero=True)
    rtol = None if rtol is None else _number("rtol", rtol, zero=True)

    def iterate(A: Any, b: Array, guess: Array | None, eps: float, key: Any) -> tuple[Array, Stats]:
        del key
        rr = _dot(b, b)
        target = _cast(atol, rr) + _cast(eps**0.5 if rtol is None else rtol, rr) * _norm(b)

        def step(s: _CG, Ap: Array) -> _CG:
            """Whether it may be done is seen from scalars, before it is done: no vector is read to be tested or restored."""
            pAp, pp, ApAp = _dot(s.p, Ap), _dot(s.p, s.p), _dot(Ap, Ap)
            scale = jnp.maximum(s.scale, jnp.sqrt(ApAp / pp))
            alpha = s.rr / pAp
            code = _first(
                (~((s.rr > 0) & (pp > 0) & jnp.isfinite(s.rr + pp)), Result.BREAKDOWN),
                (~jnp.isfinite(ApAp), Result.NONFINITE),
                (pAp <= eps * scale * pp, Result.NEGATIVE_CURVATURE),
                (~jnp.isfinite(alpha**2 * (pp + ApAp)), Result.BREAKDOWN),
                (s.steps + 1 >= max_steps, Result.MAX_STEPS_REACHED),
                default=s.code,
            )
            fine = code <= Result.MAX_STEPS_REACHED
            u, r = _where(fine, (s.u + alpha * s.p, s.r - alpha * Ap), (s.u, s.r))
            rr = jnp.where(fine, _dot(r, r), s.rr)
            beta = rr / s.rr
            p = jnp.where(fine & jnp.isfinite(beta**2 * pp), r + beta * s.p, r)
            # No check in between: exchanging r at the limit of the precision costs the directions their conjugacy.
            check = (jnp.sqrt(rr) <= target) | (code >= 0)
            return s._replace(u=u, r=r, p=p, rr=rr, scale=scale, steps=s.steps + 1, code=code, checking=check)

        def check(s: _CG, Au: Array) -> _CG:
            r = b - Au
            residual, uAu = _norm(r), _dot(s.u, Au)
            failures = s.failures + (jnp.sqrt(s.rr) <= target).astype(jnp.int32)
            best, least = _where(residual < s.least, (s.u, residual), (s.best, s.least))
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
            return s._replace(code=code, checking=jnp.array(False))

        def apply(s: _CG) -> _CG:  # one application a pass, so that under vmap no lane pays for another's checks
            s = s._replace(total=s.total + 1)
            return lax.cond(s.checking, check, step, s, A(jnp.where(s.checking, s.u, s.p)))

        zeros, inf, count, code = jnp.zeros_like(b), jnp.full_like(rr, jnp.inf), jnp.int32(0), jnp.int32(-1)
        s = _CG(zeros, b, b, rr, 0 * rr, zeros, inf, inf, count, count, count, code, jnp.sqrt(rr) <= target)
        if guess is not None:  # the first check turns r = p = 0 into b - A guess
            s = s._replace(u=guess, r=zeros, p=zeros, rr=inf, checking=jnp.array(True))
        s = lax.while_loop(lambda s: (s.code < 0) | s.checking, apply, s)
        return s.u, Stats(s.code, s.residual, s.total)

    return _solver(iterate, max_steps + 3.0, symmetric=True, damping=damping)


def neumann(*, terms: int, rate: Any, fresh: bool = False, batches: tuple[int, ...] | None = None) -> LinearSolver:
    """Neumann sum (SHIA): ``u = rate sum_{q=0}^{terms} prod_{k<q} (I - rate A_k) b``, by nested products in one pass.

    For a fixed A, ``u = A^-1 (I - (I - rate A)^{terms+1}) b``: a bias of (1 - rate mu)^{terms+1} relative to the solution.

    Args:
        terms: number of factors; the sum has one summand more.
        rate: a positive number, at most 1/L.
        fresh: whether every application uses a sample of its own, by ``matvec(u, k)``.
        batches: with ``fresh``, how many samples are averaged in each factor, in the order of application: ``terms`` ints, by
            default ones.  ``A_0`` is the mean over the first ``batches[0]`` samples, and so on: see `nested_batches`.

    Returns:
        A solver, which ignores the guess, of ``sum(batches)`` draws if ``fresh``.  The residual is an estimate, the norm of
        the last summand over the rate: for a fixed A that is the residual of the sum without it.  Codes: SUCCESSFUL; DIVERGED
        (the last summand is larger than the first: rate too large; the sum as far as it was finite); NONFINITE.

    Cost: ``terms`` applications, or ``sum(batches)``.

    Reference: Ji, Yang, Liang, 2021, arXiv 2010.07962, Algorithm 3.

    Example:
        >>> u, stats = neumann(terms=2, rate=0.5).solve(lambda u: u, jnp.ones(1))
        >>> u.tolist()  # 0.5 (1 + 1/2 + 1/4)
        [0.875]
    """
    checks.positive_int("terms", terms)
    rate = _number("rate", rate)
    if batches is not None and not fresh:
        raise ValueError("batches: got them without fresh=True, expected None, because all samples are then the same")
    batches = (1,) * terms if batches is None else tuple(checks.positive_int("batches", count) for count in batches)
    if len(batches) != terms:
        raise ValueError(f"batches: got {len(batches)} of them, expected one a factor, {terms}")
    total = sum(batches)
    weights, ends = np.repeat([1 / count for count in batches], batches), np.isin(np.arange(1, total + 1), np.cumsum(batches))

    def iterate(A: Any, b: Array, guess: Array | None, eps: float, key: Any) -> tuple[Array, Stats]:
        del guess, key
        eta = _cast(rate, b)

        def factor(state: tuple, k: Array) -> tuple:
            r, s = state
            product = A(r, k)
            r = r - eta * product
            return product, (r, s + r)

        def sample(state: tuple, x: tuple) -> tuple:
            (r, s, product), (k, weight, end) = state, x
            product += weight * A(r, k)
            new = r - eta * product
            return product, _where(end, (new, s + new, jnp.zeros_like(b)), (r, s, product))

        ks = jnp.arange(total, dtype=jnp.int32)
        if total == terms:
            (r, s), fine = _scan(factor, (b, b), ks)
        else:
            (r, s, _), fine = _scan(sample, (b, b, jnp.zeros_like(b)), (ks, _cast(weights, b), jnp.asarray(ends)))
        return eta * s, Stats(_verdict(_norm(r), (1 + eps**0.5) * _norm(b), fine), _norm(r), jnp.int32(total))

    return _solver(iterate, total, symmetric=None if fresh else False, draws=total if fresh else 0)


def nested_batches(terms: int, *, rate: float, strong_convexity: float, blocks: int = 1) -> tuple[int, ...]:
    """The decreasing batches of stocBiO for `neumann`: ``blocks terms (1 - rate mu)^q`` in factor q = 0, ..., terms - 1.

    The factor that is applied first gets the largest batch, because all the others multiply its error.

    Args:
        terms, rate: of the sum (Q and eta in the paper).
        strong_convexity: mu, with ``rate mu <= 1``.
        blocks: the batch size B of the paper, in draws.

    Returns:
        ``terms`` ints of at least 1, rounded up, so that the bound of the paper on the variance holds.

    Reference: Ji, Yang, Liang, 2021, arXiv 2010.07962, ``|B_{Q+1-j}| = B Q (1 - eta mu)^{j-1}``.

    Example:
        >>> nested_batches(4, rate=0.5, strong_convexity=1.0)
        (4, 2, 1, 1)
    """
    checks.positive_int("terms", terms)
    checks.positive_int("blocks", blocks)
    shrink = 1 - _number("rate", rate) * _number("strong_convexity", strong_convexity)
    if shrink < 0:
        raise ValueError(f"rate: got {rate}, expected at most 1 / strong_convexity = {1 / strong_convexity}")
    return tuple(max(1, int(np.ceil(blocks * terms * shrink**q - 1e-9))) for q in range(terms))


def random_neumann(*, terms: int, rate: Any, fresh: bool = False) -> LinearSolver:
    """Randomly truncated Neumann series (HIA): ``u = terms rate prod_{k<p} (I - rate A_k) b``, p uniform on 0..terms-1.

    One product, not a sum; over p its mean for a fixed A is ``A^-1 (I - (I - rate A)^terms) b``.

    Args:
        terms: number of values of p.
        rate, fresh: as for `neumann`, with ``draws = terms`` (the last of which is never used, as p < terms).

    Returns:
        A solver that draws p from ``key``, which it cannot do without, and ignores the guess.  The residual is an estimate, the
        norm of the product.  Codes: SUCCESSFUL; DIVERGED (the product is larger than b); NONFINITE.

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
    rate = _number("rate", rate)

    def iterate(A: Any, b: Array, guess: Array | None, eps: float, key: Any) -> tuple[Array, Stats]:
        del guess
        if key is None:
            raise ValueError("key: got None, expected a key, from which random_neumann draws the number of its factors")
        p = jax.random.randint(key, (), 0, terms, jnp.int32)
        eta = _cast(rate, b)

        def factor(r: Array, k: Array) -> tuple[Array, Array]:
            r = lax.cond(k < p, lambda: r - eta * A(r, k), lambda: r)
            return r, r

        r, fine = _scan(factor, b, jnp.arange(terms - 1, dtype=jnp.int32))
        return terms * eta * r, Stats(_verdict(_norm(r), (1 + eps**0.5) * _norm(b), fine), _norm(r), p)

    return _solver(iterate, (terms - 1) / 2, draws=terms if fresh else 0)


def richardson(*, steps: int, rate: Any, fresh: bool = False) -> LinearSolver:
    """Gradient steps (AID-FP, AmIGO): ``u <- u - rate (A_k u - b)`` from the guess, or from 0.

    From 0 and for a fixed A, ``steps`` of them are the Neumann sum of ``steps`` summands.

    Args:
        steps: number of steps.
        rate: a positive number, below 2/L.
        fresh: whether every step uses a sample of its own: A_k is then ``matvec(u, k)``, and ``draws = steps``.

    Returns:
        A solver.  With ``fresh`` the residual is an estimate, that of the last sample before its step.  Codes: SUCCESSFUL;
        DIVERGED (the residual has grown; with ``fresh``, the iterate is larger than steps within the limit of stability can
        make it, ``|guess| + steps rate |b|``; last finite iterate); NONFINITE.

    Cost: ``steps`` applications, and without ``fresh`` one for the residual.

    Reference: Arbel, Mairal, "Amortized implicit differentiation for stochastic bilevel optimization", 2022, arXiv 2111.14580.

    Example:
        >>> u, stats = richardson(steps=3, rate=0.5).solve(lambda u: u, jnp.ones(1))
        >>> u.tolist(), stats.residual.tolist()
        ([0.875], 0.125)
    """
    rate = _number("rate", rate)
    return _march(steps, lambda b: (_cast(rate, b), None), growth=1, symmetric=None if fresh else False)


def heavy_ball(*, steps: int, smoothness: Any, strong_convexity: Any) -> LinearSolver:
    """Heavy ball (AccBiO): ``u_{t+1} = u_t - lam (A u_t - b) + th (u_t - u_{t-1})``, with ``u_1 = u_0`` the guess or 0.

    ``lam = 4 / (sqrt L + sqrt mu)^2``, ``th = max((1 - sqrt(lam mu))^2, (1 - sqrt(lam L))^2)``: about as fast as conjugate
    gradients in the worst case, ``(sqrt k - 1) / (sqrt k + 1)`` a step with k = L / mu, without a scalar product.

    Args:
        steps: number of steps.
        smoothness, strong_convexity: L >= mu > 0, bounds of the eigenvalues of a symmetric A.

    Returns:
        A solver.  Codes: SUCCESSFUL; DIVERGED (the residual has grown by more than 2 steps + 1, which correct constants do
        not allow; last finite iterate); NONFINITE.

    Cost: ``steps`` applications, and one for the residual.

    Reference: Ji, Liang, "Lower bounds and accelerated algorithms for bilevel optimization", 2023, arXiv 2102.03926.

    Example:
        >>> solver = heavy_ball(steps=60, smoothness=4.0, strong_convexity=1.0)
        >>> solver.solve(lambda u: jnp.array([1.0, 4.0]) * u, jnp.ones(2))[0].round(5).tolist()
        [1.0, 0.25]
    """
    smoothness, strong_convexity = _number("smoothness", smoothness), _number("strong_convexity", strong_convexity)
    if isinstance(smoothness, int | float) and isinstance(strong_convexity, int | float) and smoothness < strong_convexity:
        raise ValueError(f"smoothness: got {smoothness}, expected at least strong_convexity, {strong_convexity}")

    def rates(b: Array) -> tuple[Array, Array]:
        L, mu = jnp.sqrt(_cast(smoothness, b)), jnp.sqrt(_cast(strong_convexity, b))
        root = 2 / (L + mu)
        return root**2, jnp.maximum((1 - root * mu) ** 2, (1 - root * L) ** 2)

    return _march(steps, rates, growth=2 * steps + 1, symmetric=True)


def dense(*, positive_definite: bool = True, damping: Any = 0.0) -> LinearSolver:
    """Direct solution of a small system: A by its columns, then Cholesky, or LU where A is not positive definite.

    Args:
        positive_definite: whether A is symmetric positive definite.  False: LU, and derivatives that do not assume symmetry.

    Returns:
        A solver, which ignores the guess.  Codes: SUCCESSFUL; NEGATIVE_CURVATURE (solution by LU); SINGULAR (a pivot vanishes
        to the precision, or the residual is large; the solution is 0 where there is no finite one); NONFINITE (solution 0).

    Cost: as many applications as unknowns, and one for the residual: ``applications`` is nan.  Under `jax.vmap` both
    factorisations are computed.

    Reference: Golub, Van Loan, "Matrix computations", 1983, chapters 3 and 4.

    Example:
        >>> u, stats = dense().solve(lambda u: jnp.array([[2.0, 1.0], [1.0, 2.0]]) @ u, jnp.array([3.0, 3.0]))
        >>> u.round(6).tolist(), Result(int(stats.code)).name
        ([1.0, 1.0], 'SUCCESSFUL')
    """

    def iterate(A: Any, b: Array, guess: Array | None, eps: float, key: Any) -> tuple[Array, Stats]:
        del guess, key
        with jax.default_matmul_precision("highest"):
            matrix = jax.vmap(A, out_axes=1)(jnp.eye(b.size, dtype=b.dtype))
            lower = jnp.linalg.cholesky(matrix) if positive_definite else jnp.full_like(matrix, jnp.nan)
            definite = jnp.isfinite(lower).all()

            def general() -> tuple[Array, Array]:
                factors, order = jax.scipy.linalg.lu_factor(matrix)
                return jax.scipy.linalg.lu_solve((factors, order), b), jnp.abs(jnp.diagonal(factors))

            def symmetric() -> tuple[Array, Array]:
                return jax.scipy.linalg.cho_solve((lower, True), b), jnp.diagonal(lower) ** 2

            u, pivots = lax.cond(definite, symmetric, general)
        u = jnp.where(jnp.isfinite(u).all(), u, jnp.zeros_like(u))
        residual = _norm(b - A(u))
        code = _first(
            (~jnp.isfinite(matrix).all(), Result.NONFINITE),
            (~((pivots.min() > b.size * eps * pivots.max()) & (residual <= eps**0.25 * _norm(b))), Result.SINGULAR),
            (~definite & positive_definite, Result.NEGATIVE_CURVATURE),
        )
        return u, Stats(code, residual, jnp.int32(b.size + 1))

    return _solver(iterate, float("nan"), symmetric=positive_definite, damping=_number("damping", damping, zero=True))


def auto(
    *, positive_definite: bool = True, dense_below: int = 256, max_steps: int = 1000, rtol: Any = None, damping: Any = 0.0
) -> LinearSolver:
    """`dense` for systems of at most ``dense_below`` unknowns; above, `cg`, or GMRES where A is not symmetric.

    Never the normal equations: they square the condition number.

    Args:
        positive_definite: whether A is symmetric positive definite.  False above ``dense_below`` needs lineax.
        dense_below: largest number of unknowns solved directly; 0 for none.
        max_steps, rtol: of the iterative solvers, as for `cg`; GMRES starts anew every 20 applications.

    Returns, Cost: as for `dense`, `cg` or `from_lineax`; ``applications`` is the larger one.

    Raises:
        ImportError: (when traced) if lineax is needed and not installed.

    Example:
        >>> u, stats = auto().solve(lambda u: {"w": 2 * u["w"]}, {"w": jnp.ones(3)})
        >>> u["w"].round(6).tolist()
        [0.5, 0.5, 0.5]
    """
    checks.positive_int("dense_below", dense_below, 0)
    small = dense(positive_definite=positive_definite, damping=damping)
    large = cg(max_steps=max_steps, rtol=rtol, damping=damping)

    def solve(matvec: Any, rhs: PyTree, guess: PyTree = None, key: Any = None) -> tuple[PyTree, Stats]:
        checks.floating("rhs", rhs)
        size = sum(leaf.size for leaf in jax.tree.leaves(rhs))
        if size <= dense_below or positive_definite:
            return (small if size <= dense_below else large).solve(matvec, rhs, guess, key)
        why = f"auto: a system of {size} unknowns that is not positive definite, above dense_below={dense_below}"
        tolerance = max(float(jnp.finfo(leaf.dtype).eps) for leaf in jax.tree.leaves(rhs)) ** 0.5 if rtol is None else rtol
        gmres = _lineax(why).GMRES(rtol=tolerance, atol=0.0, max_steps=-(-max_steps // 20), restart=20)
        return from_lineax(gmres, damping=damping).solve(matvec, rhs, guess, key)

    return LinearSolver(solve, max(dense_below + 1.0, large.applications))


def from_lineax(solver: Any, *, positive_definite: bool = False, damping: Any = 0.0) -> LinearSolver:
    """A solver of lineax: CG, GMRES, BiCGStab, LU, and the others that take a square matrix given as a function.

    Args:
        solver: such as ``lineax.GMRES(rtol=1e-6, atol=1e-6)``.  Its tolerances hold entry by entry.
        positive_definite: whether A is symmetric positive definite; CG and Cholesky ask for it.

    Returns:
        A solver.  Codes: SUCCESSFUL, MAX_STEPS_REACHED, STAGNATION, BREAKDOWN as lineax says; SINGULAR for its other failures,
        where there is no finite solution (the guess or 0 is returned), or where a success or stagnation leaves a residual far
        above the tolerance; NEGATIVE_CURVATURE if A, said to be positive definite, is not so along u or b (along other
        directions it goes unseen: use `cg`); NONFINITE if A gives NaN.  ``steps`` is what lineax counts.

    Raises:
        ImportError: if lineax is not installed.

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
    solver = _still(solver)

    def iterate(A: Any, b: Array, guess: Array | None, eps: float, key: Any) -> tuple[Array, Stats]:
        del key
        tags = lx.positive_semidefinite_tag if positive_definite else ()
        operator = lx.FunctionLinearOperator(lambda u: A(u), jax.ShapeDtypeStruct(b.shape, b.dtype), tags)
        with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
            found = lx.linear_solve(operator, b, solver, options={} if guess is None else {"y0": guess}, throw=False)
        fine = all_finite(found.value)
        u = jnp.where(fine, found.value, jnp.zeros_like(b) if guess is None else guess)
        Au, Ab = A(u), A(b)
        rtol, atol = (_cast(getattr(solver, name, 0.0), b) for name in ("rtol", "atol"))
        residual, most = _norm(b - Au), 2 * atol * b.size**0.5 + (eps**0.25 + 2 * rtol) * _norm(b)
        curved = (_dot(u, Au) < eps * _norm(u) * _norm(Au)) | (_dot(b, Ab) < eps * _norm(b) * _norm(Ab))
        code = _first(
            (~all_finite((Au, Ab)), Result.NONFINITE),
            (_norm(b) == 0, Result.SUCCESSFUL),
            (curved & positive_definite, Result.NEGATIVE_CURVATURE),
            (found.result == lx.RESULTS.max_steps_reached, Result.MAX_STEPS_REACHED),
            (found.result == lx.RESULTS.breakdown, Result.BREAKDOWN),
            (~(fine & (residual <= most)), Result.SINGULAR),
            (found.result == lx.RESULTS.stagnation, Result.STAGNATION),
            (found.result != lx.RESULTS.successful, Result.SINGULAR),
        )
        return u, Stats(code, residual, jnp.asarray(found.stats.get("num_steps", b.size), jnp.int32) + 2)

    return _solver(iterate, float("nan"), symmetric=positive_definite, damping=_number("damping", damping, zero=True))


def _solver(
    iterate: Callable[..., tuple[Array, Stats]],
    applications: float,
    *,
    symmetric: bool | None = None,
    draws: int = 0,
    damping: Any = 0.0,
) -> LinearSolver:
    """A solver on pytrees from ``iterate(A, b, guess, eps, key) -> (u, Stats)`` on vectors, with ``A(u, k)``.

    On one vector a step is a few operations, where every leaf would add its own (forty leaves: `cg` takes half the time).
    ``symmetric`` is None for what is differentiated as it is written; otherwise ``du = A^-1 (db - dA u)``.
    """

    def solve(matvec: Any, rhs: PyTree, guess: PyTree = None, key: Any = None) -> tuple[PyTree, Stats]:
        checks.floating("rhs", rhs)
        dtypes = [leaf.dtype for leaf in jax.tree.leaves(rhs)]
        eps = max(float(jnp.finfo(d).eps) for d in dtypes)  # of the products
        wide = max((np.dtype(np.float32), *dtypes), key=lambda d: jnp.finfo(d).bits)

        def ravel(tree: PyTree) -> Any:
            return ravel_pytree(jax.tree.map(lambda leaf: jnp.asarray(leaf, wide), tree))

        b, unravel = ravel(rhs)
        if guess is not None:
            checks.same_shapes("guess", guess, rhs, "rhs")
            guess = jnp.where(all_finite(guess), ravel(guess)[0], jnp.zeros_like(b))

        def narrow(u: Array) -> PyTree:
            return jax.tree.map(lambda leaf, like: leaf.astype(like.dtype), unravel(u), rhs)

        def apply(u: Array, k: Any = None) -> Array:
            product = matvec(narrow(u), k) if draws else matvec(narrow(u))
            checks.same_shapes("matvec(u)", product, rhs, "rhs")
            flat = ravel(product)[0]
            return flat if isinstance(damping, int | float) and damping == 0 else flat + _cast(damping, u) * u

        def checked(A: Any, b: Array, guess: Array | None) -> tuple[Array, Stats]:
            fine = all_finite(b)
            b = jnp.where(fine, b, jnp.zeros_like(b))
            guess = None if guess is None else jnp.where((b == 0).all(), b, guess)
            u, (code, residual, steps) = iterate(A, b, guess, eps, key)
            residual = jnp.where(fine, residual, jnp.full_like(residual, jnp.nan))
            fine &= all_finite(u)
            u = jnp.where(fine, u, jnp.zeros_like(u))
            return u, Stats(_first((~fine, Result.NONFINITE), default=code), residual, steps)

        if symmetric is None:
            u, stats = checked(apply, b, guess)
            return narrow(u), stats
        A, consts = jax.closure_convert(apply, b)  # one trace of matvec; all that may have a derivative becomes an argument

        @jax.custom_jvp
        def solution(u: Array, b: Array, consts: Any) -> Array:
            """u, with the derivatives of ``A^-1 b``: their systems must not start at the guess."""
            del b, consts
            return u

        @solution.defjvp
        def _(primals: tuple, tangents: tuple) -> tuple:
            u, consts = solution(*primals), primals[2]
            _, change = jax.jvp(lambda b, consts: b - A(u, *consts), primals[1:], tangents[1:])

            def inverse(A: Any, b: Array) -> Array:
                return checked(lambda u, k=None: A(u), b, None)[0]

            return u, lax.custom_linear_solve(lambda u: A(u, *consts), change, inverse, inverse, bool(symmetric))

        still = lax.stop_gradient(consts)
        u, stats = checked(lambda u, k=None: A(u, *still), *lax.stop_gradient((b, guess)))
        return narrow(solution(u, b, consts)), stats

    return LinearSolver(solve, float(applications), draws)


def _march(steps: int, rates: Callable[[Array], tuple], *, growth: float, symmetric: bool | None) -> LinearSolver:
    """``u <- u + lam (b - A u) + th (u - previous u)``, as long as that is finite; fresh samples if ``symmetric`` is None."""
    checks.positive_int("steps", steps)
    fresh = symmetric is None

    def iterate(A: Any, b: Array, guess: Array | None, eps: float, key: Any) -> tuple[Array, Stats]:
        del key
        lam, th = rates(b)
        u = jnp.zeros_like(b) if guess is None else guess

        def step(state: tuple, k: Array) -> tuple:
            u, previous, first, _ = state
            r = b - A(u, k)
            size = jnp.sqrt(_square(r))
            new = u + lam * r if previous is None else u + lam * r + th * (u - previous)
            return r, (new, None if previous is None else u, jnp.where(k == 0, size, first), size)

        zero = jnp.zeros((), b.dtype)
        start = (u, None if th is None else u, zero, zero)
        (u, _, first, last), fine = _scan(step, start, jnp.arange(steps, dtype=jnp.int32))
        if fresh:  # residuals on other samples do not compare, but |u| <= |u_0| + k lam |b| as long as |I - lam A_k| <= 1
            most = (1 + eps**0.5) * (_norm(start[0]) + steps * lam * _norm(b))
            return u, Stats(_verdict(_norm(u), most, fine), last, jnp.int32(steps))
        residual, most = _norm(b - A(u)), growth * first + eps**0.5 * _norm(b)
        return u, Stats(_verdict(jnp.fmax(last, residual), most, fine), residual, jnp.int32(steps + 1))

    return _solver(iterate, steps if fresh else steps + 1, symmetric=symmetric, draws=steps if fresh else 0)


def _scan(step: Callable[[Any, Any], tuple[Array, Any]], state: Any, xs: Any) -> tuple[Any, Array]:
    """``step(state, x) -> (change, state)`` along ``xs``, as long as ``|change|^2`` is finite, which takes one pass over it.

    Returns the last state that was so, and whether all were.
    """

    def body(carry: tuple, x: Any) -> tuple[tuple, None]:
        state, fine = carry
        change, new = step(state, x)
        fine &= jnp.isfinite(_square(change))
        return (_where(fine, new, state), fine), None

    return lax.scan(body, (state, jnp.array(True)), xs)[0]


def _verdict(size: Array, most: Array, fine: Array) -> Array:
    """Of a method without a tolerance."""
    return _first((size > most, Result.DIVERGED), (~fine, Result.NONFINITE))


def _first(*cases: tuple[Array, Any], default: Any = Result.SUCCESSFUL) -> Array:
    """The code of the first case that holds."""
    code = jnp.asarray(default, jnp.int32)
    for condition, case in reversed(cases):
        code = jnp.where(condition, jnp.asarray(case, jnp.int32), code)
    return code


def _dot(a: Array, b: Array) -> Array:
    return jnp.vdot(a, b, precision=lax.Precision.HIGHEST)


def _square(a: Array) -> Array:
    """``a'a``, without a derivative: of the tests alone, and the root of 0 has none."""
    return _dot(*[lax.stop_gradient(a)] * 2)


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


def _number(name: str, value: Any, zero: bool = False) -> Any:
    """A positive finite number (or 0, if ``zero``), else an error; traced ones pass."""
    if isinstance(value, bool) or not isinstance(value, int | float | np.number | np.ndarray | jax.Array):
        raise TypeError(f"{name}: got {value!r} of type {type(value).__name__}, expected a number")
    known = not isinstance(value, Tracer) and np.ndim(value) == 0
    if known and not (0 < value < np.inf or (zero and value == 0)):
        raise ValueError(f"{name}: got {value}, expected a finite number {'of at least' if zero else 'above'} 0")
    return _still(value)


def _lineax(why: str) -> Any:
    try:
        return importlib.import_module("lineax")
    except ImportError as error:
        raise ImportError(f"{why}: needs lineax, which is not installed: pip install lineax") from error
