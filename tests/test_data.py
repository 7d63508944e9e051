"""The data loaders: without any file, with small made files, and with the real ones that BILEVEL_JAX_DATA holds."""

import bz2
import gzip
import hashlib
import os
from pathlib import Path

import numpy as np
import pytest
from sklearn.datasets import load_breast_cancer, load_digits
from sklearn.model_selection import train_test_split

from experiments.data import (
    DataFileError,
    breast_cancer,
    cleaning,
    covtype,
    digits,
    fashion_mnist,
    files,
    hyperclean,
    ijcnn,
    ijcnn1,
    images,
    mnist,
    shifted,
    tables,
)
from experiments.data.files import FILES, Source, locate
from experiments.data.records import Images

REAL = os.environ.get("BILEVEL_JAX_DATA")
TOY, GOOD, URL = "toy/toy.bin", b"good bytes", "https://example.org/toy.bin"


def sha(raw: bytes) -> str:
    return hashlib.sha256(raw).hexdigest()


def put(path: Path, raw: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(raw)
    return path


def arrays(load) -> tuple[np.ndarray, np.ndarray]:
    x, y = load(return_X_y=True)
    return x, y


def cut(*parts: np.ndarray, **options) -> list[np.ndarray]:
    return [np.asarray(part) for part in train_test_split(*parts, **options)]


def close(got: np.ndarray, train: np.ndarray, part: np.ndarray) -> None:
    """`got` is `part` standardised on `train`, constant columns only centred."""
    assert got.dtype == np.float32
    spread = train.std(axis=0)
    np.testing.assert_allclose(got, (part - train.mean(axis=0)) / np.where(spread > 0, spread, 1), rtol=1e-5, atol=1e-5)


@pytest.fixture(autouse=True)
def sandbox(monkeypatch, tmp_path):
    """Own data and cache folders, no network, one made file in the table; returns (data, cache)."""
    monkeypatch.setenv("BILEVEL_JAX_DATA", str(tmp_path / "data"))
    monkeypatch.setenv("BILEVEL_JAX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(files.pooch, "retrieve", Fetch(OSError("offline")))
    monkeypatch.setitem(FILES, TOY, Source(sha(GOOD), (URL,), "none"))
    return tmp_path / "data", tmp_path / "cache"


class Fetch:
    """Stands for pooch.retrieve: writes `answer`, or raises it; it does not check the hash."""

    def __init__(self, answer):
        self.answer, self.calls = answer, []

    def __call__(self, url, known_hash, fname, path):
        self.calls.append((url, known_hash))
        if isinstance(self.answer, Exception):
            raise self.answer
        return str(put(Path(path) / fname, self.answer))


@pytest.fixture
def real(monkeypatch):
    """Skip, by name, where a file is absent from the user's data folder; else point the loaders there."""

    def need(*names: str) -> None:
        for name in names:
            paths = [name, *(path for path, _ in FILES[name].copies)]
            if not REAL or not any((Path(REAL).expanduser() / path).is_file() for path in paths):
                pytest.skip(f"{name} is not in BILEVEL_JAX_DATA")
        monkeypatch.setenv("BILEVEL_JAX_DATA", str(REAL))

    return need


# ---- files


def test_lookup_order(sandbox, monkeypatch):
    data, cache = sandbox
    fetch = Fetch(GOOD)
    monkeypatch.setattr(files.pooch, "retrieve", fetch)
    assert locate(TOY).resolve() == (cache / TOY).resolve()
    assert (cache / TOY).read_bytes() == GOOD
    assert fetch.calls == [(URL, sha(GOOD))]
    assert locate(TOY) == cache / TOY  # now from the cache
    put(data / TOY, GOOD)
    assert locate(TOY) == data / TOY
    monkeypatch.delenv("BILEVEL_JAX_DATA")
    assert locate(TOY) == cache / TOY
    assert len(fetch.calls) == 1


def test_missing_file_names_every_place(sandbox, monkeypatch):
    data, cache = sandbox
    with pytest.raises(DataFileError) as error:
        locate(TOY)
    for part in (TOY, str(data / TOY), str(cache / TOY), URL, "offline", "Set BILEVEL_JAX_DATA", "by hand"):
        assert part in str(error.value)
    monkeypatch.delenv("BILEVEL_JAX_DATA")
    with pytest.raises(DataFileError, match="BILEVEL_JAX_DATA: not set"):
        locate(TOY)


def test_unknown_name():
    with pytest.raises(ValueError, match="name: got 'toys', expected one of"):
        locate("toys")


def test_damaged_data_file_is_an_error(sandbox, monkeypatch):
    data, cache = sandbox
    fetch = Fetch(GOOD)
    monkeypatch.setattr(files.pooch, "retrieve", fetch)
    put(cache / TOY, GOOD)
    bad = put(data / TOY, b"bad bytes")
    with pytest.raises(DataFileError, match=f"{TOY}: got sha256 {sha(b'bad bytes')}, expected {sha(GOOD)}") as error:
        locate(TOY)
    assert str(bad) in str(error.value)
    assert "delete it" in str(error.value)
    assert bad.read_bytes() == b"bad bytes"
    assert fetch.calls == []


def test_damaged_cache_is_fetched_anew(sandbox, monkeypatch):
    _, cache = sandbox
    bad = put(cache / TOY, b"bad bytes")
    with pytest.raises(DataFileError, match="delete the damaged"):
        locate(TOY)
    monkeypatch.setattr(files.pooch, "retrieve", Fetch(GOOD))
    assert locate(TOY).read_bytes() == GOOD == bad.read_bytes()


def test_bad_download_is_refused(monkeypatch):
    monkeypatch.setattr(files.pooch, "retrieve", Fetch(b"<html>not found</html>"))
    with pytest.raises(DataFileError, match="has another sha256"):
        locate(TOY)
    monkeypatch.setattr(files.pooch, "retrieve", Fetch(ValueError("hash does not match")))
    with pytest.raises(DataFileError, match="hash does not match"):
        locate(TOY)


def test_checksum_is_remembered_until_the_file_changes(sandbox, monkeypatch):
    data, _ = sandbox
    read, seen = files.pooch.file_hash, []
    monkeypatch.setattr(files.pooch, "file_hash", lambda path, alg: seen.append(path) or read(path, alg=alg))
    file = put(data / TOY, GOOD)
    assert locate(TOY) == locate(TOY) == file
    assert seen == [str(file)]
    put(file, b"shorter")
    with pytest.raises(DataFileError, match="damaged"):
        locate(TOY)


def test_other_byte_stream_in_the_data_folder(sandbox, monkeypatch):
    data, _ = sandbox
    monkeypatch.setitem(FILES, TOY, Source(None, (URL,), "none", (("toy/copy.bin", sha(b"copy")),)))
    copy = put(data / "toy/copy.bin", b"copy")
    assert locate(TOY) == copy
    put(copy, b"spoilt")
    with pytest.raises(DataFileError, match=r"toy/copy\.bin"):
        locate(TOY)
    put(data / TOY, b"any bytes")
    assert locate(TOY) == data / TOY  # no checksum: the loader looks at the content


def test_table_of_files():
    for name, source in FILES.items():
        if name != TOY:
            assert source.licence
            assert source.urls or "full=True" in source.advice
            assert all(url.endswith(Path(name).name) or "figshare.com/files/" in url for url in source.urls)
            hashes = [source.sha256, *(sha256 for _, sha256 in source.copies)]
            assert all(len(h) == 64 for h in hashes if h)
            assert any(hashes)


def test_nan_names_the_file():
    files.finite("a.npz", np.zeros(3), np.arange(3))
    with pytest.raises(DataFileError, match=r"a\.npz: got 2 NaN or infinite values"):
        files.finite("a.npz", np.zeros(3), np.array([1, np.nan, -np.inf]))


# ---- bundled tables


def test_breast_cancer():
    data = breast_cancer()
    assert data.train_x.shape == (300, 30)
    assert data.test_x.shape == (269, 30)
    assert data.train_x.dtype == data.train_y.dtype == np.float32
    labels = np.concatenate([data.train_y, data.test_y])
    assert (labels == 1).sum() == 357
    assert (labels == -1).sum() == 212
    np.testing.assert_allclose(data.train_x.mean(0), 0, atol=1e-5)
    np.testing.assert_allclose(data.train_x.std(0), 1, atol=1e-5)
    assert np.abs(data.test_x.mean(0)).max() > 1e-3  # fitted on the train rows alone
    x, y = arrays(load_breast_cancer)
    rows = np.concatenate([data.train_x, data.test_x])
    for sign, old in ((1, 1), (-1, 0)):  # every row once, with its own label: equal up to one affine map
        pairs = np.sort(rows[labels == sign][:, 0]), np.sort(x[y == old][:, 0])
        assert np.corrcoef(*pairs)[0, 1] > 1 - 1e-6
    assert np.array_equal(breast_cancer(0).train_x, data.train_x)
    assert not np.array_equal(breast_cancer(1).train_y, data.train_y)


def test_digits():
    data = digits()
    assert data.train_x.shape == (1437, 64)
    assert data.test_x.shape == (360, 64)
    assert data.classes == 10
    assert data.train_x.dtype == np.float32
    assert data.train_y.dtype == np.int32
    x, y = arrays(load_digits)
    rows = np.column_stack([np.concatenate([data.train_x, data.test_x]) * 16, np.append(data.train_y, data.test_y)])
    assert np.array_equal(np.unique(rows, axis=0), np.unique(np.column_stack([x, y]), axis=0))
    assert np.array_equal(digits(0).test_y, data.test_y)
    assert not np.array_equal(digits(1).test_y, data.test_y)


# ---- idx


def idx(array: np.ndarray, kind: int = 8) -> bytes:
    return bytes([0, 0, kind, array.ndim]) + np.array(array.shape, ">i4").tobytes() + array.astype(np.uint8).tobytes()


def test_idx(tmp_path):
    want = np.arange(24).reshape(2, 3, 4)
    got = images.read_idx(put(tmp_path / "a.gz", gzip.compress(idx(want))), 3)
    assert got.dtype == np.uint8
    assert np.array_equal(got, want)


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (gzip.compress(idx(np.arange(6)))[:-9], "damaged gzip"),
        (b"<html></html>", "damaged gzip"),
        (gzip.compress(idx(np.arange(6), kind=9)), "header 00000901"),
        (gzip.compress(idx(np.zeros((2, 3)))), "header 00000802"),
        (gzip.compress(b"\0\0\x08\x01\0\0"), "header 00000801"),
        (gzip.compress(b""), "header"),
        (gzip.compress(idx(np.arange(6))[:-1]), "got 5 values"),
        (gzip.compress(idx(np.arange(6)) + b"x"), "got 7 values"),
        (gzip.compress(bytes([0, 0, 8, 1, 255, 255, 255, 255])), "got 0 values"),
    ],
    ids=lambda part: part if isinstance(part, str) else "raw",  # gzip writes the time: names must not depend on it
)
def test_damaged_idx(tmp_path, raw, message):
    with pytest.raises(DataFileError, match=message) as error:
        images.read_idx(put(tmp_path / "a.gz", raw), 1)
    assert "a.gz" in str(error.value)


def small_mnist(data, monkeypatch, train=6, labels=6, last=9):
    made = {
        "train-images-idx3": np.full((train, 28, 28), 7),
        "train-labels-idx1": np.arange(labels),
        "t10k-images-idx3": np.zeros((2, 28, 28)),
        "t10k-labels-idx1": np.array([3, last]),
    }
    for file, array in made.items():
        name, raw = f"mnist/{file}-ubyte.gz", gzip.compress(idx(array))
        put(data / name, raw)
        monkeypatch.setitem(FILES, name, FILES[name]._replace(sha256=sha(raw)))


def test_mnist_from_small_files(sandbox, monkeypatch):
    small_mnist(sandbox[0], monkeypatch)
    data = mnist()
    assert data.train_x.shape == (6, 28, 28)
    assert (data.train_x == 7).all()
    assert data.train_x.dtype == np.uint8
    assert data.train_y.tolist() == [0, 1, 2, 3, 4, 5]
    assert data.test_y.tolist() == [3, 9]
    small_mnist(sandbox[0], monkeypatch, labels=5)
    with pytest.raises(DataFileError, match=r"train-images.*got shape \(6, 28, 28\), expected \(5, 28, 28\)"):
        mnist()
    small_mnist(sandbox[0], monkeypatch, last=10)
    with pytest.raises(DataFileError, match=r"t10k-labels.*got a label 10"):
        mnist()


# ---- ijcnn1, content checksum

ROWS = ["-1 6:1 11:-0.73 22:-0.00081", "1 7:1 11:0.5", "-1 8:1 13:0.25 22:0.1"]
X = np.zeros((3, 22), np.float32)
X[[0, 1, 2], [5, 6, 7]] = 1
X[[0, 0, 1, 2, 2], [10, 21, 10, 12, 21]] = -0.73, -0.00081, 0.5, 0.25, 0.1
Y = np.array([-1, 1, -1], np.float32)


@pytest.fixture
def part(monkeypatch):
    """A made file of three rows in place of the train part."""
    made = ijcnn.Part(ijcnn.TRAIN.file, 3, ijcnn.content(X, Y), ijcnn.content(X, Y, ordered=False))
    monkeypatch.setattr(ijcnn, "TRAIN", made)
    return made


def write(data, rows):
    return put(data / ijcnn.TRAIN.file, bz2.compress("\n".join(rows).encode() + b"\n"))


def test_content_is_that_of_the_values(sandbox, part):
    raw = X.astype("<f4").tobytes() + bytes([255, 1, 255])
    assert part.ordered == sha(raw)
    other = ["-1.0 6:1.000 11:-0.730000 13:-0.0 22:-8.1e-4", "+1 7:1 11:.5 12:0", "-1 8:1 13:0.25 22:0.10"]
    for rows in (ROWS, other):  # the same rows in two byte streams
        x, y = ijcnn._parse(write(sandbox[0], rows))
        np.testing.assert_array_equal(x, X)
        np.testing.assert_array_equal(y, Y)
        assert x.dtype == y.dtype == np.float32
        assert not np.signbit(x[x == 0]).any()
        ijcnn._check(part, Path("file"), x, y)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (ROWS[::-1], "expected rows in another order"),
        ([*ROWS[:2], "1" + ROWS[2][2:]], "got other rows"),
        ([ROWS[0], ROWS[1].replace("0.5", "0.500001"), ROWS[2]], "got other rows"),
        (ROWS[:2], r"got \(2, 22\), expected \(3, 22\)"),
        (["2 1:1", *ROWS[1:]], "got labels"),
        (["1 1:nan", *ROWS[1:]], "NaN or infinite"),
        (["1 23:1", *ROWS[1:]], "expected bzip2'd svmlight rows"),
        (["<html>"], "expected bzip2'd svmlight rows"),
    ],
)
def test_other_content_is_an_error(sandbox, part, rows, message):
    path = write(sandbox[0], rows)
    with pytest.raises(DataFileError, match=message) as error:
        ijcnn._load(part)
    assert str(path) in str(error.value)
    assert not list(sandbox[1].glob("*.npz"))


def test_damaged_bz2(sandbox, part):
    path = write(sandbox[0], ROWS)
    for raw in (path.read_bytes()[:-8], b"<html></html>"):
        put(path, raw)
        with pytest.raises(DataFileError, match="delete the damaged file"):
            ijcnn._load(part)


def test_parsed_rows_are_kept(sandbox, part, monkeypatch):
    write(sandbox[0], ROWS)
    first = ijcnn._load(part)
    (kept,) = sandbox[1].glob("**/*")
    assert kept.name == f"ijcnn1-{part.ordered[:16]}.npz"
    whole, parse = kept.read_bytes(), ijcnn._parse
    monkeypatch.setattr(ijcnn, "_parse", lambda path: pytest.fail("parsed again"))
    for got, want in zip(ijcnn._load(part), first, strict=True):
        np.testing.assert_array_equal(got, want)
    monkeypatch.setattr(ijcnn, "_parse", parse)
    np.savez(sandbox[1] / "other.npz", x=X + 1, y=Y)
    for spoilt in (whole[:-30], b"", (sandbox[1] / "other.npz").read_bytes()):
        kept.write_bytes(spoilt)
        np.testing.assert_array_equal(ijcnn._load(part)[0], X)
        assert kept.read_bytes() == whole


def test_cache_that_cannot_be_written(sandbox, part, monkeypatch):
    write(sandbox[0], ROWS)
    put(sandbox[1], b"a file where the folder should be")
    with pytest.warns(UserWarning, match="not written"):
        np.testing.assert_array_equal(ijcnn._load(part)[0], X)


# ---- covtype


def test_covtype_sample_has_no_home():
    with pytest.raises(DataFileError, match=r"covtype_92k.npz: file not found(.|\n)*covtype\(full=True\)"):
        covtype(full=False)


def test_covtype_split_and_scaling(monkeypatch, sandbox):
    rng = np.random.default_rng(0)
    x, y = rng.normal(3, 2, (1000, 54)), np.resize(np.arange(1, 8), 1000)
    asked = []
    monkeypatch.setattr(tables.datasets, "fetch_covtype", lambda **options: asked.append(options) or (x, y))
    data = covtype(full=True)
    assert asked == [{"data_home": str(sandbox[1] / "sklearn"), "return_X_y": True}]
    assert [len(part) for part in (data.train_y, data.validation_y, data.test_y)] == [640, 160, 200]
    assert (data.classes, data.note) == (7, "Covertype")
    # the paper's benchmark code, written out
    stream = np.random.RandomState(2442)
    a, c, ya, yc = cut(x, y - 1, test_size=0.2, random_state=stream)
    a, b, ya, yb = cut(a, ya, test_size=0.2, random_state=stream)
    for got, want in ((data.train_x, a), (data.validation_x, b), (data.test_x, c)):
        close(got, a, want)
    for got, want in ((data.train_y, ya), (data.validation_y, yb), (data.test_y, yc)):
        assert np.array_equal(got, want)
    x[3, 4] = np.nan
    with pytest.raises(DataFileError, match="covtype: got 1 NaN"):
        covtype(full=True)


def test_covtype_full_offline(monkeypatch):
    def fail(**options):
        raise OSError("no route")

    monkeypatch.setattr(tables.datasets, "fetch_covtype", fail)
    with pytest.raises(DataFileError, match=r"covtype: .*no route.*full=False"):
        covtype(full=True)


# ---- cleaning


def test_cleaning_digits():
    data = cleaning("digits", corruption=0.5)
    assert [part.shape for part in (data.train_x, data.validation_x, data.test_x)] == [(1000, 64), (400, 64), (397, 64)]
    assert data.train_x.dtype == np.float32
    assert data.train_y.dtype == np.int32
    assert data.classes == 10
    assert np.array_equal(data.corrupted, data.train_y != data.train_true_y)
    assert "0.5" in data.note
    assert "1000/400/397" in data.note
    counts = np.bincount(np.concatenate([data.train_true_y, data.validation_y, data.test_y]))
    assert np.array_equal(counts, np.bincount(arrays(load_digits)[1]))
    varies = data.train_x.any(axis=0)
    np.testing.assert_allclose(data.train_x.mean(0), 0, atol=1e-5)
    np.testing.assert_allclose(data.train_x[:, varies].std(0), 1, atol=1e-5)
    assert not data.validation_x[:, ~varies].any()
    assert not data.test_x[:, ~varies].any()
    assert not varies.all()
    again, other = cleaning("digits", corruption=0.5), cleaning("digits", corruption=0.5, seed=33)
    assert np.array_equal(again.train_y, data.train_y)
    assert np.array_equal(again.train_x, data.train_x)
    assert not np.array_equal(other.train_y, data.train_y)
    assert not np.array_equal(other.train_x, data.train_x)


def test_cleaning_agrees_with_the_paper():
    data = cleaning("digits", corruption=0.7)
    x, y = arrays(load_digits)
    rng = np.random.RandomState(32)
    a, b, ya, yb = cut(x, y, test_size=400, train_size=1000, random_state=rng)
    noisy = ya.copy()
    corrupted = rng.rand(1000) < 0.7
    noisy[corrupted] = rng.randint(0, 10, int(corrupted.sum()))
    assert np.array_equal(data.train_true_y, ya)
    assert np.array_equal(data.validation_y, yb)
    assert np.array_equal(data.train_y, noisy)
    close(data.train_x, a, a)
    keep = a.std(0) > 0  # the loader sets the other pixels to 0
    close(data.validation_x[:, keep], a[:, keep], b[:, keep])


def fake_images() -> Images:
    x = np.random.default_rng(1).integers(0, 256, (30_000, 2, 2)).astype(np.uint8)
    x[:, 0, 0] = 5
    test_x = np.repeat(np.arange(100, dtype=np.uint8), 4).reshape(100, 2, 2)
    y = np.arange(30_000, dtype=np.int32) % 10
    return Images("mnist", x, y, test_x, np.arange(100, dtype=np.int32), 10, "MNIST")


@pytest.fixture
def made_images(monkeypatch):
    """Random images in place of MNIST: the first pixel constant in training, test labels 0..99 as row numbers."""
    monkeypatch.setitem(hyperclean.LOADERS, "mnist", fake_images)


@pytest.mark.parametrize("corruption", [0.0, 0.3, 0.9, 1.0])
def test_corruption_statistics(made_images, corruption):
    data = cleaning("mnist", corruption=corruption)
    assert data.train_x.shape == (20_000, 4)
    assert len(data.validation_y) == 5_000
    assert len(data.test_y) == 100
    rate = 0.9 * corruption  # one in ten draws is the true class
    assert abs(data.corrupted.mean() - rate) <= 4 * np.sqrt(rate * (1 - rate) / 20_000)
    assert np.array_equal(np.unique(data.validation_y), np.arange(10))
    if corruption:
        shares = np.bincount(data.train_y[data.corrupted], minlength=10) / data.corrupted.sum()
        np.testing.assert_allclose(shares, 0.1, atol=0.02)  # 4 deviations at the smallest rate


def test_cleaning_test_rows(made_images):
    data = cleaning("mnist", corruption=0, train=50, validation=20, test=30)
    assert len(set(data.test_y)) == 30
    assert data.test_y.tolist() != list(range(30))
    order = np.argsort(data.test_y)
    assert (np.diff(data.test_x[order, 1]) > 0).all()  # each label still with its own image
    assert not data.test_x[:, 0].any()
    assert not data.train_x[:, 0].any()
    assert np.array_equal(data.test_y, cleaning("mnist", corruption=1, train=50, validation=20, test=30).test_y)
    few = cleaning("digits", corruption=0, train=100, validation=50, test=7)
    rest = cleaning("digits", corruption=0, train=100, validation=50)
    assert few.test_x.shape == (7, 64)
    assert len(rest.test_y) == 1797 - 150
    assert all((row == rest.test_x).all(axis=1).any() for row in few.test_x)


def test_shifted_rows(made_images):
    first = shifted("mnist", corruption=0.5, train=60, validation=40)
    assert np.array_equal(first.train_true_y, np.arange(60) % 10)
    assert np.array_equal(first.validation_y, np.arange(60, 100) % 10)
    one, two = (shifted("mnist", corruption=0.5, train=600, validation=400, seed=k, shuffle=True) for k in (1, 2))
    assert one.corrupted.sum() == 300  # of exactly half, as no label is shifted by 0
    assert np.array_equal(one.corrupted, one.train_y != one.train_true_y)
    assert not np.array_equal(one.train_x, two.train_x)
    assert not np.array_equal(one.corrupted, two.corrupted)
    assert np.array_equal(one.test_y, two.test_y)
    np.testing.assert_allclose(one.train_x[:, :4].mean(), 0, atol=1e-5)
    parts = shifted("digits", corruption=0.5, train=500, validation=500, seed=1, shuffle=True)
    labels = np.concatenate([parts.train_true_y, parts.validation_y, parts.test_y])
    assert np.array_equal(np.bincount(labels), np.bincount(arrays(load_digits)[1]))  # every row in one part
    with pytest.raises(ValueError, match="validation: got 1297, expected at most 1296"):
        shifted("digits", corruption=0.5, train=500, validation=1297)


@pytest.mark.parametrize(
    ("dataset", "options", "message"),
    [
        ("cifar", {"corruption": 0.5}, r"dataset: got 'cifar', expected one of \['digits', 'fashion_mnist', 'mnist'\]"),
        ("digits", {"corruption": -0.1}, "corruption: got -0.1, expected a number from 0 to 1"),
        ("digits", {"corruption": 1.1}, "corruption: got 1.1"),
        ("digits", {"corruption": float("nan")}, "corruption: got nan"),
        ("digits", {"corruption": 0.5, "train": 0}, "train: got 0, expected a positive integer"),
        ("digits", {"corruption": 0.5, "train": 10.5}, "train: got 10.5, expected a positive integer"),
        ("digits", {"corruption": 0.5, "validation": -1}, "validation: got -1"),
        ("digits", {"corruption": 0.5, "test": 0}, "test: got 0"),
        ("digits", {"corruption": 0.5, "train": 1797}, "train: got 1797, expected at most 1796"),
        ("digits", {"corruption": 0.5, "validation": 797}, "validation: got 797, expected at most 796"),
        ("digits", {"corruption": 0.5, "test": 398}, "test: got 398, expected at most 397"),
        ("mnist", {"corruption": 0.5, "train": 30_001}, "train: got 30001, expected at most 30000"),
        ("mnist", {"corruption": 0.5, "validation": 10_001}, "validation: got 10001, expected at most 10000"),
        ("mnist", {"corruption": 0.5, "test": 101}, "test: got 101, expected at most 100"),
    ],
)
def test_cleaning_bad_input(made_images, dataset, options, message):
    with pytest.raises(ValueError, match=message):
        cleaning(dataset, **options)


# ---- real files


@pytest.mark.more
def test_real_ijcnn1(real):
    real(ijcnn.TRAIN.file, ijcnn.TEST.file)
    data = ijcnn1()
    assert data.train_x.shape == (49_990, 22)
    assert data.test_x.shape == (91_701, 22)
    assert (data.train_y == 1).sum() == 4_853
    assert (data.test_y == 1).sum() == 8_712
    assert np.array_equal(np.unique(data.train_y), [-1, 1])
    assert data.train_x.dtype == np.float32
    first = np.zeros(22)
    first[[5, 10, 11]] = 1, -0.731854, 0.173431
    np.testing.assert_allclose(data.train_x[0, :12], first[:12], rtol=1e-6)
    assert np.array_equal(ijcnn1().test_x, data.test_x)  # from the kept arrays


PARTS = [f"{part}-{kind}-ubyte.gz" for part in ("train", "t10k") for kind in ("images-idx3", "labels-idx1")]


@pytest.mark.more
def test_real_mnist(real):
    real(*(f"mnist/{part}" for part in PARTS))
    data = mnist()
    assert data.train_x.shape == (60_000, 28, 28)
    assert data.test_x.shape == (10_000, 28, 28)
    assert data.train_x.dtype == np.uint8
    assert data.train_y[:5].tolist() == [5, 0, 4, 1, 9]
    assert np.bincount(data.train_y).tolist() == [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]
    assert abs(data.train_x.mean() / 255 - 0.1307) < 1e-4  # the mean that everyone quotes
    noisy = cleaning("mnist", corruption=0.5, test=1000)
    assert noisy.train_x.shape == (20_000, 784)
    assert abs(noisy.corrupted.mean() - 0.45) < 0.015
    assert np.isfinite(noisy.test_x).all()
    assert noisy.test_x.shape == (1000, 784)


def test_real_fashion_mnist(real):
    real(*(f"fashion_mnist/{part}" for part in PARTS))
    data = fashion_mnist()
    assert data.train_x.shape == (60_000, 28, 28)
    assert data.test_x.shape == (10_000, 28, 28)
    assert np.bincount(data.train_y).tolist() == [6000] * 10
    assert np.bincount(data.test_y).tolist() == [1000] * 10
    assert abs(data.train_x.mean() / 255 - 0.2860) < 1e-4


def test_real_covtype_sample(real):
    real("covtype/covtype_92k.npz")
    data = covtype(full=False)
    assert [x.shape for x in (data.train_x, data.validation_x, data.test_x)] == [
        (59_495, 54), (14_874, 54), (18_593, 54)
    ]  # fmt: skip
    counts = np.bincount(np.concatenate([data.train_y, data.validation_y, data.test_y]))
    assert counts.tolist() == [33894, 45328, 5721, 439, 1519, 2779, 3282]
    assert data.note == "16 % sample of Covertype"
    assert data.train_x.dtype == np.float32
    np.testing.assert_allclose(data.train_x.mean(0, dtype=np.float64), 0, atol=1e-4)
