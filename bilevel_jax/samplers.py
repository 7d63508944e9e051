"""Samplers: the only place that gathers data.

A sampler has no state: draw number ``t`` of a run is a pure function of ``(key, t)``.  So a run can be cut and resumed
anywhere, bit for bit, and the random numbers of many steps are made at once, outside the loop.

Data are cut into consecutive blocks of ``batch_size`` rows (shuffle sorted data first).  When the batch size does not divide
the number of samples n, the last block is filled with rows of the block before, and those rows get weight 0.  With
``blocks/n`` on every other row, the mean over the blocks is the mean over the samples, exactly.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from bilevel_jax import checks
from bilevel_jax.types import Array, Batch, Levels, PyTree, Slot


class Plan(NamedTuple):
    """The random choices of a stretch of draws, leaves ``[draws]``."""

    block: Levels  # int32, of either level
    key: Array  # typed keys, one a draw


class Sampler(NamedTuple):
    """How draws are made: three pure functions.

    ``plan(data, key, start, count)`` holds every random choice of draws start ... start + count - 1; ``gather(data, plan)``
    reads the data of one draw (leaves of ``plan`` without the leading axis); ``whole(data)`` is what the draws cover.
    """

    plan: Callable[[Levels, Array, Array | int, int], Plan]
    gather: Callable[[Levels, Plan], Batch]
    whole: Callable[[Levels], Levels]

    def batches(self, data: Levels, key: Array, start: Array | int, draws: int) -> Batch:
        """Draws start ... start + draws - 1, stacked for a solver: leaves ``[draws, ...]``."""
        return self.stack(data, self.plan(data, key, start, draws))

    def stack(self, data: Levels, plan: Plan) -> Batch:
        """The draws of a plan, stacked; ``full`` holds all the data, for refreshes, and is not stacked."""
        draws = len(plan.key)

        def body(_: None, one: Plan) -> tuple[None, Batch]:
            return None, self.gather(data, one)

        # A loop of one turn stays a loop that XLA must see through; a few turns are cheaper written out.
        _, batches = lax.scan(body, None, plan, unroll=draws <= 4)
        return batches._replace(full=jax.tree.map(jnp.asarray, self.whole(data)))

    def lazily(self, data: Levels, plan: Plan) -> "Draws":
        """The draws of a plan, each to be gathered when it is taken."""
        return Draws(data, plan, lambda data, one: self.gather(data, one)._replace(full=self.whole(data)))


@partial(jax.tree_util.register_dataclass, data_fields=("data", "plan"), meta_fields=("gather",))
@dataclass(frozen=True)
class Draws:
    """Draws that are gathered when they are taken: what a stacked ``Batch`` of many draws would hold, without its copies.

    Two hundred inner steps on 1,000 rows of 784 numbers are 1.9 GB as a stacked batch.  `bilevel_jax.run` gives these to
    solvers that say that they take their draws with `take_draw` (``Solver.lazy``).
    """

    data: Levels
    plan: Plan
    gather: Callable[[Levels, Plan], Batch]  # of one draw, with its full data


def take_draw(batches: Batch | Draws, index: Any) -> Any:
    """One draw of several, or those of a slice; ``full`` is not stacked, and stays."""
    if isinstance(batches, Draws):
        plan = jax.tree.map(lambda leaf: leaf[index], batches.plan)
        if isinstance(index, slice):
            return Draws(batches.data, plan, batches.gather)
        return batches.gather(batches.data, plan)
    return jax.tree.map(lambda leaf: leaf[index], batches._replace(full=None))._replace(full=batches.full)


def take_window(batches: Batch | Draws, start: Array, width: int) -> Any:
    """``width`` draws from a traced ``start`` on."""

    def cut(tree: PyTree) -> PyTree:
        return jax.tree.map(lambda leaf: lax.dynamic_slice_in_dim(leaf, start, width), tree)

    if isinstance(batches, Draws):
        return Draws(batches.data, cut(batches.plan), batches.gather)
    return cut(batches._replace(full=None))._replace(full=batches.full)


def blocks(rows: int, batch_size: int, remainder: str = "mask") -> int:
    """Number of blocks of ``batch_size`` in ``rows`` samples: the number of slots of a table."""
    return rows // batch_size if remainder == "drop" else -(-rows // batch_size)


def uniform(batch_size: int, *, outer_batch_size: int | None = None, remainder: str = "mask") -> Sampler:
    """Independent uniform draws of one inner and one outer block.

    Args:
        batch_size: rows of an inner block.
        outer_batch_size: rows of an outer block, ``batch_size`` by default.
        remainder: ``"mask"`` keeps a ragged last block (losses must then return one value a sample); ``"drop"`` leaves the
            last ``n mod batch_size`` rows out, also of ``full``: the problem solved is then that of the rows that are kept.

    Raises:
        TypeError, ValueError: for batch sizes that are not positive ints or exceed the data, and unknown remainders.

    Example:
        >>> data = Levels(inner=jnp.arange(10.0), outer=jnp.arange(6.0))
        >>> batch = uniform(4).batches(data, jax.random.key(0), 0, draws=2)
        >>> batch.inner.shape, batch.outer.shape, batch.slot.inner.count, batch.slot.outer.count
        ((2, 4), (2, 4), 3, 2)
    """

    def choose(key: Array, keys: Array, start: Array | int, of: Levels) -> Levels:
        del key, start
        # 32 random bits a level, modulo the number of blocks: uniform to within blocks / 2^32.  Compiling the random numbers
        # is most of the compile time of a small run, and randint, which is exact, takes twice as long.
        bits = jax.vmap(lambda k: jax.random.bits(k, (2,), jnp.uint32))(keys)
        return Levels(*((bits[:, level] % jnp.uint32(count)).astype(jnp.int32) for level, count in enumerate(of)))

    return _block_sampler(choose, batch_size, outer_batch_size, remainder)


def epochs(batch_size: int, *, outer_batch_size: int | None = None, remainder: str = "mask") -> Sampler:
    """Without replacement: each pass over the blocks of a level is a fresh permutation, every block exactly once.

    The two levels have passes of their own lengths.  Arguments, errors and blocks are those of `uniform`.

    Permutations are made for whole stretches of draws, outside the loop; asking for a single draw costs one too, so in a loop
    of your own ask for many draws at once, or use `uniform`.

    Example:
        >>> data = Levels(inner=jnp.arange(6.0), outer=jnp.arange(6.0))
        >>> plan = epochs(2).plan(data, jax.random.key(0), 0, 3)
        >>> sorted(int(i) for i in plan.block.inner)
        [0, 1, 2]
    """

    def order(key: Array, start: Array | int, count: int, of: int) -> Array:
        first = start // of
        passes = first + jnp.arange((count - 1) // of + 2, dtype=jnp.int32)
        keys = jax.vmap(lambda e: jax.random.fold_in(key, e))(passes)
        orders = jax.vmap(lambda k: jax.random.permutation(k, of))(keys)
        return orders.reshape(-1)[start - first * of + jnp.arange(count, dtype=jnp.int32)].astype(jnp.int32)

    def choose(key: Array, keys: Array, start: Array | int, of: Levels) -> Levels:
        # the draws' own keys are folded from `key` by their number: those of the passes come from another one
        passes = jax.random.split(key)[0]
        return Levels(*(order(jax.random.fold_in(passes, level), start, len(keys), n) for level, n in enumerate(of)))

    return _block_sampler(choose, batch_size, outer_batch_size, remainder)


def full() -> Sampler:
    """Every draw is all the data: one block, one slot, no weights.  For deterministic methods.

    Example:
        >>> data = Levels(inner=jnp.arange(10.0), outer=jnp.arange(6.0))
        >>> full().batches(data, jax.random.key(0), 0, draws=1).inner.shape
        (1, 10)
    """

    def plan(data: Levels, key: Array, start: Array | int, count: int) -> Plan:
        _rows(data)
        zeros = jnp.zeros(count, jnp.int32)
        return Plan(Levels(zeros, zeros), _keys(_threefry(key), start, count))

    def gather(data: Levels, plan: Plan) -> Batch:
        slot = Levels(*(Slot(i, 1) for i in plan.block))
        return Batch(inner=data.inner, outer=data.outer, key=_own(plan.key), slot=slot)

    return Sampler(plan, gather, lambda data: data)


def episodes(tasks: int, *, ways: int, shots: int, queries: int) -> Sampler:
    """Few-shot classification tasks: every draw is ``tasks`` episodes of ``ways`` classes, drawn on the device from its key.

    An episode draws its classes without replacement, and of each of them ``shots`` support and ``queries`` query samples, all
    different; its labels are 0 ... ways - 1 in the order of the draw.

    Args:
        tasks: episodes of a draw.
        ways, shots, queries: classes, and samples of each, of an episode.

    Returns:
        A sampler of data ``Levels(inner=samples)``, ``[classes, samples of each, ...]``.  A batch holds as ``inner`` the
        support, samples ``[tasks, ways * shots, ...]`` and int32 labels ``[tasks, ways * shots]``, and as ``outer`` the same of
        the queries.

    Raises:
        TypeError, ValueError: for numbers that are not positive ints, and for more ways than classes or more shots and queries
            than samples of a class.

    Example:
        >>> data = Levels(inner=jnp.zeros((10, 20, 3)))
        >>> batch = episodes(4, ways=5, shots=1, queries=15).batches(data, jax.random.key(0), 0, draws=1)
        >>> batch.inner[0].shape, batch.outer[1].shape
        ((1, 4, 5, 3), (1, 4, 75))
    """
    for name, value in (("tasks", tasks), ("ways", ways), ("shots", shots), ("queries", queries)):
        checks.positive_int(name, value)

    def counts(data: Levels) -> tuple[int, int]:
        checks.kind("data", data, Levels, "Levels(inner=samples)")
        checks.arrays("data", data)
        if np.ndim(data.inner) < 2:
            raise TypeError("data.inner: got no array [classes, samples, ...], expected Levels(inner=samples)")
        classes, each = data.inner.shape[:2]
        if ways > classes:
            raise ValueError(f"ways: got {ways}, expected at most {classes}, the classes of data.inner")
        if shots + queries > each:
            raise ValueError(
                f"shots: got {shots}, and {queries} queries, expected at most {each} together, the samples of a class"
            )
        return classes, each

    def plan(data: Levels, key: Array, start: Array | int, count: int) -> Plan:
        counts(data)
        zeros = jnp.zeros(count, jnp.int32)
        return Plan(Levels(zeros, zeros), _keys(_threefry(key), start, count))

    def gather(data: Levels, plan: Plan) -> Batch:
        classes, each = counts(data)

        def episode(key: Array) -> tuple[Any, Any]:
            first, second = jax.random.split(key)
            chosen = _distinct(first, classes, ways)
            items = jax.vmap(lambda k: _distinct(k, each, shots + queries))(jax.random.split(second, ways))
            samples = jnp.asarray(data.inner)[chosen[:, None], items]
            parts = samples[:, :shots], samples[:, shots:]
            labels = (jnp.repeat(jnp.arange(ways, dtype=jnp.int32), count) for count in (shots, queries))
            flat = (part.reshape(-1, *part.shape[2:]) for part in parts)
            support, query = zip(flat, labels, strict=True)
            return support, query

        support, query = jax.vmap(episode)(jax.random.split(_own(plan.key), tasks))
        return Batch(inner=support, outer=query, key=plan.key)

    return Sampler(plan, gather, lambda data: data)


def _distinct(key: Array, count: int, size: int) -> Array:
    """Distinct numbers below ``count``: the places of the largest of as many random ones."""
    return lax.top_k(jax.random.uniform(key, (count,), jnp.float32), size)[1]


def from_stream(batches: Iterable[Batch], draws: int) -> Iterator[Batch]:
    """Stack every ``draws`` consecutive batches of an external loader, as a solver wants them.

    Args:
        batches: single draws, as ``Batch(inner=..., outer=..., ...)`` of arrays (NumPy or JAX), all of one structure.
            ``full`` is taken from the first of each group.  Make them NumPy arrays, which are stacked on the host and moved to
            the device in one go: JAX arrays are stacked one leaf after the other, and the check of their slots waits for each.
        draws: of the solver.

    Yields:
        Batches with leaves ``[draws, ...]``.  A last incomplete group is left out.

    Raises:
        TypeError: if an item is not a ``Batch``.

    Example:
        >>> loader = (Batch(inner=jnp.ones(3) * i, outer=jnp.ones(2)) for i in range(5))
        >>> [b.inner.shape for b in from_stream(loader, draws=2)]
        [(2, 3), (2, 3)]
    """
    return _groups(batches, checks.positive_int("draws", draws))


def _groups(batches: Iterable[Batch], draws: int) -> Iterator[Batch]:
    group: list[Batch] = []
    for batch in batches:
        if not isinstance(batch, Batch):
            raise TypeError(f"batches: got an item of type {type(batch).__name__}, expected Batch(inner=..., outer=...)")
        for slot in batch.slot or ():
            if isinstance(slot, Slot) and not 0 <= int(slot.index) < slot.count:
                raise ValueError(f"batch.slot: got the index {int(slot.index)}, expected one of {slot.count} blocks")
        checks.arrays("batches", (batch.inner, batch.outer))
        group.append(batch)
        if len(group) == draws:
            bare = [b._replace(full=None) for b in group]
            yield jax.device_put(jax.tree.map(_stacked, *bare))._replace(full=group[0].full)
            group = []


def _stacked(*leaves: Any) -> Any:
    on_host = all(isinstance(leaf, np.ndarray | np.generic) for leaf in leaves)
    return np.stack(leaves) if on_host else jnp.stack(leaves)


def _rows(data: Levels) -> Levels:
    """The numbers of samples of the two levels."""
    checks.kind("data", data, Levels, "Levels(inner=..., outer=...)")
    return Levels(*(checks.rows(f"data.{name}", part) for name, part in zip(Levels._fields, data, strict=True)))


def _threefry(key: Array) -> Array:
    """The key itself, or one made of it where its generator is another one; refuses anything but one typed key.

    Under vmap the numbers of the rbg generators depend on the other lanes, so that draw t would not be a function of (key, t).
    """
    checks.typed_key("key", key)
    data = jax.random.key_data(key)
    return jax.random.wrap_key_data(data[:2], impl="threefry2x32") if data.shape != (2,) else key


def _keys(key: Array, start: Array | int, count: int) -> Array:
    """One key per draw."""
    return jax.vmap(lambda t: jax.random.fold_in(key, t))(start + jnp.arange(count, dtype=jnp.int32))


def _own(key: Array) -> Array:
    """The key that a batch hands on, apart from the bits that chose its blocks; free where nothing uses it."""
    return jax.random.fold_in(key, 0xBA7C)


def _block_sampler(
    choose: Callable[[Array, Array, Array | int, Levels], Levels],
    batch_size: int,
    outer_batch_size: int | None,
    remainder: str,
) -> Sampler:
    sizes = Levels(batch_size, batch_size if outer_batch_size is None else outer_batch_size)
    checks.positive_int("batch_size", sizes.inner)
    checks.positive_int("outer_batch_size", sizes.outer)
    if remainder not in ("mask", "drop"):
        raise ValueError(f"remainder: got {checks.shown(remainder)}, expected 'mask' or 'drop'")

    def counts(data: Levels) -> Levels:
        found = _rows(data)
        names = ("batch_size", "batch_size" if outer_batch_size is None else "outer_batch_size")
        for argument, name, n, size in zip(names, Levels._fields, found, sizes, strict=True):
            if size > n:
                raise ValueError(f"{argument}: got {size} rows of data.{name}, expected at most {n}, the rows there are")
        return found

    def plan(data: Levels, key: Array, start: Array | int, count: int) -> Plan:
        of = Levels(*(blocks(n, size, remainder) for n, size in zip(counts(data), sizes, strict=True)))
        key = _threefry(key)
        keys = _keys(key, start, count)
        return Plan(choose(key, keys, start, of), keys)

    def gather(data: Levels, plan: Plan) -> Batch:
        parts, weights, slots = [], [], []
        for part, n, size, i in zip(data, counts(data), sizes, plan.block, strict=True):
            count = blocks(n, size, remainder)
            rows, weight = _block(part, n, size, count, i)
            parts.append(rows)
            weights.append(weight)
            slots.append(Slot(i, count))
        return Batch(*parts, key=_own(plan.key), slot=Levels(*slots), weight=Levels(*weights))

    def whole(data: Levels) -> Levels:
        if remainder == "mask":
            return data
        kept = (blocks(n, size, remainder) * size for n, size in zip(counts(data), sizes, strict=True))
        return Levels(*(jax.tree.map(lambda leaf, k=k: leaf[:k], part) for part, k in zip(data, kept, strict=True)))

    return Sampler(plan, gather, whole)


def _block(data: PyTree, rows: int, size: int, count: int, index: Array) -> tuple[PyTree, Array | None]:
    """Block ``index`` of the data, and its row weights (None where all blocks are full).

    A ragged last block is moved back until it fits; the rows that it then shares with the block before weigh nothing.
    """
    start = index * size
    ragged = count * size > rows
    fitted = jnp.minimum(start, rows - size) if ragged else start
    part = jax.tree.map(lambda leaf: lax.dynamic_slice_in_dim(leaf, fitted, size), data)
    if not ragged:
        return part, None
    own = fitted + jnp.arange(size, dtype=jnp.int32) >= start
    return part, jnp.where(own, count / rows, 0.0)
