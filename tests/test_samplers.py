"""Samplers: every row counts once, every draw is a function of the key and its number, and the draws are random as they say."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import chi2

from bilevel_jax import Batch, Levels, samplers
from tests.checks import check_blocks, check_passes, check_same, hand

KINDS = {"uniform": samplers.uniform, "epochs": samplers.epochs}
every_kind = pytest.mark.parametrize("kind", KINDS)


def rows(n: int, m: int) -> Levels:
    return Levels(jnp.arange(float(n)), 100.0 + jnp.arange(float(m)))


def blocks_of(plan):
    return np.asarray(plan.block.inner), np.asarray(plan.block.outer)


LENGTH = 48  # draws: 16 and 12 passes over 3 and 4 blocks


def make(kind):
    """3 blocks of 4 rows of 10, and 4 of 3 rows of 11; `full` has one of each."""
    return samplers.full() if kind == "full" else KINDS[kind](4, outer_batch_size=3)


@cache
def plan_of(kind, seed=0):
    return planner(kind)(jax.random.key(seed))


@cache
def planner(kind):
    return jax.jit(lambda key: make(kind).plan(rows(10, 11), key, 0, LENGTH))


@cache
def stretch(kind, count):
    """The compiled plan of ``count`` draws from any draw on."""
    return jax.jit(lambda start: make(kind).plan(rows(10, 11), jax.random.key(0), start, count))


@every_kind
@pytest.mark.parametrize(("sizes", "counts"), [((4, 3), (10, 6)), ((5, 5), (10, 7)), ((1, 7), (3, 7))])
def test_blocks_are_rows_with_weights(kind, sizes, counts):
    check_blocks(KINDS[kind](sizes[0], outer_batch_size=sizes[1]), sizes, counts)


@every_kind
def test_padding_weighs_nothing_and_whole_levels_have_no_weights(kind):
    sampler, data = KINDS[kind](4, outer_batch_size=3), rows(10, 6)
    last = sampler.gather(data, hand(2, 1))
    assert last.weight is not None
    np.testing.assert_allclose(last.inner, [6.0, 7.0, 8.0, 9.0])
    np.testing.assert_allclose(last.weight.inner, [0.0, 0.0, 0.3, 0.3], rtol=1e-7)
    assert last.weight.outer is None
    np.testing.assert_allclose(last.outer, [103.0, 104.0, 105.0])


@every_kind
def test_dropping_the_remainder(kind):
    """The rows left out are in no draw and not in the full data; there are no weights, so scalar losses will do."""
    sampler, data = KINDS[kind](4, outer_batch_size=3, remainder="drop"), rows(10, 8)
    check_same(sampler.whole(data), Levels(data.inner[:8], data.outer[:6]))
    batch = sampler.stack(data, jax.tree.map(lambda leaf: leaf[None], hand(1, 1)))
    assert batch.full is not None
    check_same(batch.full, sampler.whole(data))
    assert batch.weight == Levels(None, None)
    assert {slot.count for slot in batch.slot or ()} == {2}
    np.testing.assert_array_equal(batch.inner[0], [4.0, 5.0, 6.0, 7.0])
    np.testing.assert_array_equal(batch.outer[0], [103.0, 104.0, 105.0])
    assert (samplers.blocks(10, 4), samplers.blocks(10, 4, "drop")) == (3, 2)
    kept = KINDS[kind](4, outer_batch_size=3)
    check_same(kept.whole(data), data)


def test_epochs_visit_every_block_once_a_pass():
    """On levels of 3 and 4 blocks."""
    check_passes(plan_of("epochs"), (3, 4))


def test_epochs_hold_across_chunk_borders():
    """Chunks of 5 draws cut the passes of 3 and of 4 blocks anywhere; together they are passes."""
    parts = [stretch("epochs", 5)(jnp.int32(5 * k)).block for k in range(12)]
    for level, count in enumerate((3, 4)):
        order = np.concatenate([part[level] for part in parts]).reshape(-1, count)
        np.testing.assert_array_equal(np.sort(order, axis=1), np.tile(np.arange(count), (len(order), 1)))


@pytest.mark.parametrize("kind", [*KINDS, "full"])
@given(start=st.integers(0, LENGTH - 5), count=st.sampled_from([1, 5]))
def test_any_stretch_of_a_plan_is_that_of_a_longer_one(kind, start, count):
    longer = jax.tree.map(lambda leaf: np.asarray(leaf)[start : start + count], plan_of(kind).block)
    part = stretch(kind, count)(jnp.int32(start))
    check_same(jax.tree.map(np.asarray, part.block), longer)
    keys = np.asarray(jax.random.key_data(plan_of(kind).key))[start : start + count]
    np.testing.assert_array_equal(jax.random.key_data(part.key), keys)


def chi_square(observed: np.ndarray, expected: np.ndarray) -> None:
    """The counts are not surprising at one in ten thousand; the keys are fixed, so this never flickers."""
    freedom = np.prod([size - 1 for size in observed.shape])
    assert ((observed - expected) ** 2 / expected).sum() < chi2.ppf(1 - 1e-4, freedom)


def test_uniform_is_uniform_and_its_levels_and_draws_are_independent():
    count = 6000
    inner, outer = blocks_of(jax.jit(lambda key: make("uniform").plan(rows(10, 11), key, 0, count))(jax.random.key(0)))
    assert set(inner) == {0, 1, 2}
    assert set(outer) == {0, 1, 2, 3}
    for order, of in ((inner, 3), (outer, 4)):
        chi_square(np.bincount(order, minlength=of), np.full(of, count / of))
        again = np.histogram2d(order[:-1], order[1:], bins=of)[0]
        chi_square(again, np.full((of, of), (count - 1) / of**2))
    both = np.histogram2d(inner, outer, bins=(3, 4))[0]
    chi_square(both, np.full((3, 4), count / 12))


def test_epochs_are_uniform_permutations_independent_between_levels():
    passes, sampler = 1200, samplers.epochs(4)
    plan = jax.jit(lambda key: sampler.plan(rows(12, 12), key, 0, 3 * passes))(jax.random.key(0))
    check_passes(plan, (3, 3))
    codes = [order.reshape(-1, 3) @ np.array([9, 3, 1]) for order in blocks_of(plan)]
    found = [np.unique(code, return_inverse=True)[1] for code in codes]
    for code in found:
        chi_square(np.bincount(code, minlength=6), np.full(6, passes / 6))
    chi_square(np.histogram2d(*found, bins=6)[0], np.full((6, 6), passes / 36))


@every_kind
def test_keys_give_other_draws_and_every_draw_a_key_of_its_own(kind):
    first, second = (plan_of(kind, seed) for seed in (0, 1))
    assert any((a != b).any() for a, b in zip(blocks_of(first), blocks_of(second), strict=True))
    keys = jax.random.key_data(jnp.concatenate([first.key, second.key]))
    assert len({tuple(data) for data in np.asarray(keys).tolist()}) == 2 * LENGTH


@pytest.mark.parametrize("impl", ["rbg", "unsafe_rbg"])
def test_keys_of_any_generator_give_the_same_draws_under_vmap(impl):
    """Draw t is a function of the key and t, whatever the other lanes do."""
    keys = jnp.stack([jax.random.key(seed, impl=impl) for seed in range(3)])
    make_plan = jax.jit(lambda key: make("uniform").plan(rows(10, 11), key, 0, 5).block)
    lanes = jax.jit(jax.vmap(make_plan))(keys)
    for lane in range(3):
        check_same(jax.tree.map(lambda leaf, lane=lane: leaf[lane], lanes), make_plan(keys[lane]))


@pytest.mark.parametrize("kind", [*KINDS, "full"])
def test_stacking_is_gathering_one_by_one(kind):
    """For few draws, which are written out, and for many, which are a loop; the full data are not stacked."""
    sampler, data, plan = make(kind), rows(10, 11), plan_of(kind)
    for draws in (1, 6):
        part = jax.tree.map(lambda leaf, n=draws: leaf[:n], plan)
        stacked = sampler.stack(data, part)
        assert isinstance(stacked, Batch)
        check_same(stacked.full, sampler.whole(data))
        one_by_one = [sampler.gather(data, jax.tree.map(lambda leaf, t=t: leaf[t], part)) for t in range(draws)]
        check_same(stacked._replace(full=None), jax.tree.map(lambda *leaves: jnp.stack(leaves), *one_by_one))


def test_full_is_one_block_without_weights():
    data = rows(10, 6)
    batch = samplers.full().stack(data, jax.tree.map(lambda leaf: leaf[3:5], plan_of("full")))
    assert batch.weight is None
    assert [slot.count for slot in batch.slot or ()] == [1, 1]
    assert [slot.index.tolist() for slot in batch.slot or ()] == [[0, 0], [0, 0]]
    for level in (0, 1):
        np.testing.assert_array_equal(batch[level], np.stack([data[level]] * 2))


def test_data_may_be_trees_of_several_leaves_and_dtypes():
    data = Levels(
        {"a": jnp.ones((10, 2), jnp.float32), "n": jnp.arange(10, dtype=jnp.int32)}, (jnp.ones((6, 3), jnp.bfloat16),)
    )
    batch = make("uniform").stack(data, jax.tree.map(lambda leaf: leaf[:5], plan_of("uniform")))
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype.name), Levels(batch.inner, batch.outer)) == Levels(
        {"a": ((5, 4, 2), "float32"), "n": ((5, 4), "int32")}, (((5, 3, 3), "bfloat16"),)
    )
    starts = batch.inner["n"][:, 0].tolist()
    np.testing.assert_array_equal(batch.inner["n"], [np.arange(start, start + 4) for start in starts])


def test_from_stream_stacks_groups_in_order():
    def loader():
        for i in range(7):
            yield Batch(inner={"a": np.full(3, i)}, outer=jnp.full(2, 10.0 * i), key=jax.random.key(i), full=Levels(i, None))

    groups = list(samplers.from_stream(loader(), draws=3))
    assert [group.inner["a"].tolist() for group in groups] == [[[i] * 3 for i in part] for part in ([0, 1, 2], [3, 4, 5])]
    assert [group.outer[:, 0].tolist() for group in groups] == [[0.0, 10.0, 20.0], [30.0, 40.0, 50.0]]
    assert [group.full.inner for group in groups] == [0, 3]
    assert groups[1].key is not None
    check_same(groups[1].key[2], jax.random.key(5))
    assert list(samplers.from_stream([], draws=2)) == []


# ---- episodes ---------------------------------------------------------------------------------------------------------

EPISODES = samplers.episodes(5, ways=3, shots=2, queries=3)


@cache
def episodes_of(start, count, seed=0):
    """Of samples that say what they are: sample j of class i is 10 i + j."""
    data = Levels(inner=10.0 * jnp.arange(6.0)[:, None] + jnp.arange(7.0)[None])
    return jax.jit(lambda: EPISODES.batches(data, jax.random.key(seed), start, count))()


def test_an_episode_holds_different_samples_of_different_classes():
    batch = episodes_of(0, 4)
    (support, labels), (query, query_labels) = batch.inner, batch.outer
    assert support.shape == labels.shape == (4, 5, 6)
    assert query.shape == query_labels.shape == (4, 5, 9)
    for a, la, b, lb in zip(*(np.asarray(leaf).reshape(20, -1) for leaf in (*batch.inner, *batch.outer)), strict=True):
        samples, found = np.concatenate([a, b]), np.concatenate([la, lb])
        assert len(set(samples)) == 15
        classes = [set(samples[found == label] // 10) for label in range(3)]
        assert [len(one) for one in classes] == [1, 1, 1]
        assert len(set.union(*classes)) == 3
        np.testing.assert_array_equal(np.bincount(la), [2, 2, 2])
        np.testing.assert_array_equal(np.bincount(lb), [3, 3, 3])


def test_episodes_are_a_function_of_the_key_and_the_number():
    """So a run may be cut anywhere; other keys and other draws give other episodes."""
    long, short = (episodes_of(*stretch)._replace(full=None) for stretch in ((0, 4), (2, 2)))
    check_same(jax.tree.map(lambda leaf: leaf[2:], long), short)
    assert (np.asarray(episodes_of(0, 4).inner[0][0]) != np.asarray(episodes_of(0, 4).inner[0][1])).any()
    assert (np.asarray(episodes_of(0, 4).inner[0]) != np.asarray(episodes_of(0, 4, seed=1).inner[0])).any()


def test_episodes_visit_everything_alike():
    """Each of the 6 classes in half of the 500 episodes, each sample alike as support; a chi-squared test of fixed keys."""
    support = np.asarray(episodes_of(0, 100).inner[0]).ravel().astype(int)
    counts = np.array([[(support == 10 * i + j).sum() for j in range(7)] for i in range(6)])
    assert counts.sum() == 3000
    expected = 3000 / 42
    assert ((counts - expected) ** 2 / expected).sum() < chi2.ppf(0.999, 41)


@pytest.mark.parametrize(
    ("numbers", "data", "message"),
    [
        ({"ways": 7}, Levels(inner=np.zeros((6, 7))), "ways: got 7, expected at most 6, the classes"),
        ({"shots": 5}, Levels(inner=np.zeros((6, 7))), "shots: got 5, and 3 queries, expected at most 7 together"),
        ({}, Levels(inner=np.zeros(6)), r"data.inner: got no array \[classes, samples, ...\]"),
        ({"queries": 0}, Levels(inner=np.zeros((6, 7))), "queries: got 0, expected at least 1"),
        ({"tasks": 1.5}, Levels(inner=np.zeros((6, 7))), "tasks: got 1.5"),
    ],
)
def test_episodes_refuse(numbers, data, message):
    numbers = {"tasks": 2, "ways": 3, "shots": 2, "queries": 3} | numbers
    with pytest.raises((TypeError, ValueError), match=message):
        samplers.episodes(**numbers).batches(data, jax.random.key(0), 0, 1)
