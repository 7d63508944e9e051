"""20 Newsgroups: the loader on a made archive and on the real one, sparse products, the problem, and the experiment itself."""

import io
import os
import tarfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pandas as pd
import pytest
import scipy.sparse

from bilevel_jax import Batch, Levels, Problem, Vars, implicit, run, samplers, solvers
from experiments import data, learned_regularisation, race, sparse
from experiments.data import files, newsgroups
from experiments.learned_regularisation import Config, blocks, cut, problem
from tests.tables import thinned

REAL = os.environ.get("BILEVEL_JAX_DATA")
ROWS, WORDS = 19, 30


def numbers(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape)


@pytest.fixture(scope="module")
def matrix():
    """19 rows of 30 words, some of more than a segment's entries, the last word and the first row without any."""
    filled = scipy.sparse.random(ROWS, WORDS, density=0.4, random_state=1, format="lil")
    filled[0] = filled[:, -1] = 0
    return scipy.sparse.csr_matrix(filled)


# ---- sparse products, against dense ones


@pytest.fixture(scope="module")
def pair(matrix):
    padded = np.pad(matrix.toarray(), ((0, 2), (0, 0)))
    return jax.tree.map(jnp.asarray, sparse.blocks(matrix, 7)), jnp.asarray(padded.reshape(3, 7, WORDS))


def both():
    """The same nonlinear loss by a sparse and by a dense product."""
    target = jnp.asarray(numbers(7, 4, seed=2))

    def loss(logits):
        return (jnp.tanh(logits) * target[None]).sum()

    return lambda z, a: loss(sparse.product(a, z, 7)), lambda z, a: loss(a @ z)


def test_product(pair):
    z = jnp.asarray(numbers(WORDS, 4))
    np.testing.assert_allclose(sparse.product(pair[0], z, 7), pair[1] @ z, atol=1e-14)


@pytest.mark.parametrize(
    "derivative",
    [
        lambda f: jax.grad(f),
        lambda f: lambda z, a: jax.jvp(lambda z: jax.grad(f)(z, a), (z,), (z + 1,))[1],
        lambda f: lambda z, a: jax.vjp(lambda z: jax.grad(f)(z, a), z)[1](z + 1)[0],
        lambda f: lambda z, a: jax.linearize(lambda z: jax.grad(f)(z, a), z)[1](z + 1),
        lambda f: lambda z, a: jax.grad(lambda z: (jax.grad(jax.checkpoint(f))(z, a) ** 3).sum())(z),
    ],
    ids=["gradient", "forward", "reverse", "linearised", "checkpointed"],
)
@thinned("over", ["one", "lanes", "shared matrix"], "shared matrix")
def test_derivatives(pair, derivative, over):
    z = jnp.asarray(numbers(3, WORDS, 4))
    axes = {"one": None, "lanes": (0, 0), "shared matrix": (0, None)}[over]
    got = []
    for f, a in zip(both(), pair, strict=True):
        if axes is None:
            got.append(jax.jit(derivative(f))(z[0], a))
        else:
            a = jax.tree.map(lambda leaf: leaf[:, None], a) if axes == (0, 0) else a
            got.append(jax.jit(jax.vmap(derivative(f), axes))(z, a))
    np.testing.assert_allclose(got[0], got[1], atol=1e-12)
    assert np.abs(got[1]).max() > 0.1


def test_entries_have_no_derivative(pair):
    f, _ = both()
    with pytest.raises(TypeError, match="matrix: got entries to differentiate"):
        jax.grad(lambda a: f(jnp.ones((WORDS, 4)), a), allow_int=True)(pair[0])


def test_bad_rows(matrix):
    with pytest.raises(ValueError, match="rows: got 0, expected at least 1"):
        sparse.blocks(matrix, 0)


def test_a_block_without_entries():
    empty = jax.tree.map(jnp.asarray, sparse.blocks(scipy.sparse.csr_matrix((3, 5)), 2))
    assert not np.any(sparse.product(empty, jnp.ones((5, 2)), 2))


# ---- the problem


@pytest.fixture(scope="module")
def small(matrix):
    """A problem of 19 + 19 rows, 30 words and 4 classes: (sparse blocks, dense rows and labels), by level."""
    other = matrix[::-1].multiply(1 + 0.1 * numbers(ROWS, WORDS)).tocsr()
    y = [(m @ numbers(WORDS, 4, seed=3)).argmax(1).astype(np.int32) for m in (matrix, other)]
    dense = Levels(*((jnp.asarray(m.toarray()), jnp.asarray(label)) for m, label in zip((matrix, other), y, strict=True)))
    return lambda size: jax.tree.map(jnp.asarray, Levels(cut(matrix, y[0], size), cut(other, y[1], size))), dense


def plainly(z, x, batch):
    rows, labels = batch
    return optax.softmax_cross_entropy_with_integer_labels(rows @ z, labels)


#: The same problem as the paper writes it.
written_out = Problem(
    inner=lambda z, x, batch: plainly(z, x, batch).mean() + 0.5 * jnp.mean(jnp.exp(x)[:, None] * z**2), outer=plainly
)


@pytest.mark.parametrize("size", [None, 7])
def test_directions_are_those_of_the_written_out_problem(small, size):
    """The mean over blocks, the last of which is ragged, is the mean over rows."""
    make, dense = small
    vars = Vars(jnp.asarray(numbers(WORDS, 4)), jnp.asarray(numbers(WORDS, 4, seed=5)), jnp.asarray(numbers(WORDS, seed=4)))
    got, expected = (
        jax.jit(lambda vars, batch, p=p: implicit(p).terms(vars, batch, 0))(vars, batch)
        for p, batch in ((problem, Batch(*make(size))), (written_out, Batch(*dense)))
    )
    for mine, theirs in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(mine, theirs, atol=1e-14)
        assert np.abs(theirs).max() > 1e-3


def test_padding_weighs_nothing(matrix):
    labels, weights, _ = cut(matrix, np.arange(ROWS, dtype=np.int32), 7)
    assert labels.shape == weights.shape == (3, 7)
    np.testing.assert_allclose(weights.sum(), 3, rtol=1e-6)
    assert not weights[2, 5:].any()
    np.testing.assert_array_equal(labels.ravel()[:ROWS], np.arange(ROWS))


def test_soba_descends(small):
    levels = small[0](7)
    start = Vars(jnp.zeros((WORDS, 4)), None, jnp.zeros(WORDS))
    solver = solvers.soba(problem, Vars(*map(optax.sgd, (0.3, 0.3, 1.0))))

    def measure(vars, data):
        return {"loss": problem.outer(vars.inner, vars.outer, data.outer).mean()}

    carry, history = jax.jit(
        lambda data: run(solver, samplers.uniform(1), start, data, jax.random.key(0), steps=300, metrics=measure)
    )(levels)
    assert history["loss"][-1] < history["loss"][0] - 0.02
    assert np.abs(carry.state.vars.outer).max() > 0.01


# ---- the data

TEXTS = {
    "train": [
        ("a", "10", b"the caf\xe9 the bus"),
        ("a", "2", b"bus bus stop"),
        ("b", "1", b"x the end"),
        ("b", "3", b"end bus"),
    ],
    "test": [("a", "7", b"the caf\xe9 opens"), ("b", "9", b"end of the bus")],
}


def archive(path: Path, texts=TEXTS, recode=lambda raw: raw) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w:gz") as tar:
        for part, messages in texts.items():
            for group, number, raw in messages:
                info = tarfile.TarInfo(f"20news-bydate-{part}/{group}/{number}")
                info.size = len(recode(raw))
                tar.addfile(info, io.BytesIO(recode(raw)))


@pytest.fixture
def made(monkeypatch, tmp_path):
    """An archive of six messages in two groups, in a data folder of our own; returns its path."""
    path = tmp_path / "data" / newsgroups.ARCHIVE
    archive(path)
    monkeypatch.setenv("BILEVEL_JAX_DATA", str(tmp_path / "data"))
    monkeypatch.setenv("BILEVEL_JAX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(newsgroups, "MESSAGES", {"train": 4, "test": 2})
    monkeypatch.setattr(newsgroups, "GROUPS", 2)
    monkeypatch.setitem(files.FILES, newsgroups.ARCHIVE, files.FILES[newsgroups.ARCHIVE]._replace(sha256=None))
    return path


def test_words_are_counted(made):
    text = data.twenty_newsgroups()
    words = ["bus", "café", "end", "stop", "the"]
    assert text.train_x.shape == (2, len(words))
    counts = newsgroups.count(newsgroups.read(made), "latin1")
    expected = [[1, 1, 0, 0, 2], [2, 0, 0, 1, 0], [0, 0, 1, 0, 1], [1, 0, 1, 0, 0]]  # a/10 comes before a/2, as in a folder
    np.testing.assert_array_equal(counts.train_x.toarray(), expected)
    np.testing.assert_array_equal(counts.test_x.toarray(), [[0, 1, 0, 0, 1], [1, 0, 1, 0, 1]])
    np.testing.assert_array_equal(counts.train_y, [0, 0, 1, 1])
    np.testing.assert_allclose(text.test_x.toarray(), np.array([[0, 1, 0, 0, 1], [1, 0, 1, 0, 1]]) / [[2**0.5], [3**0.5]])
    assert sorted(text.train_y) == sorted(text.validation_y) == [0, 1]
    assert text.train_x.dtype == np.float32


def test_reduced_vocabulary_keeps_the_words_of_most_messages(made):
    text = data.twenty_newsgroups(2)
    np.testing.assert_allclose(text.test_x.toarray(), [[0, 0], [0.5**0.5, 0.5**0.5]], rtol=1e-6)  # bus and end
    with pytest.raises(ValueError, match="vocabulary: got 0"):
        data.twenty_newsgroups(0)


def test_the_second_start_reads_the_cache(made, monkeypatch):
    first = data.twenty_newsgroups()
    kept = files.cache_folder() / "20news-bydate.npz"
    with monkeypatch.context() as patch:
        patch.setattr(newsgroups, "read", None)
        second = data.twenty_newsgroups()
    for a, b in zip(first, second, strict=True):
        a, b = (part.toarray() if scipy.sparse.issparse(part) else part for part in (a, b))
        np.testing.assert_array_equal(a, b)
    kept.write_bytes(kept.read_bytes()[:-100])
    assert (data.twenty_newsgroups().train_x != first.train_x).nnz == 0
    with np.load(kept) as file:
        assert int(file["words"]) == 5


def test_encoding_of_the_rebuilt_archive(made, monkeypatch):
    rebuilt = "newsgroups20/20news-bydate.rebuilt.tar.gz"
    made.unlink()
    archive(made.parent / Path(rebuilt).name, recode=lambda raw: raw.decode("latin1").encode())
    source = files.FILES[newsgroups.ARCHIVE]._replace(copies=((rebuilt, None),))
    monkeypatch.setitem(files.FILES, newsgroups.ARCHIVE, source)
    np.testing.assert_array_equal(newsgroups._counts().test_x.toarray(), [[0, 1, 0, 0, 1], [1, 0, 1, 0, 1]])


def test_other_archives_are_refused(made, monkeypatch):
    archive(made, {**TEXTS, "test": TEXTS["test"][:1]})
    with pytest.raises(data.DataFileError, match="got 1 test messages in 1 groups, expected 2 in 2"):
        data.twenty_newsgroups()
    made.write_bytes(made.read_bytes()[:60])
    with pytest.raises(data.DataFileError, match="delete it"):
        data.twenty_newsgroups()
    made.unlink()
    monkeypatch.setattr(files.pooch, "retrieve", lambda *_, **__: (_ for _ in ()).throw(OSError("offline")))
    with pytest.raises(data.DataFileError, match=r"(?s)file not found.*5975967 failed: offline.*Set BILEVEL_JAX_DATA"):
        data.twenty_newsgroups()


@pytest.mark.more
def test_the_real_messages(monkeypatch, tmp_path):
    folder = Path(REAL or tmp_path).expanduser()
    names = (newsgroups.ARCHIVE, files.FILES[newsgroups.ARCHIVE].copies[0][0])
    if not any((folder / name).is_file() for name in names):
        pytest.skip("20 Newsgroups is not in BILEVEL_JAX_DATA")
    text = data.twenty_newsgroups()
    assert text.train_x.shape[0] == text.validation_x.shape[0] == 5657
    assert text.test_x.shape[0] == 7532
    assert text.train_x.shape[1] in (130_107, 130_103)
    assert text.train_x.nnz + text.validation_x.nnz == 1_787_565
    for part in (text.train_x, text.test_x):
        np.testing.assert_allclose(part.multiply(part).sum(1), 1, rtol=1e-5)
    assert np.abs(np.bincount(text.train_y) - np.bincount(text.validation_y)).max() <= 1
    assert np.bincount(text.test_y)[0] == 319  # alt.atheism


# ---- the experiment


@pytest.fixture
def as_users_run():
    with jax.enable_x64(False), jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


@pytest.fixture
def text(monkeypatch, matrix):
    """20 rows of 30 words, in which the class is a word."""
    y = (np.arange(20) % 4).astype(np.int32)
    x = scipy.sparse.csr_matrix(np.abs(numbers(20, WORDS)) * 0.1 + 3 * np.eye(4, WORDS)[y], dtype=np.float32)
    made = newsgroups.Newsgroups("newsgroups", x, y, x, y, x, y, 4, "made rows")
    monkeypatch.setattr(learned_regularisation.data, "twenty_newsgroups", lambda vocabulary: made)
    return made


@pytest.mark.more
def test_experiment(text, tmp_path, as_users_run, capsys):
    config = Config(
        solvers=("fixed_x",), batch_sizes=(5, 8), seconds=0.01, evaluations=2, inner_rate=1.0, steps=2,
        out=tmp_path / "run",
    )  # fmt: skip
    learned_regularisation.main(config)
    table = pd.read_csv(tmp_path / "run" / "history.csv")
    assert sorted(table["solver"].unique()) == ["fixed_x 5", "fixed_x 8"]
    ends = table.groupby("solver").last()
    assert (ends["test_loss"] < np.log(4) - 0.05).all()
    assert (ends["x_largest"] == 0).all()
    for name, rows in {"fixed_x 5": 5, "fixed_x 8": 8}.items():  # two inner gradients an update
        assert ends["oracle_calls"][name] == pytest.approx(ends["step"][name] * 2 * rows / race.UNIT)
    assert (tmp_path / "run" / "figure.png").read_bytes()[:4] == b"\x89PNG"
    with pytest.raises(SystemExit, match="holds a run already"):
        learned_regularisation.main(config)


@thinned("name", ["stocbio", "aid_fp", "aid_cg", "itd_bio", "amigo", "soba"], "aid_cg", "soba")
def test_every_solver_builds(text, name, as_users_run):
    levels = blocks(text, 5)
    start = Vars(jnp.zeros((WORDS, 4)), None, jnp.zeros(WORDS))
    solver = learned_regularisation.build(name, Config())
    shapes = jax.eval_shape(lambda d: run(solver, samplers.uniform(1), start, d, jax.random.key(0), steps=2)[0], levels)
    assert shapes.state.vars.outer.shape == (WORDS,)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seconds": 0.0}, "--seconds: got 0.0, expected a positive number"),
        ({"vocabulary": -1}, "--vocabulary: got -1"),
        ({"solvers": ()}, "--solvers: got none"),
        ({"batch_sizes": (100, 0)}, "--batch-sizes: got"),
    ],
)
def test_bad_options(changes, message):
    with pytest.raises(SystemExit, match=message):
        Config(**changes)


def test_a_race_ends():
    with pytest.raises(ValueError, match="seconds, updates: got inf and inf"):
        race.race({}, Vars(), lambda vars: {}, evaluations=1)
