"""Oracles: which direction.  ``terms(vars, batch, step) -> Terms``; no state, no step sizes, no sampling."""

import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bilevel_jax import checks
from bilevel_jax.control_flow import unmarked
from bilevel_jax.inspection import Uses, check_uses, depends, uses, warn_stretched
from bilevel_jax.linear_solve import LinearSolver
from bilevel_jax.optimisers import weight_at
from bilevel_jax.samplers import take_draw
from bilevel_jax.trees import norm, scaled, widest
from bilevel_jax.types import Array, Batch, Calls, Levels, Loss, Oracle, Problem, PyTree, Schedule, Terms, Vars


def mean_loss(loss: Loss, name: str) -> Callable[[PyTree, PyTree, PyTree, Array | None], Array]:
    """``(z, x, data, weight) -> scalar`` from a loss that returns a scalar or one value a sample.

    Without weights the samples are averaged.  With weights (float ``[rows]``) they are summed with them: the sampler puts
    blocks/n on the rows of a block and 0 on the padding of a ragged one, so that the mean over the blocks is the mean over
    the samples, exactly.

    Raises:
        ValueError: if the loss returns neither a scalar nor a vector, or a scalar where weights are given, and, in
            `jax.shard_map`, if its derivatives would be summed over the devices.
    """

    def scalar(z, x, data, weight):
        with checks.evaluating(name, z=z, x=x, data=data):
            value = loss(z, x, data)
        if isinstance(value, tuple | list | dict) or not hasattr(value, "dtype"):
            raise TypeError(f"{name}: got a loss of type {type(value).__name__}, expected a scalar or one value a sample")
        shape = np.shape(value)
        if not jnp.issubdtype(jnp.result_type(value), jnp.floating):
            raise TypeError(f"{name}: got a loss of dtype {jnp.result_type(value)}, expected a floating-point one")
        if axes := unmarked((z, x), value):
            raise ValueError(
                f"{name}: got a loss that differs between the devices of the axes {axes}, of variables that do not, so that "
                "JAX would sum its derivatives over the devices; expected, for the mean over the devices, a problem of "
                "bilevel_jax.parallel.data_parallel, and for a problem on each device variables that are marked: "
                f"jax.lax.pcast(variables, {tuple(axes)}, to='varying')"
            )
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
        wide = widest(value)
        return jnp.vdot(weight.astype(wide), value.astype(wide)).astype(value.dtype)

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
    variance reduction algorithms", 2022, arXiv 2201.13409.

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
        raise ValueError(f"mode: got {checks.shown(mode)}, expected 'reverse' or 'forward'")

    def terms(vars: Vars, batch: Batch, step: Array) -> Terms:
        del step
        z, v, x = vars

        def gradients(z, x):
            return jax.grad(g, argnums=(0, 1))(z, x, batch)

        if v is None or batch.outer is None:
            return Terms(inner=Vars(inner=jax.grad(g)(z, x, batch)))
        checks.same_shapes("vars.aux", v, z, "vars.inner")
        if mode == "reverse":
            dz, pullback = jax.vjp(lambda z, x: gradients(z, x)[0], z, x)
            hv, cross = pullback(v)
        else:
            (dz, _), (hv, cross) = jax.jvp(lambda z: gradients(z, x), (z,), (v,))
        fz, fx = outer_pair(f, z, x, batch)
        return Terms(inner=Vars(dz, hv, cross), outer=Vars(None, fz, fx))

    def calls(moved: Vars) -> Calls:
        return Calls(
            inner_gradient=float(bool(moved.inner)),
            hessian_vector=float(bool(moved.aux)),
            cross=float(bool(moved.outer)),
            outer_gradient=float(bool(moved.aux or moved.outer)),
        )

    return Oracle(terms, calls, inner_loss=lambda vars, batch, step: g(vars.inner, vars.outer, batch), check=inspected(problem))


def finite_difference(problem: Problem, *, scale: float | None = None) -> Oracle:
    """The directions of `implicit`, the products with second derivatives by central differences of gradients along v.

    ``H v = [d_z g(z + d v) - d_z g(z - d v)] / (2 d)`` and the same of d_x g, with ``d = scale (1 + |z|) / |v|``.  The error is
    O(d^2) from the third derivative and O(eps / d) from rounding: in float32 1e-4 at best.  In JAX the exact product
    costs about as much; this is for losses without second derivatives, and for memory.

    Args:
        problem: the two losses.
        scale: by default the third root of the machine epsilon of z.

    Returns:
        An oracle of the same kind as `implicit`, for the ``oracle`` of single-loop solvers.

    Raises:
        TypeError, ValueError: for anything but a ``Problem``, and a scale that is not positive.

    Cost: one inner gradient for z; two (each in z and x) for v and x together, and one outer gradient pair.

    Reference: Huang, "Optimal Hessian/Jacobian-free nonconvex-PL bilevel optimization", ICML 2024, arXiv 2407.17823; Yang,
    Xiao, Ji, "Achieving O(eps^-1.5) complexity in Hessian/Jacobian-free stochastic bilevel optimization", NeurIPS 2023, arXiv
    2312.03807.

    Example:
        >>> problem = Problem(lambda z, x, a: 0.5 * ((z - x) ** 2).sum(), lambda z, x, b: (z**2).sum())
        >>> at, batch = Vars(jnp.ones(1), jnp.full(1, 3.0), jnp.ones(1)), Batch(outer=jnp.zeros(1))
        >>> round(float(finite_difference(problem).terms(at, batch, jnp.int32(0)).inner.aux[0]), 3)
        3.0
    """
    g, f = losses(problem)
    if scale is not None:
        checks.positive("scale", scale)

    def terms(vars: Vars, batch: Batch, step: Array) -> Terms:
        del step
        z, v, x = vars
        dz = jax.grad(g)(z, x, batch)
        if v is None or batch.outer is None:
            return Terms(inner=Vars(inner=dz))
        checks.same_shapes("vars.aux", v, z, "vars.inner")
        kinds = [leaf.dtype for leaf in jax.tree.leaves(z)]
        root = max(float(jnp.finfo(kind).eps) for kind in kinds) ** (1 / 3) if scale is None else scale
        length = norm(v)
        d = root * (1 + norm(z)) / jnp.where(length > 0, length, 1)  # along v = 0 the difference is 0

        def beside(sign: float) -> tuple[PyTree, PyTree]:
            # d v has the size of z: formed in a wide dtype, as d alone may be out of the range of a narrow one
            along = jax.tree.map(lambda a, b: a + (sign * d.astype(widest(b)) * b.astype(widest(b))).astype(a.dtype), z, v)
            return jax.grad(g, argnums=(0, 1))(along, x, batch)

        def quotient(a: Array, b: Array) -> Array:
            return ((a - b).astype(widest(a)) / (2 * d).astype(widest(a))).astype(a.dtype)

        hv, cross = jax.tree.map(quotient, beside(1.0), beside(-1.0))
        fz, fx = outer_pair(f, z, x, batch)
        return Terms(inner=Vars(dz, hv, cross), outer=Vars(None, fz, fx))

    def calls(moved: Vars) -> Calls:
        second = bool(moved.aux or moved.outer)
        return Calls(inner_gradient=float(bool(moved.inner) + 2 * second), outer_gradient=float(second))

    return Oracle(terms, calls, inner_loss=lambda vars, batch, step: g(vars.inner, vars.outer, batch), check=inspected(problem))


def aggregated(problem: Problem, weight: Schedule) -> Oracle:
    """The directions of `implicit` with the inner loss replaced by ``psi = (1 - mu) g + mu f``, which f makes strongly convex.

    Where g has many minimisers in z, psi has one, near that of them which f prefers; with mu falling to 0 it tends there.

    Args:
        problem: the two losses; f strongly convex in z in theory.
        weight: mu in [0, 1], a number or a schedule of the step, clipped to [0, 1].

    Returns:
        An oracle.  Without v (or for a path of inner steps: see `bilevel_jax.stages.unroll`) it has the direction of z alone.

    Raises:
        TypeError, ValueError: for anything but a ``Problem``, and a weight outside [0, 1].

    Cost: one inner gradient, one Hessian-vector product, one cross product and two outer gradient pairs: the second stands
    for the products with the second derivatives of f.

    Reference: Liu, Mu, Yuan, Zeng, Zhang, "A generic first-order algorithmic framework for bi-level programming beyond
    lower-level singleton", ICML 2020, arXiv 2006.04045 (the direction of z); Liu, Liu, Yao, Zeng, Zhang, "Averaged method of
    multipliers for bi-level optimization without lower-level strong convexity", ICML 2023, arXiv 2302.03407 (all three).

    Example:
        >>> problem = Problem(lambda z, x, a: 0.0 * z.sum(), lambda z, x, b: 0.5 * ((z - x) ** 2).sum())
        >>> at, batch = Vars(jnp.ones(1), jnp.zeros(1), jnp.zeros(1)), Batch(outer=jnp.zeros(1))
        >>> float(aggregated(problem, 0.25).terms(at, batch, jnp.int32(0)).outer.inner[0])
        0.25
    """
    g, f = losses(problem)
    checks.unit_interval("weight", weight)

    def terms(vars: Vars, batch: Batch, step: Array) -> Terms:
        z, v, x = vars
        if batch.outer is None:
            raise ValueError("batch.outer: got None, expected data of the outer loss, which enters the direction of z")
        mu = weight_at(weight, step)
        part = lambda tree, of_f: scaled(mu if of_f else 1 - mu, tree)  # noqa: E731
        if v is None:
            dz, fz = jax.grad(g)(z, x, batch), jax.grad(f)(z, x, batch)
            return Terms(inner=Vars(inner=part(dz, False)), outer=Vars(inner=part(fz, True)))
        checks.same_shapes("vars.aux", v, z, "vars.inner")
        dz, pull = jax.vjp(lambda z, x: jax.grad(g)(z, x, batch), z, x)
        (fz, fx), pull_f = jax.vjp(lambda z, x: jax.grad(f, argnums=(0, 1))(z, x, batch), z, x)
        products = pull_f((v, jax.tree.map(jnp.zeros_like, fx)))
        hv, cross = part(pull(v), False)
        fhv, fcross = jax.tree.map(jnp.add, part(products, True), (fz, fx))
        return Terms(inner=Vars(part(dz, False), hv, cross), outer=Vars(part(fz, True), fhv, fcross))

    def calls(moved: Vars) -> Calls:
        z, v, x = map(bool, moved)
        return Calls(float(z), float(v), float(x), float(z or v or x) + float(v or x))

    return Oracle(terms, calls, check=inspected(problem, Uses(z=True)))


#: A mean loss of a problem on a draw, ``(z, x, draw) -> scalar``.
DrawLoss = Callable[[PyTree, PyTree, Batch], Array]


def losses(problem: Problem) -> tuple[DrawLoss, DrawLoss]:
    """The two mean losses of a problem, g and f, weighted as the draw says.

    Raises:
        TypeError, ValueError: for anything but a ``Problem``; (when traced) as `mean_loss`.  Where a loss fails, a note says
            whether it can be evaluated on its arguments in another order, or on the data of the other level.
    """
    checks.kind("problem", problem, Problem, "Problem(inner=..., outer=...)")

    def of(level: str, other: str) -> DrawLoss:
        loss = getattr(problem, level)
        mean = mean_loss(loss, f"problem.{level}")

        def value(z: PyTree, x: PyTree, draw: Batch) -> Array:
            data = getattr(draw, level)
            try:
                return mean(z, x, data, getattr(draw.weight or Levels(), level))
            except Exception as error:
                way = _other_way(loss, z, x, data, f"the data of the {other} level", getattr(draw, other))
                if way is not None:
                    error.add_note(
                        f"problem.{level} can be evaluated at {way}: are its arguments, the variables or data swapped?"
                    )
                raise

        return value

    return of("inner", "outer"), of("outer", "inner")


def _other_way(loss: Loss, z: PyTree, x: PyTree, data: PyTree, others: str, other: PyTree) -> str | None:
    """Other arguments at which a loss can be evaluated, if it cannot be at (z, x, data)."""

    def fits(*arguments: PyTree, data: PyTree = data) -> bool:
        try:
            jax.eval_shape(lambda given: mean_loss(lambda *_: loss(*given), "")(z, x, data, None), arguments)
        except Exception:  # whatever a loss raises on arguments that were not made for it
            return False
        return True

    named = {"z": z, "x": x, "data": data}
    ways = [order for order in itertools.permutations(named) if fits(*(named[name] for name in order))]
    if tuple(named) in ways:
        return None
    if ways:
        return f"({', '.join(ways[0])})"
    return f"(z, x, data) with {others}" if other is not None and fits(z, x, other, data=other) else None


def inspected(problem: Problem, elsewhere: Uses = Uses()) -> Callable[[Vars, Batch], None]:  # noqa: B008
    """The static checks of a problem, for the stage that moves x: see `bilevel_jax.inspection`.

    Args:
        problem: the two losses.
        elsewhere: which variables enter the method by other ways than ``d_z g``, ``d_x g`` and f.
    """
    both = losses(problem)

    def check(vars: Vars, draw: Batch) -> None:
        g, f = (Uses(*uses(loss, vars.inner, vars.outer, draw)[:2]) for loss in both)
        check_uses(g, f, elsewhere)
        for level in Levels._fields:
            name = f"problem.{level}"
            warn_stretched(name, getattr(problem, level), vars.inner, vars.outer, getattr(draw, level))

    return check


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

    Reference: Ji, Yang, Liang, "Bilevel optimization: convergence analysis and enhanced design", ICML 2021, arXiv 2010.07962
    (stocBiO).

    Example:
        >>> from bilevel_jax.linear_solve import neumann
        >>> problem = Problem(lambda z, x, a: 0.5 * ((z - x) ** 2).sum(), lambda z, x, b: (z**2).sum())
        >>> aid(problem, neumann(terms=3, rate=0.5, fresh=True)).draws
        4
    """
    at, (g, _) = aid_terms(problem, solver), losses(problem)

    def calls(moved: Vars) -> Calls:
        outer = float(bool(moved.outer))
        return Calls(float(bool(moved.inner)), outer * solver.applications, outer, outer)

    def inner_loss(vars: Vars, batch: Batch, step: Array) -> Array:
        del step
        return g(vars.inner, vars.outer, take_draw(batch, 0))

    def terms(vars: Vars, batch: Batch, step: Array) -> tuple[Terms, Array]:
        del step
        return at(vars, lambda k: take_draw(batch, k))

    return Oracle(terms, calls, solver.draws + 1, inner_loss, inspected(problem))


def aid_terms(problem: Problem, solver: LinearSolver) -> Callable[[Vars, Callable[[Any], Batch]], tuple[Terms, Array]]:
    """The terms of `aid`, and the code of its solver, on draws given as a function of their number."""
    g, _ = losses(problem)
    checks.kind("solver", solver, LinearSolver, "a solver of bilevel_jax.linear_solve")

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


def outer_pair(f: DrawLoss, z: PyTree, x: PyTree, batch: Batch) -> tuple[PyTree, PyTree]:
    """``d_z f`` and ``d_x f``, the second None where it is zero by structure: no estimator should keep a table of it."""
    fz, fx = jax.grad(f, argnums=(0, 1))(z, x, batch)
    return fz, fx if depends(lambda x: f(z, x, batch), x) else None
