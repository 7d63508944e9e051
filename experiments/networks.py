"""The networks of few-shot learning as flax modules, and any flax module as a function of its parameters.

On a CPU the convolutions of different weights that a loop over tasks asks for are far slower as XLA's convolutions than as
matrix products, so the convolution of these networks has a form as such.
"""

from collections.abc import Callable
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from bilevel_jax.types import Array, PyTree

Form = Literal["auto", "matmul", "convolution"]


class Model(NamedTuple):
    """A network without state: what a solver is given."""

    params: PyTree  # nested dictionaries, its last layer under "head"
    apply: Callable[[PyTree, Array], Array]


def functional(module: nnx.Module) -> Model:
    """The parameters of a flax module, and the function of them that it is."""
    graph, params = nnx.split(module, nnx.Param)
    return Model(nnx.to_pure_dict(params), lambda params, x: nnx.merge(graph, params)(x))


class Convolution(nnx.Module):
    """3 x 3 convolution with padding 1, ``[batch, h, w, channels] -> [batch, ceil(h / stride), ceil(w / stride), features]``.

    As a product of matrices, the nine shifted images side by side (im2col), or as XLA's convolution; ``"auto"`` takes the
    first on a CPU.
    """

    def __init__(self, channels: int, features: int, *, stride: int, rngs: nnx.Rngs, form: Form = "auto") -> None:
        self.kernel = nnx.Param(nnx.initializers.he_normal()(rngs.params(), (3, 3, channels, features), jnp.float32))
        self.bias = nnx.Param(jnp.zeros(features, jnp.float32))
        self.stride, self.form = stride, form

    def __call__(self, images: Array) -> Array:
        kernel, stride = self.kernel[...], self.stride
        form = ("matmul" if jax.default_backend() == "cpu" else "convolution") if self.form == "auto" else self.form
        if form == "convolution":
            axes = ("NHWC", "HWIO", "NHWC")
            made = lax.conv_general_dilated(images, kernel, (stride, stride), ((1, 1), (1, 1)), dimension_numbers=axes)
            return made + self.bias[...].reshape(1, 1, 1, -1)
        batch, high, wide, _ = images.shape
        high, wide = -(-high // stride), -(-wide // stride)
        padded = jnp.pad(images, ((0, 0), (1, 1), (1, 1), (0, 0)))
        rows = [slice(i, i + stride * (high - 1) + 1, stride) for i in range(3)]
        columns = [slice(j, j + stride * (wide - 1) + 1, stride) for j in range(3)]
        patches = jnp.concatenate([padded[:, i, j] for i in rows for j in columns], axis=-1)
        made = patches.reshape(batch * high * wide, -1) @ kernel.reshape(patches.shape[-1], -1)
        return (made + self.bias[...].reshape(1, -1)).reshape(batch, high, wide, -1)


class BatchNorm(nnx.Module):
    """Batch normalisation of ``[..., features]`` by mean and variance of the batch in hand, also at test time, as MAML does.

    A task says all that there is to know about it, and nothing is carried from one to another.
    """

    def __init__(self, features: int) -> None:
        self.scale = nnx.Param(jnp.ones(features, jnp.float32))
        self.shift = nnx.Param(jnp.zeros(features, jnp.float32))

    def __call__(self, rows: Array) -> Array:
        axes = tuple(range(rows.ndim - 1))
        away = rows - rows.mean(axes, keepdims=True)
        deviation = jnp.sqrt((away**2).mean(axes, keepdims=True) + 1e-3)
        row = (1,) * len(axes) + (-1,)
        return away / deviation * self.scale[...].reshape(row) + self.shift[...].reshape(row)


class Block(nnx.Module):
    """Convolution, batch normalisation and ReLU, halved by the stride of the convolution or by pooling."""

    def __init__(self, channels: int, features: int, *, pool: bool, rngs: nnx.Rngs, form: Form) -> None:
        self.convolution = Convolution(channels, features, stride=1 if pool else 2, rngs=rngs, form=form)
        self.norm = BatchNorm(features)
        self.pool = pool

    def __call__(self, images: Array) -> Array:
        made = nnx.relu(self.norm(self.convolution(images)))
        if not self.pool:
            return made
        batch, high, wide, features = made.shape
        made = made[:, : high // 2 * 2, : wide // 2 * 2].reshape(batch, high // 2, 2, wide // 2, 2, features)
        left = jnp.maximum(made[:, :, 0], made[:, :, 1])  # pairs: twice as fast as reduce_window, forward and backward
        return jnp.maximum(left[:, :, :, 0], left[:, :, :, 1])


class ConvNet(nnx.Module):
    """Four blocks of ``features`` channels and a linear head: ``[batch, h, w, channels]`` to logits ``[batch, ways]``."""

    def __init__(
        self,
        shape: tuple[int, int, int],
        ways: int,
        *,
        features: int,
        rngs: nnx.Rngs,
        pool: bool = False,
        form: Form = "auto",
    ) -> None:
        high, wide, channels = shape
        blocks = []
        for before in (channels, features, features, features):
            if pool and min(high, wide) < 2:
                raise ValueError(f"pool: got images {shape[0]} x {shape[1]}, expected at least 16 x 16 for four times two")
            blocks.append(Block(before, features, pool=pool, rngs=rngs, form=form))
            high, wide = (high // 2, wide // 2) if pool else (-(-high // 2), -(-wide // 2))
        self.body = nnx.List(blocks)
        self.head = nnx.Linear(high * wide * features, ways, rngs=rngs)

    def __call__(self, images: Array) -> Array:
        for block in self.body:
            images = block(images)
        return self.head(images.reshape(len(images), -1))


class MLP(nnx.Module):
    """ReLU layers of the given widths and a linear head: ``[batch, ...] -> [batch, out]``."""

    def __init__(self, size: int, out: int, *, widths: tuple[int, ...], rngs: nnx.Rngs) -> None:
        sizes = (size, *widths)
        self.body = nnx.List([nnx.Linear(a, b, rngs=rngs) for a, b in zip(sizes, widths, strict=False)])
        self.head = nnx.Linear(sizes[-1], out, rngs=rngs)

    def __call__(self, rows: Array) -> Array:
        rows = rows.reshape(len(rows), -1)
        for layer in self.body:
            rows = nnx.relu(layer(rows))
        return self.head(rows)
