"""Architecture search: operations, networks, cells as text, methods, and the experiment itself on small sizes."""

import dataclasses
import hashlib
import io
import json
import pickle
import tarfile

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pandas as pd
import pytest
from jax import lax

from bilevel_jax import Batch, Levels, Problem, Vars, begin, resume, run, samplers
from experiments.architecture_search import __main__ as experiment
from experiments.architecture_search import evaluation, genotype, network, operations, search
from experiments.architecture_search.__main__ import Config, Setting
from experiments.architecture_search.network import Cells, Edge, Network, Shape
from experiments.architecture_search.operations import ALL
from experiments.architecture_search.record import Record
from experiments.data import DataFileError, cifar10, files
from experiments.data.records import Images
from tests.tables import thinned

FEW = ("none", "skip", "max_3x3", "sep_3x3", "dil_5x5")
SHAPE = Shape(cells=3, nodes=2, channels=2, size=8, stride=2, classes=3)
SMALL = SHAPE._replace(nodes=1)
TINY = Setting(
    shape=SMALL._replace(cells=1),
    operations=("none", "skip", "sep_3x3"),
    epochs=2,
    batch_size=16,
    rates=search.Rates(inner=0.1, floor=1e-3, outer=0.02),
    evaluated=SMALL._replace(cells=1),
    training=evaluation.Training(epochs=2, batch_size=16, rate=0.1),
    evaluations=2,
    measured=16,
)


def images(shape, seed=0):
    return jax.random.normal(jax.random.key(seed), shape, jnp.float32)


def drawn(net, batch):
    """Random parameters, without the compilation that ``net.init`` takes."""
    rng, shapes = np.random.default_rng(0), jax.eval_shape(net.init, jax.random.key(0), batch)
    return jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), leaf.dtype), shapes)


# ---- operations


def reference(image, kernel, stride, dilation):
    """A depthwise convolution of one image [height, width] by loops."""
    reach = dilation * (len(kernel) // 2)
    padded = np.pad(image, reach)
    rows = range(0, len(image), stride)
    span = np.arange(len(kernel)) * dilation
    return np.array([[(padded[np.ix_(i + span, j + span)] * kernel).sum() for j in rows] for i in rows])


@thinned(("width", "stride", "dilation"), [(3, 1, 1), (3, 2, 2), (5, 2, 1), (5, 1, 2)], (3, 2, 2))
def test_depthwise(width, stride, dilation):
    image, kernel = images((2, 3, 6, 6)), images((2, width**2), 1)
    for form in ("matrix", "conv"):
        made = operations.depthwise(image, kernel, stride, dilation, form)
        for c in range(2):
            expected = reference(np.asarray(image[c, 1]), np.asarray(kernel[c]).reshape(width, width), stride, dilation)
            np.testing.assert_allclose(made[c, 1], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("stride", [1, 2])
def test_pools_leave_the_padding_out(stride):
    image = images((2, 3, 6, 6))
    window, strides, pad = (1, 1, 3, 3), (1, 1, stride, stride), ((0, 0), (0, 0), (1, 1), (1, 1))
    largest = lax.reduce_window(image, -jnp.inf, lax.max, window, strides, pad)
    np.testing.assert_allclose(operations.pool(image, "max", stride), largest)
    total = lambda a: lax.reduce_window(a, 0.0, lax.add, window, strides, pad)
    mean = total(image) / total(jnp.ones_like(image))
    np.testing.assert_allclose(operations.pool(image, "avg", stride), mean, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ALL)
def test_operations_keep_or_halve_the_size(name):
    for stride in (1, 2):
        for affine in (False, True):
            operation = operations.Operation(name, stride, affine, 3, "matrix")
            made, _ = jax.eval_shape(lambda i, o=operation: o.init_with_output(jax.random.key(0), i), images((4, 2, 8, 8)))
            assert [image.shape for image in made] == [(4, 2, 8 // stride, 8 // stride)] * 3


def test_copies_do_not_mix():
    operation = operations.Operation("sep_3x3", 1, False, 2, "matrix")
    image = images((2, 3, 4, 4))
    z = drawn(operation, image)
    slope = jax.jit(jax.grad(lambda z: (operation.apply(z, image)[0] ** 3).sum()))(z)
    for leaf in jax.tree.leaves(slope):
        assert np.abs(leaf[0]).max() > 0
        assert np.abs(leaf[1]).max() == 0


# ---- networks

CHOSEN = Cells(
    normal=((Edge(0, ("skip",)), Edge(1, ("sep_3x3",))), (Edge(0, ("max_3x3",)), Edge(2, ("dil_5x5",)))),
    reduction=((Edge(0, ("sep_3x3",)), Edge(1, ("skip",))), (Edge(0, ("sep_3x3",)), Edge(1, ("skip",)))),
)


def one_hot(cells, nodes, names):
    """Logits whose softmax has all its weight on the operations of the cells, and on "none" on every other edge."""

    def logits(chosen):
        rows = []
        for n in range(nodes):
            found = {edge.source: edge.operations[0] for edge in chosen[n]}
            rows += [[0.0 if name == found.get(s, "none") else -jnp.inf for name in names] for s in range(n + 2)]
        return jnp.array(rows, jnp.float32)

    return Cells(*map(logits, cells))


def chosen_parameters(z, cells, nodes):
    """The parameters of the supernet that a discrete network has: of each copy, those of the nodes that take it."""
    kept = {}
    for name, part in z["params"].items():
        if not name.startswith("cell"):
            kept[name] = part
            continue
        chosen = cells.reduction if int(name[4:]) in network.reductions(SHAPE.cells) else cells.normal
        kept[name] = {key: part[key] for key in ("older", "newer")}
        for key in part.keys() - {"older", "newer"}:
            source, operation = int(key[4]), key[6:]
            takers = [n for n in range(nodes) if Edge(source, (operation,)) in chosen[n]]
            rows = np.array(takers, int) - max(source - 1, 0)  # later nodes only
            if takers:
                kept[name][key] = jax.tree.map(lambda leaf, r=rows: leaf[r], part[key])
    return {"params": kept}


@pytest.mark.slow
def test_supernet_with_one_hot_logits_is_the_discrete_network():
    whole, part = search.supernet(SHAPE, FEW), Network(SHAPE, CHOSEN, affine=False)
    batch = images((4, 8, 8, 3))
    z = drawn(whole, batch)
    small = chosen_parameters(z, CHOSEN, 2)
    shapes = jax.eval_shape(part.init, jax.random.key(0), batch)
    assert jax.tree.map(jnp.shape, small) == jax.tree.map(jnp.shape, shapes)
    x = one_hot(CHOSEN, 2, FEW)
    expected = jax.jit(lambda z: whole.apply(z, batch, network.mixture(x)))(z)
    made = jax.jit(lambda z: part.apply(z, batch))(small)
    assert np.abs(expected).max() > 0.1
    np.testing.assert_allclose(made, expected, rtol=1e-4, atol=1e-5)
    assert genotype.discrete(x, FEW) == CHOSEN


@pytest.mark.slow
def test_full_setting_traces():
    setting = experiment.SETTINGS["full"]
    batch = jax.ShapeDtypeStruct((setting.batch_size, 32, 32, 3), jnp.float32)
    whole = search.supernet(setting.shape, setting.operations)
    x = jax.eval_shape(lambda: Cells(*(jnp.zeros((14, 8), jnp.float32),) * 2))
    loss = lambda z, x, batch: whole.apply(z, batch, network.mixture(x)).mean()
    z = jax.eval_shape(lambda key, i, x: whole.init(key, i, network.mixture(x)), jax.random.key(0), batch, x)
    slope = jax.eval_shape(jax.grad(loss, argnums=1), z, x, batch)
    assert [leaf.shape for leaf in slope] == [(14, 8)] * 2
    assert 1.8e6 < sum(leaf.size for leaf in jax.tree.leaves(z)) < 2.0e6  # DARTS' supernet: 1.93 million
    cells = genotype.random(np.random.default_rng(0), 4, setting.operations)
    large = Network(setting.evaluated, cells, affine=True)
    assert 1e6 < network.parameters(large) < 6e6


# ---- cells


def test_discrete_takes_the_two_strongest_edges():
    weak, none = [0.0, 0.0, 0.1, 0.0, 0.0], [9.0, 0.0, 2.0, 0.0, 0.0]
    rows = [weak, [0, 3, 0, 0, 0], none, [0, 0, 0, 0, 2], weak]  # an edge that is "none" all but wholly is weak
    nodes = genotype.discrete(Cells(np.array(rows), np.array(rows)), FEW).normal
    assert nodes[0] == (Edge(0, ("max_3x3",)), Edge(1, ("skip",)))
    assert nodes[1] == (Edge(1, ("dil_5x5",)), Edge(2, ("max_3x3",)))


def test_cells_as_json():
    rng = np.random.default_rng(0)
    for cells in (CHOSEN, *(genotype.random(rng, 4, ALL) for _ in range(5))):
        assert genotype.from_json(json.loads(json.dumps(genotype.as_json(cells)))) == cells


def test_random_cells():
    rng = np.random.default_rng(0)
    drawn = [genotype.random(rng, 3, FEW) for _ in range(300)]
    edges = [edge for cells in drawn for node in cells.normal for edge in node]
    assert {edge.operations[0] for edge in edges} == set(FEW) - {"none"}
    shares = np.bincount([FEW.index(edge.operations[0]) for edge in edges])[1:] / len(edges)
    np.testing.assert_allclose(shares, 0.25, atol=0.05)
    assert all(node[0].source < node[1].source < n + 2 for cells in drawn for n, node in enumerate(cells.normal))


@pytest.mark.slow
def test_random_cells_of_a_size():
    budget = network.parameters(Network(SHAPE, CHOSEN, affine=True))
    chosen = genotype.of_size([budget, budget], rng=np.random.default_rng(0), shape=SHAPE, operations=FEW, draws=12)
    assert len(set(chosen)) == 2
    for cells in chosen:
        assert network.parameters(Network(SHAPE, cells, affine=True)) == pytest.approx(budget, rel=0.15)


# ---- methods


def toy():
    """A problem of two weights a kind of cell in place of a network, its data and its start."""

    def error(z, x, rows):
        return 0.5 * (rows @ (z * jnp.concatenate([weights[:, 0] for weights in network.mixture(x)])) - 1.0) ** 2

    problem = Problem(inner=lambda z, x, rows: error(z, x, rows) + 0.05 * jnp.vdot(z, z), outer=error)
    x = Cells(images((2, 2), 2), images((2, 2), 3))
    return problem, Levels(images((8, 4)), images((8, 4), 1)), Vars(inner=images((4,), 4), outer=x)


@pytest.mark.slow
def test_lookahead_is_the_gradient_after_a_step():
    problem, data, start = toy()
    g, f = (lambda z, x, rows, loss=loss: loss(z, x, rows).mean() for loss in problem)
    oracle = search.lookahead(problem, optax.constant_schedule(1.0))
    made = jax.jit(lambda: oracle.terms(start, Batch(*data), jnp.int32(0)))().outer.outer
    ahead = lambda x: f(start.inner - jax.grad(g)(start.inner, x, data.inner), x, data.outer)
    expected, first = jax.grad(ahead)(start.outer), jax.grad(f, argnums=1)(start.inner, start.outer, data.outer)
    for a, b, c in zip(made, expected, first, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)
        assert np.abs(b - c).max() > 1e-3  # the step ahead matters


@pytest.mark.more
@pytest.mark.parametrize("method", ["darts_first", "darts_second", "meha"])
def test_methods_descend(method):
    problem, data, start = toy()
    rates = TINY.rates._replace(outer=0.03)
    metrics = lambda vars, data: {"outer": problem.outer(vars.inner, vars.outer, data.outer).mean()}
    go = jax.jit(lambda: run(search.build(method, problem, rates, 60), samplers.full(), start, data, jax.random.key(0),
                             steps=60, metrics=metrics))  # fmt: skip
    carry, history = go()
    assert history["outer"][-1] < 0.9 * history["outer"][0]
    for old, new in zip(start.outer, carry.state.vars.outer, strict=True):
        assert np.abs(old - new).max() > 0.05


def test_momentum_outlives_an_update():
    """Two updates of first-order DARTS, by hand."""
    problem, data, start = toy()
    rates = TINY.rates._replace(outer_decay=0.0, outer=1e-9, inner=0.01, floor=0.01)  # x stays all but where it is
    solver = search.build("darts_first", problem, rates, 10)
    carry = begin(solver, samplers.full(), start, data, jax.random.key(0))
    advance = jax.jit(lambda carry: resume(solver, samplers.full(), carry, data, steps=1)[0])
    first = advance(carry)
    slopes = [
        jax.grad(lambda z: problem.inner(z, start.outer, data.inner).mean())(z) for z in (start.inner, first.state.vars.inner)
    ]
    np.testing.assert_allclose(first.state.vars.inner, start.inner - 0.01 * slopes[0], rtol=1e-5)
    expected = first.state.vars.inner - 0.01 * (slopes[1] + 0.9 * slopes[0])
    np.testing.assert_allclose(advance(first).state.vars.inner, expected, rtol=1e-5)


@pytest.mark.more
def test_gradients_reach_every_logit():
    net = search.supernet(SMALL, FEW)
    problem, batch = search.bilevel(net, 1e-3), (images((6, 8, 8, 3)), jnp.arange(6, dtype=jnp.int32) % 3)
    z, x = drawn(net, batch[0]), Cells(images((2, 5), 1), images((2, 5), 2))
    slope = jax.jit(jax.grad(lambda x: problem.outer(z, x, batch).mean()))(x)
    for leaf in slope:
        assert np.abs(leaf).min() > 0
        np.testing.assert_allclose(leaf.sum(-1), 0, atol=1e-6)  # a softmax does not see a constant


def test_start():
    net = search.supernet(SMALL, FEW)
    shapes = jax.eval_shape(lambda key: search.start(net, FEW, key), jax.random.key(0))
    assert [leaf.shape for leaf in shapes.outer] == [(2, 5)] * 2
    assert shapes.inner["params"]["cell0"]["from0_sep_3x3"]["Separable_0"]["pointwise1"].shape == (1, 2, 2)


# ---- training


def test_images_move_whole():
    batch = jnp.arange(2 * 64, dtype=jnp.float32).reshape(2, 8, 8, 1) + 1
    made = jax.jit(evaluation.moved)(jnp.repeat(batch, 50, axis=0), jax.random.key(0))
    assert made.shape == (100, 8, 8, 1)
    rows = np.asarray(made)[:50, :, :, 0]
    steps = {int(row[4, 5] - row[4, 4]) for row in rows}
    assert steps == {1, -1}  # flipped or not
    # moved by -1, 0, 1 each way: columns 3, 4, 5, and 2, 3, 4 of those that are flipped
    assert {int(row[4, 4]) - 1 for row in rows} == {8 * i + j for i in (3, 4, 5) for j in (2, 3, 4, 5)}
    assert set(np.unique(rows)) <= {0, *range(1, 65)}


# ---- the experiment


@pytest.fixture
def made_images(monkeypatch):
    """Images of three classes that differ in colour, in place of CIFAR-10."""
    rng = np.random.default_rng(0)

    def part(n):
        labels = np.arange(n, dtype=np.int32) % 3
        x = rng.integers(0, 120, (n, 16, 16, 3))
        x[np.arange(n), :, :, labels] += 100
        return x.astype(np.uint8), labels

    known = Images("made", *part(96), *part(250), 3, "made")
    monkeypatch.setattr(experiment.data, "cifar10", lambda full: known)
    monkeypatch.setitem(experiment.SETTINGS, "tiny", TINY)
    with jax.enable_x64(False), jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


@pytest.mark.slow
def test_experiment_and_resume(made_images, monkeypatch, tmp_path):
    """A run that is interrupted in its search, and goes on, ends as one that is not."""
    monkeypatch.setattr(experiment, "SAVE_EVERY", 0.0)
    whole, cut = (Config(methods=("darts_first",), out=tmp_path / name) for name in ("whole", "cut"))
    table = experiment.main(whole)
    add = Record.add

    def interrupted(self, name, row):
        if row.get("step") == 6:
            raise KeyboardInterrupt
        add(self, name, row)

    monkeypatch.setattr(Record, "add", interrupted)
    with pytest.raises(SystemExit):
        experiment.main(cut)
    monkeypatch.setattr(Record, "add", add)
    monkeypatch.setattr(experiment, "test_accuracy", lambda *_: 0.5)  # training takes seconds, and does not resume
    resumed = experiment.main(dataclasses.replace(cut, resume=True))

    pd.testing.assert_frame_equal(resumed.drop(columns="accuracy"), table.drop(columns="accuracy"))
    histories = [pd.read_csv(config.out / "history.csv").drop(columns="seconds") for config in (whole, cut)]
    pd.testing.assert_frame_equal(*histories)
    assert histories[0]["step"].tolist() == [0, 3, 6]
    assert histories[0]["oracle_calls"].tolist() == [0, 6, 12]
    assert histories[0]["training_loss"].iloc[-1] < histories[0]["training_loss"].iloc[0]
    assert table["kind"].tolist() == ["searched", "random"]
    assert json.loads(table["cells"][0]) == json.loads((whole.out / "cells.json").read_text())["darts_first/1"]
    assert table["parameters"][1] == pytest.approx(table["parameters"][0], rel=0.3)
    assert (whole.out / "figure.png").exists()
    with pytest.raises(SystemExit, match="holds a run already"):
        experiment.main(cut)
    with pytest.raises(SystemExit, match="--resume: got"):
        experiment.main(dataclasses.replace(cut, methods=("meha",), resume=True))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seeds": 0}, "--seeds: got 0, expected at least 1"),
        ({"epochs": -1}, "--epochs: got -1"),
        ({"methods": ()}, "--methods: got none"),
        ({"resume": True, "overwrite": True}, "--resume and --overwrite"),
    ],
)
def test_bad_options(changes, message):
    with pytest.raises(SystemExit, match=message):
        Config(**changes)


# ---- data


@pytest.fixture
def folder(monkeypatch, tmp_path):
    """Own data and cache folders; a function that puts a file there and makes its checksum known."""
    monkeypatch.setenv("BILEVEL_JAX_DATA", str(tmp_path))
    monkeypatch.setenv("BILEVEL_JAX_CACHE", str(tmp_path / "cache"))

    def put(name, raw):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(raw)
        known = files.FILES[name]._replace(sha256=hashlib.sha256(raw).hexdigest())
        monkeypatch.setitem(files.FILES, name, known)

    return put


def test_cifar_subset(folder):
    with pytest.raises(DataFileError, match=r"cifar10_subset.npz: file not found(.|\n)*cifar10\(full=True\)"):
        cifar10()
    made = {f"{part}_images": np.full((n, 32, 32, 3), n, np.uint8) for part, n in (("train", 4), ("test", 2))}
    made |= {f"{part}_labels": np.arange(n, dtype=np.uint8) for part, n in (("train", 4), ("test", 2))}
    for changes, message in (
        ({}, None),
        ({"train_labels": np.arange(5)}, r"got images \(4, 32, 32, 3\) of uint8, expected \(5, 32"),
        ({"test_labels": np.array([3, 10])}, "got a label 10"),
    ):
        buffer = io.BytesIO()
        np.savez(buffer, **(made | changes))
        folder("cifar10/cifar10_subset.npz", buffer.getvalue())
        if message is None:
            data = cifar10()
            assert (data.train_x == 4).all()
            assert data.test_y.tolist() == [0, 1]
            assert "subset of CIFAR-10" in data.note
        else:
            with pytest.raises(DataFileError, match=message):
                cifar10()
    folder("cifar10/cifar10_subset.npz", b"not an archive")
    with pytest.raises(DataFileError, match="expected an npz file"):
        cifar10()


def test_cifar_archive(folder):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for k, name in enumerate([*(f"data_batch_{k}" for k in range(1, 6)), "test_batch"]):
            planes = np.arange(2 * 3 * 32 * 32).reshape(2, -1) % 251
            raw = pickle.dumps({"data": planes.astype(np.uint8), "labels": [k, 9 - k]})
            member = tarfile.TarInfo(f"cifar-10-batches-py/{name}")
            member.size = len(raw)
            archive.addfile(member, io.BytesIO(raw))
    folder("cifar10/cifar-10-python.tar.gz", buffer.getvalue())
    data = cifar10(full=True)
    assert data.train_x.shape == (10, 32, 32, 3)
    assert data.train_y.tolist() == [0, 9, 1, 8, 2, 7, 3, 6, 4, 5]
    assert data.train_x[0, 0, 1].tolist() == [1, (1024 + 1) % 251, (2048 + 1) % 251]  # planes of red, green and blue
