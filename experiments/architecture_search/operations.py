"""The operations of the DARTS search space as flax modules on images ``[channels, batch, height, width]``.

One module applies an operation to one state of a cell for all the nodes that want it, each with parameters of its own: they lie
side by side in the channels, ``copies * channels`` of them, and every parameter has a leading axis ``[copies, ...]``.

Channels come first because on a CPU everything is then a product of matrices or a reduction of contiguous numbers.
"""

from functools import lru_cache
from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from bilevel_jax.types import Array

Form = Literal["matrix", "conv"]
Name = Literal["none", "skip", "max_3x3", "avg_3x3", "sep_3x3", "sep_5x5", "dil_3x3", "dil_5x5"]
ALL: tuple[Name, ...] = ("none", "skip", "max_3x3", "avg_3x3", "sep_3x3", "sep_5x5", "dil_3x3", "dil_5x5")

_start = nn.initializers.variance_scaling(2.0, "fan_in", "uniform", batch_axis=0)


@lru_cache
def _windows(size: int, kernel: int, stride: int, dilation: int) -> np.ndarray:
    """Which pixel lies at which place of the window around each output pixel: 0 or 1, ``[places, output pixels, pixels]``."""
    outputs = np.arange(0, size, stride)
    at = outputs[:, None] + dilation * (np.arange(kernel) - kernel // 2)  # [outputs, kernel], outside: padding
    line = (at[:, :, None] == np.arange(size)).astype(np.float32)
    return np.einsum("aiu,bjv->ijabuv", line, line).reshape(kernel**2, len(outputs) ** 2, size**2)


def depthwise(images: Array, kernel: Array, stride: int, dilation: int, form: Form) -> Array:
    """Every channel with a square kernel of its own, ``[channels, places]``; padded with zeros to keep the size.

    The two forms give the same numbers: a grouped convolution, whose gradients are slow on a CPU, or a product of matrices over
    the pixels, which costs the square of their number: for images of about 8 x 8.
    """
    channels, batch, size, _ = images.shape
    width = round(kernel.shape[1] ** 0.5)
    if form == "matrix":
        windows = jnp.asarray(_windows(size, width, stride, dilation), images.dtype)
        matrices = jnp.einsum("ck,kqp->cpq", kernel, windows)
        out = jnp.einsum("cbp,cpq->cbq", images.reshape(channels, batch, -1), matrices)
        return out.reshape(channels, batch, -(-size // stride), -(-size // stride))
    reach = dilation * (width // 2)
    return lax.conv_general_dilated(
        images,
        kernel.reshape(channels, 1, width, width),
        (stride, stride),
        ((reach, reach), (reach, reach)),
        rhs_dilation=(dilation, dilation),
        dimension_numbers=("CNHW", "OIHW", "CNHW"),
        feature_group_count=channels,
    )


def pool(images: Array, kind: Literal["max", "avg"], stride: int) -> Array:
    """The largest, or the mean, of those of the 3 x 3 pixels around a pixel that lie in the image."""
    combine, fill = (jnp.maximum, -jnp.inf) if kind == "max" else (jnp.add, 0.0)

    def along(images: Array, axis: int) -> Array:  # in two passes: its gradient is a fifth of the work of that of nine pixels
        edges = [(0, 0)] * axis + [(1, 1)] + [(0, 0)] * (3 - axis)
        padded, size = jnp.pad(images, edges, constant_values=fill), images.shape[axis]
        parts = [lax.slice_in_dim(padded, i, i + size, stride, axis) for i in range(3)]
        return combine(combine(parts[0], parts[1]), parts[2])

    total = along(along(images, 2), 3)
    return total if kind == "max" else total / along(along(jnp.ones((1, 1, *images.shape[2:]), images.dtype), 2), 3)


def pointwise(images: Array, kernel: Array) -> Array:
    """A 1 x 1 convolution of every copy: ``images [copies * c, ...]``, ``kernel [copies, c, d]`` to ``[copies * d, ...]``."""
    copies, c, d = kernel.shape
    return jnp.einsum("ecd,ecn->edn", kernel, images.reshape(copies, c, -1)).reshape(copies * d, *images.shape[1:])


class Normalise(nn.Module):
    """Batch normalisation by the statistics of the batch itself, so that a loss is a function of its batch alone."""

    affine: bool = False
    copies: int = 1

    @nn.compact
    def __call__(self, images: Array) -> Array:
        centred = images - images.mean((1, 2, 3), keepdims=True)
        images = centred * lax.rsqrt((centred**2).mean((1, 2, 3), keepdims=True) + 1e-5)
        if self.affine:
            shape = (self.copies, len(images) // self.copies)
            scale = self.param("scale", nn.initializers.ones, shape, images.dtype)
            bias = self.param("bias", nn.initializers.zeros, shape, images.dtype)
            images = images * scale.reshape(-1, 1, 1, 1) + bias.reshape(-1, 1, 1, 1)
        return images


class Stem(nn.Module):
    """A dense 3 x 3 convolution of the input images, and normalisation."""

    channels: int
    stride: int

    @nn.compact
    def __call__(self, images: Array) -> Array:
        kernel = self.param("kernel", _start, (1, 9 * len(images), self.channels), images.dtype)
        edges = ((0, 0), (0, 0), (1, 1), (1, 1))
        padded, (height, width), stride = jnp.pad(images, edges), images.shape[2:], self.stride
        windows = [padded[:, :, i : i + height : stride, j : j + width : stride] for i in range(3) for j in range(3)]
        return Normalise(affine=True)(pointwise(jnp.concatenate(windows), kernel))


class Project(nn.Module):
    """ReLU, a 1 x 1 convolution, normalisation: brings an input of a cell to its channels."""

    channels: int
    affine: bool

    @nn.compact
    def __call__(self, images: Array) -> Array:
        kernel = self.param("kernel", _start, (1, len(images), self.channels), images.dtype)
        return Normalise(self.affine)(pointwise(jax.nn.relu(images), kernel))


class Halve(nn.Module):
    """ReLU, two 1 x 1 convolutions of every second pixel, one of them moved by a pixel, side by side; normalisation."""

    channels: int
    affine: bool
    copies: int = 1

    @nn.compact
    def __call__(self, images: Array) -> Array:
        images, half = jax.nn.relu(images), self.channels // 2
        kernel = self.param("kernel", _start, (self.copies, len(images), self.channels), images.dtype)
        made = [
            jnp.einsum("cd,cbhw->dbhw", part, moved)
            for one in kernel
            for part, moved in ((one[:, :half], images[:, :, ::2, ::2]), (one[:, half:], images[:, :, 1::2, 1::2]))
        ]
        return Normalise(self.affine, self.copies)(jnp.concatenate(made))


class Separable(nn.Module):
    """ReLU, a depthwise and a 1 x 1 convolution, normalisation; ``repeats`` times, only the first with the stride."""

    width: int
    stride: int
    dilation: int
    repeats: int
    affine: bool
    copies: int
    form: Form

    @nn.compact
    def __call__(self, images: Array) -> Array:
        channels, copies = len(images), self.copies
        images = jnp.concatenate([images] * copies)
        for turn in range(self.repeats):
            # fan-in is all but the last axis (and the copies): the places of the window
            window = self.param(f"depthwise{turn}", _start, (copies, self.width**2, channels), images.dtype)
            window = window.transpose(0, 2, 1).reshape(copies * channels, -1)
            images = depthwise(jax.nn.relu(images), window, 1 if turn else self.stride, self.dilation, self.form)
            images = pointwise(images, self.param(f"pointwise{turn}", _start, (copies, channels, channels), images.dtype))
            images = Normalise(self.affine, copies, name=f"normalise{turn}")(images)
        return images


class Operation(nn.Module):
    """One operation for ``copies`` nodes: a list with an image for each."""

    operation: Name
    stride: int
    affine: bool
    copies: int
    form: Form

    @nn.compact
    def __call__(self, images: Array) -> list[Array]:
        common = (self.affine, self.copies, self.form)
        match self.operation:
            case "none":
                return [jnp.zeros_like(images[:, :, :: self.stride, :: self.stride])] * self.copies
            case "skip" if self.stride == 1:
                return [images] * self.copies
            case "skip":
                made = Halve(len(images), self.affine, self.copies)(images)
            case "max_3x3" | "avg_3x3":
                return [Normalise()(pool(images, "max" if self.operation == "max_3x3" else "avg", self.stride))] * self.copies
            case "sep_3x3" | "sep_5x5":
                made = Separable(int(self.operation[-1]), self.stride, 1, 2, *common)(images)
            case "dil_3x3" | "dil_5x5":
                made = Separable(int(self.operation[-1]), self.stride, 2, 1, *common)(images)
        return jnp.split(made, self.copies)
