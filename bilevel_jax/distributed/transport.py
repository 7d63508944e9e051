"""How the master of ADBO and its workers reach one another: five calls, and a stand-in without processes."""

import time
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import NamedTuple, Protocol

from bilevel_jax import checks
from bilevel_jax.distributed import simulate
from bilevel_jax.distributed.adbo import Adbo
from bilevel_jax.distributed.worker import Answer, Message, Site, Sleep
from bilevel_jax.samplers import Sampler
from bilevel_jax.types import Array, Levels


class Lost(NamedTuple):
    """A worker is gone, with what it held and the answer under way."""

    worker: int
    why: str = ""
    error: bool = False  # whether it raised an exception, where others die without a word


class Ready(NamedTuple):
    """A worker is up, with nothing but its data."""

    worker: int


class Transport(Protocol):
    """Messages to one worker arrive in order, or not at all.

    One with an attribute ``revive`` that is false does not bring lost workers back by itself: ``on_lost="wait"`` refuses it.
    """

    def start(self, worker: int) -> None:
        """Create a worker.  `Ready` or `Lost` follows."""
        ...

    def send(self, worker: int, message: Message) -> None:
        """Hand a worker a message.  Its `Answer` or `Lost` follows."""
        ...

    def wait_any(self, timeout: float) -> Answer | Lost | Ready | None:
        """What comes first, of any worker; None when nothing comes for so many seconds."""
        ...

    def restart(self, worker: int) -> None:
        """Replace a worker, whether it is lost, hangs or answers nonsense.  `Ready` or `Lost` follows."""
        ...

    def stop(self, worker: int) -> None:
        """End a worker, in whatever state it is, for good."""
        ...


class Inline:
    """Workers in this process, one after the other, for trials: they are never late, and never lost.

    Args:
        method, sampler, load, key: of `bilevel_jax.distributed.worker.Site`.
    """

    def __init__(self, method: Adbo, sampler: Sampler, load: Callable[[int], Levels], key: Array) -> None:
        self.build = partial(Site, method, sampler, load, key)
        self.sites: dict[int, Site] = {}
        self.events: deque[Answer | Lost | Ready] = deque()

    def start(self, worker: int) -> None:
        self.sites[worker] = self.build(worker)
        self.events.append(Ready(worker))

    restart = start

    def stop(self, worker: int) -> None:
        self.sites.pop(worker, None)

    def send(self, worker: int, message: Message) -> None:
        self.events.append(self.sites[worker].handle(message))

    def wait_any(self, timeout: float) -> Answer | Lost | Ready | None:
        if self.events:
            return self.events.popleft()
        time.sleep(timeout)  # in vain: nothing happens here by itself
        return None


def slept(machines: simulate.Cluster, n_workers: int, count: int, *, seed: int = 0) -> Sleep:
    """The delays of simulated machines, to be slept by real workers: ``(worker, n) -> seconds``.

    Args:
        machines: of which the delay and the slowdown are taken: computing and failing are for real.
        n_workers: N.
        count: delays drawn for each worker; after so many they begin again.
        seed: as of `bilevel_jax.distributed.simulate.schedule`.

    Raises:
        TypeError, ValueError: for counts that are not positive ints, and a slowdown that fits no worker.

    Example:
        >>> sleep = slept(simulate.Cluster(simulate.constant(0.5), slowdown=simulate.stragglers(3, 1, 4.0)), 3, 10)
        >>> sleep(0, 7), sleep(2, 25)
        (0.5, 2.0)
    """
    checks.positive_int("n_workers", n_workers)
    checks.positive_int("count", count)
    seconds = simulate.durations(machines._replace(compute=0.0), n_workers, count, seed, 0)
    return lambda worker, n: float(seconds[worker, n % count])
