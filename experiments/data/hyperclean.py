"""Data hyper-cleaning: image classification with part of the training labels replaced."""

from collections.abc import Callable
from numbers import Integral

import numpy as np

from experiments.data.images import fashion_mnist, mnist
from experiments.data.records import Cleaning, Images
from experiments.data.tables import bundled, scaled, split


def _digits() -> Images:
    x, y = bundled("digits")
    return Images("digits", x, y, x[:0], y[:0], 10, "UCI digits 8x8")


LOADERS: dict[str, Callable[[], Images]] = {"digits": _digits, "mnist": mnist, "fashion_mnist": fashion_mnist}
DEFAULTS = {"digits": (1000, 400), "mnist": (20_000, 5_000), "fashion_mnist": (20_000, 5_000)}


def cleaning(
    dataset: str,
    *,
    corruption: float,
    train: int | None = None,
    validation: int | None = None,
    test: int | None = None,
    seed: int = 32,
) -> Cleaning:
    """Data hyper-cleaning as in the SOBA / SABA paper, on "digits", "mnist" or "fashion_mnist" (sources: see those).

    `train` and `validation` rows (20,000 and 5,000; for digits 1,000 and 400) are drawn by `seed` from the training
    images. Each train label is with probability `corruption` replaced by a uniform class, which may be the true one.
    Pixels are flattened to [n, 784] (digits [n, 64]) and standardised on the train rows; pixels constant there are 0.
    The test rows are all test images (digits: all remaining rows), or `test` of them drawn by `seed`.
    With the defaults on MNIST the draws are those of the paper's benchmark code.
    """
    if dataset not in LOADERS:
        raise ValueError(f"dataset: got {dataset!r}, expected one of {sorted(LOADERS)}")
    if not 0 <= corruption <= 1:
        raise ValueError(f"corruption: got {corruption!r}, expected a number from 0 to 1")
    train = DEFAULTS[dataset][0] if train is None else train
    validation = DEFAULTS[dataset][1] if validation is None else validation
    _count("train", train)
    _count("validation", validation)
    if test is not None:
        _count("test", test)

    data = LOADERS[dataset]()
    total = len(data.train_y)
    spare = 1 if dataset == "digits" else 0  # digits has no test file: its test rows are those left over
    _count("train", train, total - spare)
    _count("validation", validation, total - spare - train)
    rng = np.random.RandomState(seed)  # one legacy stream for split and noise, as in the paper's benchmark code
    rows, checks = split(total, train_size=train, test_size=validation, random_state=rng)
    true_y = data.train_y[rows]
    noisy = true_y.copy()
    hit = rng.rand(train) < corruption
    noisy[hit] = rng.randint(0, data.classes, hit.sum())

    x = data.train_x.reshape(total, -1)
    test_x, test_y = data.test_x.reshape(len(data.test_y), x.shape[1]), data.test_y
    if dataset == "digits":
        left = np.setdiff1d(np.arange(total), np.concatenate([rows, checks]))
        test_x, test_y = x[left], data.train_y[left]
    if test is not None:
        _count("test", test, len(test_y))
        chosen = np.random.default_rng(seed).permutation(len(test_y))[:test]
        test_x, test_y = test_x[chosen], test_y[chosen]
    parts = _standard(x[rows], x[checks], test_x)
    sizes = f"{train}/{validation}/{len(test_y)} rows"
    note = f"{data.note}, each train label replaced with probability {corruption:g}; {sizes}"
    return Cleaning(
        dataset, parts[0], noisy, true_y, noisy != true_y, parts[1], data.train_y[checks], parts[2], test_y, 10, note
    )


def shifted(
    dataset: str,
    *,
    corruption: float,
    train: int | None = None,
    validation: int | None = None,
    seed: int = 0,
    shuffle: bool = False,
) -> Cleaning:
    """Data hyper-cleaning as in the bilevel thesis: wrong labels are other classes, never the true one.

    Train rows are the first 20,000 training images, validation rows the next 5,000 (digits: 1,000 and 400), or `train` and
    `validation` of them; with `shuffle` both are drawn by `seed`.  Test rows are all test images (digits: all remaining
    rows).  The labels of a share `corruption` of the train rows, drawn once by `seed`, are shifted by 1 to 9 modulo 10.
    Pixels are in [0, 1], normalised by MNIST's mean .1307 and deviation .3081 (digits, and with `shuffle`: by those of the
    train rows), with a last column of ones.

    Deviations from the public code: there the labels are shifted anew at every visit, so that the noise accumulates, and
    the validation rows are read at wrong positions.

    Source: Ji, Yang, Liang, "Bilevel optimization: convergence analysis and enhanced design", ICML 2021, arXiv 2010.07962.
    """
    if dataset not in LOADERS:
        raise ValueError(f"dataset: got {dataset!r}, expected one of {sorted(LOADERS)}")
    if not 0 <= corruption <= 1:
        raise ValueError(f"corruption: got {corruption!r}, expected a number from 0 to 1")
    train = DEFAULTS[dataset][0] if train is None else train
    validation = DEFAULTS[dataset][1] if validation is None else validation
    _count("train", train)
    _count("validation", validation)
    data = LOADERS[dataset]()
    total = len(data.train_y)
    spare = 1 if dataset == "digits" else 0
    _count("train", train, total - spare)
    _count("validation", validation, total - spare - train)
    rows, checks = np.split(np.arange(train + validation), [train])
    if shuffle:
        rows, checks = split(total, train_size=train, test_size=validation, random_state=seed)
    rng = np.random.default_rng(seed)
    true_y = data.train_y[rows]
    hit = rng.permutation(train)[: round(corruption * train)]
    noisy = true_y.copy()
    noisy[hit] = (true_y[hit] + rng.integers(1, 10, len(hit))) % 10

    x = data.train_x.reshape(len(data.train_y), -1) / np.float32(data.train_x.max())
    mean, deviation = (x[rows].mean(), x[rows].std()) if shuffle or dataset == "digits" else (0.1307, 0.3081)

    def features(pixels: np.ndarray) -> np.ndarray:
        return np.hstack([(pixels - mean) / deviation, np.ones((len(pixels), 1))]).astype(np.float32)

    if dataset == "digits":
        left = np.setdiff1d(np.arange(total), np.concatenate([rows, checks]))
        test_x, test_y = x[left], data.train_y[left]
    else:
        test_x, test_y = data.test_x.reshape(len(data.test_y), -1) / np.float32(data.train_x.max()), data.test_y
    note = f"{data.note}, {corruption:g} of the train labels shifted; {train}/{validation}/{len(test_y)} rows"
    parts = features(x[rows]), features(x[checks]), features(test_x)
    return Cleaning(
        dataset, parts[0], noisy, true_y, noisy != true_y, parts[1], data.train_y[checks], parts[2], test_y, 10, note
    )


def _standard(train: np.ndarray, *others: np.ndarray) -> list[np.ndarray]:
    """`scaled`, and 0 everywhere for pixels that are constant on the train rows.

    StandardScaler, and so the paper, leaves such a pixel at up to 255 in the other parts. A linear model with a ridge
    term gives it weight 0 either way; here it cannot dominate the outer gradient on the way there.
    """
    constant = (train == train[0]).all(axis=0)
    parts = scaled(train, *others)
    for part in parts:
        part[:, constant] = 0
    return parts


def _count(name: str, value: int, most: int | None = None) -> None:
    if not isinstance(value, Integral) or value <= 0:
        raise ValueError(f"{name}: got {value!r}, expected a positive integer")
    if most is not None and value > most:
        raise ValueError(f"{name}: got {value}, expected at most {most} (rows that are left)")
