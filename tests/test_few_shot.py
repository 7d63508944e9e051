"""Few-shot learning: task data, the network and its meta-gradients, the methods, and the experiment on small sizes."""

import io
import pickle
import zipfile

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pandas as pd
import pytest
from flax import nnx
from PIL import Image

from bilevel_jax import Levels, Problem, Vars, begin, resume, samplers, solvers
from experiments import data, few_shot
from experiments.data import DataFileError, omniglot
from experiments.data.few_shot import SINUSOIDS
from experiments.data.omniglot import read_archive
from experiments.few_shot import Config
from experiments.few_shot_methods import SETTINGS, body, build, head, heads, held
from experiments.networks import ConvNet, Convolution, functional
from tests.tables import thinned

# ---- data -------------------------------------------------------------------------------------------------------------


def test_digits_are_held_out():
    digits = data.digits_by_class()
    assert digits.train.shape == (28, 174, 8, 8, 1)
    assert digits.test.shape == (6, 174, 8, 8, 1)
    assert digits.train.max() == 255
    np.testing.assert_array_equal(digits.test[3, 5], np.rot90(digits.test[0, 5]))
    np.testing.assert_array_equal(digits.train[15, 5], np.rot90(digits.train[1, 5], 2))
    seen = {image.tobytes() for image in digits.train.reshape(-1, 64)}
    assert not seen & {image.tobytes() for image in digits.test.reshape(-1, 64)}


def archive(path, characters, drawings=20):
    """Characters of one alphabet; drawing j of character i has i + 1 black rows from row j on."""
    with zipfile.ZipFile(path, "w") as file:
        for i in range(characters):
            for j in range(drawings):
                pixels = np.full((105, 105), 255, np.uint8)
                pixels[4 * j : 4 * j + i + 1] = 0
                buffer = io.BytesIO()
                Image.fromarray(pixels).convert("1").save(buffer, "PNG")
                file.writestr(f"images/Toy/character{i:02}/{i}_{j:02}.png", buffer.getvalue())


def test_archive(tmp_path):
    archive(tmp_path / "toy.zip", 3)
    images = read_archive(tmp_path / "toy.zip", 3)
    assert images.shape == (3, 20, 28, 28)
    assert images.dtype == np.uint8
    ink = images.astype(float).mean((2, 3)) / 255  # shrinking about keeps the mean
    np.testing.assert_allclose(ink, np.broadcast_to(np.arange(1, 4)[:, None] / 105, ink.shape), atol=8e-3)
    assert images[0, 0].argmax() < images[0, 19].argmax()


def test_damaged_archives(tmp_path):
    archive(tmp_path / "toy.zip", 2, drawings=3)
    with pytest.raises(DataFileError, match=r"got 2 characters, expected 2 with 20 drawings each"):
        read_archive(tmp_path / "toy.zip", 2)
    (tmp_path / "toy.zip").write_bytes(b"no archive")
    with pytest.raises(DataFileError, match=r"toy\.zip: got a damaged archive"):
        read_archive(tmp_path / "toy.zip", 2)


def test_split_of_omniglot(monkeypatch):
    marked = np.zeros((1623, 20, 4, 4), np.uint8)
    marked[..., 0, 0], marked[..., 0, 1] = np.arange(1623)[:, None] % 250, np.arange(1623)[:, None] // 250
    monkeypatch.setitem(omniglot.__globals__, "_shrunk", lambda: marked)
    plain, turned = omniglot(rotations=False), omniglot()

    def who(images):
        return set((images[:, 0, 0, :2, 0].astype(int) @ np.array([1, 250])).tolist())

    assert plain.train.shape == (1200, 20, 4, 4, 1)
    assert plain.test.shape == turned.test.shape == (423, 20, 4, 4, 1)
    assert who(plain.train) | who(plain.test) == set(range(1623))
    np.testing.assert_array_equal(turned.train[1200:2400], np.rot90(plain.train, axes=(2, 3)))
    assert len(turned.train) == 4800


def test_sets_of_the_user(monkeypatch, tmp_path):
    monkeypatch.setenv("BILEVEL_JAX_DATA", str(tmp_path))
    with pytest.raises(DataFileError, match=r"mini-imagenet-cache-train\.pkl: put it there, or set BILEVEL_JAX_DATA"):
        data.mini_imagenet()
    for folder in ("mini_imagenet", "fc100"):
        (tmp_path / folder).mkdir()
    images = np.arange(5 * 4 * 4 * 3, dtype=np.uint8).reshape(5, 4, 4, 3)
    for part in ("train", "test"):
        held = {"image_data": images, "class_dict": {"a": [0, 3], "b": [1, 2, 4]}}
        (tmp_path / f"mini_imagenet/mini-imagenet-cache-{part}.pkl").write_bytes(pickle.dumps(held))
        (tmp_path / f"fc100/FC100_{part}.pickle").write_bytes(pickle.dumps({"data": images, "labels": [7, 9, 9, 7, 9]}))
    for found in (data.mini_imagenet(), data.fc100()):
        np.testing.assert_array_equal(found.train, images[np.array([[0, 3], [1, 2]])])
    with pytest.raises(DataFileError, match=r"FC100_val\.pickle"):
        data.fc100("validation")
    with pytest.raises(ValueError, match=r"held_out: got 'val'"):
        data.fc100("val")


class Attack:
    def __reduce__(self):
        return print, ("ran",)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (pickle.dumps(Attack()), r"it wants builtins\.print, not an array"),
        (b"text", "cannot be read"),
        (pickle.dumps({"data": 1}), "expected a dictionary with the entries data and labels"),
        (pickle.dumps({"data": np.zeros((2, 3)), "labels": [0, 1]}), "expected uint8 images"),
        (pickle.dumps({"data": np.zeros((2, 3)), "labels": [0]}), "got 1 labels, expected 2"),
    ],
)
def test_unusable_files(monkeypatch, tmp_path, capsys, content, message):
    monkeypatch.setenv("BILEVEL_JAX_DATA", str(tmp_path))
    (tmp_path / "fc100").mkdir()
    (tmp_path / "fc100/FC100_train.pickle").write_bytes(content)
    with pytest.raises(DataFileError, match=message):
        data.fc100()
    assert "ran" not in capsys.readouterr().out


def test_sinusoids():
    sampler = data.sinusoids(3, shots=4, queries=50)
    ranges = Levels(inner=jnp.asarray(SINUSOIDS))
    batch = jax.jit(lambda key: sampler.batches(ranges, key, 0, 2))(jax.random.key(0))
    assert batch.inner[0].shape == (2, 3, 4, 1)
    assert batch.outer[1].shape == (2, 3, 50, 1)
    later = sampler.batches(ranges, jax.random.key(0), 1, 1)
    np.testing.assert_allclose(later.inner[1][0], batch.inner[1][1], rtol=1e-6)
    for task in range(3):  # support and queries lie on one curve a sin(t) + b cos(t), of the right size
        t, y = (np.concatenate([part[i][0, task, :, 0] for part in (batch.inner, batch.outer)]) for i in (0, 1))
        wave, residual, *_ = np.linalg.lstsq(np.stack([np.sin(t), np.cos(t)], 1), y)
        assert residual < 1e-8
        assert 0.1 <= np.hypot(*wave) <= 5
        assert np.abs(t).max() <= 5


# ---- networks ---------------------------------------------------------------------------------------------------------


@thinned("stride", [1, 2], 2)
@pytest.mark.parametrize("shape", [(6, 6), (5, 7), (1, 1)])
def test_forms_of_the_convolution_agree(stride, shape):
    images = jax.random.normal(jax.random.key(0), (2, *shape, 3), jnp.float32)

    def of(form):
        return functional(Convolution(3, 4, stride=stride, rngs=nnx.Rngs(1), form=form))

    results = []
    for form in ("matmul", "convolution"):
        model = of(form)
        value = jax.jit(jax.value_and_grad(lambda p, m=model: jnp.sin(m.apply(p, images)).sum()))
        results.append((model.apply(model.params, images), value(model.params)))
    assert results[0][0].shape == (2, -(-shape[0] // stride), -(-shape[1] // stride), 4)
    for one, other in zip(*map(jax.tree.leaves, results), strict=True):
        np.testing.assert_allclose(one, other, rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize("pool", [False, True])
def test_statistics_are_those_of_the_batch(pool):
    model = functional(ConvNet((16, 16, 1), 3, features=4, rngs=nnx.Rngs(0), pool=pool))
    images = jax.random.normal(jax.random.key(0), (6, 16, 16, 1), jnp.float32)
    logits = jax.jit(model.apply)(model.params, images)
    assert logits.shape == (6, 3)
    np.testing.assert_allclose(jax.jit(model.apply)(model.params, 40 * images), logits, atol=5e-3)  # scale is divided out
    assert np.abs(jax.jit(model.apply)(model.params, images[:3]) - logits[:3]).max() > 1e-2  # another batch, other statistics
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(model.params)]
    assert len([path for path in paths if head(path)]) == 2
    assert len([path for path in paths if body(path)]) == 16


def test_images_too_small_to_pool():
    with pytest.raises(ValueError, match="got images 8 x 8, expected at least 16 x 16"):
        ConvNet((8, 8, 1), 5, features=2, rngs=nnx.Rngs(0), pool=True)


# ---- methods ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def learner():
    """A small network in float64, its loss, and two tasks of three classes."""
    made = functional(ConvNet((6, 6, 1), 3, features=3, rngs=nnx.Rngs(0)))
    model = made._replace(params=jax.tree.map(lambda leaf: leaf.astype(jnp.float64), made.params))

    def loss(params, pairs):
        return optax.softmax_cross_entropy_with_integer_labels(model.apply(params, pairs[0]), pairs[1]).mean()

    source = Levels(inner=jax.random.normal(jax.random.key(3), (4, 5, 6, 6, 1), jnp.float64))
    batch = samplers.episodes(2, ways=3, shots=1, queries=2).batches(source, jax.random.key(1), 0, 1)
    return model, loss, source, batch


def follow(loss, params, support, steps, rate, adapted=lambda path: True):
    """Plain gradient steps on some leaves."""
    for _ in range(steps):
        way = jax.grad(loss)(params, support)
        params = jax.tree_util.tree_map_with_path(
            lambda path, p, w: p - rate * w if adapted(jax.tree_util.keystr(path)) else p, params, way
        )
    return params


@pytest.mark.more
@pytest.mark.parametrize("name", ["maml", "anil"])
def test_meta_gradient_equals_finite_differences(name, learner):
    model, loss, _, batch = learner
    options = {"adapted": head} if name == "anil" else {}
    opts = Vars(inner=optax.sgd(0.1), outer=optax.sgd(1.0))
    problem = few_shot_problem(loss)
    solver = getattr(solvers, name)(problem, opts, inner_steps=2, **options)

    @jax.jit
    def moved(params):
        state = solver.update(solver.init(Vars(outer=params), batch), batch)
        return jax.tree.map(jnp.subtract, params, state.vars.outer)

    @jax.jit
    def value(params):
        adapted = options.get("adapted", lambda path: True)
        pairs = jax.tree.map(lambda leaf: leaf[0], (batch.inner, batch.outer))
        return jax.lax.map(lambda one: loss(follow(loss, params, one[0], 2, 0.1, adapted), one[1]), pairs).mean()

    gradient = moved(model.params)
    keys = jax.random.split(jax.random.key(5), len(jax.tree.leaves(model.params)))
    leaves, form = jax.tree.flatten(model.params)
    way = form.unflatten([jax.random.normal(k, leaf.shape, leaf.dtype) for k, leaf in zip(keys, leaves, strict=True)])
    size = 1e-6
    ahead, behind = (value(jax.tree.map(lambda p, w, s=s: p + s * w, model.params, way)) for s in (size, -size))
    slope = sum(jnp.vdot(g, w) for g, w in zip(jax.tree.leaves(gradient), jax.tree.leaves(way), strict=True))
    np.testing.assert_allclose(slope, (ahead - behind) / (2 * size), rtol=1e-5)


def few_shot_problem(loss):
    return Problem(lambda z, x, pairs: loss(z, pairs), lambda z, x, pairs: loss(z, pairs))


def task(pairs, index):
    return jax.tree.map(lambda leaf: leaf[0, index], pairs)


def small(name):
    return SETTINGS["laptop"]["digits"]._replace(ways=3, tasks=2, features=3, updates=10)


@thinned("name", ["maml", "anil", "meha"], "anil")
def test_adaptation_at_test_time(name, learner):
    model, loss, _, batch = learner
    method = build(name, loss, model, small(name), inner_steps=2)
    support = task(batch.inner, 0)
    rate, start = small(name).rates[name].inner, model.params
    if name == "meha":
        start = {**start, "head": jax.tree.map(jnp.zeros_like, start["head"])}
    expected = jax.jit(lambda p: follow(loss, p, support, 2, rate, head if name != "maml" else lambda path: True))(start)
    found = jax.jit(method.adapt)(method.start, support)
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-8, atol=1e-12)


@pytest.mark.more
def test_heads_of_tasks_are_apart(learner):
    """The inner gradient in the stacked heads is that of every task by itself."""
    model, loss, _, batch = learner
    method = build("meha", loss, model, small("meha"))
    pairs = jax.tree.map(lambda leaf: leaf[0], batch.inner)
    z = jax.tree.map(lambda leaf: leaf + 0.1, method.start.inner)
    way = jax.jit(jax.grad(heads(loss).inner))(z, method.start.outer, pairs)
    for i in range(2):
        params = {**model.params, "head": jax.tree.map(lambda leaf, i=i: leaf[i], z["head"])}
        expected = jax.jit(jax.grad(loss))(params, task(batch.inner, i))["head"]
        for one, other in zip(jax.tree.leaves(way["head"]), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(one[i], other, rtol=1e-9)


@pytest.mark.more
def test_held_draws():
    sampler = samplers.episodes(2, ways=3, shots=1, queries=1)
    source = Levels(inner=jnp.arange(4 * 5, dtype=jnp.float64).reshape(4, 5))
    key = jax.random.key(0)
    once, many = sampler.batches(source, key, 0, 3), held(sampler, 4).batches(source, key, 3, 7)
    np.testing.assert_array_equal(many.inner[0], once.inner[0][np.array([0, 1, 1, 1, 1, 2, 2])])
    assert held(sampler, 1) is sampler


@pytest.mark.slow
def test_meha_restarts_its_heads(learner):
    model, loss, source, _ = learner
    method = build("meha", loss, model, small("meha"), inner_steps=2)
    sampler = held(samplers.episodes(2, ways=3, shots=1, queries=2), method.hold)
    carry = begin(method.solver, sampler, method.start, source, jax.random.key(0))
    advance = jax.jit(lambda carry: resume(method.solver, sampler, carry, source, steps=1)[0])
    carry = advance(advance(carry))
    zeroed = carry._replace(state=carry.state._replace(vars=carry.state.vars._replace(inner=method.start.inner)))
    for one, other in zip(*(jax.tree.leaves(advance(c).state.vars) for c in (carry, zeroed)), strict=True):
        np.testing.assert_array_equal(one, other)
    assert np.abs(advance(carry).state.vars.inner["head"]["kernel"]).max() > 0


# ---- the experiment ---------------------------------------------------------------------------------------------------


@pytest.fixture
def as_users_run():
    """JAX as it comes."""
    with jax.enable_x64(False), jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


def config(out, **changes):
    settings = {"steps": 4, "evaluations": 2, "test_tasks": 8, "tasks": 2, "inner_steps": 1, "cores": 1, "out": out}
    return Config(**(settings | changes))


def rows(out):
    return pd.read_csv(out / "history.csv").drop(columns="seconds")


@pytest.mark.usefixtures("as_users_run")
@pytest.mark.slow
def test_interrupted_and_resumed_equals_uninterrupted(tmp_path, monkeypatch, capsys):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    few_shot.main(config(whole, solvers=("anil", "meha")))
    table = rows(whole)
    assert list(table["step"]) == [0, 2, 4] * 2
    assert table["accuracy"].between(0, 1).all()
    assert (whole / "figure.png").read_bytes()[:4] == b"\x89PNG"

    calls, measured = [], few_shot.Store.add

    def add(store, name, step, *rest):
        calls.append(step)
        if len(calls) == 6:  # the last evaluation of meha
            raise KeyboardInterrupt
        measured(store, name, step, *rest)

    monkeypatch.setattr(few_shot.harness, "SAVE_EVERY", 0.0)
    monkeypatch.setattr(few_shot.Store, "add", add)
    with pytest.raises(SystemExit, match="130"):
        few_shot.main(config(cut, solvers=("anil", "meha")))
    assert "--resume" in capsys.readouterr().err
    assert (cut / "checkpoints/meha").exists()
    few_shot.main(config(cut, solvers=("anil", "meha"), resume=True))
    pd.testing.assert_frame_equal(rows(cut), table)


@pytest.mark.more
@pytest.mark.usefixtures("as_users_run")
def test_sinusoids_are_learned(tmp_path):
    few_shot.main(config(tmp_path / "run", dataset="sinusoid", solvers=("maml",), steps=300, tasks=10, test_tasks=40))
    error = rows(tmp_path / "run")["error"]
    assert error.iloc[-1] < 0.95 * error.iloc[0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"solvers": ()}, "--solvers: got none"),
        ({"steps": 0}, "--steps: got 0, expected at least 1"),
        ({"steps": 5}, "--steps: got 5 for maml, expected a multiple of 2"),
        ({"cores": 3}, "--tasks: got 2, expected a multiple of --cores = 3"),
        ({"setting": "thesis"}, "--setting: got thesis, which has no numbers for digits, but for mini_imagenet"),
        ({"dataset": "sinusoid", "solvers": ("itd_bio",)}, "--solvers: got itd_bio, expected some of maml"),
    ],
)
def test_settings_that_do_not_fit(tmp_path, changes, message):
    with pytest.raises(SystemExit, match=message):
        config(tmp_path / "run", **changes)


@pytest.mark.usefixtures("as_users_run")
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ways": 7}, "ways: got 7, expected at most 6, the classes"),
        ({"shots": 170}, "shots: got 170, and 5 queries, expected at most 174 together"),
        ({"cores": 2, "tasks": 2}, "--cores: got 2, expected at most 1, the devices"),
    ],
)
def test_tasks_that_there_are_not(tmp_path, changes, message):
    jax.device_count()  # starts JAX, if no test has
    with pytest.raises((SystemExit, ValueError), match=message):
        few_shot.main(config(tmp_path / "run", **changes))
    assert not (tmp_path / "run").exists()
