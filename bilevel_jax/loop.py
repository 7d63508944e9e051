"""Loops: `run` for data on the device (one program, pure), `stream` for an external loader (host loop, donated state)."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from bilevel_jax import checks
from bilevel_jax.control_flow import marked, scan
from bilevel_jax.results import Result, all_finite, worst
from bilevel_jax.samplers import Plan, Sampler, take_draw, take_window
from bilevel_jax.types import Array, Batch, BilevelState, Calls, Cost, Levels, Solver, Vars

#: ``(vars, data) -> {name: scalar}``.
Metrics = Callable[[Vars, Levels], dict[str, Array]]
#: ``{"step": int32 [rows], name: [rows], ...}``.
History = dict[str, Array]


class Carry(NamedTuple):
    """All that a run needs to go on: resumed equals uninterrupted, bit for bit."""

    state: BilevelState
    key: Array  # typed key [], from which every draw of the run comes
    result: Array  # int32 [], the worst `Result` met
    finite: Vars  # the variables at the last evaluation (the start, and every ``every`` updates) at which all were finite


def begin(solver: Solver, sampler: Sampler, vars: Vars, data: Levels, key: Array) -> Carry:
    """The carry of a run before its first step.

    Args, Raises: as `run`.
    """
    _check_parts(solver, sampler)
    checks.typed_key("key", key)
    checks.kind("data", data, Levels, "Levels(inner=..., outer=...)")
    checks.finite("data", data)
    shapes = jax.eval_shape(lambda d, k: sampler.batches(d, k, 0, solver.draws), data, key)
    state = solver.init(marked(vars, key), shapes)
    checks.finite("vars", vars)
    # copies: the carry may be donated, and the caller keeps the key and the variables
    carry = Carry(state, jnp.copy(key), jnp.zeros((), jnp.int32), jax.tree.map(jnp.copy, state.vars))
    return marked(carry)


def resume(
    solver: Solver,
    sampler: Sampler,
    carry: Carry,
    data: Levels,
    *,
    steps: int,
    every: int | None = None,
    metrics: Metrics | None = None,
) -> tuple[Carry, History]:
    """``steps`` more updates from a carry, as one scan: pure, and made to be jitted and vmapped by its caller.

    Where carries are mapped over, their counts are, too, and an estimator that refreshes pays a full pass at every update.

    Args:
        solver, sampler, data: those of the run.
        carry: of `begin`, or of an earlier `run` or `resume`.
        steps: updates to do, a multiple of ``every``.
        every: updates from one evaluation to the next, ``steps`` by default.
        metrics: ``(vars, data) -> {name: scalar}``.

    Returns:
        The carry, and a history of ``steps / every`` rows: ``step`` and one entry a metric.  A metric that is not finite is
        recorded as it is; ``carry.result`` then says so, and ``carry.finite`` holds the variables of the last evaluation at
        which they were finite: those that the carry came with, if there was none since.

    Raises:
        TypeError, ValueError: for counts that are not positive ints, and ``steps`` that is not a multiple of ``every``.
    """
    _check_parts(solver, sampler)
    steps, every = _counts(steps, every)
    checks.arrays("data", data)
    data = sampler.whole(jax.tree.map(jnp.asarray, data))

    gather = sampler.lazily if solver.lazy and solver.draws > 1 else sampler.stack

    def one(state: BilevelState, plan: Plan) -> tuple[BilevelState, None]:
        return solver.update(state, gather(data, plan)), None  # type: ignore[arg-type]

    def chunk(carry: Carry, _: None) -> tuple[Carry, History]:
        plan = sampler.plan(data, carry.key, carry.state.step * solver.draws, every * solver.draws)
        plan = jax.tree.map(lambda leaf: leaf.reshape(every, solver.draws, *leaf.shape[1:]), plan)
        state, _ = scan(one, carry.state, plan)
        row = _row(state, metrics, data)
        fine = all_finite(state.vars)
        known = all_finite([value for value in row.values() if jnp.issubdtype(value.dtype, jnp.inexact)])
        code = jnp.where(fine & known, worst(state), jnp.int32(Result.NONFINITE))
        kept = jax.tree.map(lambda new, old: jnp.where(fine, new, old), state.vars, carry.finite)
        carry = Carry(state, carry.key, jnp.maximum(carry.result, code), kept)
        return carry, row

    return scan(chunk, carry, None, length=steps // every)


def run(
    solver: Solver,
    sampler: Sampler,
    vars: Vars,
    data: Levels,
    key: Array,
    *,
    steps: int,
    every: int | None = None,
    metrics: Metrics | None = None,
) -> tuple[Carry, History]:
    """Run a solver on data that lie on the device: one scan, metrics every ``every`` updates, nothing jitted.

    Jit it (``jax.jit(functools.partial(run, solver, sampler, steps=..., ...))``), or vmap it over keys; build the solver
    inside the function that you jit, and new rates do not recompile either.

    Args:
        solver: of `bilevel_jax.solvers`, or your own.
        sampler: of `bilevel_jax.samplers`.
        vars: starting point; ``aux=None`` starts it at zeros like ``inner``.
        data: ``Levels(inner, outer)``, pytrees of arrays with samples along the leading axis.
        key: typed key; draw number t is a function of it and t.
        steps: updates to do, a multiple of ``every``.
        every: updates from one evaluation to the next, ``steps`` by default.
        metrics: ``(vars, data) -> {name: scalar}``.

    Returns:
        The carry (pass it to `resume` to go on) and a history of ``1 + steps / every`` rows, the first at the start.  Where the
        run ends NONFINITE, ``carry.finite`` holds the variables of the last of these rows at which they were finite, so those
        of the start if ``every`` is not given; `bilevel_jax.guard` stops at the first bad update instead.

    Raises:
        TypeError, ValueError: before compilation, for what `resume` refuses, NaN or infinity in (concrete) data and variables,
            an untyped key, and everything that the solver and the sampler refuse.  Inside `jax.jit` the data are traced, and
            their values cannot be checked: call ``bilevel_jax.checks.finite("data", data)`` before.

    Cost: ``steps`` times ``solver.cost``.

    Example:
        >>> import optax
        >>> from bilevel_jax import samplers, solvers, testing
        >>> quadratic = testing.quadratic(jax.random.key(0))
        >>> solver = solvers.saba(quadratic.problem, Vars(*map(optax.sgd, (0.2, 0.2, 0.1))))
        >>> carry, history = run(solver, samplers.uniform(8), quadratic.start, quadratic.data, jax.random.key(1),
        ...                      steps=2000, every=1000, metrics=quadratic.metrics)
        >>> history["step"].tolist(), bool(history["gradient_norm"][-1] < 1e-2 * history["gradient_norm"][0])
        ([0, 1000, 2000], True)
    """
    _counts(steps, every)
    carry = begin(solver, sampler, vars, data, key)
    data = jax.tree.map(jnp.asarray, data)
    first = _row(carry.state, metrics, sampler.whole(data))
    carry, rest = resume(solver, sampler, carry, data, steps=steps, every=every, metrics=metrics)
    return carry, jax.tree.map(lambda a, b: jnp.concatenate([a[None], b]), first, rest)


def stream(
    solver: Solver,
    start: Vars | BilevelState,
    batches: Iterable[Batch],
    *,
    every: int = 1,
    metrics: Callable[[Vars], dict[str, Array]] | None = None,
) -> Iterator[tuple[BilevelState, dict[str, Array]]]:
    """Run a solver on batches that come from outside: a host loop over a jitted update with a donated state.

    This jits, as nothing in the library but its host loops does: without donation every table would be copied at every step.
    A call takes the host some 0.1 ms: `several` puts many short updates into one.  The state is all that a loader that is a
    function of the step needs to go on: `bilevel_jax.checkpoints` shows how to save and take up a stream.

    Args:
        solver: any solver.
        start: variables to start from, or the state to go on from (it is copied, not donated).
        batches: stacked for the solver, as `bilevel_jax.samplers.from_stream` makes them, or `bilevel_jax.readers.from_arrays`
            of data in a file.
        every: updates from one yield to the next.
        metrics: ``vars -> {name: scalar}``, jitted here.

    Yields:
        Every ``every`` updates, and after the last one, ``(state, row)`` with ``row = {"step": ..., metrics...}``.  The state
        is donated to the next update: copy what you keep (``jax.tree.map(jnp.copy, state.vars)``).

    Raises:
        TypeError, ValueError: for ``every`` below 1 and for what the solver refuses.

    Example:
        >>> import optax
        >>> from bilevel_jax import samplers, solvers, testing
        >>> quadratic = testing.quadratic(jax.random.key(0))
        >>> loader = (samplers.uniform(8).batches(quadratic.data, jax.random.key(1), t, 1) for t in range(20))
        >>> solver = solvers.soba(quadratic.problem, Vars(*map(optax.sgd, (0.2, 0.2, 0.1))))
        >>> [int(row["step"]) for _, row in stream(solver, quadratic.start, loader, every=10)]
        [10, 20]
    """
    checks.kind("solver", solver, Solver, "a Solver")
    every = checks.positive_int("every", every)
    checks.finite("start", start if isinstance(start, Vars) else ())
    update = jax.jit(solver.update, donate_argnums=0)
    evaluate = jax.jit(lambda state: _row(state, metrics))
    state, done = None, 0
    for done, batch in enumerate(batches, 1):
        if state is None:
            state = jax.tree.map(jnp.copy, start) if isinstance(start, BilevelState) else solver.init(start, batch)
        try:
            state = update(state, batch)
        except (TypeError, ValueError):
            checks.arrays("batches", batch)  # in our words; looking at every batch would cost a third of a short update
            raise
        if done % every == 0:
            yield state, evaluate(state)
    if state is not None and done % every:
        yield state, evaluate(state)


def several(solver: Solver, updates: int) -> Solver:
    """So many updates of a solver as one: for `stream`, where a call from the host costs as much as ten short updates.

    Args:
        solver: any solver.
        updates: of it in one update of the new solver.

    Returns:
        A solver of ``updates`` times the draws and the cost, with the same states: ``step`` counts the updates of ``solver``.

    Raises:
        TypeError, ValueError: for ``updates`` below 1.

    Example:
        >>> import optax
        >>> from bilevel_jax import solvers, testing
        >>> quadratic = testing.quadratic(jax.random.key(0))
        >>> several(solvers.amigo(quadratic.problem, Vars(inner=optax.sgd(0.1), outer=optax.sgd(0.1)), aux_rate=0.1,
        ...                       inner_steps=2, aux_steps=2), 50).draws
        300
    """
    checks.kind("solver", solver, Solver, "a Solver")
    updates = checks.positive_int("updates", updates)

    def init(vars: Vars, batches: Batch) -> BilevelState:
        checks.arrays("batches", batches)
        return solver.init(vars, jax.eval_shape(lambda b: take_draw(b, slice(0, solver.draws)), batches))

    def update(state: BilevelState, batches: Batch) -> BilevelState:
        checks.arrays("batches", batches)
        checks.leading_axis("batches", batches._replace(full=None), updates * solver.draws, "the number of draws of the solver")

        def one(state: BilevelState, turn: Array) -> tuple[BilevelState, None]:
            return solver.update(state, take_window(batches, turn * solver.draws, solver.draws)), None

        return scan(one, state, jnp.arange(updates, dtype=jnp.int32))[0]

    cost = Cost(*(Calls(*(updates * calls for calls in part)) for part in solver.cost))
    return Solver(init, update, updates * solver.draws, cost)


def row_of(state: BilevelState, named: History) -> History:
    """The row of a history: the step, and metrics that have been checked to be named scalars."""
    if not isinstance(named, dict) or "step" in named:
        given = "'step' among its names" if isinstance(named, dict) else type(named).__name__
        raise TypeError(f"metrics: got {given}, expected a dictionary of scalars, none of them called 'step'")
    checks.arrays("metrics", {n: value for n, value in named.items() if not isinstance(value, bool | int | float | complex)})
    named = {name: jnp.asarray(value) for name, value in named.items()}
    for name, value in named.items():
        if jnp.shape(value) != ():
            raise ValueError(f"metrics: got {name!r} of shape {jnp.shape(value)}, expected a scalar")
    return {"step": state.step, **named}


def _row(state: BilevelState, metrics: Callable[..., dict[str, Array]] | None, *data: Levels) -> History:
    """The row of a history, from the metrics of a run or a stream."""
    if metrics is None:
        return row_of(state, {})
    given = (state.vars, *data)
    with checks.evaluating("metrics", **dict(zip(("vars", "data"), given, strict=False))):
        named = metrics(*given)
    return row_of(state, named)


def _check_parts(solver: Any, sampler: Any) -> None:
    checks.kind("solver", solver, Solver, "a Solver")
    checks.kind("sampler", sampler, Sampler, "a Sampler of bilevel_jax.samplers")


def _counts(steps: int, every: int | None) -> tuple[int, int]:
    steps = checks.positive_int("steps", steps)
    every = steps if every is None else checks.positive_int("every", every)
    if steps % every:
        raise ValueError(f"steps: got {steps}, expected a multiple of every = {every}")
    return steps, every
