"""A network of discrete cells, trained from scratch on all training images: what cells are compared by.

SGD with momentum, cosine decay and weight decay; images are flipped and moved at random.  Normalisation is by the statistics of
the batch in the test too.  DARTS' cutout, dropped paths and auxiliary classifier are left out.
"""

import sys
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax
from tqdm import trange

from bilevel_jax.types import Array, PyTree
from experiments.architecture_search.network import QUICK, Network


class Training(NamedTuple):
    """How long, and how."""

    epochs: int
    batch_size: int
    rate: float
    decay: float = 3e-4
    momentum: float = 0.9


class Fit(NamedTuple):
    """The state of a training run."""

    step: Array
    z: PyTree
    opt: PyTree


def moved(images: Array, key: Array) -> Array:
    """Every image flipped by a fair coin, and moved by at most an eighth of its size, zeros coming in."""
    count, size = images.shape[:2]
    reach = size // 8
    coin, shift = jax.random.split(key)
    flips = jax.random.bernoulli(coin, 0.5, (count, 1, 1, 1))
    images = jnp.where(flips, images[:, :, ::-1], images)
    images = jnp.pad(images, ((0, 0), (reach, reach), (reach, reach), (0, 0)))
    starts = jax.random.randint(shift, (count, 2), 0, 2 * reach + 1)

    def cut(image: Array, at: Array) -> Array:
        return lax.dynamic_slice(image, (at[0], at[1], jnp.zeros((), at.dtype)), (size, size, image.shape[-1]))

    return jax.vmap(cut)(images, starts)


def optimiser(training: Training, rows: int) -> optax.GradientTransformation:
    """That of the whole training."""
    rate = optax.cosine_decay_schedule(training.rate, training.epochs * (rows // training.batch_size))
    return optax.chain(
        optax.clip_by_global_norm(5.0), optax.add_decayed_weights(training.decay), optax.sgd(rate, training.momentum)
    )


def epoch(network: Network, training: Training, fit: Fit, images: Array, labels: Array, key: Array) -> Fit:
    """One pass over the training images in random order, an incomplete last batch left out."""
    batches, opt = len(labels) // training.batch_size, optimiser(training, len(labels))
    order = jax.random.permutation(jax.random.fold_in(key, fit.step), len(labels))[: batches * training.batch_size]

    def loss(z: PyTree, images: Array, labels: Array) -> Array:
        return optax.softmax_cross_entropy_with_integer_labels(network.apply(z, images), labels).mean()  # type: ignore

    def one(fit: Fit, rows: Array) -> tuple[Fit, None]:
        seen = moved(images[rows], jax.random.fold_in(jax.random.fold_in(key, 1), fit.step))
        gradient = jax.grad(loss)(fit.z, seen, labels[rows])
        with jax.numpy_dtype_promotion("standard"):
            updates, state = opt.update(gradient, fit.opt, fit.z)
        return Fit(fit.step + 1, optax.apply_updates(fit.z, updates), state), None

    return lax.scan(one, fit, order.reshape(batches, -1))[0]


def begin(network: Network, training: Training, rows: int, key: Array) -> Fit:
    """Random weights."""
    images = jnp.zeros((1, network.shape.size, network.shape.size, 3))
    z = network.init(key, images)
    return Fit(jnp.zeros((), jnp.int32), z, optimiser(training, rows).init(z))


def test_accuracy(
    network: Network, training: Training, train: tuple[Array, Array], test: tuple[Array, Array], key: Array
) -> float:
    """The accuracy on the test images after the training; ``test`` in batches, ``[batches, rows, ...]``."""
    fit = jax.jit(partial(begin, network, training, len(train[1])), compiler_options=QUICK)(key)
    advance = jax.jit(partial(epoch, network, training), donate_argnums=0)
    for _ in trange(training.epochs, desc="training", unit="epoch", leave=False, file=sys.stderr):
        fit = advance(fit, *train, key)
    right = jax.jit(
        lambda z: lax.map(lambda batch: (network.apply(z, batch[0]).argmax(-1) == batch[1]).mean(), test).mean()  # type: ignore
    )
    return float(right(fit.z))
