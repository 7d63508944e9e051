"""The contract of linear solvers, and the front end that all of `bilevel_jax.linear_solve` share: pytrees as one vector,
derivatives, damping, and values that are not finite.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.flatten_util import ravel_pytree

from bilevel_jax import checks
from bilevel_jax.control_flow import scan, settled, varying
from bilevel_jax.results import Result, all_finite
from bilevel_jax.trees import widest
from bilevel_jax.types import Array, PyTree


class Stats(NamedTuple):
    """How a solve ended.  These values have no derivative."""

    code: Array  # int32 [], a `bilevel_jax.Result`, of the damped system where there is damping
    #: float [], |A u - b|_2 without damping, recomputed at the end, where the solver does not call it an estimate.  Where b is
    #: not finite, neither is this.
    residual: Array
    steps: Array  # int32 [], applications of A that were done


class LinearSolver(NamedTuple):
    """``solve(matvec, rhs, guess=None, key=None) -> (solution, Stats)``, pytrees in the structure and dtypes of ``rhs``.

    With ``draws > 0`` the solver calls ``matvec(u, k)``, k = 0, ..., draws - 1, so that every application can use a sample of
    its own; otherwise it calls ``matvec(u)``.
    """

    solve: Callable[..., tuple[PyTree, Stats]]
    applications: float  # of A in a call, on average or at most; nan where that depends on the system
    draws: int = 0


def from_vectors(
    iterate: Callable[..., tuple[Array, Stats]],
    applications: float,
    *,
    symmetric: bool | None = None,
    draws: int = 0,
    damping: Any = 0.0,
    numbers: tuple = (),
) -> LinearSolver:
    """A solver on pytrees from ``iterate(system, b, guess, eps, key) -> (u, Stats)`` on vectors; see `VectorSystem`.

    On one vector a step is a few operations, where every leaf would add its own (forty leaves: `cg` takes half the time).
    ``symmetric`` is None for what is differentiated as it is written; otherwise ``du = A^-1 (db - dA u)``, where the damping
    belongs to A.  ``numbers`` are those of the method that may be traced, such as its tolerances.  The method takes them from
    the system, because a derivative rule that closes over traced values leaks them.
    """
    damped = not (isinstance(damping, int | float) and damping == 0)

    def solve(matvec: Any, rhs: PyTree, guess: PyTree = None, key: Any = None) -> tuple[PyTree, Stats]:
        rhs = checks.floating("rhs", rhs)
        eps = max(float(jnp.finfo(leaf.dtype).eps) for leaf in jax.tree.leaves(rhs))  # of the products
        b, ravel, unravel = as_vector(rhs)
        if guess is not None:
            checks.same_shapes("guess", guess, rhs, "rhs")
            guess = jnp.where(all_finite(guess), ravel(guess), jnp.zeros_like(b))

        def apply(u: Array, k: Any = None) -> Array:
            product = matvec(unravel(u), k) if draws else matvec(unravel(u))
            checks.same_shapes("matvec(u)", product, rhs, "rhs")
            return ravel(product) + cast(damping, u) * u if damped else ravel(product)

        def undamped(u: Array, r: Array) -> Array:
            return norm(r + cast(lax.stop_gradient(damping), u) * u) if damped else norm(r)

        def checked(system: VectorSystem, b: Array, guess: Array | None, key: Any = None) -> tuple[Array, Stats]:
            fine, size = all_finite(b), dot(b, b)  # not finite where b is not
            b = jnp.where(fine, b, jnp.zeros_like(b))
            guess = None if guess is None else jnp.where((b == 0).all(), b, guess)
            u, (code, residual, steps) = iterate(system, b, guess, eps, key)
            residual = jnp.where(fine, residual, size)
            fine &= all_finite(u)
            u = jnp.where(fine, u, jnp.zeros_like(u))
            return u, Stats(first_code((~fine, Result.NONFINITE), default=code), residual, steps)

        if symmetric is None:
            u, stats = checked(VectorSystem(apply, undamped, numbers), b, guess, key)
            return unravel(u), stats
        b = settled(apply, b if guess is None else varying(b, guess))
        product, consts = jax.closure_convert(apply, b)  # one trace of matvec; all that may have a derivative is an argument
        shape = jax.eval_shape(lambda b: b, b)  # in place of b itself, which the derivative rule must not close over
        A = lambda u, *consts: product(varying(u, shape), *consts)  # noqa: E731

        @jax.custom_jvp
        def solution(u: Array, b: Array, consts: Any, numbers: tuple) -> Array:
            """u, with the derivatives of ``A^-1 b``: their systems must not start at the guess."""
            del b, consts, numbers
            return u

        @solution.defjvp
        def _(primals: tuple, tangents: tuple) -> tuple:
            u, (_, b, consts, numbers) = solution(*primals), primals
            _, change = jax.jvp(lambda b, consts: b - A(u, *consts), (b, consts), tangents[1:3])

            def inverse(A: Any, b: Array) -> Array:
                return checked(VectorSystem(lambda u, k=None: A(u), lambda u, r: norm(r), numbers), b, None)[0]

            return u, lax.custom_linear_solve(lambda u: A(u, *consts), change, inverse, inverse, bool(symmetric))

        still = lax.stop_gradient(consts)
        system = VectorSystem(lambda u, k=None: A(u, *still), undamped, numbers)
        u, stats = checked(system, *lax.stop_gradient((b, guess)), key)
        return unravel(solution(u, b, consts, numbers)), stats

    return LinearSolver(solve, float(applications), draws)


class VectorSystem(NamedTuple):
    """A linear system on one vector, as the methods see it."""

    A: Callable[..., Array]  # (u, k=None) -> the product, with damping
    residual_norm: Callable[[Array, Array], Array]  # (u, b - A u) -> |b - A u| without damping
    numbers: tuple  # of the method: see `from_vectors`


def as_vector(tree: PyTree) -> tuple[Array, Callable[[PyTree], Array], Callable[[Array], PyTree]]:
    """A pytree as one vector, the same map for trees like it, and the way back to its dtypes.

    The vector has the widest dtype of the leaves, and float32 at least.
    """
    wide = widest(tree)

    def ravel(tree: PyTree) -> Any:
        return ravel_pytree(jax.tree.map(lambda leaf: jnp.asarray(leaf, wide), tree))

    vector, back = ravel(tree)

    def unravel(u: Array) -> PyTree:
        return jax.tree.map(lambda leaf, like: leaf.astype(like.dtype), back(u), tree)

    return vector, lambda tree: ravel(tree)[0], unravel


def scan_while_finite(step: Callable[[Any, Any], tuple[Array, Any]], state: Any, xs: Any) -> tuple[Any, Array]:
    """``step(state, x) -> (change, state)`` along ``xs``, as long as ``|change|^2`` is finite, which takes one pass over it.

    Returns the last state that was so, and whether all were.
    """

    def body(carry: tuple, x: Any) -> tuple[tuple, None]:
        state, fine = carry
        change, new = step(state, x)
        fine &= jnp.isfinite(square(change))
        return (select(fine, new, state), fine), None

    return scan(body, (state, jnp.array(True)), xs)[0]


def verdict(size: Array, most: Array, fine: Array) -> Array:
    """Of a method without a tolerance."""
    return first_code((size > most, Result.DIVERGED), (~fine, Result.NONFINITE))


def first_code(*cases: tuple[Array, Any], default: Any = Result.SUCCESSFUL) -> Array:
    """The code of the first case that holds."""
    code = jnp.asarray(default, jnp.int32)
    for condition, case in reversed(cases):
        code = jnp.where(condition, jnp.asarray(case, jnp.int32), code)
    return code


def dot(a: Array, b: Array) -> Array:
    """``a'b`` at the full precision of the dtype."""
    return jnp.vdot(a, b, precision=lax.Precision.HIGHEST)


def square(a: Array) -> Array:
    """``a'a``, without a derivative: of the tests alone, and the root of 0 has none."""
    return dot(*[lax.stop_gradient(a)] * 2)


def norm(a: Array) -> Array:
    """The Euclidean norm, safe from under- and overflow, so 0 for 0 only; without a derivative, which 0 has not."""
    a = lax.stop_gradient(a)
    largest = jnp.abs(a).max(initial=0)
    unit = jnp.where((largest > 0) & jnp.isfinite(largest), largest, jnp.ones_like(largest))
    return unit * jnp.sqrt(dot(a / unit, a / unit))


def cast(value: Any, like: Array) -> Array:
    """A number in the dtype of an array."""
    return jnp.asarray(value, like.dtype)


def select(condition: Array, a: Any, b: Any) -> Any:
    """``a`` where the condition holds, else ``b``, leaf by leaf."""
    return jax.tree.map(lambda x, y: jnp.where(condition, x, y), a, b)
