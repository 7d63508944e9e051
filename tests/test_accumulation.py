"""Sums and running means in bfloat16: over samples, blocks, tasks, steps, agents, clients, cuts, they are those of float32.

A sum of equal terms in bfloat16 stops growing at 256 of them, and a running mean where a step is below half a unit in the last
place.  The directions here are constant, so that every sum has a known value.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax

from bilevel_jax import Batch, Levels, Problem, Vars, run, samplers, solvers
from bilevel_jax.distributed.adbo import Rates, adbo
from bilevel_jax.distributed.adbo import workers as of_workers
from bilevel_jax.distributed.cuts import values
from bilevel_jax.distributed.fednest import fednest
from bilevel_jax.distributed.gossip import complete, d_soba, mix, per_agent
from bilevel_jax.estimators import ema, page, plain, saga, sarah, storm
from bilevel_jax.hypergrad import gaussian, hypergradient, iterative
from bilevel_jax.nonsmooth import group_lasso
from bilevel_jax.optimisers import in_float32, moving_average
from bilevel_jax.oracles import mean_loss
from bilevel_jax.solvers.accelerated import _three_sequences
from bilevel_jax.types import Slot, Terms
from tests.tables import SOLVERS, aux_like, kinds

COUNT = 1024  # of samples, tasks, ...
NARROW, WIDE = jnp.bfloat16, jnp.float32
UNIT = 2.0**-8  # half a unit in the last place of bfloat16, relative


def close(found: Any, expected: Any, units: float = 2.0) -> None:
    """Two trees of one structure agree to some roundings to bfloat16."""
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(found), jax.tree.leaves(expected), strict=True):
        a, b = (np.asarray(leaf, np.float64) for leaf in (a, b))
        np.testing.assert_allclose(a, b, rtol=units * UNIT, atol=units * UNIT, err_msg=jax.tree_util.keystr(path))


class Seen(NamedTuple):
    """What `seen` keeps."""

    direction: Any


def seen() -> optax.GradientTransformation:
    """An optimiser that does not move, and keeps the last direction that it was given."""
    return optax.GradientTransformation(
        lambda params: Seen(jax.tree.map(jnp.zeros_like, params)),
        lambda updates, state, params=None: (jax.tree.map(jnp.zeros_like, updates), Seen(updates)),
    )


def problem() -> Problem:
    """Numbers without rounding in bfloat16: at z = v = 1 and x = 1/2, ``Dz = 2, Dv = 1 + 1/2, Dx = 1 + 1/2``."""
    return Problem(
        lambda z, x, a: a * (0.5 * z @ z + x @ z + 0.5 * z.sum()),
        lambda z, x, b: b * (0.5 * z @ z - 0.5 * z.sum() + 0.5 * x @ x),
    )


def start(dtype: Any) -> Vars:
    return Vars(jnp.ones(1, dtype), jnp.ones(1, dtype), jnp.full(1, 0.5, dtype))


def data(dtype: Any, count: int = COUNT) -> Levels:
    return Levels(jnp.ones(count, dtype), jnp.ones(count, dtype))


def after(name: str, dtype: Any) -> Any:
    """The variables and what the stages keep, after three updates on all the samples, none of which moves a variable."""
    solver = SOLVERS[name](problem(), Vars(*(seen() for _ in Vars._fields)))
    point = start(dtype)._replace(aux=aux_like(name, start(dtype).aux))
    state = jax.jit(lambda: run(solver, samplers.full(), point, data(dtype), jax.random.key(0), steps=3)[0].state)()
    return state.vars, [leaf for leaf in jax.tree.leaves(state.stages) if jnp.issubdtype(leaf.dtype, jnp.floating)]


@kinds("pzobo", "hjfbio", "fdehbo", "hoag")  # random directions, and differences of gradients, are others in bfloat16
def test_solvers_over_many_samples(name):
    (narrow, kept), (wide, expected) = after(name, NARROW), after(name, WIDE)
    assert {leaf.dtype for leaf in jax.tree.leaves(narrow)} == {jnp.dtype(NARROW)}
    close((narrow, kept), (wide, expected), units=8)
    assert all(bool(jnp.isfinite(leaf).all()) for leaf in kept)


def test_weighted_means_over_samples():
    """The weights of a ragged block are no numbers of bfloat16; the mean of ones is one."""
    mean, count = mean_loss(lambda z, x, a: a * z, "loss"), COUNT - 24
    weight, rows = jnp.full(count, 1 / count, WIDE), jnp.ones(count, NARROW)
    assert float(jax.jit(lambda z: mean(z, None, rows, weight))(jnp.ones((), NARROW))) == 1


# ---- over blocks, and over updates ------------------------------------------------------------------------------------

ESTIMATORS = {
    "plain": plain(),
    "ema": ema(1 / COUNT),
    "ema, schedule": ema(lambda t: 1 / COUNT),
    "saga": saga(),
    "sarah": sarah(2 * COUNT),
    "page": page(0.0),
    "storm": storm(1 / COUNT),
    "storm, schedule": storm(lambda t: 1 / COUNT),
}


def estimated(name: str, dtype: Any) -> Any:
    """The direction and the state after a pass over many blocks, whose directions grow by 1/2 along the variable."""
    estimator = ESTIMATORS[name]

    def oracle(vars: Vars, batch: Batch) -> Terms:
        del batch
        return Terms(inner=Vars(inner=jnp.where(vars.inner < 1, 0, 1).astype(dtype) + 0.5 * vars.inner))

    def batch(i: jax.Array) -> Batch:
        return Batch(i, None, jax.random.key(0), Levels(Slot(i, COUNT), None), None, Levels(i, None))

    def step(state: Any, i: jax.Array) -> tuple[Any, jax.Array]:
        vars = Vars(inner=jnp.where(i == 0, 0, 1).astype(dtype))
        way, state = estimator.update(oracle, vars, batch(i), i, state)
        return state, way.inner

    state = estimator.init(oracle, Vars(inner=jnp.zeros((), dtype)), batch(jnp.int32(0)))
    state, ways = jax.jit(partial(lax.scan, step))(state, jnp.arange(COUNT, dtype=jnp.int32))
    assert ways.dtype == dtype
    return ways[-1], [leaf for leaf in jax.tree.leaves(state) if jnp.issubdtype(leaf.dtype, jnp.floating)]


@pytest.mark.parametrize("name", ESTIMATORS)
def test_estimators_over_many_blocks_and_updates(name):
    close(estimated(name, NARROW), estimated(name, WIDE))


def kept_mean(solver: Any, sampler: samplers.Sampler, point: Vars, rows: Levels) -> tuple[Any, list[Any]]:
    """The directions and the means after many updates."""
    carry, _ = jax.jit(lambda: run(solver, sampler, point, rows, jax.random.key(0), steps=COUNT))()
    is_seen = lambda node: isinstance(node, Seen)
    found = [node for node in jax.tree.leaves(carry.state.stages, is_leaf=is_seen) if is_seen(node)]
    return found, [leaf for leaf in jax.tree.leaves(carry.state.stages) if leaf.dtype in (jnp.float32, jnp.bfloat16)]


@pytest.mark.parametrize("weight", [1 / COUNT, lambda t: 1 / COUNT], ids=["number", "schedule"])
def test_the_momentum_of_ma_soba(weight):
    """``1 - (1 - 1/n)^n`` of the direction after n updates, not the half of it."""
    way, opts = (1 - (1 - 1 / COUNT) ** COUNT) * 1.5, Vars(seen(), seen(), seen())
    agents = lambda dtype: jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), data(dtype, 4))
    for dtype in (NARROW, WIDE):
        single, _ = kept_mean(solvers.ma_soba(problem(), opts, theta=weight), samplers.full(), start(dtype), data(dtype, 4))
        many = d_soba(problem(), opts, complete(2), momentum=weight)
        several, _ = kept_mean(many, per_agent(samplers.full()), start(dtype), agents(dtype))
        assert single[2].direction.dtype == dtype
        close([node.direction for node in single], [jnp.full(1, value) for value in (2, 1.5, way)])
        close([node.direction for node in several], [jnp.full((2, 1), value) for value in (2, 1.5, way)])


@pytest.mark.parametrize(
    "make",
    [
        partial(moving_average, 1 / COUNT),
        lambda: in_float32(optax.sgd(1.0, momentum=1 - 1 / COUNT, nesterov=True)),
        lambda: in_float32(_three_sequences(1.0, 1 / COUNT)),
    ],
    ids=["moving_average", "momentum", "three sequences"],
)
def test_links_that_average(make):
    """Of a constant direction, at a parameter that stays."""
    opt = make()

    def go(dtype: Any) -> Any:
        way, params = jnp.ones(2, dtype), jnp.zeros(2, dtype)
        step = lambda state, _: opt.update(way, state, params)[::-1]
        state, ways = lax.scan(step, opt.init(params), None, length=COUNT)
        assert ways.dtype == dtype
        return ways[-1], state

    close(*(jax.jit(partial(go, dtype))() for dtype in (NARROW, WIDE)))


@pytest.mark.parametrize("wide", [np.float32, np.float64])
def test_momentum_of_weight_one_is_the_direction(wide):
    opt, ways = moving_average(lambda t: 1.0), np.random.default_rng(0).normal(size=(4, 3)).astype(wide)
    state = opt.init(jnp.zeros(3, wide))
    for way in ways:
        found, state = opt.update(jnp.asarray(way), state)
        np.testing.assert_array_equal(found, way)


# ---- over steps, tasks, directions ------------------------------------------------------------------------------------


@pytest.mark.parametrize("checkpoint", ["sqrt", "step", "none"])
def test_backward_passes_over_many_steps(checkpoint):
    """``z_n = z_0 - x n / n``: the derivative by x sums one n-th from each step."""
    linear = Problem(lambda z, x, a: (x * z).sum(), lambda z, x, b: z.sum())
    method = iterative(optax.sgd(1 / COUNT), COUNT, checkpoint=checkpoint)
    _, gradient, _ = jax.jit(lambda z, x: hypergradient(linear, method)(z, x, Batch()))(
        jnp.zeros(2, NARROW), jnp.ones(2, NARROW)
    )
    close(gradient, -jnp.ones(2))


def test_many_random_directions():
    """The estimate from the directions as they were drawn."""
    size, end = 64, lambda x: x[0] * jnp.ones(COUNT, x.dtype)
    draw = lambda key: jax.random.normal(jax.random.split(key, 1)[0], (size,), NARROW)
    us = np.asarray(jax.vmap(draw)(jax.random.split(jax.random.key(0), COUNT)), np.float64)
    _, pull = gaussian(COUNT, 1.0).at(end, jnp.zeros(size, NARROW), jax.random.key(0))
    close(pull(jnp.full(COUNT, 1 / COUNT, NARROW)), us.T @ us[:, 0] / COUNT)


@pytest.mark.parametrize(("loop", "tasks"), [("scan", COUNT), ("vmap", COUNT), ("map", COUNT), ("unrolled", 64)])
def test_many_tasks(loop, tasks):
    loss = lambda z, x, c: (z * c).sum()
    solver = solvers.maml(Problem(loss, loss), Vars(inner=optax.sgd(0.0), outer=optax.sgd(1.0)), inner_steps=1, loop=loop)
    batch = Batch(inner=jnp.ones((1, tasks, 1), NARROW), outer=jnp.ones((1, tasks, 1), NARROW))
    state = solver.init(Vars(outer=jnp.zeros(1, NARROW)), batch)
    assert jax.jit(solver.update)(state, batch).vars.outer.tolist() == [-1]


# ---- over agents, clients, workers and cuts ---------------------------------------------------------------------------


def test_many_agents():
    found = jax.jit(partial(mix, complete(COUNT)))(jnp.ones((COUNT, 2), NARROW))
    close(found, jnp.ones((COUNT, 2)), units=1)


@pytest.mark.parametrize(("clients", "local_steps"), [(COUNT, 2), (2, COUNT)])
@pytest.mark.parametrize("corrected", [True, False])
def test_many_clients_and_local_steps(clients, local_steps, corrected):
    """All of them alike, each local step below half a unit in the last place of the variables."""
    loss = lambda z, x, a: a * (z.sum() + x.sum())

    def go(dtype: Any) -> Vars:
        solver = fednest(
            Problem(lambda z, x, a: loss(z, x, a) + 0.25 * z @ z, loss),
            inner_rate=0.25 / local_steps,
            outer_rate=0.25 / local_steps,
            neumann_rate=0.5,
            neumann_terms=3,
            random_terms=False,
            local_steps=local_steps,
            corrected=corrected,
        )
        rows = jax.tree.map(lambda leaf: leaf.reshape(clients, 1), data(dtype, clients))
        point = Vars(jnp.ones(2, dtype), None, jnp.ones(2, dtype))
        return jax.jit(lambda: run(solver, samplers.full(), point, rows, jax.random.key(0), steps=1)[0].state.vars)()

    narrow, wide = go(NARROW), go(WIDE)
    close(narrow, wide, units=3)
    assert abs(float(wide.outer[0]) - 0.75) < 1e-3


def test_many_workers_and_cuts():
    """One step of a master: sums over as many workers, cuts and numbers as there may be."""

    def go(dtype: Any, workers: int, cuts: int, size: int) -> Any:
        zeros = jnp.zeros(size, dtype)
        loss = Problem(lambda z, x, b: z.sum() + x.sum(), lambda z, x, a: z.sum() + x.sum())
        rates = Rates(*(1 / 4,) * 6, *(1 / 4,) * 3)
        method = adbo(loss, Vars(zeros, None, zeros), rates, n_workers=workers, max_cuts=cuts)
        one = jax.tree.map(lambda leaf: jnp.ones_like(leaf) if leaf.dtype == dtype else leaf, method.init())
        held = one._replace(cuts=one.cuts._replace(live=jnp.ones(cuts, bool)))
        moved = method.update(held, jnp.ones(workers, bool))
        worker = jax.vmap(lambda w: method.work(w, Batch()).inner)
        left = values(held.cuts, held.consensus_outer, held.consensus_inner, held.inner, held.alive)
        return moved.consensus_outer, moved.consensus_inner, left, worker(of_workers(held)._replace(cut_inner=held.cuts.inner))

    for sizes in ((COUNT, 2, 1), (2, COUNT, 1), (2, 2, COUNT)):
        close(*(jax.jit(partial(go, dtype, *sizes))() for dtype in (NARROW, WIDE)))


def test_many_coordinates_of_a_group():
    """``|z| = 32`` of 1,024 ones; the prox at half of it halves them."""
    term, z = group_lasso(np.zeros(COUNT, int)), jnp.ones(COUNT, NARROW)
    assert float(term.value(z, None)) == 32
    assert set(term.prox(z, 16.0, None).tolist()) == {0.5}
