"""Derivatives of a solution whatever computed it: decorators for an inner solver of your own, and the rules as functions.

`implicit_root` and `implicit_fixed_point` give a black-box inner solver the derivatives of its solution; `root_jvp` and
`root_vjp` are those derivatives as functions, with the residuals and the result code that tell how far to trust them.
"""

import functools
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.custom_derivatives import SymbolicZero

from bilevel_jax import checks
from bilevel_jax.arguments import Call, binder, by_position, split
from bilevel_jax.hypergrad import Stats, account, usable
from bilevel_jax.linear_contract import as_vector
from bilevel_jax.linear_solve import LinearSolver
from bilevel_jax.results import Result
from bilevel_jax.types import Array, PyTree


def implicit_root(
    optimality: Callable[..., PyTree],
    *,
    solver: LinearSolver | None = None,
    positive_definite: bool = False,
    has_aux: bool = False,
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorator: derivatives for ``solve(init, *params)`` whose solution satisfies ``optimality(solution, *params) = 0``.

    The inner solver may be anything: an optax loop, L-BFGS, optimistix, a ``pure_callback`` to another library, plain Python
    outside of jit; it is never differentiated.  With ``A = d optimality / d solution`` the derivative along ``dparams`` solves
    ``A dz = -(d optimality / d params) dparams``.  Forward and reverse mode, `jax.hessian`, jit, vmap, `jax.checkpoint` and
    nesting work.

    *Parameters* are pytrees.  Floating-point leaves are differentiated; integers, booleans and keys have no derivative.  A leaf
    that is not an array (a Python int or bool, a string, a function) is static: it must be hashable, and a new value compiles
    anew.

    *Arguments* may be given by position or by name.  If ``optimality`` has a parameter for each required argument of ``solve``,
    arguments reach it by name; otherwise by position.  An argument with a default that ``optimality`` does not have is an
    option of ``solve`` alone.  ``solve`` may lack ``init``.  It does if its first argument has the name of a parameter of
    ``optimality``.  If the two share no name and the first argument is not called ``init``, it does if it requires as many
    arguments as ``optimality`` requires parameters.  To decorate a method, decorate the bound one.

    A derivative cannot return a code.  Where the linear system fails (any code but SUCCESSFUL, MAX_STEPS_REACHED and
    STAGNATION), all of it is NaN; `root_vjp` returns the code, and the residual of the optimality.

    Args:
        optimality: ``(solution, *params) -> pytree`` like the solution, such as ``jax.grad(loss)``.  It is compiled once for
            the parameters' shapes: whatever may change, and whatever is differentiated, must be a parameter.
        solver: for systems with A and its transpose; `bilevel_jax.linear_solve.auto` by default.
        positive_definite: whether A is symmetric positive definite, as for the gradient of a strongly convex loss.
        has_aux: whether ``solve`` (not ``optimality``) returns ``(solution, aux)``; aux gets no derivative.

    Returns:
        A decorator, to be applied once, because every application compiles anew.  ``init`` gets no derivative: the solution
        does not depend on it.  Of the parameters, those that are not floating-point have none.

    Raises:
        TypeError, ValueError: for anything but a ``LinearSolver``, and one that wants samples; (when called) if ``solve``
            returns no pair with ``has_aux``, for arguments that ``solve`` or ``optimality`` does not take, and for a parameter
            that is neither an array nor hashable; (when differentiated) if ``optimality`` is not shaped like the solution, or
            that is not floating-point; jax's UnexpectedTracerError if a function closes over what is differentiated.

    Reference: Blondel, Berthet, Cuturi, Frostig, Hoyer, Llinares-López, Pedregosa, Vert, "Efficient and modular implicit
    differentiation", NeurIPS 2022, arXiv 2105.15183.

    Example:
        >>> @implicit_root(lambda z, theta: z**3 + z - theta)
        ... def cube(init, theta):
        ...     return jax.lax.fori_loop(0, 50, lambda _, z: z - (z**3 + z - theta) / (3 * z**2 + 1), init)
        >>> float(jax.grad(cube, argnums=1)(jnp.ones(()), jnp.asarray(2.0)))  # 1 / (3 z^2 + 1) at z = 1
        0.25
    """
    solver, optimality = usable(solver, positive_definite), by_position(optimality)

    @partial(jax.jit, static_argnums=0)  # or gradients outside of jit would compile their loops again and again
    def tangent(call: Call, solution: PyTree, leaves: list, moving: list) -> PyTree:
        if all(d is None for d in moving):
            return jax.tree.map(jnp.zeros_like, solution)

        def at(z: PyTree, some: list) -> PyTree:
            rest = iter(some)
            every = [p if d is None else next(rest) for p, d in zip(leaves, moving, strict=True)]
            return call.apply_other(optimality, (z,), every)

        some = [p for p, d in zip(leaves, moving, strict=True) if d is not None]
        _, jacobian, rhs = _linear_system(at, solution, some, [d for d in moving if d is not None])
        b, ravel, unravel = as_vector(rhs)

        def inverse(matvec: Any, b: Array) -> Array:
            dz, stats = solver.solve(lambda u: unravel(matvec(ravel(u))), unravel(b))
            # NaN where the solve has failed, else 0; without a constant NaN, which jax_debug_nans reports
            return ravel(dz) + jnp.log(jnp.where(stats.code <= jnp.int32(Result.STAGNATION), 1, -1).astype(b.dtype))

        # One vector: jax transposes the system only if all of its right-hand side depends on what is differentiated.
        return unravel(lax.custom_linear_solve(lambda u: ravel(jacobian(unravel(u))), b, inverse, inverse, positive_definite))

    def decorate(solve: Callable[..., Any]) -> Callable[..., Any]:
        bind = binder(solve, optimality)

        @partial(jax.custom_jvp, nondiff_argnums=(0,))
        def root(call: Call, init: tuple, leaves: list) -> tuple[PyTree, PyTree]:
            found = call.apply(solve, init, leaves)
            if has_aux and not (isinstance(found, tuple) and len(found) == 2):
                raise TypeError(f"solve: got {type(found).__name__}, expected (solution, aux), because has_aux is True")
            return found if has_aux else (found, None)

        @partial(root.defjvp, symbolic_zeros=True)
        def derivative(call: Call, primals: tuple, tangents: tuple) -> tuple:
            (init, leaves), (_, dleaves) = primals, tangents
            solution, aux = root(call, init, leaves)
            dz = tangent(call, solution, leaves, [_number(d) for d in dleaves])
            return (solution, aux), (dz, jax.tree.map(_no_tangent, aux))

        @functools.wraps(solve)
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            init, call, leaves = bind(*args, **kwargs)
            solution, aux = root(call, init, leaves)
            return (solution, aux) if has_aux else solution

        return wrapped

    return decorate


def implicit_fixed_point(
    fixed_point: Callable[..., PyTree],
    *,
    solver: LinearSolver | None = None,
    positive_definite: bool = False,
    has_aux: bool = False,
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorator: derivatives for ``solve(init, *params)`` whose solution satisfies ``fixed_point(z, *params) = z``.

    As `implicit_root` of ``z - fixed_point(z, *params)``: a projected or proximal gradient step, an equilibrium network, a
    value iteration.

    Args, Returns, Raises, Reference: as `implicit_root`.

    Example:
        >>> @implicit_fixed_point(lambda z, theta: jnp.clip(z - 0.5 * (z - theta), 0.0, 1.0))
        ... def projected(init, theta):
        ...     return jnp.clip(theta, 0.0, 1.0)
        >>> jax.jacobian(projected, argnums=1)(jnp.zeros(2), jnp.array([0.5, 2.0])).tolist()
        [[1.0, 0.0], [0.0, 0.0]]
    """

    @functools.wraps(fixed_point)
    def residual(z: PyTree, *params: Any, **named: Any) -> PyTree:  # names are resolved by the signature of fixed_point
        image = fixed_point(z, *params, **named)
        checks.same_shapes("fixed_point", image, z, "the solution")
        return jax.tree.map(jnp.subtract, z, image)

    return implicit_root(residual, solver=solver, positive_definite=positive_definite, has_aux=has_aux)


def root_jvp(
    optimality: Callable[..., PyTree],
    solution: PyTree,
    params: tuple,
    tangents: tuple,
    *,
    solver: LinearSolver | None = None,
    positive_definite: bool = False,
    tolerance: float | None = None,
) -> tuple[PyTree, Stats]:
    """The derivative of a root along ``tangents`` of its parameters: ``A dz = -(d optimality / d params) tangents``.

    Args:
        optimality, solver, positive_definite: as for `implicit_root`.
        solution: z with ``optimality(z, *params) = 0``.
        params, tangents: tuples.  The tangent of a leaf that is not floating-point is not used.
        tolerance: if given, ``|optimality|`` above it is reported as INNER_NOT_CONVERGED.

    Returns:
        ``(dz, stats)``: the code is the linear solver's, ``inner_residual`` is ``|optimality|``, ``aux`` is None.

    Example:
        >>> dz, stats = root_jvp(lambda z, t: z**3 + z - t, jnp.ones(()), (jnp.asarray(2.0),), (jnp.asarray(1.0),))
        >>> float(dz), Result(int(stats.code)).name
        (0.25, 'SUCCESSFUL')
    """
    call, leaves = _split(solution, params)
    if not isinstance(tangents, tuple):
        raise TypeError(f"tangents: got {type(tangents).__name__}, expected a tuple")
    along = [
        d if jnp.issubdtype(jnp.result_type(p), jnp.inexact) else _no_tangent(p)
        for p, d in zip(leaves, call.arrays_of(tangents), strict=True)
    ]
    value, jacobian, rhs = _linear_system(lambda z, leaves: call.apply(optimality, (z,), leaves), solution, leaves, along)
    dz, linear = usable(solver, positive_definite, tolerance).solve(jacobian, rhs)
    return dz, account(value, tolerance, linear, solution, None, dz)


def root_vjp(
    optimality: Callable[..., PyTree],
    solution: PyTree,
    params: tuple,
    cotangent: PyTree,
    *,
    solver: LinearSolver | None = None,
    positive_definite: bool = False,
    tolerance: float | None = None,
) -> tuple[tuple, Stats]:
    """Pull a cotangent of a root back to its parameters: ``A' v = -cotangent``, then ``(d optimality / d params)' v``.

    This is what reverse mode does through `implicit_root`, which can report nothing: call it at a solution to see the code
    and the residuals of both systems.

    Args:
        optimality, solver, positive_definite: as for `implicit_root`.
        solution: z with ``optimality(z, *params) = 0``.
        params: tuple.
        cotangent: like the solution: the gradient at it of what is differentiated.
        tolerance: if given, ``|optimality|`` above it is reported as INNER_NOT_CONVERGED.

    Returns:
        ``(gradients, stats)``: a tuple like ``params``, with None for static leaves; the code is the linear solver's,
        ``inner_residual`` is ``|optimality|``, ``aux`` is v.

    Example:
        >>> (slope,), stats = root_vjp(lambda z, t: z**2 - t, jnp.asarray(-2.0), (jnp.asarray(4.0),), jnp.ones(()))
        >>> float(slope), float(stats.inner_residual)
        (-0.25, 0.0)
    """
    call, leaves = _split(solution, params)
    value, pull = jax.vjp(lambda z: call.apply(optimality, (z,), leaves), solution)
    checks.same_shapes("optimality", value, solution, "the solution")
    checks.same_shapes("cotangent", cotangent, solution, "the solution")
    rhs = jax.tree.map(jnp.negative, cotangent)
    v, linear = usable(solver, positive_definite, tolerance).solve(lambda u: pull(u)[0], rhs)
    _, pull = jax.vjp(lambda leaves: call.apply(optimality, (solution,), leaves), leaves)
    slopes = pull(v)[0]
    gradients, _ = call.fill(slopes, statics=False)
    return gradients, account(value, tolerance, linear, solution, v, (v, [_number(slope) for slope in slopes]))


def _linear_system(at: Callable, solution: PyTree, leaves: list, dleaves: list) -> tuple[PyTree, Callable, PyTree]:
    """The optimality ``at(solution, leaves)``, its Jacobian as a function, and the right-hand side along ``dleaves``."""
    checks.floating("solution", solution)
    value, moved = jax.jvp(lambda leaves: at(solution, leaves), (leaves,), (dleaves,))
    checks.same_shapes("optimality", value, solution, "the solution")
    _, jacobian = jax.linearize(lambda z: at(z, leaves), solution)
    return value, jacobian, jax.tree.map(jnp.negative, moved)


def _split(solution: PyTree, params: Any) -> tuple[Call, list]:
    """The parameters as a call of the optimality, and their arrays."""
    checks.floating("solution", solution)
    if not isinstance(params, tuple):
        raise TypeError(f"params: got {type(params).__name__}, expected a tuple")
    return split(params, {}, tuple(f"params[{i}]" for i in range(len(params))))


def _no_tangent(leaf: Any) -> Any:
    if jnp.issubdtype(jnp.result_type(leaf), jnp.inexact):
        return jnp.zeros_like(leaf)
    return np.zeros(np.shape(leaf), jax.dtypes.float0)


def _number(leaf: Any) -> Any:
    """A tangent, or None where there is none: a symbolic zero, or that of a parameter that is not floating-point (float0)."""
    return None if isinstance(leaf, SymbolicZero) or jax.dtypes.result_type(leaf) == jax.dtypes.float0 else leaf
