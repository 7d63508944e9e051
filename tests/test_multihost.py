"""Two processes on this machine, two devices each, equal one process with one device."""

import json
import os
import socket
import subprocess
import sys
from functools import partial
from pathlib import Path

import jax
import numpy as np
import pandas as pd
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from bilevel_jax import run, samplers
from bilevel_jax.parallel import data_mesh, data_parallel, deal, place
from experiments.multihost import Processes, join
from experiments.scaling import Config, main, sent, size
from tests.tables import build, distance, small

NAMES, SIZES = ("saba", "srba", "hoag"), (12, 8)  # of 32 and 32 rows: the last inner block is ragged


def after(name, problem, sizes, data):
    sampler = samplers.uniform(sizes[0], outer_batch_size=sizes[1])
    return run(build(name, problem), sampler, small().start, data, jax.random.key(3), steps=6)[0].state


def work(coordinator: str, process: str, out: str) -> None:
    """One of two processes: each puts its own rows on its own devices."""
    jax.config.update("jax_enable_x64", True)
    jax.config.update("jax_disable_most_optimizations", True)
    writes = join(Processes(coordinator, process))
    mesh, index = data_mesh(), jax.process_index()
    assert (mesh.size, jax.local_device_count(), jax.process_count()) == (4, 2, 2)
    dealt = deal(small().data, mesh.size, SIZES[0], outer_batch_size=SIZES[1])
    own = jax.tree.map(lambda leaf: np.split(leaf, 2)[index], dealt)
    data = jax.tree.map(partial(jax.make_array_from_process_local_data, NamedSharding(mesh, P("data"))), own)
    for mine, whole in zip(jax.tree.leaves(data), jax.tree.leaves(place(dealt, mesh, P("data"))), strict=True):
        assert mine.shape == whole.shape
        for ours, theirs in zip(mine.addressable_shards, whole.addressable_shards, strict=True):
            np.testing.assert_array_equal(ours.data, theirs.data)
    problem, found = data_parallel(small().problem, "data"), {}
    for name in NAMES:
        local = partial(after, name, problem, [each // mesh.size for each in SIZES])
        state = jax.jit(jax.shard_map(local, mesh=mesh, in_specs=P("data"), out_specs=P()))(data)
        single = jax.jit(partial(after, name, small().problem, SIZES))(small().data)
        found[name] = distance(state, single)
    if writes:
        Path(out).write_text(json.dumps(found))


def together(*commands: list[str], seconds: int) -> None:
    """Run them at the same time; when one fails, or takes too long, none is left behind."""
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "2"}
    root = Path(__file__).parent.parent
    output = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    running = [
        subprocess.Popen([sys.executable, "-m", *command], env=environment, cwd=root, **output)  # type: ignore[call-overload]
        for command in commands
    ]
    try:
        for process in running:
            text, _ = process.communicate(timeout=seconds)
            assert process.returncode == 0, text[-4000:]
    finally:
        for process in running:
            process.kill()
            process.wait()


def address() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{free.getsockname()[1]}"


@pytest.mark.more
def test_two_processes_equal_one(tmp_path):
    """Each gives its own rows; the state is that of one device."""
    coordinator, out = address(), tmp_path / "found.json"
    together(*(["tests.test_multihost", coordinator, f"{k}/2", str(out)] for k in (0, 1)), seconds=400)
    found = json.loads(out.read_text())
    assert set(found) == set(NAMES)
    assert max(found.values()) < 1e-12, found


@pytest.mark.slow
def test_the_command_in_two_processes_writes_once(tmp_path):
    """With what one device and no process gives, and on all devices of both."""
    coordinator = address()
    options = ["--solvers", "soba", "meha", "--updates", "8", "--batch", "12", "--batch-per-device", "2", "--samples", "50"]
    commands = (
        ["experiments.scaling", "--coordinator", coordinator, "--process", f"{k}/2", "--out", str(tmp_path / str(k)), *options]
        for k in (0, 1)
    )
    together(*commands, seconds=400)
    table = pd.read_csv(tmp_path / "0" / "scaling.csv")
    assert set(table["devices"]) == {4}
    assert len(table) == 4
    assert table["difference"].max() < 1e-12
    assert not (tmp_path / "1").exists()


@pytest.mark.parametrize(
    ("given", "match"),
    [
        (Processes(process="2/2"), "--process: got '2/2'"),
        (Processes(process="first"), "--process: got 'first'"),
        (Processes(process="0/2"), "--coordinator: got none"),
        (Processes("auto", "0/2"), "--process: got '0/2', expected none with --coordinator auto"),
        (Processes("127.0.0.1", "0/2"), "--coordinator: got '127.0.0.1', expected host:port"),
    ],
)
def test_join_refuses(given, match):
    with pytest.raises(SystemExit, match=match):
        join(given)


def test_one_process_needs_no_others():
    assert join(Processes())


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"updates": 0}, "--updates: got 0"),
        ({"devices": ()}, "--devices: got"),
        ({"devices": (1, 3)}, "--batch: got 64, expected a multiple of 3"),
        ({"samples": 100}, "--samples: got 100, expected at least 128"),
        ({"solvers": ()}, "--solvers: got none"),
    ],
)
def test_scaling_refuses(change, match):
    with pytest.raises(SystemExit, match=match):
        main(Config(**change))


@pytest.mark.more
def test_scaling_takes_the_devices_there_are(tmp_path, monkeypatch):
    """One accelerator, say: by default all counts up to theirs, while one that is asked for is refused."""
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    few = {"solvers": ("soba",), "updates": 2, "batch": 16, "batch_per_device": 2, "samples": 32}
    monkeypatch.setattr(jax.config, "update", lambda *_: None)
    main(Config(**few, out=tmp_path))
    assert pd.read_csv(tmp_path / "scaling.csv")["devices"].tolist() == [1, 1]
    assert json.loads((tmp_path / "config.json").read_text())["settings"]["devices"] == [1]
    with pytest.raises(SystemExit, match="--devices: got 2, expected at most 1, the devices there are"):
        main(Config(**few, devices=(1, 2), out=tmp_path))


def test_bytes_of_a_program_count_its_loops_and_one_branch():
    """12 and 16 bytes in a loop of 5 turns, 8 in one of unknown length, the larger of two branches, and 12 more."""
    program = """
%body.1 (p: f32[3]) -> f32[3] {
  %a = f32[3]{0} all-reduce(%p), to_apply=%add
  %b = (bf16[2,3]{1,0}, f32[]) all-reduce-start(%p, /*index=1*/%q)
}

%turn (p: f32[3]) -> f32[3] {
  ROOT %c = f64[] all-reduce(%p), to_apply=%add
}

%small (p: f32[3]) -> f32[3] {
  %d = f32[1]{0} all-reduce(%p)
}

%large (p: f32[3]) -> f32[3] {
  %e = f32[10]{0} all-reduce(%p)
}

ENTRY %main (p: f32[3]) -> f32[3] {
  %w = f32[3]{0} while(%p), condition=%no, body=%body.1, backend_config={"known_trip_count":{"n":"5"}}
  %u = f32[3]{0} while(%p), condition=%no, body=%turn
  %k = f32[3]{0} conditional(%i, %p, %p), branch_computations={%small, %large}
  %g = f32[8]{0} all-gather(%p)
  ROOT %r = f32[3]{0} all-reduce(%p)
}

%no (p: f32[3]) -> pred[] {
}
"""
    found = sent(program, turns=7)
    assert found.instructions == {"all-gather": 1, "all-reduce": 6}
    assert found.all_reduced == 5 * (12 + 12 + 4) + 7 * 8 + 40 + 12


def test_size_of_types():
    assert size("(f64[5]{0}, f64[], /*index=2*/bf16[2,3]{1,0:T(8,128)})") == 40 + 8 + 12


if __name__ == "__main__":
    work(*sys.argv[1:])
