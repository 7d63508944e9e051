"""Times of MAML: that every variant computes the same meta-gradient, that the table is complete, that the absent are named."""

import json
import os
import sys

import jax
import jax.flatten_util
import numpy as np
import pandas as pd
import pytest

from experiments.speed import maml_worker, meta_cases, torch_worker
from experiments.speed.__main__ import main
from experiments.speed.hypergradients import torch_variants
from experiments.speed.meta import NAMES, TINY, Settings
from experiments.speed.meta_cases import Sizes
from tests.tables import thinned

TORCH_PYTHON = os.environ.get("TORCH_PYTHON", sys.executable)
KINDS = ("convolution", "mlp")


@pytest.fixture(scope="module", params=[pytest.param(kind, marks=[pytest.mark.more] * (kind != "mlp")) for kind in KINDS])
def case(request):
    return meta_cases.case(request.param, TINY)


def relative(gradient, case):
    return np.linalg.norm(np.asarray(gradient, float) - case.reference) / np.linalg.norm(case.reference)


def test_reference_is_a_derivative(case):
    """Along a random direction, by differences of the query loss in float64."""
    kind = case.name.split()[1]
    model, (support, query) = meta_cases.network(kind, TINY), meta_cases.draw_tasks(TINY)
    loss = meta_cases.loss_of(model)
    flat, back = jax.flatten_util.ravel_pytree(jax.tree.map(lambda leaf: leaf.astype(np.float64), model.params))
    support, query = ((images.astype(np.float64), labels) for images, labels in (support, query))

    @jax.jit
    def value(vector):
        def one(own, other):
            z = back(vector)
            for _ in range(TINY.steps):
                z = jax.tree.map(lambda a, b: a - 0.1 * b, z, jax.grad(loss)(z, None, own))
            return loss(z, None, other)

        return jax.vmap(one)(support, query).mean()

    u = np.random.default_rng(1).standard_normal(flat.shape)
    u /= np.linalg.norm(u)
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        difference = (value(flat + 1e-6 * u) - value(flat - 1e-6 * u)) / 2e-6
    assert case.reference @ u == pytest.approx(float(difference), rel=1e-5)


@thinned("name", meta_cases.VARIANTS, "ours scan", "ours vmap")
def test_variants_agree_with_the_reference(case, name):
    if name not in case.variants:
        assert "lax.conv" in name
        return
    if "devices" in name and jax.device_count() < 2:
        with pytest.raises(ImportError, match="needs two devices"):
            case.variants[name]()
        return
    assert relative(jax.jit(case.variants[name]())(*case.args).gradient, case) < 1e-5


def test_torch_variants_agree(case):
    """With the interpreter that the environment variable TORCH_PYTHON names, if it has torch."""
    with torch_variants(TORCH_PYTHON, case, maml_worker.__file__) as others:
        if not others.names:
            assert list(others.left_out) == list(maml_worker.VARIANTS)
            pytest.skip("torch is not installed")
        path = f"{others.folder}/gradient.npy"
        for name in others.names:
            others.run(name, path)
            assert relative(np.load(path), case) < 1e-5, name


@pytest.mark.more
def test_command_writes_a_complete_table(tmp_path, capsys):
    main(["meta", "--quick", "--repeats", "2", "--networks", "mlp", "--only", "ours vmap", "--out", str(tmp_path)])
    table = pd.read_csv(tmp_path / "meta.csv")
    assert list(table["variant"]) == ["ours scan", "ours vmap"]
    assert (table["error"] < 1e-5).all()
    assert (table["best_per_s"] >= table["steps_per_s"]).all()
    assert table["wall_over_floor"][0] == 1
    assert np.isfinite(table[["memory_mib", "compile_s", "spread"]].to_numpy(float)).all()
    assert json.loads((tmp_path / "meta.json").read_text())["settings"]["only"] == ["ours vmap"]
    assert "ours vmap" in capsys.readouterr().out


@pytest.mark.more
def test_another_gradient_is_an_error(tmp_path, monkeypatch):
    """A variant that does less work is found out."""
    make = meta_cases.VARIANTS["ours vmap"]
    monkeypatch.setitem(meta_cases.VARIANTS, "ours vmap", lambda kind, sizes: make(kind, sizes._replace(steps=1)))
    with pytest.raises(SystemExit, match="another meta-gradient than in float64"):
        main(["meta", "--quick", "--repeats", "1", "--networks", "mlp", "--only", "ours vmap", "--out", str(tmp_path)])


def test_worker_names_what_it_lacks(monkeypatch, tmp_path, case):
    monkeypatch.setitem(sys.modules, "torch", None)
    np.savez(tmp_path / "case.npz", **case.arrays)
    found, why = torch_worker.variants(str(tmp_path / "case.npz"), maml_worker.VARIANTS)
    assert found == {}
    assert list(why) == list(maml_worker.VARIANTS)
    assert all("torch" in reason for reason in why.values())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--repeats", "0"], "--repeats: got 0"),
        (["--only", "ours pmap"], r"--only: got \['ours pmap'\]"),
        (["--networks"], "--networks: got none"),
        (["--torch-python", "/no/such/python"], "--torch-python: got '/no/such/python'"),
    ],
)
def test_nonsense_is_refused(arguments, message, tmp_path):
    with pytest.raises(SystemExit, match=message):
        main(["meta", "--out", str(tmp_path), *arguments])


def test_sizes_are_those_that_are_reported():
    assert Sizes() == (32, 5, 15, 28, 5)
    assert len(set(NAMES)) == len(NAMES)
    assert Settings().networks == KINDS
    support, query = meta_cases.draw_tasks(Sizes(tasks=2))
    assert support[0].shape == (2, 5, 28, 28, 1)
    assert query[1].shape == (2, 75)
