"""A worker of ADBO in a process of its own: what master and worker send one another, and what the worker does with it.

Only variables, multipliers and gradients travel, as NumPy arrays; data never do: a worker loads its own, and does so again
when it is restarted, maybe on another host.  Every message is tagged with (worker, incarnation, number), and so is its answer:
the master discards what an earlier life of a worker answers, and a worker that was restarted behind the master's back says that
it knows nothing.
"""

import time
import traceback
from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bilevel_jax.distributed import adbo
from bilevel_jax.distributed.adbo import Adbo
from bilevel_jax.samplers import Sampler
from bilevel_jax.types import Array, Batch, Levels

#: ``(worker, n) -> seconds`` slept before the n-th answer, for experiments.
Sleep = Callable[[int, int], float]


class Message(NamedTuple):
    """What the master sends."""

    worker: int
    incarnation: int  # how often the worker was lost before
    number: int  # of this message, among those to this worker
    body: Any  # State, Reply, Round, Back or Close


class Answer(NamedTuple):
    """What comes back, with the tags of the message."""

    worker: int
    incarnation: int
    number: int
    body: Any  # Worked, Estimated, Pulled, Blank or Failed; None: the message has been read


class Phase(NamedTuple):
    """Where a cut stands, for a worker that missed its beginning."""

    step: int  # the master's iteration
    outer: np.ndarray  # [n], of the master
    path: np.ndarray  # [k, m], this worker's part of the estimate so far


class State(NamedTuple):
    """All that a worker holds beside its data: sent at the start, and after a loss.  Answered by Worked if it is to work."""

    worker: adbo.Worker
    work: bool
    phase: Phase | None


class Reply(NamedTuple):
    """To a worker whose answer the master took: take another step.  Answered by Worked."""

    received_at: int
    consensus_multiplier: np.ndarray  # [n]
    cut_multiplier: np.ndarray  # [C]


class Round(NamedTuple):
    """Round k of the estimate of a cut.  Answered by Estimated."""

    step: int
    k: int
    outer: np.ndarray | None  # [n], in round 0 only
    consensus: np.ndarray  # [m]
    multiplier: np.ndarray  # [m]


class Back(NamedTuple):
    """Back through round k.  Answered by Pulled."""

    k: int
    cotangent: np.ndarray  # [m]


class Close(NamedTuple):
    """The end of a cut: the multipliers, and the new cut, if there is one.  Not answered."""

    cut_multiplier: np.ndarray  # [C]
    slot: int
    cut_inner: np.ndarray | None  # [m]


class Worked(NamedTuple):
    """The variables after a step."""

    outer: np.ndarray  # [n]
    inner: np.ndarray  # [m]


class Estimated(NamedTuple):
    """The worker's part of the estimate after a round."""

    inner: np.ndarray  # [m]


class Pulled(NamedTuple):
    """Products with second derivatives of the inner loss."""

    hessian: np.ndarray  # [m]
    cross: np.ndarray  # [n]


class Blank(NamedTuple):
    """The worker is up, but knows nothing: it was restarted."""


class Failed(NamedTuple):
    """An exception in the worker."""

    traceback: str


def numbers(body: Any) -> int:
    """How many numbers a message or an answer carries, its tags and counts aside.

    Example:
        >>> numbers(Reply(3, np.zeros(5), np.zeros(2)))
        7
    """
    return sum(leaf.size for leaf in jax.tree.leaves(body) if isinstance(leaf, np.ndarray) and leaf.ndim)


def fits(name: str, body: Any, shapes: dict[str, tuple[int, ...]], dtype: Any) -> None:
    """Raise ValueError unless the fields of a message are arrays of these shapes and this dtype."""
    for field, shape in shapes.items():
        got, expected = getattr(body, field), f"{np.dtype(dtype)}{list(shape)}"
        found = f"{got.dtype}{list(got.shape)}" if isinstance(got, np.ndarray) else type(got).__name__
        if found != expected:
            raise ValueError(f"{name}.{field}: got {found}, expected {expected}")


def check_answer(worker: int, body: Any, kind: Any, method: Adbo) -> None:
    """Raise ValueError unless an answer of this worker is of this kind, and fits."""
    sizes = {"outer": method.outer_size, "inner": method.inner_size, "hessian": method.inner_size, "cross": method.outer_size}
    name = f"answer of worker {worker}"
    if not isinstance(body, kind):
        raise ValueError(f"{name}: got {type(body).__name__}, expected {kind.__name__}")
    fits(f"{name}: {kind.__name__}", body, {field: (sizes[field],) for field in body._fields}, method.dtype)


@lru_cache(maxsize=4)
def _compiled(method: Adbo, sampler: Sampler) -> tuple[Callable, Callable, Callable]:
    """A worker's functions of its data and its key; workers of one process share them."""

    def draw(data: Levels, key: Array, number: Array) -> Batch:
        chosen = sampler.plan(data, key, number, 1)
        return sampler.gather(data, jax.tree.map(lambda leaf: leaf[0], chosen))

    def work(data: Levels, key: Array, held: adbo.Worker) -> adbo.Worker:
        return method.work(held, draw(data, key, held.received_at))

    def estimate(
        data: Levels, key: Array, inner: Array, consensus: Array, multiplier: Array, outer: Array, step: Array
    ) -> Array:
        return method.estimate(inner, consensus, multiplier, outer, draw(data, key, step), step)

    def pull(data: Levels, key: Array, inner: Array, cotangent: Array, outer: Array, step: Array) -> tuple[Array, Array]:
        return method.pull(inner, cotangent, outer, draw(data, key, step))

    return jax.jit(work), jax.jit(estimate), jax.jit(pull)


class Site:
    """One worker's end: its data, what it was sent, and its compiled functions.

    Args:
        method: of `bilevel_jax.distributed.adbo.adbo`.
        sampler: of the draws from its data: as in `bilevel_jax.distributed.simulate.simulate`.
        load: ``(worker) -> Levels`` of its data, ``[rows, ...]``.
        key: typed key; worker i draws from ``fold_in(key, i)``.
        worker: its index.
        delay: artificial delay.

    Raises:
        TypeError: for data that are not ``Levels``; and whatever the losses raise on them: everything is compiled here.
    """

    def __init__(
        self, method: Adbo, sampler: Sampler, load: Callable[[int], Levels], key: Array, worker: int, delay: Sleep | None = None
    ) -> None:
        data = load(worker)
        if not isinstance(data, Levels):
            raise TypeError(f"load({worker}): got {type(data).__name__}, expected Levels(inner=..., outer=...)")
        self.method, self.index, self.delay = method, worker, delay
        self.incarnation, self.held = -1, None
        self.phase: Any = None  # of a cut: outer variable, iteration
        self.path: list[Any] = []  # the estimate so far
        data, key = jax.tree.map(jnp.asarray, data), jax.random.fold_in(key, worker)
        self.functions = [partial(function, data, key) for function in _compiled(method, sampler)]
        self._compile()

    def _compile(self) -> None:
        """So that a worker that is up answers at once, and errors of the losses show before anything has begun."""
        m, n, C, dtype = self.method.inner_size, self.method.outer_size, self.method.max_cuts, self.method.dtype
        inner, outer, step = jnp.zeros(m, dtype), jnp.zeros(n, dtype), jnp.int32(0)
        work, estimate, pull = self.functions
        held = work(adbo.Worker(outer, inner, outer, jnp.zeros(C, dtype), jnp.zeros((C, m), dtype), step))
        jax.block_until_ready((held, estimate(inner, inner, inner, outer, step), pull(inner, inner, outer, step)))

    def handle(self, message: Message) -> Answer:
        """Do what a message asks for.  An exception is an answer, too: nothing hangs in silence."""
        try:
            body = self._do(message)
        except Exception:
            body = Failed(traceback.format_exc())
        return Answer(self.index, message.incarnation, message.number, body)

    def _do(self, message: Message) -> Any:
        body, method = message.body, self.method
        n, m, C = method.outer_size, method.inner_size, method.max_cuts
        work, estimate, pull = self.functions

        def expect(body: Any, **shapes: tuple[int, ...]) -> None:
            fits(f"message to worker {self.index}: {type(body).__name__}", body, shapes, method.dtype)

        if isinstance(body, State):
            shapes = {"outer": (n,), "inner": (m,), "consensus_multiplier": (n,), "cut_multiplier": (C,), "cut_inner": (C, m)}
            expect(body.worker, **shapes)
            self.incarnation, self.held = message.incarnation, jax.tree.map(jnp.asarray, body.worker)
            if body.phase is not None:
                expect(body.phase, outer=(n,), path=(len(body.phase.path), m))
                self.phase, self.path = (body.phase.outer, jnp.int32(body.phase.step)), list(body.phase.path)
            if not body.work:
                return None
        elif self.held is None or message.incarnation != self.incarnation:
            return Blank()

        if isinstance(body, Close):
            expect(body, cut_multiplier=(C,), **({} if body.cut_inner is None else {"cut_inner": (m,)}))
            cut_inner = self.held.cut_inner
            if body.cut_inner is not None:
                cut_inner = cut_inner.at[body.slot].set(body.cut_inner)
            self.held = self.held._replace(cut_multiplier=jnp.asarray(body.cut_multiplier), cut_inner=cut_inner)
            return None

        if self.delay is not None:
            time.sleep(self.delay(self.index, message.number))
        if isinstance(body, Round):
            expect(body, consensus=(m,), multiplier=(m,), **({} if body.k else {"outer": (n,)}))
            if body.k == 0:
                self.phase, self.path = (body.outer, jnp.int32(body.step)), [self.held.inner]
            self.path = self.path[: body.k + 1]
            self.path.append(estimate(self.path[body.k], body.consensus, body.multiplier, *self.phase))
            return Estimated(np.asarray(self.path[-1]))
        if isinstance(body, Back):
            expect(body, cotangent=(m,))
            return Pulled(*map(np.asarray, pull(self.path[body.k], body.cotangent, *self.phase)))
        if isinstance(body, Reply):
            expect(body, consensus_multiplier=(n,), cut_multiplier=(C,))
            self.held = self.held._replace(
                consensus_multiplier=body.consensus_multiplier,
                cut_multiplier=body.cut_multiplier,
                received_at=jnp.int32(body.received_at),
            )
        self.held = work(self.held)
        return Worked(np.asarray(self.held.outer), np.asarray(self.held.inner))
