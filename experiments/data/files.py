"""The data files: where each is found, and the checksum that it must have."""

import os
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pooch

MNIST = "https://ossci-datasets.s3.amazonaws.com/mnist/"
FASHION = "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/"
OMNIGLOT = "https://github.com/brendenlake/omniglot/raw/master/python/"
LIBSVM = "https://www.csie.ntu.edu.tw/~cjlin/libsvmtools/datasets/binary/"


class DataFileError(RuntimeError):
    """A data file is missing, damaged, or not what was expected."""


class Source(NamedTuple):
    """One file of the table: its checksum, public homes and licence."""

    sha256: str | None  # None: LIBSVM's byte stream was out of reach, the loader checks the parsed content instead
    urls: tuple[str, ...]
    licence: str
    copies: tuple[tuple[str, str], ...] = ()  # (path, sha256) of other byte streams with the same rows
    advice: str = ""


def _idx(folder: str, home: str, licence: str, hashes: dict[str, str]) -> dict[str, Source]:
    return {f"{folder}/{file}": Source(sha, (home + file,), licence) for file, sha in hashes.items()}


FILES: dict[str, Source] = {
    **_idx("mnist", MNIST, "CC BY-SA 3.0", {
        "train-images-idx3-ubyte.gz": "440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609",
        "train-labels-idx1-ubyte.gz": "3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c",
        "t10k-images-idx3-ubyte.gz": "8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6",
        "t10k-labels-idx1-ubyte.gz": "f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6",
    }),
    **_idx("fashion_mnist", FASHION, "MIT", {
        "train-images-idx3-ubyte.gz": "3aede38d61863908ad78613f6a32ed271626dd12800ba2636569512369268a84",
        "train-labels-idx1-ubyte.gz": "a04f17134ac03560a47e3764e11b92fc97de4d1bfaf8ba1a3aa29af54cc90845",
        "t10k-images-idx3-ubyte.gz": "346e55b948d973a97e58d2351dde16a484bd415d4595297633bb08f03db6a073",
        "t10k-labels-idx1-ubyte.gz": "67da17c76eaffca5446c3361aaab5c3cd6d1c2608764d35dfb1850b086bf8dd5",
    }),
    "ijcnn1/ijcnn1.bz2": Source(
        None, (LIBSVM + "ijcnn1.bz2",), "none stated (LIBSVM page)",
        (("ijcnn1/ijcnn1.trn.bz2", "b38a4198ce142d43e96fb86d17b87211feec1f909ac344fa057455c69de29de3"),),
    ),
    "ijcnn1/ijcnn1.t.bz2": Source(
        None, (LIBSVM + "ijcnn1.t.bz2",), "none stated (LIBSVM page)",
        (("ijcnn1/ijcnn1.tst.bz2", "acd1db430684fdd3f0c768ecc49aa8e749d0004fc117611220c2aa576a7b6a24"),),
    ),
    "newsgroups20/20news-bydate.tar.gz": Source(
        "8f1b2514ca22a5ade8fbb9cfa5727df95fa587f4c87b786e15c759fa66d95610",  # that of scikit-learn, which fetches the same file
        ("https://ndownloader.figshare.com/files/5975967",), "none stated",
        (("newsgroups20/20news-bydate.rebuilt.tar.gz", "1ba9b25e6c182f952d5a79bc67f670f542896743048d394f2a628bbcb735a918"),),
    ),
    "omniglot/images_background.zip": Source(  # out of reach: the reader counts the drawings; the copy has the same PNGs
        None, (OMNIGLOT + "images_background.zip",), "MIT",
        (("omniglot/images_background.rezipped.zip", "77234adfe2ea693d1d4daf50f735f3cbba2d52964a59de90fd88523301441753"),),
    ),
    "omniglot/images_evaluation.zip": Source(
        None, (OMNIGLOT + "images_evaluation.zip",), "MIT",
        (("omniglot/images_evaluation.rezipped.zip", "28bf75f0c948ef745eed99853c0983ff9d4e7e5943770f33d5603c650dda1e77"),),
    ),
    "cifar10/cifar10_subset.npz": Source(
        "cbd665d6902c76d0c063c3c125bcfeb2a4bf7b7b0e554efbe75bdd49e36c8efe", (), "none stated",
        advice="this subset has no public home: use the full set, cifar10(full=True)",
    ),
    "cifar10/cifar-10-python.tar.gz": Source(
        "6d958be074577803d12ecdefd02955f39262c83c16fe9348329d7fe0b5c001ce",
        ("https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz",), "none stated",
    ),
    "covtype/covtype_92k.npz": Source(
        "dd8bb21415036dc51ba8d8a606251350eb218c6930bd8208039f165fb1c9446c", (), "CC BY 4.0",
        advice="this sample has no public home: use the full set, covtype(full=True)",
    ),
}  # fmt: skip


def data_folder() -> Path | None:
    """The folder that the user named in BILEVEL_JAX_DATA, if any."""
    named = os.environ.get("BILEVEL_JAX_DATA")
    return Path(named).expanduser() if named else None


def cache_folder() -> Path:
    """Where downloads and parsed arrays are kept: BILEVEL_JAX_CACHE, or the system's cache folder."""
    return Path(os.environ.get("BILEVEL_JAX_CACHE") or pooch.os_cache("bilevel_jax")).expanduser()


@lru_cache
def _digest(path: str, size: int, changed_ns: int) -> str:
    return pooch.file_hash(path, alg="sha256")


def _digest_of(path: Path) -> str:
    stat = path.stat()  # size and time in the key: a file that changed is read again
    return _digest(str(path), stat.st_size, stat.st_mtime_ns)


def locate(name: str) -> Path:
    """Path of the file `name` (a key of `FILES`), its checksum verified; downloaded where it is nowhere yet.

    Looked at in turn: $BILEVEL_JAX_DATA, the cache folder, the public home. A damaged file in $BILEVEL_JAX_DATA is an
    error (it is the user's); a damaged file in the cache is fetched anew.
    """
    if name not in FILES:
        raise ValueError(f"name: got {name!r}, expected one of {sorted(FILES)}")
    source, folder, cached = FILES[name], data_folder(), cache_folder() / name
    places = [] if folder else ["$BILEVEL_JAX_DATA: not set"]
    for path, sha256 in ((name, source.sha256), *source.copies):
        if folder is None:
            break
        file = folder / path
        if file.is_file():
            if sha256 not in (None, found := _digest_of(file)):
                raise DataFileError(
                    f"{name}: got sha256 {found}, expected {sha256}, in {file} (from $BILEVEL_JAX_DATA). "
                    "The file is damaged: delete it, or replace it by a sound copy."
                )
            return file
        places.append(f"$BILEVEL_JAX_DATA: no {file}")
    if cached.is_file() and source.sha256 in (None, _digest_of(cached)):
        return cached
    places.append(f"cache: damaged {cached}" if cached.is_file() else f"cache: no {cached}")
    for url in source.urls:
        try:
            got = Path(pooch.retrieve(url, source.sha256, fname=cached.name, path=cached.parent))
            if source.sha256 in (None, _digest_of(got)):
                return got
            places.append(f"download: {url} has another sha256 than {source.sha256}")
        except (OSError, ValueError) as error:  # requests' errors are OSErrors; pooch raises ValueError on a bad hash
            places.append(f"download: {url} failed: {error}")
    raise DataFileError("\n  ".join([f"{name}: file not found. Looked at:", *places]) + "\n" + _advice(source, cached))


def _advice(source: Source, cached: Path) -> str:
    by_hand = f", or download {' or '.join(source.urls)} by hand to {cached}" if source.urls else ""
    damaged = f"; delete the damaged {cached}" if cached.is_file() else ""
    extra = f"; {source.advice}" if source.advice else ""
    return f"Set BILEVEL_JAX_DATA to a folder that holds it{by_hand}{damaged}{extra}."


def finite(name: str, *arrays: np.ndarray) -> None:
    """Raise DataFileError naming the file `name` where an array has a NaN or an infinity."""
    for array in arrays:
        if bad := int(array.size - np.isfinite(array).sum()):
            raise DataFileError(f"{name}: got {bad} NaN or infinite values, expected none")
