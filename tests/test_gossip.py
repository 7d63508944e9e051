"""Agents that average with their neighbours: what they reduce to, what mixing does, where they end, what is refused."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from bilevel_jax import Batch, Levels, Problem, Result, Solver, Vars, guard, run, samplers, solvers, spent, worst
from bilevel_jax.distributed import complete, d_soba, gossip, metropolis, per_agent, ring, spectral_gap
from bilevel_jax.distributed.gossip import messages, mix, sent_bytes
from bilevel_jax.testing import Quadratic, quadratic
from tests.checks import check_runs, check_same, follow
from tests.references import inner_terms, outer_terms
from tests.tables import distance, thinned

AGENTS, ROWS = 6, 2
OPTS = Vars(*map(optax.sgd, (0.3, 0.3, 0.1)))
#: Doubly stochastic and not symmetric: agent i hears from i + 1 alone.
CYCLE = 0.5 * np.eye(AGENTS) + 0.5 * np.roll(np.eye(AGENTS), 1, axis=1)


@pytest.fixture(scope="module")
def q() -> Quadratic:
    sizes = {"inner_samples": AGENTS * ROWS, "outer_samples": AGENTS * ROWS}
    return quadratic(jax.random.key(0), inner_dim=5, outer_dim=3, noise=0.1, dtype=jnp.float64, **sizes)


def split(q: Quadratic) -> Levels:
    """Two rows for each of six agents: their problems differ, and the mean of them is the quadratic."""
    return jax.tree.map(lambda leaf: leaf.reshape(AGENTS, ROWS, *leaf.shape[1:]), q.data)


def draws(q: Quadratic, solver: Solver, updates: int, seed: int = 1) -> list[Batch]:
    """Blocks of one row: every agent its own."""
    sampler = jax.jit(lambda t: per_agent(samplers.uniform(1)).batches(split(q), jax.random.key(seed), t, solver.draws))
    return [sampler(t * solver.draws) for t in range(updates)]


def scattered(q: Quadratic) -> Vars:
    """A start of its own for every agent."""
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=(AGENTS, *leaf.shape))), q.start)


# ---- what it reduces to -----------------------------------------------------------------------------------------------


def test_averaging_with_all_is_the_centralised_method(q):
    """W = 1/N: MA-SOBA on the mean of the agents' samples, for all agents."""
    solver, central = d_soba(q.problem, OPTS, complete(AGENTS), momentum=0.3), solvers.ma_soba(q.problem, OPTS, theta=0.3)
    batches = draws(q, solver, 10)
    pooled = [b._replace(slot=None, full=None, key=None, weight=None) for b in batches]
    pooled = [jax.tree.map(lambda leaf: leaf.reshape(1, AGENTS, *leaf.shape[3:]), b) for b in pooled]
    together, alone = follow(solver, q.start, batches), follow(central, q.start, pooled)
    for many, one in zip(together, alone, strict=True):
        check_same(many.vars, jax.tree.map(lambda leaf: jnp.stack([leaf] * AGENTS), one.vars), tol=1e-13)
    assert distance(alone[-1].vars.outer, q.start.outer) > 0.01


APART = {
    "saba": lambda problem: solvers.saba(problem, Vars(*(optax.sgd(0.1, momentum=0.5) for _ in range(3)))),
    "bsa": lambda problem: solvers.bsa(problem, Vars(inner=optax.sgd(0.1), outer=optax.adam(0.1)), rate=0.2, terms=3),
}


@thinned("name", APART, "saba")
def test_agents_that_do_not_mix_run_by_themselves(q, name):
    """W = 1: tables, momentum, random lengths and all."""
    solver = APART[name](q.problem)
    batches = draws(q, solver, 6)
    together = follow(gossip(solver, np.eye(AGENTS)), q.start, batches)
    for agent in (0, AGENTS - 1):

        def own(batch, agent=agent):
            full = jax.tree.map(lambda leaf: leaf[agent], batch.full)
            return jax.tree.map(lambda leaf: leaf[:, agent], batch._replace(full=None))._replace(full=full)

        alone = follow(solver, q.start, [own(batch) for batch in batches])
        for many, one in zip(together, alone, strict=True):
            mine = jax.tree.map(lambda leaf, agent=agent: leaf[agent], (many.vars, many.stages))
            check_same(mine, (one.vars, one.stages), tol=1e-12)
    assert distance(together[-1].vars.outer[0], together[-1].vars.outer[-1]) > 1e-3


def reference(batches: list[Batch], W: np.ndarray, start: Vars, steps: Any, theta: float) -> list[tuple]:
    """Adapt, then combine, agent by agent, in NumPy; the average d is not mixed."""
    vars = [[np.asarray(part[i]) for part in start] for i in range(AGENTS)]
    average, iterates = [np.zeros_like(vars[0][2]) for _ in range(AGENTS)], []
    for t, batch in enumerate(batches):
        adapted = []
        for i, (z, v, x) in enumerate(vars):
            g, f = (
                {name: np.asarray(leaf[0, i]).mean(0) for name, leaf in part.items()} for part in (batch.inner, batch.outer)
            )
            (dz, hv, cross), (fz, fx) = inner_terms(g, z, v, x), outer_terms(f, z, x)
            average[i] = (1 - theta) * average[i] + theta * (fx + cross)
            a, b, c = steps(t)
            adapted.append((z - a * dz, v - b * (hv + fz), x - c * average[i]))
        vars = [[sum(W[i, j] * adapted[j][k] for j in range(AGENTS)) for k in range(3)] for i in range(AGENTS)]
        iterates.append([np.stack([own[k] for own in vars]) for k in range(3)])
    return iterates


@pytest.mark.parametrize("mixing", [CYCLE, ring(AGENTS)], ids=["cycle", "ring"])
def test_d_soba_is_its_numpy_reference(q, mixing):
    rates = 0.3, 0.2, 0.1
    opts = Vars(*(optax.sgd(lambda t, rate=rate: rate * (t + 1.0) ** -0.5) for rate in rates))
    solver = d_soba(q.problem, opts, mixing, momentum=0.3, same_start=False)
    batches = draws(q, solver, 20)
    expected = reference(batches, mixing, scattered(q), lambda t: [rate * (t + 1) ** -0.5 for rate in rates], 0.3)
    for state, parts in zip(follow(solver, scattered(q), batches), expected, strict=True):
        for got, part in zip(state.vars, parts, strict=True):
            np.testing.assert_allclose(got, part, atol=1e-12, rtol=1e-12)


def test_the_reference_tells_the_direction_of_the_edges(q):
    solver = d_soba(q.problem, OPTS, CYCLE.T, momentum=0.3, same_start=False)
    batches = draws(q, solver, 2)
    expected = reference(batches, CYCLE, scattered(q), lambda t: (0.3, 0.3, 0.1), 0.3)
    assert distance(follow(solver, scattered(q), batches)[-1].vars, Vars(*map(jnp.asarray, expected[-1]))) > 0.1


def test_the_same_start_is_the_stacked_one(q):
    solver = d_soba(q.problem, OPTS, ring(AGENTS))
    stacked = jax.tree.map(lambda leaf: jnp.stack([leaf] * AGENTS), q.start)
    batches = draws(q, solver, 1)
    other = d_soba(q.problem, OPTS, ring(AGENTS), same_start=False)
    check_same(solver.init(q.start, batches[0]), other.init(stacked, batches[0]))
    assert solver.init(q.start._replace(aux=None), batches[0]).vars.aux.shape == (AGENTS, 5)


# ---- mixing -----------------------------------------------------------------------------------------------------------


def test_the_distance_to_consensus_falls_with_the_gap(q):
    """With zero rates: the mean stays, the rest contracts by the second eigenvalue, and at that rate along its vector."""
    mixing = ring(AGENTS)
    second = 1 - spectral_gap(mixing)
    assert np.isclose(second, np.sort(np.abs(np.linalg.eigvalsh(mixing)))[-2])
    solver = d_soba(q.problem, Vars(*map(optax.sgd, (0.0, 0.0, 0.0))), mixing, same_start=False)
    batches = draws(q, solver, 4)

    def spread(vars):
        return [float(jnp.linalg.norm(leaf - leaf.mean(0, keepdims=True))) for leaf in vars]

    start, before = scattered(q), spread(scattered(q))
    for state in follow(solver, start, batches):
        after = spread(state.vars)
        assert all(a <= second * b * (1 + 1e-12) for a, b in zip(after, before, strict=True))
        assert distance(jax.tree.map(lambda u: u.mean(0), state.vars), jax.tree.map(lambda u: u.mean(0), start)) < 1e-14
        before = after
    slowest = np.linalg.eigh(mixing)[1][:, -2]
    start = jax.tree.map(lambda leaf: jnp.asarray(np.multiply.outer(slowest, np.ones(leaf.shape))), q.start)
    for t, state in enumerate(follow(solver, start, batches), 1):
        check_same(state.vars, jax.tree.map(lambda leaf, t=t: second**t * leaf, start), tol=1e-13)


def test_the_gap_of_a_directed_cycle(q):
    """|1/2 + e^(i pi / 3) / 2| = cos(pi / 6)."""
    assert np.isclose(spectral_gap(CYCLE), 1 - np.cos(np.pi / 6))
    assert np.isclose(spectral_gap(np.eye(3)), 0)
    assert np.isclose(spectral_gap(ring(AGENTS)), 1 - (1 + 2 * np.cos(np.pi / 3)) / 3)


@pytest.mark.more
def test_constant_steps_end_near_the_solution(q):
    """On a ring the distance falls with the steps: the agents' data differ.  With all averaged there is none."""

    @partial(jax.jit, static_argnums=(1, 2))
    def end(rate, mixing, updates):
        opts = Vars(*map(optax.sgd, (0.4 * rate, 0.4 * rate, 0.4 * rate)))
        solver = d_soba(q.problem, opts, {"ring": ring, "complete": complete}[mixing](AGENTS), momentum=0.5)
        carry, _ = run(solver, per_agent(samplers.full()), q.start, split(q), jax.random.key(0), steps=updates)
        off = jax.tree.map(lambda got, best: jnp.linalg.norm(got.mean(0) - best), carry.state.vars, q.solution)
        return off.outer, jnp.linalg.norm(carry.state.vars.outer - carry.state.vars.outer.mean(0, keepdims=True))

    start = float(jnp.linalg.norm(q.start.outer - q.solution.outer))
    whole, half = end(1.0, "ring", 2000), end(0.5, "ring", 4000)
    exact = end(1.0, "complete", 2000)
    assert 1e-6 * start < whole[0] < 0.05 * start
    assert half[0] < 0.6 * whole[0]
    assert half[1] < 0.6 * whole[1]
    assert max(exact) < 1e-10


def test_mixing_keeps_dtypes():
    tree = {"a": jnp.arange(6.0).reshape(3, 2).astype(jnp.bfloat16), "b": jnp.arange(3.0, dtype=jnp.float32)}
    mixed = mix(complete(3), tree)
    assert (mixed["a"].dtype, mixed["b"].dtype) == (jnp.bfloat16, jnp.float32)
    np.testing.assert_array_equal(mixed["a"].astype(jnp.float32), np.tile([[2.0, 3.0]], (3, 1)))


# ---- transformations --------------------------------------------------------------------------------------------------


def test_runs_are_jitted_mapped_and_resumed(q):
    solver = d_soba(q.problem, OPTS, ring(AGENTS))
    by_hand = follow(solver, q.start, draws(q, solver, 6))[-1]
    check_runs(solver, per_agent(samplers.uniform(1)), q.start, split(q), 6, by_hand)


def test_the_matrix_may_be_traced(q):
    solver = lambda mixing: d_soba(q.problem, OPTS, mixing)
    (batch,) = draws(q, solver(ring(AGENTS)), 1)
    matrices = jnp.stack([jnp.asarray(CYCLE), jnp.asarray(ring(AGENTS))])
    state = solver(CYCLE).init(q.start, batch)
    every = jax.jit(jax.vmap(lambda mixing: solver(mixing).update(state, batch).vars))(matrices)
    check_same(jax.tree.map(lambda leaf: leaf[1], every), solver(ring(AGENTS)).update(state, batch).vars, tol=1e-14)


def test_states_may_be_donated(q):
    solver = gossip(solvers.saba(q.problem, OPTS), ring(AGENTS))
    batches = draws(q, solver, 2)
    update, state = jax.jit(solver.update, donate_argnums=0), solver.init(q.start, batches[0])
    for batch in batches:
        state = update(state, batch)
    assert update._cache_size() == 1
    assert bool(jnp.isfinite(q.start.outer).all())
    assert bool(jnp.isfinite(state.vars.outer).all())


def test_agents_draw_from_their_own_rows(q):
    data = Levels(*(jnp.arange(AGENTS * 8).reshape(AGENTS, 8) + 1000 * level for level in range(2)))
    batch = per_agent(samplers.uniform(2)).batches(data, jax.random.key(0), 0, 5)
    for level, part in enumerate((batch.inner, batch.outer)):
        assert part.shape == (5, AGENTS, 2)
        np.testing.assert_array_equal((part - 1000 * level) // 8, np.broadcast_to(np.arange(AGENTS)[:, None], part.shape))
    blocks = batch.slot.inner.index
    assert len({tuple(column) for column in np.asarray(blocks).T}) > 1, "all agents draw alike"
    later = per_agent(samplers.uniform(2)).batches(data, jax.random.key(0), 3, 2)
    np.testing.assert_array_equal(later.inner, batch.inner[3:])


# ---- what goes wrong --------------------------------------------------------------------------------------------------


def test_an_agent_that_breaks_is_seen(q):
    """NaN in the data of one agent: the guard freezes all, and says so."""
    solver = guard(d_soba(q.problem, OPTS, ring(AGENTS)))
    good, bad = draws(q, solver, 2)
    bad = bad._replace(inner={**bad.inner, "b": bad.inner["b"].at[0, 3].set(jnp.nan)})
    state, after = follow(solver, q.start, [good, bad])
    assert int(worst(after)) == Result.NONFINITE
    check_same(after.vars, state.vars)


BAD = {
    "mixing: got the shape (2, 3)": np.ones((2, 3)),
    "mixing: got the shape (0, 0)": np.ones((0, 0)),
    "mixing: got entries down to -0.5": np.array([[1.5, -0.5], [-0.5, 1.5]]),
    "mixing: got entries down to nan": np.full((2, 2), np.nan),
    "mixing: got rows whose sums": np.array([[0.5, 0.4], [0.5, 0.6]]),
    "mixing: got columns whose sums": np.array([[0.9, 0.1], [0.9, 0.1]]),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_matrices_are_refused(q, message):
    for refuse in (lambda W: d_soba(q.problem, OPTS, W), spectral_gap, messages):
        with pytest.raises(ValueError, match=message.replace("(", r"\(").replace(")", r"\)")):
            refuse(BAD[message])


def test_bad_arguments_are_refused(q):
    solver = d_soba(q.problem, OPTS, ring(AGENTS))
    (batch,) = draws(q, solver, 1)
    with pytest.raises(TypeError, match="solver: got Problem"):
        gossip(q.problem, ring(3))
    with pytest.raises(TypeError, match="mixing: got an array of dtype"):
        gossip(solver, "ring")
    with pytest.raises(ValueError, match="mixing: got the shape"):
        jax.eval_shape(lambda W: messages(W) if W.ndim == 2 else gossip(solver, W), jnp.ones(3))
    with pytest.raises(ValueError, match="agents: got 0"):
        ring(0)
    with pytest.raises(ValueError, match="adjacency: got a graph that is not connected"):
        metropolis(np.kron(np.eye(2), np.ones((2, 2))))
    with pytest.raises(ValueError, match="adjacency: got a matrix that is not symmetric"):
        metropolis([[0, 1], [0, 0]])
    with pytest.raises(TypeError, match="batches: got dict"):
        solver.init(q.start, {})
    with pytest.raises(ValueError, match=r"batches.key: got the shape \(1,\), expected leading axes \(1, 6\)"):
        solver.init(q.start, samplers.full().batches(split(q), jax.random.key(0), 0, 1)._replace(slot=None))
    with pytest.raises(ValueError, match=r"expected a leading axis of length 6, the number of agents"):
        d_soba(q.problem, OPTS, ring(AGENTS), same_start=False).init(q.start, batch)
    with pytest.raises(ValueError, match=r"the number of agents"):
        sent_bytes(ring(3), q.start)


def test_weights_of_a_graph():
    """A star: the centre has four neighbours, the others one."""
    star = np.zeros((5, 5))
    star[0, 1:] = star[1:, 0] = 1
    weights = metropolis(star)
    np.testing.assert_allclose(weights[0], [0.2] * 5)
    np.testing.assert_allclose(weights[1], [0.2, 0.8, 0, 0, 0])
    np.testing.assert_allclose(ring(2), [[0.5, 0.5], [0.5, 0.5]])
    np.testing.assert_allclose(ring(1), [[1.0]])
    np.testing.assert_allclose(ring(3), complete(3))
    np.testing.assert_allclose(metropolis(np.ones((4, 4), bool)), complete(4))
    assert metropolis(np.eye(40, k=1) + np.eye(40, k=-1)).shape == (40, 40)  # a long path is connected


def test_what_is_sent(q):
    """One message along every edge in either direction, of 2 dim z + dim x numbers."""
    edges = {"ring": (ring(AGENTS), 12), "complete": (complete(AGENTS), 30), "cycle": (CYCLE, 6), "alone": (np.eye(3), 0)}
    for mixing, count in edges.values():
        assert messages(mixing) == count
    solver = d_soba(q.problem, OPTS, ring(AGENTS))
    state = jax.eval_shape(solver.init, q.start, draws(q, solver, 1)[0])
    assert sent_bytes(ring(AGENTS), state.vars) == 12 * (2 * 5 + 3) * 8
    assert solver.cost.draw == solvers.soba(q.problem, OPTS).cost.draw


def test_scalar_losses_of_an_agent():
    """Agents need not have rows: their data are whatever their losses take."""
    problem = Problem(lambda z, x, a: ((z - x - a) ** 2).sum(), lambda z, x, b: (z**2).sum())
    solver = d_soba(problem, OPTS, complete(2), momentum=1.0)
    batch = Batch(inner=jnp.array([[[1.0], [3.0]]]), outer=jnp.zeros((1, 2)))
    state = solver.update(solver.init(Vars(jnp.zeros(1), None, jnp.zeros(1)), batch), batch)
    np.testing.assert_allclose(state.vars.inner, [[1.2], [1.2]])


def test_codes_and_counts_of_the_agents_are_gathered(q):
    """A double loop under gossip: the worst code of all agents, and the calls of each."""
    solver = gossip(solvers.bsa(q.problem, Vars(inner=optax.sgd(0.1), outer=optax.sgd(0.1)), rate=0.2, terms=3), ring(AGENTS))
    carry, _ = jax.jit(partial(run, solver, per_agent(samplers.uniform(1)), q.start, split(q), steps=5))(jax.random.key(1))
    inner, solve, outer = carry.state.stages
    found = spent(solver, carry.state)
    assert (found.inner_gradient == 50).all()
    np.testing.assert_array_equal(found.hessian_vector, solve.tally.calls.hessian_vector)
    assert found.hessian_vector.shape == (AGENTS,)
    broken = solve._replace(status=solve.status._replace(code=solve.status.code.at[2].set(8)))
    assert int(worst(carry.state._replace(stages=(inner, broken, outer)))) == 8
