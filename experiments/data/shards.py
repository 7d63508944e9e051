"""Data shared out to workers: contiguous shards, of which one half trains and the other one validates."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from experiments.data.ijcnn import ijcnn1
from experiments.data.images import fashion_mnist, mnist
from experiments.data.records import Images
from experiments.data.tables import covtype, digits

#: Rows of IJCNN1, train and test rows together, that are shared out; the others are the test rows.
IJCNN1_SHARED = 120_000


class Shards(NamedTuple):
    """The rows of N workers, and test rows; `note` is a string that every figure made from the data must print."""

    name: str
    train_x: np.ndarray  # [N, r, p] float32
    train_y: np.ndarray  # [N, r] int32
    corrupted: np.ndarray  # [N, r] bool: train_y was changed
    validation_x: np.ndarray  # [N, r, p] float32
    validation_y: np.ndarray  # [N, r] int32
    test_x: np.ndarray  # [m, p] float32
    test_y: np.ndarray  # [m] int32
    classes: int
    note: str


class Pool(NamedTuple):
    """All the rows there are to share out, in order, and test rows."""

    x: np.ndarray
    y: np.ndarray
    test_x: np.ndarray
    test_y: np.ndarray
    classes: int
    note: str


def shards(dataset: str, workers: int, rows: int | None = None, *, corruption: float = 0.0, seed: int = 0) -> Shards:
    """Contiguous shards of ``2 rows`` (by default as many as there are): the first half of each trains, the second validates.

    Datasets: "digits", "mnist", "fashion_mnist", "ijcnn1", "covtype" (sources: see those).  Of each worker's train labels
    exactly ``floor(corruption rows)`` are shifted by 1 to 9 modulo 10, drawn by ``(seed, worker)``.  Pixels are in [0, 1], then
    normalised by MNIST's mean and deviation (digits: by those of the train rows).  IJCNN1 is LIBSVM's train rows followed by
    its test rows: the first 120,000 are shared out, the others are test rows.  Covertype is the 16 % sample, its train and
    validation rows.

    Raises:
        ValueError: for unknown names, and more rows than there are.
    """
    if dataset not in POOLS:
        raise ValueError(f"dataset: got {dataset!r}, expected one of {sorted(POOLS)}")
    if not 0 <= corruption <= 1:
        raise ValueError(f"corruption: got {corruption!r}, expected a number from 0 to 1")
    pool = POOLS[dataset]()
    most = len(pool.y) // (2 * workers)
    rows = most if rows is None else rows
    if not 1 <= rows <= most:
        raise ValueError(f"rows: got {rows} a half shard, expected 1 to {most} with {workers} workers and {len(pool.y)} rows")
    x = pool.x[: 2 * rows * workers].reshape(workers, 2, rows, -1)
    y = pool.y[: 2 * rows * workers].reshape(workers, 2, rows)
    noisy, corrupted = y[:, 0].copy(), np.zeros((workers, rows), bool)
    for i in range(workers):
        rng = np.random.default_rng([seed, i])
        hit = rng.permutation(rows)[: int(corruption * rows)]
        corrupted[i, hit] = True
        noisy[i, hit] = (noisy[i, hit] + rng.integers(1, 10, len(hit))) % 10
    wrong = f", {corruption:g} of each worker's train labels shifted" if corruption else ""
    note = f"{pool.note}, {workers} shards of {rows} + {rows} rows{wrong}; {len(pool.test_y)} test rows"
    return Shards(dataset, x[:, 0], noisy, corrupted, x[:, 1], y[:, 1], pool.test_x, pool.test_y, pool.classes, note)


def _images(load: Callable[[], Images]) -> Pool:
    def features(pixels: np.ndarray) -> np.ndarray:
        return ((pixels.reshape(len(pixels), -1) / np.float32(255) - 0.1307) / 0.3081).astype(np.float32)

    images = load()
    return Pool(features(images.train_x), images.train_y, features(images.test_x), images.test_y, 10, images.note)


def _digits() -> Pool:
    table = digits()
    mean, deviation = table.train_x.mean(), table.train_x.std()
    x, test_x = ((part - mean) / deviation for part in (table.train_x, table.test_x))
    return Pool(x, table.train_y, test_x, table.test_y, 10, table.note)


def _ijcnn1() -> Pool:
    table = ijcnn1()
    x = np.concatenate([table.train_x, table.test_x])
    y = (np.concatenate([table.train_y, table.test_y]) > 0).astype(np.int32)
    return Pool(x[:IJCNN1_SHARED], y[:IJCNN1_SHARED], x[IJCNN1_SHARED:], y[IJCNN1_SHARED:], 2, table.note)


def _covtype() -> Pool:
    table = covtype(full=False)
    x, y = np.concatenate([table.train_x, table.validation_x]), np.concatenate([table.train_y, table.validation_y])
    return Pool(x, y, table.test_x, table.test_y, table.classes, table.note)


POOLS = {
    "digits": _digits,
    "mnist": lambda: _images(mnist),
    "fashion_mnist": lambda: _images(fashion_mnist),
    "ijcnn1": _ijcnn1,
    "covtype": _covtype,
}
