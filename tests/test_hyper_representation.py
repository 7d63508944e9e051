"""Hyper-representation: the problem, the estimates of the hypergradient, and the experiment itself on small sizes."""

import jax
import numpy as np
import optax
import pandas as pd
import pytest

from bilevel_jax import Vars, begin, hypergrad, resume, samplers, solvers, sweep, unroll
from experiments import hyper_representation as hyper
from experiments.hyper_representation import Config, Setting
from tests.tables import thinned

SMALL = Setting((3, 4), 12, 0.1, 0.05, 5, 0.05, 1e-4)


@pytest.fixture(scope="module")
def made():
    """A linear problem of 3 x 4 representations: (problem, data, start, gradient of the outer loss after the inner steps)."""
    problem = hyper.regression(SMALL.ridge)
    data, start = hyper.draw(SMALL, jax.random.key(0))
    value = jax.jit(lambda x: hyper.measure(problem, SMALL, data, start.inner, x)["outer_loss"])
    return problem, data, start, jax.jit(jax.grad(value))(start.outer)[0]


def directions(solver, made, keys=1):
    """``-dx`` of the first update of a solver whose optimiser of x is ``sgd(1)``, for some keys: [keys, 3, 4]."""
    _, data, start, _ = made

    @jax.jit
    @jax.vmap
    def first(key):
        carry = begin(solver, samplers.full(), start, data, key)
        return start.outer[0] - resume(solver, samplers.full(), carry, data, steps=1)[0].state.vars.outer[0]

    return first(jax.random.split(jax.random.key(1), keys))


def opts():
    return Vars(inner=optax.sgd(SMALL.inner_rate), outer=optax.sgd(1.0))


def test_layers():
    x, rows = [np.ones((2, 3)), np.full((3, 2), -1.0)], np.array([[1.0, -1.0], [2.0, 0.0]])
    np.testing.assert_allclose(hyper.features(x[:1], rows), [[0, 0, 0], [2, 2, 2]])

    def sigmoid(a):
        return 1 / (1 + np.exp(-a))

    np.testing.assert_allclose(hyper.features(x, rows), sigmoid(-3 * sigmoid(np.array([[0, 0], [2, 2]]))))


@pytest.mark.more
def test_targets_are_made_by_features(made):
    _, data, start, _ = made
    assert start.outer[0].shape == (3, 4)
    assert start.inner.shape == (4,)
    for rows, targets in data:
        coefficients, residual, *_ = np.linalg.lstsq(np.asarray(rows), np.asarray(targets))
        assert 1e-3 < residual[0] / len(targets) < 0.03  # noise .1
        assert np.abs(coefficients).max() > 0.3


def test_exact_inner_solution(made):
    problem, data, start, _ = made
    found = hyper.measure(problem, SMALL, data, start.inner, start.outer)["exact_outer_loss"]
    long = SMALL._replace(inner_rate=0.3, inner_steps=2_000)
    assert found == pytest.approx(float(hyper.measure(problem, long, data, start.inner, start.outer)["outer_loss"]), rel=1e-9)


def test_unrolled_is_the_gradient(made):
    np.testing.assert_allclose(directions(solvers.itd_bio(made[0], opts(), inner_steps=5), made)[0], made[3], rtol=1e-10)


@pytest.mark.more
def test_hozog_is_unbiased(made):
    got = directions(hyper.hozog(made[0], opts(), inner_steps=5, radius=1e-4), made, keys=4000)
    error, spread = got.mean(0) - made[3], got.std(0) / 4000**0.5
    assert (np.abs(error) < 4 * spread).all()
    assert (spread < 0.1 * np.abs(made[3]).max()).all()


@pytest.mark.more
def test_unit_directions_shrink_the_estimate(made):
    """The part of the estimate that goes through the inner steps is divided by the dimension; the direct part is not."""
    problem = made[0]
    first_order, whole, shrunk = (
        directions(sweep(unroll(problem, opts(), 5, truncate=0, jacobian=j, fresh=False)), made)[0]
        for j in (hypergrad.reverse, hypergrad.gaussian(1, 1e-4), hyper.shrunk(hypergrad.gaussian(1, 1e-4)))
    )
    np.testing.assert_allclose((whole - first_order) / 12, shrunk - first_order, rtol=1e-7)
    assert np.abs(whole - first_order).max() > 1e-2


@pytest.mark.more
def test_restarts(made):
    """z is what the inner steps make of its start, not of the last z."""
    problem, data, start, _ = made
    solver = hyper.restarted(hyper.build("aid_cg", problem, Config(inner_steps=5)), start.inner)
    carry = begin(solver, samplers.full(), start, data, jax.random.key(0))
    advance = jax.jit(lambda c: resume(solver, samplers.full(), c, data, steps=1)[0])
    one = advance(carry)
    two = advance(one)
    z, rate = start.inner, hyper.SETTINGS["linear"].inner_rate
    for _ in range(5):
        z = z - rate * jax.grad(lambda z: problem.inner(z, one.state.vars.outer, data.inner).mean())(z)
    np.testing.assert_allclose(two.state.vars.inner, z, rtol=1e-10)
    assert np.abs(two.state.vars.inner - one.state.vars.inner).max() > 1e-4


@pytest.mark.more
def test_experiment(monkeypatch, tmp_path):
    monkeypatch.setitem(hyper.SETTINGS, "linear", SMALL)
    with jax.enable_x64(False), jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        hyper.main(Config(solvers=("itd_bio",), updates=20, evaluations=2, seeds=2, out=tmp_path / "run"))
    table = pd.read_csv(tmp_path / "run" / "history.csv")
    assert table.groupby(["solver", "seed"])["step"].apply(list).tolist() == [[0, 10, 20]] * 2
    ends = table.groupby(["solver", "seed"])["outer_loss"].agg(["first", "last"])
    assert (ends["last"] < ends["first"]).all()
    assert ends["first"].nunique() == 2  # the seeds have data of their own
    assert (tmp_path / "run" / "figure.png").exists()


@thinned("name", ["pzobo", "pzobo_unit", "fo_itd_bio", "aid_fp", "aid_cg"], "pzobo", "aid_cg")
def test_every_method_builds(made, name):
    problem, data, start, _ = made
    solver = hyper.restarted(hyper.build(name, problem, Config(inner_steps=2)), start.inner)
    carry = jax.eval_shape(
        lambda d: resume(solver, samplers.full(), begin(solver, samplers.full(), start, d, jax.random.key(0)), d, steps=2)[0],
        data,
    )
    shapes = lambda tree: jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), tree)
    assert shapes(carry.state.vars.outer) == shapes(start.outer)
    assert shapes(carry.state.vars.inner) == shapes(start.inner)


@pytest.mark.parametrize(("changes", "message"), [({"seeds": 0}, "--seeds: got 0"), ({"solvers": ()}, "--solvers: got none")])
def test_bad_options(changes, message):
    with pytest.raises(SystemExit, match=message):
        Config(**changes)
