"""Result codes, and the guard that keeps the last finite state.

Codes are int32 arrays, so that they live in states, under jit and vmap; the larger the code, the worse.
"""

import enum
import math
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

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
    Result.DIVERGED: "the steps made the residual grow; the last finite iterate is kept: take a smaller rate, at most 1/L, or "
    "a larger smoothness constant",
    Result.NONFINITE: "an iterate or a metric became NaN or infinite; the last finite variables are kept: try smaller steps",
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
    found = [s.code for s in jax.tree.leaves(state, is_leaf=_is_status) if _is_status(s)]
    return jnp.stack([jnp.zeros((), jnp.int32), *found]).max()


def all_finite(tree: PyTree) -> Array:
    """Whether every leaf is free of NaN and infinity: a bool scalar."""
    return jnp.stack([jnp.array(True), *(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(tree))]).all()


def guard(solver: Solver) -> Solver:
    """Freeze a solver at its last finite state: from the first update that gives NaN or infinity on, nothing moves.

    The selection between old and new runs over every leaf but the tables, which would be copied at every step.  That is
    exact: a table only receives the row that was pending since an accepted step.  ``step`` goes on counting.

    Args:
        solver: any solver.

    Returns:
        A solver of the same draws and cost, whose state ends with a ``Status``: see `worst`.

    Example:
        >>> import optax
        >>> from bilevel_jax.solvers import soba
        >>> from bilevel_jax.types import Problem
        >>> problem = Problem(lambda z, x, a: ((z - x) ** 2).sum(), lambda z, x, b: (z**2).sum())
        >>> solver = guard(soba(problem, Vars(*(optax.sgd(1e30),) * 3)))
        >>> batches = Batch(inner=jnp.zeros((1, 1)), outer=jnp.zeros((1, 1)))
        >>> state = solver.init(Vars(inner=jnp.ones(1), outer=jnp.zeros(1)), batches)
        >>> for _ in range(5):
        ...     state = solver.update(state, batches)
        >>> bool(all_finite(state.vars)), Result(int(worst(state))).name
        (True, 'NONFINITE')
    """

    def init(vars: Vars, batches: Batch) -> BilevelState:
        state = solver.init(vars, batches)
        return state._replace(stages=(state.stages, Status(jnp.zeros((), jnp.int32))))

    def update(state: BilevelState, batches: Batch) -> BilevelState:
        stages, status = state.stages
        old = state._replace(stages=stages)
        new = solver.update(old, batches)
        accept = (status.code == Result.SUCCESSFUL) & all_finite((new.vars, _without_tables(new.stages)))

        kept = keep(accept, new, old)
        code = jnp.where(accept, Result.SUCCESSFUL, Result.NONFINITE).astype(jnp.int32)
        return BilevelState(new.step, kept.vars, (kept.stages, Status(code)))

    return solver._replace(init=init, update=update)


def keep(accept: Array, new: PyTree, old: PyTree) -> PyTree:
    """``new`` where accepted, else ``old``; of tables always the new one, which a selection would copy.

    A table only ever receives the row that was pending since an update that was accepted.
    """

    def select(n: Any, o: Any) -> Any:
        return n if isinstance(n, Table) else jnp.where(accept, n, o)

    return jax.tree.map(select, new, old, is_leaf=_is_table)


def _is_status(node: Any) -> bool:
    return isinstance(node, Status)


def _is_tally(node: Any) -> bool:
    return isinstance(node, Tally)


def _is_table(node: Any) -> bool:
    return isinstance(node, Table)


def _without_tables(tree: PyTree) -> list:
    leaves = jax.tree.leaves(tree, is_leaf=_is_table)
    return [leaf for leaf in leaves if not _is_table(leaf) and jnp.issubdtype(leaf.dtype, jnp.floating)]
