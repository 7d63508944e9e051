"""The virtual clock: who answers when, the rules of the master, failures; and that numerics and counters follow it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bilevel_jax import Levels, Problem, Result, Vars, samplers
from bilevel_jax.distributed import adbo, simulate
from bilevel_jax.distributed.simulate import Cluster, Failure, constant, log_normal, pareto, schedule

N = 5
TOY = Problem(lambda z, x, b: ((z - x - b) ** 2).sum() / 2, lambda z, x, a: ((z - a) ** 2).sum() / 2)
RATES = adbo.Rates(0.02, 0.02, 0.02, 0.02, 0.1, 0.05, 0.3, 0.05, 0.3)
RANDOM = Cluster(log_normal(1.0), compute=0.1)
go = jax.jit(simulate.simulate, static_argnums=(0, 1), static_argnames="metrics")


def make(**own):
    return adbo.adbo(
        TOY, Vars(np.zeros(2), None, np.zeros(2)), RATES, **{"n_workers": N, "cut_period": 10, "max_cuts": 8} | own
    )


@pytest.fixture(scope="module")
def method():
    return make()


@pytest.fixture(scope="module")
def data():
    A, B = np.random.default_rng(0).normal(size=(2, N, 2))
    return Levels(jnp.asarray(B), jnp.asarray(A))


def test_quorum_and_staleness(method):
    plan = schedule(RANDOM, method, steps=400, quorum=2, max_staleness=6)
    active, worked = np.asarray(plan.active), np.asarray(plan.worked)
    assert (active.sum(1) >= 2).all()
    assert (worked <= active).all()
    assert (np.diff(plan.seconds) >= 0).all()
    # ages from the answers alone: they start at 1, an answer makes them 0, an iteration adds 1
    age = np.ones(N, int)
    for t in range(400):
        np.testing.assert_array_equal(plan.age[t], age)
        age[active[t]] = 0
        assert age.max() < 6
        age += 1
        if (t + 1) % 10 == 0:
            drained = plan.drained[t // 10]
            np.testing.assert_array_equal(drained, ~active[t])  # all that the master had not heard come in before the cut
            age[drained] = 0
    assert plan.age.max() == 6  # the bound is met: with 5 workers and 2 awaited some wait long


def test_without_cuts_the_largest_age_is_the_bound_and_a_silent_worker_blocks():
    method = make(last_cut=0)
    plan = schedule(
        Cluster(constant(1.0), slowdown=simulate.stragglers(N, 1, 50.0)), method, steps=200, quorum=2, max_staleness=7
    )
    assert plan.age.max() == 7
    assert (plan.age[:, :4] < 7).all()  # it is the straggler
    dead = Cluster(constant(1.0), failures=(Failure(3, 10.5),))
    cut_short = schedule(dead, method, steps=200, quorum=2, max_staleness=7)
    assert cut_short.blocked == 3
    assert len(cut_short.seconds) == 20
    assert cut_short.age.max() <= 7
    assert schedule(dead, method, steps=200, quorum=2, max_staleness=7, on_lost="evict").blocked == -1


def test_ties_go_by_the_index_of_the_worker(method):
    plan = schedule(Cluster(constant(1.0)), method, steps=10, quorum=2, max_staleness=99)
    assert plan.active[:3].tolist() == [
        [True, True, False, False, False],
        [False, False, True, True, False],
        [True, False, False, False, True],
    ]
    assert plan.seconds[:3].tolist() == [1, 1, 2]


def test_delays_are_functions_of_seed_worker_and_number():
    few, many = (simulate.barriers(RANDOM, N, rounds, seed=3) for rounds in (10, 1000))
    np.testing.assert_array_equal(few, many[:10])
    more = simulate.durations(RANDOM, N + 1, 10, 3, 0)
    np.testing.assert_array_equal(more[:N], simulate.durations(RANDOM, N, 10, 3, 0))
    assert (simulate.barriers(RANDOM, N, 10, seed=4) != few).all()
    slow = Cluster(log_normal(1.0), 0.1, slowdown=4.0)
    np.testing.assert_allclose(simulate.barriers(slow, N, 10, seed=3), 4 * few)
    # the published delays: median 30 ms, mean 49.5; the mean wait for the slowest of 18, 217 ms
    delays = simulate.durations(Cluster(log_normal(0.03)), 18, 20_000, 0, 0)
    assert abs(np.median(delays) - 0.030) < 0.0005
    assert abs(delays.max(0).mean() - 0.217) < 0.004
    assert abs(np.sort(delays, 0)[8].mean() - 0.029) < 0.001
    tail = simulate.durations(Cluster(pareto(1.0, 1.5)), 2, 100_000, 0, 0)
    assert tail.min() >= 1
    assert abs((tail > 10).mean() - 10**-1.5) < 2e-3


def test_one_seed_one_history_bit_for_bit(method, data):
    def once(seed):
        plan = schedule(RANDOM, method, steps=100, quorum=2, max_staleness=6, seed=seed)
        return go(method, samplers.full(), plan, data, jax.random.key(0), metrics=lambda vars, data: {"vars": vars})

    a, b, c = once(0), once(0), once(1)
    for left, right in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(left, right)
    assert (a[1]["seconds"][1:] != c[1]["seconds"][1:]).all()
    assert jnp.abs(a[0].consensus_outer - c[0].consensus_outer).max() > 1e-6


def test_a_worker_that_is_restored_is_merely_late(method, data):
    """Lost with an answer under way and back later: the run is that in which this answer took so long."""
    lost = Cluster(constant(1.0), failures=(Failure(1, 3.5, 9.25),))
    plan = schedule(lost, method, steps=40, quorum=2, max_staleness=8)
    undisturbed = schedule(Cluster(constant(1.0)), method, steps=40, quorum=2, max_staleness=8)
    gone = (plan.seconds > 3.5) & (plan.seconds < 10.25)  # it comes back at 9.25, and takes a second
    assert gone.any()
    assert not plan.worked[gone, 1].any()
    assert undisturbed.worked[(undisturbed.seconds > 3.5) & (undisturbed.seconds < 10.25), 1].any()
    assert plan.age.max() <= 8
    synchronous = [
        go(method, samplers.full(), schedule(c, method, steps=40, quorum=N, max_staleness=8), data, jax.random.key(0))[0]
        for c in (lost, Cluster(constant(1.0)))
    ]
    for a, b in zip(*map(jax.tree.leaves, synchronous), strict=True):
        np.testing.assert_array_equal(a, b)
    for failures in ((Failure(9, 1.0),), (Failure(1, 3.0, 4.0), Failure(1, 2.5, 20.0)), (Failure(0, 2.0, 1.0),)):
        with pytest.raises(ValueError, match=r"cluster\.failures: got Failure\(worker="):
            schedule(Cluster(constant(1.0), failures=failures), method, steps=10, quorum=2, max_staleness=8)


def test_loss_in_a_cut_phase(method):
    plain = schedule(Cluster(constant(1.0)), method, steps=10, quorum=N, max_staleness=8)
    assert plain.period_seconds.tolist() == [12]  # ten iterations, two rounds
    for at in (10.5, 11.5):
        late = schedule(Cluster(constant(1.0), failures=(Failure(0, at, 20.0),)), method, steps=10, quorum=N, max_staleness=8)
        assert late.period_seconds.tolist() == [22.0 if at < 11 else 21.0]
        never = Cluster(constant(1.0), failures=(Failure(0, at),))
        assert schedule(never, method, steps=10, quorum=N, max_staleness=8).blocked == 0
        gone = schedule(never, method, steps=20, quorum=N, max_staleness=8, on_lost="evict")
        assert gone.present.sum(1).tolist() == [4, 4]
        assert gone.alive[10:].sum(1).tolist() == [4] * 10


def test_eviction_freezes_the_worker_and_the_others_go_on(method, data):
    plan = schedule(
        Cluster(log_normal(1.0), failures=(Failure(2, 5.0), Failure(4, 30.0))),
        method,
        steps=200,
        quorum=4,
        max_staleness=6,
        on_lost="evict",
    )
    assert plan.blocked == -1
    assert plan.alive[-1].tolist() == [True, True, False, True, False]
    assert not plan.active[plan.seconds > 30.0][:, [2, 4]].any()
    master, history = go(method, samplers.full(), plan, data, jax.random.key(0))
    assert int(history["result"].max()) == Result.SUCCESSFUL
    assert master.alive.tolist() == [True, True, False, True, False]
    everyone = schedule(Cluster(log_normal(1.0), failures=tuple(Failure(i, 1.0) for i in range(N))), method, steps=10, quorum=1,
                        max_staleness=6, on_lost="evict")  # fmt: skip
    assert len(everyone.seconds) == 0
    assert everyone.blocked == N


def test_numbers_sent_are_those_counted_by_hand(data):
    """Two workers, one round, one cut in twenty iterations, all answers awaited."""
    method = make(n_workers=2, last_cut=11)
    pair = jax.tree.map(lambda leaf: leaf[:2], data)
    plan = schedule(Cluster(constant(1.0)), method, steps=20, quorum=2, max_staleness=3)
    _, history = go(method, samplers.full(), plan, pair, jax.random.key(0))
    assert history["made"].tolist() == [0, 1, 1]
    sent = simulate.traffic(method, plan, history["made"])
    n = m = 2
    answers, replies = 2 * 10 * (n + m), 2 * 10 * (n + 8)
    assert sent.up.tolist() == [answers + 2 * (m + m + n), 2 * answers + 2 * (m + m + n)]
    assert sent.down.tolist() == [replies + 2 * (n + 3 * m + 8 + m), 2 * replies + 2 * (n + 3 * m + 8 + m)]


def test_minibatches_of_a_worker_are_numbered_by_what_it_received():
    rows = np.random.default_rng(0).normal(size=(N, 12, 2))
    problem = Problem(lambda z, x, b: (((z - x)[None] - b) ** 2).sum(1), lambda z, x, a: ((z[None] - a) ** 2).sum(1))
    method = adbo.adbo(problem, Vars(np.zeros(2), None, np.zeros(2)), RATES, n_workers=N, cut_period=5, last_cut=0)
    data, key, sampler = Levels(jnp.asarray(rows), jnp.asarray(rows)), jax.random.key(7), samplers.uniform(4)
    plan = schedule(RANDOM, method, steps=5, quorum=2, max_staleness=6)
    master, _ = go(method, sampler, plan, data, key)
    draw, work = jax.jit(lambda own, key, t: samplers.take_draw(sampler.batches(own, key, t, 1), 0)), jax.jit(method.work)
    for i in range(N):  # without consensus and cuts worker i is plain stochastic gradient descent
        worker, received = jax.tree.map(lambda leaf, i=i: leaf[i], adbo.workers(method.init())), 0
        for t in np.flatnonzero(plan.worked[:, i]):
            own = jax.tree.map(lambda leaf, i=i: leaf[i], data)
            worker, received = work(worker, draw(own, jax.random.fold_in(key, i), jnp.int32(received))), t + 1
        np.testing.assert_allclose(master.inner[i], worker.inner, rtol=1e-12)


@pytest.mark.more
def test_the_loops_over_workers_agree(method, data):
    plan = schedule(RANDOM, method, steps=40, quorum=2, max_staleness=6)
    loops = jax.jit(simulate.simulate, static_argnums=(0, 1), static_argnames="loop")
    ends = [loops(method, samplers.full(), plan, data, jax.random.key(0), loop=loop)[0] for loop in ("vmap", "scan")]
    for a, b in zip(*map(jax.tree.leaves, ends), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-14)
    with pytest.raises(ValueError, match="loop: got 'fast'"):
        simulate.simulate(method, samplers.full(), plan, data, jax.random.key(0), loop="fast")


def test_a_nonfinite_worker_shows_as_a_code(method, data):
    plan = schedule(RANDOM, method, steps=20, quorum=2, max_staleness=6)
    bad = data._replace(outer=data.outer.at[0].set(jnp.nan))
    _, history = go(method, samplers.full(), plan, bad, jax.random.key(0))
    assert history["result"][0] == Result.SUCCESSFUL
    assert history["result"][-1] == Result.NONFINITE
    bad = data._replace(inner=data.inner.at[0].set(jnp.nan))  # of which no variable hears: the gap does
    master, history = go(method, samplers.full(), plan, bad, jax.random.key(0))
    assert history["result"].tolist() == [0, Result.NONFINITE, Result.NONFINITE]
    assert jnp.isfinite(master.estimate_multiplier).all()


def test_bad_input_is_refused(method, data):
    ask = {"steps": 10, "quorum": 2, "max_staleness": 3}
    for change, message in (
        ({"quorum": 6}, "quorum: got 6, expected at most n_workers = 5"),
        ({"quorum": 0}, "quorum: got 0"),
        ({"max_staleness": 0}, "max_staleness: got 0, expected at least 1"),
        ({"steps": 11}, "steps: got 11, expected a multiple of the method's cut_period = 10"),
        ({"on_lost": "pray"}, "on_lost: got 'pray'"),
    ):
        with pytest.raises(ValueError, match=message):
            schedule(RANDOM, method, **ask | change)
    for cluster, message in (
        (RANDOM._replace(slowdown=np.ones(3)), r"cluster\.slowdown: got the shape \(3,\)"),
        (RANDOM._replace(slowdown=0.0), r"cluster\.slowdown: got 0\.0"),
        (RANDOM._replace(compute=-1.0), r"cluster\.compute: got -1\.0"),
    ):
        with pytest.raises(ValueError, match=message):
            schedule(cluster, method, **ask)
    with pytest.raises(ValueError, match="count: got 6 stragglers"):
        simulate.stragglers(5, 6, 2.0)
    plan = schedule(RANDOM, method, **ask)
    fewer = jax.tree.map(lambda leaf: leaf[:3], data)
    with pytest.raises(ValueError, match=r"data\.inner: got the shape \(3, 2\), expected a leading axis of length 5"):
        simulate.simulate(method, samplers.full(), plan, fewer, jax.random.key(0))
    empty = data._replace(inner=jnp.zeros((N, 0, 2)))
    with pytest.raises(ValueError, match=r"data\.inner: got workers without samples"):
        simulate.simulate(method, samplers.full(), plan, empty, jax.random.key(0))
