"""Stages of double-loop and unrolled methods: solve the inner problem, solve for v, follow a path, start anew.

`bilevel_jax.sweep.descend` is the stage of everything else.  What these stages meet in the numbers is kept in their state as
a `bilevel_jax.results.Status`: the worst code so far, which `bilevel_jax.run` reports.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from bilevel_jax import checks
from bilevel_jax.control_flow import while_loop
from bilevel_jax.estimators import total
from bilevel_jax.hypergrad import Jacobian, path, reverse
from bilevel_jax.inspection import Uses, depends
from bilevel_jax.linear_solve import LinearSolver
from bilevel_jax.optimisers import begin, initial, moved, value_at
from bilevel_jax.oracles import implicit, inspected, losses, system
from bilevel_jax.results import Result, Status, Tally, all_finite, tally
from bilevel_jax.samplers import take_draw
from bilevel_jax.trees import norm, widest
from bilevel_jax.types import Array, Batch, Calls, Cost, Oracle, Problem, PyTree, Schedule, Stage, Vars


class SolveState(NamedTuple):
    """What `solve_inner` and `solve_aux` keep."""

    status: Status  # the worst code of all solves so far
    residual: Array  # float [], of the last solve: |d_z g|, or that of the linear system
    tally: Tally  # what the solves have cost so far


def _begin(residual: Any, declared: Calls) -> SolveState:
    return SolveState(Status(jnp.zeros((), jnp.int32)), jnp.zeros((), residual), tally(declared))


def _went(state: SolveState, code: Array, residual: Array, **calls: Array) -> SolveState:
    old = state.tally.calls
    counted = old._replace(**{name: getattr(old, name) + value.astype(jnp.int32) for name, value in calls.items()})
    residual = residual.astype(state.residual.dtype)
    return SolveState(
        Status(jnp.maximum(state.status.code, code.astype(jnp.int32))), residual, Tally(counted, state.tally.declared)
    )


def assign(function: Callable[[Vars], Vars]) -> Stage:
    """Replace the variables by a function of them, without a draw and without cost: a cold start, a copy, an average.

    Example:
        >>> cold = assign(lambda vars: vars._replace(inner=jax.tree.map(jnp.zeros_like, vars.inner)))
        >>> cold.draws
        0
    """
    return Stage(lambda vars, batches: (), lambda state, vars, batches, step: (function(vars), state), 0, Cost(), lazy=True)


def solve_inner(
    problem: Problem,
    opt: optax.GradientTransformation,
    *,
    max_steps: Schedule,
    tolerance: Schedule | None = None,
) -> Stage:
    """Steps of an optimiser on z, a number of them that may change from sweep to sweep, on one draw.

    Args:
        problem: the two losses.
        opt: optimiser of z, which starts anew, momentum and counts of schedules, in every sweep.  It may be one that needs the
            value of the loss, such as `optax.lbfgs`.
        max_steps: number of steps, a positive int or a schedule of the sweep (rounded up, 1 at least); not differentiable.
        tolerance: if given, stop as soon as ``|d_z g|`` is at most this; a number or a schedule of the sweep.  Where the
            optimiser projects or takes a prox, d_z g is not 0 at the solution: leave it out.  Not differentiable.

    Not reverse-differentiable: the steps are those of a `jax.lax.while_loop`.  Forward mode works.

    Returns:
        A stage of one draw.  Codes: INNER_NOT_CONVERGED (the steps ran out above the tolerance), DIVERGED (an iterate that is
        not finite; z stays at the last finite one).

    Raises:
        TypeError, ValueError: for ``max_steps`` below 1, a negative tolerance, and anything but a ``Problem`` and an optimiser;
            (in ``init``) for an optimiser that cannot move z.

    Cost: at most ``max_steps`` inner gradients, and one more with a tolerance; inf if that is a schedule: they are counted.
    The evaluations of a line search are not counted.

    Example:
        >>> problem = Problem(lambda z, x, a: ((z - x) ** 2).sum(), lambda z, x, b: (z**2).sum())
        >>> solve_inner(problem, optax.sgd(0.1), max_steps=20, tolerance=1e-3).cost.draw.inner_gradient
        21.0
    """
    g, _ = losses(problem)
    checks.transformation("opt", opt)
    if not callable(max_steps):
        checks.positive_int("max_steps", max_steps)
    if isinstance(tolerance, int | float) and not tolerance >= 0:
        raise ValueError(f"tolerance: got {tolerance}, expected a number of at least 0")

    def init(vars: Vars, batches: Batch) -> SolveState:
        draw = jax.eval_shape(lambda b: take_draw(b, 0), batches)
        jax.eval_shape(jax.grad(g), vars.inner, vars.outer, draw)
        begin("opt", "inner", opt, vars.inner, vars.outer, loss=True, backward=False)
        return _begin(widest(vars.inner), calls)

    def update(state: SolveState, vars: Vars, batches: Batch, step: Array) -> tuple[Vars, SolveState]:
        draw = take_draw(batches, 0)
        count = checks.constant("max_steps", jnp.asarray(value_at(max_steps, step), jnp.float32))
        limit = jnp.maximum(jnp.ceil(count), 1.0).astype(jnp.int32)
        target = None if tolerance is None else jnp.asarray(value_at(tolerance, step), state.residual.dtype)
        target = checks.constant("tolerance", target)

        def gradient(z: PyTree) -> PyTree:
            return jax.grad(g)(z, vars.outer, draw)

        def advance(z: PyTree, slope: PyTree, opt_state: PyTree) -> tuple[PyTree, PyTree, Array]:
            new, opt_state = moved(opt, slope, opt_state, z, vars.outer, lambda z: g(z, vars.outer, draw))
            return new, opt_state, all_finite(new)

        def going(carry: tuple) -> Array:
            _, slope, _, count, fine = carry
            more = (count < limit) & fine
            return more if target is None else more & (norm(slope).astype(target.dtype) > target)

        def body(carry: tuple) -> tuple:
            z, slope, opt_state, count, _ = carry
            slope = gradient(z) if target is None else slope
            new, opt_state, fine = advance(z, slope, opt_state)
            new = jax.tree.map(lambda n, o: jnp.where(fine, n, o), new, z)
            return new, slope if target is None else gradient(new), opt_state, count + 1, fine

        opt_state = initial(opt, vars.inner)
        slope = jax.tree.map(jnp.zeros_like, vars.inner) if target is None else gradient(vars.inner)
        carry = (vars.inner, slope, opt_state, jnp.int32(0), jnp.array(True))
        z, slope, _, count, fine = while_loop(going, body, carry)
        residual = norm(slope)  # without a tolerance, that of the last step's start: another gradient would cost as much
        met = jnp.array(True) if target is None else residual.astype(target.dtype) <= target
        code = jnp.where(met, Result.SUCCESSFUL, Result.INNER_NOT_CONVERGED)
        code = jnp.where(fine & jnp.isfinite(residual), code, Result.DIVERGED)
        spent = count if target is None else count + 1
        return vars._replace(inner=z), _went(state, code, residual, inner_gradient=spent)

    calls = Calls(inner_gradient=math.inf if callable(max_steps) else float(max_steps) + (tolerance is not None))
    return Stage(init, update, 1, Cost(draw=calls), lazy=True)


def solve_aux(problem: Problem, solver: LinearSolver | Callable[[Array], LinearSolver], *, warm: bool = True) -> Stage:
    """Solve ``d2_zz g v = -d_z f`` for v at the current z and x.

    Args:
        problem: the two losses.
        solver: of `bilevel_jax.linear_solve`, or a function from the sweep to one, for tolerances and rates that change.
        warm: whether to start at the v of the last sweep, or at 0.  A cold start with few steps stalls at a biased point.

    Returns:
        A stage of ``solver.draws + 1`` draws: draw 0 gives ``d_z f``, and every product of a solver that wants samples of its
        own takes one of the others; otherwise all is taken on the one draw.  Its codes are those of the solver.

    Raises:
        TypeError, ValueError: for anything but a ``Problem`` and a ``LinearSolver``.

    Cost: one outer gradient pair and the applications of the solver.

    Example:
        >>> from bilevel_jax.linear_solve import cg
        >>> problem = Problem(lambda z, x, a: ((z - x) ** 2).sum(), lambda z, x, b: (z**2).sum())
        >>> solve_aux(problem, cg(max_steps=10)).draws
        1
    """
    losses(problem)
    make: Callable[[Array], Any] = solver if checks.takes(solver, 1) else lambda step: solver  # type: ignore[assignment]
    with jax.numpy_dtype_promotion("standard"):  # schedules are users' code
        declared = make(jnp.zeros((), jnp.int32))
    checks.kind("solver", declared, LinearSolver, "a solver of bilevel_jax.linear_solve")

    def init(vars: Vars, batches: Batch) -> SolveState:
        if batches.outer is None:
            raise ValueError("batch.outer: got None, expected data of the outer loss, whose gradient is the right-hand side")
        state = _begin(widest(vars.inner), Calls(hessian_vector=calls.hessian_vector))
        jax.eval_shape(update, state, vars, batches, jnp.zeros((), jnp.int32))
        return state

    def update(state: SolveState, vars: Vars, batches: Batch, step: Array) -> tuple[Vars, SolveState]:
        z, v, x = vars
        with jax.numpy_dtype_promotion("standard"):
            current = make(step)
        matvec, rhs, _ = system(problem, current, z, x, lambda k: take_draw(batches, k))
        v, stats = current.solve(matvec, rhs, v if warm else None, take_draw(batches, 0).key)
        return vars._replace(aux=v), _went(state, stats.code, stats.residual, hessian_vector=stats.steps)

    bounded = math.isfinite(declared.applications)
    calls = Calls(hessian_vector=declared.applications if bounded else math.inf, outer_gradient=1.0)
    return Stage(init, update, declared.draws + 1, Cost(draw=calls), lazy=True)


class UnrollState(NamedTuple):
    """What `unroll` keeps."""

    opts: Vars  # optax states of the variables that move, but z


def unroll(
    problem: Problem,
    opts: Vars,
    steps: int,
    *,
    direction: Oracle | None = None,
    start: Callable[[Vars], PyTree] = lambda vars: vars.inner,
    pessimistic: bool = False,
    truncate: int | None = None,
    checkpoint: str = "step",
    jacobian: Jacobian = reverse,
    fresh: bool = True,
) -> Stage:
    """Follow ``steps`` inner steps from a start, and step x along the derivative of f at their end, through all of them.

    Args:
        problem: the two losses.
        opts: optimisers of z and x, and of ``vars.aux`` where it moves, too: where the path starts from it.  That of z starts
            anew, momentum and counts of schedules, in every sweep.  Give adam and its relatives an ``eps_root`` above 0, as
            ``optax.adam(rate, eps_root=1e-8)``: without it the derivative is NaN where an entry of the direction is 0.
        steps: inner steps.
        direction: an oracle whose direction of z the path follows, at ``step`` the number of the inner step; by default d_z g.
        start: where the path starts, a function of the variables; by default at z, which does not depend on x.
        pessimistic: whether f is taken, and differentiated, at the iterate of the path at which it is largest.
        truncate, checkpoint: as for `bilevel_jax.hypergrad.iterative`; ``truncate=0`` is the first-order method.
        jacobian: how a vector is pulled back through the path: `bilevel_jax.hypergrad.reverse` or ``gaussian(...)`` of it.
        fresh: whether every inner step takes a draw of its own, or all of them, and f, the same one.

    Returns:
        A stage of ``steps + 1`` draws, the last of them for f, or one draw if not ``fresh``.

    Raises:
        TypeError, ValueError: for counts out of range, optimisers that are missing, and an optimiser of ``vars.aux`` on a path
            that is truncated, so that its start has no derivative; (in ``init``) for a first-order method on an outer loss that
            does not depend on x, for an optimiser of ``vars.aux`` on which the start does not depend, and for optimisers that
            cannot move their variable, or, for z, have no derivative in reverse mode.

    Cost: ``steps`` calls of the direction, as many Hessian-vector and cross products as are differentiated, one outer gradient
    pair (``steps`` more values of f if pessimistic, counted as pairs); with ``gaussian(directions, radius)`` (directions + 1)
    ``steps`` calls.  What checkpoints compute again is not counted.

    Example:
        >>> problem = Problem(lambda z, x, a: ((z - x) ** 2).sum(), lambda z, x, b: (z**2).sum())
        >>> unroll(problem, Vars(inner=optax.sgd(0.1), outer=optax.sgd(0.1)), 5).draws
        6
    """
    _, f = losses(problem)
    given, direction = direction is not None, implicit(problem) if direction is None else direction
    checks.kind("direction", direction, Oracle, "an Oracle, as implicit(problem)")
    for name in ("inner", "outer"):
        checks.transformation(f"opts.{name}", getattr(opts, name))
    if opts.aux is not None:
        checks.transformation("opts.aux", opts.aux)
        if truncate is not None:
            raise ValueError(f"truncate: got {truncate}, expected None, because the start moves, too, by its derivative")
    exact = jacobian.directions is None
    follow = path(opts.inner, steps, truncate=truncate, checkpoint=checkpoint, name="opts.inner", backward=exact)
    kept = steps if truncate is None else truncate
    moving = opts._replace(inner=None)

    def init(vars: Vars, batches: Batch) -> UnrollState:
        if batches.outer is None:
            raise ValueError("batch.outer: got None, expected data of the outer loss")
        first, last = (jax.eval_shape(lambda b, k=k: take_draw(b, k), batches) for k in (0, -1))
        if kept == 0 and jacobian.directions is None and not depends(lambda x, d: f(vars.inner, x, d), vars.outer, last):
            raise ValueError(
                "truncate: got 0, expected at least 1, because the outer loss does not depend on x but through z, so that "
                "the first-order gradient is 0"
            )
        if opts.aux is not None and not depends(lambda y: norm(start(vars._replace(aux=y))), vars.aux):
            raise ValueError("opts.aux: got an optimiser, expected None, because the path does not start from vars.aux")
        states = (
            None if o is None else begin(f"opts.{name}", name, o, v, vars.outer, loss=False, backward=False)
            for name, o, v in zip(Vars._fields, moving, vars, strict=True)
        )
        state = UnrollState(Vars(*states))
        jax.eval_shape(update, state, vars, batches, jnp.zeros((), jnp.int32))
        on_path = depends(lambda x, b: end(vars._replace(outer=x), b), vars.outer, batches)  # by a start, or the optimiser
        inspected(problem, Uses(z=given, x=on_path))(vars, first)
        return state

    def end(vars: Vars, batches: Batch) -> PyTree:
        """Where the path ends."""

        def slope(z: PyTree, x: PyTree, k: Array) -> PyTree:
            return total(direction.terms(Vars(z, None, x), take_draw(batches, k if fresh else 0), k)).inner  # type: ignore[arg-type]

        def loss(z: PyTree, x: PyTree, k: Array) -> Array:
            assert direction.inner_loss is not None
            return direction.inner_loss(Vars(z, None, x), take_draw(batches, k if fresh else 0), k)

        last = take_draw(batches, steps if fresh else 0)
        score = (lambda z, x: f(z, x, last)) if pessimistic else None
        return follow(slope, start(vars), vars.outer, score, None if direction.inner_loss is None else loss)

    def update(state: UnrollState, vars: Vars, batches: Batch, step: Array) -> tuple[Vars, UnrollState]:
        del step
        last = take_draw(batches, steps if fresh else 0)
        free = Vars(*(None if o is None else v for o, v in zip(moving, vars, strict=True)))

        def of(free: Vars) -> PyTree:
            return end(Vars(vars.inner, vars.aux if free.aux is None else free.aux, free.outer), batches)

        z, pull = jacobian.at(of, free, take_draw(batches, 0).key)
        fz, fx = jax.grad(f, argnums=(0, 1))(z, vars.outer, last)
        way = pull(fz)
        way = way._replace(outer=jax.tree.map(jnp.add, fx, way.outer))
        pairs = [
            None if o is None else moved(o, w, s, v, vars.outer)
            for o, w, s, v in zip(moving, way, state.opts, vars, strict=True)
        ]
        aux, outer = (v if p is None else p[0] for p, v in zip(pairs[1:], vars[1:], strict=True))
        return Vars(z, aux, outer), UnrollState(Vars(*(None if p is None else p[1] for p in pairs)))

    second = float(kept) if jacobian.directions is None else 0.0
    each = direction.calls(Vars(inner=True, aux=False, outer=False))
    calls = Calls(*(steps * (1 + (jacobian.directions or 0)) * c for c in each))
    calls = calls._replace(hessian_vector=calls.hessian_vector + second, cross=calls.cross + second)
    calls = calls._replace(outer_gradient=calls.outer_gradient + 1.0 + (steps if pessimistic else 0))
    return Stage(init, update, steps + 1 if fresh else 1, Cost(draw=calls), lazy=True)
