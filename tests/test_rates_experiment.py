"""The measurements of `experiments.rates` in small: slopes and floors that must come out, and that a wrong theory fails."""

from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from bilevel_jax import Batch, hypergrad, linear_solve, solvers
from bilevel_jax.testing import quadratic
from experiments import rate_claims, rates
from tests.tables import distance, small


@pytest.fixture(scope="module")
def gapped():
    """Of condition 20, with eigenvalues far apart."""
    return quadratic(jax.random.key(0), inner_dim=5, outer_dim=3, condition=20.0, dtype=jnp.float64)


def verdicts(rows):
    return {row["claim"]: row["verdict"] for row in rows}


@pytest.mark.more
def test_truncation_has_its_slope(gapped):
    """ITD and Neumann within 5 % of log(1 - a mu); a mu that is off by a seventh is refused."""
    rows = rate_claims.truncation(gapped, 1 / 20, counts=(60, 140))
    assert set(verdicts(rows).values()) == {"holds"}
    assert rows[0]["measured"] == pytest.approx(np.log(0.95), rel=0.05)
    itd = rows[0]["measured"]
    wrong = np.log1p(-1 / 17)
    assert rate_claims.claim("", "=", wrong, itd, -0.05 * wrong)["verdict"] == "does not hold"


@pytest.mark.more
def test_hypergradients_agree():
    """Dense, conjugate gradients, a long Neumann sum, a long path, finite differences and the closed form."""
    q = small()
    x, z = q.start.outer, q.at(q.start.outer).inner
    methods = {
        "dense": hypergrad.implicit(linear_solve.dense()),
        "cg": hypergrad.implicit(linear_solve.cg(max_steps=10, rtol=1e-14)),
        "neumann": hypergrad.implicit(linear_solve.neumann(terms=150, rate=1.0)),
        "itd": hypergrad.iterative(optax.sgd(1.0), 150),
    }
    for name, method in methods.items():
        _, gradient, _ = hypergrad.hypergradient(q.problem, method)(z, x, Batch(*q.data))
        assert distance(gradient, q.gradient(x)) < 1e-11, name
    h, eye = 1e-4, jnp.eye(3)
    values = jax.vmap(q.value)(jnp.concatenate([x[None] + h * eye, x[None] - h * eye]))
    assert distance((values[:3] - values[3:]) / (2 * h), q.gradient(x)) < 1e-9


def test_cold_v_stalls():
    """From the last v a few steps are enough; from 0 they stall, where the closed form says."""
    q = small()
    aid = partial(rate_claims.double, solvers.aid_bio, 1.0, 0.3, inner_steps=5)
    steps = linear_solve.richardson(steps=2, rate=1.0)
    warm, cold = (rate_claims.reached(aid(linear_solver=steps, warm=w)(q.problem), q, 200) for w in (True, False))
    assert warm < 1e-13
    assert cold > 1e-3
    assert cold == pytest.approx(rate_claims.floor(q, lambda a: 1 - (1 - a) ** 2), rel=1e-6)


@pytest.mark.parametrize("count", [0, 6])
def test_floor_of_unrolled_methods(count):
    """Where D inner steps leave x, and where none are differentiated: against the closed form."""
    q = small()
    own = {"inner_steps": 6} if count else {"inner_steps": 20}
    make = rate_claims.double(solvers.itd_bio if count else solvers.fo_itd_bio, 1.0, 0.3, **own)
    found = rate_claims.reached(make(q.problem), q, 200)
    assert found > 1e-3
    assert found == pytest.approx(rate_claims.floor(q, lambda a: 1 - (1 - a) ** count), rel=1e-6)


@pytest.mark.slow
def test_calls_are_counted_on_samples():
    """Four calls an update of one sample; full passes and full batches count all the samples they read."""
    q = small()
    steps = 0.1, 0.05
    cases = {
        "soba": (rates.Entry(rate_claims.single(solvers.soba, *steps), 20), 4),
        "srba": (rates.Entry(rate_claims.single(solvers.srba, *steps, period=5), 20), 4 / 5 * 8 + 1 / 5 * 4 * 32),
        "fo_itd_bio": (rates.Entry(rate_claims.double(solvers.fo_itd_bio, *steps, inner_steps=2), 20, full=True), 3 * 32),
    }
    for name, (entry, each) in cases.items():
        calls, errors = rates.trace(entry, q, seeds=2, rows=2)
        np.testing.assert_allclose(calls, [10 * each, 20 * each], err_msg=name)
        assert errors.shape == (1 if entry.full else 2, 2)
        assert (errors < 1.5).all()


def test_every_solver_is_compared():
    """Those of the library, but aid_bio, which is there with two linear solvers, and those of tasks; each has a style."""
    names = [name for part in rates.entries(small()).values() for name in part]
    of_tasks = {"maml", "fomaml", "reptile", "anil", "imaml"}
    assert set(names) - {"aid_cg", "aid_fp"} == set(solvers.__all__) - {"aid_bio", "default_opts", *of_tasks}
    assert set(names) <= set(rates.STYLES | rates.MORE_STYLES)


@pytest.mark.slow
def test_curves_and_figure(tmp_path: Path, monkeypatch):
    some = {
        "single loop": {"saba": rates.Entry(rate_claims.single(solvers.saba, 0.2, 0.1), 1500)},
        "deterministic": {"itd_bio": rates.Entry(rate_claims.double(solvers.itd_bio, 1.0, 0.3), 50, full=True)},
    }
    monkeypatch.setattr(rates, "entries", lambda q: some)
    runs = rates.curves(small(), 2)
    assert len(runs) == 2 * 50 + 50
    assert np.isfinite(runs["error"]).all()
    rates.draw(runs, tmp_path / "figure")
    assert {path.name for path in tmp_path.iterdir()} == {"figure.png", "figure.pdf"}


@pytest.mark.slow
def test_linear_systems(gapped):
    steep = quadratic(jax.random.key(0), condition=20.0, dtype=jnp.float64)
    rows = rate_claims.accelerated(steep, 1 / 20) + rate_claims.variance(small(), 1 / 5, 256)
    assert set(verdicts(rows).values()) == {"holds"}


@pytest.mark.slow
def test_sublinear_slopes():
    q = quadratic(jax.random.key(0), inner_dim=5, outer_dim=5, condition=2.0, noise=0.15, dtype=jnp.float64)
    found = verdicts(rate_claims.sublinear(q, 64, most=8000) + rate_claims.zeroth_order(q, 64))
    assert "does not hold" not in found.values(), found
    assert list(found.values()).count("holds") >= len(found) - 2
