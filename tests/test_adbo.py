"""ADBO: the cuts are what they claim to be, the updates those of the paper, in float64."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize

from bilevel_jax import Batch, Levels, Problem, Vars, samplers
from bilevel_jax.distributed import adbo, simulate
from bilevel_jax.distributed.adbo import Rates
from bilevel_jax.distributed.cuts import drop_idle
from bilevel_jax.distributed.cuts import values as cut_values
from tests.tables import thinned

N, n, m = 4, 2, 3
RATES = Rates(0.02, 0.03, 0.04, 0.05, 0.1, 0.06, 0.2, 0.07, 0.3)
PENALTY, TOLERANCE = 0.7, 1e-5


def smooth(z, x, data):  # not quadratic: third derivatives count
    W, b = data
    return (jnp.log(jnp.cosh(W @ z - jnp.concatenate([x, x[:1]]) - b)) ** 2).sum() + 0.1 * (z**2).sum()


PROBLEM = Problem(inner=smooth, outer=lambda z, x, a: ((z - a) ** 2).sum() / 2 + 0.3 * x @ z[:2])
START = Vars(inner=np.zeros(m), outer=np.zeros(n))


@pytest.fixture(scope="module")
def data():
    random = np.random.default_rng(0)
    W, b, a = random.normal(size=(N, 3, m)), random.normal(size=(N, 3)), random.normal(size=(N, m))
    return Levels((jnp.asarray(W), jnp.asarray(b)), jnp.asarray(a))


@pytest.fixture(scope="module")
def master():
    """A point that is nothing special."""
    random = np.random.default_rng(1)
    made = make(max_cuts=3).init()
    return made._replace(
        consensus_outer=jnp.asarray(random.normal(size=n)),
        consensus_inner=jnp.asarray(random.normal(size=m)),
        outer=jnp.asarray(random.normal(size=(N, n))),
        inner=jnp.asarray(random.normal(size=(N, m))),
        consensus_multiplier=jnp.asarray(random.normal(size=(N, n))),
        estimate_multiplier=jnp.asarray(random.normal(size=(N, m))),
    )


def make(**own):
    own = {"n_workers": N, "penalty": PENALTY, "cut_tolerance": TOLERANCE, "max_cuts": 3, "cut_period": 4} | own
    return adbo.adbo(own.pop("problem", PROBLEM), START, RATES, **own)


def at(master):
    return cut_values(master.cuts, master.consensus_outer, master.consensus_inner, master.inner, master.alive)


def cut(method, master, data):
    return method.cut(master, *adbo.rounds(method, master, Batch(data.inner, data.outer)))


def gap(point, master, data, *, rounds, newest=False, warm=False, anchor=None, alive=None):
    """The gap as published, with the model of g_i of first order around ``anchor``; where it starts is constant."""
    x, inner, consensus = point
    anchor = master.consensus_outer if anchor is None else anchor
    alive = jnp.ones(N) if alive is None else alive
    e, c = master.inner, master.consensus_inner
    y = master.estimate_multiplier if warm else jnp.zeros((N, m))

    def slope(z, data):
        return jax.jvp(lambda x: jax.grad(smooth)(z, x, data), (anchor,), (x - anchor,))  # value and first-order change

    for _ in range(rounds):
        value, change = jax.vmap(slope)(e, data.inner)
        new = e - RATES.estimate_inner * (value + change + y + PENALTY * (e - c[None]))
        used = new if newest else e
        c = c - RATES.estimate_consensus * (alive[:, None] * (PENALTY * (c[None] - used) - y)).sum(0)
        y = y + RATES.estimate_multiplier * (new - c[None])
        e = new
    return (alive[:, None] * (inner - e) ** 2).sum() + ((consensus - c) ** 2).sum()


@thinned(
    ("rounds", "newest", "warm"), [(1, False, False), (1, True, False), (3, False, True), (3, True, False)], (3, False, True)
)
def test_a_cut_is_the_linearisation_of_the_gap(rounds, newest, warm, master, data):
    made = cut(make(estimate_rounds=rounds, newest=newest, warm_start=warm), master, data)
    point = master.consensus_outer, master.inner, master.consensus_inner
    value, (outer, inner, consensus) = jax.value_and_grad(gap)(point, master, data, rounds=rounds, newest=newest, warm=warm)
    close = partial(np.testing.assert_allclose, rtol=1e-11, atol=1e-13)
    close(made.inner_gap, value)
    close(made.cuts.outer[0], outer)
    close(made.cuts.inner[:, 0], inner)
    close(made.cuts.consensus[0], consensus)
    assert made.cuts.live.tolist() == [True, False, False]
    assert int(made.made) == 1
    # at its own point the cut is the gap above the tolerance: it cuts the point off
    close(at(made)[0], value - TOLERANCE)
    if not warm and not newest and rounds == 1:  # one product a worker; exact only where the consensus uses the round before
        short = (
            -2
            * RATES.estimate_inner
            * jax.vmap(lambda z, r, d: jax.vjp(lambda x: jax.grad(smooth)(z, x, d), master.consensus_outer)[1](r)[0])(
                master.inner, -(inner / 2), data.inner
            ).sum(0)
        )
        close(made.cuts.outer[0], short)
        other = cut(make(newest=True), master, data)
        assert jnp.abs(other.cuts.outer[0] - short).max() > 1e-4


def test_with_one_round_no_point_within_the_tolerance_violates_the_cut(master, data):
    made = cut(make(), master, data)
    value = jax.jit(partial(gap, master=master, data=data, rounds=1))
    slope = jax.jit(jax.grad(lambda rest, x: value((x, *rest))))
    point = master.consensus_outer, master.inner, master.consensus_inner
    hessian = jax.jit(jax.hessian(lambda flat: value((flat[:n], flat[n:-m].reshape(N, m), flat[-m:]))))(
        jnp.concatenate([part.ravel() for part in point])
    )
    assert jnp.linalg.eigvalsh(hessian).min() > -1e-12
    random = np.random.default_rng(2)
    for scale in np.geomspace(1e-3, 1, 30):  # around points where the gap vanishes
        x = point[0] + scale * random.normal(size=n)
        zero = slope((master.inner, master.consensus_inner), x)
        near = (x, master.inner - zero[0] / 2, master.consensus_inner - zero[1] / 2)
        assert value(near) < 1e-20
        moved = master._replace(consensus_outer=near[0], inner=near[1], consensus_inner=near[2], cuts=made.cuts)
        assert at(moved)[0] <= -TOLERANCE + 1e-12


@pytest.mark.more
def test_the_optimal_value_over_the_cuts_does_not_fall_as_cuts_are_added(master, data):
    """The squared distance to the first point, over the polyhedra, by scipy; no cut is dropped."""
    method, lowest = make(max_cuts=5), []
    held = method.init()._replace(**{k: v for k, v in master._asdict().items() if k not in ("cuts", "received")})
    here = np.concatenate([held.consensus_outer, held.inner.ravel(), held.consensus_inner])
    active = jnp.ones(N, bool)

    for _ in range(5):
        held = method.update(cut(method, held, data), active)
        cuts = held.cuts
        matrix = np.concatenate([cuts.outer, np.swapaxes(cuts.inner, 0, 1).reshape(5, -1), cuts.consensus], 1)[cuts.live]
        room = -(cuts.offset + cuts.share.sum(0))[cuts.live]
        below = {"type": "ineq", "fun": lambda p, a=matrix, b=room: b - a @ p, "jac": lambda p, a=matrix: -a}
        found = scipy.optimize.minimize(
            lambda p: ((p - here) ** 2).sum(), here, constraints=below, method="SLSQP", options={"ftol": 1e-12, "maxiter": 500}
        )
        assert found.success
        lowest.append(found.fun)
        moved = jax.vmap(method.work)(adbo.workers(held), Batch(data.inner, data.outer))
        held = adbo.record(held, moved.outer, moved.inner, active)
    assert held.cuts.live.all()
    assert lowest[0] > 1e-6  # it is cut off
    assert np.diff(lowest).min() > -1e-9
    assert lowest[-1] > lowest[0]


def test_from_zero_multipliers_the_gap_vanishes_at_the_penalised_solution_for_one_round_only(data):
    """The bias: at K = 1 the constraint asks for the penalised solution, not for consensus."""
    linear = Problem(lambda z, x, b: ((z - jnp.concatenate([x, x[:1]]) - b) ** 2).sum() / 2, PROBLEM.outer)
    shift, x = data.outer, jnp.zeros(n)
    consensus = shift.mean(0)
    inner = (shift + PENALTY * consensus[None]) / (1 + PENALTY)
    assert jnp.abs((inner - consensus[None]).sum(0)).max() < 1e-14
    gaps = []
    for rounds in (1, 2):
        method = make(problem=linear, estimate_rounds=rounds)
        at = method.init()._replace(consensus_inner=consensus, inner=inner, consensus_outer=x)
        gaps.append(float(method.cut(at, *adbo.rounds(method, at, Batch(shift, data.outer))).inner_gap))
    assert gaps[0] < 1e-28
    assert gaps[1] > 1e-4


def test_cuts_go_after_two_zeros_and_are_refused_when_there_is_no_room(master, data):
    method = make(max_cuts=2)
    held = method.init()._replace(**{k: v for k, v in master._asdict().items() if k not in ("cuts", "received")})
    held = cut(method, held, data)
    active = jnp.ones(N, bool)
    assert float(held.cuts.multiplier[0]) == 0.0  # a new one starts at 0, and is violated: it rises
    held = method.update(held, active)
    assert float(held.cuts.multiplier[0]) > 0
    one_zero = held.cuts._replace(multiplier=jnp.zeros(2), before=jnp.array([0.5, 0.0]))
    assert drop_idle(one_zero).live.tolist() == [True, False]
    two_zeros = one_zero._replace(before=jnp.zeros(2))
    assert drop_idle(two_zeros).live.tolist() == [False, False]
    assert all(not jnp.any(leaf) for leaf in jax.tree.leaves(drop_idle(two_zeros)))
    held = method.update(cut(method, held, data), active)
    assert held.cuts.live.all()
    full = cut(method, held, data)
    assert (int(full.made), int(full.refused)) == (2, 1)
    np.testing.assert_array_equal(full.cuts.outer, held.cuts.outer)
    # below the tolerance nothing is added
    calm = cut(make(max_cuts=2, cut_tolerance=1e3), held, data)
    assert (int(calm.made), int(calm.refused)) == (2, 0)


def test_only_the_active_move_and_nothing_inner_without_a_cut(master, data):
    method = make()
    active = jnp.array([True, False, True, False])
    workers = jax.vmap(method.work)(adbo.workers(master), Batch(data.inner, data.outer))
    taken = adbo.record(master, workers.outer, workers.inner, active)
    after = method.update(taken, active)
    for before, now in (
        (master.outer, after.outer),
        (master.inner, after.inner),
        (master.consensus_multiplier, after.consensus_multiplier),
    ):
        assert (before == now).all(1).tolist() == [False, True, False, True]
    assert after.received_at.tolist() == [1, 0, 1, 0]
    np.testing.assert_array_equal(after.consensus_inner, master.consensus_inner)
    assert (after.consensus_outer != master.consensus_outer).all()


def test_eviction_is_the_problem_of_the_others(master, data):
    """Sums over the workers that are left; the cut made after it is the linearisation of their gap."""
    method, who = make(estimate_rounds=2), jnp.array([False, True, False, False])
    gone = adbo.evict(master, who)
    bad = jax.tree.map(lambda leaf: leaf.at[1].set(jnp.nan), data)
    made = cut(method, gone, bad)
    point = master.consensus_outer, master.inner, master.consensus_inner
    value, slopes = jax.value_and_grad(gap)(point, master, data, rounds=2, alive=(~who).astype(float))
    np.testing.assert_allclose(made.inner_gap, value, rtol=1e-11)
    np.testing.assert_allclose(made.cuts.outer[0], slopes[0], rtol=1e-10)
    np.testing.assert_allclose(at(made)[0], value - TOLERANCE, rtol=1e-10)
    after = method.update(made, ~who)
    expected = master.consensus_outer + RATES.consensus_outer * master.consensus_multiplier[jnp.array([0, 2, 3])].sum(0)
    np.testing.assert_allclose(after.consensus_outer, expected, rtol=1e-12)


# A plain sequential reference, S = N, K = 1: NumPy, on a problem whose derivatives are written down.


def reference(W, b, A, steps, period, last_cut, damping=(0.04, 0.002)):
    r = RATES
    z, x, v, c = np.zeros((N, m)), np.zeros((N, n)), np.zeros(n), np.zeros(m)
    theta, cuts, gaps = np.zeros((N, n)), [], []
    pad = np.vstack([np.eye(n), np.eye(n)[:1]])  # x -> (x_1, x_2, x_1)
    for t in range(steps):
        sent = [(k["lam"], k["inner"].copy()) for k in cuts]
        for i in range(N):
            dz = z[i] - A[i] + 0.3 * np.append(x[i], 0.0)
            dx = 0.3 * z[i, :2]
            dz = dz + sum((lam * inner[i] for lam, inner in sent), np.zeros(m))
            x[i], z[i] = x[i] - r.outer * (dx + theta[i]), z[i] - r.inner * dz
        v = v - r.consensus_outer * (sum((k["lam"] * k["outer"] for k in cuts), np.zeros(n)) - theta.sum(0))
        c = c - r.consensus_inner * sum((k["lam"] * k["consensus"] for k in cuts), np.zeros(m))
        for k in cuts:
            value = k["outer"] @ v + (k["inner"] * z).sum() + k["consensus"] @ c + k["offset"]
            k["before"], k["lam"] = k["lam"], max(0.0, k["lam"] + r.cut * (value - damping[0] * k["lam"]))
        theta = theta + r.consensus * (x - v - damping[1] * theta)
        if (t + 1) % period == 0 and t + 1 < last_cut:
            cuts = [k for k in cuts if k["lam"] > 0 or k["before"] > 0]
            slope = np.stack([W[i].T @ (W[i] @ z[i] - pad @ v - b[i]) for i in range(N)])
            estimate = z - r.estimate_inner * (slope + PENALTY * (z - c))
            consensus = c - r.estimate_consensus * (PENALTY * (c - z)).sum(0)
            rz, rc = z - estimate, c - consensus
            h = (rz**2).sum() + (rc**2).sum()
            gaps.append(h)
            if h > TOLERANCE:
                outer = 2 * r.estimate_inner * sum(-(pad.T @ W[i]) @ rz[i] for i in range(N))
                offset = h - outer @ v - 2 * (rz * z).sum() - 2 * rc @ c - TOLERANCE
                cuts.append({"outer": outer, "inner": 2 * rz, "consensus": 2 * rc, "offset": offset, "lam": 0.0, "before": 0.0})
    return v, c, z, x, theta, cuts, gaps


def test_the_simulator_is_the_sequential_reference(data):
    (W, b), A = data
    linear = Problem(lambda z, x, d: ((d[0] @ z - jnp.concatenate([x, x[:1]]) - d[1]) ** 2).sum() / 2, PROBLEM.outer)
    method = make(problem=linear, cut_period=5, last_cut=60, max_cuts=16, cut_damping=0.04, consensus_damping=0.002)
    plan = simulate.schedule(simulate.Cluster(simulate.log_normal(0.03)), method, steps=100, quorum=N, max_staleness=3)
    final, history = jax.jit(simulate.simulate, static_argnums=(0, 1))(method, samplers.full(), plan, data, jax.random.key(0))
    v, c, z, x, theta, cuts, gaps = reference(*map(np.asarray, (W, b, A)), steps=100, period=5, last_cut=60)
    close = partial(np.testing.assert_allclose, rtol=1e-10, atol=1e-13)
    for found, expected in zip(
        (final.consensus_outer, final.consensus_inner, final.inner, final.outer, final.consensus_multiplier),
        (v, c, z, x, theta),
        strict=True,
    ):
        close(found, expected)
    assert len(gaps) == 11
    close(history["inner_gap"][1:12], gaps)
    assert (history["inner_gap"][12:] == history["inner_gap"][11]).all()  # no cut from the last one on
    live = np.flatnonzero(final.cuts.live)
    assert len(live) == len(cuts) > 1
    close(np.sort(final.cuts.multiplier[live]), np.sort([k["lam"] for k in cuts]))
    # whatever the delays: they only change the clock
    other = simulate.schedule(simulate.Cluster(simulate.pareto(0.1)), method, steps=100, quorum=N, max_staleness=9, seed=5)
    again, _ = jax.jit(simulate.simulate, static_argnums=(0, 1))(method, samplers.full(), other, data, jax.random.key(0))
    np.testing.assert_array_equal(again.consensus_outer, final.consensus_outer)
    assert (other.period_seconds != plan.period_seconds).all()


def test_bad_input_is_refused():
    for own, message in (
        ({"n_workers": 0}, "n_workers: got 0"),
        ({"max_cuts": 0}, "max_cuts: got 0, expected at least 1"),
        ({"cut_period": 0}, "cut_period: got 0"),
        ({"estimate_rounds": 0}, "estimate_rounds: got 0"),
        ({"penalty": -1.0}, "penalty: got -1.0"),
        ({"cut_tolerance": -1.0}, "cut_tolerance: got -1.0"),
        ({"last_cut": -1}, "last_cut: got -1"),
        ({"cut_damping": -5.0}, "cut_damping: got -5"),
    ):
        with pytest.raises(ValueError, match=message):
            make(**own)
    with pytest.raises(TypeError, match="rates: got tuple"):
        adbo.adbo(PROBLEM, START, (0.1,) * 6, n_workers=N)
    with pytest.raises(ValueError, match=r"rates\.cut: got 0"):
        adbo.adbo(PROBLEM, START, RATES._replace(cut=0.0), n_workers=N)
    with pytest.raises(TypeError, match="expected one dtype"):
        adbo.adbo(PROBLEM, Vars(jnp.zeros(m), None, jnp.zeros(n, jnp.float32)), RATES, n_workers=N)
    with pytest.raises(ValueError, match=r"workers\.inner: got float64\[4, 2\]"):
        make().init(Vars(inner=jnp.zeros((N, 2))))


def test_pytrees_and_starts_of_the_workers():
    start = Vars(inner={"w": jnp.ones((2, 2)), "b": jnp.zeros(2)}, outer=(jnp.ones(3),))
    problem = Problem(
        lambda z, x, d: (z["w"] ** 2).sum() * x[0].sum() + (z["b"] - d).sum(), lambda z, x, d: (z["w"] ** 2).sum() + d
    )
    method = adbo.adbo(problem, start, RATES, n_workers=2)
    assert jax.tree.map(jnp.shape, method.vars(method.init())) == jax.tree.map(jnp.shape, start)
    own = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf + 1]), start.inner)
    master = method.init(Vars(inner=own))
    np.testing.assert_array_equal(master.inner[1], master.inner[0] + 1)
    moved = jax.vmap(method.work)(adbo.workers(master), Batch(jnp.zeros(2), jnp.zeros(2)))
    np.testing.assert_allclose(moved.inner[:, 2:], (1 - 2 * RATES.inner) * master.inner[:, 2:])


@pytest.mark.more
@pytest.mark.parametrize("rounds", [1, 5])
def test_the_toy_ends_near_its_optimum_and_warm_multipliers_agree(rounds):
    """Consensus error and the norm of the hypergradient fall; multipliers that start warm reduce the disagreement."""
    toy = Problem(lambda z, x, b: ((z - x - b) ** 2).sum() / 2, lambda z, x, a: ((z - a) ** 2).sum() / 2)
    A, B = np.random.default_rng(0).normal(size=(2, 6, 3))
    rates = Rates(0.02, 0.02, 0.02, 0.02, 0.1, 0.05, 0.3, 0.05, 0.3)

    def slope(vars, data):  # h(x) = sum_i |x + mean(B) - A_i|^2 / 2
        return {"slope": jnp.linalg.norm(6 * (vars.outer + data.inner.mean(0) - data.outer.mean(0)))}

    apart = []
    for warm in (False, True):
        method = adbo.adbo(
            toy, Vars(jnp.zeros(3), None, jnp.zeros(3)), rates, n_workers=6, max_cuts=64, cut_period=50,
            estimate_rounds=rounds, cut_damping=0.04, consensus_damping=0.002, warm_start=warm,
        )  # fmt: skip
        plan = simulate.schedule(simulate.Cluster(simulate.log_normal(0.03)), method, steps=3000, quorum=3, max_staleness=8)
        go = jax.jit(simulate.simulate, static_argnums=(0, 1), static_argnames="metrics")
        data = Levels(jnp.asarray(B), jnp.asarray(A))
        master, history = go(method, samplers.full(), plan, data, jax.random.key(0), metrics=slope)
        assert int(history["refused"][-1]) == 0
        assert history["slope"][-1] < 0.2 * history["slope"][0]
        assert history["inner_gap"][-1] < 0.2 * history["inner_gap"][1]
        assert jnp.linalg.norm(method.vars(master).inner - A.mean(0)) < 0.2
        assert (master.cuts.multiplier >= 0).all()
        apart.append(float(history["inner_apart"][-1]))
    assert apart[1] < 0.5 * apart[0]
