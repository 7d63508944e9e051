"""ADBO over Ray: processes are killed, stopped and spoilt for real; each outcome is as the policy says."""

import importlib.util
import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import jax
import numpy as np
import psutil
import pytest

from bilevel_jax import Levels, samplers
from bilevel_jax.distributed import cluster, ray_transport
from tests.checks import check_same
from tests.cluster_jobs import WORKERS, toy

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="needs Ray: pip install 'bilevel-jax[cluster]'"),
    # Ray leaves sockets and files of its own to the collector.
    pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning"),
]
STEPS, SETTINGS = 1500, {"quorum": 2, "max_staleness": 8}
ALL = {"quorum": WORKERS, "steps": 60}  # every worker works at every iteration: losses change nothing
ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module", autouse=True)
def session():
    """One Ray for all."""
    before = set(psutil.Process().children(recursive=True))
    with ray_transport.session():
        yield
    left = [child for child in psutil.Process().children(recursive=True) if child not in before]
    _, alive = psutil.wait_procs(left, timeout=20)
    assert not alive


@pytest.fixture(scope="module")
def leaving():
    """Agents of a Ray whose master was killed: they try for a while to tell it so, while other tests run, and then they go."""
    processes = []
    yield processes
    _, alive = psutil.wait_procs(processes, timeout=75)
    assert not alive


@pytest.fixture(scope="module")
def undisturbed():
    method, load, objective = toy()
    inline = cluster.Inline(method, samplers.full(), load, jax.random.key(0))
    return cluster.train(method, inline, steps=STEPS, **SETTINGS, metrics=objective)[1]["loss"][-20:].mean()


@pytest.fixture(scope="module")
def synchronous():
    method, load, _ = toy()
    inline = cluster.Inline(method, samplers.full(), load, jax.random.key(0))
    return jax.device_get(cluster.train(method, inline, **SETTINGS | ALL)[0])


def workers_of(load=None, **own):
    method, loader, _ = toy()
    return ray_transport.RayWorkers(method, samplers.full(), load or loader, jax.random.key(0), **own)


def train(workers, actions=None, **own):
    """A run in which something is done to the workers at some rows."""
    method, _, objective = toy()
    actions = dict(actions or {})

    def on_row(row):
        if row["step"] in actions:
            actions.pop(row["step"])()

    known = {"steps": STEPS, "patience": 20.0} | SETTINGS | own
    master, history = cluster.train(method, workers, **known, metrics=objective, on_row=on_row)
    assert not actions
    return master, history


def send(workers, which, how=signal.SIGKILL):
    return lambda: [os.kill(workers.places[worker][1], how) for worker in which]


def listening(processes):
    """Addresses on which processes listen."""
    found = set()
    for process in processes:
        try:
            found |= {c.laddr.ip for c in process.net_connections(kind="inet") if c.status == psutil.CONN_LISTEN}
        except psutil.NoSuchProcess:
            continue
    return found


@pytest.mark.more
def test_a_master_that_is_killed_goes_on_from_its_checkpoint(tmp_path, leaving):
    command = [sys.executable, "-m", "tests.cluster_jobs", str(tmp_path / "run")]
    environment = os.environ | {"RAY_gcs_rpc_server_reconnect_timeout_s": "10"}  # and not a minute

    def start(steps):
        return subprocess.Popen([*command, str(steps)], cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)

    with start(10_000) as first:
        assert first.stdout is not None
        rows = [first.stdout.readline() for _ in range(6)]
        children = {child: child.name() for child in psutil.Process(first.pid).children(recursive=True)}
        assert len(children) > WORKERS
        first.kill()
    done = int(rows[-1].split()[0])
    assert done == 100
    leaving.extend(child for child, name in children.items() if name in ("ray::DashboardAgent", "ray::RuntimeEnvAgent"))
    _, alive = psutil.wait_procs(children.keys() - leaving, timeout=20)
    assert not alive
    with start(done + 60) as second:
        rows = [line.split() for line in second.communicate()[0].splitlines()]
    assert second.returncode == 0
    steps = [int(step) for step, _ in rows]
    assert 80 <= steps[0] - 20 <= done + 20  # one checkpoint a period: that of the last row may not have been whole yet
    assert steps == list(range(steps[0], done + 61, 20))
    assert all(np.isfinite(float(loss)) for _, loss in rows)


@pytest.mark.more
def test_workers_that_are_killed_are_restored(undisturbed):
    with workers_of() as workers:
        first = {}
        actions = {
            20: lambda: first.update(workers.places),
            100: send(workers, [0]),
            200: send(workers, [1, 2]),
        }
        sockets = {}
        me = psutil.Process()
        actions[400] = lambda: sockets.update(found=listening([me, *me.children(recursive=True)]))
        master, history = train(workers, actions)
        assert int(master.step) == STEPS
        assert 3 <= history["lost"][-1] <= 5
        assert all(workers.places[worker] != first[worker] for worker in range(WORKERS))
        assert history["loss"][-20:].mean() == pytest.approx(undisturbed, rel=0.01)
        assert history["result"].max() == 0
    assert sockets["found"]
    assert all(ip in ("127.0.0.1", "::1", "::ffff:127.0.0.1") for ip in sockets["found"]), sockets
    _, alive = psutil.wait_procs([psutil.Process(pid) for _, pid in workers.places.values() if psutil.pid_exists(pid)], 20)
    assert not alive


@pytest.mark.more
def test_workers_that_hang_or_answer_nonsense_are_restored(synchronous, tmp_path):
    _, loader, _ = toy()

    def load(worker):  # the data of worker 1 are spoilt the first time
        data, marker = loader(worker), tmp_path / f"been {worker}"
        if worker == 1 and not marker.exists():
            marker.touch()
            return Levels(data.inner, data.outer * np.nan)
        return data

    with workers_of(load) as workers:
        stopped = []

        def stop():
            stopped.append(psutil.Process(workers.places[0][1]))
            stopped[0].suspend()

        master, history = train(workers, {20: stop}, **ALL, patience=12.0)
        assert history["lost"].tolist()[0] == 0
        assert history["lost"][-1] == 2
    try:
        _, alive = psutil.wait_procs(stopped, 20)
        assert not alive
    finally:
        [process.kill() for process in stopped if process.is_running()]
    check_same(jax.device_get(master), synchronous, tol=1e-12)


@pytest.mark.more
def test_workers_come_back_by_themselves_even_if_they_were_idle(synchronous):
    """Of three that are all awaited one is late; of those that have answered one is killed, then the late one itself."""
    # 1 + 20 + 5 messages a worker until the reply after the first cut
    with workers_of(revive=True, delay=lambda worker, n: 2.0 * (worker == 2 and n == 26)) as workers:
        first = {}

        def kill_idle():
            first.update(workers.places)
            time.sleep(0.5)
            send(workers, [0])()

        master, history = train(workers, {20: kill_idle, 40: send(workers, [2])}, **ALL, on_lost="wait")
        assert history["lost"].tolist()[1] == 0
        assert history["lost"][-1] >= 2
        assert [workers.places[worker] != first[worker] for worker in range(WORKERS)] == [True, False, True]
    check_same(jax.device_get(master), synchronous, tol=1e-12)


@pytest.mark.more
def test_evicted_workers_are_ended_and_the_last_one_goes_on():
    _, loader, _ = toy()

    def load(worker):  # worker 2 answers NaN
        data = loader(worker)
        return data._replace(outer=data.outer * np.nan) if worker == 2 else data

    with workers_of(load) as workers:
        gone = []

        def hang():
            pids = [workers.places[worker][1] for worker in (0, 2)]
            gone.extend(psutil.Process(pid) for pid in pids if psutil.pid_exists(pid))
            os.kill(workers.places[0][1], signal.SIGSTOP)

        try:
            master, history = train(workers, {20: hang}, on_lost="evict", steps=60, patience=12.0)
            assert master.alive.tolist() == [False, True, False]
            assert history["lost"].tolist()[-1] == 2
            assert np.isfinite(history["loss"]).all()
            _, alive = psutil.wait_procs(gone, 20)  # before the last one is
            assert not alive
            assert psutil.pid_exists(workers.places[1][1])
        finally:
            [process.kill() for process in gone if process.is_running()]


@pytest.mark.more
def test_an_exception_in_a_worker_reaches_the_master():
    def load(worker):
        raise FileNotFoundError(f"no shard {worker} here")

    with workers_of(load) as workers, pytest.raises(cluster.ClusterError, match=r"did not come up.*(?s:.*)no shard \d here"):
        train(workers)


def test_a_loader_that_cannot_be_pickled_leaves_no_session_open(monkeypatch):
    closed, lock = [], threading.Lock()

    @contextmanager
    def opened(address):
        try:
            yield
        finally:
            closed.append(address)

    monkeypatch.setattr(ray_transport, "session", opened)
    with pytest.raises(TypeError, match="serialize"), workers_of(lambda worker: lock):
        pass
    assert closed == [None]


@pytest.mark.more
def test_addresses_are_refused_that_cannot_be_meant():
    method, load, _ = toy()
    with pytest.raises(RuntimeError, match="address: got one, but Ray was imported for this machine only"):
        ray_transport.RayWorkers(method, samplers.full(), load, jax.random.key(0), address="127.0.0.1:9").__enter__()
    script = """
import sys, time
import ray
from bilevel_jax.distributed import ray_transport
for address, kind in ((None, RuntimeError), ("auto", ValueError), ("127.0.0.1:9", ConnectionError)):
    begun = time.monotonic()
    try:
        with ray_transport.session(address):
            sys.exit(f"{address} was taken")
    except kind as error:
        assert str(error).startswith("address: got"), error
    assert time.monotonic() - begun < 30
"""
    variables = {name: value for name, value in os.environ.items() if name != ray_transport.CLUSTER}
    subprocess.run([sys.executable, "-c", script], check=True, env=variables, timeout=60)
