"""Linear systems ``A u = b`` with the matrix given as a function: ``solve(matvec, rhs, guess=None, key=None) -> (u, Stats)``.

In a bilevel problem ``A = d2_zz g`` and ``b = -d_z f``, and the solution is the v of the library's signs.  Numerical failure
never raises: it is reported as a code, with a residual and a solution without NaN.  A right-hand side of 0 gives 0; one that is
not finite gives 0 and NONFINITE.  Iterates whose squares overflow count as not finite.  Arguments out of range raise an error
when a solver is made; a guess or a ``matvec(u)`` that is not shaped like ``rhs`` raises one when the call is traced.
``damping=d`` solves ``(A + d I) u = b``; the residual is always ``|A u - b|``.

*Derivatives.*  Deterministic solvers are differentiated implicitly, ``du = A^-1 (db - dA u)`` with the same solver started at
0: forward and reverse, to any order, in the right-hand side, in the damping, and in whatever ``matvec`` closes over.  The guess
has no derivative.  Solvers with fresh samples or a key are differentiated as they are written, in their rate too.

*Numbers* may be traced.  Where the solution does not depend on one (tolerances, the rates and constants of deterministic
solvers), TypeError is raised if its derivative is asked for: pass it through `jax.lax.stop_gradient`.

Iterates and scalars are kept in float32 at least; ``matvec`` is given the dtypes of ``rhs``.  On accelerators that round the
factors of float32 products, solve under ``jax.default_matmul_precision("highest")``: rounded products are not symmetric.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from bilevel_jax import checks
from bilevel_jax.control_flow import cond, while_loop
from bilevel_jax.linear_contract import (
    LinearSolver,
    Stats,
    VectorSystem,
    cast,
    dot,
    first_code,
    from_vectors,
    norm,
    scan_while_finite,
    select,
    square,
    verdict,
)
from bilevel_jax.lineax_bridge import from_lineax, import_lineax
from bilevel_jax.neumann_series import nested_batches, neumann, random_neumann
from bilevel_jax.results import Result, all_finite
from bilevel_jax.types import Array, PyTree

__all__ = [
    "LinearSolver",
    "Stats",
    "auto",
    "cg",
    "dense",
    "from_lineax",
    "heavy_ball",
    "nested_batches",
    "neumann",
    "random_neumann",
    "richardson",
]


class _CG(NamedTuple):
    u: Array  # float [n], iterate
    r: Array  # float [n], b - A u, by recursion
    p: Array  # float [n], direction
    rr: Array  # float [], r'r
    scale: Array  # float [], largest |A p| / |p| seen, a lower bound of |A|
    best: tuple[Array, Array, Array]  # the checked iterate of smallest true residual, that residual, and it without damping
    residual: Array  # float [], the true residual without damping at the last check
    failures: Array  # int32 [], how often the recursive residual has met the tolerance
    steps: Array  # int32 []
    total: Array  # int32 [], applications of A
    code: Array  # int32 [], -1 as long as nothing has happened
    checking: Array  # bool [], whether A goes to the iterate next (check), or to the direction (step)


def cg(*, max_steps: int, rtol: Any = None, atol: Any = 0.0, damping: Any = 0.0) -> LinearSolver:
    """Conjugate gradients for a symmetric positive definite A: ``|A u - b| <= atol + rtol |b|``, tested on the true residual.

    Args:
        max_steps: most steps; a small number is a normal use (AID), and MAX_STEPS_REACHED then information.
        rtol, atol: tolerances; by default the square root of the machine epsilon of ``rhs``, and 0.  Not differentiable.
        damping: d >= 0 in ``(A + d I) u = b``, whose residual is the one that is tested; differentiable.

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
    atol, damping = (
        checks.constant("atol", checks.number("atol", atol, zero=True)),
        checks.number("damping", damping, zero=True),
    )
    rtol = None if rtol is None else checks.constant("rtol", checks.number("rtol", rtol, zero=True))

    def iterate(system: VectorSystem, b: Array, guess: Array | None, eps: float, key: Any) -> tuple[Array, Stats]:
        del key
        A, rr = system.A, dot(b, b)
        atol, rtol = system.numbers
        target = cast(atol, rr) + cast(eps**0.5 if rtol is None else rtol, rr) * norm(b)

        def step(s: _CG, Ap: Array) -> _CG:
            """Whether it may be done is seen from scalars, before it is done: no vector is read to be tested or restored."""
            pAp, pp, ApAp = dot(s.p, Ap), dot(s.p, s.p), dot(Ap, Ap)
            scale = jnp.maximum(s.scale, jnp.sqrt(ApAp / pp))
            alpha = s.rr / pAp
            code = first_code(
                (~((s.rr > 0) & (pp > 0) & jnp.isfinite(s.rr + pp)), Result.BREAKDOWN),
                (~jnp.isfinite(ApAp), Result.NONFINITE),
                (pAp <= eps * scale * pp, Result.NEGATIVE_CURVATURE),
                (~jnp.isfinite(alpha**2 * (pp + ApAp)), Result.BREAKDOWN),
                (s.steps + 1 >= max_steps, Result.MAX_STEPS_REACHED),
                default=s.code,
            )
            fine = code <= jnp.int32(Result.MAX_STEPS_REACHED)
            u, r = select(fine, (s.u + alpha * s.p, s.r - alpha * Ap), (s.u, s.r))
            rr = jnp.where(fine, dot(r, r), s.rr)
            beta = rr / s.rr
            p = jnp.where(fine & jnp.isfinite(beta**2 * pp), r + beta * s.p, r)
            # No check in between: exchanging r at the limit of the precision costs the directions their conjugacy.
            check = (jnp.sqrt(rr) <= target) | (code >= 0)
            return s._replace(u=u, r=r, p=p, rr=rr, scale=scale, steps=s.steps + 1, code=code, checking=check)

        def check(s: _CG, Au: Array) -> _CG:
            r = b - Au
            residual, uAu = norm(r), dot(s.u, Au)
            now = s.u, residual, system.residual_norm(s.u, r)
            failures = s.failures + (jnp.sqrt(s.rr) <= target).astype(jnp.int32)
            best = select(residual < s.best[1], now, s.best)
            code = first_code(
                (s.code > jnp.int32(Result.MAX_STEPS_REACHED), s.code),
                (~all_finite(Au), Result.NONFINITE),
                (uAu < -eps * norm(s.u) * norm(Au), Result.NEGATIVE_CURVATURE),  # of a good guess, where there is no step
                (residual <= target, Result.SUCCESSFUL),
                (failures >= 2, Result.STAGNATION),
                default=s.code,
            )
            u, _, residual = select(code == jnp.int32(Result.STAGNATION), best, now)
            p = s.p + (r - s.r)  # p = r + beta p_old was made with the r of the recursion: exchange that for the true one
            s = s._replace(u=u, r=r, p=p, rr=dot(r, r), best=best, residual=residual, failures=failures)
            return s._replace(code=code, checking=jnp.array(False))

        def apply(s: _CG) -> _CG:  # one application a pass, so that under vmap no lane pays for another's checks
            s = s._replace(total=s.total + 1)
            return cond(s.checking, check, step, s, A(jnp.where(s.checking, s.u, s.p)))

        zeros, large, count, code = jnp.zeros_like(b), jnp.full_like(rr, jnp.finfo(rr.dtype).max), jnp.int32(0), jnp.int32(-1)
        best = zeros, large, large
        s = _CG(zeros, b, b, rr, 0 * rr, best, large, count, count, count, code, jnp.sqrt(rr) <= target)
        if guess is not None:  # the first check turns r = p = 0 into b - A guess
            s = s._replace(u=guess, r=zeros, p=zeros, rr=large, checking=jnp.array(True))
        s = while_loop(lambda s: (s.code < 0) | s.checking, apply, s)
        return s.u, Stats(s.code, s.residual, s.total)

    return from_vectors(iterate, max_steps + 3.0, symmetric=True, damping=damping, numbers=(atol, rtol))


def richardson(*, steps: int, rate: Any, fresh: bool = False) -> LinearSolver:
    """Gradient steps (AID-FP, AmIGO): ``u <- u - rate (A_k u - b)`` from the guess, or from 0.

    From 0 and for a fixed A, ``steps`` of them are the Neumann sum of ``steps`` summands.

    Args:
        steps: number of steps.
        rate: a positive number, below 2/L; differentiable with ``fresh`` only.
        fresh: whether every step uses a new sample: A_k is then ``matvec(u, k)``, and ``draws = steps``.

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
    rate = checks.number("rate", rate) if fresh else checks.constant("rate", checks.number("rate", rate))
    return _march(steps, lambda b, rate: (cast(rate, b), None), (rate,), growth=1, symmetric=None if fresh else False)


def heavy_ball(*, steps: int, smoothness: Any, strong_convexity: Any) -> LinearSolver:
    """Heavy ball (AccBiO): ``u_{t+1} = u_t - lam (A u_t - b) + th (u_t - u_{t-1})``, with ``u_1 = u_0`` the guess or 0.

    ``lam = 4 / (sqrt L + sqrt mu)^2``, ``th = max((1 - sqrt(lam mu))^2, (1 - sqrt(lam L))^2)``: about as fast as conjugate
    gradients in the worst case, ``(sqrt k - 1) / (sqrt k + 1)`` a step with k = L / mu, without a scalar product.

    Args:
        steps: number of steps.
        smoothness, strong_convexity: L >= mu > 0, bounds of the eigenvalues of a symmetric A; not differentiable.

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
    smoothness = checks.constant("smoothness", checks.number("smoothness", smoothness))
    strong_convexity = checks.constant("strong_convexity", checks.number("strong_convexity", strong_convexity))
    if isinstance(smoothness, int | float) and isinstance(strong_convexity, int | float) and smoothness < strong_convexity:
        raise ValueError(f"smoothness: got {smoothness}, expected at least strong_convexity, {strong_convexity}")

    def rates(b: Array, smoothness: Any, strong_convexity: Any) -> tuple[Array, Array]:
        L, mu = jnp.sqrt(cast(smoothness, b)), jnp.sqrt(cast(strong_convexity, b))
        root = 2 / (L + mu)
        return root**2, jnp.maximum((1 - root * mu) ** 2, (1 - root * L) ** 2)

    return _march(steps, rates, (smoothness, strong_convexity), growth=2 * steps + 1, symmetric=True)


def dense(*, positive_definite: bool = True, damping: Any = 0.0) -> LinearSolver:
    """Direct solution of a small system: A by its columns, then Cholesky, or LU where A is not positive definite.

    Args:
        positive_definite: whether A is symmetric positive definite.  False: LU, and derivatives that do not assume symmetry.
        damping: d >= 0 in ``(A + d I) u = b``; differentiable.

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
    damping = checks.number("damping", damping, zero=True)

    def iterate(system: VectorSystem, b: Array, guess: Array | None, eps: float, key: Any) -> tuple[Array, Stats]:
        del guess, key
        with jax.default_matmul_precision("highest"):
            matrix = jax.vmap(system.A, out_axes=1)(jnp.eye(b.size, dtype=b.dtype))

            def general() -> tuple[Array, Array]:
                factors, order = jax.scipy.linalg.lu_factor(matrix)
                return jax.scipy.linalg.lu_solve((factors, order), b), jnp.abs(jnp.diagonal(factors))

            if positive_definite:
                lower = jnp.linalg.cholesky(matrix)
                definite = jnp.isfinite(lower).all()

                def symmetric() -> tuple[Array, Array]:
                    return jax.scipy.linalg.cho_solve((lower, True), b), jnp.diagonal(lower) ** 2

                u, pivots = cond(definite, symmetric, general)
            else:
                (u, pivots), definite = general(), jnp.array(True)
        u = jnp.where(jnp.isfinite(u).all(), u, jnp.zeros_like(u))
        r = b - system.A(u)
        code = first_code(
            (~jnp.isfinite(matrix).all(), Result.NONFINITE),
            (~((pivots.min() > b.size * eps * pivots.max()) & (norm(r) <= eps**0.25 * norm(b))), Result.SINGULAR),
            (~definite, Result.NEGATIVE_CURVATURE),
        )
        return u, Stats(code, system.residual_norm(u, r), jnp.int32(b.size + 1))

    return from_vectors(iterate, float("nan"), symmetric=positive_definite, damping=damping)


def auto(
    *, positive_definite: bool = True, dense_below: int = 256, max_steps: int = 1000, rtol: Any = None, damping: Any = 0.0
) -> LinearSolver:
    """`dense` for systems of at most ``dense_below`` unknowns; above, `cg`, or GMRES where A is not symmetric.

    Never the normal equations: they square the condition number.

    Args:
        positive_definite: whether A is symmetric positive definite.  False above ``dense_below`` needs lineax.
        dense_below: largest number of unknowns solved directly; 0 for none.
        max_steps, rtol, damping: as for `cg`; GMRES starts anew every 20 applications.

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
        rhs = checks.floating("rhs", rhs)
        size = sum(leaf.size for leaf in jax.tree.leaves(rhs))
        if size <= dense_below or positive_definite:
            return (small if size <= dense_below else large).solve(matvec, rhs, guess, key)
        why = f"auto: a system of {size} unknowns that is not positive definite, above dense_below={dense_below}"
        tolerance = max(float(jnp.finfo(leaf.dtype).eps) for leaf in jax.tree.leaves(rhs)) ** 0.5 if rtol is None else rtol
        gmres = import_lineax(why).GMRES(rtol=tolerance, atol=0.0, max_steps=-(-max_steps // 20), restart=20)
        return from_lineax(gmres, damping=damping).solve(matvec, rhs, guess, key)

    return LinearSolver(solve, max(dense_below + 1.0, large.applications))


def _march(steps: int, rates: Callable[..., tuple], numbers: tuple, *, growth: float, symmetric: bool | None) -> LinearSolver:
    """``u <- u + lam (b - A u) + th (u - previous u)``, as long as that is finite; fresh samples if ``symmetric`` is None."""
    checks.positive_int("steps", steps)
    fresh = symmetric is None

    def iterate(system: VectorSystem, b: Array, guess: Array | None, eps: float, key: Any) -> tuple[Array, Stats]:
        del key
        A, (lam, th) = system.A, rates(b, *system.numbers)
        u = jnp.zeros_like(b) if guess is None else guess

        def step(state: tuple, k: Array) -> tuple:
            u, previous, first, _ = state
            r = b - A(u, k)
            size = jnp.sqrt(square(r))
            new = u + lam * r if previous is None else u + lam * r + th * (u - previous)
            return r, (new, None if previous is None else u, jnp.where(k == 0, size, first), size)

        zero = jnp.zeros((), b.dtype)
        start = (u, None if th is None else u, zero, zero)
        (u, _, first, last), fine = scan_while_finite(step, start, jnp.arange(steps, dtype=jnp.int32))
        if fresh:  # residuals on other samples do not compare, but |u| <= |u_0| + k lam |b| as long as |I - lam A_k| <= 1
            most = (1 + eps**0.5) * (norm(start[0]) + steps * lam * norm(b))
            return u, Stats(verdict(norm(u), most, fine), last, jnp.int32(steps))
        residual, most = norm(b - A(u)), growth * first + eps**0.5 * norm(b)
        return u, Stats(verdict(jnp.fmax(last, residual), most, fine), residual, jnp.int32(steps + 1))

    applications, draws = (steps, steps) if fresh else (steps + 1, 0)
    return from_vectors(iterate, applications, symmetric=symmetric, draws=draws, numbers=numbers)
