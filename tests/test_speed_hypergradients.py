"""Times of hypergradients: that every variant computes the same one, that the table is complete, that the absent are named."""

import json
import os
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
import pytest

from bilevel_jax.results import Result
from experiments.speed import implicit, torch_worker, unrolled
from experiments.speed.__main__ import main
from experiments.speed.hypergradients import NAMES, TINY, Others, Settings, cases, measure, torch_variants
from tests.tables import thinned

COLUMNS = ["case", "variant", "wall_ms", "best_ms", "spread", "wall_over_floor", "process_over_floor"]
COLUMNS += ["error", "residual", "result", "memory_mib", "compile_s"]
#: Relative errors in float64: of conjugate gradients at 1e-6, of direct solvers, and of the tolerance 1e-5 of normal equations.
LOOSER = {
    "jaxopt default (normal equations)": 1e-3,
    "torchopt default (normal equations)": 1e-3,
    "ours neumann, 100 terms": 0.5,
}
TORCH_PYTHON = os.environ.get("TORCH_PYTHON", sys.executable)


@pytest.fixture(scope="module")
def logistic():
    return implicit.case(60, 6, np.float64)


@pytest.fixture(scope="module")
def network():
    return unrolled.case(TINY, np.float64)


def relative(gradient, case):
    return np.linalg.norm(np.asarray(gradient, float) - case.reference) / np.linalg.norm(case.reference)


def made(case, name):
    module = name.split()[0]
    if module in ("jaxopt", "optimistix"):
        pytest.importorskip(module, exc_type=ImportError)
    return jax.jit(case.variants[name]())(*case.args)


def system(case):
    """Hessian, ``d_z f`` and the cross derivative ``d2_xz g``, dense and by derivatives of the losses."""
    z, x, data = case.args
    g, f = (lambda z, x: implicit.PROBLEM.inner(z, x, data.inner).mean()), implicit.PROBLEM.outer
    slope = jax.grad(g)
    return jax.hessian(g)(z, x), jax.grad(lambda z: f(z, x, data.outer).mean())(z), jax.jacobian(slope, 1)(z, x), slope(z, x)


@pytest.mark.slow
def test_reference_is_the_hypergradient(logistic):
    hessian, fz, cross, slope = system(logistic)
    assert np.abs(slope).max() < 1e-12
    assert relative(-cross.T @ np.linalg.solve(hessian, fz), logistic) < 1e-10
    assert logistic.scale == pytest.approx(np.linalg.norm(fz))


@thinned("name", implicit.VARIANTS, "cg by hand", "ours cg", "ours auto")
def test_implicit_variants_agree_with_a_direct_solve(logistic, name):
    outcome = made(logistic, name)
    assert relative(outcome.gradient, logistic) < LOOSER.get(name, 1e-5)
    ours = name.startswith("ours")
    assert bool(np.isfinite(outcome.residual)) == ours
    assert int(outcome.code) == (Result.SUCCESSFUL if ours else -1)


@pytest.mark.more
def test_neumann_is_given_the_largest_eigenvalue(logistic):
    hessian, fz, cross, _ = system(logistic)
    values, vectors = np.linalg.eigh(hessian)
    v = -vectors @ ((1 - (1 - values / values[-1]) ** 101) / values * (vectors.T @ fz))
    np.testing.assert_allclose(made(logistic, "ours neumann, 100 terms").gradient, cross.T @ v, rtol=1e-8)


def test_reference_of_unrolling_is_a_derivative(network):
    z, x, data = network.args
    direction = jnp.asarray(np.random.default_rng(1).standard_normal(x.shape))

    @jax.jit
    def loss(x):
        slope = jax.grad(lambda z: unrolled.PROBLEM.inner(z, x, data.inner).mean())
        descend = lambda _, z: jax.tree.map(lambda a, b: a - unrolled.RATE * b, z, slope(z))
        last = jax.lax.fori_loop(0, TINY.steps, descend, z)
        return unrolled.PROBLEM.outer(last, x, data.outer).mean()

    difference = (loss(x + 1e-4 * direction) - loss(x - 1e-4 * direction)) / 2e-4
    assert network.reference @ direction == pytest.approx(float(difference), rel=1e-6)


@thinned("name", unrolled.VARIANTS, "scan by hand", "ours step", slow=("optimistix recursive",))
def test_unrolled_variants_agree_with_the_plain_scan(network, name):
    assert relative(made(network, name).gradient, network) < 1e-10


@pytest.mark.parametrize("level", ["logistic", "network"])
def test_torch_variants_agree(level, request):
    """With the interpreter that the environment variable TORCH_PYTHON names, if it has torch."""
    case = request.getfixturevalue(level)
    with torch_variants(TORCH_PYTHON, case) as others:
        if not others.names:
            pytest.skip("torch is not installed")
        path = f"{others.folder}/gradient.npy"
        for name in others.names:
            assert others.run(name, None) is None
            assert (others.run(name, path) or 0.0) >= 0.0
            assert relative(np.load(path), case) < LOOSER.get(name, 1e-5), name
        assert "torch" in others.versions


def test_command_writes_a_complete_table(tmp_path, capsys):
    only = ["ours cg", "torch cg by hand"]
    settings = ["--tables", "implicit", "--repeats", "2", "--only", *only]
    main(["hypergradients", "--quick", *settings, "--out", str(tmp_path)])

    table = pd.read_csv(tmp_path / "hypergradients.csv", keep_default_na=False, na_values="nan")
    config = json.loads((tmp_path / "hypergradients.json").read_text())
    absent = list(config["left_out"])
    assert absent in ([], ["torch cg by hand"])
    assert list(table["variant"]) == ["cg by hand", "ours cg", *({"torch cg by hand"} - set(absent))]
    assert list(table) == COLUMNS
    numbers = table[:2][
        ["wall_ms", "best_ms", "spread", "wall_over_floor", "process_over_floor", "error", "memory_mib", "compile_s"]
    ]
    assert np.isfinite(numbers.to_numpy(float)).all()
    assert (numbers["error"] < 1e-5).all()
    assert (numbers["best_ms"] <= numbers["wall_ms"]).all()
    floor, ours = table.iloc[0], table.iloc[1]
    assert floor["wall_over_floor"] == floor["process_over_floor"] == 1
    assert ours["result"] == "SUCCESSFUL"
    assert 0 < float(ours["residual"]) < 1e-6
    assert config["settings"]["only"] == only
    printed = capsys.readouterr().out
    assert all(f"left out: {name}" in printed for name in absent)
    assert "memory_mib" in printed


def test_libraries_that_are_not_installed_are_named(monkeypatch, logistic):
    monkeypatch.setitem(sys.modules, "jaxopt", None)
    others = Others(lambda name, path: None, (), {"higher": "no module", "torchopt cg": "no module"}, {}, "")
    rows, left_out = measure(logistic, others, ("ours dense", "jaxopt cg", "torchopt cg"), 1)
    assert [row["variant"] for row in rows] == ["cg by hand", "ours dense"]
    assert left_out.keys() == {"jaxopt cg", "torchopt cg"}
    assert "jaxopt" in left_out["jaxopt cg"]
    monkeypatch.setitem(sys.modules, "optimistix", None)
    with pytest.raises(ImportError):
        unrolled.VARIANTS["optimistix recursive"](2)


@pytest.mark.parametrize("module", [implicit, unrolled])
def test_worker_names_what_it_lacks(module, monkeypatch, tmp_path, logistic, network):
    monkeypatch.setitem(sys.modules, "torch", None)
    case, names = (logistic, torch_worker.IMPLICIT) if module is implicit else (network, torch_worker.UNROLLED)
    np.savez(tmp_path / "case.npz", **case.arrays)
    found, why = torch_worker.variants(str(tmp_path / "case.npz"))
    assert found == {}
    assert list(why) == list(names)
    assert all("torch" in reason for reason in why.values())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--repeats", "0"], "repeats: got 0"),
        (["--only", "ours gc"], r"only: got \['ours gc'\]"),
        (["--torch-python", "/no/such/python"], "torch_python: got '/no/such/python'"),
    ],
)
def test_nonsense_is_refused(arguments, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        main(["hypergradients", "--out", str(tmp_path), *arguments])


def test_sizes_are_those_that_are_reported():
    assert [case.name for case in cases(Settings(quick=True))] == ["implicit 40 x 5", "unrolled 9 steps"]
    assert Settings().sizes == ((5000, 200), (20000, 1000))
    assert len(set(NAMES)) == len(NAMES)
    assert unrolled.Sizes() == (512, (784, 128, 10), 100)
