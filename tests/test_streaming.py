"""Data in files: the draws of the sampler, read ahead by a thread, without the files in memory; several updates as one call."""

import gc
import json
import threading
import time
from itertools import islice
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
import pytest

from bilevel_jax import Batch, Levels, begin, readers, run, samplers, stream
from bilevel_jax.loop import several
from bilevel_jax.types import Slot
from experiments import streaming
from tests.checks import check_no_copies, check_same, optimised
from tests.tables import build, thinned, tiny, tiny_sampler, tiny_start
from tests.test_tables import SLOTS, setting, shapes_of_tables

KEY = 5


def in_files(data: Levels, folder: Path) -> Levels:
    """The same data, mapped from files."""

    def one(path, leaf):
        file = folder / f"{jax.tree_util.keystr(path, simple=True)}.npy"
        np.save(file, leaf)
        return np.load(file, mmap_mode="r")

    return jax.tree_util.tree_map_with_path(one, data)


def table() -> Levels:
    """Rows of several leaves and dtypes."""
    rng = np.random.default_rng(0)
    inner = (rng.normal(size=(50, 3)).astype(np.float32), np.arange(50, dtype=np.int32))
    return Levels(inner, {"a": rng.normal(size=(31, 2, 2))})


@pytest.mark.parametrize(
    "sampler",
    [samplers.uniform(5, outer_batch_size=31), samplers.uniform(8), samplers.epochs(8), samplers.epochs(8, remainder="drop")],
    ids=["all blocks full", "ragged", "epochs", "epochs, dropped"],
)
@thinned(("draws", "start"), [(3, 0), (4, 26)], (4, 26))
def test_draws_are_those_of_the_sampler(tmp_path, monkeypatch, sampler, draws, start):
    """Bit for bit: rows, weights, slots and keys; from any draw on, and over the stretches in which they are planned."""
    monkeypatch.setattr(readers, "STRETCH", 12)
    key = jax.random.key(KEY)
    draw = jax.jit(lambda first: sampler.batches(jax.tree.map(jnp.asarray, table()), key, first, draws)._replace(full=None))
    found = readers.from_arrays(sampler, in_files(table(), tmp_path), key, draws=draws, start=start)
    for i, batch in enumerate(islice(found, 10)):
        assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(batch))
        check_same(batch, draw(jnp.int32(start + i * draws)))


def test_other_keys_are_those_of_the_sampler(tmp_path):
    """Of a generator that is not the usual one."""
    key = jax.random.key(KEY, impl="rbg")
    batch = next(readers.from_arrays(tiny_sampler(), in_files(tiny().data, tmp_path), key, draws=2))
    check_same(batch, tiny_sampler().batches(tiny().data, key, 0, 2)._replace(full=None))


@thinned(("name", "updates"), [("saba", 1), ("saba", 4), ("fsla", 3)], ("saba", 4))
def test_a_stream_from_files_is_the_run_in_memory(tmp_path, name, updates):
    """And one that is taken up equals one that was not, bit for bit."""
    q, solver = tiny(), build(name, tiny().problem)
    files, key, many = in_files(q.data, tmp_path), jax.random.key(KEY), several(solver, updates)

    def go(start, calls):
        first = int(start.step) * solver.draws
        batches = readers.from_arrays(tiny_sampler(), files, key, draws=many.draws, start=first)
        *_, (state, row) = stream(many, start, islice(batches, calls))
        assert int(row["step"]) == int(start.step) + calls * updates
        return state

    start = begin(solver, tiny_sampler(), q.start, q.data, key).state
    whole = go(start, 8)
    check_same(go(go(start, 3), 5), whole)
    carry, _ = jax.jit(lambda k: run(solver, tiny_sampler(), q.start, q.data, k, steps=8 * updates))(key)
    check_same(whole, carry.state, tol=1e-12)


def test_what_refreshes_on_all_data_is_refused(tmp_path):
    solver = build("srba", tiny().problem)
    batches = readers.from_arrays(tiny_sampler(), in_files(tiny().data, tmp_path), jax.random.key(0), draws=solver.draws)
    with pytest.raises(ValueError, match=r"batch\.full: got None, expected the full data"):
        next(stream(solver, tiny_start("srba"), batches))


# ---- the thread ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def reads(monkeypatch):
    """The names of the threads that read, one an array."""
    names, take = [], np.take

    def spied(*args, **options):
        names.append(threading.current_thread().name)
        return take(*args, **options)

    monkeypatch.setattr(readers.np, "take", spied)
    return names


def settled(condition, seconds=20.0):
    """Wait for something that another thread does."""
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.01)
    return condition()


@pytest.mark.parametrize("ahead", [1, 3])
def test_batches_are_read_before_they_are_asked_for(reads, ahead):
    found = readers.from_arrays(samplers.uniform(8), table(), jax.random.key(0), draws=2, ahead=ahead)
    assert not reads, "nothing is read before the first is asked for"
    leaves = len(jax.tree.leaves(table()))
    for taken in (1, 2):
        next(found)
        assert settled(lambda expected=(taken + ahead) * leaves: len(reads) == expected)
    time.sleep(0.05)
    assert len(reads) == (2 + ahead) * leaves, "no more are read than are to be kept"
    assert all(name.startswith("reader") for name in reads)


@thinned("way", ["closed", "forgotten"], "forgotten")
def test_the_thread_ends_with_its_reader(way):
    before = set(threading.enumerate())  # readers of other tests may be ending
    found = readers.from_arrays(samplers.uniform(8), table(), jax.random.key(0), draws=2)
    next(found)
    (own,) = set(threading.enumerate()) - before
    if way == "closed":
        found.close()
    del found
    gc.collect()
    assert settled(lambda: not own.is_alive())


def test_an_error_of_the_thread_reaches_the_loop(monkeypatch):
    found = readers.from_arrays(samplers.uniform(8), table(), jax.random.key(0), draws=2, ahead=1)
    next(found)

    def broken(*args, **options):
        raise OSError("the disk is gone")

    monkeypatch.setattr(readers.np, "take", broken)
    with pytest.raises(OSError, match="the disk is gone"):
        list(islice(found, 3))


def test_the_thread_keeps_the_precision_of_the_caller():
    """Which is a matter of threads where it is set for a block."""
    with jax.enable_x64(False):
        batch = next(readers.from_arrays(samplers.uniform(8), table(), jax.random.key(0), draws=2))
    assert {leaf.dtype for leaf in batch.weight or ()} == {np.dtype(np.float32)}
    assert batch.outer["a"].dtype == np.float32


def test_without_a_cpu_the_default_device_plans(monkeypatch):
    """As under ``JAX_PLATFORMS=cuda``."""

    def devices(backend=None):
        raise RuntimeError(f"Unknown backend {backend}")

    expected = next(readers.from_arrays(samplers.uniform(8), table(), jax.random.key(0), draws=2))
    monkeypatch.setattr(jax, "devices", devices)
    check_same(next(readers.from_arrays(samplers.uniform(8), table(), jax.random.key(0), draws=2)), expected)


@pytest.mark.more
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
def test_memory_does_not_grow_with_the_file(tmp_path):
    """A file of 1 GB, with holes in it, of which a hundred batches are read."""

    def megabytes():
        (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon")]
        return int(line.split()[1]) / 1024

    rows, width = 1_000_000, 250
    np.lib.format.open_memmap(tmp_path / "large.npy", mode="w+", dtype=np.float32, shape=(rows, width))[-1] = 1.0
    large = np.load(tmp_path / "large.npy", mmap_mode="r")
    found = readers.from_arrays(samplers.uniform(64), Levels(large, large), jax.random.key(0), draws=8)
    next(found)
    before = megabytes()
    for batch in islice(found, 100):
        assert batch.inner.shape == (8, 64, width)
    assert megabytes() - before < 100


def test_a_loader_of_numpy_arrays_is_stacked_on_the_host(monkeypatch):
    """To the dtypes of JAX, bit for bit what its arrays would give, without a call of it a leaf."""
    data = Levels(np.arange(8.0), {"row": np.arange(8, dtype=np.int64)})
    draw = lambda i: Batch(data.inner + i, {"row": data.outer["row"] * i}, slot=Levels(Slot(np.int32(i), 6), None))
    for wide in (True, False):
        with jax.enable_x64(wide):
            ours = jax.tree.map(jnp.asarray, [draw(i) for i in range(6)])
            expected = list(samplers.from_stream(ours, 3))
            with monkeypatch.context() as patch:
                patch.delattr(jnp, "stack")
                found = list(samplers.from_stream(map(draw, range(6)), 3))
            assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(found))
            check_same(found, expected)


# ---- several updates as one ---------------------------------------------------------------------------------------------


@thinned("name", ["saba", "srba", "amigo"], "saba")
def test_several_updates_are_as_many_single_ones(name):
    q, solver = tiny(), build(name, tiny().problem)
    many = several(solver, 3)
    assert many.draws == 3 * solver.draws
    assert many.cost.draw == jax.tree.map(lambda calls: 3 * calls, solver.cost.draw)
    draw = jax.jit(lambda first, count: tiny_sampler().batches(q.data, jax.random.key(KEY), first, count), static_argnums=1)
    state, together = solver.init(tiny_start(name), draw(0, solver.draws)), many.init(tiny_start(name), draw(0, many.draws))
    check_same(together, state)
    update = jax.jit(solver.update)
    for t in range(6):
        state = update(state, draw(t * solver.draws, solver.draws))
    update = jax.jit(many.update)
    for t in range(2):
        together = update(together, draw(t * many.draws, many.draws))
    check_same(together, state, tol=1e-12)


def test_several_updates_copy_no_table():
    """In the optimised program of a donated call."""
    problem, sampler, start, data = setting("short rows")
    solver = build("saba", problem)
    many = several(solver, 5)
    batches = jax.eval_shape(lambda: sampler.batches(data, jax.random.key(0), 0, many.draws))
    state = jax.eval_shape(many.init, start, batches)
    text = optimised(jax.jit(many.update, donate_argnums=0), state, batches)
    shapes = shapes_of_tables(state)
    assert {shape[0] for shape in shapes} == set(SLOTS)
    check_no_copies(text, *shapes)


# ---- what is refused ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"draws": 0}, ValueError, "draws: got 0, expected at least 1"),
        ({"start": -1}, ValueError, "start: got -1, expected at least 0"),
        ({"ahead": 0}, ValueError, "ahead: got 0, expected at least 1"),
        ({"draws": 1.5}, TypeError, "draws: got 1.5 of type float"),
        ({"data": (1, 2)}, TypeError, "data: got tuple, expected Levels"),
        ({"data": Levels((np.ones(3), np.ones(4)), np.ones(9))}, ValueError, "data.inner: got leaves with leading axes"),
        ({"sampler": samplers.uniform(40)}, ValueError, "batch_size: got 40 rows of data.outer, expected at most 31"),
    ],
)
def test_bad_arguments(changes, error, message):
    """At the call, not in the thread."""
    options = {"sampler": samplers.uniform(8), "data": table(), "key": jax.random.key(0), "draws": 2} | changes
    with pytest.raises(error, match=message):
        readers.from_arrays(**options)


def test_several_is_checked():
    solver = build("saba", tiny().problem)
    with pytest.raises(ValueError, match="updates: got 0, expected at least 1"):
        several(solver, 0)
    batches = tiny_sampler().batches(tiny().data, jax.random.key(0), 0, solver.draws)
    many = several(solver, 2)
    with pytest.raises(ValueError, match="expected a leading axis of length 2, the number of draws"):
        many.update(solver.init(tiny().start, batches), batches)


# ---- the experiment -----------------------------------------------------------------------------------------------------


@pytest.mark.more
def test_experiment(tmp_path):
    """Small: that it runs, and writes what it prints; and that the two sides do the same."""
    with jax.enable_x64(False), jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        config = streaming.Config(shapes=("ijcnn1",), repeats=1, seconds=0.01, quick=True, out=tmp_path / "out")
        (tmp_path / "out" / "data").mkdir(parents=True)  # as a run that was killed leaves it
        found = streaming.main(config)
        shape = streaming.SHAPES["ijcnn1"](streaming.QUICK["ijcnn1"])
        paths = streaming.to_files(shape.data, tmp_path / "files")
        solver = build("saba", shape.problem, shape.rates)
        memory = streaming.in_memory(shape, solver, 10)
        files = streaming.streamed(shape, solver, 10, streaming.mapped(shape.data, paths))
        one, other = (streaming.last(calls, 5) for calls in (memory, files))
        check_same(one.vars, other.vars, tol=1e-5)
    table = pd.read_csv(tmp_path / "out" / "streaming.csv")
    pd.testing.assert_frame_equal(table, found)
    assert table["updates_a_call"].tolist() == [1, 1, 1000, 1000]
    assert table["source"].tolist() == ["files", "loader"] * 2
    assert (table.select_dtypes("number").drop(columns="spread") > 0).all(axis=None)
    np.testing.assert_allclose(table["ratio"], table["memory_us"] / table["stream_us"])
    assert json.loads((tmp_path / "out" / "config.json").read_text())["settings"]["repeats"] == 1
    assert not (tmp_path / "out" / "data").exists()


@pytest.mark.parametrize("changes", [{"repeats": 0}, {"seconds": 0.0}])
def test_bad_options(changes):
    ((name, value),) = changes.items()
    with pytest.raises(SystemExit, match=f"--{name}: got {value}, expected"):
        streaming.Config(**changes)
