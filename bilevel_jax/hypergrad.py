"""The hypergradient as a function: ``grad h(x)``, ``h(x) = f(z*(x), x)``, at given z and x by one of the methods here.

Each says how far it can be trusted: the residuals of both levels and a result code.  Derivatives of an inner solver of your
own are in `bilevel_jax.implicit_diff`.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from bilevel_jax import checks, linear_solve
from bilevel_jax.control_flow import marked, scan
from bilevel_jax.linear_solve import LinearSolver
from bilevel_jax.optimisers import begin, moved
from bilevel_jax.oracles import losses
from bilevel_jax.results import Result, all_finite, keep
from bilevel_jax.trees import narrow, norm, widen
from bilevel_jax.types import Array, Batch, Problem, PyTree


class Stats(NamedTuple):
    """How far a hypergradient can be trusted, and what it was computed with."""

    code: Array  # int32 [], a `bilevel_jax.Result`
    inner_residual: Array  # |d_z g(z, x)|: 0 at z = z*(x)
    #: |d2_zz g v + d_z f|, without damping, or the estimate that the linear solver documents; None where a method has no v.
    adjoint_residual: Array | None
    steps: Array  # int32 [], Hessian-vector products (implicit) or inner steps (iterative)
    inner: PyTree  # the z at which f was evaluated
    aux: PyTree  # v, to warm-start the next call with; None where a method has none


class Losses(NamedTuple):
    """The two losses on one batch, as functions of (z, x) to scalars."""

    g: Callable[[PyTree, PyTree], Array]
    f: Callable[[PyTree, PyTree], Array]


#: ``(losses, z, x, guess of v or None, key or None) -> (value, gradient, Stats)``.
Method = Callable[[Losses, PyTree, PyTree, PyTree, Any], tuple[Array, PyTree, Stats]]


def hypergradient(problem: Problem, method: Method) -> Callable[..., tuple[Array, PyTree, Stats]]:
    """``(z, x, batch, guess=None, key=None) -> (value, gradient, Stats)`` by a method of this module.

    Args:
        problem: the two losses.
        method: `implicit`, `iterative`, `zeroth_order`, `one_step` or `t1_t2`.

    Returns:
        A pure function.  ``value`` is f at the method's inner solution, ``gradient`` is shaped like x, ``guess`` starts the
        linear solver (pass ``stats.aux`` of the last call), ``key`` is for linear solvers that draw.

    Raises:
        TypeError, ValueError: for anything but a ``Problem`` and a method; (when traced) for variables that are not
            floating-point pytrees, a batch that is not a ``Batch``, and losses that return neither a scalar nor one value a
            sample.

    Example:
        >>> from bilevel_jax import testing
        >>> q = testing.quadratic(jax.random.key(0))
        >>> at = q.at(q.start.outer)
        >>> _, gradient, stats = hypergradient(q.problem, implicit())(at.inner, at.outer, Batch(*q.data))
        >>> bool(jnp.allclose(gradient, q.gradient(at.outer), atol=1e-4)), int(stats.code)
        (True, 0)
    """

    checks.kind("problem", problem, Problem, "Problem(inner=..., outer=...)")
    if not checks.takes(method, 5):
        raise checks.wrong_kind("method", method, Method, "a method of bilevel_jax.hypergrad, as hypergrad.implicit(solver)")

    def evaluate(z: PyTree, x: PyTree, batch: Batch, guess: PyTree = None, key: Any = None) -> tuple[Array, PyTree, Stats]:
        z, x, batch = checks.point(z, x, batch)
        if guess is not None:
            guess = checks.floating("guess", guess)
            checks.same_shapes("guess", guess, z, "z")
        z, x = marked((z, x))
        return method(bind(problem, batch), z, x, guess, key)

    return evaluate


def bind(problem: Problem, batch: Batch) -> Losses:
    """The mean losses of a problem on a batch, as functions of (z, x)."""
    g, f = losses(problem)
    return Losses(lambda z, x: g(z, x, batch), lambda z, x: f(z, x, batch))


def implicit(solver: LinearSolver | None = None, *, tolerance: float | None = None) -> Method:
    """Approximate implicit differentiation (AID): ``H v = -d_z f``, then ``d_x f + d2_xz g v``.

    Args:
        solver: of `bilevel_jax.linear_solve`; by default `auto`, a dense factorisation of small systems and conjugate
            gradients on large ones, never the normal equations.
        tolerance: if given, ``|d_z g|`` above it is reported as INNER_NOT_CONVERGED: the formula holds at z*(x) only.

    Returns:
        A method whose code is that of the linear solver.  A value or gradient that is not finite is reported as NONFINITE.

    Raises:
        TypeError, ValueError: for anything but a ``LinearSolver``, one that wants samples, and a negative tolerance.

    Cost: one inner gradient, one outer gradient pair, one cross product, and the applications of the solver plus one
    Hessian-vector products.

    Reference: Ji, Yang, Liang, "Bilevel optimization: convergence analysis and enhanced design", ICML 2021, arXiv
    2010.07962; Pedregosa, "Hyperparameter optimization with approximate gradient", 2016, arXiv
    1602.02355.  The sign of v is the opposite of theirs.
    """
    solver = usable(solver, True, tolerance)

    def method(loss: Losses, z: PyTree, x: PyTree, guess: PyTree, key: Any) -> tuple[Array, PyTree, Stats]:
        value, (fz, fx) = jax.value_and_grad(loss.f, argnums=(0, 1))(z, x)
        slope, hessian = jax.linearize(lambda z: jax.grad(loss.g)(z, x), z)
        v, linear = solver.solve(hessian, jax.tree.map(jnp.negative, fz), guess, key)
        _, pull = jax.vjp(lambda x: jax.grad(loss.g)(z, x), x)
        gradient = jax.tree.map(jnp.add, fx, pull(v)[0])
        return value, gradient, account(slope, tolerance, linear, z, v, (value, gradient))

    return method


def iterative(
    opt: optax.GradientTransformation, steps: int, *, truncate: int | None = None, checkpoint: str = "step"
) -> Method:
    """Iterative differentiation (ITD): back-propagate through ``steps`` inner steps from z, which does not depend on x.

    Args:
        opt: inner optimiser, such as ``optax.sgd(rate)``.  Give adam and its relatives an ``eps_root`` above 0, as
            ``optax.adam(rate, eps_root=1e-8)``: without it the derivative is NaN where an entry of d_z g is 0.
        steps: inner steps D, at least 1.
        truncate: if given, differentiate only the last so many of them; with rate a and strong convexity mu the
            gradient is then biased by a factor (1 - a mu)^truncate.  0: first order, d_x f alone.  Where the hypergradient
            is differentiated itself, the steps before these count as constants.
        checkpoint: what the backward pass recomputes.  ``"sqrt"``: blocks of about sqrt(steps) steps, memory O(sqrt D);
            ``"step"``: each step, memory O(D) iterates; ``"none"``: nothing, memory O(D) everything.

    Returns:
        A method whose ``stats.inner`` is the last iterate: warm-start the next call with it.  The bias of an unconverged
        inner loop, (1 - a mu)^D, shows in ``stats.inner_residual``.

    Raises:
        TypeError, ValueError: for counts out of range, and another checkpoint; (when traced) for an optimiser that cannot move
            z, or that has no derivative in reverse mode.

    Cost: D inner gradients, D Hessian-vector and D cross products, one outer gradient pair.

    Reference: Ji, Yang, Liang, ICML 2021, arXiv 2010.07962 (ITD-BiO); truncation: Shaban, Cheng, Hatch, Boots,
    "Truncated back-propagation for bilevel optimization", 2019, arXiv 1810.10667.
    """
    return _along_a_path(path(opt, steps, truncate=truncate, checkpoint=checkpoint), reverse, steps)


def zeroth_order(opt: optax.GradientTransformation, steps: int, *, directions: int = 1, radius: float = 1e-2) -> Method:
    """Differences of whole inner paths along Gaussian directions (PZOBO): no second derivatives.

    ``d_x f + mean_j <(z^D(x + r u_j) - z^D(x)) / r, d_z f> u_j`` with u_j ~ N(0, I), from one start z.

    Args:
        opt, steps: as for `iterative`.
        directions: number Q of directions.
        radius: r; see `gaussian`.

    Returns:
        A method that draws from ``key``.

    Raises:
        TypeError, ValueError: for counts out of range; (when traced) without a key.

    Cost: (Q + 1) D inner gradients, one outer gradient pair.

    Reference: Sow, Ji, Liang, "On the convergence theory for Hessian-free bilevel algorithms", NeurIPS 2022, arXiv 2110.07004.
    """
    return _along_a_path(path(opt, steps, checkpoint="none", backward=False), gaussian(directions, radius), steps)


def _along_a_path(follow: "Follow", jacobian: "Jacobian", steps: int) -> Method:
    def method(loss: Losses, z: PyTree, x: PyTree, guess: PyTree, key: Any) -> tuple[Array, PyTree, Stats]:
        del guess
        gradient = jax.grad(loss.g)

        def end(x: PyTree) -> PyTree:
            return follow(lambda z, x, k: gradient(z, x), z, x, loss=lambda z, x, k: loss.g(z, x))

        last, pull = jacobian.at(end, x, key)
        value, (fz, fx) = jax.value_and_grad(loss.f, argnums=(0, 1))(last, x)
        total = jax.tree.map(jnp.add, fx, pull(fz))
        residual = norm(gradient(last, x))
        code = _checked(jnp.zeros((), jnp.int32), (total, last))
        return value, total, Stats(code, residual, None, jnp.int32(steps), last, None)

    return method


class Follow(Protocol):
    """The end of an inner path from z, differentiable in z and x, with ``gradient(z, x, k)`` the direction of step k.

    With ``score(z, x)``, its worst iterate instead: that of the largest score after the first step.  ``loss(z, x, k)``, if
    given, has ``gradient`` as its gradient in z.  It is for optimisers that need its value.
    """

    def __call__(
        self,
        gradient: Callable[[PyTree, PyTree, Array], PyTree],
        z: PyTree,
        x: PyTree,
        score: Callable[[PyTree, PyTree], Array] | None = None,
        loss: Callable[[PyTree, PyTree, Array], Array] | None = None,
    ) -> PyTree: ...


class Jacobian(NamedTuple):
    """How vectors are pulled back through a path: `reverse`, or a `gaussian` estimate."""

    #: ``(end, x, key) -> (end(x), pull)`` with ``pull(dz)``, the transposed Jacobian of ``end`` at x applied to dz.
    at: Callable[[Callable[[PyTree], PyTree], PyTree, Any], tuple[PyTree, Callable[[PyTree], PyTree]]]
    directions: int | None = None  # number of further paths that an estimate follows; None for the exact Jacobian


def path(
    opt: optax.GradientTransformation,
    steps: int,
    *,
    truncate: int | None = None,
    checkpoint: str = "step",
    name: str = "opt",
    backward: bool = True,
) -> Follow:
    """``steps`` steps of an optimiser, differentiable over the last ``truncate``; arguments as for `iterative`.

    Errors call the optimiser by ``name``.  Without ``backward`` the optimiser needs no derivative, because the caller does not
    differentiate the path.
    """
    steps = checks.positive_int("steps", steps)
    kept_steps = steps if truncate is None else checks.positive_int("truncate", truncate, least=0)
    if kept_steps > steps:
        raise ValueError(f"truncate: got {kept_steps}, expected at most steps = {steps}")
    if checkpoint not in ("sqrt", "step", "none"):
        raise ValueError(f"checkpoint: got {checks.shown(checkpoint)}, expected 'sqrt', 'step' or 'none'")

    def follow(gradient: Any, z: PyTree, x: PyTree, score: Any = None, loss: Any = None) -> PyTree:
        outer, x = x, widen(x)  # the backward pass sums over the steps in the dtype of what they share

        def step(carry: Any, x: PyTree) -> Any:
            (z, state, k), kept = carry
            x = narrow(x, outer)
            known = None if loss is None else lambda z: loss(z, x, k)
            z, state = moved(opt, gradient(z, x, k), state, z, x, known)
            if score is not None:
                worst, height = kept
                new = score(z, x)
                higher = ~(new <= height)  # a score that is NaN is the worst, and shows
                kept = keep(higher, (z, new), (worst, height))
            return (z, state, k + 1), kept

        opt_state = begin(name, "inner", opt, z, outer, loss=loss is not None, backward=backward and kept_steps > 0)
        carry: Any = (z, opt_state, jnp.int32(0)), None
        if score is not None:
            shape = jax.eval_shape(score, z, outer)
            carry = carry[0], (z, jnp.full(shape.shape, jnp.finfo(shape.dtype).min, shape.dtype))
        if steps > kept_steps:
            fixed = lax.stop_gradient(x)
            carry = lax.stop_gradient(repeat(lambda c: step(c, fixed), carry, steps - kept_steps, "none"))
        (last, _, _), kept = repeat(lambda c: step(c, x), carry, kept_steps, checkpoint)
        return last if score is None else kept[0]

    return follow


def _reverse(end: Callable[[PyTree], PyTree], x: PyTree, key: Any) -> tuple[PyTree, Callable[[PyTree], PyTree]]:
    del key
    z, pull = jax.vjp(end, x)
    return z, lambda dz: pull(dz)[0]


#: The exact transposed Jacobian, by back-propagation.
reverse = Jacobian(_reverse)


def gaussian(directions: int, radius: float) -> Jacobian:
    """A transposed Jacobian by Gaussian smoothing: ``dz -> mean_j <(end(x + r u_j) - end(x)) / r, dz> u_j``.

    The mean over u is that of the smoothed path, exact for paths linear in x.  The variance grows with the dimension of x:
    of one direction it is about (dim x + 1) |J' dz|^2.  The paper's public code normalises u without the factor dim x, so
    that its estimate is about dim x times too small; not followed.

    Args:
        directions: number of u_j ~ N(0, I), a positive int.
        radius: r > 0; in float32 not below 1e-3 of the size of x, or the difference is rounding.

    Raises:
        TypeError, ValueError: for arguments out of range; (when traced) without a key.
    """
    directions = checks.positive_int("directions", directions)
    if isinstance(radius, int | float) and not radius > 0:
        raise ValueError(f"radius: got {radius}, expected a positive number")

    def jacobian(end: Callable[[PyTree], PyTree], x: PyTree, key: Any) -> tuple[PyTree, Callable[[PyTree], PyTree]]:
        if key is None:
            raise ValueError("key: got None, expected a key, from which the directions are drawn")
        z = end(x)

        def along(key: Any) -> tuple[PyTree, PyTree]:
            leaves, form = jax.tree.flatten(x)
            keys = jax.random.split(key, len(leaves))
            u = form.unflatten(jax.random.normal(k, leaf.shape, leaf.dtype) for k, leaf in zip(keys, leaves, strict=True))
            moved = end(jax.tree.map(lambda leaf, d: leaf + jnp.asarray(radius, leaf.dtype) * d, x, u))
            return u, jax.tree.map(lambda m, e: (m - e) / jnp.asarray(radius, e.dtype), widen(moved), widen(z))

        us, changes = jax.vmap(along)(jax.random.split(key, directions))

        def pull(dz: PyTree) -> PyTree:
            weights = functools.reduce(
                jnp.add, jax.tree.leaves(jax.tree.map(lambda c, d: jnp.tensordot(c, d, d.ndim), changes, widen(dz)))
            )
            way = jax.tree.map(lambda u: jnp.tensordot(weights.astype(u.dtype), u, 1) / directions, widen(us))
            return narrow(way, us)

        return z, pull

    return Jacobian(jacobian, directions)


def one_step(opt: optax.GradientTransformation) -> Method:
    """Differentiate one inner step only: exact in the limit for superlinear inner solvers, O(1 - a mu) off for gradient steps.

    Cost: one inner gradient, one cross product, one outer gradient pair.

    Reference: Bolte, Pauwels, Vaiter, "One-step differentiation of iterative algorithms", NeurIPS 2023, arXiv 2305.13768.
    """
    return iterative(opt, 1, checkpoint="none")


def t1_t2(scale: float = 1.0) -> Method:
    """T1-T2: replace the inverse Hessian by ``scale`` times the identity, ``v = -scale d_z f``.

    Cost: one inner gradient, one Hessian-vector product (for the residual), one cross product, one outer gradient pair.

    Reference: Luketina, Berglund, Greff, Raiko, "Scalable gradient-based tuning of continuous regularization
    hyperparameters", ICML 2016, arXiv 1511.06727.
    """
    if isinstance(scale, int | float) and not scale > 0:
        raise ValueError(f"scale: got {scale}, expected a positive number")

    def solve(matvec: Any, rhs: PyTree, guess: PyTree = None, key: Any = None) -> tuple[PyTree, linear_solve.Stats]:
        del guess, key
        v = jax.tree.map(lambda b: jnp.asarray(scale, b.dtype) * b, rhs)
        residual = norm(jax.tree.map(jnp.subtract, matvec(v), rhs))
        return v, linear_solve.Stats(jnp.zeros((), jnp.int32), residual, jnp.ones((), jnp.int32))

    return implicit(LinearSolver(solve, 1.0))


def repeat(step: Callable[[Any], Any], carry: Any, times: int, checkpoint: str) -> Any:
    """``times`` applications of ``step``, with the recomputation that ``checkpoint`` names (see `iterative`).

    Nested scans of about sqrt(times) checkpointed blocks of checkpointed steps keep sqrt(times) iterates; a remainder that
    does not fill a block is done first.
    """
    if times == 0:
        return carry
    single = step if checkpoint == "none" else jax.checkpoint(step, prevent_cse=False)

    def loop(carry: Any, count: int) -> Any:
        return scan(lambda c, _: (single(c), None), carry, None, length=count)[0]

    if checkpoint != "sqrt":
        return loop(carry, times)
    size = int(np.sqrt(times))
    carry = loop(carry, times % size) if times % size else carry
    block = jax.checkpoint(lambda c: loop(c, size), prevent_cse=False)
    return scan(lambda c, _: (block(c), None), carry, None, length=times // size)[0]


def usable(solver: LinearSolver | None, positive_definite: bool, tolerance: float | None = None) -> LinearSolver:
    """The linear solver, or the default one; refuses one that wants samples, and a negative tolerance."""
    if isinstance(tolerance, int | float) and not tolerance >= 0:
        raise ValueError(f"tolerance: got {tolerance}, expected at least 0")
    solver = linear_solve.auto(positive_definite=positive_definite) if solver is None else solver
    checks.kind("solver", solver, LinearSolver, "a LinearSolver")
    if solver.draws:
        raise ValueError("solver: got one that wants a sample an application, expected one made with fresh=False")
    return solver


def account(slope: PyTree, tolerance: float | None, linear: linear_solve.Stats, z: PyTree, v: PyTree, result: PyTree) -> Stats:
    """The stats of a linear solve at a point where ``slope`` should be 0; a result that is not finite is NONFINITE."""
    residual, code = norm(slope), linear.code
    if tolerance is not None:
        far = ~(residual <= checks.constant("tolerance", tolerance))
        code = jnp.where(far, jnp.maximum(code, jnp.int32(Result.INNER_NOT_CONVERGED)), code)
    return Stats(_checked(code, (slope, result)), residual, linear.residual, linear.steps, z, v)


def _checked(code: Array, tree: PyTree) -> Array:
    return jnp.where(all_finite(tree), code, jnp.int32(Result.NONFINITE))
