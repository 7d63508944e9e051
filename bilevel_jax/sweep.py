"""Composition: stages that step the variables, and the sweep that applies them in order."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from bilevel_jax import checks
from bilevel_jax.control_flow import scan
from bilevel_jax.estimators import plain
from bilevel_jax.optimisers import begin, initial, moved
from bilevel_jax.results import Status, all_finite, keep
from bilevel_jax.samplers import Draws, take_draw, take_window
from bilevel_jax.types import (
    Array,
    Batch,
    BilevelState,
    BoundOracle,
    Calls,
    Cost,
    Estimator,
    Oracle,
    PyTree,
    Schedule,
    Solver,
    Stage,
    Terms,
    Vars,
)


class DescendState(NamedTuple):
    """What `descend` keeps."""

    estimator: PyTree
    opts: Vars  # optax states of the variables that move
    status: Status | None = None  # the worst code that a composite oracle has met


def _each(function: Any, opts: Vars, *others: Vars) -> Vars:
    """``function(opt, ...)`` for every variable that has an optimiser, None for the others."""
    return Vars(*(None if o is None else function(o, *rest) for o, *rest in zip(opts, *others, strict=True)))


def descend(
    oracle: Oracle,
    opts: Vars,
    *,
    estimator: Estimator | None = None,
    steps: int = 1,
    fresh: bool = True,
    restart: bool = False,
) -> Stage:
    """A simultaneous (Jacobi) step on every variable that has an optimiser, ``steps`` times.

    The terms of the oracle are pruned to the variables that move before they reach the estimator, so that a table or a
    momentum holds nothing that is not used.

    Args:
        oracle: which direction.
        opts: optax transformations of the variables to move, None for the others.  Their schedules count applications: see
            `per_sweep` when ``steps`` is more than 1.  One that needs the value of a loss, such as a line search, works for z
            if the oracle has an ``inner_loss`` and the estimator is `plain`.
        estimator: `bilevel_jax.estimators.plain` by default.
        steps: number of steps in a sweep.
        fresh: whether each step takes a draw of its own (as many as the oracle wants), or all take the same one.
        restart: whether the optimisers start anew, momentum and counts of schedules, in every sweep.

    Returns:
        A stage of ``steps`` draws (one if not ``fresh``) and ``steps`` times the cost of its estimator.

    Raises:
        TypeError, ValueError: for ``steps`` below 1, for anything but an ``Oracle`` and an ``Estimator``, for ``opts`` that is
            not a ``Vars`` with at least one transformation, and for a composite oracle under an estimator that needs means;
            (when traced) if the oracle has no direction for a variable that moves; (in ``init``) for an optimiser that cannot
            move its variable.

    Example:
        >>> import jax.numpy as jnp, optax
        >>> from bilevel_jax.oracles import implicit
        >>> from bilevel_jax.types import Problem
        >>> problem = Problem(lambda z, x, a: ((z - x) ** 2).sum(), lambda z, x, b: (z**2).sum())
        >>> inner_only = descend(implicit(problem), Vars(inner=optax.sgd(0.1)), steps=3)
        >>> inner_only.draws, inner_only.cost.draw.inner_gradient, inner_only.cost.draw.hessian_vector
        (3, 3.0, 0.0)
    """
    estimator = plain() if estimator is None else estimator
    checks.kind("oracle", oracle, Oracle, "an Oracle, as implicit(problem)")
    checks.kind("estimator", estimator, Estimator, "an Estimator, as bilevel_jax.estimators.saga()")
    steps = checks.positive_int("steps", steps)
    _check_opts(opts)
    if oracle.draws is not None and estimator.needs_means:
        raise ValueError(
            "estimator: got one that averages terms over the samples, expected plain, ema or storm, because the oracle is "
            "composite: a product of several samples has no row in a table, and no value on the full data"
        )
    width = oracle.draws or 1
    single = (lambda batches: take_draw(batches, 0)) if oracle.draws is None else (lambda batches: batches)
    moves = Vars(*(o is not None for o in opts))
    inner_loss = oracle.inner_loss if estimator.is_plain else None

    def bind(step: Array, codes: list[Array] | None) -> BoundOracle:
        def pruned(vars: Vars, batch: Batch) -> Terms:
            parts = oracle.terms(vars, batch, step)
            if not isinstance(parts, Terms):  # of a composite oracle
                parts, code = parts
                if codes is not None:
                    codes.append(code)
            parts = Terms(*(Vars(*(t if m else None for t, m in zip(part, moves, strict=True))) for part in parts))
            for name, m, *found in zip(Vars._fields, moves, *parts, strict=True):
                if m and all(t is None for t in found):
                    raise ValueError(
                        f"opts.{name}: got an optimiser, but the oracle gives no direction for {name} "
                        "(is batch.outer or vars.aux None?)"
                    )
            return parts

        return pruned

    def init(vars: Vars, batches: Batch) -> DescendState:
        draw = jax.eval_shape(lambda b: single(take_draw(b, slice(0, width))), batches)
        bound = bind(jnp.zeros((), jnp.int32), None)
        jax.eval_shape(bound, vars, draw)  # refuses bad losses and variables here, before anything is compiled
        if oracle.check is not None and moves.outer:
            oracle.check(vars, draw if oracle.draws is None else jax.eval_shape(lambda b: take_draw(b, 0), draw))
        known = Vars(inner=inner_loss is not None, aux=False, outer=False)

        def start(opt: Any, name: str, value: PyTree, loss: bool) -> PyTree:
            return begin(f"opts.{name}", name, opt, value, vars.outer, loss=loss, backward=False)

        opt_states = _each(start, opts, Vars(*Vars._fields), vars, known)
        status = None if oracle.draws is None else Status(jnp.zeros((), jnp.int32))
        return DescendState(estimator.init(bound, vars, draw), opt_states, status)

    def update(state: DescendState, vars: Vars, batches: Batch, step: Array) -> tuple[Vars, DescendState]:
        if restart:
            state = state._replace(opts=_each(initial, opts, vars))

        def once(carry: tuple[Vars, DescendState], batch: Batch, k: Any) -> tuple[Vars, DescendState]:
            (vars, state), codes = carry, []
            direction, est = estimator.update(bind(step, codes), vars, batch, step * steps + k, state.estimator)
            known = Vars(None if inner_loss is None else lambda z, g=inner_loss: g(vars._replace(inner=z), batch, step))
            pairs = _each(
                lambda o, d, s, v, loss: moved(o, d, s, v, vars.outer, loss), opts, direction, state.opts, vars, known
            )
            new = [v if p is None else p[0] for v, p in zip(vars, pairs, strict=True)]
            if steps > 1:  # what is not finite must not wait to be written into a table, where no guard could take it back
                est = keep(all_finite(new), est, state.estimator)
            status = None if state.status is None else Status(jnp.stack([state.status.code, *codes]).max())
            return Vars(*new), DescendState(est, Vars(*(None if p is None else p[1] for p in pairs)), status)

        if steps == 1:
            return once((vars, state), single(batches), 0)
        first = None if fresh else single(batches)

        def body(carry: Any, k: Array) -> tuple[Any, None]:
            return once(carry, single(take_window(batches, k * width, width)) if first is None else first, k), None

        carry, _ = scan(body, (vars, state), jnp.arange(steps, dtype=jnp.int32))
        return carry

    calls = oracle.calls(moves)
    cost = Cost(
        draw=Calls(*(steps * estimator.draw_calls * c for c in calls)),
        full=Calls(*(steps * estimator.full_calls * c for c in calls)),
    )
    return Stage(init, update, width * (steps if fresh else 1), cost, lazy=True)


def zeros(z: PyTree) -> PyTree:
    """Zeros like z: where v starts."""
    return jax.tree.map(jnp.zeros_like, z)


def same(z: PyTree) -> PyTree:
    """z itself: where a second inner iterate starts."""
    return z


def sweep(*stages: Stage, aux: Callable[[PyTree], PyTree] = zeros, inner: Callable[[PyTree], PyTree] | None = None) -> Solver:
    """Apply stages in order, each at the variables that the last one left (Gauss-Seidel): `optax.chain` for iterates.

    Args:
        *stages: at least one.
        aux: where ``vars.aux`` starts if it is not given: a function of ``vars.inner``, `zeros` or `same` or your own.
        inner: where ``vars.inner`` starts if it is not given: a function of ``vars.outer``.  By default it must be given.

    Returns:
        A solver.  ``init(vars, batches)`` checks the variables, fills ``vars.aux`` where it is None, and copies every leaf, so
        that the state may be donated; ``update(state, batches)`` is one sweep, of ``draws`` draws.

    Raises:
        TypeError, ValueError: without stages, and for what is no ``Stage``; (in ``init`` and ``update``, before compilation)
            for variables that are not floating-point pytrees, and for batches whose leading axis is not the number of draws.
    """
    if not stages:
        raise ValueError("stages: got none, expected at least one")
    for number, stage in enumerate(stages):
        checks.kind(f"stages[{number}]", stage, Stage, "a Stage, as descend(oracle, opts)")
    draws = sum(stage.draws for stage in stages)

    def share(batches: Batch | Draws) -> list[Any]:
        """Each stage's own draws."""
        checks.kind("batches", batches, Batch | Draws, "a Batch")
        if isinstance(batches, Batch):
            checks.arrays("batches", batches)
            if not _has_shapes_only(batches):
                batches = jax.tree.map(jnp.asarray, batches)
        stacked = batches.plan if isinstance(batches, Draws) else batches._replace(full=None)
        checks.leading_axis("batches", stacked, draws, "the number of draws of the solver")
        shares, start = [], 0
        for stage in stages:
            part = slice(start, start + stage.draws)
            cut = (lambda b: b) if len(stages) == 1 else (lambda b, part=part: take_draw(b, part))
            shares.append(jax.eval_shape(cut, batches) if _has_shapes_only(batches) else cut(batches))
            start += stage.draws
        return shares

    def init(vars: Vars, batches: Batch) -> BilevelState:
        vars = checks.variables(vars)
        if vars.inner is None and inner is not None:
            checks.floating("vars.outer", vars.outer)
            vars = vars._replace(inner=inner(vars.outer))
        for name in ("inner", "outer"):
            checks.floating(f"vars.{name}", getattr(vars, name))
        if vars.aux is None:
            vars = vars._replace(aux=aux(vars.inner))
        states = tuple(stage.init(vars, b) for stage, b in zip(stages, share(batches), strict=True))
        state = BilevelState(jnp.zeros((), jnp.int32), vars, states)
        # With the dtype spelled out the copy is never weakly typed: otherwise the second update would compile anew.
        return jax.tree.map(lambda leaf: jnp.array(leaf, leaf.dtype, copy=True), state)

    def update(state: BilevelState, batches: Batch) -> BilevelState:
        if not isinstance(state, BilevelState) or len(state.stages) != len(stages):
            raise TypeError(f"state: got {type(state).__name__}, expected the BilevelState that this solver's init returned")
        vars, states = state.vars, []
        for stage, own, batch in zip(stages, state.stages, share(batches), strict=True):
            vars, own = stage.update(own, vars, batch, state.step)
            states.append(own)
        return BilevelState(state.step + 1, vars, tuple(states))

    cost = Cost(*(Calls(*map(sum, zip(*part, strict=True))) for part in zip(*(s.cost for s in stages), strict=True)))
    return Solver(init, update, draws, cost, lazy=all(stage.lazy for stage in stages))


def per_sweep(schedule: Schedule, steps: int) -> Schedule:
    """A schedule that counts sweeps, for an optimiser that is applied ``steps`` times a sweep.

    Example:
        >>> [float(per_sweep(lambda t: 1.0 / (t + 1), 2)(k)) for k in range(4)]
        [1.0, 1.0, 0.5, 0.5]
    """
    steps = checks.positive_int("steps", steps)
    return (lambda count: schedule(count // steps)) if callable(schedule) else schedule


def _has_shapes_only(batches: Any) -> bool:
    return any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(batches))


def _check_opts(opts: Any) -> None:
    checks.kind("opts", opts, Vars, "Vars(inner=..., aux=..., outer=...)")
    if all(o is None for o in opts):
        raise ValueError("opts: got no transformation, expected one for at least one variable")
    for name, opt in zip(Vars._fields, opts, strict=True):
        if opt is not None:
            checks.transformation(f"opts.{name}", opt)
