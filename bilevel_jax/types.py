"""The vocabulary of the library: every type that crosses a module boundary, and no computation.

The problem is ``min_x f(z*(x), x)`` with ``z*(x) = argmin_z g(z, x)``.  ``g`` is the *inner* loss and ``f`` the *outer*
loss; ``z`` is the inner variable, ``x`` the outer one, and ``v`` solves the linear system
``d2_zz g(z, x) v = -d_z f(z, x)``.  With that sign every direction is a plain sum::

    Dz = d_z g        Dv = d2_zz g v + d_z f        Dx = d2_xz g v + d_x f

One rule carries the design: *all randomness and all data enter through the* ``Batch``, so that a solver's ``update`` is a
deterministic function of its state and its batches.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax

PyTree = Any
Array = jax.Array
#: ``(z, x, data) -> scalar`` (the mean over ``data``) or ``[samples]`` (one value a sample: can be weighted and masked).
Loss = Callable[[PyTree, PyTree, PyTree], Array]
#: A number, or a function of the number of steps taken, as in optax.
Schedule = float | Array | Callable[[Array], Array | float]


class Problem(NamedTuple):
    """Two pure losses ``(z, x, data) -> scalar or [samples]``: what a user writes down.

    A loss that returns one value a sample lets the library weight and mask, so that a ragged last block is exact.  A loss
    that needs the index of a sample (hyper-cleaning: one entry of ``x`` a sample) carries it as a leaf of its data.
    """

    inner: Loss  # g
    outer: Loss  # f


class Vars(NamedTuple):
    """One entry per variable.  Also the shape of directions, of optimisers and of optimiser states."""

    inner: PyTree = None  # z
    aux: PyTree = None  # v in implicit methods, a second inner iterate in value-function methods, None in unrolled ones
    outer: PyTree = None  # x


class Levels(NamedTuple):
    """One entry per level of the problem: two data sets, two vectors of row weights, two table slots."""

    inner: PyTree = None
    outer: PyTree = None


@partial(jax.tree_util.register_dataclass, data_fields=("index",), meta_fields=("count",))
@dataclass(frozen=True)
class Slot:
    """The row of a per-block table that a draw belongs to (finite sums only).

    ``count`` is static, so that a table with another number of rows is refused before anything is compiled.
    """

    index: Array  # int32 []
    count: int  # number of blocks


class Batch(NamedTuple):
    """One draw: the data and every random choice that one oracle call uses.

    Solvers take several draws at once, stacked: every leaf but those of ``full`` has a leading axis of length ``draws``.
    """

    inner: PyTree = None  # data for g
    outer: PyTree = None  # data for f
    key: Array | None = None  # typed key [], for losses or estimators that flip coins
    slot: Levels | None = None  # of Slot: which rows of a table this draw belongs to
    weight: Levels | None = None  # of float [rows] or None: row weights; they sum to 1 on average over the blocks
    full: Levels | None = None  # all the data, for refreshes; never stacked


class Terms(NamedTuple):
    """A direction, split by the data it came from; a term that is absent is None."""

    inner: Vars = Vars()
    outer: Vars = Vars()


class Calls(NamedTuple):
    """Oracle calls: the unit of cost, and the x-axis of figures.  Each entry (a float, or an array where they are counted as
    they go) counts calls on one batch."""

    inner_gradient: Any = 0.0  # d_z g, d_x g, or both at one point
    hessian_vector: Any = 0.0  # d2_zz g v
    cross: Any = 0.0  # d2_xz g v
    outer_gradient: Any = 0.0  # the pair (d_z f, d_x f)


class Cost(NamedTuple):
    """Average oracle calls of one ``update``: on single draws, and on the full data of the refreshes.

    At most so many where a tolerance may end a loop early, and inf where there is no bound: the state then counts them (see
    `bilevel_jax.results.spent`).
    """

    draw: Calls = Calls()
    full: Calls = Calls()


class Oracle(NamedTuple):
    """Which direction.  ``terms(vars, batch, step) -> Terms`` is deterministic given the batch.

    ``calls(moved)`` is the cost of the terms of the variables in ``moved`` (a ``Vars`` of bool).  A *composite* oracle, whose
    terms are not means over the samples, says how many draws it takes; it gets them stacked, and returns a result code
    beside its terms.

    ``inner_loss(vars, batch, step)``, where it is given, is the loss whose gradient in ``vars.inner`` is the direction of z.
    Optimisers that need the value of a loss, such as line searches, work on z only where it is given.

    ``check(vars, draw)`` looks at the losses before anything is compiled, on one draw (shapes will do): a stage that moves x
    calls it in ``init``.
    """

    terms: Callable[[Vars, Batch, Array], Terms | tuple[Terms, Array]]
    calls: Callable[[Vars], Calls]
    draws: int | None = None  # None: one draw, not stacked
    inner_loss: Callable[[Vars, Batch, Array], Array] | None = None
    check: Callable[[Vars, Batch], None] | None = None


#: What an estimator sees: an oracle whose step is bound and whose terms are pruned to the variables that move.  It may be
#: called inside `jax.lax.cond` and the like, but not a composite one, whose codes must reach the state.
BoundOracle = Callable[[Vars, Batch], Terms]


class Estimator(NamedTuple):
    """How directions are averaged or variance-reduced.  Wraps any oracle; knows nothing about bilevel problems.

    ``init(oracle, vars, batch) -> state`` only looks at shapes; ``update(oracle, vars, batch, count, state)`` returns the
    direction (a ``Vars``) and the new state.  ``count`` is the number of updates so far.
    """

    init: Callable[[BoundOracle, Vars, Batch], PyTree]
    update: Callable[[BoundOracle, Vars, Batch, Array, PyTree], tuple[Vars, PyTree]]
    draw_calls: float = 1.0  # oracle calls on the draw, per update
    full_calls: float = 0.0  # oracle calls on the full data, per update, on average
    needs_means: bool = False  # whether the terms must be means over the samples, as those of a composite oracle are not
    is_plain: bool = False  # whether the direction is that of the oracle on the draw, unchanged


class Table(NamedTuple):
    """Marks leaves ``[slots, ...]`` of which an update writes one row.  The guard must not select over them."""

    rows: PyTree


class Stage(NamedTuple):
    """One step of a sweep.  ``init(vars, batches) -> state``; ``update(state, vars, batches, step) -> (vars, state)``."""

    init: Callable[[Vars, Batch], PyTree]
    update: Callable[[PyTree, Vars, Batch, Array], tuple[Vars, PyTree]]
    draws: int
    cost: Cost
    lazy: bool = False  # whether it takes its draws with `bilevel_jax.samplers.take_draw`, so that they need not be stacked


class BilevelState(NamedTuple):
    """The one state of a solver: inner solution, linear-system solution and outer variable evolve together."""

    step: Array  # int32 [], number of updates done
    vars: Vars
    stages: tuple  # one entry per stage, as in optax.chain


class Solver(NamedTuple):
    """``init(vars, batches) -> BilevelState``; ``update(state, batches) -> BilevelState``.

    Leaves of ``batches`` have a leading axis of length ``draws``; ``init`` only looks at their shapes, so that
    ``jax.ShapeDtypeStruct`` leaves will do, and copies ``vars``, so that the state may be donated.
    """

    init: Callable[[Vars, Batch], BilevelState]
    update: Callable[[BilevelState, Batch], BilevelState]
    draws: int
    cost: Cost
    lazy: bool = False  # whether all its stages are
