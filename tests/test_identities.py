"""Exact identities between solvers, estimators and stages, and the places where nothing may move."""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from bilevel_jax import Batch, Solver, Vars, descend, implicit, per_sweep, run, samplers, solvers, sweep
from bilevel_jax.estimators import ema, flush, page, plain, saga, sarah, storm, total
from bilevel_jax.samplers import take_draw
from bilevel_jax.testing import quadratic
from bilevel_jax.types import Table, Terms
from tests.checks import ZERO, check_same, hand, points, walk, whole
from tests.tables import (
    FIRST_ORDER,
    PERIOD,
    RATE,
    STEPS,
    WITH_V,
    aux_like,
    build,
    distance,
    donated_update,
    every_kind,
    kinds,
    stream,
    thinned,
    tiny,
    tiny_sampler,
)

OPTS = Vars(*map(optax.sgd, STEPS))
FINITE_DIFFERENCES = {"hjfbio", "fdehbo"}


#: name -> the ratios r = 1 - v / v* that its truncation leaves, one for every random length, given the inner curvature.
BIASED = {
    "stocbio": lambda a: [(1 - RATE * a) ** 3],
    "mrbo": lambda a: [(1 - RATE * a) ** 3],
    "vrbo": lambda a: [(1 - RATE * a) ** 3],
    "bsa": lambda a: [1 - 2 * RATE * a * (1 - RATE * a) ** p for p in range(2)],
    "ttsa": lambda a: [1 - 3 * RATE * a * (1 - RATE * a) ** p for p in range(3)],
    "sustain": lambda a: [1 - 2 * RATE * a * (1 - RATE * a) ** p for p in range(2)],
    "itd_bio": lambda a: [(1 - STEPS.inner * a) ** 2],
    "fo_itd_bio": lambda a: [1.0],
}


def jump(solver: Solver, start: Vars, batches: list[Batch]) -> list[Vars]:
    """The iterates of a solver, compiled: for what holds up to rounding."""
    update, state, iterates = jax.jit(solver.update), solver.init(start, batches[0]), []
    for batch in batches:
        state = update(state, batch)
        iterates.append(state.vars)
    return iterates


def with_estimator(estimator):
    return sweep(descend(implicit(tiny().problem), OPTS, estimator=estimator))


def on_full(batches: list[Batch]) -> list[Batch]:
    """The same number of updates, each on all the data."""
    full = samplers.full()
    return [full.stack(tiny().data, jax.tree.map(lambda leaf: leaf[None], hand(0, 0)))] * len(batches)


@cache
def soba_walk() -> list[Vars]:
    """What several identities are compared with."""
    return walk(solvers.soba(tiny().problem, OPTS), tiny().start, stream(1)[:3])


@cache
def full_walk() -> list[Vars]:
    return walk(with_estimator(plain()), tiny().start, on_full(stream(1)[:3]))


@pytest.mark.parametrize("one", [storm(1), storm(lambda t: 1.0), ema(1), ema(lambda t: 1.0)])
def test_weight_one_is_plain_exactly(one):
    check_same(walk(with_estimator(one), tiny().start, stream(1)[:3]), soba_walk())


def test_ma_soba_with_theta_one_is_soba_exactly():
    q = tiny()
    check_same(walk(solvers.ma_soba(q.problem, OPTS, theta=1.0), q.start, stream(1)[:3]), soba_walk())


def test_theta_may_be_a_schedule():
    q = tiny()
    pair = (solvers.ma_soba(q.problem, OPTS, theta=theta) for theta in (0.25, lambda t: 0.25))
    check_same(*(walk(solver, q.start, stream(1)[:3]) for solver in pair), tol=1e-15)


WEIGHTED = {
    "ma_soba": lambda weight: solvers.ma_soba(tiny().problem, OPTS, theta=weight),
    "ema": lambda weight: with_estimator(ema(weight)),
    "storm": lambda weight: with_estimator(storm(weight)),
    "sl_bamm": lambda weight: solvers.sl_bamm(tiny().problem, OPTS, weight=weight),
    "bda": lambda weight: solvers.bda(tiny().problem, OPTS._replace(aux=None), inner_steps=2, weight=weight),
    "stable": lambda weight: solvers.stable(tiny().problem, OPTS._replace(aux=None), strong_convexity=0.5, tau=weight),
}


@pytest.mark.parametrize(("beyond", "end"), [(3.0, 1.0), (-1.0, 0.0)])
@pytest.mark.parametrize("name", WEIGHTED)
def test_schedules_of_weights_are_clipped(name, beyond, end):
    """Beyond 1 they are 1, and below 0 they are 0, whether they return a number or an array."""
    draws = stream(1)[:2]
    at_the_end = walk(WEIGHTED[name](end), tiny().start, draws)
    for schedule in (lambda t: beyond, lambda t: beyond + 0.0 * t):
        check_same(walk(WEIGHTED[name](schedule), tiny().start, draws), at_the_end, tol=1e-15)


def test_ema_starts_at_the_first_direction_and_then_averages():
    """m_0 = D_0, m_t = m_{t-1} + theta_t (D_t - m_{t-1}), with a schedule that counts updates."""
    way, estimator = stateless(jnp.arange(1.0, 5.0)), ema(lambda t: 1.0 / (t + 1.0))
    state, found = estimator.init(way, Vars(inner=jnp.zeros(())), Batch(inner=ZERO)), []
    for t in range(4):
        mean, state = estimator.update(way, Vars(inner=jnp.zeros(())), Batch(inner=jnp.int32(t)), jnp.int32(t), state)
        found.append(float(mean.inner))
    np.testing.assert_allclose(found, [1.0, 1.5, 2.0, 2.5], rtol=1e-15)  # with 1/(t+1), the mean of all directions


def stateless(values):
    """An oracle that reads its direction off a table, whatever the variables are."""
    return lambda vars, batch: Terms(inner=Vars(inner=values[batch.inner]))


@pytest.mark.parametrize("always", [sarah(1), page(1), page(1.0)])
def test_refresh_at_every_update_is_full_batch_exactly(always):
    check_same(walk(with_estimator(always), tiny().start, stream(1)[:3]), full_walk())


def test_never_refreshing_is_the_first_full_direction_carried_on():
    """page(0) refreshes once; on full batches its differences telescope to the full direction."""
    check_same(walk(with_estimator(page(0.0)), tiny().start, on_full(stream(1)[:3])), full_walk(), tol=1e-14)


def test_saga_with_one_slot_is_full_batch():
    check_same(walk(with_estimator(saga()), tiny().start, on_full(stream(1)[:3])), full_walk(), tol=1e-14)


def test_saba_with_zero_outer_step_is_saga_on_the_inner_problem():
    q, still = tiny(), STEPS._replace(outer=0.0)
    inner_only = sweep(descend(implicit(q.problem), Vars(inner=OPTS.inner), estimator=saga()))
    both = walk(build("saba", q.problem, still), q.start, stream(1)[:6])
    alone = walk(inner_only, q.start, stream(1)[:6])
    check_same([v.inner for v in both], [v.inner for v in alone], tol=1e-15)
    check_same(both[-1].outer, q.start.outer)
    check_same(alone[-1].aux, q.start.aux)
    assert distance(both[-1].inner, both[-2].inner) > 1e-3


def test_saga_mean_is_the_mean_of_the_flushed_table():
    """After many steps on ragged blocks, with every index repeated at once, the pending row included."""
    q, update = tiny(), donated_update("saba")
    solver = build("saba", q.problem)
    make = jax.jit(lambda plan: tiny_sampler().stack(q.data, plan))
    state = solver.init(q.start, stream(1)[0])
    pairs = [(0, 0), (0, 0), (2, 3), (2, 1), (2, 1), (1, 2), (0, 2), (2, 3), (1, 0)]
    for i, j in pairs * 12:
        state = update(state, make(jax.tree.map(lambda leaf: leaf[None], hand(i, j))))
    estimator = state.stages[0].estimator
    stale = [distance(leaf.mean(0), mean) for leaf, mean in pair_up(estimator)]
    fresh = [distance(leaf.mean(0), mean) for leaf, mean in pair_up(flush(estimator))]
    assert max(fresh) < 1e-13
    assert max(stale) > 1e-9, "nothing was pending, so the test shows nothing"
    check_same(flush(flush(estimator)), flush(estimator))


def pair_up(state):
    return list(zip(jax.tree.leaves(state.table), jax.tree.leaves(state.mean), strict=True))


@pytest.mark.more
@pytest.mark.usefixtures("optimised")
def test_saga_in_float32_does_not_drift():
    """With a mean that is a plain sum SABA ends at 2e-4 of the start after these updates, and further out after more."""
    q = quadratic(jax.random.key(0))
    solver = solvers.saba(q.problem, Vars(*map(optax.sgd, (0.2, 0.2, 0.1))))
    go = jax.jit(partial(run, solver, samplers.uniform(1), steps=40_000, every=20_000, metrics=q.metrics))
    _, history = go(q.start, q.data, jax.random.key(1))
    assert history["gradient_norm"].dtype == jnp.float32
    assert (history["gradient_norm"][1:] < 2e-6 * history["gradient_norm"][0]).all()


def test_saga_table_holds_the_last_terms_of_every_block():
    q, solver = tiny(), build("saba", tiny().problem)
    seen, points_seen = {}, []
    state = solver.init(q.start, stream(1)[0])
    update = donated_update("saba")
    for batch in stream(1):
        points_seen.append(jax.tree.map(np.asarray, state.vars))
        seen[int(batch.slot.inner.index[0])] = len(points_seen) - 1
        state = update(state, batch)
    table = flush(state.stages[0].estimator).table.rows
    terms = jax.jit(implicit(q.problem).terms)
    assert len(seen) == 3
    for block, t in seen.items():
        new = terms(jax.tree.map(jnp.asarray, points_seen[t]), take_draw(stream(1)[t], 0), ZERO)
        row = np.concatenate([np.ravel(leaf[block]) for leaf in jax.tree.leaves(table.inner)])
        np.testing.assert_allclose(row, np.concatenate([np.ravel(leaf) for leaf in new.inner]), rtol=1e-14)


def test_saga_is_unbiased_whatever_the_table_holds():
    """The mean over all (i, j) is the full direction, on blocks of 3, 3, 1 and 2, 2, 2, 1 rows."""
    q, estimator, oracle = tiny(), saga(), implicit(tiny().problem)
    point, rng = points(q)[0], np.random.default_rng(2)

    def bound(vars, batch):
        return oracle.terms(vars, batch, ZERO)

    first = tiny_sampler().gather(q.data, hand(0, 0))
    state = jax.tree.map(lambda leaf: leaf + rng.normal(size=leaf.shape), estimator.init(bound, point, first)._replace(slot=()))
    state = state._replace(slot=(jnp.int32(1), jnp.int32(3)))
    state = state._replace(mean=jax.tree.map(lambda leaf: leaf.mean(0), flush(state).table.rows))
    assert isinstance(state.table, Table)

    @jax.jit
    def way(plan):
        return estimator.update(bound, point, tiny_sampler().gather(q.data, plan), ZERO, state)[0]

    every = [way(hand(i, j)) for i in range(3) for j in range(4)]
    mean = Vars(*(sum(parts[1:], parts[0]) / 12 for parts in zip(*every, strict=True)))
    assert distance(mean, total(bound(point, whole(q)))) < 1e-13
    assert distance(every[0], mean) > 1e-3


def full_updates(name: str, count: int) -> list[Vars]:
    """The iterates from the solution, on full batches."""
    q, solver = tiny(), build(name, tiny().problem)
    update = jax.jit(solver.update, donate_argnums=0)
    batches = samplers.full().batches(q.data, jax.random.key(2), 0, solver.draws)
    state, iterates = solver.init(q.solution, batches), []
    for _ in range(count):
        state = update(state, batches)
        iterates.append(jax.tree.map(np.asarray, state.vars))
    assert int(state.step) == count
    return iterates


@kinds(
    *BIASED, "pzobo", *(set(FIRST_ORDER) - FINITE_DIFFERENCES)
)  # penalties have solutions of their own: see test_first_order
def test_start_at_the_solution_does_not_move_on_full_batches(name):
    assert distance(full_updates(name, 2 * PERIOD + 1)[-1], tiny().solution) < 1e-12


@thinned("name", BIASED, "bsa", "vrbo", "itd_bio")
def test_start_at_the_solution_moves_by_the_bias(name):
    """A truncated v is (1 - r) v*, with an r of the solver, and x moves away by its step times r v*; z is solved for."""
    moved, (z, v, x) = full_updates(name, 1)[0], tiny().solution
    found = (moved.outer - x) / (STEPS.outer * v)
    assert min(abs(found - ratio) for ratio in BIASED[name](float(tiny().data.inner[0].mean()))) < 1e-12
    assert abs(found) > 1e-2
    if name != "vrbo":  # which moves z at the new x
        assert distance(moved.inner, z) < 1e-13


@every_kind
def test_where_aux_starts(name):
    """v starts at zeros like z, a second inner iterate at z."""
    q, solver = tiny(), build(name, tiny().problem)
    batches = stream(solver.draws)[0]
    expected = aux_like(name, q.start.inner) if name in set(FIRST_ORDER) - WITH_V else jnp.zeros_like(q.start.inner)
    check_same(solver.init(q.start._replace(aux=None), batches), solver.init(q.start._replace(aux=expected), batches))


def split(batches: list[Batch], draws: int) -> list[Batch]:
    """Batches of ``draws`` draws, one draw at a time."""
    return [take_draw(b, slice(k, k + 1)) for b in batches for k in range(draws)]


def test_stage_of_three_steps_is_three_sweeps():
    """On fresh draws; the estimator and the optimiser count steps, not sweeps."""
    q = tiny()
    opts = Vars(inner=optax.sgd(lambda t: 0.3 / (t + 1.0)))
    make = partial(descend, implicit(q.problem), opts, estimator=storm(lambda t: 1.0 / (t + 1.0)))
    together = jump(sweep(make(steps=3)), q.start, stream(3)[:3])
    apart = jump(sweep(make()), q.start, split(stream(3)[:3], 3))
    check_same(together, apart[2::3], tol=1e-14)


def test_stale_stage_takes_all_its_steps_on_one_draw():
    q = tiny()
    stage = descend(implicit(q.problem), OPTS, steps=3, fresh=False)
    assert (stage.draws, stage.cost.draw.inner_gradient) == (1, 3.0)
    together = jump(sweep(stage), q.start, stream(1)[:3])
    apart = jump(sweep(descend(implicit(q.problem), OPTS)), q.start, [b for b in stream(1)[:3] for _ in range(3)])
    check_same(together, apart[2::3], tol=1e-14)


def test_per_sweep_counts_sweeps():
    """With it the three steps of a sweep have one size; a constant passes through."""
    q = tiny()
    rate = per_sweep(lambda t: 0.3 / (t + 1.0), 3)
    assert callable(rate)
    np.testing.assert_allclose([rate(k) for k in range(7)], [0.3] * 3 + [0.15] * 3 + [0.1])
    assert per_sweep(0.25, 3) == 0.25
    together = jump(sweep(descend(implicit(q.problem), Vars(inner=optax.sgd(rate)), steps=3)), q.start, stream(3)[:2])
    vars, apart = q.start, []
    for step, batch in zip((0.3, 0.15), stream(3)[:2], strict=True):
        vars = jump(sweep(descend(implicit(q.problem), Vars(inner=optax.sgd(step)))), vars, split([batch], 3))[-1]
        apart.append(vars)
    check_same(together, apart, tol=1e-14)


def test_sweep_is_gauss_seidel():
    """FSLA's v sees the new z, and its x the new z and v; SOBA's see the old ones."""
    q = tiny()
    terms = jax.jit(implicit(q.problem).terms)
    batches = stream(3)[0]
    first, second, third = (take_draw(batches, k) for k in range(3))
    a, b, c = STEPS
    z, v, x = points(q)[0]
    new_z = z - a * terms(Vars(z, v, x), first, ZERO).inner.inner
    new_v = v - b * total(terms(Vars(new_z, v, x), second, ZERO)).aux
    new_x = x - c * total(terms(Vars(new_z, new_v, x), third, ZERO)).outer
    moved = walk(build("fsla", q.problem), points(q)[0], [batches])[0]
    check_same(moved, Vars(new_z, new_v, new_x), tol=1e-14)

    one = stream(1)[0]
    way = total(terms(Vars(z, v, x), take_draw(one, 0), ZERO))
    moved = walk(build("soba", q.problem), points(q)[0], [one])[0]
    check_same(moved, Vars(z - a * way.inner, v - b * way.aux, x - c * way.outer), tol=1e-14)


def test_stages_take_draws_of_their_own():
    """The draws are shared out in order, and changing one moves one stage only."""
    q, solver = tiny(), build("fsla", tiny().problem)
    batches, other = stream(3)[:2]
    base = walk(solver, q.start, [batches])[0]
    for k, touched in enumerate(["inner", "aux", "outer"]):
        mixed = jax.tree.map(lambda u, w, k=k: u.at[k].set(w[k]), *(b._replace(full=None) for b in (batches, other)))
        moved = walk(solver, q.start, [mixed._replace(full=batches.full)])[0]
        gaps = [distance(u, w) for u, w in zip(base, moved, strict=True)]
        assert gaps[k] > 1e-6, touched
        assert max(gaps[:k], default=0.0) == 0, touched
