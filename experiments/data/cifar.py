"""CIFAR-10: all of it, or the subset that a machine without internet may hold."""

import pickle
import tarfile
import zipfile
from typing import Any

import numpy as np

from experiments.data.files import DataFileError, locate
from experiments.data.records import Images

SUBSET, ARCHIVE = "cifar10/cifar10_subset.npz", "cifar10/cifar-10-python.tar.gz"
TRAIN, TEST = [f"data_batch_{k}" for k in range(1, 6)], ["test_batch"]


def cifar10(full: bool = False) -> Images:
    """CIFAR-10 (Krizhevsky): uint8 images [n, 32, 32, 3], int32 labels 0..9.  No licence is stated.

    Full: 50,000 train and 10,000 test images, downloaded. Otherwise their first 10,000 and 1,000, which must lie in
    $BILEVEL_JAX_DATA.
    """
    parts = _full() if full else _subset()
    name = ARCHIVE if full else SUBSET
    for images, labels in (parts[:2], parts[2:]):
        if images.shape != (len(labels), 32, 32, 3) or images.dtype != np.uint8:
            raise DataFileError(
                f"{name}: got images {images.shape} of {images.dtype}, expected {(len(labels), 32, 32, 3)} of uint8"
            )
        if labels.max() > 9:
            raise DataFileError(f"{name}: got a label {labels.max()}, expected 0 to 9")
    note = "CIFAR-10" if full else f"subset of CIFAR-10: {len(parts[1]):,} train and {len(parts[3]):,} test images"
    return Images("cifar10", parts[0], parts[1].astype(np.int32), parts[2], parts[3].astype(np.int32), 10, note)


def _subset() -> tuple[np.ndarray, ...]:
    path = locate(SUBSET)
    try:
        with np.load(path, allow_pickle=False) as file:
            return tuple(file[f"{part}_{kind}"] for part in ("train", "test") for kind in ("images", "labels"))
    except (zipfile.BadZipFile, KeyError, ValueError, OSError) as error:
        raise DataFileError(f"{path}: got {error}, expected an npz file of images and labels") from error


def _full() -> tuple[np.ndarray, ...]:
    path, found = locate(ARCHIVE), {}
    try:
        with tarfile.open(path) as archive:
            for name in TRAIN + TEST:
                member: Any = archive.extractfile(f"cifar-10-batches-py/{name}")
                found[name] = pickle.load(member, encoding="latin1")  # what it holds is fixed by the file's checksum
    except (tarfile.TarError, KeyError, OSError) as error:
        raise DataFileError(f"{path}: got {error}, expected the archive of CIFAR-10 for Python") from error
    parts = []
    for names in (TRAIN, TEST):
        planes = np.concatenate([found[name]["data"] for name in names]).reshape(-1, 3, 32, 32)
        parts += [planes.transpose(0, 2, 3, 1), np.concatenate([found[name]["labels"] for name in names])]
    return tuple(parts)
