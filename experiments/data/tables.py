"""Tables: scikit-learn's bundled sets and Covertype."""

from pathlib import Path
from typing import Any

import numpy as np
from sklearn import datasets
from sklearn.model_selection import train_test_split
from sklearn.preprocessing import StandardScaler

from experiments.data.files import DataFileError, cache_folder, finite, locate
from experiments.data.records import Table, ThreeWay


def breast_cancer(seed: int = 0) -> Table:
    """Breast Cancer Wisconsin (Diagnostic), bundled with scikit-learn; UCI, CC BY 4.0.

    300 train (inner) and 269 test (outer) rows drawn by `seed`, x 30, standardised on the train rows; labels float32
    -1 (malignant) and +1 (benign).
    """
    x, y = bundled("breast_cancer")
    y = (2 * y - 1).astype(np.float32)
    a, b = split(len(y), train_size=300, random_state=seed)
    train, test = scaled(x[a], x[b])
    return Table("breast_cancer", train, y[a], test, y[b], 2, "Breast Cancer Wisconsin")


def digits(seed: int = 0) -> Table:
    """Handwritten digits 8x8, bundled with scikit-learn; UCI (test part of Optical Recognition), CC BY 4.0.

    1,437 train and 360 test rows drawn by `seed`, x 64 pixels in [0, 1]; labels int32 0..9.
    """
    x, y = bundled("digits")
    x = (x / 16).astype(np.float32)
    a, b = split(len(y), test_size=360, random_state=seed)
    return Table("digits", x[a], y[a], x[b], y[b], 10, "UCI digits 8x8")


def covtype(full: bool) -> ThreeWay:
    """Covertype, 54 features standardised on the train rows, labels int32 0..6; UCI (Blackard), CC BY 4.0.

    Full: 581,012 rows (371,847 / 92,962 / 116,203), downloaded by scikit-learn, which checks its own checksum.
    Otherwise a 16 % sample of 92,962 rows (59,495 / 14,874 / 18,593), which must lie in $BILEVEL_JAX_DATA.
    """
    name = "covtype" if full else "covtype/covtype_92k.npz"
    x, y = _full() if full else _sample(locate(name))
    finite(name, x)
    if x.shape[1:] != (54,) or y.min() != 1 or y.max() != 7:
        raise DataFileError(f"{name}: got {x.shape}, classes {y.min()}..{y.max()}, expected 54 features, classes 1..7")
    y = (y - 1).astype(np.int32)
    rng = np.random.RandomState(2442)  # one stream for both splits, as in the paper's benchmark code
    rest, c = split(len(y), test_size=0.2, random_state=rng)
    a, b = (rest[part] for part in split(len(rest), test_size=0.2, random_state=rng))
    train, validation, test = scaled(x[a], x[b], x[c])
    note = "Covertype" if full else "16 % sample of Covertype"
    return ThreeWay("covtype", train, y[a], validation, y[b], test, y[c], 7, note)


def _sample(path: Path) -> tuple[np.ndarray, np.ndarray]:
    with np.load(path, allow_pickle=False) as file:  # what it holds is fixed by the file's checksum
        data = file["data"]
    return data[:, :-1], data[:, -1]


def _full() -> tuple[np.ndarray, np.ndarray]:
    home = cache_folder() / "sklearn"
    try:
        x, y = datasets.fetch_covtype(data_home=str(home), return_X_y=True)
    except Exception as error:  # of many kinds: the network's, and joblib's on a damaged file
        raise DataFileError(
            f"covtype: scikit-learn's fetch_covtype failed with {home} as its folder: {error}. Where files are already "
            "there, they may be damaged: delete the folder; otherwise go online, or use covtype(full=False)."
        ) from error
    return np.asarray(x), np.asarray(y)


def bundled(name: str) -> tuple[np.ndarray, np.ndarray]:
    """float64 features and int32 labels of the set `name` in scikit-learn's own files."""
    x, y = getattr(datasets, f"load_{name}")(return_X_y=True)
    finite(f"scikit-learn's {name}", x)
    return x, y.astype(np.int32)


def split(rows: int, **options: Any) -> tuple[np.ndarray, np.ndarray]:
    """Row numbers of scikit-learn's `train_test_split`, which draws the same ones whatever the arrays hold."""
    first, second = train_test_split(np.arange(rows), **options)
    return np.asarray(first), np.asarray(second)


def scaled(train: np.ndarray, *others: np.ndarray) -> list[np.ndarray]:
    """All parts [., p] standardised with the train rows' mean and deviation, in float64, returned as float32."""
    scaler = StandardScaler().fit(train)
    return [np.asarray(scaler.transform(part), dtype=np.float32) for part in (train, *others)]
