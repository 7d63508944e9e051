"""Projections and proximal steps as links of a chain."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from bilevel_jax import Problem, Vars, run, samplers, solvers
from bilevel_jax.projections import project, prox
from bilevel_jax.testing import Quadratic
from tests.checks import check_same
from tests.tables import STEPS, small, thinned


def box(tree):
    return jax.tree.map(lambda leaf: jnp.clip(leaf, -0.25, 0.5), tree)


def soft(tree, step):
    return jax.tree.map(lambda leaf: jnp.sign(leaf) * jnp.maximum(jnp.abs(leaf) - step, 0), tree)


def apply(opt, params, grads, times=1):
    state = opt.init(params)
    with jax.numpy_dtype_promotion("standard"):  # as sweeps call optax
        for _ in range(times):
            updates, state = opt.update(grads, state, params)
            params = optax.apply_updates(params, updates)
    return params, state


@thinned("dtype", ["float32", "float64", "bfloat16"], "bfloat16")
def test_projected_step_lands_on_the_projection(dtype):
    params = {"a": jnp.asarray([0.0, 0.4], dtype), "b": [jnp.asarray(0.125, dtype)]}
    grads = {"a": jnp.asarray([1.0, -1.0], dtype), "b": [jnp.asarray(-0.125, dtype)]}
    moved, _ = apply(optax.chain(optax.sgd(1.0), project(box)), params, grads)
    check_same(moved, {"a": jnp.asarray([-0.25, 0.5], dtype), "b": [jnp.asarray(0.25, dtype)]}, tol=1e-2)
    free, _ = apply(optax.chain(optax.sgd(1.0), project(lambda tree: tree)), params, grads)
    check_same(free, apply(optax.sgd(1.0), params, grads)[0])


@thinned("dtype", ["float32", "float64", "bfloat16"], "bfloat16")
def test_proximal_step_is_that_of_the_gradient_step(dtype):
    params, grads = jnp.asarray([1.0, -0.25, 0.5], dtype), jnp.asarray([0.5, 0.0, 2.0], dtype)
    moved, state = apply(optax.chain(optax.sgd(0.5), prox(soft, 0.25)), params, grads)
    check_same(moved, jnp.asarray([0.5, 0.0, -0.25], dtype))
    assert int(state[-1].steps) == 1


def test_proximal_step_sizes_may_be_a_schedule():
    seen = [apply(prox(soft, lambda t: 0.5 / (t + 1)), jnp.array([2.0]), jnp.zeros(1), times=n)[0][0] for n in (1, 2, 3)]
    np.testing.assert_allclose(seen, [1.5, 1.25, 1.25 - 0.5 / 3], rtol=1e-12)


@pytest.mark.parametrize(
    ("operator", "given"),
    [
        (lambda x: x[:1], "shape=(1,)"),
        (lambda x: x.astype(jnp.float32), "float32"),
        (lambda x: {"a": x}, "'a'"),
    ],
)
def test_operators_must_keep_shapes(operator, given):
    params = jnp.ones(2)
    for link in (project(operator), prox(lambda x, s: operator(x), 0.1)):
        with pytest.raises(ValueError, match=r"(?s)operator.*expected") as info:
            link.update(params, link.init(params), params)
        assert given in str(info.value)


def test_the_iterate_is_needed():
    for link in (project(box), prox(soft, 0.1)):
        with pytest.raises(ValueError, match=r"params.*None.*expected the current iterate"):
            link.update(jnp.ones(2), link.init(jnp.ones(2)))


def solve(q: Quadratic, problem: Problem, outer) -> Vars:
    opts = Vars(optax.sgd(STEPS.inner), optax.sgd(STEPS.aux), outer)
    go = jax.jit(lambda key: run(solvers.saba(problem, opts), samplers.uniform(8), q.start, q.data, key, steps=3000))
    return go(jax.random.key(0))[0].state.vars


def test_projected_saba_solves_the_constrained_problem():
    """x stays in the box, some faces of which are active, and solves the variational inequality there."""
    q = small()
    assert float(jnp.abs(q.solution.outer - box(q.solution.outer)).max()) > 1e-2, "the box should matter"
    x = solve(q, q.problem, optax.chain(optax.sgd(STEPS.outer), project(box))).outer
    check_same(box(x), x)
    check_same(box(x - q.gradient(x)), x, tol=1e-9)
    assert float(jnp.abs(q.gradient(x)).max()) > 1e-2


@pytest.mark.more
def test_proximal_saba_solves_the_penalised_problem():
    """min h(x) + 0.3 |x|_1: the gradient is -0.3 sign(x) where x is not zero, and at most 0.3 where it is."""
    q = small()
    x = solve(q, q.problem, optax.chain(optax.sgd(STEPS.outer), prox(lambda u, s: soft(u, 0.3 * s), STEPS.outer))).outer
    check_same(soft(x - q.gradient(x), 0.3), x, tol=1e-9)
    assert float(jnp.abs(q.gradient(x)).max()) > 1e-2
