"""The search of step sizes: lanes, the rule, resumption, memory, the file that experiments read; and seeds on cores."""

import json
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pandas as pd
import pytest

from bilevel_jax import Levels, Vars, begin, resume, run, samplers, solvers, testing
from experiments import data_cleaning, grid, harness, hyperparameter_selection, seeds
from experiments.methods import LOOPED, METHODS, Rates
from experiments.speed.timing import peak_bytes


@pytest.fixture(autouse=True)
def as_users_run(monkeypatch, tmp_path_factory):
    """JAX as it comes, and a cache folder of our own."""
    monkeypatch.setenv("BILEVEL_JAX_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
    with jax.enable_x64(False), jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


def config(out, **changes):
    given = {"solvers": ("saba",), "seeds": 2, "steps": 64, "step_sizes": (0.05, 1e6), "outer_ratios": (0.1, 1.0), "lanes": 3}
    return grid.Config(**(given | changes), out=out)


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch, jax.enable_x64(False):
        patch.setenv("BILEVEL_JAX_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
        return hyperparameter_selection.task(hyperparameter_selection.Config())


def falling(rate, decay):
    return optax.sgd(lambda t: rate * (t + 1) ** -decay)


@pytest.fixture(scope="module")
def searched(tmp_path_factory):
    """A search over rates and schedules in chunks of three lanes a core, not interrupted: (folder, rows)."""
    out = tmp_path_factory.mktemp("searched") / "grid"
    with pytest.MonkeyPatch.context() as patch, jax.enable_x64(False), jax.numpy_dtype_promotion("standard"):
        patch.setenv("BILEVEL_JAX_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
        with jax.numpy_rank_promotion("allow"):
            return out, grid.main(config(out, decays=(0.0, 0.5)))


@pytest.mark.more
def test_lanes_are_plain_runs(task, searched):
    """Steps that fall and steps that do not, of another seed and rate, against optimisers made here."""
    _, table = searched
    for seed, ratio, decay in ((1001, 0.1, 0.5), (1002, 1.0, 0.0)):
        opts = Vars(falling(0.05, decay), falling(0.05, decay), falling(0.05 / ratio, decay))
        solver = solvers.saba(task.problem, opts)
        go = jax.jit(partial(run, solver, samplers.uniform(64), steps=64))
        carry, _ = go(task.start, task.data, jax.random.key(seed))
        gap = task.measure(jax.tree.map(lambda leaf: leaf[None], carry.state.vars))["suboptimality"][0]
        lane = table[(table["seed"] == seed) & (table["outer_ratio"] == ratio) & (table["decay"] == decay)].iloc[0]
        assert lane["step_size"] == 0.05
        assert lane["suboptimality"] == pytest.approx(gap, rel=1e-4)
    moved = table[table["step_size"] == 0.05]["suboptimality"]
    assert moved.nunique() == len(moved) == 8


@pytest.mark.more
def test_schedule_of_the_paper_is_the_default(task):
    """Where no decay is given; and one of 0 is a constant step."""
    blocks = Levels(4, 4)
    build = harness.METHODS["soba"].build
    batch = samplers.uniform(64).batches(task.data, jax.random.key(0), 0, 1)

    def moved(rates, steps=4):
        solver = build(task.problem, rates, blocks)
        state = solver.init(task.start, batch)
        for _ in range(steps):
            state = jax.jit(solver.update)(state, batch)
        return np.asarray(state.vars.inner)

    np.testing.assert_allclose(moved(Rates(0.1, 1.0)), moved(Rates(0.1, 1.0, decay=0.5)), rtol=1e-6)
    constant = solvers.soba(task.problem, Vars(optax.sgd(0.1), optax.sgd(0.1), optax.sgd(0.1)))
    state = constant.init(task.start, batch)
    for _ in range(4):
        state = jax.jit(constant.update)(state, batch)
    np.testing.assert_allclose(moved(Rates(0.1, 1.0, decay=0.0)), state.vars.inner, rtol=1e-6)
    assert np.abs(moved(Rates(0.1, 1.0)) - np.asarray(state.vars.inner)).max() > 1e-3


@pytest.mark.more
def test_diverged_lanes_are_recorded(searched):
    _, table = searched
    wild = table["step_size"] == 1e6
    constant = wild & (table["decay"] == 0)
    assert table[constant]["diverged"].all()
    assert (table[constant]["result"] == "NONFINITE").all()
    assert not table[~wild]["diverged"].any()
    assert (table[~wild]["result"] == "SUCCESSFUL").all()


def test_the_rule():
    """The least median, but of settings of which a seed diverges none; each solver for itself."""
    rows = [
        ("a", 0.1, [3.0, 2.0, 9.0], [0, 0, 0]),
        ("a", 0.2, [1.0, 1.0, 9.9], [0, 0, 1]),
        ("a", 0.4, [4.0, 3.5, 0.0], [0, 0, 0]),
    ]
    rows += [("b", 0.1, [1.0, np.nan, 1.0], [0, 1, 0])]
    table = pd.DataFrame(
        [
            {"solver": s, "step_size": a, "outer_ratio": 1.0, "decay": np.nan, "seed": seed, "gap": gap, "diverged": bool(bad)}
            for s, a, gaps, bads in rows
            for seed, (gap, bad) in enumerate(zip(gaps, bads, strict=True))
        ]
    )
    best = grid.choose(table, "gap")
    assert best["step_size"].to_dict() == {"a": 0.1}
    assert best["metric"].to_dict() == {"a": 3.0}


def test_edges_are_named(tmp_path):
    made = config(tmp_path, step_sizes=(0.1, 0.2, 0.3), outer_ratios=(1.0,), decays=(0.0, 0.5))
    assert grid.at_edges({"step_size": 0.3, "outer_ratio": 1.0, "decay": 0.0}, made) == ["step_size"]
    assert grid.at_edges({"step_size": 0.2, "outer_ratio": 1.0, "decay": 0.5}, made) == ["decay"]
    assert grid.at_edges({"step_size": 0.1, "outer_ratio": 1.0, "decay": 0.0}, made) == ["step_size"]


@pytest.mark.more
def test_interrupted_and_resumed_equals_uninterrupted(searched, tmp_path, monkeypatch, capsys):
    _, whole = searched
    lanes, before = [], grid.run

    def counted(call, all_lanes, chosen, *args):
        if len(lanes) and not done:
            raise KeyboardInterrupt
        lanes.extend(chosen)
        return before(call, all_lanes, chosen, *args)

    done = False
    monkeypatch.setattr(grid, "run", counted)
    given = {"decays": (0.0, 0.5)}
    with pytest.raises(SystemExit) as exit:
        grid.main(config(tmp_path / "cut", **given))
    assert exit.value.code == 130
    assert "--resume" in capsys.readouterr().err
    kept = pd.read_csv(tmp_path / "cut" / "grid.csv")
    assert 0 < len(kept) == len(lanes) < len(whole)
    done = True
    resumed = grid.main(config(tmp_path / "cut", **given, resume=True))
    assert sorted(lanes) == list(range(len(whole)))  # none twice
    pd.testing.assert_frame_equal(resumed.reset_index(drop=True), whole.reset_index(drop=True), check_exact=True)
    with pytest.raises(SystemExit, match="steps: 64 then, 32 now"):
        grid.main(config(tmp_path / "cut", **given, resume=True, steps=32))


def test_programs_are_as_wide_as_memory_allows():
    """A program whose lanes make a copy of the data each."""
    points = np.linspace(0.0, 1.0, 16, dtype=np.float32)
    lanes = grid.Lanes(jnp.asarray(points), jnp.asarray(points), None, jnp.arange(16, dtype=jnp.int32))
    data = Levels(jnp.ones(1000), jnp.ones(10))

    def function(lanes, data):
        return lanes.step_size[:, None] * data.inner[None] + lanes.seed[:, None]

    whole, width = grid.fit(function, lanes, data, 16, 1e9, copies=2)
    assert width == 16
    assert whole(lanes, data).shape == (16, 1000)
    limit = 4040 + 2 * 5.5 * 4012
    part, width = grid.fit(function, lanes, data, 16, limit, copies=2)
    assert width == 5
    assert 4040 + 2 * (peak_bytes(part) - 4040) <= limit
    with pytest.raises(SystemExit, match=r"--memory-gb: got 1e-06, expected at least 1.2.*e-05, for 2 programs of one lane"):
        grid.fit(function, lanes, data, 16, 1000, copies=2)


@pytest.mark.more
def test_settings_are_read_checked_and_recorded(searched, tmp_path):
    out, _ = searched
    path = out / "settings.json"
    written = json.loads(path.read_text())["settings"]["saba"]
    given = {"solvers": ("saba",), "seeds": 1, "steps": 16, "evaluations": 1, "settings": path}
    hyperparameter_selection.main(hyperparameter_selection.Config(**given, out=tmp_path / "run"))
    settings = json.loads((tmp_path / "run" / "config.json").read_text())["settings"]
    rates = settings["rates"]["saba"]
    assert {key: rates[key] for key in grid.AXES} == {key: written[key] for key in grid.AXES}
    assert written["step_size"] == 0.05
    assert settings["chosen"]["rule"].startswith("least median over the seeds of suboptimality after 64 updates")

    def refused(message, **changes):
        with pytest.raises(SystemExit, match=message):
            hyperparameter_selection.rates(hyperparameter_selection.Config(**(given | changes)))

    refused("chosen on another task: dataset: 'breast_cancer' there, 'ijcnn1' here", dataset="ijcnn1")
    refused("chosen on another task: batch_size: 64 there, 32 here", batch_size=32)
    refused(r"holds nothing for \['soba'\], expected one of --solvers \['saba'\]", solvers=("saba", "soba"))
    refused("got --step-size or --outer-ratio beside it", step_size=0.1)
    refused("FileNotFoundError", settings=tmp_path / "none.json")
    changed = {"negative": ("0.05", "-0.05"), "bool": ('"step_size": 0.05', '"step_size": true')}
    texts = {name: path.read_text().replace(*change) for name, change in changed.items()}
    tasks = {"no task": json.dumps(json.loads(path.read_text()) | {"task": []})}
    for name, text in {"words": "not json", "list": "[]", **texts, **tasks}.items():
        assert text != path.read_text()
        (tmp_path / name).write_text(text)
        refused("expected a settings.json of experiments.grid", settings=tmp_path / name)


@pytest.mark.more
def test_data_cleaning(tmp_path):
    """Its own task, metric and settings; a deterministic solver has one seed, and keeps the lengths of its loops."""
    given = {"experiment": "data_cleaning", "setting": "meha", "solvers": ("meha",), "steps": 20, "step_sizes": (0.1,)}
    table = grid.main(config(tmp_path, **(given | {"outer_ratios": (3.33, 33.3)})))
    assert table["seed"].tolist() == [1001] * 2
    assert set(table) >= {"validation_loss", "test_error", "f1"}
    known = json.loads((tmp_path / "settings.json").read_text())
    assert known["settings"]["meha"]["median"] == table["validation_loss"].min()
    own = data_cleaning.Config(setting="meha", solvers=("meha",), settings=tmp_path / "settings.json", steps=20)
    rates = data_cleaning.rates(own)["meha"]
    base = data_cleaning.MEHA["meha"]
    assert rates == base._replace(outer_ratio=known["settings"]["meha"]["outer_ratio"], updates=None)
    with pytest.raises(SystemExit, match="setting: 'meha' there, 'soba' here"):
        data_cleaning.rates(data_cleaning.Config(solvers=("meha",), settings=tmp_path / "settings.json"))


@pytest.mark.more
def test_no_setting_without_divergence(tmp_path, capsys):
    grid.main(config(tmp_path, step_sizes=(1e6,), outer_ratios=(1.0,)))
    assert json.loads((tmp_path / "settings.json").read_text())["none_without_divergence"] == ["saba"]
    assert "saba: none, in every setting a seed diverges" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dataset": "mnist"}, "--dataset: got 'mnist', expected one of .*'ijcnn1'"),
        ({"seeds": 0}, "--seeds: got 0, expected at least 1"),
        ({"lanes": 0}, "--lanes: got 0, expected at least 1"),
        ({"step_sizes": ()}, "--step-sizes: got none, expected at least one"),
        ({"outer_ratios": (0.0,)}, r"--outer-ratios: got \(0.0,\), expected positive numbers"),
        ({"decays": (-0.5,)}, r"--decays: got \(-0.5,\), expected numbers of at least 0"),
        ({"decays": (0.0, 0.5), "solvers": ("saba", "amigo")}, r"--decays: got \(0.0, 0.5\) for \['amigo'\], expected 0, or"),
        ({"memory_gb": 0.0}, "--memory-gb: got 0.0, expected a positive number"),
        ({"metric": "recall"}, "--metric: got 'recall', expected one of"),
    ],
)
def test_bad_options(tmp_path, changes, message):
    with pytest.raises(SystemExit, match=message):
        grid.main(config(tmp_path / "none", **changes))
    assert not (tmp_path / "none").exists()


def test_looped_solvers_are_those_with_inner_steps(task):
    """By what they cost."""
    for name, method in METHODS.items():
        few, many = (method.build(task.problem, Rates(0.1, 1.0, inner_steps=n, terms=3), Levels(4, 4)).cost for n in (10, 20))
        assert (few != many) == (name in LOOPED), name


def test_a_metric_of_another_task(tmp_path):
    with pytest.raises(SystemExit, match=r"--metric: got 'test_error', expected one of \['suboptimality'"):
        grid.main(config(tmp_path, metric="test_error"))


@pytest.mark.more
def test_seeds_side_by_side_are_those_of_single_runs():
    quadratic = testing.quadratic(jax.random.key(0))
    data, start = (jax.tree.map(lambda a: a.astype(jnp.float32), tree) for tree in (quadratic.data, quadratic.start))
    solver, sampler = solvers.saba(quadratic.problem, Vars(*map(optax.sgd, (0.2, 0.2, 0.1)))), samplers.uniform(8)
    keys = jax.vmap(jax.random.key)(jnp.arange(6))

    def one(key):
        return resume(solver, sampler, begin(solver, sampler, start, data, key), data, steps=20)[0]

    many = jax.jit(jax.vmap(one, out_axes=seeds.LANES)).lower(keys[:3]).compile()
    found = seeds.join(seeds.side_by_side(many, [keys[:3], keys[3:]]))
    assert int(found.state.step) == 20
    single = jax.jit(one)
    for lane in range(6):
        exact = single(keys[lane])
        for ours, theirs in zip(found.state.vars, exact.state.vars, strict=True):
            np.testing.assert_allclose(ours[lane], theirs, rtol=1e-5, atol=1e-6)
        assert bool(found.key[lane] == exact.key)
    assert len(np.unique(np.asarray(found.state.vars.outer), axis=0)) == 6


def test_failures_in_threads_are_heard():
    with pytest.raises(ZeroDivisionError):
        seeds.side_by_side(lambda part: 1 / part, [1, 0])


@pytest.mark.slow
def test_command_of_seeds(tmp_path):
    table = seeds.main(seeds.Config(quick=True, seeds=4, repeats=1, out=tmp_path))
    assert set(table["solver"]) == {"soba", "saba", "srba"}
    assert (table["difference"] < 1e-5).all()
    ways = {
        "one after the other",
        "vmap",
        "a thread a core, each a vmap",
        "map of vmaps of 4",
        "vmap, batches read seed by seed",
    }
    assert set(table["way"]) >= ways
    assert pd.read_csv(tmp_path / "seeds.csv").shape == table.shape
