"""The experiments end to end on small settings: files, resumption, interruption, divergence, references, errors."""

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
import pytest
import tyro
from sklearn.metrics import f1_score

from bilevel_jax import Levels, run
from experiments import data, data_cleaning, harness, hyperparameter_selection, logistic
from experiments.methods import METHODS, Name, Rates
from tests.tables import thinned

ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def as_users_run(monkeypatch, tmp_path_factory):
    """JAX as it comes, and a cache folder of our own."""
    monkeypatch.setenv("BILEVEL_JAX_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
    with jax.enable_x64(False), jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


def selection(out, **changes):
    settings = {"solvers": ("saba", "srba"), "seeds": 2, "steps": 64, "evaluations": 4, "out": out}
    return hyperparameter_selection.Config(**(settings | changes))


def rows(out):
    return pd.read_csv(out / "history.csv").drop(columns="seconds")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """One uninterrupted run, that the others are compared with."""
    out = tmp_path_factory.mktemp("finished") / "run"
    os.environ["BILEVEL_JAX_CACHE"] = str(tmp_path_factory.getbasetemp() / "cache")
    with jax.enable_x64(False), jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        hyperparameter_selection.main(selection(out))
    return out


def test_files_and_columns(finished):
    config = json.loads((finished / "config.json").read_text())
    assert config["sessions"][0]["versions"]["jax"] == jax.__version__
    assert config["sessions"][0]["machine"]["device"].startswith("cpu")
    assert config["facts"]["reference"]["starts"] == 5
    rates = config["settings"]["rates"]["saba"]
    assert (rates["step_size"], rates["outer_ratio"], rates["updates"]) == (0.05, 0.1, None)
    table = pd.read_csv(finished / "history.csv")
    assert list(table)[:5] == ["solver", "seed", "step", "oracle_calls", "seconds"]
    assert len(table) == 2 * 2 * 5
    assert table.groupby(["solver", "seed"])["step"].apply(list).iloc[0] == [0, 16, 32, 48, 64]
    assert np.isfinite(table.select_dtypes("number")).all(axis=None)
    # a full pass of SRBA reads 5 + 5 blocks, each 3 inner calls and 1 outer pair, once in (5 + 5) // 2 steps
    calls = table[table["step"] == 64].groupby("solver")["oracle_calls"].first()
    assert calls["saba"] == 64 * 4
    assert calls["srba"] == pytest.approx(64 * (0.8 * 8 + 0.2 * (3 * 5 + 5)))
    assert (finished / "figure.png").read_bytes()[:4] == b"\x89PNG"
    assert (finished / "figure.pdf").read_bytes()[:4] == b"%PDF"
    assert not any((finished / "checkpoints").glob("*")) if (finished / "checkpoints").exists() else True


def test_solvers_descend(finished):
    table = pd.read_csv(finished / "history.csv")
    ends = table.groupby(["solver", "seed"])["suboptimality"].agg(["first", "last"])
    assert (ends["last"] < 0.97 * ends["first"]).all()
    assert (ends["last"] > 0).all()


@pytest.mark.more
def test_interrupted_and_resumed_equals_uninterrupted(finished, tmp_path, monkeypatch, capsys):
    out = tmp_path / "run"
    add, calls = harness.Store.add, []

    def interrupted(store, *args):
        calls.append(args)
        if len(calls) == 8:  # in the middle of the second solver
            raise KeyboardInterrupt
        add(store, *args)

    monkeypatch.setattr(harness, "SAVE_EVERY", 0.0)
    monkeypatch.setattr(harness.Store, "add", interrupted)
    with pytest.raises(SystemExit) as exit:
        hyperparameter_selection.main(selection(out))
    assert exit.value.code == 130
    assert "--resume" in capsys.readouterr().err
    assert len(rows(out)) == 2 * 7
    assert (out / "figure.png").exists()
    with (out / "history.csv").open("a") as file:
        file.write("srba,1,48,0.")  # a line cut off by a kill
    monkeypatch.setattr(harness.Store, "add", add)
    hyperparameter_selection.main(selection(out, resume=True))
    pd.testing.assert_frame_equal(rows(out), rows(finished), check_exact=True)


@pytest.mark.slow
def test_resume_without_checkpoint_starts_the_solver_again(finished, tmp_path, monkeypatch):
    out = tmp_path / "run"
    add, calls = harness.Store.add, []

    def killed(store, *args):
        calls.append(args)
        if len(calls) == 4:
            raise RuntimeError("killed")
        add(store, *args)

    monkeypatch.setattr(harness.Store, "add", killed)
    with pytest.raises(RuntimeError, match="killed"):
        hyperparameter_selection.main(selection(out))
    monkeypatch.setattr(harness.Store, "add", add)
    hyperparameter_selection.main(selection(out, resume=True))
    pd.testing.assert_frame_equal(rows(out), rows(finished), check_exact=True)


def test_other_settings_are_not_resumed(finished):
    with pytest.raises(SystemExit, match=r"batch_size: 64 then, 32 now"):
        hyperparameter_selection.main(selection(finished, resume=True, batch_size=32))
    with pytest.raises(SystemExit, match="holds a run already"):
        hyperparameter_selection.main(selection(finished))


def test_nothing_to_resume(tmp_path):
    with pytest.raises(SystemExit, match=r"config\.json of an interrupted run"):
        hyperparameter_selection.main(selection(tmp_path / "none", resume=True))


def test_overwrite_spares_folders_of_others(tmp_path):
    (tmp_path / "precious.txt").write_text("mine")
    with pytest.raises(SystemExit, match="delete it yourself"):
        hyperparameter_selection.main(selection(tmp_path, overwrite=True))
    assert (tmp_path / "precious.txt").exists()


@pytest.mark.more
def test_divergence_is_recorded_and_reported(tmp_path, capsys):
    hyperparameter_selection.main(selection(tmp_path / "run", step_size=1e6, solvers=("soba",)))
    table = pd.read_csv(tmp_path / "run" / "history.csv")
    assert table[table["step"] == 64]["suboptimality"].isna().all()
    assert len(table) == 2 * 5
    said = capsys.readouterr().err
    assert "soba: seeds [1, 2] of 2 ended with NONFINITE" in said
    assert json.loads((tmp_path / "run" / "results.json").read_text()) == {"soba": ["NONFINITE", "NONFINITE"]}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seeds": 0}, "--seeds: got 0, expected at least 1"),
        ({"batch_size": -1}, "--batch-size: got -1, expected at least 1"),
        ({"step_size": -0.5}, "--step-size: got -0.5, expected a positive number"),
        ({"resume": True, "overwrite": True}, "expected at most one"),
    ],
)
def test_bad_options(tmp_path, changes, message):
    with pytest.raises(SystemExit, match=message):
        selection(tmp_path, **changes)


def test_steps_are_a_multiple_of_evaluations(tmp_path):
    with pytest.raises(SystemExit, match="--steps: got 65, expected a multiple of --evaluations = 4"):
        hyperparameter_selection.main(selection(tmp_path / "run", steps=65))


def test_batch_size_larger_than_the_data(tmp_path):
    with pytest.raises(ValueError, match="batch_size: got 400 rows"):
        hyperparameter_selection.main(selection(tmp_path / "run", batch_size=400))


@pytest.mark.more
def test_coin_runs_lanes_one_after_the_other(tmp_path):
    """The sequential lanes of SPABA are those of the single runs: a pass on every step would show in the compiled text."""
    config = selection(tmp_path, solvers=("spaba",), steps=16, evaluations=2)
    hyperparameter_selection.main(dataclasses.replace(config, out=tmp_path / "two"))
    hyperparameter_selection.main(dataclasses.replace(config, out=tmp_path / "one", seeds=1))
    two, one = rows(tmp_path / "two"), rows(tmp_path / "one")
    first = two[two["seed"] == 1].reset_index(drop=True)
    np.testing.assert_allclose(first["suboptimality"], one["suboptimality"], rtol=1e-5)


@pytest.mark.more
def test_data_cleaning(tmp_path):
    config = data_cleaning.Config(solvers=("soba", "saba"), seeds=2, steps=256, evaluations=2, out=tmp_path / "run")
    data_cleaning.main(config)
    table = pd.read_csv(tmp_path / "run" / "history.csv")
    start, end = (table[table["step"] == step].reset_index() for step in (0, 256))
    assert set(table) >= {"test_error", "validation_loss", "recall"}
    assert (start["test_error"] > 0.8).all()
    assert (end["test_error"] < 0.3).all()
    assert (end["recall"] > start["recall"] + 0.15).all()


def test_corruption_out_of_range(tmp_path):
    with pytest.raises(SystemExit, match=r"--corruption: got 1.5"):
        data_cleaning.main(data_cleaning.Config(corruption=1.5, out=tmp_path / "run"))


def test_every_method_builds():
    rates, blocks = Rates(0.1, 1.0, inner_steps=4, terms=3), Levels(4, 4)
    draws = {name: METHODS[name].build(logistic.binary, rates, blocks).draws for name in METHODS}
    assert (draws["soba"], draws["fsla"], draws["aid_cg"], draws["stocbio"], draws["mrbo"]) == (1, 3, 3, 4 + 4 + 1, 4)
    assert set(get_args(Name)) == set(METHODS)


@pytest.mark.slow
def test_settings_of_the_thesis(tmp_path):
    """Stochastic and deterministic solvers in one comparison: own batches and lanes, calls as they were spent."""
    names = ("stocbio", "hoag")
    config = data_cleaning.Config(
        setting="thesis", solvers=names, seeds=2, steps=2, evaluations=2, corruption=0.4, out=tmp_path / "run"
    )
    data_cleaning.main(config)
    table = pd.read_csv(tmp_path / "run" / "history.csv")
    assert table.groupby("solver")["seed"].nunique().to_dict() == {"stocbio": 2, "hoag": 1}
    ends = table[table["step"] == 2].groupby("solver")["oracle_calls"].first()
    inner, outer, many = 1000 / 64, 400 / 64, 400 / 64
    assert ends["stocbio"] == pytest.approx(2 * ((200 + 3 + 1) * inner + 2 * min(outer, inner)))
    assert 2 * many < ends["hoag"] <= 2 * ((200 + 1 + 200 + 3 + 1) * inner + 2 * many)
    assert np.isfinite(table["test_loss"]).all()
    losses = table.groupby("solver")["test_loss"].agg(["first", "last"])
    assert (losses["last"] < losses["first"]).all()


def test_sizes_of_the_meha_setting(monkeypatch):
    def made(dataset, **options):
        assert options == {"corruption": 0.5, "train": 5000, "validation": 5000, "seed": 3, "shuffle": True}
        return dataset

    assert data_cleaning.load(data_cleaning.Config(setting="meha"), 1).train_x.shape == (500, 65)
    monkeypatch.setattr(data, "shifted", made)
    for dataset in ("mnist", "fashion_mnist"):
        assert data_cleaning.load(data_cleaning.Config(setting="meha", dataset=dataset), 3) == dataset


@pytest.mark.parametrize("shift", [-10.0, -0.3, 0.0, 10.0])
def test_f1_is_that_of_scikit_learn(shift):
    random = np.random.default_rng(0)
    x, corrupted = random.normal(size=200) + shift, random.random(200) < 0.5
    expected = f1_score(~corrupted, x >= 0, zero_division=0.0)
    assert float(data_cleaning.f1(jnp.asarray(x), jnp.asarray(corrupted))) == pytest.approx(expected, abs=1e-6)


def test_f1_of_the_start_and_of_the_truth():
    corrupted = jnp.arange(10) % 2 == 0
    assert float(data_cleaning.f1(jnp.zeros(10), corrupted)) == pytest.approx(2 / 3)
    assert float(data_cleaning.f1(jnp.where(corrupted, -1.0, 1.0), corrupted)) == 1.0


@pytest.mark.slow
def test_meha_setting(tmp_path, monkeypatch):
    """Two draws differ, cleaning is better than none, and a run goes on at the draw where it was left."""
    monkeypatch.setattr(harness.Store, "draw", lambda *args: None)  # only the figure over all draws: figures are slow
    settings = {"setting": "meha", "solvers": ("meha",), "draws": 2, "steps": 60, "evaluations": 2}
    data_cleaning.main(data_cleaning.Config(**settings, out=tmp_path / "whole"))
    table = rows(tmp_path / "whole")
    ends = table[table["step"] > 0].groupby(["solver", "seed"]).last()
    starts = table[table["step"] == 0].groupby(["solver", "seed"]).last()
    assert starts.loc["meha", "f1"].to_numpy() == pytest.approx(2 / 3)
    assert ends.loc["clean rows", "f1"].tolist() == [1, 1]
    assert ends.loc["all rows", "f1"].to_numpy() == pytest.approx(2 / 3)
    assert (ends.loc["meha", "f1"] > 0.85).all()
    assert (ends.loc["meha", "test_error"] < ends.loc["all rows", "test_error"]).all()
    assert ends.loc["meha", "validation_loss"].nunique() == 2
    # an update of MEHA makes four inner gradients and two outer pairs, each of 500 rows
    assert ends.loc["meha", "oracle_calls"].unique() == pytest.approx(60 * 6 * 500 / 64)
    assert ends.loc["clean rows", "oracle_calls"].unique() == pytest.approx(60 * 6 * 500 / 64)

    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    shutil.rmtree(tmp_path / "cut" / "draw_2")
    (tmp_path / "cut" / "history.csv").unlink()
    plain = pd.read_csv(tmp_path / "whole" / "draw_2" / "baselines.csv")
    monkeypatch.setattr(data_cleaning, "baselines", lambda *args: plain)  # they take longer than the solver
    data_cleaning.main(data_cleaning.Config(**settings, out=tmp_path / "cut", resume=True))
    pd.testing.assert_frame_equal(rows(tmp_path / "cut"), table, check_exact=True)
    assert (tmp_path / "cut" / "figure.png").exists()


@thinned("name", [name for name in data_cleaning.MEHA if METHODS[name].full], "meha")
def test_methods_of_the_meha_setting_step(name):
    config = data_cleaning.Config(setting="meha")
    made = data_cleaning.task(config, data_cleaning.load(config))
    solver, sampler = harness.build(made, name, data_cleaning.MEHA[name], 64)
    carry, _ = run(solver, sampler, made.start, made.data, jax.random.key(0), steps=20)
    before, after = (made.measure(jax.tree.map(lambda leaf: leaf[None], vars)) for vars in (made.start, carry.state.vars))
    assert after["validation_loss"] < before["validation_loss"]
    assert float(abs(carry.state.vars.outer).max()) > 0.01


def test_draws_are_for_the_meha_setting(tmp_path):
    with pytest.raises(SystemExit, match="--draws: got 2, expected 1, or with --setting meha more"):
        data_cleaning.main(data_cleaning.Config(draws=2, out=tmp_path / "run"))


@pytest.fixture(scope="module")
def small():
    """Logistic regressions of 40 rows and 3 features: (problem, data, shape of z, size of x)."""
    random = np.random.default_rng(0)
    with jax.enable_x64(True):
        a, b = (jnp.asarray(random.normal(size=(40, 3))) for _ in range(2))
        signs = Levels((a, jnp.sign(a[:, 0] + 0.5)), (b, jnp.sign(b[:, 0] + 0.4)))
        classes = Levels((a, jnp.asarray(random.integers(0, 4, 40))), (b, jnp.asarray(random.integers(0, 4, 40))))
    return {"binary": (logistic.binary, signs, (3,), 3), "softmax": (logistic.softmax, classes, (3, 4), 4)}


class TestExact:
    """The reference solution against finite differences and an independent solution."""

    @thinned("kind", ["binary", "softmax"], "softmax")
    def test_gradient_of_h(self, small, kind):
        problem, levels, shape, dim = small[kind]
        with jax.enable_x64(True):
            evaluate = jax.jit(logistic.exact(problem, levels))
            x = jnp.linspace(-2.0, 0.5, dim, dtype=jnp.float64)
            guess = jnp.full(shape, 3.0, jnp.float64)  # far from the solution: the step must be damped
            found = evaluate(x, guess)
            assert found.residual < 1e-13
            for k in range(dim):
                step = 1e-5 * jnp.eye(dim, dtype=jnp.float64)[k]
                slope = (evaluate(x + step, guess).value - evaluate(x - step, guess).value) / 2e-5
                np.testing.assert_allclose(found.gradient[k], slope, rtol=1e-6, atol=1e-10)

    @thinned("kind", ["binary", "softmax"], "binary")
    def test_hessian(self, small, kind):
        problem, levels, shape, dim = small[kind]
        with jax.enable_x64(True):
            x, z = jnp.linspace(-1.0, 1.0, dim), jnp.linspace(-1.0, 1.0, int(np.prod(shape)))
            expected = jax.hessian(lambda z: problem.inner(z.reshape(shape), x, levels.inner).mean())(z)
            np.testing.assert_allclose(logistic.inner_hessian(z.reshape(shape), x, levels.inner), expected, atol=1e-14)

    def test_minimum(self, small):
        problem, levels, shape, dim = small["binary"]
        with jax.enable_x64(True):
            evaluate = jax.jit(logistic.exact(problem, levels))
            starts = [np.zeros(dim), np.full(dim, -3.0)]
            best = logistic.minimise(evaluate, starts, np.zeros(shape))
            assert best.slope < 1e-10
            random = np.random.default_rng(1)
            for _ in range(20):
                x = np.clip(best.point + random.normal(size=dim), -logistic.BOX, logistic.BOX)
                assert float(evaluate(x, np.zeros(shape)).value) >= best.value - 1e-14


@pytest.mark.more
def test_help_and_bad_names():
    run = subprocess.run(
        [sys.executable, "-m", "experiments.hyperparameter_selection", "--help"], capture_output=True, text=True, cwd=ROOT
    )
    assert run.returncode == 0
    assert "--outer-ratio" in run.stdout
    with pytest.raises(SystemExit) as exit:
        tyro.cli(data_cleaning.Config, args=["--solvers", "sgd"])
    assert exit.value.code == 2


@pytest.mark.slow
def test_terminated_process_can_be_resumed(tmp_path):
    """A real process, terminated in the middle, resumed, compared with one that was left alone."""
    command = [sys.executable, "-m", "experiments.data_cleaning", "--solvers", "soba", "--steps", "16384", "--seeds", "2"]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}

    def run(out, *more):
        return subprocess.run([*command, "--out", str(out), *more], cwd=ROOT, env=environment, capture_output=True, check=True)

    cut, whole = tmp_path / "cut", tmp_path / "whole"
    process = subprocess.Popen([*command, "--out", str(cut)], cwd=ROOT, env=environment, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline and not ((cut / "history.csv").exists() and len(rows(cut)) > 8):
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=120)
    assert process.returncode == 130
    partial = len(rows(cut))
    assert 8 < partial < 66
    run(cut, "--resume")
    run(whole)
    pd.testing.assert_frame_equal(rows(cut), rows(whole), check_exact=True)


def test_ijcnn1_is_the_papers():
    try:
        table = data.ijcnn1()
    except data.DataFileError as error:
        pytest.skip(str(error).split("\n")[0])
    assert table.train_x.shape == (49_990, 22)
    assert table.test_x.shape == (91_701, 22)
