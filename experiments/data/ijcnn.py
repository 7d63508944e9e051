"""IJCNN1 from LIBSVM's svmlight files, checked by content."""

import hashlib
import os
import tempfile
import warnings
import zipfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
from sklearn.datasets import load_svmlight_file

from experiments.data.files import DataFileError, cache_folder, finite, locate
from experiments.data.records import Table


class Part(NamedTuple):
    """One file: its name in `FILES`, and the checksum of its rows in order and of its rows sorted."""

    file: str
    rows: int
    ordered: str
    unordered: str


# The checksums are of the parsed rows, computed from a copy that holds LIBSVM's rows in another byte stream. LIBSVM's
# own bytes could not be tried where this was written. Should its rows differ after all, the loader says how. Its order
# is most likely the same: each train row of the copy is the previous one moved on by one time step, without a break.
TRAIN = Part(
    "ijcnn1/ijcnn1.bz2",
    49_990,
    "9a82e456643a192a933a62a44dc5c097175bc43d9d6ccf7dc89db51dbcbdb938",
    "d28b2be586c9fefbb4e193bb3bf22893ba86ac67f6d75280e3e07700a2da1faf",
)
TEST = Part(
    "ijcnn1/ijcnn1.t.bz2",
    91_701,
    "49819e71fafff8b8e31c3dfa3b399c9f65e0de9092c81172b325154397d7a94c",
    "1c340c91060b2380b77f98c8280e882569ca472312ddb0ce1d7ba1098fc44122",
)


def ijcnn1() -> Table:
    """IJCNN1 (Prokhorov 2001, LIBSVM's version), not scaled further; no licence stated on LIBSVM's page.

    49,990 train (inner) and 91,701 test (outer) rows x 22; labels float32 -1 / +1 (4,853 and 8,712 positive).
    """
    return Table("ijcnn1", *_load(TRAIN), *_load(TEST), 2, "IJCNN1")


def _load(part: Part) -> tuple[np.ndarray, np.ndarray]:
    path = locate(part.file)
    kept = cache_folder() / f"{Path(part.file).stem}-{part.ordered[:16]}.npz"
    rows = _read_kept(kept, part)
    if rows is None:
        rows = _parse(path)
        _check(part, path, *rows)
        _keep(kept, *rows)
    return rows


def _parse(path: Path) -> tuple[np.ndarray, np.ndarray]:
    try:
        sparse, y = load_svmlight_file(str(path), n_features=22)[:2]
    except (OSError, EOFError, ValueError) as error:
        raise DataFileError(f"{path}: got {error}, expected bzip2'd svmlight rows; delete the damaged file") from error
    x = sparse.toarray().astype(np.float32)  # toarray adds to 0, so that a -0.0 in a file is 0.0 here
    finite(str(path), x, y)
    if not np.isin(y, (-1, 1)).all():
        raise DataFileError(f"{path}: got labels {np.unique(y)[:5]}, expected -1 and 1")
    return x, y.astype(np.float32)


def content(x: np.ndarray, y: np.ndarray, ordered: bool = True) -> str:
    """sha256 of the rows (little-endian float32 features, then the int8 labels), as they come or sorted."""
    x, y = np.ascontiguousarray(x, "<f4"), y.astype(np.int8)
    if not ordered:
        order = np.lexsort((y, *x.T))
        x, y = x[order], y[order]
    return hashlib.sha256(x.tobytes() + y.tobytes()).hexdigest()


def _check(part: Part, path: Path, x: np.ndarray, y: np.ndarray) -> None:
    if x.shape != (part.rows, 22):
        raise DataFileError(f"{path}: got {x.shape}, expected {(part.rows, 22)}; delete the damaged file")
    if content(x, y) == part.ordered:
        return
    if content(x, y, ordered=False) == part.unordered:
        raise DataFileError(f"{path}: got the expected rows in another order; splits and seeds would not agree")
    raise DataFileError(f"{path}: got other rows than expected (content sha256 {content(x, y)}, not {part.ordered})")


def _read_kept(kept: Path, part: Part) -> tuple[np.ndarray, np.ndarray] | None:
    try:
        with kept.open("rb") as raw, np.load(raw, allow_pickle=False) as file:  # np.load leaves a damaged file open
            x, y = file["x"], file["y"]
    except (OSError, EOFError, KeyError, ValueError, zipfile.BadZipFile):
        return None  # absent or damaged: parsed and written anew
    sound = x.dtype == y.dtype == np.float32 and x.shape == (len(y), 22) and content(x, y) == part.ordered
    return (x, y) if sound else None


def _keep(kept: Path, x: np.ndarray, y: np.ndarray) -> None:
    """Write the arrays under another name first: a reader sees a whole file or none."""
    draft = None
    try:
        kept.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=kept.parent, suffix=".part", delete=False) as file:
            draft = Path(file.name)
            np.savez(file, x=x, y=y)
        os.replace(draft, kept)
    except OSError as error:
        warnings.warn(f"{kept}: not written ({error}); the rows are parsed again next time", stacklevel=2)
        if draft:
            draft.unlink(missing_ok=True)
