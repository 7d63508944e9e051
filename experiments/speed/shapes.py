"""The cases: three problems of the papers, on synthetic data of their shapes."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from bilevel_jax import Levels, Problem, Vars
from bilevel_jax.types import Array

BATCH = 64


class Sizes(NamedTuple):
    """Numbers of inner and outer samples, of features, and of classes."""

    inner: int
    outer: int
    features: int
    classes: int


class Shape(NamedTuple):
    """A problem, its data and starting point, and constant step sizes of z, v and x at which runs stay finite."""

    name: str
    problem: Problem  # losses return one value a sample
    data: Levels
    start: Vars
    rates: Vars
    period: int  # steps from one full pass of SRBA to the next: (n + m) / 2 batches

    @property
    def chunk(self) -> int:
        """Steps of one compiled call: whole periods, so that each call has its share of full passes."""
        return self.period * -(-200 // self.period)


def ijcnn1(sizes: Sizes) -> Shape:
    """Regularisation of a logistic regression, one weight ``exp(x_i)`` a feature; labels -1 and +1."""

    def loss(z: Array, data: tuple[Array, Array]) -> Array:
        features, labels = data
        return jax.nn.softplus(-labels * (features @ z))

    problem = Problem(
        inner=lambda z, x, data: loss(z, data) + 0.5 * (jnp.exp(x) * z**2).sum(),
        outer=lambda z, x, data: loss(z, data),
    )
    data = Levels(*((features, 2.0 * labels.astype(features.dtype) - 1.0) for features, labels in _gaussian(sizes)))
    return _shape("ijcnn1", problem, data, _full(1, sizes.features), _full(-1, sizes.features), sizes)


def covtype(sizes: Sizes) -> Shape:
    """Regularisation of a softmax regression, one weight ``exp(x_c)`` a class."""
    problem = Problem(
        inner=lambda z, x, data: _cross_entropy(z, *data) + 0.5 * (jnp.exp(x) * (z**2).sum(0)).sum(),
        outer=lambda z, x, data: _cross_entropy(z, *data),
    )
    inner = _full(0, sizes.features, sizes.classes)
    return _shape("covtype", problem, _gaussian(sizes), inner, _full(-1, sizes.classes), sizes)


def cleaning(sizes: Sizes) -> Shape:
    """Data cleaning on MNIST: a weight ``sigmoid(x_i)`` for each inner sample, whose index is a leaf of the data."""

    def loss(z: Array, x: Array, data: tuple[Array, Array, Array]) -> Array:
        features, labels, index = data
        return jax.nn.sigmoid(x[index]) * _cross_entropy(z, features, labels) + 0.2 * (z**2).sum()

    problem = Problem(inner=loss, outer=lambda z, x, data: _cross_entropy(z, *data))
    data = _gaussian(sizes)
    data = Levels((*data.inner, jnp.arange(sizes.inner, dtype=jnp.int32)), data.outer)
    inner = _full(0, sizes.features, sizes.classes)
    return _shape("cleaning", problem, data, inner, _full(-2, sizes.inner), sizes)


SHAPES: dict[str, Callable[[Sizes], Shape]] = {"ijcnn1": ijcnn1, "covtype": covtype, "cleaning": cleaning}
FULL = {
    "ijcnn1": Sizes(49_990, 91_701, 22, 2),
    "covtype": Sizes(371_847, 92_962, 54, 7),
    "cleaning": Sizes(20_000, 5_000, 784, 10),
}
#: Small ones, for tests: the last blocks are ragged, as those of the full sizes, and no table is as large as other arrays.
QUICK = {"ijcnn1": Sizes(1000, 700, 5, 2), "covtype": Sizes(900, 500, 6, 3), "cleaning": Sizes(600, 300, 7, 4)}


def _cross_entropy(z: Array, features: Array, labels: Array) -> Array:
    return optax.softmax_cross_entropy_with_integer_labels(features @ z, labels)


def _gaussian(sizes: Sizes) -> Levels:
    """Per level: standard normal features (float32) and uniform labels (int32)."""
    rng = np.random.default_rng(0)

    def level(rows: int) -> tuple[Array, Array]:
        features = rng.standard_normal((rows, sizes.features), np.float32)
        return jnp.asarray(features), jnp.asarray(rng.integers(0, sizes.classes, rows, np.int32))

    return Levels(level(sizes.inner), level(sizes.outer))


def _full(value: float, *shape: int) -> Array:
    return jnp.full(shape, value, jnp.float32)


def _shape(name: str, problem: Problem, data: Levels, inner: Array, outer: Array, sizes: Sizes) -> Shape:
    period = max(1, (sizes.inner + sizes.outer) // (2 * BATCH))
    return Shape(name, problem, data, Vars(inner=inner, outer=outer), Vars(0.01, 0.01, 1e-4), period)
