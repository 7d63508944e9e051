"""The toy problems: closed forms against brute force, MEHA's counts, the recurrences of the public code, the commands."""

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
import pytest

from bilevel_jax import Vars, nonsmooth, run, samplers, solvers
from experiments import nonconvex, nonconvex_claims, nonconvex_lasso
from experiments.nonconvex_methods import KNOWN, METHODS, Method, lanes, meha, seconds, single, trace
from experiments.nonconvex_problems import (
    NOTHING,
    lasso,
    lasso_data,
    lasso_inner,
    lasso_value,
    merely_convex,
    outside,
    released_merely_convex,
    released_sine,
    rescaled_lasso,
    sine,
    sine_solution,
)
from tests.tables import thinned

PLAIN = Method(meha, {})


@pytest.mark.parametrize(
    ("n", "x", "z", "value"), [(1, 2.35619, 4.35619, 0.25375), (2, 2.4748, 4.2376, 0.33833), (10, 2.6476, 4.0648, 0.46136)]
)
def test_sine_against_brute_force(n, x, z, value):
    """All minimisers of the sine, all combinations of them that are equal or differ in one entry, and a fine grid of x."""
    found = sine_solution(n)
    np.testing.assert_allclose((found.x, found.z, found.value), (x, z, value), rtol=1e-4)
    grid = np.linspace(-10, 10, 200_001)
    phases = -np.pi / 2 + 2 * np.pi * np.arange(-4, 5)
    z_of = phases[:, None] + 2 - grid  # [phases, x]: every inner solution
    cost = np.where(np.abs(z_of) <= 10, (z_of - 4) ** 2, np.inf).min(0)  # each z_i may choose its own
    total = (grid - 2) ** 2 + n * cost
    assert total.min() == pytest.approx(found.value, abs=1e-7)
    assert grid[total.argmin()] == pytest.approx(found.x, abs=2e-4)


@pytest.mark.parametrize("shared", [False, True])
def test_sine_solution_is_stationary(shared):
    """The inner gradient vanishes, the inner Hessian is positive, and so does the derivative of f along the inner solutions."""
    case, n = sine(3, shared=shared), 3
    known = sine_solution(n if shared else 1)
    x, z = jnp.full(1 if shared else n, known.x), jnp.full(n, known.z)
    assert float(case.error(z, x)) < 1e-15
    inner, outer = (lambda z, x, f=f: f(z, x, None) for f in case.problem)
    np.testing.assert_allclose(jax.grad(inner)(z, x), 0, atol=1e-14)
    assert float(jnp.sin(x + z - 2).max()) == pytest.approx(-1)
    along = jax.grad(lambda x: outer(known.phase + 2 - x + jnp.zeros(n), x))(x)  # z = C + c - x
    np.testing.assert_allclose(along, 0, atol=1e-13)
    assert float(outer(z, x)) == pytest.approx(case.value)


def test_merely_convex_solution():
    """f is 0 at an inner solution, and at no other x."""
    case, one = merely_convex(3), jnp.ones(3)
    z = jnp.ones((2, 3))
    assert float(case.problem.outer(z, one, None)) == 0.0 == float(case.error(z, one))
    np.testing.assert_array_equal(jax.grad(case.problem.inner)(z, one, None), 0)
    assert float(case.error(z.at[1, 0].add(0.3), one)) == pytest.approx(0.3 / 3**0.5)


def test_lasso():
    """The inner solution has 0 in its subdifferential; every x of the set attains f*, and x outside does not."""
    n = 4
    case, a = lasso(n), np.asarray(lasso_data(n))
    random = np.random.default_rng(0)
    x = jnp.asarray(random.uniform(0, 0.5, n))
    z = np.asarray(lasso_inner(x))
    slope = z - a
    assert np.all(np.abs(slope) <= np.asarray(x) + 1e-15)
    np.testing.assert_allclose(slope[z != 0], -np.asarray(x)[z != 0] * np.sign(z[z != 0]), atol=1e-15)
    for good in ([0.25, 0.25, 0, 0], [1.0, 0.6, 0, 0]):
        assert float(lasso_value(jnp.asarray(good))) == case.value
        assert float(outside(jnp.asarray(good))) == 0
        assert float(case.error(lasso_inner(jnp.asarray(good)), jnp.asarray(good))) == 0
    values = [float(lasso_value(jnp.asarray(point))) for point in random.uniform(0, 1, (200, n))]
    assert min(values) > case.value
    assert float(outside(jnp.zeros(n))) == pytest.approx(1)
    scaled = rescaled_lasso(n)
    assert float(scaled.error(n * lasso_inner(x), n * x)) == pytest.approx(float(case.error(lasso_inner(x), x)))


def test_recurrences_of_the_public_code():
    """The values of its logs."""
    updates, x, z = released_merely_convex()
    assert updates == 113
    np.testing.assert_allclose((x[0], z[0, 0], z[1, 0]), (1.000180, 1.014357, 1.016071), atol=5e-7)
    for frozen, end in ((True, (2.00107, 4.00044)), (False, (2.00105, 4.00044))):
        np.testing.assert_allclose(released_sine(frozen=frozen), end, atol=5e-6)
    assert abs(released_sine()[0] / sine_solution(1).x - 1) > 0.15


SEPARABLE = nonconvex_claims.SEPARABLE["merely_convex"]
COUNTS = {
    "merely_convex": (lambda: merely_convex(10), SEPARABLE[0], 36, 200, 0.01),
    "merely_convex, gamma 5": (lambda: merely_convex(10), SEPARABLE[1], 38, 200, 0.01),
    "merely_convex, alpha 0.1": (lambda: merely_convex(100), SEPARABLE[2], 40, 200, 0.01),
    "sine": (lambda: sine(10), KNOWN["sine"], 120, 500, 0.01),
    "sine, one x": (lambda: sine(10, shared=True), nonconvex_claims.SHARED[4][1], 193, 1000, 0.01),
    "lasso": (lambda: lasso(10), KNOWN["lasso"] | {"c": 100.0}, 926, 1500, 0.02),
    "lasso, rescaled": (lambda: rescaled_lasso(10, 2.0), KNOWN["lasso"], 926, 1500, 0.02),
}


@thinned("name", COUNTS, "sine")
def test_counts(name):
    """Updates from which on MEHA stays within the tolerance; by a run of the solver of the library, too."""
    make, setting, count, updates, tolerance = COUNTS[name]
    case = make()
    found = lanes(PLAIN, case, [setting], single(case.start), updates, tolerance)
    assert found.kept.tolist() == [[count]]
    assert found.calls.item() == pytest.approx(6)
    rates = {name: setting[name] for name in ("beta", "eta", "alpha")}
    opts = Vars(case.inner(rates["beta"]), case.inner(rates["eta"]), case.outer(rates["alpha"]))
    solver = solvers.meha(case.problem, opts, gamma=setting["gamma"], c_low=setting["c"], p=setting["p"], nonsmooth=case.term)
    metrics = lambda vars, data: {"error": case.error(vars.inner, vars.outer)}
    go = jax.jit(
        lambda start: run(solver, samplers.full(), start, NOTHING, jax.random.key(0), steps=count, every=1, metrics=metrics)[1]
    )
    errors = go(case.start)["error"]
    assert errors[-1] <= tolerance < errors[-2]


@pytest.mark.more
def test_lanes_and_trace_agree():
    """A lane from another start; the first crossing is before the last; what is not solved is infinite."""
    case, setting = sine(1), KNOWN["sine"]
    starts = Vars(inner=jnp.array([[0.0], [4.0]]), outer=jnp.array([[-6.0], [4.0]]))
    found = lanes(PLAIN, case, [setting, setting | {"p": 0.0}], starts, 400)
    assert found.kept[0, 0] == 120
    assert np.isinf(found.kept[1]).all()
    assert (found.first <= found.kept).all()
    second = case._replace(start=jax.tree.map(lambda leaf: leaf[1], starts))
    errors = trace(PLAIN, second, setting, 400)
    assert errors[int(found.kept[0, 1]) :].max() <= 0.01 < errors[int(found.kept[0, 1]) - 1]
    assert np.argmax(errors <= 0.01) == found.first[0, 1]
    assert errors[-1] == pytest.approx(found.error[0, 1])
    assert seconds(PLAIN, case, setting, 5, repeats=1) > 0


def test_variants():
    """z before x, many steps of theta, and f times c_k, against NumPy."""
    case = merely_convex(2)
    setting = {"alpha": 0.1, "beta": 0.2, "eta": 0.3, "gamma": 2.0, "c": 0.5, "p": -0.3}
    method = Method(lambda case, **s: meha(case, **s, theta_steps=3, z_first=True), {})
    found = lanes(method, case, [setting], single(case.start), 2).vars
    x, z = np.full(2, 0.01), np.full((2, 2), 0.01)
    theta = z.copy()
    for k in range(2):
        weight = 1 / (0.5 * (k + 1) ** -0.3)
        for _ in range(3):
            theta = theta - 0.3 * (np.stack([theta[0] - x, 0 * x]) + (theta - z) / 2)
        slope = np.stack([z[0] - x, 0 * x]) - (z - theta) / 2
        z = z - 0.2 * (weight * np.stack([z[0] - 1, z[1] - x]) + slope)
        x = x - 0.1 * (weight * (x - z[1]) - z[0] + theta[0])
    np.testing.assert_allclose(found.inner[0, 0], z, atol=1e-15)
    np.testing.assert_allclose(found.outer[0, 0], x, atol=1e-15)


def test_claims_can_fail():
    """Slopes that are too slow do not hold; neither does a gap that vanishes with p = 0."""
    k = np.geomspace(1, 1000, 50)
    table = pd.DataFrame({"p": 0.25, "update": k, "residual": k**-0.1, "theta": k**-0.6, "gap": k**-0.25})
    verdicts = [row["verdict"] for row in nonconvex_claims.rate_claims("sine", table)]
    assert verdicts == ["holds", "does not hold", "holds"]
    fixed = table.assign(p=0.0, residual=k**-0.5)
    assert [row["verdict"] for row in nonconvex_claims.rate_claims("sine", fixed)] == ["holds", "holds", "does not hold"]


@pytest.mark.more
def test_stuck_methods():
    """What unrolling does where an entry of z has no inner gradient."""
    verdicts = {row["claim"]: row for row in nonconvex_claims.stuck()}
    assert all(row["verdict"] == "holds" for row in verdicts.values())
    assert verdicts["ITD: x at the end, (1 + z2) / 2"]["measured"] == pytest.approx(0.505, abs=1e-6)


def test_searches():
    """The grid of shared values never leaves f = 0; the exact derivative solves the problem from 0, and not from above 1/n."""
    gaps, _, _ = nonconvex_lasso.searched("grid, one value", 10, 1.0, 7, 0)
    np.testing.assert_allclose(gaps, 0.5, atol=1e-15)
    gaps, _, x = nonconvex_lasso.searched("random", 4, 0.5, 20, 0)
    assert (np.diff(gaps) <= 0).all()
    assert gaps[-1] == pytest.approx(float(lasso_value(jnp.asarray(x))) + 0.5)
    assert nonconvex_lasso.descend(10, 0.0, 1.0, 5)[0][-1] == pytest.approx(0, abs=1e-15)
    gaps, x = nonconvex_lasso.descend(10, 1.0, 1.0, 5)
    np.testing.assert_allclose(gaps, 0.5, atol=1e-15)
    np.testing.assert_array_equal(x, 1.0)


@pytest.mark.more
def test_command(tmp_path):
    config = nonconvex.Config("sine", methods=("ITD",), updates=40, rate_updates=20, sizes=(2,), out=tmp_path)
    few = {"ITD": METHODS["sine"]["ITD"]._replace(grid={"inner": (0.3,), "outer": (0.3,)})}
    few["MEHA"] = METHODS["sine"]["MEHA"]._replace(grid={name: (value,) for name, value in KNOWN["sine"].items()})
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(METHODS, "sine", few)
        patch.setattr(nonconvex_claims, "SHARED", nonconvex_claims.SHARED[:1])
        tables = nonconvex.main(config)
    for name in ("config.json", "table.csv", "runs.csv", "starts.csv", "basins.csv", "figure.png", "figure.pdf"):
        assert (tmp_path / name).stat().st_size > 0
    assert len(tables["starts"]) == len(tables["table"]) == 1
    assert len(tables["basins"]) == 25 * len(nonconvex.C_LOW)
    assert tables["table"]["settings"].item() == 1


@pytest.mark.more
def test_command_lasso(tmp_path):
    config = nonconvex.Config("lasso", rate_updates=20, sizes=(2,), evaluations=3, out=tmp_path)
    table = nonconvex.main(config)["table"]
    assert (tmp_path / "figure.png").stat().st_size > 0
    assert table.query("method == 'MEHA'")["gradient_calls"].tolist() == [6 * 926, 6 * 926]
    assert table.query("method == 'MEHA'")["own_gap"].max() < 0  # not feasible: below f*


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"updates": 0}, "--updates: got 0, expected a positive number"),
        ({"problem": "lasso", "sizes": (3,)}, "--sizes: got 3, expected positive even numbers"),
        ({"methods": ("SGD",)}, "--methods: got 'SGD', expected some of"),
        ({"problem": "lasso", "methods": ("MEHA",)}, "--methods: got 'MEHA', expected none, with --problem lasso"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(SystemExit, match=message):
        nonconvex.Config(**options)


def test_l1_is_that_of_the_problem():
    """The weights of the term are x."""
    term = lasso(4).term
    assert term is not None
    z, x = jnp.array([1.0, -2.0, 0.5, 0.0]), jnp.array([0.1, 0.2, 0.3, 0.4])
    assert float(term.value(z, x)) == pytest.approx(0.65)
    np.testing.assert_allclose(term.prox(z, 0.5, x), nonsmooth.soft(z, 0.5 * x), atol=1e-15)
