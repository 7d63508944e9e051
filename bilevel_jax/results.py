"""Result codes, and the guard that keeps the last finite state.

Codes are int32 arrays, so that they live in states, under jit and vmap; the larger the code, the worse.
"""

import enum
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.core import Tracer

from bilevel_jax import checks
from bilevel_jax.trees import widest
from bilevel_jax.types import Array, Batch, BilevelState, Calls, PyTree, Solver, Table, Vars


class Result(enum.IntEnum):
    """How a computation ended, in order of severity."""

    SUCCESSFUL = 0
    MAX_STEPS_REACHED = 1
    INNER_NOT_CONVERGED = 2
    STAGNATION = 3
    ADJOINT_NOT_CONVERGED = 4
    NEGATIVE_CURVATURE = 5
    BREAKDOWN = 6
    SINGULAR = 7
    DIVERGED = 8
    NONFINITE = 9

    @property
    def message(self) -> str:
        """What the code means, and what to do."""
        return _MESSAGES[self]


_MESSAGES = {
    Result.SUCCESSFUL: "successful",
    Result.MAX_STEPS_REACHED: "the steps ran out before the tolerance was met: allow more of them, or, where their number was "
    "meant to be small, go by the residual",
    Result.INNER_NOT_CONVERGED: "the inner problem was not solved to its tolerance, so that the hypergradient is biased: allow "
    "more inner steps, or larger ones",
    Result.STAGNATION: "the residual stopped decreasing above the tolerance, at the limit of the precision; the best iterate "
    "is kept: loosen the tolerance, add damping, or compute in float64",
    Result.ADJOINT_NOT_CONVERGED: "the linear system of the hypergradient was not solved to its tolerance: allow its solver "
    "more steps, start it at the last solution, or add damping",
    Result.NEGATIVE_CURVATURE: "the matrix is not positive definite, so that the inner variable is not at a strict minimum and "
    "there is no hypergradient: solve the inner problem further, regularise it, or add damping",
    Result.BREAKDOWN: "a scalar product vanished or overflowed while the residual was not small; the last finite iterate is "
    "kept: rescale the losses, add damping, or compute in float64",
    Result.SINGULAR: "the matrix is singular to the precision used, and the solution is not to be trusted: add damping, "
    "regularise the inner problem, or compute in float64",
    Result.DIVERGED: "a residual grew with the steps, or a variable beyond the limit of guard; the last good state is kept: "
    "take smaller steps (inner steps and Neumann sums: at most 1/L; heavy ball: a larger smoothness constant)",
    Result.NONFINITE: "an iterate or a metric became NaN or infinite; a run keeps the variables of its last finite evaluation, "
    "which is the start if `every` was not given: try smaller steps, check the data for NaN (bilevel_jax.checks.finite), and, "
    "where inner steps of adam or its relatives are differentiated, set their eps_root to 1e-8; guard stops at the first bad "
    "update",
}


class Status(NamedTuple):
    """Marks the result code that a part of a solver keeps in its state."""

    code: Array  # int32 []


@partial(jax.tree_util.register_dataclass, data_fields=("calls",), meta_fields=("declared",))
@dataclass(frozen=True)
class Tally:
    """Marks the oracle calls that a part of a solver counts, because what it declares for an update is only a bound."""

    calls: Calls  # of int32 [], so far
    declared: Calls  # of an update, static; inf where there is no bound, 0 where nothing is counted


def tally(declared: Calls) -> Tally:
    """A tally that starts at none."""
    none = jnp.zeros((), jnp.int32)
    return Tally(Calls(none, none, none, none), declared)


def spent(solver: Solver, state: BilevelState) -> Calls:
    """Oracle calls of a run so far on single draws: as counted in the state where they are, as declared elsewhere.

    Args:
        solver: the solver of the run.
        state: its state.

    Returns:
        ``Calls`` of float [].  Of a kind for which a stage declares no bound, only what is counted.

    Example:
        >>> import optax
        >>> from bilevel_jax import solvers, testing
        >>> from bilevel_jax.loop import run
        >>> from bilevel_jax.samplers import full
        >>> q = testing.quadratic(jax.random.key(0))
        >>> solver = solvers.hoag(q.problem, Vars(inner=optax.sgd(1.0), outer=optax.sgd(0.1)))
        >>> carry, _ = run(solver, full(), q.start, q.data, jax.random.key(1), steps=5)
        >>> bool(spent(solver, carry.state).inner_gradient < 5 * solver.cost.draw.inner_gradient)
        True
    """
    steps = jnp.asarray(state.step, jnp.float32)
    tallies = [t for t in jax.tree.leaves(state, is_leaf=_is_tally) if _is_tally(t)]
    found = []
    for kind, declared in zip(Calls._fields, solver.cost.draw, strict=True):
        known = declared if math.isfinite(declared) else 0.0
        counted = jnp.zeros((), jnp.float32)
        for tally in tallies:
            bound = getattr(tally.declared, kind)
            known -= bound if math.isfinite(bound) else 0.0
            counted += jnp.asarray(getattr(tally.calls, kind), jnp.float32)
        found.append(max(known, 0.0) * steps + counted)
    return Calls(*found)


def worst(state: PyTree) -> Array:
    """The largest code of all the ``Status`` entries of a state; SUCCESSFUL (0) if there is none."""
    found = [s.code.max() for s in jax.tree.leaves(state, is_leaf=_is_status) if _is_status(s)]
    return jnp.stack([jnp.zeros((), jnp.int32), *found]).max()


def all_finite(tree: PyTree) -> Array:
    """Whether every leaf is free of NaN and infinity: a bool scalar."""
    return jnp.stack([jnp.array(True), *(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(tree))]).all()


class Guarded(NamedTuple):
    """What `guard` keeps: the second of the two entries of ``state.stages``, the first of which holds those of the solver."""

    status: Status  # NONFINITE or DIVERGED once an update was refused
    frozen: Array  # bool [], whether nothing moves any more
    scale: Array | None = None  # float [], of the rates; None where they are not halved
    accepted: Array | None = None  # int32 [], updates that were not refused; None likewise


def guard(solver: Solver | Callable[[Array | float], Solver], *, halvings: int = 0, limit: float = math.inf) -> Solver:
    """Refuse updates that give NaN or infinity, and keep the last finite state; then stop, or go on with half the rates.

    By default the first refusal freezes the solver: from then on nothing moves.  With ``halvings``, give a function from a
    scale to the solver whose rates are multiplied by it.  The scale starts at 1, lives in the state, and is halved at every
    refusal; the next draw is then tried from the last finite state.  Only after so many halvings does a refusal freeze.

    Refusing is exact.  The selection between old and new runs over every leaf but the tables, which would be copied at every
    step: a table only receives the row that was pending since an accepted step.  ``step`` goes on counting, and chooses the
    draws; a solver whose rates are halved itself counts the accepted updates (``step`` of its schedules and refreshes), so that
    it goes through the states that it would go through on the accepted draws alone.  A stage that takes several steps with a
    table (``descend(..., estimator=saga(), steps=3)``, and `bilevel_jax.loop.several` of SAGA) would have written rows of a
    refused update: frozen, these lie unread; with ``halvings`` they would bias every later direction, and ``init`` refuses.

    Args:
        solver: any solver, or, with ``halvings``, a function ``scale -> solver`` (``scale`` is 1.0, or a traced float [] of the
            widest dtype of the variables).
        halvings: how often the rates may be halved, 100 at most.
        limit: refuse, too, what makes an entry of the variables larger than this in absolute value.  Without it a state counts
            as good until it overflows, and few solvers find back from 1e38, at whatever rate.  Choose it well above where the
            variables belong: from a state just under it the solver may have to move outwards before it comes back, which is
            then refused at any rate, until the halvings are used up.

    Returns:
        A solver of the same draws and cost, whose state ends with a `Guarded`: see `worst` and `frozen`.  Its code is that of
        the worst refusal (NONFINITE, or DIVERGED if it was the limit), also where the solver went on.

    Raises:
        TypeError, ValueError: for ``halvings`` out of range, a ``limit`` that is not positive, a solver where a function is
            expected and the other way round; (in ``init``) for several steps with a table under ``halvings``.

    Cost: that of the solver.  Under vmap every lane has a scale of its own; with ``halvings`` it has a count of its own, too,
    so that estimators that refresh by the count (SARAH) pay a full pass at every step there.

    Example:
        >>> import optax
        >>> from bilevel_jax.solvers import soba
        >>> from bilevel_jax.types import Problem
        >>> problem = Problem(lambda z, x, a: ((z - x) ** 2).sum(), lambda z, x, b: (z**2).sum())
        >>> def build(scale):
        ...     return soba(problem, Vars(*(optax.sgd(r * scale) for r in (2.0, 2.0, 0.5))))
        >>> batches = Batch(inner=jnp.zeros((1, 1)), outer=jnp.zeros((1, 1)))
        >>> def end(solver):
        ...     state = solver.init(Vars(inner=jnp.ones(1), outer=jnp.zeros(1)), batches)
        ...     return jax.lax.fori_loop(0, 300, lambda _, state: solver.update(state, batches), state)
        >>> stopped, halved = end(guard(build(1.0), limit=100.0)), end(guard(build, halvings=20, limit=100.0))
        >>> Result(int(worst(stopped))).name, bool(frozen(stopped)), bool(frozen(halved)), float(halved.stages[1].scale)
        ('DIVERGED', True, False, 0.25)
        >>> bool(jnp.abs(halved.vars.inner[0]) < 1e-3 < jnp.abs(stopped.vars.inner[0]))
        True
    """
    if not 0 <= checks.positive_int("halvings", halvings, least=0) <= 100:
        raise ValueError(f"halvings: got {halvings}, expected at most 100")
    if isinstance(limit, Tracer) or limit != math.inf:
        checks.positive("limit", limit)
    limit = checks.constant("limit", limit)
    if halvings and (isinstance(solver, Solver) or not callable(solver)):
        raise TypeError(f"solver: got {type(solver).__name__}, expected, with halvings, a function from a scale to a solver")
    declared: Any = solver(1.0) if halvings else solver  # type: ignore[operator]
    checks.kind("solver", declared, Solver, "a Solver (a function of a scale only with halvings)")

    def init(vars: Vars, batches: Batch) -> BilevelState:
        state = declared.init(vars, batches)
        own = Guarded(Status(jnp.zeros((), jnp.int32)), jnp.array(False))
        if halvings:
            if _loops_over_tables(declared, state, batches):
                raise ValueError(
                    "halvings: got a solver that takes several steps with a table in an update, expected one step: rows that a "
                    "refused update has written cannot be taken back; halvings=0 freezes it instead"
                )
            own = own._replace(scale=jnp.ones((), widest(state.vars)), accepted=jnp.zeros((), jnp.int32))
        return state._replace(stages=(state.stages, own))

    def update(state: BilevelState, batches: Batch) -> BilevelState:
        stages, own = state.stages
        old = state._replace(stages=stages, step=state.step if own.accepted is None else own.accepted)
        new = (solver(own.scale) if halvings else declared).update(old, batches)  # type: ignore[operator]
        finite = all_finite((new.vars, _without_tables(new.stages)))
        good = finite & _within(limit, new.vars)
        kept = keep(good & ~own.frozen, new, old)
        refused = ~good & ~own.frozen
        code = jnp.where(finite, jnp.int32(Result.DIVERGED), jnp.int32(Result.NONFINITE))
        status = Status(jnp.maximum(own.status.code, jnp.where(refused, code, jnp.int32(Result.SUCCESSFUL))))
        if own.scale is None:
            own = Guarded(status, own.frozen | refused)
        else:
            used_up = own.scale <= 0.5**halvings  # powers of two: exact
            scale = jnp.where(refused & ~used_up, own.scale / 2, own.scale)
            own = Guarded(status, own.frozen | (refused & used_up), scale, kept.step)
        return BilevelState(state.step + 1, kept.vars, (kept.stages, own))

    return declared._replace(init=init, update=update)


def _loops_over_tables(solver: Solver, state: BilevelState, batches: Batch) -> bool:
    """Whether a table goes into a loop within an update, where more than its pending row may be written."""
    program = jax.make_jaxpr(solver.update)(state, batches).jaxpr
    marks = jax.tree.map(lambda node: jax.tree.map(lambda _: _is_table(node), node), state, is_leaf=_is_table)
    marks = jax.tree.leaves(marks)

    def looped(jaxpr: Any, tables: list[Any]) -> bool:
        for equation in jaxpr.eqns:
            given = [any(one is table for table in tables) for one in equation.invars]
            if not any(given):
                continue
            if equation.primitive.name in ("scan", "while"):
                return True
            inside = equation.params.get("jaxpr")  # of jit and shard_map
            inside = getattr(inside, "jaxpr", inside)
            if inside is not None and looped(inside, [one for one, g in zip(inside.invars, given, strict=True) if g]):
                return True
        return False

    return looped(program, [one for one, mark in zip(program.invars, marks, strict=False) if mark])


def frozen(state: PyTree) -> Array:
    """Whether a `guard` has frozen the solver of a state: a bool scalar, False where there is no guard."""
    found = [g.frozen for g in jax.tree.leaves(state, is_leaf=_is_guarded) if _is_guarded(g)]
    return jnp.stack([jnp.array(False), *found]).any()


def _within(limit: float, vars: Vars) -> Array:
    """Whether no entry is larger than the limit."""
    wide = widest(vars)
    return jnp.stack([(jnp.abs(leaf).astype(wide) <= limit).all() for leaf in jax.tree.leaves(vars)]).all()


def keep(accept: Array, new: PyTree, old: PyTree) -> PyTree:
    """``new`` where accepted, else ``old``; of tables always the new one, which a selection would copy.

    A table only ever receives the row that was pending since an update that was accepted.
    """

    def select(n: Any, o: Any) -> Any:
        return n if isinstance(n, Table) else jnp.where(accept, n, o)

    return jax.tree.map(select, new, old, is_leaf=_is_table)


def _is_status(node: Any) -> bool:
    return isinstance(node, Status)


def _is_guarded(node: Any) -> bool:
    return isinstance(node, Guarded)


def _is_tally(node: Any) -> bool:
    return isinstance(node, Tally)


def _is_table(node: Any) -> bool:
    return isinstance(node, Table)


def _without_tables(tree: PyTree) -> list:
    leaves = jax.tree.leaves(tree, is_leaf=_is_table)
    return [leaf for leaf in leaves if not _is_table(leaf) and jnp.issubdtype(leaf.dtype, jnp.floating)]
