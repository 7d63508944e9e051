"""Many devices: samples are shared out over one axis of a mesh, the state is the same on all of them.

Three ways, from the least to the most explicit; each equals one device to rounding, for every solver of `bilevel_jax.solvers`:

1. ``run(solver, spread(sampler, mesh), ...)`` under plain `jax.jit`, with data and state replicated by `place`: XLA splits the
   rows of each draw and inserts the sums.
2. ``run(sharded(problem, make, mesh), sampler, ...)``: each update is a `jax.shard_map`.  Any sampler, or batches of a loader.
3. `data_parallel` losses in a `jax.shard_map` of your own around the whole run, on data that `deal` has arranged and that lie
   on the devices by shares: no sample ever moves, and one all-reduce of the directions is all that an update of SOBA sends.

*Where the mean over the devices is taken.*  With ``check_vma=True``, the default of `jax.shard_map`, the derivative of a
device's own loss by a replicated variable is already summed over the devices.  To average the directions afterwards is wrong,
and such losses are refused.  A mean inside the loss is wrong without the flag, and nothing says so.  Here the mean is inside
the loss, under the flag: then gradients, products with second derivatives, and derivatives through solvers are all right.
Without the flag the losses refuse to run.  `jax.lax.pcast` says once where a variable is taken to the devices, so that each
sum over them is sent once; XLA merges those of one oracle call into one all-reduce.

*What stays whole.*  Tables of `bilevel_jax.estimators.saga` are replicated: with its slots shared out over devices, XLA
gathers the whole table at every update to read one row.  So is ``z`` in all methods here.

*Tasks* (`bilevel_jax.tasks`): take the first way.  The inner steps of a task are its own, so that losses that average over the
devices would mix tasks.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from bilevel_jax import checks
from bilevel_jax.oracles import losses, mean_loss
from bilevel_jax.samplers import Plan, Sampler
from bilevel_jax.trees import narrow, widen
from bilevel_jax.types import Array, Batch, BilevelState, Levels, Loss, Problem, PyTree, Solver


class Weighted(NamedTuple):
    """Data with row weights, where rows had to be added to make equal shares: what the losses of `data_parallel` take."""

    rows: PyTree
    weight: Array  # float [rows], 0 on rows that were added; the loss is the mean of weight * value over all rows


def data_parallel(problem: Problem, axis: str) -> Problem:
    """The same problem for use inside `jax.shard_map`: the losses are means over the samples of all devices of an axis.

    Args:
        problem: losses that return a scalar (the mean over the rows given) or one value a sample (needed for `Weighted` data).
        axis: name of the mesh axis.  Each device passes its own rows, equally many; z and x are the same on all devices.

    Returns:
        A problem whose losses return a scalar, the same on all devices, and whose derivatives of any order are those of one
        device that has all the rows.

    Raises:
        TypeError, ValueError: for anything but a ``Problem``; (when traced) for data that do not differ from device to device
            (outside of `jax.shard_map`, with ``check_vma=False``, or with replicated rows) and variables that do, for weights
            in ``batch.weight`` (see `sharded`), and as `bilevel_jax.oracles.mean_loss`.

    Example:
        >>> mesh = data_mesh()
        >>> problem = data_parallel(Problem(lambda z, x, a: (z - a) ** 2, lambda z, x, b: (z - b) ** 2), "data")
        >>> mean = jax.shard_map(lambda z, a: problem.inner(z, None, a), mesh=mesh, in_specs=(P(), P("data")), out_specs=P())
        >>> float(mean(jnp.ones(()), jnp.zeros(8 * mesh.size)))
        1.0
    """
    losses(problem)

    def parallel(loss: Loss, name: str) -> Loss:
        mean = mean_loss(loss, name)

        def everywhere(z: PyTree, x: PyTree, data: PyTree) -> Array:
            if not jax.tree.leaves(data):
                return mean(z, x, data, None)
            _check_shares(name, z, x, data, axis)
            # in float32 at least: the derivative of a cast to the devices is a sum over them
            z, x = narrow(lax.pcast(widen((z, x)), axis, to="varying"), (z, x))
            if isinstance(data, Weighted):
                value = mean(z, x, data.rows, data.weight / len(data.weight))
            else:
                value = mean(z, x, data, None)
            return lax.pmean(widen(value), axis).astype(value.dtype)

        everywhere.axis = axis  # type: ignore[attr-defined]  # for those who must not average, as the steps of a task
        return everywhere

    return Problem(parallel(problem.inner, "problem.inner"), parallel(problem.outer, "problem.outer"))


def _check_shares(name: str, z: PyTree, x: PyTree, data: PyTree, axis: str) -> None:
    def varies(leaf: Any) -> bool:
        return axis in jax.typeof(leaf).manual_axis_type.varying

    if not any(map(varies, jax.tree.leaves(data))):
        raise ValueError(
            f"{name}: got data that are the same on all devices of the axis {axis!r}, expected rows of their own: call it in "
            f"jax.shard_map with check_vma=True (the default) and the data in in_specs as PartitionSpec({axis!r})"
        )
    if any(map(varies, jax.tree.leaves((z, x)))):
        raise ValueError(
            f"{name}: got variables that differ from device to device of the axis {axis!r}, expected the same on all of them "
            "(PartitionSpec() in in_specs); the inner steps of a task are its own: see bilevel_jax.parallel.spread"
        )


def data_mesh(devices: int | None = None, axis: str = "data") -> Mesh:
    """A mesh of one axis over the first ``devices`` devices, all by default (of all processes).

    Raises:
        TypeError, ValueError: for a number of devices that is not an int from 1 to the number there is.
    """
    there = jax.devices()
    count = len(there) if devices is None else checks.positive_int("devices", devices)
    if count > len(there):
        raise ValueError(f"devices: got {count}, expected at most {len(there)}, the devices that JAX sees")
    return jax.make_mesh((count,), (axis,), axis_types=(AxisType.Auto,), devices=there[:count])


def place(tree: PyTree, mesh: Mesh, spec: P | None = None) -> PyTree:
    """Arrays laid over the devices of a mesh: replicated (state, tables, data of small problems), or by rows.

    Args:
        tree: of arrays (NumPy or JAX).  With several processes each passes the whole arrays, the same in all of them, and
            keeps what its devices hold; one that can read its own rows only calls `jax.make_array_from_process_local_data`.
        mesh: of `data_mesh`, or your own.
        spec: ``PartitionSpec()`` by default: the same everywhere; ``PartitionSpec("data")`` shares out the leading axis, and
            ``PartitionSpec(("hosts", "data"))`` does over two axes of a mesh.

    Raises:
        ValueError: for axes that the devices do not divide: see `deal`.
    """
    checks.arrays("tree", tree)
    spec = P() if spec is None else spec
    sharding = NamedSharding(mesh, spec)

    def put(path: tuple, leaf: Any) -> Array:
        shape = np.shape(leaf)
        parts = [math.prod(mesh.shape[axis] for axis in _axes(entry)) for entry in spec]
        if len(shape) < len(spec) or any(size % part for size, part in zip(shape, parts, strict=False)):
            raise ValueError(
                f"{checks.path_name('tree', path)}: got the shape {shape}, expected one that the devices {dict(mesh.shape)} "
                f"divide as {spec} says: bilevel_jax.parallel.deal adds rows of weight 0"
            )
        if jax.process_count() == 1:
            return jax.device_put(leaf, sharding)
        if isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            return jax.random.wrap_key_data(put(path, jax.random.key_data(leaf)), impl=jax.random.key_impl(leaf))
        return jax.make_array_from_process_local_data(sharding, np.asarray(leaf), shape)

    return jax.tree_util.tree_map_with_path(put, tree)


def _axes(entry: Any) -> tuple[str, ...]:
    """The axes of an entry of a spec: None, a name, or a tuple of names."""
    return () if entry is None else (entry,) if isinstance(entry, str) else tuple(entry)


def spread(sampler: Sampler, mesh: Mesh, axis: str = "data") -> Sampler:
    """A sampler whose draws lie by rows over the devices of an axis, for plain `jax.jit`: XLA does the rest.

    The rows of a draw, and of the full data of refreshes, need not be divided by the devices.  Let the data be replicated
    (`place`): XLA would gather rows that lie elsewhere anyway.

    Example:
        >>> from bilevel_jax import samplers, solvers, run, testing
        >>> q, mesh = testing.quadratic(jax.random.key(0)), data_mesh()
        >>> solver = solvers.soba(q.problem, solvers.default_opts(solvers.soba, 0.3, 0.3, 0.15))
        >>> sampler = spread(samplers.uniform(8), mesh)
        >>> go = jax.jit(lambda data: run(solver, sampler, q.start, data, jax.random.key(1), steps=9)[0])
        >>> int(go(place(q.data, mesh)).state.step)
        9
    """
    sharding = NamedSharding(mesh, P(axis))

    def lay(tree: PyTree) -> PyTree:
        return jax.tree.map(lambda leaf: lax.with_sharding_constraint(leaf, sharding), tree)

    def gather(data: Levels, plan: Plan) -> Batch:
        batch = sampler.gather(data, plan)
        return batch._replace(inner=lay(batch.inner), outer=lay(batch.outer))

    return Sampler(sampler.plan, gather, lambda data: Levels(*map(lay, sampler.whole(data))))


def sharded(problem: Problem, make: Callable[[Problem], Solver], mesh: Mesh, axis: str = "data") -> Solver:
    """A solver whose update is one `jax.shard_map`: every device takes its share of the rows of each draw.

    Batches are those of one device; where the devices do not divide the rows, and where a batch has weights, the rows get
    weights of their own (`Weighted`).  Draws are stacked, not gathered lazily.

    Args:
        problem: losses that return a scalar or, where weights are needed, one value a sample.
        make: the solver of a problem, such as ``lambda problem: solvers.saba(problem, opts)``; not one of
            `bilevel_jax.tasks`, whose inner steps would be averaged over the tasks of different devices.
        mesh, axis: the axis over which the rows are shared out.

    Returns:
        A solver of the same states, draws and cost.

    Raises:
        TypeError, ValueError: as ``make``; (when traced) for batches that are no stacked ``Batch``, and as `data_parallel`.

    Example:
        >>> from bilevel_jax import samplers, solvers, run, testing
        >>> q = testing.quadratic(jax.random.key(0))
        >>> opts = solvers.default_opts(solvers.saba, 0.2, 0.2, 0.1)
        >>> solver = sharded(q.problem, lambda problem: solvers.saba(problem, opts), data_mesh())
        >>> go = jax.jit(lambda start: run(solver, samplers.uniform(5), start, q.data, jax.random.key(1), steps=9)[0])
        >>> int(go(q.start).state.step)
        9
    """
    single, parallel = make(problem), make(data_parallel(problem, axis))

    def update(state: BilevelState, batches: Batch) -> BilevelState:
        if not isinstance(batches, Batch):
            raise TypeError(f"batches: got {type(batches).__name__}, expected a Batch")
        stacked = batches._replace(full=None)
        checks.leading_axis("batches", stacked, single.draws, "the number of draws of the solver")
        shares, specs = _shares(batches, mesh.shape[axis], axis)
        return jax.shard_map(parallel.update, mesh=mesh, in_specs=(P(), specs), out_specs=P())(state, shares)

    return Solver(single.init, update, single.draws, single.cost)


def _shares(batches: Batch, devices: int, axis: str) -> tuple[Batch, Batch]:
    """Stacked batches with rows that the devices divide, weights moved into the data, and their specs."""
    weight = batches.weight or Levels()
    parts = [_padded(part, w, 1, devices) for part, w in zip((batches.inner, batches.outer), weight, strict=True)]
    full = None if batches.full is None else Levels(*(_padded(part, None, 0, devices) for part in batches.full))
    rows = P(None, axis)
    specs = Batch(rows, rows, P(), P(), None, None if full is None else P(axis))  # type: ignore[arg-type]
    return batches._replace(inner=parts[0], outer=parts[1], weight=None, full=full), specs


def _padded(data: PyTree, weight: Array | None, at: int, devices: int) -> PyTree:
    """Data with rows along the axis ``at`` that ``devices`` divides: the last row is repeated, with weight 0."""
    leaves = jax.tree.leaves(data)
    if not leaves:
        return data
    shape = leaves[0].shape[: at + 1]
    count = shape[at]
    more = -count % devices
    if not more and weight is None:
        return data

    def longer(leaf: Array, mode: str) -> Array:
        return jnp.pad(leaf, [(0, more if k == at else 0) for k in range(leaf.ndim)], mode=mode)

    weight = jnp.full(shape, 1 / count) if weight is None else weight
    rows = jax.tree.map(lambda leaf: longer(leaf, "edge"), data)
    return Weighted(rows, longer(weight * (count + more), "constant"))


def deal(data: Levels, devices: int, batch_size: int, *, outer_batch_size: int | None = None) -> Levels:
    """Data arranged (on the host) so that shares of consecutive rows, one a device, hold each its part of every block.

    Then every device samples its own share, with the same key: block i of ``samplers.uniform(batch_size // devices)`` on all
    of them together is block i of ``samplers.uniform(batch_size)`` on the data as they were, and so with `samplers.epochs`.

    Args:
        data: ``Levels(inner, outer)``, samples along the leading axis.
        devices: number of shares.
        batch_size, outer_batch_size: rows of a block on all devices together; multiples of ``devices``.  For full batches
            any such number will do.

    Returns:
        Arrays of ``blocks * batch_size`` rows; as `Weighted` where that is more than there were.

    Raises:
        TypeError, ValueError: for numbers that are not positive ints, and batch sizes that ``devices`` does not divide.

    Example:
        >>> deal(Levels(np.arange(6), np.arange(4)), 2, batch_size=2).inner.tolist()
        [0, 2, 4, 1, 3, 5]
    """
    checks.positive_int("devices", devices)
    sizes = {"batch_size": batch_size, "outer_batch_size": batch_size if outer_batch_size is None else outer_batch_size}
    parts = []
    for (argument, size), name, part in zip(sizes.items(), Levels._fields, data, strict=True):
        if checks.positive_int(argument, size) % devices:
            raise ValueError(f"{argument}: got {size}, expected a multiple of {devices}, the number of devices")
        count = checks.rows(f"data.{name}", part)
        total = -(-count // size) * size
        order = np.arange(total).reshape(-1, devices, size // devices).swapaxes(0, 1).ravel()
        take = np.minimum(order, count - 1)
        rows = jax.tree.map(lambda leaf, take=take: np.asarray(leaf)[take], part)
        weight = np.where(order < count, total / count, 0.0).astype(jnp.result_type(float))
        parts.append(rows if total == count else Weighted(rows, weight))  # type: ignore[arg-type]
    return Levels(*parts)
