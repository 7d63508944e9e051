"""Losses in bfloat16: what stays float32, how large the errors are, and what is refused."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bilevel_jax import Batch, Problem, Result, Vars, hypergradient, implicit, linear_solve, run, samplers, testing
from bilevel_jax.estimators import total
from bilevel_jax.hypergrad import implicit as by_linear_solve
from bilevel_jax.precision import CHUNK, in_bfloat16
from tests.tables import build, thinned

UNIT = 2.0**-8  # half the distance from 1 to the next number of bfloat16


@cache
def quadratic():
    return testing.quadratic(jax.random.key(0), inner_dim=5, outer_dim=3, condition=4.0)


def relative(got, expected):
    flat = lambda tree: jnp.concatenate([leaf.ravel() for leaf in jax.tree.leaves(tree)])
    return float(jnp.linalg.norm(flat(got) - flat(expected)) / jnp.linalg.norm(flat(expected)))


@thinned("name", ["saba", "srba", "aid_bio", "itd_bio"], "saba")
def test_state_keeps_its_dtypes_and_values_to_bfloat16(name):
    """The structure and dtypes of the whole state are those of the float32 problem; the iterates differ, by rounding only."""
    q = quadratic()

    def after(problem):
        solver = build(name, problem)
        go = jax.jit(lambda start: run(solver, samplers.uniform(8), start, q.data, jax.random.key(1), steps=8)[0])
        return go(q.start)

    narrow, wide = after(in_bfloat16(q.problem)), after(q.problem)
    kinds = lambda tree: jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), tree)
    assert kinds(narrow) == kinds(wide)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(narrow.state.vars))
    error = relative(narrow.state.vars, wide.state.vars)
    assert UNIT / 100 < error < 8 * UNIT


def test_directions_and_hypergradient_are_those_of_float32_to_rounding():
    q, batch = quadratic(), Batch(*quadratic().data)
    point = jax.tree.map(lambda leaf: leaf + 0.5, q.at(q.start.outer))

    def directions(problem):
        return jax.jit(lambda point: total(implicit(problem).terms(point, batch, jnp.int32(0))))(point)

    for got, expected in zip(directions(in_bfloat16(q.problem)), directions(q.problem), strict=True):
        assert got.dtype == jnp.float32
        assert UNIT / 100 < relative(got, expected) < 4 * UNIT

    at = q.at(q.start.outer)
    solve = jax.jit(hypergradient(in_bfloat16(q.problem), by_linear_solve(linear_solve.cg(max_steps=50))))
    _, gradient, stats = solve(at.inner, at.outer, batch)
    assert gradient.dtype == jnp.float32
    assert UNIT / 100 < relative(gradient, q.gradient(at.outer)) < 4 * UNIT
    assert int(stats.code) == Result.STAGNATION


def many(rows):
    """A term that enters every sample whole: its derivative is a sum of equal terms, which bfloat16 cannot take."""

    def loss(z, x, a):
        return a * z.sum() + 0.5 * x * (z**2).sum()

    data = 1 + 0.1 * jnp.cos(jnp.arange(rows, dtype=jnp.float32))
    return Problem(loss, loss), data, jnp.asarray([1.0, 2.0, 3.0], jnp.float32), jnp.ones((), jnp.float32)


@thinned("rows", [CHUNK - 1, CHUNK, CHUNK + 1, 400 * CHUNK], CHUNK + 1)
def test_sums_over_rows_are_taken_in_float32(rows):
    """Gradient, Hessian-vector product and cross product, in both modes."""
    problem, data, z, x = many(rows)
    narrow, batch = in_bfloat16(problem), Batch(data, data)
    np.testing.assert_allclose(narrow.inner(z, x, data), problem.inner(z, x, data), rtol=4 * UNIT)
    for mode in ("reverse", "forward"):
        oracles = [implicit(p, mode=mode) for p in (narrow, problem)]
        found, expected = (jax.jit(o.terms)(Vars(z, z, x), batch, jnp.int32(0)) for o in oracles)
        for got, exact in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
            assert relative(got, exact) < 8 * UNIT


def test_without_chunks_the_sums_are_wrong():
    """What the chunks are for: a plain cast loses most of the sum."""
    problem, data, z, x = many(400 * CHUNK)
    cast = lambda tree: jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), tree)
    plain = jax.jit(jax.grad(lambda z: problem.inner(*cast((z, x, data))).astype(jnp.float32).mean()))(z)
    exact = jax.grad(lambda z: problem.inner(z, x, data).mean())(z)
    assert relative(plain, exact) > 0.1


def test_integer_data_are_left_as_they_are():
    """A row number beyond 256 does not fit into bfloat16."""
    problem = in_bfloat16(Problem(lambda z, x, d: z[d[1]] * d[0], lambda z, x, d: z[d[1]]))
    rows = jnp.arange(300, dtype=jnp.int32)
    slope = jax.jit(jax.grad(lambda z: problem.inner(z, z, (jnp.ones(300, jnp.float32), rows))[257]))(
        jnp.ones(300, jnp.float32)
    )
    np.testing.assert_array_equal(jnp.flatnonzero(slope), [257])


def test_losses_without_data_may_be_scalar():
    problem = in_bfloat16(Problem(lambda z, x, d: z**2, lambda z, x, d: z**2))
    assert problem.outer(jnp.float32(3), None, None) == 9


@pytest.mark.parametrize(
    ("loss", "z", "data", "error", "match"),
    [
        (lambda z, x, a: ((z - a) ** 2).mean(), np.float32(1), np.ones(3, np.float32), ValueError, "one value a sample"),
        (lambda z, x, a: (z - a) ** 2, np.float64(1), np.ones(3, np.float32), TypeError, r"float64\[\], expected float32"),
        (lambda z, x, a: (z - a) ** 2, jnp.bfloat16(1), np.ones(3, np.float32), TypeError, r"bfloat16\[\], expected float32"),
        (
            lambda z, x, a: (z - a[0]) ** 2,
            np.float32(1),
            (np.ones(3, np.float32), np.ones(2, np.float32)),
            ValueError,
            "one common number of samples",
        ),
    ],
    ids=["scalar loss", "float64", "bfloat16", "no common rows"],
)
def test_refuses(loss, z, data, error, match):
    problem = in_bfloat16(Problem(loss, loss))
    with pytest.raises(error, match=match):
        problem.inner(jnp.asarray(z), jnp.float32(1), jax.tree.map(jnp.asarray, data))


def test_refuses_what_is_no_problem():
    with pytest.raises(TypeError, match="problem: got the function"):
        in_bfloat16(lambda z, x, d: z)
