"""20 Newsgroups as word counts of unit length: scikit-learn's `fetch_20newsgroups_vectorized`, from checked messages."""

import os
import tarfile
import tempfile
import warnings
import zipfile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from scipy.sparse import csr_matrix
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.preprocessing import normalize

from experiments.data.files import DataFileError, cache_folder, locate
from experiments.data.tables import split

#: A `scipy.sparse.csr_matrix`, which pyright takes for None where it is sliced.
Rows = Any

ARCHIVE = "newsgroups20/20news-bydate.tar.gz"

#: How the messages of an archive are encoded.  The rebuilt one holds 37 messages of the original in UTF-8; read as Latin-1 they
#: would give other words than the original's.
ENCODING = {"20news-bydate.tar.gz": "latin1", "20news-bydate.rebuilt.tar.gz": "utf-8"}
MESSAGES = {"train": 11_314, "test": 7_532}
GROUPS = 20


class Newsgroups(NamedTuple):
    """Sparse rows in three parts; `note` is a string that every figure made from the data must print."""

    name: str
    train_x: Rows  # [5657, words] float32, rows of unit length
    train_y: np.ndarray  # [5657] int32
    validation_x: Rows  # [5657, words] float32
    validation_y: np.ndarray  # [5657] int32
    test_x: Rows  # [7532, words] float32
    test_y: np.ndarray  # [7532] int32
    classes: int
    note: str


class Counts(NamedTuple):
    """How often each word of the train messages occurs in each message; messages in the order of group and number."""

    train_x: Rows  # [11314, words] int16
    train_y: np.ndarray  # [11314] int32
    test_x: Rows  # [7532, words] int16
    test_y: np.ndarray  # [7532] int32


def twenty_newsgroups(vocabulary: int | None = None, seed: int = 0) -> Newsgroups:
    """20 Newsgroups by date (Lang; Rennie's version): headers and all, each message a vector of word counts of unit length.

    The train messages are halved by `seed`, with the same share of each group in both halves: 5,657 train (inner) and 5,657
    validation (outer) rows; 7,532 test rows. The words are those of the 11,314 train messages: 130,107 in the original
    archive, 130,103 in the rebuilt one (as many entries, 1,787,565: four of its words have become others). With
    `vocabulary`, only so many of them are kept, those of most messages, before the scaling.
    """
    if vocabulary is not None and vocabulary < 1:
        raise ValueError(f"vocabulary: got {vocabulary}, expected a positive number of words")
    counts = _counts()
    train, test = counts.train_x, counts.test_x
    words = train.shape[1]
    if vocabulary is not None and vocabulary < words:
        order = np.argsort(-np.bincount(train.indices, minlength=words), kind="stable")
        kept = np.sort(order[:vocabulary])
        train, test = train[:, kept], test[:, kept]
    train, test = (_unit(part) for part in (train, test))
    a, b = split(len(counts.train_y), test_size=0.5, stratify=counts.train_y, random_state=seed)
    note = f"20 Newsgroups, {train.shape[1]:,} words; {len(a)}/{len(b)}/{len(counts.test_y)} messages"
    return Newsgroups("newsgroups", train[a], counts.train_y[a], train[b], counts.train_y[b], test, counts.test_y, GROUPS, note)


def _unit(rows: Rows) -> Rows:
    return normalize(rows.astype(np.float32))


def _counts() -> Counts:
    """Counted once, and then read from the cache folder."""
    path = locate(ARCHIVE)
    kept = cache_folder() / f"{path.name.removesuffix('.tar.gz')}.npz"
    counts = _read_kept(kept)
    if counts is None:
        counts = count(read(path), ENCODING.get(path.name, "latin1"))
        _keep(kept, counts)
    return counts


def read(path: Path) -> dict[str, list[tuple[str, str, bytes]]]:
    """The messages of an archive as (group, number, text), in that order, by part."""
    found: dict[str, list[tuple[str, str, bytes]]] = {part: [] for part in MESSAGES}
    try:
        with tarfile.open(path) as archive:
            for member in archive:
                if file := archive.extractfile(member):
                    folder, group, number = member.name.rsplit("/", 2)
                    found[folder.rsplit("-", 1)[-1]].append((group, number, file.read()))
    except (OSError, EOFError, KeyError, ValueError, tarfile.TarError) as error:
        raise DataFileError(f"{path}: got {error!r}, expected messages in 20news-bydate-train and -test; delete it") from error
    for part, messages in found.items():
        groups = len({group for group, *_ in messages})
        if (len(messages), groups) != (MESSAGES[part], GROUPS):
            expected = f"{MESSAGES[part]} in {GROUPS}"
            raise DataFileError(f"{path}: got {len(messages)} {part} messages in {groups} groups, expected {expected}")
        messages.sort()
    return found


def count(messages: dict[str, list[tuple[str, str, bytes]]], encoding: str) -> Counts:
    """The words of two and more letters and digits of the train messages, counted in every message."""
    texts = {part: [raw.decode(encoding) for *_, raw in messages[part]] for part in MESSAGES}
    groups = {part: np.unique([group for group, *_ in messages[part]], return_inverse=True)[1] for part in MESSAGES}
    counter: Any = CountVectorizer(dtype=np.int16)  # type: ignore[arg-type]
    train, test = counter.fit_transform(texts["train"]), counter.transform(texts["test"])
    for part in (train, test):
        part.sort_indices()
    return Counts(train, groups["train"].astype(np.int32), test, groups["test"].astype(np.int32))


def _read_kept(kept: Path) -> Counts | None:
    try:
        with kept.open("rb") as raw, np.load(raw, allow_pickle=False) as file:  # np.load leaves a damaged file open
            words = int(file["words"])
            train, test = (
                csr_matrix((file[f"{part}_data"], file[f"{part}_indices"], file[f"{part}_indptr"]), (rows, words))
                for part, rows in MESSAGES.items()
            )
            return Counts(train, file["train_y"], test, file["test_y"])
    except (OSError, EOFError, KeyError, ValueError, zipfile.BadZipFile):
        return None  # absent or damaged: counted and written anew


def _keep(kept: Path, counts: Counts) -> None:
    """Write the arrays under another name first: a reader sees a whole file or none."""
    arrays = {"words": np.int64(counts.train_x.shape[1]), "train_y": counts.train_y, "test_y": counts.test_y}
    for part, matrix in (("train", counts.train_x), ("test", counts.test_x)):
        arrays |= {f"{part}_{name}": getattr(matrix, name) for name in ("data", "indices", "indptr")}
    draft = None
    try:
        kept.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=kept.parent, suffix=".part", delete=False) as file:
            draft = Path(file.name)
            np.savez(file, **arrays)
        os.replace(draft, kept)
    except OSError as error:
        warnings.warn(f"{kept}: not written ({error}); the words are counted again next time", stacklevel=2)
        if draft:
            draft.unlink(missing_ok=True)
