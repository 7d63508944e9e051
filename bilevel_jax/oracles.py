"""Oracles: which direction.  ``terms(vars, batch, step) -> Terms``; no state, no step sizes, no sampling."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.extend.core
import jax.numpy as jnp
import numpy as np

from bilevel_jax import checks
from bilevel_jax.linear_solve import LinearSolver
from bilevel_jax.samplers import take_draw
from bilevel_jax.types import Array, Batch, Calls, Levels, Loss, Oracle, Problem, PyTree, Terms, Vars


def mean_loss(loss: Loss, name: str) -> Callable[[PyTree, PyTree, PyTree, Array | None], Array]:
    """``(z, x, data, weight) -> scalar`` from a loss that returns a scalar or one value a sample.

    Without weights the samples are averaged.  With weights (float ``[rows]``) they are summed with them: the sampler puts
    blocks/n on the rows of a block and 0 on the padding of a ragged one, so that the mean over the blocks is the mean over
    the samples, exactly.

    Raises:
        ValueError: if the loss returns neither a scalar nor a vector, or a scalar where weights are given.
    """

    def scalar(z, x, data, weight):
        value = loss(z, x, data)
        if isinstance(value, tuple | list | dict) or not hasattr(value, "dtype"):
            raise TypeError(f"{name}: got a loss of type {type(value).__name__}, expected a scalar or one value a sample")
        shape = np.shape(value)
        if not jnp.issubdtype(jnp.result_type(value), jnp.floating):
            raise TypeError(f"{name}: got a loss of dtype {jnp.result_type(value)}, expected a floating-point one")
        if weight is None:
            if len(shape) > 1:
                raise ValueError(f"{name}: got a loss of shape {shape}, expected a scalar or one value a sample")
            leading = {np.shape(leaf)[:1] for leaf in jax.tree.leaves(data)}
            if shape and len(leading) == 1 and leading != {shape}:
                raise ValueError(
                    f"{name}: got a loss of shape {shape}, expected a scalar or {leading.pop()}, one value a sample"
                )
            return value if not shape else value.mean()
        if not shape:
            raise ValueError(
                f"{name}: got a scalar loss, expected one value a sample, because the batch size does not divide the "
                "number of samples and the last block must be masked; return the values before averaging, or sample "
                "with remainder='drop' (the problem solved is then that of the rows that are kept)"
            )
        if shape != np.shape(weight):
            raise ValueError(f"{name}: got a loss of shape {shape}, expected {np.shape(weight)}, one value a sample")
        return jnp.vdot(weight.astype(value.dtype), value)

    return scalar


def implicit(problem: Problem, *, mode: str = "reverse") -> Oracle:
    """The three directions of implicit differentiation, from one linearisation of ``d_z g``.

    ``Dz = d_z g``, ``Dv = d2_zz g v + d_z f``, ``Dx = d2_xz g v + d_x f``, with ``v = vars.aux``.

    Args:
        problem: the two losses.
        mode: ``"reverse"`` pulls v back through ``(z, x) -> d_z g``; ``"forward"`` pushes ``(v, 0)`` through
            ``z -> (d_z g, d_x g)``.  The values agree to rounding; which one is faster depends on the loss and the backend.

    Returns:
        An oracle.  The directions of v and x are absent when ``batch.outer`` or ``vars.aux`` is None, so that a stage that
        moves z alone asks neither for outer data nor for v.

    Raises:
        ValueError: for another mode, or (when traced) for a loss that is neither a scalar nor one value a sample.

    Cost: one inner gradient, one Hessian-vector product, one cross product and one outer gradient pair a call.

    Reference: Dagréou, Ablin, Vaiter, Moreau, "A framework for bilevel optimization that enables stochastic and global
    variance reduction algorithms", 2022, arXiv 2201.13409, equation (2.2) and its directions.

    Example:
        >>> import jax.numpy as jnp
        >>> problem = Problem(inner=lambda z, x, a: 0.5 * ((z - a * x) ** 2).sum(), outer=lambda z, x, b: ((z - b) ** 2).sum())
        >>> vars = Vars(inner=jnp.ones(2), aux=jnp.zeros(2), outer=jnp.ones(2))
        >>> terms = implicit(problem).terms(vars, Batch(inner=jnp.ones(2), outer=jnp.zeros(2)), jnp.int32(0))
        >>> [float(d.sum()) for d in (terms.inner.inner, terms.outer.aux)]
        [0.0, 4.0]
    """
    g, f = losses(problem)
    if mode not in ("reverse", "forward"):
        raise ValueError(f"mode: got {mode!r}, expected 'reverse' or 'forward'")

    def terms(vars: Vars, batch: Batch, step: Array) -> Terms:
        del step
        z, v, x = vars

        def gradients(z, x):
            return jax.grad(g, argnums=(0, 1))(z, x, batch)

        if v is None or batch.outer is None:
            return Terms(inner=Vars(inner=gradients(z, x)[0]))
        checks.same_shapes("vars.aux", v, z, "vars.inner")
        if mode == "reverse":
            dz, pullback = jax.vjp(lambda z, x: gradients(z, x)[0], z, x)
            hv, cross = pullback(v)
        else:
            (dz, _), (hv, cross) = jax.jvp(lambda z: gradients(z, x), (z,), (v,))
        fz, fx = jax.grad(f, argnums=(0, 1))(z, x, batch)
        if not depends(lambda x: f(z, x, batch), x):
            fx = None  # a term that is zero by structure: no estimator should keep a table of it
        return Terms(inner=Vars(dz, hv, cross), outer=Vars(None, fz, fx))

    def calls(moved: Vars) -> Calls:
        return Calls(
            inner_gradient=float(bool(moved.inner)),
            hessian_vector=float(bool(moved.aux)),
            cross=float(bool(moved.outer)),
            outer_gradient=float(bool(moved.aux or moved.outer)),
        )

    return Oracle(terms, calls)


#: A mean loss of a problem on a draw, ``(z, x, draw) -> scalar``.
DrawLoss = Callable[[PyTree, PyTree, Batch], Array]


def losses(problem: Problem) -> tuple[DrawLoss, DrawLoss]:
    """The two mean losses of a problem, g and f, weighted as the draw says.

    Raises:
        TypeError, ValueError: for anything but a ``Problem``; (when traced) as `mean_loss`.
    """
    if not isinstance(problem, Problem):
        raise TypeError(f"problem: got {type(problem).__name__}, expected Problem(inner=..., outer=...)")
    g, f = mean_loss(problem.inner, "problem.inner"), mean_loss(problem.outer, "problem.outer")
    return (
        lambda z, x, draw: g(z, x, draw.inner, (draw.weight or Levels()).inner),
        lambda z, x, draw: f(z, x, draw.outer, (draw.weight or Levels()).outer),
    )


class System(NamedTuple):
    """The linear system of a hypergradient, ``d2_zz g v = -d_z f``, on draws of its own for every product."""

    matvec: Callable[..., PyTree]  # u, or (u, k) with sample k of the solver
    rhs: PyTree
    outer: PyTree  # d_x f, of the same draw as the right-hand side


def system(problem: Problem, solver: LinearSolver, z: PyTree, x: PyTree, draw: Callable[[Any], Batch]) -> System:
    """Draw 0 gives ``d_z f``; product k is taken on draw k + 1, or on draw 0 where the solver wants no samples of its own."""
    g, f = losses(problem)
    fz, fx = jax.grad(f, argnums=(0, 1))(z, x, draw(0))

    def product(u: PyTree, batch: Batch) -> PyTree:
        return jax.jvp(lambda z: jax.grad(g)(z, x, batch), (z,), (u,))[1]

    if solver.draws:
        return System(lambda u, k: product(u, draw(k + 1)), jax.tree.map(jnp.negative, fz), fx)
    only = draw(0)
    _, hessian = jax.linearize(lambda z: jax.grad(g)(z, x, only), z)
    return System(hessian, jax.tree.map(jnp.negative, fz), fx)


def aid(problem: Problem, solver: LinearSolver) -> Oracle:
    """Approximate implicit differentiation, v solved for anew at every call: ``Dz = d_z g``, ``Dx = d_x f + d2_xz g v``.

    Composite: v is a product of several samples.  Draw 0 gives the inner gradient, ``d_z f``, ``d_x f`` and the cross product
    (its inner and outer rows are independent), draws 1, 2, ... one Hessian-vector product each.

    Args:
        problem: the two losses.
        solver: of `bilevel_jax.linear_solve`, such as ``neumann(terms=10, rate=0.1, fresh=True)``; started at 0.

    Returns:
        An oracle without a direction of v, of ``solver.draws + 1`` draws.

    Raises:
        TypeError, ValueError: for anything but a ``Problem`` and a ``LinearSolver``.

    Cost: one inner gradient, one outer gradient pair, one cross product, and the applications of the solver.

    Reference: Ji, Yang, Liang, "Bilevel optimization: convergence analysis and enhanced design", ICML 2021, arXiv 2010.07962,
    Algorithms 2 and 3.

    Example:
        >>> from bilevel_jax.linear_solve import neumann
        >>> problem = Problem(lambda z, x, a: 0.5 * ((z - x) ** 2).sum(), lambda z, x, b: (z**2).sum())
        >>> aid(problem, neumann(terms=3, rate=0.5, fresh=True)).draws
        4
    """
    at = aid_terms(problem, solver)

    def calls(moved: Vars) -> Calls:
        outer = float(bool(moved.outer))
        return Calls(float(bool(moved.inner)), outer * solver.applications, outer, outer)

    return Oracle(lambda vars, batch, step: at(vars, lambda k: take_draw(batch, k)), calls, solver.draws + 1)


def aid_terms(problem: Problem, solver: LinearSolver) -> Callable[[Vars, Callable[[Any], Batch]], tuple[Terms, Array]]:
    """The terms of `aid`, and the code of its solver, on draws given as a function of their number."""
    g, _ = losses(problem)
    if not isinstance(solver, LinearSolver):
        raise TypeError(f"solver: got {type(solver).__name__}, expected a solver of bilevel_jax.linear_solve")

    def terms(vars: Vars, draw: Callable[[Any], Batch]) -> tuple[Terms, Array]:
        z, _, x = vars
        first = draw(0)
        dz = jax.grad(g)(z, x, first)
        if first.outer is None:
            return Terms(inner=Vars(inner=dz)), jnp.zeros((), jnp.int32)
        matvec, rhs, fx = system(problem, solver, z, x, draw)
        v, stats = solver.solve(matvec, rhs, None, first.key)
        _, pullback = jax.vjp(lambda x: jax.grad(g)(z, x, first), x)
        return Terms(inner=Vars(inner=dz, outer=pullback(v)[0]), outer=Vars(outer=fx)), stats.code

    return terms


def depends(function: Callable[..., Array], argument: PyTree, *others: PyTree) -> bool:
    """Whether the value of a function can depend on its first argument, by following its jaxpr (True when in doubt)."""
    jaxpr = jax.make_jaxpr(function)(argument, *others).jaxpr
    reached = set(jaxpr.invars[: len(jax.tree.leaves(argument))])
    for eqn in jaxpr.eqns:
        if any(not isinstance(v, jax.extend.core.Literal) and v in reached for v in eqn.invars):
            reached.update(eqn.outvars)
    return any(not isinstance(v, jax.extend.core.Literal) and v in reached for v in jaxpr.outvars)
