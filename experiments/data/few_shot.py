"""Tasks of few-shot learning: classes with images of each, held-out classes beside them; and sinusoids.

`bilevel_jax.samplers.episodes` draws the tasks from the images, on the device.
"""

import math
import pickle
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bilevel_jax import Batch, Levels
from bilevel_jax.samplers import Plan, Sampler
from bilevel_jax.types import Array
from experiments.data.files import DataFileError, data_folder
from experiments.data.tables import bundled


class Characters(NamedTuple):
    """Images of classes to learn on, and of others to test on; `note` must be printed in every figure made from them."""

    name: str
    train: np.ndarray  # [classes, images, h, w, channels] uint8
    test: np.ndarray  # the same of other classes
    note: str


def digits_by_class() -> Characters:
    """Handwritten digits 8x8, bundled with scikit-learn; UCI, CC BY 4.0: 5, 7 and 8 are held out.

    The others, turned by 0, 90, 180 and 270 degrees, are 28 classes; the held-out ones, by 0 and 90, are 6.  174 images each.
    (6 and 9 are one class upside down, so both are trained on; upside down, a held-out 8 would be two classes.)
    """
    x, y = bundled("digits")
    images = np.round(x * (255 / 16)).astype(np.uint8).reshape(-1, 8, 8, 1)
    least = int(np.bincount(y).min())

    def turned(digits: tuple[int, ...], turns: int) -> np.ndarray:
        upright = np.stack([images[y == digit][:least] for digit in digits])
        return np.concatenate([np.rot90(upright, turn, axes=(2, 3)) for turn in range(turns)])

    note = "digits 8x8, turned; 5, 7 and 8 held out"
    return Characters("digits", turned((0, 1, 2, 3, 4, 6, 9), 4), turned((5, 7, 8), 2), note)


# ---- sets that the user has -------------------------------------------------------------------------------------------


def mini_imagenet(held_out: str = "test") -> Characters:
    """mini-ImageNet: 64 training classes of 600 images 84 x 84 x 3; 16 for validation or 20 for tests are held out.

    No public home may be linked to: put ``mini-imagenet-cache-{train,val,test}.pkl`` (dictionaries with ``image_data`` uint8
    [images, 84, 84, 3] and ``class_dict`` {class: indices}) into ``$BILEVEL_JAX_DATA/mini_imagenet``.

    Reference: Vinyals, Blundell, Lillicrap, Kavukcuoglu, Wierstra, NeurIPS 2016, arXiv 1606.04080; the classes are those of
    Ravi and Larochelle, ICLR 2017.
    """

    def classes(path: Path) -> np.ndarray:
        held = _unpickled(path, "image_data", "class_dict")
        return _stacked(path, held["image_data"], list(held["class_dict"].values()))

    parts = [classes(_mine("mini_imagenet", f"mini-imagenet-cache-{part}.pkl")) for part in ("train", _part(held_out))]
    return Characters("mini_imagenet", parts[0], parts[1], f"mini-ImageNet, {held_out} classes")


def fc100(held_out: str = "test") -> Characters:
    """FC100: CIFAR-100 in 60 training classes of 600 images 32 x 32 x 3; 20 for validation or 20 for tests are held out.

    Put ``FC100_{train,val,test}.pickle`` (dictionaries with ``data`` uint8 [images, 32, 32, 3] and ``labels`` [images]) into
    ``$BILEVEL_JAX_DATA/fc100``.

    Reference: Oreshkin, Rodriguez, Lacoste, "TADAM", NeurIPS 2018, arXiv 1805.10123.
    """

    def classes(path: Path) -> np.ndarray:
        held = _unpickled(path, "data", "labels")
        labels = np.asarray(held["labels"])
        if len(labels) != len(held["data"]):
            raise DataFileError(f"{path}: got {len(labels)} labels, expected {len(held['data'])}, one an image")
        return _stacked(path, held["data"], [np.flatnonzero(labels == label) for label in np.unique(labels)])

    parts = [classes(_mine("fc100", f"FC100_{part}.pickle")) for part in ("train", _part(held_out))]
    return Characters("fc100", parts[0], parts[1], f"FC100, {held_out} classes")


def _part(held_out: str) -> str:
    if held_out not in ("validation", "test"):
        raise ValueError(f"held_out: got {held_out!r}, expected 'validation' or 'test'")
    return {"validation": "val", "test": "test"}[held_out]


def _mine(folder: str, file: str) -> Path:
    """A file that only the user can have."""
    home = data_folder()
    if home is None:
        raise DataFileError(f"{folder}/{file}: set BILEVEL_JAX_DATA to a folder that holds it")
    if not (home / folder / file).is_file():
        raise DataFileError(f"{folder}/{file}: no {home / folder / file}: put it there, or set BILEVEL_JAX_DATA to its folder")
    return home / folder / file


class _Arrays(pickle.Unpickler):
    """Arrays and plain containers, and nothing else: a pickle may otherwise run any code."""

    def find_class(self, module: str, name: str) -> Any:
        if (module.split(".")[0], name) in {
            ("numpy", "_reconstruct"), ("numpy", "ndarray"), ("numpy", "dtype"), ("numpy", "scalar"), ("numpy", "_frombuffer"),
            ("collections", "OrderedDict"), ("collections", "defaultdict"), ("builtins", "list"), ("_codecs", "encode"),
        }:  # fmt: skip
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it wants {module}.{name}, not an array")


def _unpickled(path: Path, *entries: str) -> dict[str, Any]:
    """The dictionary in a file, which must have these entries; Python 2 may have written it."""
    try:
        with path.open("rb") as file:
            held = _Arrays(file, encoding="latin1").load()
    except (pickle.UnpicklingError, EOFError, ValueError, ImportError, AttributeError, IndexError) as error:
        raise DataFileError(f"{path}: got a file that cannot be read ({error}), expected a pickled dictionary") from error
    if not isinstance(held, dict) or any(entry not in held for entry in entries):
        raise DataFileError(f"{path}: expected a dictionary with the entries {' and '.join(entries)}")
    return held


def _stacked(path: Path, images: Any, members: list[Any]) -> np.ndarray:
    """``[classes, images of each, h, w, channels]``: as many as the smallest class has."""
    images = np.asarray(images)
    if images.dtype != np.uint8 or images.ndim != 4 or not members:
        raise DataFileError(
            f"{path}: got {images.dtype} {images.shape}, expected uint8 images [images, h, w, channels] of classes"
        )
    least = min(len(one) for one in members)
    return np.stack([images[np.asarray(one)[:least]] for one in members])


# ---- sinusoids --------------------------------------------------------------------------------------------------------

#: Amplitudes, phases and places of MAML's regression tasks: data of `sinusoids`.
SINUSOIDS = np.array([[0.1, 5.0], [0.0, math.pi], [-5.0, 5.0]], np.float32)


def sinusoids(tasks: int, *, shots: int, queries: int) -> Sampler:
    """Regression tasks ``a sin(t - b)``: a, b and the places t uniform in the ranges that are the data, drawn on the device.

    A batch holds as ``inner`` places and values ``[tasks, shots, 1]``, as ``outer`` the same of the queries; the data are
    ``Levels(inner=SINUSOIDS)``, or other ranges [3, 2].

    Reference: Finn, Abbeel, Levine, ICML 2017, arXiv 1703.03400, section 5.1.
    """

    def plan(data: Levels, key: Array, start: Array | int, count: int) -> Plan:
        del data
        zeros = jnp.zeros(count, jnp.int32)
        draws = start + jnp.arange(count, dtype=jnp.int32)
        return Plan(Levels(zeros, zeros), jax.vmap(lambda t: jax.random.fold_in(key, t))(draws))

    def gather(data: Levels, plan: Plan) -> Batch:
        def task(key: Array) -> tuple[Array, Array]:
            of = [jax.random.fold_in(key, i) for i in range(3)]
            shapes = ((), (), (shots + queries, 1))
            amplitude, phase, places = (
                jax.random.uniform(k, shape, data.inner.dtype, *limits)
                for k, shape, limits in zip(of, shapes, data.inner, strict=True)
            )
            return places, amplitude * jnp.sin(places - phase)

        points = jax.vmap(task)(jax.random.split(plan.key, tasks))
        support, query = (jax.tree.map(lambda p, c=cut: p[:, c], points) for cut in (slice(shots), slice(shots, None)))
        return Batch(inner=support, outer=query, key=plan.key)

    return Sampler(plan, gather, lambda data: data)
