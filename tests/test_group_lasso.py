"""The group lasso experiment: data, inner solutions against certificates, derivatives, searches, and all of it when small."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
import pytest
from sklearn.linear_model import Lasso

from bilevel_jax import Levels
from experiments import group_lasso
from experiments import lasso_search as search
from experiments.group_lasso import Config
from tests.tables import thinned

SMALL = 60  # three groups


@pytest.fixture(scope="module")
def split():
    return search.draw(SMALL, 1, seed=0)


@functools.cache
def compiled(sparse):
    return group_lasso.programs(Config(updates=500, penalty="sparse_group" if sparse else "group"), SMALL)


def solved(split, x, sparse=False, start=None):
    """The inner solution to 1e-9."""
    start = jnp.zeros(SMALL) if start is None else start
    return compiled(sparse).solve(split.train, jnp.asarray(x), start, search.smoothness(split.train[0]), jnp.asarray(1e-9))


def test_data(split):
    for rows, targets in split:
        assert rows.shape == (search.ROWS, SMALL)
        found, *_ = np.linalg.lstsq(np.asarray(rows), np.asarray(targets))
        assert np.abs(found - np.r_[1:6, np.zeros(SMALL - 5)]).max() < 3  # noise 3.7
    rows, targets = (np.concatenate(part) for part in zip(*split, strict=True))
    signal = rows[:, :5] @ np.arange(1, 6)
    assert np.linalg.norm(targets - signal) == pytest.approx(np.linalg.norm(signal) / 2)
    again, other = search.draw(SMALL, 1, seed=0), search.draw(SMALL, 1, seed=1)
    np.testing.assert_array_equal(again.test[1], split.test[1])
    assert np.abs(other.test[0] - split.test[0]).max() > 1


def test_blocks():
    rows, targets = (np.concatenate(part) for part in zip(*search.draw(SMALL, 3, seed=0), strict=True))
    signal = rows.reshape(-1, 3, 20)[:, :, :5].sum(1) @ np.arange(1, 6)
    assert np.linalg.norm(targets - signal) == pytest.approx(np.linalg.norm(signal) / 2)


@thinned("sparse", [False, True], True)
def test_inner_solution(split, sparse):
    """The conditions of optimality, group by group: some are 0, some are not."""
    x = search.highest(split.train, sparse) * jnp.asarray([0.1, 0.3, 0.02, 0.15][: 3 + sparse])
    z, calls, residual = solved(split, x, sparse)
    assert 10 < calls < 1000
    assert residual <= 1e-9
    rows, targets = map(np.asarray, split.train)
    z, push = np.asarray(z), rows.T @ (targets - rows @ z) / len(rows)
    single = float(x[-1]) if sparse else 0.0
    alive = 0
    for j, weight in enumerate(np.asarray(x[:3])):
        part, force = (a[20 * j : 20 * (j + 1)] for a in (z, push))
        left = np.where(part != 0, force - single * np.sign(part), np.sign(force) * np.maximum(np.abs(force) - single, 0))
        if part.any():
            alive += 1
            np.testing.assert_allclose(left, weight * part / np.linalg.norm(part), atol=1e-8)
        else:
            assert np.linalg.norm(left) <= weight
    assert 0 < alive < 3 + sparse
    assert not sparse or 0 < np.count_nonzero(z) < 20 * alive


def test_l1_term_is_the_lasso(split):
    """With no weight on the groups, against scikit-learn."""
    x = jnp.asarray([0.0, 0.0, 0.0, 0.4])
    expected = Lasso(alpha=0.4, fit_intercept=False, tol=1e-12, max_iter=10**5).fit(*map(np.asarray, split.train)).coef_
    np.testing.assert_allclose(solved(split, x, sparse=True).z, expected, atol=1e-8)
    assert 0 < np.count_nonzero(expected) < SMALL


@pytest.mark.parametrize("sparse", [False, True])
def test_highest_penalty(split, sparse):
    """At it z = 0, and just below it is not; the same for the l1 weight alone."""
    top = search.highest(split.train, sparse)
    kinds = [np.arange(len(top)) < 3, np.arange(len(top)) == 3][: 1 + sparse]
    for kind in kinds:
        x = jnp.where(jnp.asarray(kind), top, 0.0)
        assert not solved(split, x, sparse).z.any()
        assert solved(split, 0.99 * x, sparse).z.any()


def test_warm_start(split):
    x = 0.1 * search.highest(split.train, False)
    first = solved(split, x)
    again = solved(split, x, start=first.z)
    assert again.calls <= 3
    np.testing.assert_allclose(again.z, first.z, atol=1e-9)


@thinned("sparse", [False, True], True)
def test_slope(split, sparse):
    """Against differences of the validation error of exact solutions; some groups are 0."""
    x = search.highest(split.train, sparse) * jnp.asarray([0.1, 0.3, 0.02, 0.15][: 3 + sparse])
    value = lambda x: search.error(solved(split, x, sparse).z, split.validation)
    got, calls = compiled(sparse).slope(split, solved(split, x, sparse).z, x)
    steps = 1e-4 * jnp.eye(len(x))
    expected = [(value(x + step) - value(x - step)) / 2e-4 for step in steps]
    np.testing.assert_allclose(got, expected, atol=2e-5)
    assert np.abs(got).max() > 0.1
    assert 3 < calls < 2 * search.ROWS + 5


def answers(proposals, value, solution=lambda x: None):
    """The points of a search that is told ``value(x)`` and ``solution(x)``."""
    points, found = [], next(proposals, None)
    while found is not None:
        points.append(np.asarray(found[0]))
        found = group_lasso.step(proposals, (value(points[-1]), solution(points[-1])))
    return np.array(points)


def test_grid():
    top = np.array([2.0, 2.0, 3.0])
    points = answers(search.grid(top[:2], 5, sparse=False), np.sum)
    np.testing.assert_allclose(points, 2 * np.geomspace(1, search.LOWEST, 5)[:, None] * np.ones(2))
    points = answers(search.grid(top, 10, sparse=True), np.sum)  # three of either kind
    values = [1, search.LOWEST**0.5, search.LOWEST]
    np.testing.assert_allclose(points, [[2 * a, 2 * a, 3 * b] for a in values for b in values])


@pytest.mark.parametrize("make", [search.at_random, search.tpe])
def test_random_and_tpe(make):
    top = np.array([2.0, 2.0, 3.0])
    target = np.log([0.1, 1.0, 1.5])
    distance = lambda x: float(np.sum((np.log(x) - target) ** 2))
    points = answers(make(top, 40, 0), distance)
    assert points.shape == (40, 3)
    assert (points <= top).all()
    assert (points >= search.LOWEST * top).all()
    assert len(np.unique(points)) == 120  # a penalty of its own for each group
    np.testing.assert_array_equal(points, answers(make(top, 40, 0), distance))
    assert np.abs(points - answers(make(top, 40, 1), distance)).max() > 0.1
    halves = [np.mean([distance(x) for x in half]) for half in np.split(points, 2)]
    assert (halves[1] < 0.7 * halves[0]) == (make is search.tpe)  # only the latter learns


def test_descent():
    """Projected, and it counts what the derivative takes."""
    proposals = search.descent(np.ones(2), 3, 0.5, lambda z, x: (jnp.asarray([3.0, -1.0]), 7))
    assert next(proposals)[1] == 0
    x, calls = group_lasso.step(proposals, (0.0, None))
    np.testing.assert_allclose(x, [0.0, 1.5])
    assert calls == 7


def test_meha_agrees_with_the_implicit_derivative(split):
    """On three groups both find the penalties of the least validation error, and MEHA's z nears the inner solution."""
    run, top = compiled(False), search.highest(split.train, False)
    data = Levels(split.train, split.validation)
    bounds = Levels(*(search.smoothness(part[0]) for part in data))
    carry = run.start(0.5 * top, data, bounds)
    for _ in range(100):  # of ten updates
        carry = run.advance(carry, data, bounds)
    z, _, x = carry.state.vars
    points = search.descent(0.5 * np.asarray(top), 100, 1.0, lambda z, x: run.slope(split, z, x))
    last = answers(points, lambda x: 0.0, lambda x: solved(split, x).z)[-1]
    best, found = (search.error(solved(split, y).z, split.validation) for y in (last, x))
    assert best < 0.9 * search.error(solved(split, 0.5 * top).z, split.validation)
    assert found == pytest.approx(float(best), rel=1e-3)
    np.testing.assert_allclose(z, solved(split, x).z, atol=0.02)


def test_settled():
    """The work after the last row that is more than 1 % away; the rows of other runs do not count."""
    run = {"features": 60, "method": "meha", "step": [1, 2, 3, 4], "seconds": [1.0, 2.0, 3.0, 4.0]}
    one = pd.DataFrame(run | {"seed": 1, "gradient_calls": 10, "validation_error": [1.0, 2.0, 1.005, 1.0], "test_error": 3.0})
    two = one.assign(seed=2, validation_error=1.0, test_error=5.0)
    table = group_lasso.ends(pd.concat([one, two]))
    assert table["seconds_to_1%"].tolist() == [3.0, 1.0]
    assert table["seconds"].tolist() == [4.0, 4.0]
    (both,) = group_lasso.summary(pd.concat([one, two])).to_dict("records")
    assert (both["test_error"], both["test_error_std"]) == (4.0, pytest.approx(2**0.5))


@pytest.mark.more
@pytest.mark.parametrize("penalty", ["group", "sparse_group"])
def test_experiment(tmp_path, penalty):
    config = Config(features=(SMALL,), penalty=penalty, evaluations=16, updates=50, seeds=2, out=tmp_path / "run")
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        table = group_lasso.main(config).set_index("method")
    history = pd.read_csv(config.out / "history.csv")
    assert set(history["method"]) == {"grid", "random", "tpe", "implicit", "meha", "meha, own z"}
    assert np.isfinite(history.select_dtypes("number")).all(axis=None)
    for (method, _), run in history.groupby(["method", "seed"]):
        assert len(run) == (50 if "meha" in method else 16)
        assert (run["gradient_calls"].diff().dropna() > 0).all() or method == "meha"
        assert (run["validation_error"].diff().dropna() <= 0).all() or "meha" in method  # the best so far
        assert run["validation_error"].iloc[-1] < run["validation_error"].iloc[0]
    assert table.loc["meha, own z", "gradient_calls"] == 3 * 50
    assert table.loc["meha", "gradient_calls"] > 3 * 50
    ended = history.groupby(["method", "seed"])["test_error"].last()
    np.testing.assert_allclose(table["test_error"], ended.groupby("method").mean()[table.index])
    assert (config.out / "figure.png").exists()
    assert (config.out / "config.json").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seeds": 0}, "--seeds: got 0, expected a positive number"),
        ({"features": (610,)}, "--features: got 610, expected multiples of 20"),
        ({"features": (600,), "blocks": 7}, "--features: got 600, .* and of --blocks"),
        ({"methods": ()}, "--methods: got none"),
        ({"updates": 60}, "--updates: got 60, expected a multiple of 50"),
        ({"p": 0.5}, r"--p: got 0.5, expected a number in \[0, 0.5\)"),
    ],
)
def test_bad_options(changes, message):
    with pytest.raises(SystemExit, match=message):
        Config(**changes)
