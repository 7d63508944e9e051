"""Workers of ADBO in processes of their own, on this machine or on many, by Ray (``pip install 'bilevel-jax[cluster]'``).

On this machine all sockets listen on loopback.  On several hosts Ray listens on all interfaces, and runs what it is sent: use a
network that is trusted, and a token (Ray 2.52 and later), the same on each host (``ray get-auth-token --generate`` on the first
one).  With the same versions of Python, Ray and this package::

    export RAY_AUTH_MODE=token
    ray start --head --port=6379                # on one host
    ray start --address=FIRST_HOST:6379         # on each of the others

the program, on any of them, says ``RayWorkers(..., address="FIRST_HOST:6379")``.  A worker that is lost with its host is
started on another one: ``load`` must find its data there.

Reference: Moritz et al., "Ray: a distributed framework for emerging AI applications", OSDI 2018, arXiv 1712.05889.
"""

import os
import socket
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import jax

from bilevel_jax import checks
from bilevel_jax.distributed.adbo import Adbo
from bilevel_jax.distributed.transport import Lost, Ready
from bilevel_jax.distributed.worker import Answer, Blank, Message, Site, Sleep
from bilevel_jax.samplers import Sampler
from bilevel_jax.types import Array, Levels

#: Read by Ray when it is imported: "0" makes it take the loopback address for its own; an address that is passed does not.
CLUSTER = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"
#: Seconds to wait for the first host of a cluster.
REACH = 10.0


@contextmanager
def session(address: str | None = None) -> Iterator[None]:
    """Ray, for as many runs as there are in the block: a local one takes seconds to start.

    Where Ray is initialised already, that one is taken, whatever the address, and left open.

    Args:
        address: ``"HOST:PORT"`` of a cluster that is up; None starts one on this machine, on loopback only, and ends it
            with the block.

    Raises:
        ImportError: without Ray.
        RuntimeError: without an address, if Ray was imported before in such a way that it would listen on all interfaces; with
            one, if it was imported for this machine only.
        ConnectionError: if nothing answers there, after 10 seconds; if it is no Ray, after a minute or two.
    """
    ray = _ray(local=address is None)
    if ray.is_initialized():
        yield
        return
    if address is None:  # "local", or Ray would look for a cluster by itself
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "os.fork", RuntimeWarning)  # of JAX; the children are other programs at once
            ray.init(address="local", include_dashboard=False, num_cpus=0, logging_level="ERROR", log_to_driver=False)
    else:
        _reach(address)
        try:
            ray.init(address=address, logging_level="ERROR", log_to_driver=False)
        except (ConnectionError, RuntimeError, ValueError) as error:
            raise ConnectionError(f"address: got {address!r}, where no Ray cluster answers: {error}") from error
    try:
        yield
    finally:
        ray.shutdown()


class RayWorkers:
    """A `bilevel_jax.distributed.transport.Transport` over Ray: one actor a worker.  A context manager: it ends them.

    Args:
        method, sampler, load, key: of `bilevel_jax.distributed.worker.Site`; they are pickled.  Data are not sent: ``load(i)``
            is called where worker i runs, and again wherever it is restarted.
        address: as of `session`; without one that is open, one is opened, and closed in the end.
        delay: artificial delays, for experiments: see `bilevel_jax.distributed.transport.slept`.
        threads: of XLA, a worker; on a cluster also the CPUs that it takes.
        revive: let Ray restart lost workers by itself; ``on_lost="wait"`` wants it, the others do without.

    Workers compute on CPUs, with the precision (``jax_enable_x64``) of this process.

    Raises: as `session`.

    In a program::

        with RayWorkers(method, samplers.full(), load, jax.random.key(0)) as workers:
            master, history = cluster.train(method, workers, steps=2000, quorum=9, max_staleness=15, checkpoint="run")
    """

    def __init__(
        self,
        method: Adbo,
        sampler: Sampler,
        load: Callable[[int], Levels],
        key: Array,
        *,
        address: str | None = None,
        delay: Sleep | None = None,
        threads: int = 1,
        revive: bool = False,
    ) -> None:
        checks.positive_int("threads", threads)
        self.address, self.local, self.revive = address, address is None, revive
        self.threads, self.recipe = threads, (method, sampler, load, key, delay)
        self.places: dict[int, tuple[str, int]] = {}  # where each worker is: host, process
        self._actors: dict[int, Any] = {}
        self._refs: dict[Any, tuple[int, bool]] = {}  # worker, and whether it is being opened
        self._stack = ExitStack()

    def __enter__(self) -> "RayWorkers":
        with ExitStack() as stack:
            stack.enter_context(session(self.address))
            self._put = _ray(self.local).put(self.recipe)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        for worker in list(self._actors):
            self.stop(worker)
        self._stack.close()

    def start(self, worker: int) -> None:
        self.restart(worker)

    def restart(self, worker: int) -> None:
        import ray

        self.stop(worker)
        flags = os.environ.get("XLA_FLAGS", "")
        if self.threads == 1:
            flags += " --xla_cpu_multi_thread_eigen=false"
        variables = {
            "JAX_ENABLE_X64": str(int(jax.enable_x64.value)),
            "JAX_PLATFORMS": "cpu",
            "NPROC": str(self.threads),  # the size of XLA's pool
            "OMP_NUM_THREADS": str(self.threads),
            "XLA_FLAGS": flags.strip(),
        }
        actor = ray.remote(_Worker).options(
            num_cpus=0 if self.local else self.threads,
            max_restarts=-1 if self.revive else 0,
            max_task_retries=0,  # an answer that was lost is asked for again, from a state that the master knows
            runtime_env={"env_vars": variables},
        )
        self._actors[worker] = actor.remote(worker, self._put)
        self._open(worker)

    def stop(self, worker: int) -> None:
        import ray

        self._refs = {ref: found for ref, found in self._refs.items() if found[0] != worker}
        if worker in self._actors:
            ray.kill(self._actors.pop(worker), no_restart=True)

    def send(self, worker: int, message: Message) -> None:
        self._refs[self._actors[worker].handle.remote(message)] = worker, False

    def wait_any(self, timeout: float) -> Answer | Lost | Ready | None:
        import ray
        import ray.exceptions

        if not self._refs:
            time.sleep(timeout)
            return None
        ready, _ = ray.wait(list(self._refs), num_returns=1, timeout=timeout)
        if not ready:
            return None
        worker, opening = self._refs.pop(ready[0])
        try:
            found = ray.get(ready[0])
        except ray.exceptions.RayTaskError as error:
            return self._lost(worker, str(error), broken=True)
        except ray.exceptions.RayError as error:
            return self._lost(worker, str(error))
        if not opening:
            return self._lost(worker, "it was revived, and is empty") if isinstance(found.body, Blank) else found
        if isinstance(found, str):
            return self._lost(worker, found, broken=True)
        self.places[worker] = found
        return Ready(worker)

    def _open(self, worker: int) -> None:
        self._refs[self._actors[worker].open.remote()] = worker, True

    def _lost(self, worker: int, why: str, broken: bool = False) -> Lost:
        """Nothing more is to come of its last life; where Ray gives it another one, wait for that."""
        self._refs = {ref: found for ref, found in self._refs.items() if found[0] != worker}
        if self.revive and not broken:
            self._open(worker)
        return Lost(worker, why, broken)


class _Worker:
    """What runs in the process of a worker."""

    def __init__(self, worker: int, recipe: Any) -> None:
        self.worker, self.recipe, self.site = worker, recipe, None

    def open(self) -> tuple[str, int] | str:
        """Where it is, or, if it cannot work, the exception."""
        try:
            method, sampler, load, key, delay = self.recipe
            self.site = Site(method, sampler, load, key, self.worker, delay)
        except Exception:
            return traceback.format_exc()
        return socket.gethostname(), os.getpid()

    def handle(self, message: Message) -> Answer:
        if self.site is None:  # Ray revived it, and nobody knows: it was idle when it was lost
            return Answer(self.worker, message.incarnation, message.number, Blank())
        return self.site.handle(message)


def _ray(local: bool) -> Any:
    """Ray, imported in such a way that it listens where it should."""
    if "ray" not in sys.modules:
        os.environ[CLUSTER] = "0" if local else "1"
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # as later versions do; the old way warns
    try:
        import ray
        from ray._private import ray_constants
    except ImportError as error:
        raise ImportError("RayWorkers: got no Ray, expected it: pip install 'bilevel-jax[cluster]'") from error
    loopback = not ray_constants.ENABLE_RAY_CLUSTER
    if local and not loopback:
        raise RuntimeError(
            "address: got none, but Ray was imported before, and would listen on all interfaces; expected that nothing imports "
            f"it first, or {CLUSTER}=0 in the environment, or the address of a cluster"
        )
    if loopback and not local:
        raise RuntimeError(
            "address: got one, but Ray was imported for this machine only; expected that no run without an address comes "
            f"first, or {CLUSTER}=1 in the environment"
        )
    return ray


def _reach(address: str) -> None:
    """Raise at once where Ray would try for a minute."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit():
        raise ValueError(f"address: got {address!r}, expected 'HOST:PORT'")
    try:
        socket.create_connection((host, int(port)), timeout=REACH).close()
    except OSError as error:
        raise ConnectionError(f"address: got {address!r}, where nothing answers: {error}") from error
