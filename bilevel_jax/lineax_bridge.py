"""The solvers of lineax under the contract of `bilevel_jax.linear_solve`."""

import importlib
from typing import Any

import jax
import jax.numpy as jnp

from bilevel_jax import checks
from bilevel_jax.linear_contract import (
    LinearSolver,
    Stats,
    VectorSystem,
    cast,
    dot,
    first_code,
    from_vectors,
    norm,
)
from bilevel_jax.results import Result, all_finite
from bilevel_jax.types import Array


def from_lineax(solver: Any, *, positive_definite: bool = False, damping: Any = 0.0) -> LinearSolver:
    """A solver of lineax: CG, GMRES, BiCGStab, LU, and the others that take a square matrix given as a function.

    Args:
        solver: such as ``lineax.GMRES(rtol=1e-6, atol=1e-6)``.  Its tolerances hold entry by entry, and are not
            differentiable.
        positive_definite: whether A is symmetric positive definite; CG and Cholesky ask for it.
        damping: d >= 0 in ``(A + d I) u = b``; differentiable.

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
    lx = import_lineax("from_lineax")
    if not isinstance(solver, lx.AbstractLinearSolver):
        raise TypeError(f"solver: got {type(solver).__name__}, expected a solver of lineax")
    solver, damping = checks.constant("solver", solver), checks.number("damping", damping, zero=True)

    def iterate(system: VectorSystem, b: Array, guess: Array | None, eps: float, key: Any) -> tuple[Array, Stats]:
        del key
        A = system.A
        tags = lx.positive_semidefinite_tag if positive_definite else ()
        operator = lx.FunctionLinearOperator(lambda u: A(u), jax.ShapeDtypeStruct(b.shape, b.dtype), tags)
        with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
            found = lx.linear_solve(operator, b, solver, options={} if guess is None else {"y0": guess}, throw=False)
        fine = all_finite(found.value)
        u = jnp.where(fine, found.value, jnp.zeros_like(b) if guess is None else guess)
        Au, Ab = A(u), A(b)
        rtol, atol = (cast(getattr(solver, name, 0.0), b) for name in ("rtol", "atol"))
        r, most = b - Au, 2 * atol * b.size**0.5 + (eps**0.25 + 2 * rtol) * norm(b)
        curved = (dot(u, Au) < eps * norm(u) * norm(Au)) | (dot(b, Ab) < eps * norm(b) * norm(Ab))
        code = first_code(
            (~all_finite((Au, Ab)), Result.NONFINITE),
            (norm(b) == 0, Result.SUCCESSFUL),
            (curved & positive_definite, Result.NEGATIVE_CURVATURE),
            (found.result == lx.RESULTS.max_steps_reached, Result.MAX_STEPS_REACHED),
            (found.result == lx.RESULTS.breakdown, Result.BREAKDOWN),
            (~(fine & (norm(r) <= most)), Result.SINGULAR),
            (found.result == lx.RESULTS.stagnation, Result.STAGNATION),
            (found.result != lx.RESULTS.successful, Result.SINGULAR),
        )
        return u, Stats(code, system.residual_norm(u, r), jnp.asarray(found.stats.get("num_steps", b.size), jnp.int32) + 2)

    return from_vectors(iterate, float("nan"), symmetric=positive_definite, damping=damping)


def import_lineax(why: str) -> Any:
    """The module lineax; ImportError that says what needs it, if it is not installed."""
    try:
        return importlib.import_module("lineax")
    except ImportError as error:
        raise ImportError(f"{why}: needs lineax, which is not installed: pip install lineax") from error
