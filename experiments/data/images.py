"""MNIST and Fashion-MNIST from their idx files."""

import gzip
import math
import zlib
from pathlib import Path

import numpy as np

from experiments.data.files import DataFileError, locate
from experiments.data.records import Images


def read_idx(path: Path, dims: int) -> np.ndarray:
    """The uint8 array with `dims` axes in a gzipped idx file.

    Layout: two zero bytes, 8 for uint8, the number of axes, each length as big-endian int32, then the values.
    """
    try:
        with gzip.open(path) as file:
            raw = file.read()
    except (OSError, EOFError, zlib.error) as error:
        raise DataFileError(f"{path}: got a damaged gzip file ({error}), expected an idx file; delete it") from error
    start = 4 + 4 * dims
    if raw[:4] != bytes([0, 0, 8, dims]) or len(raw) < start:
        raise DataFileError(f"{path}: got a header {raw[:4].hex()}, expected the idx header 000008{dims:02x} and sizes")
    shape = tuple(int(n) for n in np.frombuffer(raw, ">i4", dims, offset=4))
    if min(shape) <= 0 or len(raw) - start != math.prod(shape):
        raise DataFileError(f"{path}: got {len(raw) - start} values, expected {shape} as the header says")
    return np.frombuffer(raw, np.uint8, offset=start).reshape(shape)


def _part(folder: str, prefix: str) -> tuple[np.ndarray, np.ndarray]:
    paths = locate(f"{folder}/{prefix}-images-idx3-ubyte.gz"), locate(f"{folder}/{prefix}-labels-idx1-ubyte.gz")
    images, labels = read_idx(paths[0], 3), read_idx(paths[1], 1)
    if images.shape != (len(labels), 28, 28):
        raise DataFileError(f"{paths[0]}: got shape {images.shape}, expected {(len(labels), 28, 28)}")
    if labels.max() > 9:
        raise DataFileError(f"{paths[1]}: got a label {labels.max()}, expected 0 to 9")
    return images, labels.astype(np.int32)


def mnist() -> Images:
    """MNIST (LeCun, Cortes, Burges): uint8 images [60000, 28, 28] and [10000, 28, 28], int32 labels 0..9.

    Licence: CC BY-SA 3.0.
    """
    return Images("mnist", *_part("mnist", "train"), *_part("mnist", "t10k"), 10, "MNIST")


def fashion_mnist() -> Images:
    """Fashion-MNIST (Zalando): uint8 images [60000, 28, 28] and [10000, 28, 28], int32 labels 0..9.

    Licence: MIT.
    """
    folder = "fashion_mnist"
    return Images(folder, *_part(folder, "train"), *_part(folder, "t10k"), 10, "Fashion-MNIST")
