"""Readers: batches for `bilevel_jax.stream` of data that stay in files, read ahead by a thread."""

import math
import sys
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np

from bilevel_jax import checks
from bilevel_jax.samplers import Sampler
from bilevel_jax.types import Array, Batch, Levels

#: Draws that are planned at once: the random numbers of a few draws cost as much as those of many.
STRETCH = 4096


def from_arrays(sampler: Sampler, data: Levels, key: Array, *, draws: int, start: int = 0, ahead: int = 2) -> Iterator[Batch]:
    """The draws of a sampler, read from arrays that stay where they are: in files that are mapped into memory.

    The same draws as `bilevel_jax.run` makes of the same data and key, without end.  Draw t is a function of (key, t), so that
    a stream is taken up by starting at the draw where it was left.

    Args:
        sampler: of rows: `bilevel_jax.samplers.uniform` or `bilevel_jax.samplers.epochs`.
        data: of NumPy arrays, ``np.load(path, mmap_mode="r")``.
        key: typed key.
        draws: of a batch: ``solver.draws``.
        start: the number of the first draw: ``state.step`` times the draws of an update.
        ahead: batches that are read, and on their way to the device, before they are asked for.

    Yields:
        Batches with leaves ``[draws, ...]`` on the device.  ``full`` is None: the data are not there as a whole, and estimators
        that refresh on them (SARAH, PAGE) refuse.

    Raises:
        TypeError, ValueError: for counts out of range, and what the sampler refuses.

    Cost: memory of ``ahead`` + 1 batches, and 4 bytes a row of data for the sampler.

    Example:
        >>> data = Levels(inner=np.arange(10.0), outer=np.arange(6.0))
        >>> from bilevel_jax import samplers
        >>> batches = from_arrays(samplers.uniform(4), data, jax.random.key(0), draws=3)
        >>> next(batches).inner.shape
        (3, 4)
    """
    for name, value, least in (("draws", draws, 1), ("start", start, 0), ("ahead", ahead, 1)):
        checks.positive_int(name, value, least)
    if not isinstance(data, Levels):
        raise TypeError(f"data: got {type(data).__name__}, expected Levels(inner=..., outer=...)")
    numbers = Levels(
        *(np.arange(checks.rows(f"data.{n}", d), dtype=np.int32) for n, d in zip(Levels._fields, data, strict=True))
    )
    length = max(1, STRETCH // draws)
    # Beside an accelerator the random numbers are made on the host: there they would wait for the updates.
    key = jax.device_put(key, _host())

    def stretch(first: Array) -> Batch:
        """The draws of ``length`` batches: in the place of rows their numbers, for the key its data."""
        plan = sampler.plan(numbers, key, first, length * draws)
        batch = jax.vmap(lambda one: sampler.gather(numbers, one))(plan)
        batch = batch._replace(key=jax.random.key_data(batch.key), full=None)  # type: ignore[arg-type]
        return jax.tree.map(lambda leaf: leaf.reshape(length, draws, *leaf.shape[1:]), batch)

    stretch = jax.jit(stretch)
    jax.eval_shape(stretch, np.int32(start))  # refuses here, not in the thread
    return _read(stretch, jax.tree.map(np.asarray, data), range(start, sys.maxsize, length * draws), length, ahead)


def _read(stretch: Any, arrays: Levels, firsts: range, length: int, ahead: int) -> Iterator[Batch]:
    wide = jax.enable_x64.value  # of the caller's thread
    host = _host()

    def plans() -> Iterator[Batch]:
        for first in firsts:
            with jax.default_device(host):
                plan = jax.tree.map(np.asarray, stretch(np.int32(first)))
            yield from (jax.tree.map(lambda leaf, i=i: leaf[i], plan) for i in range(length))

    def read() -> Batch:
        with jax.enable_x64(wide):
            plan = next(waiting)
            inner, outer = (
                jax.tree.map(lambda leaf, rows=rows: _rows(leaf, rows), part)
                for part, rows in zip(arrays, (plan.inner, plan.outer), strict=True)
            )
            batch = jax.device_put(plan._replace(inner=inner, outer=outer))
            return batch._replace(key=jax.random.wrap_key_data(batch.key, impl="threefry2x32"))

    waiting = plans()
    pool = ThreadPoolExecutor(1, "reader")
    coming = deque(pool.submit(read) for _ in range(ahead))
    try:
        while True:
            coming.append(pool.submit(read))
            yield coming.popleft().result()
    finally:
        for future in coming:  # the thread ends with its pool, when nobody holds this any more
            future.cancel()


def _host() -> Any:
    """The CPU, or None, which is the default device, where JAX was told to use no CPU (``JAX_PLATFORMS=cuda``)."""
    try:
        return jax.devices("cpu")[0]
    except RuntimeError:
        return None


def _rows(leaf: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Rows of an array, copied once: on a CPU jax takes memory that is aligned to 64 bytes as it is, and copies other."""
    shape = (*rows.shape, *leaf.shape[1:])
    size = math.prod(shape) * leaf.itemsize
    room = np.empty(size + 64, np.uint8)
    skip = -room.ctypes.data % 64
    out = room[skip : skip + size].view(leaf.dtype).reshape(shape)
    return np.take(leaf, rows, axis=0, out=out, mode="clip")
