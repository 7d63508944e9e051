"""The master of ADBO at work: which workers it waits for, what it sends them, and what it does when they are lost."""

import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bilevel_jax.distributed import adbo
from bilevel_jax.distributed.adbo import Adbo, Master
from bilevel_jax.distributed.programs import OWN, compiled
from bilevel_jax.distributed.store import Store
from bilevel_jax.distributed.transport import Lost, Ready, Transport
from bilevel_jax.distributed.worker import (
    Answer,
    Back,
    Blank,
    Close,
    Estimated,
    Failed,
    Message,
    Phase,
    Pulled,
    Reply,
    Round,
    State,
    Worked,
    check_answer,
    numbers,
)
from bilevel_jax.results import Result
from bilevel_jax.types import Array, Vars

#: Faults of one worker in a row, without an answer between them, that end a run.
FAULTS = 3


class ClusterError(RuntimeError):
    """A run that could not go on.  Nothing that was computed is lost: ``master`` is the last state that is whole and finite,
    ``history`` its rows, and ``result`` says whether NaN or infinity were the reason."""

    def __init__(self, message: str, result: Result | None = None) -> None:
        super().__init__(message)
        self.result = result
        self.master: Master | None = None
        self.history: dict[str, np.ndarray] = {}


class _EvictedError(Exception):
    """A worker was evicted in the middle of a cut."""


class Run:
    """The master's end: its state, what it knows of each worker, and what it has counted."""

    def __init__(
        self,
        method: Adbo,
        transport: Transport,
        quorum: int,
        max_staleness: int,
        on_lost: str,
        patience: float,
        metrics: Callable[[Vars], dict[str, Array]] | None,
        on_row: Callable[[dict[str, Any]], None] | None,
    ) -> None:
        self.method, self.transport, self.quorum, self.max_staleness = method, transport, quorum, max_staleness
        self.on_lost, self.patience, self.on_row = on_lost, patience, on_row
        N = method.n_workers
        self.alive, self.up = np.ones(N, bool), np.zeros(N, bool)
        self.age = np.ones(N, np.int32)
        self.arrived, self.fresh = np.zeros(N, bool), np.zeros(N, bool)
        self.held, self.due = np.zeros(N, bool), False  # workers whose reply waits for a cut, and whether one is due
        self.outer, self.inner = (np.zeros((N, size), method.dtype) for size in (method.outer_size, method.inner_size))
        self.expects: list[Any] = [None] * N  # the kind of the next answer,
        self.pending: list[Any] = [None] * N  # the message that asks for it,
        self.since = np.zeros(N)  # and when that was sent, or the worker started
        self.incarnation, self.number, self.faults = [0] * N, [0] * N, [0] * N
        self.answers: list[Any] = [None] * N  # in a cut
        self.phase: tuple[int, np.ndarray, list[np.ndarray]] | None = None  # of a cut: step, outer, path of [N, m]
        self.counts: dict[str, int] = dict.fromkeys(("up", "down", "restored", "lost"), 0)
        self.rows: list[dict[str, Any]] = []
        self.clock, self.begun, self.started = 0.0, time.monotonic(), False

        self.iterate, self.record, self.row, self.closed, self.of_worker = compiled(method, metrics)
        self.columns = {*OWN, *jax.eval_shape(self.row, jax.eval_shape(method.init))}

    def begin(self, master: Master) -> None:
        self.master, self.step, self.alive = master, int(master.step), np.array(master.alive)
        self.marks = self._marked()

    def take_up(self, store: Store | None) -> bool:
        """Go on from the last checkpoint, if there is one."""
        found = store and store.last(self._settings(), jax.eval_shape(self.method.init))
        if not store or not found:
            return False
        master, known = found
        if known["rows"] and (differ := sorted(self.columns ^ known["rows"][0].keys())):
            raise ValueError(f"metrics: got others than those of the run in {store.folder}, expected the same: {differ}")
        self.age, self.arrived, self.due = np.array(known["age"], np.int32), np.array(known["arrived"]), known["due"]
        self.held = np.array(known["held"]) & self.due  # without a cut to come, what they are brought up with is the reply
        self.rows, self.counts, self.clock = known["rows"], known["counts"], known["seconds"]
        self.begin(master)
        return True

    def _marked(self) -> dict[int, dict[str, Any]]:
        """What a checkpoint says of the workers, by the step of its master.  Answers since then come again."""
        return {self.step: {name: getattr(self, name).tolist() for name in ("age", "arrived", "held")} | {"due": self.due}}

    def save(self, store: Store | None) -> None:
        if store is not None:
            step = int(self.master.step)  # in an interrupted iteration only the master knows whether it is done
            mark, counted = self.marks[step], self.rows[-1:] != [] and self.rows[-1]["step"] == step
            known = mark | {"settings": self._settings(), "rows": self.rows, "counts": self.counts}
            number = 3 * step + (not mark["due"]) + counted  # an iteration before its cut, after it, and with its row
            store.save(number, self.master, known | {"seconds": self._seconds()})

    def _settings(self) -> dict[str, Any]:
        names = ("n_workers", "max_cuts", "cut_period", "last_cut", "estimate_rounds", "inner_size", "outer_size")
        known = {name: int(getattr(self.method, name)) for name in names} | {"dtype": str(np.dtype(self.method.dtype))}
        return known | {"quorum": self.quorum, "max_staleness": self.max_staleness}

    def _seconds(self) -> float:
        return self.clock + time.monotonic() - self.begun

    def history(self) -> dict[str, np.ndarray]:
        return {name: np.array([row[name] for row in self.rows]) for name in (self.rows[0] if self.rows else ())}

    def go(self, steps: int, every: int, store: Store | None) -> None:
        if self.step < steps or self.due:
            self._start()
        if self.due:
            self._end_period()
        elif not self.rows or (self.step % self.method.cut_period == 0 and self.rows[-1]["step"] < self.step):
            self._add_row()
        if self.step >= steps:
            self.save(store)  # nothing new, but for what an interruption left to be done
        while self.step < steps:
            self._until(self._may_go_on)
            self._iterate()
            if self.step % self.method.cut_period:
                self._reply()
            else:
                self._end_period()
            if self.step % every == 0 or self.step == steps:
                self.save(store)

    def _start(self) -> None:
        self.since[:] = time.monotonic()
        for i in self._who(self.alive):
            self.transport.start(i)
            if not self.arrived[i] and not self.held[i]:
                self.expects[i] = Worked
        self._compile()  # meanwhile
        self._until(lambda: bool(self.up[self.alive].all()))
        self.begun, self.started = time.monotonic(), True
        for i in self._who(self.alive):
            self._bring_up(i)

    def _compile(self) -> None:
        """The master's functions, so that this is not on the clock."""
        copy = self.record(self.master, self.outer, self.inner, self.fresh)
        zeros = jnp.zeros_like(copy.outer)
        new = self.method.cut(copy, lambda inner, _, __: inner, lambda inner, _: (inner, zeros))
        jax.block_until_ready((self.row(new), self.closed(new), self.of_worker(new, 0)))
        self.iterate(jax.tree.map(jnp.copy, new), self.outer, self.inner, self.fresh, self.alive)

    def _may_go_on(self) -> bool:
        enough = (self.arrived & self.alive).sum() >= min(self.quorum, self.alive.sum())
        return bool(enough and self.age[self.alive].max() < self.max_staleness)

    def _iterate(self) -> None:
        active, fresh = self.arrived & self.alive, self.fresh & self.alive
        self.arrived, self.fresh, self.held = np.zeros_like(active), np.zeros_like(active), active
        self.age, self.step = self.age + 1, self.step + 1
        self.due = self.step % self.method.cut_period == 0 and self.step < self.method.last_cut
        self.marks |= self._marked()  # first, so that there is one for the master at any moment
        self.master, replies, good = self.iterate(self.master, self.outer, self.inner, fresh, active)
        if not good:
            raise ClusterError(
                "the master's variables became NaN or infinite, and were left as they were: expected smaller rates",
                Result.NONFINITE,
            )
        self.replies = tuple(map(np.asarray, replies))
        self.marks = self._marked()

    def _end_period(self) -> None:
        if self.due:
            self._cut()
        self._reply()
        self._add_row()

    def _add_row(self) -> None:
        known = {name: value.tolist() for name, value in jax.device_get(self.row(self.master)).items()}
        self.rows.append({"step": self.step, "seconds": self._seconds()} | known | self.counts)
        if self.on_row is not None:
            self.on_row(self.rows[-1])

    def _reply(self) -> None:
        multiplier, received = self.replies
        for i in self._who(self.held & self.alive):
            self._ask(i, Reply(self.step, multiplier[i], received[i]), Worked)
        self.held = np.zeros_like(self.held)

    def _cut(self) -> None:
        self._until(lambda: not self._awaited().any())  # answers under way
        new = None
        while new is None:
            try:
                new = self._estimate()
            except _EvictedError:
                self.phase = None  # again, without it
        self.phase = None
        added = int(new.made) > int(self.master.made)
        good, slot, inner = self.closed(new)
        if not good:
            raise ClusterError("a cut became NaN or infinite: expected smaller rates of the estimate", Result.NONFINITE)
        self.due = False
        marks = self._marked()
        self.master, self.marks = new, marks  # at once: a master with its cut is not to be given it again
        self.fresh = np.zeros_like(self.fresh)
        self.replies = np.asarray(new.consensus_multiplier), np.asarray(new.received)
        slot, rows = int(slot), np.asarray(inner)
        for i in self._who(self.alive & self.up):  # one that is not up gets all, once it is
            self._post(i, Close(self.replies[1][i], slot, rows[i] if added else None), "down")

    def _estimate(self) -> Master:
        master = self.record(self.master, self.outer, self.inner, self.fresh & self.alive)
        outer, path = np.asarray(master.consensus_outer), []
        self.phase = self.step, outer, path
        back = iter(reversed(range(self.method.estimate_rounds)))

        def forward(inner: Array, consensus: Array, multiplier: Array) -> Array:
            path.append(np.asarray(inner))
            k, shared, own = len(path) - 1, np.asarray(consensus), np.asarray(multiplier)
            first = None if k else outer
            self._ask_all(lambda i: Round(self.step, k, first, shared, own[i]), Estimated)
            return self._gather("inner")

        def backward(inner: Array, cotangent: Array) -> tuple[Array, Array]:
            del inner  # the workers hold their paths
            k, own = next(back), np.asarray(cotangent)
            self._ask_all(lambda i: Back(k, own[i]), Pulled)
            return self._gather("hessian"), self._gather("cross")

        return self.method.cut(master, forward, backward)

    def _ask_all(self, body: Callable[[int], Any], expects: Any) -> None:
        for i in self._who(self.alive):
            self._ask(i, body(i), expects)
        self._until(lambda: not self._awaited().any())

    def _gather(self, field: str) -> Array:
        """A field of the answers of all workers; of those that were evicted, what counts for nothing."""
        known = [getattr(answer, field) for answer in self.answers if answer is not None]
        rows = [np.zeros_like(known[0]) if a is None else getattr(a, field) for a in self.answers]
        return jnp.asarray(np.stack(rows))

    def _ask(self, i: int, body: Any, expects: Any) -> None:
        self.pending[i], self.expects[i], self.answers[i] = body, expects, None
        if self.up[i]:
            self._post(i, body, "down")

    def _post(self, i: int, body: Any, account: str) -> None:
        self.number[i] += 1
        self.since[i] = time.monotonic()
        self.counts[account] += numbers(body)
        self.transport.send(i, Message(i, self.incarnation[i], self.number[i], body))

    def _bring_up(self, i: int) -> None:
        """Send a worker that knows nothing all that it should hold, and what it is to answer."""
        held = jax.tree.map(np.asarray, self.of_worker(self.master, i))
        if self.fresh[i]:
            held = held._replace(outer=self.outer[i].copy(), inner=self.inner[i].copy())
        phase = None
        if self.phase is not None:
            step, outer, path = self.phase
            phase = Phase(step, outer, np.stack([inner[i] for inner in path]))
        self._post(i, State(held, self.expects[i] is Worked, phase), "restored")
        if self.expects[i] in (Estimated, Pulled):
            self._post(i, self.pending[i], "restored")

    def _who(self, mask: np.ndarray) -> list[int]:
        return [int(i) for i in np.flatnonzero(mask)]

    def _awaited(self) -> np.ndarray:
        return self.alive & np.array([kind is not None for kind in self.expects])

    def _until(self, done: Callable[[], bool]) -> None:
        """Take what comes until that is so; what does not come within the patience is lost."""
        quiet = time.monotonic()
        while not done():
            event = self.transport.wait_any(min(1.0, self.patience / 4))
            now = time.monotonic()
            if event is not None:  # while the master was busy answers have been waiting for it, not it for them
                quiet = now
                if self.alive[event.worker]:
                    self._take(event)
                continue
            late = self.alive & (~self.up | (self._awaited() & self.started))
            if self.on_lost != "wait":
                for i in self._who(late & (now - self.since > self.patience)):
                    self._lose(i, f"no answer for {self.patience} seconds")
            elif late.any() and now - quiet > self.patience:
                who = ", ".join(map(str, self._who(late)))
                raise ClusterError(f"worker {who}: no answer for {self.patience} seconds, expected it back")
            if not late.any() and now - quiet > self.patience:
                raise ClusterError(f"no worker has anything to answer, and none did for {self.patience} seconds")

    def _take(self, event: Answer | Lost | Ready) -> None:
        i = event.worker
        if isinstance(event, Ready):
            self.up[i] = True
            if self.started:
                self._bring_up(i)
            else:  # many that start at once slow each other down: as long as they come, there is patience with the rest
                self.since[:] = time.monotonic()
        elif isinstance(event, Lost):
            self._lose(i, event.why, broken=event.error)
        elif event.incarnation == self.incarnation[i]:
            self._take_answer(i, event)

    def _take_answer(self, i: int, answer: Answer) -> None:
        body, kind = answer.body, self.expects[i]
        if isinstance(body, Failed):
            self._lose(i, body.traceback, broken=True)
        elif isinstance(body, Blank):
            self._lose(i, "restarted behind the master's back")
            if self.on_lost == "wait":
                self.up[i] = True
                self._bring_up(i)
        elif kind is not None and answer.number == self.number[i]:
            try:
                check_answer(i, body, kind, self.method)
            except ValueError as error:
                raise ClusterError(str(error)) from error
            if not all(np.isfinite(part).all() for part in body):
                self._lose(i, "it answered NaN or infinity", broken=True, result=Result.NONFINITE)
                return
            self.counts["up"] += numbers(body)
            self.expects[i], self.faults[i] = None, 0
            if kind is Worked:
                self.outer[i], self.inner[i] = body
                self.arrived[i], self.fresh[i], self.age[i] = True, True, 0
            else:
                self.answers[i] = body

    def _lose(self, i: int, why: str, *, broken: bool = False, result: Result | None = None) -> None:
        """A worker is gone, or broken: one that would not mend by itself."""
        self.counts["lost"] += 1
        self.incarnation[i] += 1
        self.faults[i] += 1
        self.up[i] = False
        if self.on_lost == "evict" and self.started:
            self.alive[i] = self.arrived[i] = self.fresh[i] = False
            self.expects[i], self.answers[i] = None, None
            self.transport.stop(i)
            self.master = adbo.evict(self.master, ~jnp.asarray(self.alive))
            if not self.alive.any():
                raise ClusterError(f"worker {i}, the last one, was lost: {why}", result)
            if self.phase is not None:
                raise _EvictedError
            return
        if self.faults[i] >= FAULTS:
            raise ClusterError(f"worker {i} was lost {FAULTS} times in a row: {why}", result)
        if broken and not self.started:
            raise ClusterError(f"worker {i} did not come up: {why}", result)
        if broken and self.on_lost == "wait":
            raise ClusterError(f"worker {i} would not mend by itself, expected on_lost='restore' or 'evict': {why}", result)
        if self.on_lost == "restore" or not self.started:
            self.since[i] = time.monotonic()
            self.transport.restart(i)
