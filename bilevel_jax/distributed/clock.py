"""The events of a simulated run, one after the other: answers, losses, and workers that come back."""

import heapq
from typing import Any

import numpy as np

ANSWER, LOST, BACK = range(3)
WORK, ROUND = range(2)


class Clock:
    """One queue of events, ordered by time, then worker, then kind."""

    def __init__(self, durations: list[np.ndarray], failures: tuple, evict: bool) -> None:
        """``durations``: seconds of the answers of each worker to each kind of task, ``[N, count]``; ``failures``: (worker, at,
        back) each."""
        self.durations, n_workers = durations, len(durations[0])
        self.now, self.evict, self.blocked = 0.0, evict, -1
        self.alive, self.up = np.ones(n_workers, bool), np.ones(n_workers, bool)
        self.age = np.ones(n_workers, np.int32)
        self.arrived, self.fresh, self.waited_for = (np.zeros(n_workers, bool) for _ in range(3))
        self.task, self.stamp = np.zeros(n_workers, int), np.zeros(n_workers, int)
        self.done = np.zeros((2, n_workers), int)  # answers of each kind so far
        self.queue: list[tuple] = []
        until = np.zeros(n_workers)
        for failure in sorted(failures, key=lambda failure: failure[1]):
            worker, at, back = failure
            if not 0 <= worker < n_workers or not 0 <= at < back or at < until[worker]:
                raise ValueError(
                    f"cluster.failures: got {failure}, expected a worker below {n_workers}, 0 <= at < back, and one at a time"
                )
            until[worker] = back
            heapq.heappush(self.queue, (at, worker, LOST, 0))
            if np.isfinite(back):
                heapq.heappush(self.queue, (back, worker, BACK, 0))

    def send(self, to: np.ndarray, task: int = WORK) -> None:
        """Give workers something to do, now."""
        for i in np.flatnonzero(to & self.alive):
            self.waited_for[i], self.task[i] = True, task
            if self.up[i]:
                self._begin(i)

    def _begin(self, i: Any) -> None:
        task = self.task[i]
        heapq.heappush(self.queue, (self.now + self.durations[task][i, self.done[task, i]], int(i), ANSWER, self.stamp[i]))

    def _next(self) -> bool:
        """Let the next event happen; false if there is none, and the master waits in vain."""
        if not self.queue or not self.alive.any():
            late = np.where(self.alive & self.waited_for, self.age, -1)
            self.blocked = int(late.argmax()) if self.alive.any() else len(late)
            return False
        now, i, kind, stamp = heapq.heappop(self.queue)
        if kind == ANSWER and stamp != self.stamp[i]:
            return True  # of a worker that was lost meanwhile
        self.now = max(now, self.now)
        if kind == ANSWER:
            self.waited_for[i] = False
            self.done[self.task[i], i] += 1
            if self.task[i] == WORK:
                self.arrived[i], self.fresh[i], self.age[i] = True, True, 0
        elif kind == LOST:
            self.up[i] = False
            self.stamp[i] += 1
            if self.evict:
                self.alive[i] = self.waited_for[i] = self.arrived[i] = self.fresh[i] = False
        elif self.alive[i]:
            self.up[i] = True
            if self.waited_for[i]:
                self._begin(i)
        return True

    def wait(self, quorum: int, max_staleness: int) -> np.ndarray | None:
        """Until the master may go on: those of the workers that answered whose answers are new; None if it never may."""
        while (
            not self.alive.any()
            or self.arrived.sum() < min(quorum, self.alive.sum())
            or self.age[self.alive].max() >= max_staleness
        ):
            if not self._next():
                return None
        return self.fresh.copy()

    def proceed(self) -> np.ndarray:
        """An iteration of the master: the workers whose answers it took."""
        answered = self.arrived.copy()
        self.arrived[:] = self.fresh[:] = False
        self.age += 1
        return answered

    def barrier(self, rounds: int) -> np.ndarray | None:
        """Let answers under way come in, and all workers answer ``rounds`` times: the workers of the former."""
        if not self._all():
            return None
        drained = self.fresh.copy()
        self.fresh[:] = False
        for _ in range(rounds):
            self.send(self.alive, ROUND)
            if not self._all():
                return None
        return drained

    def _all(self) -> bool:
        """Until nothing is waited for; false if that will never be."""
        while self.waited_for.any():
            if not self._next():
                return False
        return bool(self.alive.any())
