"""FedNest, gossip, the virtual clock and ADBO against references in NumPy, on losses that are not quadratic.

The derivatives below are written by hand, and those of ADBO's cuts are taken by complex steps: nothing of JAX is in them.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from bilevel_jax import Batch, Levels, Problem, Solver, Vars, run, samplers, solvers
from bilevel_jax.distributed import adbo, complete, d_soba, fednest, per_agent, ring, simulate
from tests.checks import follow

AGENTS, ROWS, P = 4, 3, 3  # P numbers in z, and in x

# ---- the losses, in JAX and by hand -----------------------------------------------------------------------------------


def inner_loss(z, x, rows):
    """A logistic loss, one value a row, penalised by exp(x)."""
    return jnp.logaddexp(0.0, -(rows["features"] @ z)) + (jnp.exp(x) * z**2).sum() / 2 + 0.1 * x @ z


def outer_loss(z, x, rows):
    """Another one, one value a row; not quadratic in x either."""
    away = jnp.log(jnp.cosh(x[None] + rows["shift"])).sum(1)
    return jnp.logaddexp(0.0, -(rows["features"] @ z)) + away + 0.1 * z @ jnp.sin(x)


PROBLEM = Problem(inner_loss, outer_loss)


def sigmoid(u):
    return 1 / (1 + np.exp(-u))


def inner_slope(rows, z, x):
    """d_z g; of complex numbers, too."""
    features = rows["features"]
    return -features.T @ sigmoid(-features @ z) / len(features) + np.exp(x) * z + 0.1 * x


def inner_slope_x(z, x):
    return np.exp(x) * z**2 / 2 + 0.1 * z


def hessian(rows, z, x):
    weight = sigmoid(rows["features"] @ z)
    return (rows["features"].T * (weight * (1 - weight))) @ rows["features"] / len(weight) + np.diag(np.exp(x))


def cross(z, x, v):
    """d2_xz g v."""
    return np.exp(x) * z * v + 0.1 * v


def outer_slopes(rows, z, x):
    features = rows["features"]
    fz = -features.T @ sigmoid(-features @ z) / len(features) + 0.1 * np.sin(x)
    return fz, np.tanh(x + rows["shift"]).mean(0) + 0.1 * z * np.cos(x)


def directions(inner, outer, z, v, x):
    """Those of SOBA."""
    fz, fx = outer_slopes(outer, z, x)
    return np.stack([inner_slope(inner, z, x), hessian(inner, z, x) @ v + fz, fx + cross(z, x, v)])


def all_rows(agents: int = AGENTS) -> Levels:
    """Rows of every agent, [agents, ROWS, ...]; their problems differ."""
    random = np.random.default_rng(0)

    def level() -> dict[str, np.ndarray]:
        own, rest = random.normal(size=(2, agents, 1, P)), random.normal(size=(2, agents, ROWS, P))
        return dict(zip(("features", "shift"), own + rest, strict=True))

    return Levels(level(), level())


def share(level: dict[str, Any], *index: Any) -> dict[str, np.ndarray]:
    return {name: np.asarray(leaf)[index] for name, leaf in level.items()}


START = Vars(np.full(P, 0.1), np.zeros(P), np.full(P, -0.5))
DATA = all_rows()
RATE, OUTER = 0.3, 0.2


def start() -> Vars:
    return jax.tree.map(jnp.asarray, START)


def test_the_derivatives_by_hand_are_those_of_the_losses():
    random = np.random.default_rng(1)
    z, v, x = random.normal(size=(3, P))
    inner, outer = (share(level, 0) for level in DATA)
    g = lambda z, x: inner_loss(z, x, inner).mean()
    f = lambda z, x: outer_loss(z, x, outer).mean()
    close = partial(np.testing.assert_allclose, rtol=1e-12)
    close(inner_slope(inner, z, x), jax.grad(g)(z, x))
    close(inner_slope_x(z, x), jax.grad(g, 1)(z, x))
    close(hessian(inner, z, x), jax.hessian(g)(z, x))
    close(cross(z, x, v), jax.jacfwd(jax.grad(g), 1)(z, x).T @ v)
    for got, wanted in zip(outer_slopes(outer, z, x), jax.grad(f, (0, 1))(z, x), strict=True):
        close(got, wanted)


def batches_of(solver: Solver, updates: int, sampler: samplers.Sampler) -> list[Batch]:
    data = jax.tree.map(jnp.asarray, DATA)
    make = jax.jit(lambda t: sampler.batches(data, jax.random.key(1), t, solver.draws))
    return [make(t * solver.draws) for t in range(updates)]


# ---- FedNest ----------------------------------------------------------------------------------------------------------

TERMS, TURNS, LOCAL = 4, 2, 3


def fednest_update(draw: Any, z: np.ndarray, x: np.ndarray, corrected: bool) -> Vars:
    """One update in NumPy; ``draw(k)`` gives the rows of draw k, ``([g_1, ...], [f_1, ...])``."""
    for t in range(TURNS):
        anchor, ends = z, []
        lead = np.mean([inner_slope(rows, anchor, x) for rows in draw(t * LOCAL)[0]], 0)
        for i in range(AGENTS):
            here = anchor
            for k in range(LOCAL):
                rows = draw(t * LOCAL + k)[0][i]
                way = inner_slope(rows, here, x)
                here = here - RATE * (way - inner_slope(rows, anchor, x) + lead if corrected else way)
            ends.append(here)
        z = np.mean(ends, 0)
    at = TURNS * LOCAL
    product = np.mean([outer_slopes(rows, z, x)[0] for rows in draw(at)[1]], 0)
    series = product
    for n in range(TERMS - 1):
        product = product - RATE * np.mean([hessian(rows, z, x) @ product for rows in draw(at + 1 + n)[0]], 0)
        series = series + product
    v, at = -RATE * series, at + TERMS
    lead = np.mean([outer_slopes(rows, z, x)[1] for rows in draw(at)[1]], 0) + cross(z, x, v)
    ends = []
    for i in range(AGENTS):
        here = x
        for k in range(LOCAL):
            rows = draw(at + k)[1][i]
            here = here - OUTER * (outer_slopes(rows, z, here)[1] - outer_slopes(rows, z, x)[1] + lead)
        ends.append(here)
    return Vars(z, v, np.mean(ends, 0))


def a_fednest(**own: Any) -> Solver:
    rates = {"inner_rate": RATE, "outer_rate": OUTER, "neumann_rate": RATE}
    sizes = {"inner_rounds": TURNS, "local_steps": LOCAL, "neumann_terms": TERMS, "random_terms": False}
    return fednest(PROBLEM, **rates | sizes | own)


@pytest.mark.parametrize("corrected", [True, pytest.param(False, marks=pytest.mark.more)])
def test_fednest_is_its_reference(corrected):
    """Local steps of clients that differ, each on single rows."""
    solver = a_fednest(corrected=corrected)
    batches = batches_of(solver, 8, per_agent(samplers.uniform(1)))
    point = START
    for batch, state in zip(batches, follow(solver, start(), batches), strict=True):
        levels = [jax.tree.map(np.asarray, level) for level in (batch.inner, batch.outer)]

        def draw(k: int, levels: list = levels) -> list:
            return [[share(level, k, i) for i in range(AGENTS)] for level in levels]

        point = fednest_update(draw, point.inner, point.outer, corrected)
        for got, wanted in zip(state.vars, point, strict=True):
            np.testing.assert_allclose(got, wanted, atol=1e-12)
    assert np.abs(point.outer - START.outer).max() > 0.1


def test_fednest_ends_at_the_solution_of_the_mean():
    """At the z and v that the mean of the losses gives for its x, where the hypergradient of the mean is 0."""
    solver = a_fednest(fresh=False, neumann_terms=120)
    go = jax.jit(partial(run, solver, samplers.full(), steps=300))
    z, v, x = map(np.asarray, go(start(), jax.tree.map(jnp.asarray, DATA), jax.random.key(0))[0].state.vars)
    found = np.mean([directions(share(DATA.inner, i), share(DATA.outer, i), z, v, x) for i in range(AGENTS)], 0)
    assert np.abs(found).max() < 1e-12
    assert np.linalg.norm(v) > 0.1


# ---- gossip -----------------------------------------------------------------------------------------------------------

THETA = 0.3
OPTS = Vars(*(optax.sgd(rate) for rate in (RATE, RATE, OUTER)))


def agents_walk(batches: list[Batch], mixing: np.ndarray) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """D-SOBA agent by agent: the iterates, [3, agents, P] each, and what the steps add to the mean of the agents."""
    vars = np.stack([np.tile(part, (AGENTS, 1)) for part in START])
    average, found, steps = np.zeros((AGENTS, P)), [], []
    for batch in batches:
        ways = np.zeros_like(vars)
        for i in range(AGENTS):
            ways[:, i] = directions(share(batch.inner, 0, i), share(batch.outer, 0, i), *vars[:, i])
        average = (1 - THETA) * average + THETA * ways[2]
        ways[2] = average
        moves = -np.array([RATE, RATE, OUTER])[:, None, None] * ways
        vars = np.einsum("ij,kjp->kip", mixing, vars + moves)
        found.append(vars)
        steps.append(moves.mean(1))
    return found, steps


def test_agents_on_a_ring_are_the_reference_and_their_mean_follows_the_mean_step():
    solver = d_soba(PROBLEM, OPTS, ring(AGENTS), momentum=THETA)
    batches = batches_of(solver, 15, per_agent(samplers.uniform(1)))
    expected, steps = agents_walk(batches, ring(AGENTS))
    before = np.stack(START)
    for state, wanted, step in zip(follow(solver, start(), batches), expected, steps, strict=True):
        found = np.stack(state.vars)
        np.testing.assert_allclose(found, wanted, atol=1e-12)
        np.testing.assert_allclose(found.mean(1), before + step, atol=1e-13)
        before = found.mean(1)
    assert np.abs(expected[-1] - before[:, None]).max() > 1e-2  # the agents differ


def test_agents_that_average_with_all_are_the_solver_on_all_rows():
    """W = 1/N: for losses that are not quadratic, too, because all agents are at one point."""
    solver = d_soba(PROBLEM, OPTS, complete(AGENTS), momentum=THETA)
    batches = batches_of(solver, 10, per_agent(samplers.full()))
    pooled = [
        Batch(*(jax.tree.map(lambda leaf: leaf.reshape(1, -1, *leaf.shape[3:]), level) for level in (b.inner, b.outer)))
        for b in batches
    ]
    central = solvers.ma_soba(PROBLEM, OPTS, theta=THETA)
    for many, one in zip(follow(solver, start(), batches), follow(central, start(), pooled), strict=True):
        for got, wanted in zip(many.vars, one.vars, strict=True):
            np.testing.assert_allclose(got, np.tile(wanted, (AGENTS, 1)), atol=1e-13)


# ---- the virtual clock ------------------------------------------------------------------------------------------------


class Played(NamedTuple):
    seconds: list
    active: list
    worked: list
    age: list
    drained: list
    period_seconds: list


def finish(begin: float, takes: float, gone: list[tuple[float, float]]) -> float:
    """When a task is done that begins anew after every loss of its worker."""
    for at, back in sorted(gone):
        if at <= begin < back or begin < at < begin + takes:
            begin = back
    return begin + takes


def play(cluster, n, steps, period, last_cut, rounds, quorum, tau, seed) -> Played:
    """The rules of the master, without a queue: the answers under way are sorted anew at every turn."""
    takes = [simulate.durations(cluster, n, count, seed, kind) for kind, count in ((0, steps + 1), (1, 2 * rounds * steps))]
    gone = [[(f.at, f.back) for f in cluster.failures if f.worker == i] for i in range(n)]
    done = np.zeros((2, n), int)
    now, out = 0.0, Played([], [], [], [], [], [])
    due = [finish(0.0, takes[0][i, 0], gone[i]) for i in range(n)]  # None for a worker that has nothing to do
    age, here, fresh = np.ones(n, int), np.zeros(n, bool), np.zeros(n, bool)

    def answer() -> None:
        nonlocal now
        time, i = min((time, i) for i, time in enumerate(due) if time is not None)
        now, due[i] = max(now, time), None
        done[0, i] += 1
        age[i], here[i], fresh[i] = 0, True, True

    for t in range(steps):
        out.age.append(age.copy())
        while here.sum() < quorum or age.max() >= tau:
            answer()
        out.seconds.append(now)
        out.active.append(here.copy())
        out.worked.append(fresh.copy())
        sent = here.copy()
        here[:], fresh[:] = False, False
        age += 1
        if (t + 1) % period == 0:
            if t + 1 < last_cut:
                while any(time is not None for time in due):
                    answer()
                out.drained.append(fresh.copy())
                fresh[:] = False
                for _ in range(2 * rounds):
                    now = max(finish(now, takes[1][i, done[1, i]], gone[i]) for i in range(n))
                    done[1] += 1
            else:
                out.drained.append(np.zeros(n, bool))
            out.period_seconds.append(now)
        for i in np.flatnonzero(sent):
            due[i] = finish(now, takes[0][i, done[0, i]], gone[i])
    return out


def a_method(**own: Any) -> adbo.Adbo:
    toy = Problem(lambda z, x, b: ((z - x - b) ** 2).sum() / 2, lambda z, x, a: ((z - a) ** 2).sum() / 2)
    return adbo.adbo(toy, Vars(np.zeros(1), None, np.zeros(1)), RATES, **own)


RATES = adbo.Rates(0.03, 0.02, 0.04, 0.05, 0.1, 0.06, 0.2, 0.07, 0.3)
DELAYS = {"constant": simulate.constant(1.0), "log normal": simulate.log_normal(1.0), "heavy": simulate.pareto(0.5, 1.1)}
LOST = {
    "none": (),
    "one": (simulate.Failure(0, 3.5, 9.25),),
    "two": (simulate.Failure(1, 2.0, 5.0), simulate.Failure(1, 8.0, 30.0)),
}


@settings(max_examples=60)
@example(n=4, quorum=2, tau=3, delay="constant", lost="two", period=4, cuts=9, rounds=1, seed=0)
@given(
    n=st.integers(2, 5),
    quorum=st.integers(1, 5),
    tau=st.integers(1, 9),
    delay=st.sampled_from(sorted(DELAYS)),
    lost=st.sampled_from(sorted(LOST)),
    period=st.integers(1, 6),
    cuts=st.integers(0, 40),
    rounds=st.integers(1, 2),
    seed=st.integers(0, 99),
)
def test_the_clock_is_the_brute_force_one(n, quorum, tau, delay, lost, period, cuts, rounds, seed):
    """Times, answers, ages and barriers, to the last bit; the quorum is met, and no answer is tau iterations old."""
    quorum, steps = min(quorum, n), 5 * period
    cluster = simulate.Cluster(DELAYS[delay], 0.1, simulate.stragglers(n, 1, 3.0), LOST[lost])
    method = a_method(n_workers=n, cut_period=period, last_cut=cuts, estimate_rounds=rounds)
    plan = simulate.schedule(cluster, method, steps=steps, quorum=quorum, max_staleness=tau, seed=seed)
    expected = play(cluster, n, steps, period, cuts, rounds, quorum, tau, seed)
    assert plan.blocked == -1
    for name, wanted in expected._asdict().items():
        np.testing.assert_array_equal(getattr(plan, name), wanted, err_msg=name)
    assert plan.active.sum(1).min() >= quorum
    assert plan.age.max() <= tau
    assert plan.age[~plan.active].max(initial=0) < tau


# ---- ADBO -------------------------------------------------------------------------------------------------------------

PENALTY, TOLERANCE, ROUNDS, PERIOD, LAST, STEPS = 0.7, 1e-6, 3, 5, 31, 50


def estimate(rows, z, c, x):
    """Of the inner solutions and their consensus, ``ROUNDS`` rounds; of complex x, too."""
    y = np.zeros_like(z)
    for _ in range(ROUNDS):
        slope = np.stack([inner_slope(own, own_z, x) for own, own_z in zip(rows, z, strict=True)])
        new = z - RATES.estimate_inner * (slope + y + PENALTY * (z - c))
        c = c - RATES.estimate_consensus * (PENALTY * (c - z) - y).sum(0)
        y = y + RATES.estimate_multiplier * (new - c)
        z = new
    return z, c


def gap(rows, z, c, x):
    guess, consensus = estimate(rows, z, c, x)
    return ((z - guess) ** 2).sum() + ((c - consensus) ** 2).sum()


def adbo_reference(plan: simulate.Schedule, damping: tuple[float, float]) -> tuple:
    """The run of a schedule, worker by worker; every worker holds the message that it was sent last."""
    inner, outer = ([share(level, i) for i in range(AGENTS)] for level in DATA)
    z, x = np.tile(START.inner, (AGENTS, 1)), np.tile(START.outer, (AGENTS, 1))
    c, mean = START.inner, START.outer
    multiplier, cuts, gaps = np.zeros((AGENTS, P)), [], []
    held = [{"multiplier": np.zeros(P), "cuts": [], "at": 0} for _ in range(AGENTS)]

    def work(i: int) -> None:
        message = held[i]
        fz, fx = outer_slopes(outer[i], z[i], x[i])
        pull = sum((lam * cut["inner"][i] for lam, cut in message["cuts"]), np.zeros(P))
        x[i] = x[i] - RATES.outer * (fx + message["multiplier"])
        z[i] = z[i] - falling(message["at"]) * (fz + pull)

    for t in range(len(plan.seconds)):
        for i in np.flatnonzero(plan.worked[t]):
            work(i)
        active = np.flatnonzero(plan.active[t])
        mean = mean - RATES.consensus_outer * (sum((k["lam"] * k["outer"] for k in cuts), np.zeros(P)) - multiplier.sum(0))
        c = c - RATES.consensus_inner * sum((k["lam"] * k["consensus"] for k in cuts), np.zeros(P))
        for k in cuts:
            value = k["outer"] @ mean + (k["inner"] * z).sum() + k["consensus"] @ c + k["offset"]
            k["before"], k["lam"] = k["lam"], max(0.0, k["lam"] + RATES.cut * (value - damping[0] * k["lam"]))
        for i in active:
            multiplier[i] = multiplier[i] + RATES.consensus * (x[i] - mean - damping[1] * multiplier[i])
            held[i] = {"multiplier": multiplier[i].copy(), "cuts": [(k["lam"], k) for k in cuts], "at": t + 1}
        if (t + 1) % PERIOD == 0 and t + 1 < LAST:
            for i in np.flatnonzero(plan.drained[t // PERIOD]):
                work(i)
            cuts = [k for k in cuts if k["lam"] > 0 or k["before"] > 0]

            slope = np.array([gap(inner, z, c, mean + 1e-30j * unit).imag / 1e-30 for unit in np.eye(P)])
            guess, consensus = estimate(inner, z, c, mean)
            value, to_z, to_c = gap(inner, z, c, mean), 2 * (z - guess), 2 * (c - consensus)
            gaps.append(value)
            if value > TOLERANCE:
                offset = value - slope @ mean - (to_z * z).sum() - to_c @ c - TOLERANCE
                cuts.append({"outer": slope, "inner": to_z, "consensus": to_c, "offset": offset, "lam": 0.0, "before": 0.0})
            for message in held:
                message["cuts"] = [(k["lam"], k) for k in cuts]
    return mean, c, z, x, multiplier, cuts, gaps


def falling(t: Any) -> Any:
    """The rate of z of a worker: a schedule of the iteration whose message it holds."""
    return 0.05 / (1 + 0.1 * t)


@pytest.mark.parametrize(("quorum", "tau", "seed"), [(2, 4, 0), pytest.param(1, 6, 3, marks=pytest.mark.more)])
def test_adbo_on_a_random_schedule_is_its_reference(quorum, tau, seed):
    """Workers that are late step from old messages, and answers under way come in before a cut."""
    rates, damping = RATES._replace(inner=falling), (0.04, 0.002)
    method = adbo.adbo(
        PROBLEM, START._replace(aux=None), rates, n_workers=AGENTS, max_cuts=16, cut_period=PERIOD, last_cut=LAST,
        cut_tolerance=TOLERANCE, estimate_rounds=ROUNDS, penalty=PENALTY, cut_damping=damping[0], consensus_damping=damping[1],
    )  # fmt: skip
    cluster = simulate.Cluster(simulate.log_normal(1.0), 0.1)
    plan = simulate.schedule(cluster, method, steps=STEPS, quorum=quorum, max_staleness=tau, seed=seed)
    late = plan.age[plan.worked]
    assert late.max() > 1
    assert plan.drained.any()
    assert (plan.worked != plan.active).any()
    go = jax.jit(simulate.simulate, static_argnums=(0, 1))
    final, history = go(method, samplers.full(), plan, jax.tree.map(jnp.asarray, DATA), jax.random.key(0))
    mean, c, z, x, multiplier, cuts, gaps = adbo_reference(plan, damping)
    close = partial(np.testing.assert_allclose, rtol=1e-10, atol=1e-12)
    for got, wanted in (
        (final.consensus_outer, mean),
        (final.consensus_inner, c),
        (final.inner, z),
        (final.outer, x),
        (final.consensus_multiplier, multiplier),
    ):
        close(got, wanted)
    close(history["inner_gap"][1 : len(gaps) + 1], gaps)
    live = np.flatnonzero(final.cuts.live)
    assert len(live) == len(cuts) > 1
    close(np.sort(final.cuts.multiplier[live]), np.sort([k["lam"] for k in cuts]))
    assert np.abs(c - START.inner).max() > 1e-3
