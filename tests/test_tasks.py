"""The loop over tasks: networks of flax, dropout, all loops, transformations, parts of a model, refusals."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen, nnx
from jax.flatten_util import ravel_pytree

from bilevel_jax import Levels, Problem, Vars, run, samplers, solvers, tasks
from tests.checks import check_same
from tests.tables import distance, thinned
from tests.task_problems import (
    NETWORK,
    POINT,
    QUADRATIC,
    ROWS,
    TASKS,
    direction,
    drawn,
    mean_over_tasks,
    network,
    network_loss,
    of_head,
    opts,
    quadratics,
    task,
)

# ---- networks of flax -------------------------------------------------------------------------------------------------


class Linen(linen.Module):
    @linen.compact
    def __call__(self, images):
        hidden = linen.Conv(2, (3, 3), strides=2, param_dtype=jnp.float64, name="body")(images)
        return linen.Dense(3, param_dtype=jnp.float64, name="head")(jnp.tanh(hidden).reshape(len(images), -1))


class Nnx(nnx.Module):
    def __init__(self, rngs):
        self.body = nnx.Conv(1, 2, (3, 3), strides=2, param_dtype=jnp.float64, rngs=rngs)
        self.norm = nnx.BatchNorm(2, use_running_average=False, param_dtype=jnp.float64, rngs=rngs)
        self.head = nnx.Linear(8, 3, param_dtype=jnp.float64, rngs=rngs)

    def __call__(self, images):
        return self.head(jnp.tanh(self.norm(self.body(images))).reshape(len(images), -1))


def flax_model(kind):
    """Parameters, ``(parameters, images) -> logits``, and data of three tasks of four 4 x 4 images."""
    rng = np.random.default_rng(3)
    support, query = (
        (jnp.asarray(rng.normal(size=(3, 4, 4, 4, 1))), jnp.asarray(rng.integers(0, 3, (3, 4)), jnp.int32)) for _ in range(2)
    )
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        if kind == "linen":
            model = Linen()
            return model.init(jax.random.key(0), support[0][0]), model.apply, support, query
        graph, params, statistics = nnx.split(Nnx(nnx.Rngs(0)), nnx.Param, ...)  # not used: those of the batch are
        statistics = jax.tree.map(lambda leaf: leaf.astype(jnp.float64), statistics)
        return params, lambda params, images: nnx.merge(graph, params, statistics, copy=True)(images), support, query


def classification(apply):
    def loss(z, x, data):
        del x
        images, labels = data
        with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
            return optax.softmax_cross_entropy_with_integer_labels(apply(z, images), labels)

    return Problem(loss, loss)


@thinned("method", ["maml", "anil"], "anil")
@thinned("kind", ["linen", "nnx"], "nnx")
def test_finite_differences_on_a_convolution_network(kind, method):
    """Of the mean query loss after three inner steps that are written out, along a random direction."""
    params, apply, support, query = flax_model(kind)
    problem, flat = classification(apply), ravel_pytree(params)
    part = (lambda tree: tree) if method == "maml" else lambda tree: tasks.select(tree, of_head)
    loss = lambda z, data: problem.inner(z, None, data).mean()

    def one(vector, support, query):
        z = flat[1](vector)
        for _ in range(3):
            way = part(jax.grad(loss)(z, support))
            z = jax.tree.map(lambda a, s: a if s is None else a - 0.2 * s, z, way, is_leaf=_absent)
        return loss(z, query)

    value = jax.jit(lambda vector: jax.vmap(partial(one, vector))(support, query).mean())

    own = {} if method == "maml" else {"adapted": of_head}
    solver = getattr(solvers, method)(problem, opts(0.2), inner_steps=3, **own)
    way, _ = ravel_pytree(direction(solver, params, drawn(support, query)))
    u = jnp.asarray(np.random.default_rng(4).normal(size=way.shape))
    u = u / jnp.linalg.norm(u)
    difference = (value(flat[0] + 1e-5 * u) - value(flat[0] - 1e-5 * u)) / 2e-5
    assert float(way @ u) == pytest.approx(float(difference), rel=1e-7)
    assert abs(float(difference)) > 1e-3


def _absent(leaf):
    return leaf is None


def test_dropout_by_keys_among_the_data():
    """A task's key comes with its data: the same key gives the same step, another one another."""
    params, support, query = network()

    def loss(z, x, data):
        *rows, key = data
        kept = jax.random.bernoulli(key, 0.5, (ROWS, 5))
        return network_loss(z, x, (jnp.where(kept, rows[0], 0.0), rows[1]))

    solver = solvers.maml(Problem(loss, loss), opts())

    def way(seed):
        keys = jax.random.split(jax.random.key(seed), TASKS)
        return direction(solver, params, drawn((*support, keys), (*query, keys)))["body"]

    check_same(way(0), way(0))
    assert distance(way(0), way(1)) > 1e-3


# ---- the loop over tasks, and other transformations -------------------------------------------------------------------

MAKE = {
    "maml": solvers.maml,
    "fomaml": solvers.fomaml,
    "reptile": solvers.reptile,
    "anil": partial(solvers.anil, adapted=of_head),
    "imaml": solvers.imaml,
}
every = pytest.mark.parametrize("name", MAKE)


def made(name, inner=0.2, outer=1.0, **own):
    return MAKE[name](NETWORK, opts(inner, outer), inner_steps=3, **own)


@thinned("loop", ["map", "scan", "unrolled", "auto"], "scan")
def test_loops_agree(loop):
    """The loop changes nothing but rounding: x, the last z and the state."""
    batch, found = drawn(quadratics()), []
    for kind in ("vmap", loop):
        solver = solvers.maml(QUADRATIC, Vars(inner=optax.sgd(0.3), outer=optax.adam(0.1)), inner_steps=2, loop=kind)
        found.append(jax.jit(solver.update)(solver.init(Vars(outer=POINT), batch), batch))
    check_same(*found, tol=1e-12)
    assert distance(found[0].vars.outer, POINT) > 1e-2


@thinned("name", MAKE, "maml")
def test_scan_and_vmap_agree(name):
    params, support, query = network()
    scan, vmap = (direction(made(name, loop=loop), params, drawn(support, query)) for loop in ("scan", "vmap"))
    check_same(scan, vmap, tol=1e-12)


def test_run_on_episodes():
    """Scan and vmap over keys, and donated states, give what single updates do, in one compilation."""
    rng = np.random.default_rng(5)
    data = Levels(inner=jnp.asarray(rng.normal(size=(4, 6, 5))))
    sampler = samplers.episodes(3, ways=2, shots=2, queries=3)
    labelled = lambda z, x, d: network_loss(z, x, (d[0], d[1].astype(jnp.float64)))
    solver = solvers.anil(Problem(labelled, labelled), opts(0.2, 0.1), adapted=of_head, inner_steps=2)
    start, keys = Vars(outer=network()[0]), jax.random.split(jax.random.key(0), 2)
    ends = jax.jit(jax.vmap(lambda key: run(solver, sampler, start, data, key, steps=3)[0].state.vars.outer))(keys)
    batches = jax.jit(lambda t: sampler.batches(data, keys[1], t, 1))
    update = jax.jit(solver.update, donate_argnums=0)
    state = solver.init(start, batches(0))
    for t in range(3):
        state = update(state, batches(t))
    assert update._cache_size() == 1
    check_same(task(ends, 1), state.vars.outer, tol=1e-12)
    assert distance(ends["head"][0], ends["head"][1]) > 1e-6


@thinned("name", MAKE, "maml")
def test_dtypes_are_kept(name):
    params, support, query = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), network())
    batch = drawn(support, query)
    state = made(name).init(Vars(outer=params), batch)
    new = jax.eval_shape(made(name).update, state, batch)
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), state) == jax.tree.map(
        lambda leaf: (leaf.shape, leaf.dtype), new
    )
    assert {leaf.dtype for leaf in jax.tree.leaves(new.vars)} == {np.dtype(np.float32)}


def test_checkpoints_change_memory_alone():
    """The same meta-gradient, with fewer temporary bytes."""
    params, support, query = network()
    batch, found = drawn(*jax.tree.map(lambda leaf: jnp.concatenate([leaf] * 50, 1), (support, query))), {}
    for checkpoint in ("none", "step", "sqrt"):
        solver = solvers.maml(NETWORK, opts(0.1), inner_steps=16, checkpoint=checkpoint, loop="scan")
        state = solver.init(Vars(outer=params), batch)
        update = jax.jit(solver.update).lower(state, batch).compile()
        found[checkpoint] = update(state, batch).vars.outer, update.memory_analysis().temp_size_in_bytes
    check_same(found["none"][0], found["step"][0], tol=1e-12)
    check_same(found["none"][0], found["sqrt"][0], tol=1e-12)
    assert found["step"][1] < 0.5 * found["none"][1]


def test_inner_adam():
    """It starts anew for every task, and the derivative goes through its moments, which are written out here."""
    params, support, query = network()
    solver = solvers.maml(NETWORK, Vars(inner=optax.adam(0.05), outer=optax.sgd(1.0)), inner_steps=3)
    loss = lambda z, data: network_loss(z, None, data).mean()
    step = lambda rate, small, z, m, v: z - rate * m / (jnp.sqrt(v) + small)

    def value(params, support, query):
        z, m, v = params, *[jax.tree.map(jnp.zeros_like, params)] * 2
        for t in (1, 2, 3):
            way = jax.grad(loss)(z, support)
            m = jax.tree.map(lambda m, g: 0.9 * m + 0.1 * g, m, way)
            v = jax.tree.map(lambda v, g: 0.999 * v + 0.001 * g**2, v, way)
            unbiased = np.sqrt(1 - 0.999**t)
            z = jax.tree.map(partial(step, 0.05 * unbiased / (1 - 0.9**t), 1e-8 * unbiased), z, m, v)
        return loss(z, query)

    gradient = jax.jit(partial(jax.grad(value), params))
    check_same(direction(solver, params, drawn(support, query)), mean_over_tasks(gradient), tol=1e-9)


# ---- parts of a model -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["linen", "nnx", "list"])
def test_a_part_and_the_way_back(kind):
    tree = [jnp.ones(2), jnp.zeros(3)] if kind == "list" else flax_model(kind)[0]
    held = (lambda path: "[1]" in path) if kind == "list" else of_head
    part = tasks.select(tree, held)
    assert 0 < len(jax.tree.leaves(part)) < len(jax.tree.leaves(tree))
    check_same(tasks.merge(part, tree), tree)
    doubled = tasks.merge(jax.tree.map(lambda leaf: 2 * leaf + 1, part), tree)
    for (path, new), old in zip(jax.tree_util.tree_leaves_with_path(doubled), jax.tree.leaves(tree), strict=True):
        check_same(new, 2 * old + 1 if held(jax.tree_util.keystr(path)) else old)


@pytest.mark.parametrize(("adapted", "what"), [(lambda path: False, "none"), (lambda path: True, "all")])
def test_a_predicate_must_tell_parts_apart(adapted, what):
    solver = solvers.anil(NETWORK, opts(), adapted=adapted)
    with pytest.raises(
        ValueError, match=rf"adapted: got a predicate that holds for {what} of the leaves, expected some of \['body'\]"
    ):
        solver.init(Vars(outer=network()[0]), drawn(*network()[1:]))


# ---- refusals ---------------------------------------------------------------------------------------------------------

SGD = optax.sgd(0.1)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: solvers.maml(NETWORK, opts(), inner_steps=0), "steps: got 0"),
        (lambda: solvers.maml(NETWORK, opts(), loop="pmap"), "loop: got 'pmap', expected one of auto, vmap"),
        (lambda: solvers.maml(NETWORK, opts(), checkpoint="all"), "checkpoint: got 'all'"),
        (lambda: solvers.maml(network_loss, opts()), "problem: got the function .*, expected Problem"),
        (lambda: solvers.maml(NETWORK, Vars(outer=SGD)), "opts.inner"),
        (lambda: solvers.maml(NETWORK, Vars(SGD, SGD, SGD)), "opts.aux"),
        (lambda: solvers.imaml(NETWORK, opts(), strength=0.0), "strength: got 0.0"),
        (lambda: solvers.reptile(NETWORK, opts(), inner_steps=1.5), "steps: got 1.5"),
        (lambda: tasks.over_tasks(NETWORK, SGD), "adaptation: got Problem, expected an Adaptation"),
        (lambda: tasks.over_tasks(tasks.displacement(NETWORK, SGD, 1), None), "opt: got None"),
    ],
)
def test_refuses(call, message):
    with pytest.raises((TypeError, ValueError), match=message):
        call()


def test_refuses_draws_that_are_not_tasks():
    solver, (params, support, query) = made("maml"), network()
    with pytest.raises(ValueError, match=r"batch.outer: got 3 tasks, expected 4, as in batch.inner"):
        solver.init(Vars(outer=params), drawn(support, jax.tree.map(lambda leaf: leaf[:3], query)))
    with pytest.raises(ValueError, match=r"batch.outer: got None, expected the query data"):
        solver.init(Vars(outer=params), drawn(support)._replace(outer=None))
    with pytest.raises(ValueError, match=r"batch.inner: got leaves with leading axes"):
        solver.init(Vars(outer=params), drawn((support[0], support[1][:2]), query))


def test_cost_is_that_of_a_task():
    cost = made("maml").cost.draw
    assert (cost.inner_gradient, cost.hessian_vector, cost.cross, cost.outer_gradient) == (3, 3, 3, 1)
    assert made("fomaml").cost.draw.hessian_vector == made("reptile").cost.draw.outer_gradient == 0
    assert made("imaml").cost.draw.inner_gradient == 4
