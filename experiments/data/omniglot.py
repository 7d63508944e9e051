"""Omniglot: 1,623 handwritten characters of 50 alphabets, 20 drawings of each."""

import hashlib
import io
import zipfile
from collections import defaultdict
from pathlib import Path

import numpy as np
from PIL import Image

from experiments.data.few_shot import Characters
from experiments.data.files import DataFileError, cache_folder, locate

ARCHIVES = {"omniglot/images_background.zip": 964, "omniglot/images_evaluation.zip": 659}
TRAIN = 1200


def omniglot(*, rotations: bool = True, seed: int = 0) -> Characters:
    """Omniglot (Lake, Salakhutdinov, Tenenbaum), MIT: images 28 x 28, ink 255 on 0, of 1,200 and of 423 held-out characters.

    Both archives together are split by characters in an order drawn by ``seed``, as in MAML's code.  With ``rotations``,
    those of the training characters by 90, 180 and 270 degrees are characters of their own, 4,800 in all; held-out ones are
    not turned.  The shrunk images are kept in the cache folder.
    """
    images = _shrunk()
    order = np.random.RandomState(seed).permutation(len(images))
    train, test = images[order[:TRAIN]], images[order[TRAIN:]]
    if rotations:
        train = np.concatenate([np.rot90(train, turns, axes=(2, 3)) for turns in range(4)])
    return Characters("omniglot", train[..., None], test[..., None], "Omniglot, 423 held-out characters")


def _shrunk() -> np.ndarray:
    """``[1623, 20, 28, 28]`` uint8, in the order of alphabets and characters; from the cache where it is there."""
    paths = {locate(name): count for name, count in ARCHIVES.items()}
    content = "".join(f"{path.stat().st_size}" for path in paths)
    cached = cache_folder() / f"omniglot/28x28-{hashlib.sha256(content.encode()).hexdigest()[:12]}.npy"
    if cached.is_file():
        return np.load(cached, allow_pickle=False)
    images = np.concatenate([read_archive(path, count) for path, count in paths.items()])
    cached.parent.mkdir(parents=True, exist_ok=True)
    part = cached.with_suffix(".part")
    with part.open("wb") as file:
        np.save(file, images)
    part.replace(cached)
    return images


def read_archive(path: Path, count: int, size: int = 28) -> np.ndarray:
    """The ``count`` characters of an archive, ``[count, 20, size, size]`` uint8, averaged over pixels and ink bright."""
    drawings: dict[str, list[np.ndarray]] = defaultdict(list)
    try:
        with zipfile.ZipFile(path) as archive:
            for name in sorted(archive.namelist()):
                if name.endswith(".png"):
                    with Image.open(io.BytesIO(archive.read(name))) as image:
                        small = image.convert("L").resize((size, size), Image.Resampling.BOX)
                    drawings[name.rsplit("/", 1)[0]].append(255 - np.asarray(small))
    except (OSError, zipfile.BadZipFile) as error:
        raise DataFileError(f"{path}: got a damaged archive ({error}), expected a zip file of PNG images; delete it") from error
    if len(drawings) != count or {len(one) for one in drawings.values()} != {20}:
        raise DataFileError(f"{path}: got {len(drawings)} characters, expected {count} with 20 drawings each")
    return np.stack([np.stack(one) for one in drawings.values()])
