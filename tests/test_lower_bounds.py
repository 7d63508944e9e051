"""The worst cases: their optima and closed forms, the chain that no method outruns, and AccBiO against NumPy."""

from fractions import Fraction
from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
import pytest

from bilevel_jax import Batch, implicit, run, samplers, solvers
from bilevel_jax.testing import Quadratic, convex_worst_case, dense_spectrum, worst_case, worst_case_ratio
from experiments.lower_bounds import COUNTS, Config, claim, claims, main, slope, support
from tests.tables import distance, thinned

MAKE = {"worst": worst_case, "convex": convex_worst_case, "dense": dense_spectrum}


def chain_matrix(dim: int, convex: bool = False) -> np.ndarray:
    """1 on the antidiagonal, -1 below it (convex: above it)."""
    return np.fliplr(np.eye(dim)) - np.fliplr(np.eye(dim, k=1 if convex else -1))


@thinned("convex", [False, True], True)
def test_the_matrix_of_the_chain(convex):
    """Its square is tridiagonal, with a 1 at one end; z* of the problem is made with it."""
    Z = chain_matrix(12, convex)
    T = 2 * np.eye(12) - np.eye(12, k=1) - np.eye(12, k=-1)
    T[(-1, -1) if convex else (0, 0)] = 1
    np.testing.assert_array_equal(Z @ Z, T)
    np.testing.assert_array_equal(Z, Z.T)
    q: Quadratic = MAKE["convex" if convex else "worst"](12, inner_strong_convexity=0.25, dtype=jnp.float64)
    x = np.random.default_rng(1).normal(size=12)
    z = np.linalg.solve(0.75 / 4 * T + 0.25 * np.eye(12), Z @ x / 2 - np.asarray(q.data.inner[0]))
    np.testing.assert_allclose(q.at(jnp.asarray(x)).inner, z, atol=1e-13)


@thinned("name", MAKE, "dense", "convex")
def test_closed_forms(name):
    """z, v and the gradient against the oracle and finite differences; the optimum is one."""
    q: Quadratic = MAKE[name](12, inner_strong_convexity=0.25, dtype=jnp.float64)
    x = jnp.asarray(np.random.default_rng(0).normal(size=12))
    terms = implicit(q.problem).terms(q.at(x), Batch(*q.data), jnp.int32(0))
    assert distance(terms.inner.inner, jnp.zeros(12)) < 1e-13
    assert distance(terms.inner.aux + terms.outer.aux, jnp.zeros(12)) < 1e-13
    assert distance(terms.inner.outer + terms.outer.outer, q.gradient(x)) < 1e-13
    assert distance(q.value(x), q.problem.outer(q.at(x).inner, x, q.data.outer).mean()) < 1e-13
    h, eye = 1e-3, jnp.eye(12)  # central differences of a quadratic are exact
    values = jax.vmap(q.value)(jnp.concatenate([x[None] + h * eye, x[None] - h * eye]))
    np.testing.assert_allclose((values[:12] - values[12:]) / (2 * h), q.gradient(x), atol=1e-10)
    assert distance(q.gradient(q.solution.outer), jnp.zeros(12)) < 1e-13
    assert q.value(q.solution.outer) < q.value(x)


@pytest.mark.more
def test_optimum_of_the_worst_case():
    """x*_i = r^i up to r^d; r is the root of its polynomial nearest to 1."""
    r = worst_case_ratio(0.05, 0.3)
    q = worst_case(40, dtype=jnp.float64)
    np.testing.assert_allclose(q.solution.outer, r ** np.arange(1.0, 41), rtol=0, atol=r**40)
    beta = 0.7 / 4
    lam, tau = (1 + 8 * beta * 0.05 * 0.3) / (4 * beta**2 * 0.05), (0.3 / beta) ** 2
    roots = np.roots([1, -(4 + lam), 6 + 2 * lam + tau, -(4 + lam), 1])
    assert r == pytest.approx(max(root.real for root in roots if root.real < 1), rel=1e-12)
    assert 1 - 1 / (0.5 + np.sqrt(lam / (2 * tau) + 0.25)) <= r < 1


def test_ratio_of_the_worst_case():
    """1 / (1 - r) grows like Lxz sqrt(Lz / mu_x) / (2 mu_g), whatever Lg."""
    small = [1 / (1 - worst_case_ratio(mu_x, 0.1)) for mu_x in (1e-2, 1e-3, 1e-4)]
    np.testing.assert_allclose(small, [50.5, 158.6, 500.5], atol=0.06)
    others = [worst_case_ratio(1e-4, 0.1, **kind) for kind in ({"curvature": 4}, {"coupling": 3}, {"inner_smoothness": 2})]
    np.testing.assert_allclose([1 / (1 - r) for r in others], [1000.5, 1500.5, 500.5], atol=0.06)
    np.testing.assert_allclose(1 / (1 - worst_case_ratio(1e-6, 0.01)), 0.5 / (1e-3 * 0.01), rtol=1e-4)


def test_optimum_of_the_convex_worst_case():
    kind = {"outer_smoothness": 3.0, "inner_strong_convexity": 0.2, "inner_smoothness": 1.5, "coupling": 0.5, "curvature": 2.0}
    q = convex_worst_case(40, radius=2.5, dtype=jnp.float64, **kind)
    np.testing.assert_allclose(q.solution.outer, 2.5 / np.sqrt(40), rtol=1e-12)
    assert float(jnp.linalg.norm(q.solution.outer)) == pytest.approx(2.5)


@pytest.mark.more
def test_convex_bound():
    """With dimension r*(eps), no x of which only half the entries have moved has a gradient as small as eps.

    r* solves r^4 + r (2 b^4/mu^4 + 4 b^3/mu^3 + 4 b^2/mu^2) = (1 + mu^2)^2 / (128 mu^4 eps^2), all other constants 1: about
    eps^-1/2 / mu where eps is small.
    """

    def dimension(eps: float, mu: float) -> float:
        ratio = (1 - mu) / 4 / mu
        linear = 2 * ratio**4 + 4 * ratio**3 + 4 * ratio**2
        roots = np.roots([1, 0, 0, linear, -((1 + mu**2) ** 2) / (128 * mu**4 * eps**2)])
        return max(root.real for root in roots if abs(root.imag) < 1e-9)

    found = [dimension(eps, 0.2) for eps in (1e-2, 1e-3, 1e-4)]
    np.testing.assert_allclose(found, [15.1, 47.9, 151.6], atol=0.06)
    np.testing.assert_allclose(dimension(1e-4, 0.02) / found[2], 9.8, atol=0.1)
    q = convex_worst_case(15, inner_strong_convexity=0.2, dtype=jnp.float64)
    hessian, offset = np.asarray(jax.jacobian(q.gradient)(q.start.outer)), np.asarray(q.gradient(q.start.outer))
    moved = hessian[:, :7]
    least = np.linalg.norm(moved @ np.linalg.lstsq(moved, -offset)[0] + offset)
    assert least >= 1e-2


def test_dense_spectrum():
    q = dense_spectrum(6, outer_strong_convexity=0.5, inner_strong_convexity=0.1, dtype=jnp.float64)
    a, c = np.array([0.1, 0.1, 0.1**0.5, 0.1, 1, 0.1]), np.geomspace(1e-3, 1, 6)
    h = 0.5 + (c / a) ** 2
    np.testing.assert_allclose(q.solution.outer, h**-0.5, rtol=1e-12)
    np.testing.assert_allclose(jax.jacobian(q.gradient)(q.start.outer), np.diag(h), atol=1e-12)
    assert float(q.value(q.start.outer) - q.value(q.solution.outer)) == pytest.approx(6 / 2)


@pytest.mark.parametrize(
    ("make", "arguments", "message"),
    [
        (worst_case, {"dim": 2}, "dim: got 2, expected at least 3"),
        (worst_case, {"dim": 9, "inner_strong_convexity": 1.0}, "inner_smoothness: got 1.0, expected more than"),
        (worst_case, {"dim": 9, "outer_strong_convexity": 0.0}, "outer_strong_convexity: got 0.0, expected a finite"),
        (convex_worst_case, {"dim": 9, "radius": "1"}, "radius: got '1' of type str, expected a float"),
        (dense_spectrum, {"dim": 9, "inner_strong_convexity": -0.1}, "inner_strong_convexity: got -0.1, expected"),
    ],
)
def test_refuses(make, arguments, message):
    with pytest.raises((TypeError, ValueError), match=message):
        make(**arguments)


# ---- the chain --------------------------------------------------------------------------------------------------------


def exact_support(n: int, m: int, sweeps: int = 4, dim: int = 30) -> list[int]:
    """Entries of x that are not 0, in rational arithmetic, for mu_g = 3/10, mu_x = 1/20 and Z b = (2, -1, 0, ...)."""
    Z = [[Fraction(int(entry)) for entry in row] for row in chain_matrix(dim)]
    times = lambda u: [sum((a * w for a, w in zip(row, u, strict=True) if a), Fraction(0)) for row in Z]
    b = [Fraction(1)] * (dim - 1) + [Fraction(2)]  # of the image (2, -1, 0, ...)
    assert times(b)[:3] == [2, -1, 0]
    mu_g, beta, mu_x, rate = Fraction(3, 10), Fraction(7, 40), Fraction(1, 20), Fraction(3, 2)
    product = lambda u: [beta * t + mu_g * w for t, w in zip(times(times(u)), u, strict=True)]
    x, found = [Fraction(0)] * dim, []
    for _ in range(sweeps):
        z = v = [Fraction(0)] * dim
        right = [e - w / 2 for e, w in zip(b, times(x), strict=True)]
        for _ in range(n):
            z = [w - rate * (p + e) for w, p, e in zip(z, product(z), right, strict=True)]
        for _ in range(m):
            v = [w - rate * (p + e) for w, p, e in zip(v, product(v), z, strict=True)]
        x = [w - (mu_x * w - p / 2) for w, p in zip(x, times(v), strict=True)]
        found.append(max((i + 1 for i, w in enumerate(x) if w), default=0))
    return found


@pytest.mark.parametrize(("n", "m"), COUNTS)
def test_chain_in_rational_arithmetic(n, m):
    assert exact_support(n, m) == [k * (n + m - 1) + 1 for k in range(1, 5)]


@pytest.mark.more
@pytest.mark.parametrize(("n", "m"), COUNTS)
def test_chain_of_the_solver(n, m):
    assert support(n, m) == exact_support(n, m)


# ---- work -------------------------------------------------------------------------------------------------------------


@pytest.mark.more
def test_accbio_against_numpy():
    """Nesterov's two sequences, heavy ball, and z and v from 0 in every sweep, on the worst case."""
    d, L, mu, Lx, mu_x, n, m = 15, 1.0, 0.3, 1.2, 0.05, 6, 5
    q = worst_case(d, dtype=jnp.float64)
    names = "smoothness", "strong_convexity", "outer_smoothness", "outer_strong_convexity", "inner_steps", "aux_steps"
    solver = solvers.accbio(q.problem, **dict(zip(names, (L, mu, Lx, mu_x, n, m), strict=True)), warm=False)
    outer = lambda vars, data: {f"x{i}": vars.outer[i] for i in range(d)}
    _, history = run(solver, samplers.full(), q.start, q.data, jax.random.key(0), steps=4, every=1, metrics=outer)

    Z, b = chain_matrix(d), np.asarray(q.data.inner[0])
    A = (L - mu) / 4 * Z @ Z + mu * np.eye(d)
    weight = lambda kappa: (np.sqrt(kappa) - 1) / (np.sqrt(kappa) + 1)
    lam = 4 / (np.sqrt(L) + np.sqrt(mu)) ** 2
    theta = max((1 - np.sqrt(lam * mu)) ** 2, (1 - np.sqrt(lam * L)) ** 2)
    x = w = np.zeros(d)
    for k in range(1, 5):
        z = s = v = before = np.zeros(d)
        for _ in range(n):
            new = s - (A @ s - Z @ x / 2 + b) / L
            z, s = new, new + weight(L / mu) * (new - z)
        for _ in range(m):
            v, before = v - lam * (A @ v + s) + theta * (v - before), v
        new = x - (mu_x * x - Z @ v / 2) / Lx
        w, x = new, new + weight(Lx / mu_x) * (new - w)
        np.testing.assert_allclose([history[f"x{i}"][k] for i in range(d)], x, atol=1e-13)
    assert np.abs(x).max() > 1e-2


def test_claims_can_fail():
    verdicts = [claim("", "=", 0.0, measured, 1.0)["verdict"] for measured in (0.5, -1.5, 2.5, np.nan)]
    assert verdicts == ["holds", "holds in part", "does not hold", "does not hold"]
    sided = [claim("", relation, 1.0, 0.9, 0.0)["verdict"] for relation in ("<=", ">=")]
    assert sided == ["holds", "does not hold"]
    assert slope([1, 2, 4], [3, 12, 48]) == pytest.approx(2)


@pytest.mark.more
def test_command(tmp_path, capsys):
    main(Config(outer=(0.2, 0.1), inner=(0.5, 0.4), tolerance=1e-3, out=tmp_path / "new"))
    files = {path.name for path in (tmp_path / "new").iterdir()}
    assert files == {"config.json", "chain.csv", "work.csv", "claims.csv", "figure.png", "figure.pdf"}
    runs = pd.read_csv(tmp_path / "new" / "work.csv")
    assert len(runs) == 2 * 2 * 2 * 2 + 2  # AccBiO-BG in one sweep
    worst = runs.query("instance == 'worst'")
    assert (worst["products"] >= worst["bound"]).all()
    assert (runs["oracle_calls"] > runs["products"]).all()
    for _, part in runs.groupby(["instance", "swept", "method"]):
        assert all(a <= b for a, b in pairwise(part["products"]))
    chain = pd.read_csv(tmp_path / "new" / "chain.csv")
    assert claims(chain, runs)[0]["verdict"] == "holds"
    assert claims(chain.assign(support=0), runs)[0]["verdict"] == "does not hold"
    assert claims(chain, runs.assign(products=1.0))[1]["verdict"] == "does not hold"
    assert "zero chain" in capsys.readouterr().out
