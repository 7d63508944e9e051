"""Long runs: killed and taken up, bit for bit; what they write, what they refuse, and that they do not make the device wait.

This file is a program, too: ``python tests/test_checkpoints.py FOLDER`` does the run that is killed.
"""

import json
import struct
import sys
from functools import partial
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax

from bilevel_jax import Levels, Problem, Result, Vars, begin, checkpoints, guard, run, samplers, solvers, stream
from bilevel_jax.checkpoints import run_long
from bilevel_jax.results import frozen
from tests.checks import check_same
from tests.tables import STEPS, build, thinned, tiny, tiny_sampler

ROOT = Path(__file__).parent.parent


def x_of(vars: Vars, data: Levels) -> dict[str, jax.Array]:
    del data
    return {"x": vars.outer, "positive": vars.outer > 0}


def go(folder: Path, steps: int = 40, **changes: Any) -> Any:
    """A small run."""
    settings = {"folder": folder, "every": 5, "save_every": 10, "metrics": x_of} | changes
    q = tiny()
    parts = {
        "solver": build("saba", q.problem),
        "sampler": tiny_sampler(),
        "vars": q.start,
        "data": q.data,
        "key": jax.random.key(3),
    }
    parts = {name: settings.pop(name, part) for name, part in parts.items()}
    return run_long(*parts.values(), steps=steps, **settings)


def same_runs(one: Any, other: Any) -> None:
    """The same carry and history, bit for bit."""
    for (carry, history), (expected, rows) in ((one, other),):
        check_same(carry, expected)
        check_same(history, rows)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """One run, that the others are compared with."""
    return go(tmp_path_factory.mktemp("uninterrupted"))


def test_equals_run(uninterrupted):
    """The same as `run`, but for what the compiler makes of chunks."""
    q = tiny()
    carry, history = jax.jit(
        lambda key: run(build("saba", q.problem), tiny_sampler(), q.start, q.data, key, steps=40, every=5, metrics=x_of)
    )(jax.random.key(3))
    check_same(uninterrupted[0], carry, tol=1e-13)
    check_same(dict(sorted(uninterrupted[1].items())), jax.tree.map(np.asarray, history), tol=1e-13)
    assert uninterrupted[1]["step"].tolist() == list(range(0, 41, 5))


@thinned(
    "moment",
    ["after a row", "in the midst of a line", "after a checkpoint, before its last row is read"],
    "in the midst of a line",
)
def test_taken_up_after_an_error(uninterrupted, tmp_path, moment):
    """At step 25: five updates after the last checkpoint, or right after one."""
    stop = 20 if moment.startswith("after a checkpoint") else 25

    def report(progress):
        if progress.step == stop:
            raise RuntimeError("power cut")

    with pytest.raises(RuntimeError, match="power cut"):
        go(tmp_path, report=report)
    lines = (tmp_path / "history.csv").read_text().splitlines()
    assert lines[-1].startswith(f"{stop},")
    if moment == "in the midst of a line":
        with (tmp_path / "history.csv").open("a") as file:
            file.write("30,0.12")
    seen = []
    same_runs(go(tmp_path, report=lambda progress: seen.append(progress.step)), uninterrupted)
    assert seen == [25, 30, 35, 40]


def test_finished_and_extended(uninterrupted, tmp_path):
    """A run that is done is not done again; more steps take it further, as if they had been asked for at once."""
    go(tmp_path, steps=25)
    seen = []
    same_runs(go(tmp_path, steps=40, report=lambda progress: seen.append(progress.step)), uninterrupted)
    assert seen == [30, 35, 40]
    same_runs(go(tmp_path, steps=40, report=lambda progress: seen.append(progress.step)), uninterrupted)
    assert seen == [30, 35, 40]
    with pytest.raises(ValueError, match=r"steps: got 35, expected at least 40, which the run in .* has done already"):
        go(tmp_path, steps=35)


def test_checkpoints_that_are_kept(tmp_path):
    go(tmp_path, steps=60, keep=2)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["50", "60"]


def test_half_written_checkpoints_are_no_checkpoints(uninterrupted, tmp_path):
    go(tmp_path, steps=20)
    (tmp_path / "checkpoints" / "20").rename(tmp_path / "checkpoints" / "20.orbax-checkpoint-tmp")
    same_runs(go(tmp_path), uninterrupted)
    assert all(path.name.isdigit() for path in (tmp_path / "checkpoints").iterdir())


def test_progress(tmp_path):
    seen = []
    go(tmp_path, report=seen.append)
    assert [progress.step for progress in seen] == list(range(0, 41, 5))
    assert {progress.steps for progress in seen} == {40}
    assert np.isnan(seen[0].seconds_left)
    assert seen[-1].seconds_left == 0.0
    assert all(progress.seconds_left > 0 for progress in seen[1:-1])
    assert [set(progress.row) for progress in seen] == [{"step", "x", "positive"}] * 9
    assert all(type(value) in (int, float) for progress in seen for value in progress.row.values())


def test_nothing_is_printed(tmp_path, capfd):
    go(tmp_path, steps=10)
    assert capfd.readouterr() == ("", "")


def test_history_keeps_dtypes_and_digits(uninterrupted):
    _, history = uninterrupted
    assert {name: column.dtype for name, column in history.items()} == {"step": np.int32, "x": np.float64, "positive": np.bool_}
    assert history["positive"].tolist() == (history["x"] > 0).tolist()


def test_without_metrics(tmp_path):
    _, history = go(tmp_path, steps=20, metrics=None)
    carry, history = go(tmp_path, steps=30, metrics=None)
    assert list(history) == ["step"]
    assert history["step"].tolist() == [0, 5, 10, 15, 20, 25, 30]
    assert int(carry.state.step) == 30


# ---- what is refused ----------------------------------------------------------------------------------------------------


def other_data() -> Levels:
    inner, outer = tiny().data
    return Levels((inner[0].at[0].add(1e-6), inner[1]), outer)


OTHERS = [
    (lambda: {"every": 10}, "every was 5, is 10"),
    (lambda: {"key": jax.random.key(4)}, "the values of data, key or vars are not the same"),
    (lambda: {"solver": build("saba", tiny().problem, Vars(0.2, 0.2, 0.11))}, "the solver, its rates, the losses"),
    (lambda: {"data": other_data()}, "the values of data, key or vars are not the same"),
    (lambda: {"solver": build("soba", tiny().problem)}, r"\['carry'\]\.state\.stages"),
    (lambda: {"metrics": None}, "the metrics are not the same"),
    (lambda: {"sampler": samplers.epochs(2)}, "the solver, its rates, the losses, the sampler"),
]


@thinned(("changes", "message"), OTHERS, *OTHERS[:3])
def test_another_run_is_not_taken_up(uninterrupted, tmp_path, changes, message):
    go(tmp_path, steps=10)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    with pytest.raises(ValueError, match="folder: got .* which holds another run, expected another folder: .*" + message):
        go(tmp_path, **changes())
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_another_version_of_jax_is_named(tmp_path):
    go(tmp_path, steps=10)
    facts = json.loads((tmp_path / "run.json").read_text())
    (tmp_path / "run.json").write_text(json.dumps(facts | {"jax": "0.1"}))
    go(tmp_path, steps=10)  # it compiles the same program: no matter
    (tmp_path / "run.json").write_text(json.dumps(facts | {"jax": "0.1", "program": "another"}))
    with pytest.raises(ValueError, match=rf"jax was 0\.1, is {jax.__version__}"):
        go(tmp_path)


@pytest.mark.parametrize("name", ["history.csv", "checkpoints"])
def test_files_of_others_are_spared(tmp_path, name):
    (tmp_path / name).mkdir()
    with pytest.raises(ValueError, match=rf"which holds {name} but no run\.json"):
        go(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_two_runs_in_one_folder_are_refused(uninterrupted, tmp_path):
    """The second one changes nothing, and the first goes on."""
    seen = []

    def report(progress):
        if progress.step == 20:
            before = {path: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
            with pytest.raises(ValueError, match=r"folder: got .*, in which another process runs, expected another folder"):
                go(tmp_path)
            assert {path: path.read_bytes() for path in before} == before
        seen.append(progress.step)

    same_runs(go(tmp_path, report=report), uninterrupted)
    assert seen == list(range(0, 41, 5))


def test_several_processes_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(ValueError, match="folder: got 2 processes of JAX, which would all write it, expected one"):
        go(tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_names_with_commas(tmp_path):
    metrics = lambda vars, data: {"x, the outer one": vars.outer, 'a "quoted" name': vars.outer + 1}
    go(tmp_path, steps=10, metrics=metrics)
    _, history = go(tmp_path, steps=20, metrics=metrics)
    np.testing.assert_array_equal(history['a "quoted" name'], history["x, the outer one"] + 1)
    assert history["step"].tolist() == [0, 5, 10, 15, 20]


def test_rows_that_are_missing_are_not_made_up(tmp_path):
    go(tmp_path, steps=20)
    path = tmp_path / "history.csv"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-2]))
    with pytest.raises(ValueError, match="expected the rows of a run up to step 20"):
        go(tmp_path)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"steps": 42}, ValueError, "steps: got 42, expected a multiple of every = 5"),
        ({"save_every": 12}, ValueError, "save_every: got 12, expected a multiple of every = 5"),
        ({"every": 0}, ValueError, "every: got 0, expected at least 1"),
        ({"keep": 0}, ValueError, "keep: got 0, expected at least 1"),
        ({"save_every": 2.5}, TypeError, "save_every: got 2.5 of type float"),
        ({"key": 0}, TypeError, "key: got 0"),
        (
            {"metrics": lambda vars, data: {"x": lax.complex(vars.outer, vars.outer)}},
            ValueError,
            "metrics: got 'x' of dtype complex",
        ),
        ({"metrics": lambda vars, data: {"x\ny": vars.outer}}, ValueError, r"metrics: got the name 'x\\ny', expected one of"),
    ],
)
def test_bad_arguments(tmp_path, changes, error, message):
    with pytest.raises(error, match=message):
        go(tmp_path / "run", **changes)
    assert not (tmp_path / "run").exists()


def test_without_orbax(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "orbax.checkpoint", None)
    with pytest.raises(ImportError, match=r"pip install 'bilevel-jax\[checkpoints\]'"):
        go(tmp_path / "run")
    assert not (tmp_path / "run").exists()


# ---- the device is not made to wait -------------------------------------------------------------------------------------


@pytest.mark.parametrize("turns", [0, 1, 4])
def test_a_row_is_read_when_the_next_chunk_is_on_its_way(turns):
    events = []

    def advance(carry, turn):
        events.append(f"send {turn}")
        return carry + 1, turn

    for carry, out in checkpoints.ahead(advance, 0, range(turns)):
        events.append(f"read {out}")
        assert carry == min(out + 2, turns)
    expected = [f"send {t}" for t in range(min(turns, 2))]
    for t in range(turns):
        expected += [f"read {t}", *([f"send {t + 2}"] if t + 2 < turns else [])]
    assert events == expected


def test_the_compiled_chunk_calls_no_host(tmp_path, monkeypatch):
    """No callback in the program, and what it is given comes back as its own memory: the carry is donated."""
    texts = []
    drive = checkpoints._drive

    def spied(program, *args):
        texts.append(program.as_text())
        return drive(program, *args)

    monkeypatch.setattr(checkpoints, "_drive", spied)
    go(tmp_path, steps=10)
    (text,) = texts
    assert "callback" not in text
    assert "outfeed" not in text
    assert "input_output_alias" in text


# ---- a guard that freezes, or goes on -----------------------------------------------------------------------------------


def diverging(halvings: int) -> Any:
    def make(scale):
        return build("saba", tiny().problem, Vars(*(40 * scale * step for step in STEPS)))

    return guard(make, halvings=halvings, limit=50.0) if halvings else guard(make(1.0), limit=50.0)


def test_a_frozen_run_stops_and_says_so(tmp_path):
    carry, history = go(tmp_path / "whole", steps=60, solver=diverging(0), every=1, save_every=4)
    last = int(history["step"][-1])
    assert 2 <= last < 58, "it should diverge on the way"
    assert last % 4, "and not at a checkpoint: choose another rate"
    assert int(carry.result) == Result.DIVERGED
    assert bool(frozen(carry.state))
    assert int(carry.state.step) == last
    assert np.abs(history["x"]).max() <= 50.0

    # taken up it stays where it is; cut off before it went wrong, it stops at the same place
    before = (tmp_path / "whole" / "history.csv").read_bytes()
    again, rows = go(tmp_path / "whole", steps=60, solver=diverging(0), every=1, save_every=4)
    check_same(again, carry)
    assert (tmp_path / "whole" / "history.csv").read_bytes() == before

    def report(progress):
        if progress.step == last - 1:
            raise RuntimeError("cut")

    with pytest.raises(RuntimeError, match="cut"):
        go(tmp_path / "cut", steps=60, solver=diverging(0), every=1, save_every=1, report=report)
    carry_cut, rows = go(tmp_path / "cut", steps=60, solver=diverging(0), every=1, save_every=1)
    check_same(carry_cut, carry)
    check_same(rows, history)


@pytest.mark.more
def test_halved_rates_go_on_over_interruptions(tmp_path):
    settings = {"steps": 40, "solver": diverging(20), "every": 1, "save_every": 2}
    whole = go(tmp_path / "whole", **settings)
    assert whole[1]["step"][-1] == 40
    assert int(whole[0].result) == Result.DIVERGED
    assert float(whole[0].state.stages[1].scale) < 1.0
    for stop in (3, 7, 20):
        with pytest.raises(RuntimeError, match="cut"):
            go(tmp_path / "cut", **settings, report=partial(cut_at, stop))
    same_runs(go(tmp_path / "cut", **settings), whole)


def cut_at(stop, progress):
    if progress.step == stop:
        raise RuntimeError("cut")


# ---- streams ------------------------------------------------------------------------------------------------------------


@pytest.mark.more
def test_a_stream_is_taken_up(tmp_path):
    """Saved while its state is donated to the next update, over and over: what comes back is what was saved."""
    q, solver = tiny(), build("saba", tiny().problem)
    start = begin(solver, tiny_sampler(), q.start, q.data, jax.random.key(3)).state

    def batches(first):
        return (tiny_sampler().batches(q.data, jax.random.key(3), t * solver.draws, solver.draws) for t in range(first, 12))

    kept = {int(row["step"]): jax.tree.map(jnp.copy, state) for state, row in stream(solver, start, batches(0), every=1)}
    with checkpoints.manager(tmp_path) as saved:
        assert checkpoints.restore(saved, start) is None
        for state, row in stream(solver, start, islice(batches(0), 7), every=1):
            checkpoints.save(saved, int(row["step"]), state)
    with checkpoints.manager(tmp_path) as saved:
        state = checkpoints.restore(saved, start)
    check_same(state, kept[7])
    *_, (end, _) = stream(solver, state, batches(7), every=1)
    check_same(end, kept[12])


# ---- TensorBoard --------------------------------------------------------------------------------------------------------


def test_tensorboard(tmp_path):
    """Read back as records of its format: a length, a checksum, an event, a checksum."""
    pytest.importorskip("tensorboardX")
    Event = pytest.importorskip("tensorboardX.proto.event_pb2").Event

    def read():
        found = []
        for path in sorted((tmp_path / "board").iterdir(), key=lambda path: path.stat().st_mtime_ns):
            rest = path.read_bytes()
            while rest:
                (length,) = struct.unpack("<Q", rest[:8])
                found.append(Event.FromString(rest[12 : 12 + length]))
                rest = rest[16 + length :]
        return found

    with checkpoints.tensorboard(tmp_path / "board") as report:
        _, history = go(tmp_path / "run", steps=10, report=report)
    scalars = [(e.step, v.tag, v.simple_value) for e in read() for v in e.summary.value]
    assert [(step, tag) for step, tag, _ in scalars] == [(s, tag) for s in (0, 5, 10) for tag in ("positive", "x")]
    np.testing.assert_allclose([value for _, tag, value in scalars if tag == "x"], history["x"], rtol=1e-6)
    with checkpoints.tensorboard(tmp_path / "board") as report:
        go(tmp_path / "run", steps=15, report=report)
    starts = [e.step for e in read() if e.session_log.status == 1]
    assert starts[-1] == 15, "what an earlier session wrote from there on is to be hidden"


def test_without_tensorboardx(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    with pytest.raises(ImportError, match=r"pip install 'bilevel-jax\[tensorboard\]'"), checkpoints.tensorboard(tmp_path):
        pass


# ---- killed -------------------------------------------------------------------------------------------------------------

WIDE, ROWS, CHUNKS = 20_000, 120, 400  # tables of 60 blocks, 4.8 MB each: a save takes a while


def heavy(folder: Path) -> Any:
    """A run with large tables."""

    def inner(z, x, a):
        return 0.5 * ((z[None] - a[:, None] * x[None]) ** 2).sum(1)

    def outer(z, x, b):
        return 0.5 * ((z[None] - b[:, None]) ** 2).mean(1)

    rows = np.linspace(0.5, 1.5, ROWS, dtype=np.float32)
    solver = solvers.saba(Problem(inner, outer), Vars(*map(optax.sgd, (0.1, 0.1, 0.05))))
    start = Vars(jnp.zeros(WIDE, jnp.float32), None, jnp.linspace(-1.0, 1.0, WIDE, dtype=jnp.float32))
    return run_long(
        solver,
        samplers.uniform(2),
        start,
        Levels(jnp.asarray(rows), jnp.asarray(rows[::-1].copy())),
        jax.random.key(0),
        folder=folder,
        steps=2 * CHUNKS,
        every=2,
        save_every=40,
        metrics=lambda vars, data: {"x": vars.outer[0], "z": vars.inner.mean()},
    )


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """The run, uninterrupted, and killed three times: before it begins, among its updates, and while it saves."""
    from experiments.long_run import kill

    whole, folder = (tmp_path_factory.mktemp("killed") / name for name in ("whole", "cut"))
    expected = heavy(whole)
    command = [sys.executable, "-m", "tests.test_checkpoints", str(folder)]
    kills = [kill(command, folder, "updates", 0.1), kill(command, folder, "save", 0.0)]
    for _ in range(20):
        if kills[-1] is None or kills[-1].saving:
            break
        kills[-1] = kill(command, folder, "save", 0.0)  # the last save was quicker than we
    kills.append(kill(command, folder, "start", 0.7))
    return SimpleNamespace(kills=kills, expected=expected, found=heavy(folder), whole=whole, folder=folder)


@pytest.mark.more
def test_killed_and_taken_up_equals_uninterrupted(killed):
    same_runs(killed.found, killed.expected)
    assert (killed.folder / "history.csv").read_bytes() == (killed.whole / "history.csv").read_bytes()


@pytest.mark.more
def test_kills_came_at_the_moments_that_were_meant(killed):
    """Otherwise the test above says nothing."""
    assert None not in killed.kills, "the run was over before it was killed"
    updates, save, start = killed.kills
    assert 0 < updates.last_row < 2 * CHUNKS
    assert save.saving
    assert save.last_row > save.last_checkpoint
    # before its first new row: the history is whole, or has been cut back to the checkpoint by then
    assert start.last_checkpoint == save.last_checkpoint
    assert start.last_row in (save.last_row, save.last_checkpoint)
    x = killed.expected[1]["x"]
    assert len(set(x.tolist())) == len(x), "a run that stands still is easily reproduced"


@pytest.mark.slow
def test_ten_kills(tmp_path):
    """As the command does it, at random moments."""
    from experiments import long_run

    config = long_run.Config(kills=10, steps=400_000, every=1000, save_every=10_000, out=tmp_path / "runs")
    with jax.enable_x64(False), jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        table = long_run.kills(config)
    assert len(table) == 10
    assert table["saving"].any()
    assert table["last_checkpoint"].nunique() > 3


if __name__ == "__main__":
    from tests.conftest import STRICT

    for name, value in STRICT.items():
        jax.config.update(name, value)
    heavy(Path(sys.argv[1]))
