"""The quadratic against itself and finite differences, the oracle against formulas, every solver against NumPy."""

from functools import partial
from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax

from bilevel_jax import Batch, Levels, Problem, Vars, implicit, samplers
from bilevel_jax.estimators import total
from bilevel_jax.samplers import Plan
from tests import references
from tests.checks import (
    ZERO,
    check_formulas,
    check_golden,
    check_mean_over_blocks,
    check_same,
    check_solution,
    coins,
    decay,
    hand,
    points,
    rows_of,
    whole,
)
from tests.tables import SOLVERS, STEPS, aux_like, distance, kinds, small, small_stream, tiny

both_modes = pytest.mark.parametrize("mode", ["reverse", "forward"])


def test_solution_solves_both_levels():
    """Against NumPy, from the samples alone."""
    q = small()
    g, f = ({name: leaf.mean(0) for name, leaf in part.items()} for part in rows_of(q))
    for x in (np.asarray(p.outer) for p in points(q)):
        z, v, _ = map(np.asarray, q.at(jnp.asarray(x)))
        np.testing.assert_allclose(references.inner_terms(g, z, v, x)[0], 0.0, atol=1e-12)
        fz, fx = references.outer_terms(f, z, x)
        np.testing.assert_allclose(g["A"] @ v + fz, 0.0, atol=1e-12)
        np.testing.assert_allclose(q.gradient(jnp.asarray(x)), fx + g["C"] @ v, atol=1e-12)
    assert distance(q.gradient(q.solution.outer), jnp.zeros(3)) < 1e-12
    assert distance(q.solution, q.at(q.solution.outer)) == 0


def test_gradient_is_that_of_the_value():
    q = small()
    for x in (p.outer for p in points(q)):
        assert distance(jax.grad(q.value)(x), q.gradient(x)) < 1e-11
        h, eye = 1e-5, jnp.eye(3)
        slopes = jnp.stack([(q.value(x + h * e) - q.value(x - h * e)) / (2 * h) for e in eye])
        assert distance(slopes, q.gradient(x)) < 1e-8
        mean = q.problem.outer(q.at(x).inner, x, q.data.outer).mean()
        assert distance(q.value(x), mean) < 1e-12


def test_metrics_vanish_at_the_solution_only():
    q = small()
    at, away = q.metrics(q.solution), q.metrics(q.start)
    assert all(abs(float(value)) < 1e-12 for value in at.values())
    assert all(float(value) > 1e-3 for value in away.values())
    assert float(q.metrics(q.start._replace(aux=None))["aux_error"]) == 0


def test_noise_is_on_the_matrices_and_has_zero_mean():
    q = small()
    for part in q.data:
        for leaf in part.values():
            assert float(jnp.abs(leaf - leaf.mean(0, keepdims=True)).max()) > 1e-2
    np.testing.assert_allclose(np.linalg.eigvalsh(rows_of(q)[0]["A"].mean(0))[[0, -1]], [0.2, 1.0], rtol=1e-10)


@both_modes
def test_oracle_at_the_solution(mode):
    q = small()
    check_solution(implicit(q.problem, mode=mode), q)


@both_modes
def test_oracle_against_formulas(mode):
    q = small()
    check_formulas(implicit(q.problem, mode=mode), q)


def entangled() -> tuple[Problem, Vars, Batch]:
    """A problem that is quadratic in nothing, on nested trees: the Hessian depends on z and x."""

    def inner(z, x, a):
        joined = jnp.concatenate([z["a"], z["b"]["c"].ravel()])
        return jnp.sum(jnp.log(jnp.cosh(a * joined[None])), axis=1) * jnp.exp(x["s"]) + jnp.sum(joined**4) * jnp.sum(
            x["t"] ** 2
        )

    def outer(z, x, b):
        return jnp.sin(b @ z["a"]) * x["t"][0] + jnp.exp(-x["s"]) * jnp.sum(z["b"]["c"] ** 3)

    rng = np.random.default_rng(1)
    draw = jax.tree.map(
        lambda shape: jnp.asarray(rng.normal(size=shape)),
        ({"a": (2,), "b": {"c": (2, 2)}}, {"a": (2,), "b": {"c": (2, 2)}}, {"s": (), "t": (3,)}, (7, 6), (4, 2)),
        is_leaf=lambda node: isinstance(node, tuple) and all(isinstance(n, int) for n in node),
    )
    z, v, x, a, b = draw
    return Problem(inner, outer), Vars(z, v, x), Batch(inner=a, outer=b)


@both_modes
def test_oracle_against_dense_derivatives(mode):
    """Hessian and cross derivative written out as matrices, of a problem far from quadratic, on trees."""
    problem, vars, batch = entangled()
    terms = jax.jit(implicit(problem, mode=mode).terms)(vars, batch, ZERO)
    flat = [jax.flatten_util.ravel_pytree(part) for part in vars]
    (z, to_z), (v, _), (x, to_x) = flat

    def g(z, x):
        return problem.inner(to_z(z), to_x(x), batch.inner).mean()

    def f(z, x):
        return problem.outer(to_z(z), to_x(x), batch.outer).mean()

    @jax.jit
    def dense(z, v, x):
        hessian, cross = jax.hessian(g)(z, x), jax.jacobian(jax.grad(g, argnums=1))(z, x)
        return [jax.grad(g)(z, x), hessian @ v, cross @ v, *jax.grad(f, argnums=(0, 1))(z, x)]

    expected = dense(z, v, x)
    found = [jax.flatten_util.ravel_pytree(t)[0] for t in (*terms.inner, terms.outer.aux, terms.outer.outer)]
    for got, value in zip(found, expected, strict=True):
        np.testing.assert_allclose(got, value, rtol=1e-11, atol=1e-11)


def test_modes_agree():
    problem, vars, batch = entangled()
    check_same(*(jax.jit(implicit(problem, mode=m).terms)(vars, batch, ZERO) for m in ("reverse", "forward")), tol=1e-12)


def test_inner_stage_needs_neither_outer_data_nor_aux():
    problem, vars, batch = entangled()
    terms = jax.jit(implicit(problem).terms)
    both = terms(vars, batch, ZERO).inner.inner
    for other, without in ((vars._replace(aux=None), batch), (vars, batch._replace(outer=None))):
        alone = terms(other, without, ZERO)
        check_same(alone.inner.inner, both, tol=1e-13)
        assert jax.tree.leaves(alone._replace(inner=alone.inner._replace(inner=None))) == []


#: Outer losses that depend on x, each through something that hides it.
HIDDEN = {
    "jit": lambda z, x, b: jax.jit(lambda u: u**2)(x).sum() + (z * b).sum(),
    "passed on": lambda z, x, b: x[0],
    "cond": lambda z, x, b: lax.cond(b[0] > -9, lambda u: u.sum(), lambda u: 0.0 * u.sum(), x),
    "scan": lambda z, x, b: lax.scan(lambda c, u: (c + u, None), z[0], x)[0],
    "custom rule": lambda z, x, b: jax.nn.relu(x + 9.0).sum(),
    "index": lambda z, x, b: x[jnp.argmin(b[:2])] * z[0],
    "z first": lambda z, x, b: (z[:2] * x).sum(),
}


@pytest.mark.parametrize("how", HIDDEN)
def test_outer_term_of_x_is_never_dropped_where_it_is_needed(how):
    problem = Problem(lambda z, x, a: (z**2).sum() + z[0] * x.sum(), HIDDEN[how])
    z, v, x, b = np.arange(1.0, 4.0), np.ones(3), np.array([0.5, 2.0]), np.array([1.0, 2.0, 0.5])
    terms = jax.eval_shape(lambda: implicit(problem).terms(Vars(z, v, x), Batch(inner=jnp.zeros(1), outer=b), ZERO))
    assert terms.outer.outer is not None
    assert terms.outer.outer.shape == x.shape


def test_outer_term_of_x_is_dropped_where_it_is_zero_by_structure():
    problem = Problem(lambda z, x, a: (z**2).sum() + z[0] * x.sum(), lambda z, x, b: ((z - b) ** 2).sum())
    vars = Vars(jnp.ones(3), jnp.ones(3), jnp.ones(2))
    terms = jax.jit(implicit(problem).terms)(vars, Batch(inner=jnp.zeros(1), outer=jnp.zeros(3)), ZERO)
    assert terms.outer.outer is None
    check_same(total(terms).outer, jnp.ones(2))


@pytest.mark.parametrize(
    ("mode", "sizes", "counts"),
    [("reverse", (12, 9), (3, 4)), ("forward", (8, 31), (4, 2))],
)
def test_mean_over_blocks_is_the_full_direction(mode, sizes, counts):
    q = small()
    sampler = samplers.uniform(sizes[0], outer_batch_size=sizes[1])
    check_mean_over_blocks(implicit(q.problem, mode=mode), sampler, q, counts)


def test_mean_over_blocks_when_the_rest_is_dropped():
    """The problem is then that of the rows that are kept, for scalar losses, too."""
    q = small()
    scalar = Problem(*(lambda z, x, s, loss=loss: loss(z, x, s).mean() for loss in q.problem))
    sampler = samplers.uniform(12, outer_batch_size=9, remainder="drop")
    kept = sampler.whole(q.data)
    assert (len(kept.inner["A"]), len(kept.outer["B"])) == (24, 27)
    check_mean_over_blocks(implicit(scalar), sampler, q, (2, 3))


@settings(max_examples=8)
@given(st.integers(1, 9).flatmap(lambda n: st.tuples(st.just(n), st.integers(1, n))))
def test_weights_make_any_batch_size_exact(shape):
    n, size = shape
    problem = Problem(lambda z, x, a: a * z**2 + x * z, lambda z, x, b: (b * z - x) ** 2)
    rows, sampler, oracle = jnp.asarray(np.cos(np.arange(n))), samplers.uniform(size, outer_batch_size=n), implicit(problem)

    @jax.jit
    def gap(rows, one):
        def at_block(i):
            batch = sampler.gather(Levels(rows, rows), Plan(Levels(i, jnp.int32(0)), jax.random.key(0)))
            return total(oracle.terms(Vars(one, one, one), batch, ZERO))

        every = lax.map(at_block, jnp.arange(-(-n // size), dtype=jnp.int32))
        full = total(oracle.terms(Vars(one, one, one), Batch(inner=rows, outer=rows), ZERO))
        return jnp.stack([abs(a.mean() - b) for a, b in zip(every, full, strict=True)]).max()

    assert float(gap(rows, jnp.asarray(np.float64(1.5)))) < 1e-13


@kinds(also=("fsla", "stocbio", "aid_fp", "sustain", "stable", "iaptt"))  # whose faults test_sabotage.py makes
def test_golden_trajectory(name):
    """Twenty steps with decaying step sizes on ragged blocks, the state donated."""
    q = small()
    solver = SOLVERS[name](q.problem, Vars(*(decay(step, library=True) for step in STEPS)))
    batches = small_stream(solver.draws)
    inner = [int(i) for b in batches for i in b.slot.inner.index]
    assert any(a == b for a, b in pairwise(inner)), "no index repeats: choose another seed"
    update = jax.jit(solver.update, donate_argnums=0)
    start = q.start._replace(aux=aux_like(name, q.start.aux))
    check_golden(update, solver.init(start, batches[0]), batches, name, q)


def test_coin_of_page():
    """The coin falls as often as it should, apart from the first update, which always refreshes."""
    keys = jax.random.split(jax.random.key(5), 4000)
    flips = partial(coins, keys=keys)
    for probability in (0.0, 0.3, 1.0):
        found = flips(probability)
        assert found[0]
        spread = (probability * (1 - probability) / 4000) ** 0.5
        assert abs(found[1:].mean() - probability) <= 4 * spread


def test_batch_of_whole_equals_full():
    q, terms = tiny(), jax.jit(implicit(tiny().problem).terms)
    batch = samplers.full().gather(q.data, hand(0, 0))
    check_same(terms(q.start, batch, ZERO), terms(q.start, whole(q), ZERO))
