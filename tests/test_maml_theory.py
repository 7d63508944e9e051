"""Theory of MAML and ANIL: closed forms are derivatives, verdicts can fail, and the command writes its tables."""

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
import pytest

from bilevel_jax import tasks
from experiments import anil_geometry, maml_theory
from experiments.anil_geometry import GEOMETRIES
from experiments.maml_theory import Config


def test_closed_form_is_the_gradient_of_the_query_loss():
    """(2.39)-(2.40): of the mean over the tasks after the inner steps, by automatic differentiation of matrix powers."""
    data, rate, steps = maml_theory.draw_quadratics(3, 4), 0.3, 3
    x = jnp.asarray(np.random.default_rng(0).normal(size=4))

    def value(x):
        total = 0.0
        for A, c in zip(data["A"], data["c"], strict=True):
            left = jnp.linalg.matrix_power(jnp.eye(4) - rate * A, steps) @ (x - c)
            total += 0.5 * left @ A @ left / 3
        return total

    exact = maml_theory.closed(data, rate, steps, first_order=False)
    np.testing.assert_allclose(exact.gradient(x), jax.grad(value)(x), atol=1e-14)
    np.testing.assert_allclose(exact.gradient(exact.zero()), np.zeros(4), atol=1e-14)
    assert maml_theory.gradient_error() < 1e-12


@pytest.mark.more
def test_bias():
    table = maml_theory.bias((0.3, 0.01)).set_index(["method", "rate"])
    assert (table["distance_to_closed_form"] < 1e-10).all()
    assert (table.loc["maml", "gradient_norm"] < 1e-12).all()
    assert (table.loc["fomaml", "gradient_norm"] > 1e-3).all()


@pytest.mark.more
def test_smoothness():
    """At a maximum of the loss the bound is attained."""
    table = maml_theory.smoothness(0.3, (1, 4))
    np.testing.assert_allclose(table["at_the_maximum"], table["factor"], rtol=1e-10)
    np.testing.assert_allclose(table["factor"], [1.3**2, (9 / 8) ** 2, 1.3**8, (33 / 32) ** 8], rtol=1e-12)
    assert (table["largest_over_bound"] <= 1 + 1e-12).all()


@pytest.mark.more
def test_query_loss_is_what_anil_descends():
    """One inner step, written out."""
    adapted, data = GEOMETRIES["strongly convex"][0], anil_geometry.draw_regressions(jax.random.key(0))
    x = anil_geometry.draw_weights(jax.random.key(1))

    def one(support, query):
        way = jax.grad(anil_geometry.regression)(x, x, support)["head"]
        return anil_geometry.error(x | {"head": x["head"] - 0.2 * way}, x, query)

    expected = jax.vmap(one)(data.inner, data.outer).mean()
    assert float(anil_geometry.query_loss(adapted, 0.2, 1, x, data)) == pytest.approx(float(expected), rel=1e-12)
    assert len(jax.tree.leaves(tasks.select(x, GEOMETRIES["nonconvex"][0]))) == 2


CURVES = pd.DataFrame(
    [
        {"geometry": name, "N": steps, "step": step, "calls": step * (3 * steps + 1), "loss": loss}
        for name in GEOMETRIES
        for steps, end in ((1, 0.5), (5, 0.4))
        for step, loss in ((0, 1.0), (100, end))
    ]
)


def test_losses_at_equal_work():
    np.testing.assert_allclose(anil_geometry.at_equal(CURVES, "step")["nonconvex"], [0.5, 0.4])
    np.testing.assert_allclose(anil_geometry.at_equal(CURVES, "calls")["nonconvex"], [0.5, 1 - 0.6 / 4])


@pytest.mark.more
def test_verdicts_can_fail():
    bias, smooth = maml_theory.bias((0.01, 0.003)), maml_theory.smoothness(0.3, (1, 2))
    names = [row["verdict"] for row in maml_theory.claims(0.0, bias, smooth, CURVES)]
    assert names == ["holds"] * 8 + ["does not hold"] * 3 + ["holds"] * 2
    wrong = maml_theory.claims(
        1.0,
        bias.assign(distance_to_closed_form=1.0, gradient_norm=1.0),
        smooth.assign(largest=smooth["N"], largest_over_bound=1.1),
        CURVES,
    )
    assert [row["verdict"] for row in wrong[:7]] == ["does not hold"] * 7


@pytest.mark.slow
def test_command(tmp_path, capsys):
    maml_theory.main(Config(steps=(1, 2), updates=10, seeds=2, smoothness_steps=(1, 2), out=tmp_path / "new"))
    names = {"config.json", "bias.csv", "smoothness.csv", "geometry.csv", "equal_updates.csv", "equal_calls.csv", "claims.csv"}
    assert {path.name for path in (tmp_path / "new").iterdir()} == names | {"figure.png", "figure.pdf"}
    curves = pd.read_csv(tmp_path / "new" / "geometry.csv")
    assert len(curves) == len(GEOMETRIES) * 2 * 3
    assert (curves.groupby(["geometry", "N"])["loss"].last() < curves.groupby(["geometry", "N"])["loss"].first()).all()
    assert "claims" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps": (3,)}, r"--steps: got \(3,\), expected at least two"),
        ({"bias_rates": (0.1, 1.5)}, "--bias-rates: got 1.5, expected at most"),
        ({"bias_rates": (0.1, 0.0)}, "--bias-rates: got"),
        ({"updates": 7}, "--updates: got 7, expected a positive multiple of 5"),
        ({"seeds": 0}, "--seeds: got 0"),
        ({"smoothness_rate": 0.0}, "--smoothness-rate: got 0.0"),
    ],
)
def test_refuses(settings, message, tmp_path):
    with pytest.raises(SystemExit, match=message):
        maml_theory.main(Config(out=tmp_path / "new", **settings))
    assert not (tmp_path / "new").exists()
