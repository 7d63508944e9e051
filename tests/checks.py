"""The checks that the suites run on the library, and that `test_sabotage` runs on broken parts to show that they bite."""

import re
from collections.abc import Iterable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from bilevel_jax import Batch, BilevelState, Levels, Solver, Vars, begin, resume, run
from bilevel_jax.estimators import page, total
from bilevel_jax.samplers import Plan, Sampler
from bilevel_jax.testing import Quadratic
from bilevel_jax.types import Oracle, Terms
from tests import references
from tests.tables import PROBABILITY, STEPS, Setting, distance

ZERO = np.int32(0)


def points(q: Quadratic | Setting, count: int = 3) -> list[Vars]:
    """Random (z, v, x)."""
    rng = np.random.default_rng(0)
    return [jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape)), q.start) for _ in range(count)]


def whole(q: Quadratic | Setting) -> Batch:
    return Batch(inner=q.data.inner, outer=q.data.outer)


def hand(i: int, j: int) -> Plan:
    """A plan of one draw, made by hand."""
    return Plan(Levels(jnp.int32(i), jnp.int32(j)), jax.random.key(0))


def rows_of(q: Quadratic) -> tuple[references.Arrays, references.Arrays]:
    inner, outer = ({name: np.asarray(leaf) for name, leaf in part.items()} for part in q.data)
    return inner, outer


def check_solution(oracle: Oracle, q: Quadratic, tol: float = 1e-10) -> None:
    """At (z*(x), v*(x), x) the directions are 0, 0 and grad h(x)."""

    @jax.jit
    def at(x: jax.Array) -> tuple[Vars, jax.Array]:
        return total(oracle.terms(q.at(x), whole(q), jnp.int32(0))), q.gradient(x)

    for x in (q.start.outer, *(p.outer for p in points(q))):
        way, gradient = at(x)
        assert distance(way.inner, jnp.zeros_like(way.inner)) < tol
        assert distance(way.aux, jnp.zeros_like(way.aux)) < tol
        assert distance(way.outer, gradient) < tol


def check_formulas(oracle: Oracle, q: Quadratic, tol: float = 1e-12) -> None:
    """At random points every term is that of the NumPy formulas."""
    g, f = ({name: leaf.mean(0) for name, leaf in part.items()} for part in rows_of(q))
    compiled = jax.jit(lambda point: oracle.terms(point, whole(q), jnp.int32(0)))
    for point in points(q):
        z, v, x = map(np.asarray, point)
        terms = compiled(point)
        found = [*terms.inner, terms.outer.aux, terms.outer.outer]
        for got, expected in zip(found, references.inner_terms(g, z, v, x) + references.outer_terms(f, z, x), strict=True):
            np.testing.assert_allclose(got, expected, atol=tol, rtol=tol)
        assert terms.outer.inner is None


def check_mean_over_blocks(oracle: Oracle, sampler: Sampler, q: Quadratic, counts: tuple[int, int], tol: float = 1e-12) -> None:
    """The mean of the terms over all (i, j) is the terms of all the data."""
    data = sampler.whole(q.data)

    @jax.jit
    def means(point: Vars) -> Any:
        def one(pair: Levels) -> Any:
            return oracle.terms(point, sampler.gather(data, Plan(pair, jax.random.key(0))), jnp.int32(0))

        i, j = (jnp.arange(count, dtype=jnp.int32) for count in counts)
        every = lax.map(one, Levels(jnp.repeat(i, counts[1]), jnp.tile(j, counts[0])))
        mean = jax.tree.map(lambda leaf: leaf.mean(0), every)
        return mean, oracle.terms(point, Batch(inner=data.inner, outer=data.outer), jnp.int32(0))

    for point in points(q, 2):
        mean, full = means(point)
        assert distance(mean, full) < tol


def check_blocks(sampler: Sampler, sizes: tuple[int, int], rows: tuple[int, int]) -> None:
    """A draw holds the rows of the blocks that its plan names and its slot says, padding weighs nothing, and the mean over
    the blocks of the weighted sums is the mean over the rows."""
    data = Levels(*(jnp.arange(float(n)) + 100.0 * level for level, n in enumerate(rows)))
    counts = [-(-n // size) for n, size in zip(rows, sizes, strict=True)]
    sums: list[dict[int, float]] = [{}, {}]
    for i in range(counts[0]):
        for j in range(counts[1]):
            batch = sampler.gather(data, hand(i, j))
            assert batch.slot is not None
            weights = batch.weight or Levels()
            for level, block in enumerate((i, j)):
                got, slot, weight = np.asarray(batch[level]) - 100.0 * level, batch.slot[level], weights[level]
                assert (int(slot.index), slot.count) == (block, counts[level])
                assert got.shape == (sizes[level],)
                own = np.arange(block * sizes[level], min((block + 1) * sizes[level], rows[level]))
                weight = np.full(len(got), 1 / len(got)) if weight is None else np.asarray(weight)
                np.testing.assert_array_equal(got[weight > 0], own)
                assert (weight >= 0).all()
                sums[level][block] = float(weight @ got)
    for level, n in enumerate(rows):
        np.testing.assert_allclose(np.mean(list(sums[level].values())), (n - 1) / 2, rtol=1e-6)


def check_passes(plan: Plan, counts: tuple[int, int]) -> None:
    """Each pass over a level, of its own length, visits every block exactly once; passes differ, and so do the levels."""
    orders = []
    for blocks, count in zip(plan.block, counts, strict=True):
        order = np.asarray(blocks).reshape(-1, count)
        np.testing.assert_array_equal(np.sort(order, axis=1), np.tile(np.arange(count), (len(order), 1)))
        assert len({tuple(row) for row in order}) > 1
        orders.append(order)
    assert counts[0] != counts[1] or (orders[0] != orders[1]).any()


def coins(probability: float, keys: jax.Array) -> np.ndarray:
    """Whether PAGE refreshes at each update, seen from outside: the full data of update t are t, those of a draw are 0."""

    def step(state: Any, turn: tuple[jax.Array, jax.Array]) -> tuple[Any, jax.Array]:
        t, key = turn
        batch = Batch(inner=0.0 * t, key=key, full=Levels(inner=1.0 * t))
        way, state = estimator.update(oracle, Vars(inner=t), batch, t.astype(jnp.int32), state)
        return state, way.inner == t

    def oracle(vars: Vars, batch: Batch) -> Terms:
        del vars
        return Terms(inner=Vars(inner=batch.inner))

    estimator = page(probability)
    times = jnp.arange(len(keys), dtype=jnp.float64)
    start = estimator.init(oracle, Vars(inner=times[0]), Batch(inner=times[0], key=keys[0], full=Levels(inner=times[0])))
    return np.asarray(jax.jit(partial(lax.scan, step))(start, (times, keys))[1])


def decay(step: float, library: bool) -> Any:
    """``step / sqrt(t + 1)``: schedules must be counted right, too."""
    return optax.sgd(lambda t: step * (t + 1.0) ** -0.5) if library else lambda t: step * (t + 1) ** -0.5


def lengths(batches: list[Batch], draw: int, terms: int) -> list[int]:
    """Of the random products, which take the key of one draw of an update."""
    keys = jnp.stack([batch.key[draw] for batch in batches if batch.key is not None])
    found = jax.jit(jax.vmap(lambda key: jax.random.randint(key, (), 0, terms, jnp.int32)))(keys)
    assert len(set(found.tolist())) == terms, "a length does not occur: choose another seed"
    return found.tolist()


def directions(batches: list[Batch], size: int) -> list[np.ndarray]:
    """Of PZOBO, one an update: the key is split among the directions, and then among the leaves of x."""

    def one(key: jax.Array) -> jax.Array:
        return jax.random.normal(jax.random.split(jax.random.split(key, 1)[0], 1)[0], (size,), jnp.float64)

    return list(np.asarray(jax.jit(jax.vmap(one))(jnp.concatenate([batch.key for batch in batches]))))


def coins_of(batches: list[Batch]) -> np.ndarray:
    refresh = coins(PROBABILITY, jnp.concatenate([batch.key for batch in batches]))
    assert 1 < sum(refresh) < len(refresh), "all coins fall alike: choose another seed"
    return refresh


#: name -> what a solver draws besides its blocks, read off the keys of its batches.
CHANCE = {
    "spaba": coins_of,
    "bsa": partial(lengths, draw=2, terms=2),
    "ttsa": partial(lengths, draw=1, terms=3),
    "sustain": partial(lengths, draw=0, terms=2),
    "pzobo": partial(directions, size=3),
}


def check_golden(
    update: Any, state: BilevelState, batches: Iterable[Batch], name: str, q: Quadratic, reference: Any = None
) -> None:
    """Every iterate of an update with steps ``decay(STEPS)`` equals that of the NumPy reference of ``name``, to 1e-12."""
    batches, reference = list(batches), reference or references.REFERENCES[name]
    sizes = tuple(next(iter(part.values())).shape[1] for part in (batches[0].inner, batches[0].outer))
    draws = []
    for batch in batches:
        assert batch.slot is not None
        draws.append([(int(i), int(j)) for i, j in zip(batch.slot.inner.index, batch.slot.outer.index, strict=True)])
    schedules = [decay(step, library=False) for step in STEPS]
    z, v, x = (np.asarray(part) for part in state.vars)
    run = references.Run(
        references.Data(*rows_of(q), sizes=sizes),
        draws,
        start=(z, v, x),
        steps=lambda t: (schedules[0](t), schedules[1](t), schedules[2](t)),
        chance=list(CHANCE[name](batches)) if name in CHANCE else [],
    )
    for batch, expected in zip(batches, reference(run), strict=True):
        state = update(state, batch)
        for got, part in zip(state.vars, expected, strict=True):
            np.testing.assert_allclose(got, part, atol=1e-12, rtol=1e-12)


def check_same(left: Any, right: Any, tol: float = 0.0) -> None:
    """Two trees have one structure, the same dtypes and the same values (to ``tol``)."""
    assert jax.tree.structure(left) == jax.tree.structure(right)
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(left), jax.tree.leaves(right), strict=True):
        name = jax.tree_util.keystr(path)
        assert a.dtype == b.dtype, name
        if jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
            a, b = jax.random.key_data(a), jax.random.key_data(b)
        np.testing.assert_allclose(a, b, rtol=tol, atol=tol, err_msg=name)


def walk(solver: Solver, start: Vars, batches: Iterable[Batch]) -> list[Vars]:
    """The iterates of a solver, one operation at a time: identities hold bit for bit, as nothing is fused.

    Under the usual promotion: without jit, an int32 that is compared with an enum is compared with an int64.
    """
    iterates = []
    with jax.disable_jit(), jax.numpy_dtype_promotion("standard"):
        state = None
        for batch in batches:
            state = solver.init(start, batch) if state is None else state
            state = solver.update(state, batch)
            iterates.append(state.vars)
    return iterates


def follow(solver: Solver, start: Vars, batches: list[Batch]) -> list[Any]:
    """The states of a solver, compiled."""
    update, state, states = jax.jit(solver.update), solver.init(start, batches[0]), []
    for batch in batches:
        state = update(state, batch)
        states.append(state)
    return states


def check_runs(solver: Solver, sampler: Sampler, start: Vars, data: Any, steps: int, by_hand: BilevelState) -> None:
    """A run from key 1 ends where a host loop over its batches did, mapped over keys or not, also when it is interrupted."""
    measure = lambda vars, data: {"outer": vars.outer.mean()}
    go = jax.jit(partial(run, solver, sampler, start, data, steps=steps, every=steps // 2, metrics=measure))
    whole, history = go(jax.random.key(1))
    assert history["outer"].shape == (3,)
    check_same(whole.state, by_hand, tol=1e-13)
    keys = jax.random.split(jax.random.key(2), 2)
    mapped, _ = jax.jit(jax.vmap(go))(keys)
    check_same(jax.tree.map(lambda leaf: leaf[1], mapped.state.vars), go(keys[1])[0].state.vars, tol=1e-13)

    @jax.jit
    def in_two(key: jax.Array) -> Any:
        carry = begin(solver, sampler, start, data, key)
        for _ in range(2):
            carry, _ = resume(solver, sampler, carry, data, steps=steps // 2)
        return carry

    check_same(in_two(jax.random.key(1)).state, whole.state, tol=1e-14)


#: The effort of users' compilers, where that of the tests is small (see `conftest.py`).
OPTIMISED = {
    "xla_backend_optimization_level": 3,
    "xla_llvm_disable_expensive_passes": False,
} | ({"xla_cpu_use_fusion_emitters": True} if jax.__version_info__ < (0, 11) else {})  # later versions refuse it


def optimised(function: Any, *args: Any) -> str:
    """The program that users get of a function of `jax.jit`."""
    return function.lower(*args).compile(compiler_options=OPTIMISED).as_text() or ""


def table_copies(text: str, *shape: int) -> list[str]:
    """The instructions of an optimised program that make a new array of a table's shape (or of one such a lane)."""
    dims = ",".join(map(str, shape))
    made = re.compile(rf"= \w+\[(?:\d+,)?{dims}\](?:{{[^}}]*}})? (copy|copy-start|select|concatenate)\(")
    return [line.strip() for line in text.splitlines() if made.search(line)]


def check_no_copies(text: str, *shapes: tuple[int, ...]) -> None:
    """No whole table is copied in an optimised program, in which its writes are to be found."""
    for shape in shapes:
        dims = ",".join(map(str, shape))
        writes = rf"\[(?:\d+,)?{dims}\](?:{{[^}}]*}})? (?:dynamic-update-slice|scatter|fusion|while)\("
        assert re.search(writes, text), f"no table of shape {shape} in the program"
        found = table_copies(text, *shape)
        assert not found, f"{len(found)} copies of a table of shape {shape}, the first: {found[0]}"
