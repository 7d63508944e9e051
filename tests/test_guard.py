"""Divergence: what the guard freezes, what a run records, and that both leave alone what does not diverge."""

from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from bilevel_jax import Levels, Result, Vars, begin, descend, guard, implicit, resume, run, solvers, sweep, worst
from bilevel_jax.estimators import SagaState, flush, saga
from bilevel_jax.loop import several
from bilevel_jax.results import Guarded, Status, all_finite, frozen
from tests.checks import check_no_copies, check_same
from tests.tables import ACCELERATED, STEPS, build, distance, every_kind, kinds, stream, thinned, tiny, tiny_sampler, tiny_start
from tests.test_tables import scan_text, setting

WILD = Vars(1e60, 1e60, 1e60)  # overflows float64 within six updates


@cache
def steppers(name: str) -> tuple[Any, Any]:
    """The compiled updates of a solver, bare and guarded, as functions of the rates, a state and a batch."""

    def bare(rates, state, batch):
        return build(name, tiny().problem, rates).update(state, batch)

    def guarded(rates, state, batch):
        return guard(build(name, tiny().problem, rates)).update(state, batch)

    return jax.jit(bare), jax.jit(guarded)


def both(name: str, steps: Vars) -> tuple[list[Any], list[Any]]:
    """The states that the bare and the guarded solver go through."""
    rates = Vars(*(jnp.asarray(np.float64(step)) for step in steps))
    solver = build(name, tiny().problem, rates)
    batches = stream(solver.draws)[:9]
    states, held = [solver.init(tiny_start(name), batches[0])], [guard(solver).init(tiny_start(name), batches[0])]
    for batch in batches:
        for update, past in zip(steppers(name), (states, held), strict=True):
            past.append(update(rates, past[-1], batch))
    return states, held


def flushed(tree: Any) -> Any:
    """With the pending rows of all tables written."""
    return jax.tree.map(
        lambda node: flush(node) if isinstance(node, SagaState) else node,
        tree,
        is_leaf=lambda node: isinstance(node, SagaState),
    )


def fine(tree: Any) -> bool:
    return all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(tree) if jnp.issubdtype(leaf.dtype, jnp.floating))


def own_code(state: Any) -> int:
    """That of the guard alone: the stages of a solver have theirs."""
    return int(state.stages[1].status.code)


#: Which take no wild steps, or overflow within the first update.  On later versions of jax HOAG does: a norm that it compares
#: with its tolerance is not finite at once.
TAME = (*ACCELERATED, "bvfsm", "bda", "iaptt", *(["hoag"] if jax.__version_info__ >= (0, 11) else []))


@kinds(*TAME)
def test_guard_freezes_the_last_finite_state(name):
    """Against the states that the bare solver goes through; tables included, once flushed."""
    states, held = both(name, WILD)
    codes = [own_code(state) for state in held]
    last = max(t for t, state in enumerate(states) if fine(state))
    assert 1 <= last < 8, "it should diverge on the way"
    assert codes == [Result.SUCCESSFUL] * (last + 1) + [Result.NONFINITE] * (9 - last)
    inner, own = held[-1].stages
    assert isinstance(own, Guarded)
    check_same(flushed((held[-1].vars, inner)), flushed((states[last].vars, states[last].stages)), tol=1e-12)
    assert fine(held[-1])
    assert int(held[-1].step) == 9


@every_kind
def test_guard_changes_nothing_where_nothing_diverges(name):
    states, held = both(name, STEPS)
    check_same(flushed((held[-1].vars, held[-1].stages[0])), flushed((states[-1].vars, states[-1].stages)), tol=1e-14)
    assert own_code(held[-1]) == Result.SUCCESSFUL
    solver = build(name, tiny().problem)
    assert (guard(solver).draws, guard(solver).cost) == (solver.draws, solver.cost)


def test_guard_keeps_tables_finite_in_a_stage_of_several_steps():
    """A sweep that is refused may have written rows of its own before it failed: what is frozen must still be finite."""
    stage = descend(implicit(tiny().problem), Vars(inner=optax.sgd(1e100)), estimator=saga(), steps=3)
    solver = guard(sweep(stage))
    update, state = jax.jit(solver.update), solver.init(tiny().start, stream(3)[0])
    for batch in stream(3)[:4]:
        state = update(state, batch)
        assert fine(state.vars)
        assert fine(flushed(state))
    assert int(worst(state)) == Result.NONFINITE


def x_of(vars: Vars, data: Levels) -> dict[str, jax.Array]:
    del data
    return {"x": vars.outer}


@thinned(("name", "guarded"), [("soba", False), ("saba", True)], ("saba", True))
def test_run_records_divergence_in_its_lane_only(name, guarded):
    rates = Vars(*(jnp.asarray(np.array([step, 1e60, 0.5 * step])) for step in STEPS))

    def go(rates):
        solver = build(name, tiny().problem, rates)
        solver = guard(solver) if guarded else solver
        return run(solver, tiny_sampler(), tiny().start, tiny().data, jax.random.key(3), steps=12, every=2, metrics=x_of)

    carry, history = jax.jit(jax.vmap(go))(rates)
    assert carry.result.tolist() == [Result.SUCCESSFUL, Result.NONFINITE, Result.SUCCESSFUL]
    assert bool(all_finite(carry.finite))
    healthy = jnp.array([0, 2])
    assert bool(jnp.isfinite(history["x"][healthy]).all())
    check_same(carry.finite.outer[healthy], carry.state.vars.outer[healthy])
    alone, rows = jax.jit(go)(Vars(*STEPS))
    check_same(jax.tree.map(lambda leaf: leaf[0], carry.finite), alone.state.vars, tol=1e-12)
    check_same(history["x"][0], rows["x"], tol=1e-12)
    wild = np.asarray(history["x"][1])
    if guarded:
        assert np.isfinite(wild).all()
        check_same(carry.finite.outer[1], carry.state.vars.outer[1])
    else:
        good = np.isfinite(wild)
        assert not good[-1], "a metric that is not finite is recorded as it is"
        assert good[:2].all()
        check_same(carry.finite.outer[1], history["x"][1][np.flatnonzero(good)[-1]])


def poisoned(row: int) -> Levels:
    inner, outer = tiny().data
    return Levels((inner[0].at[row].set(jnp.nan), inner[1]), outer)


def test_one_bad_sample_freezes_a_guarded_run():
    """NaN in one row, not seen by the checks as the data are an argument of the compiled program."""
    for name in ("soba", "saba"):
        solver = guard(build(name, tiny().problem))
        go = jax.jit(
            lambda d, s=solver: run(s, tiny_sampler(), tiny().start, d, jax.random.key(3), steps=40, every=1, metrics=x_of)
        )
        carry, history = go(poisoned(4))
        clean, expected = go(tiny().data)
        assert int(carry.result) == Result.NONFINITE
        assert int(clean.result) == Result.SUCCESSFUL
        assert fine(flushed(carry.state))
        assert bool(jnp.isfinite(history["x"]).all())
        same = np.asarray(history["x"] == expected["x"])
        frozen = int(np.flatnonzero(~same)[0])
        assert same[:frozen].all()
        assert frozen >= 1
        assert len(set(np.asarray(history["x"][frozen - 1 :]).tolist())) == 1


def test_result_of_a_run_is_the_worst_met():
    """It is kept when the run goes on, and the last finite variables are those of an evaluation."""
    solver, key = build("soba", tiny().problem, WILD), jax.random.key(3)
    carry = begin(solver, tiny_sampler(), tiny().start, tiny().data, key)
    assert int(carry.result) == Result.SUCCESSFUL
    check_same(carry.finite, tiny().start)
    go = jax.jit(partial(resume, solver, tiny_sampler(), steps=8, metrics=x_of))
    carry, _ = go(carry, tiny().data)
    assert int(carry.result) == Result.NONFINITE
    check_same(carry.finite, tiny().start)
    healed = carry._replace(state=carry.state._replace(vars=jax.tree.map(jnp.copy, tiny().start)))
    tame = build("soba", tiny().problem)
    carry, _ = jax.jit(partial(resume, tame, tiny_sampler(), steps=2))(healed, tiny().data)
    assert fine(carry.state)
    assert int(carry.result) == Result.NONFINITE
    assert distance(carry.finite, carry.state.vars) == 0


def test_metrics_that_are_not_finite_are_reported():
    """The variables are, and are kept; a metric that is an int is no matter."""

    def metrics(vars: Vars, data: Levels) -> dict[str, jax.Array]:
        del data
        return {"log": jnp.log(vars.outer - 1e9), "count": jnp.int32(3)}

    q, solver = tiny(), build("soba", tiny().problem)
    carry, history = jax.jit(lambda k: run(solver, tiny_sampler(), q.start, q.data, k, steps=2, metrics=metrics))(
        jax.random.key(0)
    )
    assert int(carry.result) == Result.NONFINITE
    assert np.isnan(history["log"]).all()
    check_same(carry.finite, carry.state.vars)


def test_codes():
    assert Result.SUCCESSFUL < Result.NONFINITE
    assert all(code.message for code in Result)
    assert "smaller steps" in Result.NONFINITE.message
    assert "bilevel_jax.checks.finite" in Result.NONFINITE.message
    assert "guard" in Result.DIVERGED.message
    codes = [Status(jnp.int32(code)) for code in (0, 9, 0)]
    assert [int(worst(tree)) for tree in ((), {"a": codes[:1]}, ({"a": codes}, jnp.ones(3)))] == [0, 0, 9]
    assert worst(()).dtype == jnp.int32
    trees = ((), {"a": jnp.ones(2)}, {"a": jnp.array([1.0, jnp.inf])}, [jnp.ones(1), jnp.array(jnp.nan)])
    assert [bool(all_finite(tree)) for tree in trees] == [True, True, False, False]


# ---- going on with half the rates ---------------------------------------------------------------------------------------

LIMIT = 50.0


def halvable(name: str, steps: Vars) -> Any:
    """The solver as a function of the scale of its rates."""
    return lambda scale: build(name, tiny().problem, Vars(*(scale * step for step in steps)))


@cache
def halving_steppers(name: str, halvings: int) -> tuple[Any, Any]:
    """The compiled updates of a solver at a scale, and of the guarded one, as functions of the rates."""

    def bare(rates, scale, state, batch):
        return halvable(name, rates)(scale).update(state, batch)

    def guarded(rates, state, batch):
        return guard(halvable(name, rates), halvings=halvings, limit=LIMIT).update(state, batch)

    return jax.jit(bare), jax.jit(guarded)


def large(vars: Vars, limit: float) -> bool:
    return any(bool(jnp.abs(leaf).max() > limit) for leaf in jax.tree.leaves(vars))


@thinned("name", ["soba", "saba", "srba", "amigo", "meha"], "saba", "srba", "meha")
def test_halving_goes_through_the_states_of_the_accepted_draws(name):
    """Against a loop on the host that tries every draw, throws away what diverges, and halves the scale of the rates."""
    wild, halvings = Vars(*(40 * step for step in STEPS)), 20
    bare, guarded = halving_steppers(name, halvings)
    solver = guard(halvable(name, wild), halvings=halvings, limit=LIMIT)
    batches = stream(solver.draws)
    state = solver.init(tiny_start(name), batches[0])
    plain = halvable(name, wild)(1.0).init(tiny_start(name), batches[0])
    scale, refused = 1.0, []
    for t, batch in enumerate(batches):
        state = guarded(wild, state, batch)
        tried = bare(wild, jnp.asarray(np.float64(scale)), plain, batch)
        if fine(tried) and not large(tried.vars, LIMIT):
            plain = tried
        else:
            refused.append(t)
            scale /= 2
        inner, own = state.stages
        assert (float(own.scale), int(own.accepted), int(state.step)) == (scale, t + 1 - len(refused), t + 1)
        check_same(flushed((state.vars, inner)), flushed((plain.vars, plain.stages)), tol=1e-10)
    assert 1 <= len(refused) < 15, "it should diverge, and then go on"
    assert refused[-1] < len(batches) - 1
    assert int(worst(state)) == Result.DIVERGED
    assert not bool(frozen(state))


def test_halving_changes_nothing_where_nothing_diverges():
    """Bit for bit: a scale of 1 of the dtype of the variables is no rounding."""
    solver = guard(halvable("saba", STEPS), halvings=3)
    bare = halvable("saba", STEPS)(1.0)
    go = jax.jit(lambda s: run(s, tiny_sampler(), tiny().start, tiny().data, jax.random.key(3), steps=12), static_argnums=0)
    (carry, _), (plain, _) = go(solver), go(bare)
    check_same(carry.state.vars, plain.state.vars, tol=1e-14)
    assert (solver.draws, solver.cost, solver.lazy) == (bare.draws, bare.cost, bare.lazy)
    assert carry.state.stages[1].scale.dtype == jnp.float64
    assert int(carry.result) == Result.SUCCESSFUL


def test_lanes_halve_on_their_own():
    """In one compiled run: a rate that is small enough, one that takes a few halvings, and one for which they run out."""
    rates = np.array([1.0, 40.0, 1e9])

    def go(factor):
        steps = Vars(*(factor * step for step in STEPS))
        solver = guard(lambda scale: build("saba", tiny().problem, Vars(*(scale * s for s in steps))), halvings=6, limit=LIMIT)
        return run(solver, tiny_sampler(), tiny().start, tiny().data, jax.random.key(3), steps=40, every=4, metrics=x_of)

    together, alone = jax.jit(jax.vmap(go)), jax.jit(go)
    carry, history = together(jnp.asarray(rates))
    own = carry.state.stages[1]
    assert own.frozen.tolist() == [False, False, True]
    assert carry.result.tolist() == [Result.SUCCESSFUL, Result.DIVERGED, Result.DIVERGED]
    assert float(own.scale[0]) == 1.0
    assert 2.0**-6 <= float(own.scale[1]) < 1.0
    assert float(own.scale[2]) == 2.0**-6
    assert np.isfinite(history["x"]).all()
    assert fine(flushed(jax.vmap(lambda c: c)(carry.state.vars)))
    for lane, rate in enumerate(rates):
        single, rows = alone(jnp.asarray(rate))
        check_same(jax.tree.map(lambda leaf, k=lane: leaf[k], carry.state.vars), single.state.vars, tol=1e-9)
        check_same(history["x"][lane], rows["x"], tol=1e-9)


def test_data_that_are_bad_use_up_the_halvings():
    """NaN in the data is not a matter of rates: every draw of that row is refused, until the solver is frozen."""
    solver = guard(halvable("saba", STEPS), halvings=2)
    carry, history = jax.jit(
        lambda d: run(solver, tiny_sampler(), tiny().start, d, jax.random.key(3), steps=60, every=1, metrics=x_of)
    )(poisoned(4))
    assert bool(frozen(carry.state))
    assert int(carry.result) == Result.NONFINITE
    assert float(carry.state.stages[1].scale) == 0.25
    assert int(carry.state.stages[1].accepted) < 60
    assert fine(flushed(carry.state))
    assert np.isfinite(history["x"]).all()


def test_halving_refuses_several_steps_with_a_table():
    """Where rows of a refused update would stay in the table for ever; whether the loop is in the stage or around it."""
    opts = lambda scale: Vars(inner=optax.sgd(3 * scale))
    several_steps = lambda scale, fresh: sweep(
        descend(implicit(tiny().problem), opts(scale), estimator=saga(), steps=3, fresh=fresh)
    )
    solvers_of = {
        3: partial(several_steps, fresh=True),
        1: partial(several_steps, fresh=False),
        2: lambda scale: several(halvable("saba", STEPS)(scale), 2),
    }
    for draws, make in solvers_of.items():
        with pytest.raises(ValueError, match=r"halvings: got a solver that takes several steps with a table in an update"):
            guard(make, halvings=20, limit=30.0).init(tiny().start, stream(draws)[0])
        guard(make(1.0), limit=30.0).init(tiny().start, stream(draws)[0])
    steps_without = lambda scale: sweep(descend(implicit(tiny().problem), opts(scale), steps=3))
    guard(steps_without, halvings=20).init(tiny().start, stream(3)[0])


def test_limit_stops_before_numbers_overflow():
    solver = guard(build("soba", tiny().problem, Vars(*(40 * step for step in STEPS))), limit=LIMIT)
    carry, _ = jax.jit(lambda key: run(solver, tiny_sampler(), tiny().start, tiny().data, key, steps=20))(jax.random.key(3))
    assert int(carry.result) == Result.DIVERGED
    assert bool(frozen(carry.state))
    assert not large(carry.state.vars, LIMIT)


@thinned("lanes", [0, 3], 0)
def test_halving_copies_no_table(lanes):
    """In the programs that users get, optimised."""
    make = lambda scale: solvers.saba(setting("short rows")[0], Vars(*(optax.sgd(scale * s) for s in STEPS)))
    text, shapes = scan_text(guard(make, halvings=5, limit=LIMIT), "short rows", lanes)
    check_no_copies(text, *shapes)


def test_no_guard_is_never_frozen():
    solver = build("soba", tiny().problem, WILD)
    state = solver.init(tiny_start("soba"), stream(1)[0])
    assert not bool(frozen(state))
    assert frozen(state).dtype == jnp.bool_


@pytest.mark.parametrize(
    ("make", "options", "error", "message"),
    [
        (halvable("soba", STEPS), {}, TypeError, "solver: got the function <lambda>, expected a Solver"),
        (solvers.saba, {}, TypeError, r"solver: got the function saba, expected a Solver .*did you mean saba\(...\)"),
        (None, {"halvings": 2}, TypeError, "solver: got Solver, expected, with halvings, a function"),
        (lambda scale: scale, {"halvings": 2}, TypeError, "solver: got .*, expected a Solver"),
        (halvable("soba", STEPS), {"halvings": -1}, ValueError, "halvings: got -1, expected at least 0"),
        (halvable("soba", STEPS), {"halvings": 101}, ValueError, "halvings: got 101, expected at most 100"),
        (halvable("soba", STEPS), {"halvings": 1.5}, TypeError, "halvings: got 1.5 of type float"),
        (None, {"limit": 0.0}, ValueError, "limit: got 0.0, expected a positive number"),
    ],
)
def test_bad_options_of_the_guard(make, options, error, message):
    with pytest.raises(error, match=message):
        guard(build("soba", tiny().problem) if make is None else make, **options)
