"""The meta-gradients of `experiments.speed.meta`: 5-way 1-shot tasks of synthetic images, two networks, variants of ours."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax import lax
from jax.flatten_util import ravel_pytree
from jax.sharding import PartitionSpec

from bilevel_jax import Batch, Problem, Vars, solvers
from bilevel_jax.types import Array, PyTree
from experiments.networks import MLP, Convolution, Form, Model, functional
from experiments.speed.cases import Case, Function, Outcome, lenient

RATE = 0.1


class Sizes(NamedTuple):
    """Tasks, classes, query images of each class, pixels of a side, inner steps."""

    tasks: int = 32
    ways: int = 5
    queries: int = 15
    side: int = 28
    steps: int = 5


class TwoConvolutions(nnx.Module):
    """Two 3 x 3 convolutions of stride 2 with 16 and 32 channels, ReLU, and a linear head."""

    def __init__(self, side: int, ways: int, *, form: Form, rngs: nnx.Rngs) -> None:
        pairs = ((1, 16), (16, 32))
        self.body = nnx.List([Convolution(a, b, stride=2, rngs=rngs, form=form) for a, b in pairs])
        self.head = nnx.Linear((-(-side // 4)) ** 2 * 32, ways, rngs=rngs)

    def __call__(self, images: Array) -> Array:
        for layer in self.body:
            images = nnx.relu(layer(images))
        return self.head(images.reshape(len(images), -1))


def network(kind: str, sizes: Sizes, form: Form = "matmul") -> Model:
    """``"convolution"`` or ``"mlp"`` (two layers of 64); the parameters do not depend on the form.

    They are 0.7 times those of flax, from which five steps lose a digit more in float32.
    """
    rngs = nnx.Rngs(0)
    if kind == "mlp":
        model = functional(MLP(sizes.side**2, sizes.ways, widths=(64, 64), rngs=rngs))
    else:
        model = functional(TwoConvolutions(sizes.side, sizes.ways, form=form, rngs=rngs))
    return model._replace(params=jax.tree.map(lambda leaf: 0.7 * leaf.astype(jnp.float32), model.params))


def draw_tasks(sizes: Sizes) -> tuple[tuple[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]:
    """Support and query: images ``[tasks, images, side, side, 1]``, a normal prototype of the class and noise; and labels."""
    rng = np.random.default_rng(0)
    shape = (sizes.side, sizes.side, 1)
    prototypes = rng.standard_normal((sizes.tasks, sizes.ways, *shape))

    def level(each: int) -> tuple[np.ndarray, np.ndarray]:
        labels = np.tile(np.arange(sizes.ways, dtype=np.int32), each)
        images = prototypes[:, labels] + 0.7 * rng.standard_normal((sizes.tasks, len(labels), *shape))
        return images.astype(np.float32), np.tile(labels, (sizes.tasks, 1))

    return level(1), level(sizes.queries)


def loss_of(model: Model) -> Callable[[PyTree, PyTree, Any], Array]:
    """Mean cross-entropy, as a loss of a problem."""

    def loss(z: PyTree, x: PyTree, data: tuple[Array, Array]) -> Array:
        del x
        return optax.softmax_cross_entropy_with_integer_labels(model.apply(z, data[0]), data[1]).mean()

    return loss


def case(kind: str, sizes: Sizes) -> Case:
    """The meta-gradient of one batch of tasks; the reference is in float64, written out."""
    model, (support, query) = network(kind, sizes), draw_tasks(sizes)
    variants = {name: partial(make, kind, sizes) for name, make in VARIANTS.items() if kind != "mlp" or "lax.conv" not in name}
    layers = [jax.tree.map(np.asarray, layer) for layer in jax.tree.leaves(model.params, is_leaf=lambda part: "kernel" in part)]
    arrays = {f"{name}{i}": leaf for i, layer in enumerate(layers) for name, leaf in layer.items()}
    arrays |= {"inner": support[0], "inner_labels": support[1], "outer": query[0], "outer_labels": query[1]}
    return Case(
        f"maml {kind}",
        (model.params, *jax.tree.map(jnp.asarray, (support, query))),
        reference(model, support, query, sizes.steps),
        variants,
        floor="ours scan",
        scale=1.0,
        arrays=arrays | {"kind": np.array(kind), "steps": np.array(sizes.steps), "rate": np.array(RATE)},
    )


def reference(model: Model, support: Any, query: Any, steps: int) -> np.ndarray:
    """Through inner steps without the library, one task after the other, in float64."""
    loss = loss_of(model)

    def value(params: PyTree, own: Any, other: Any) -> Array:
        z = params
        for _ in range(steps):
            z = jax.tree.map(lambda a, b: a - RATE * b, z, jax.grad(loss)(z, None, own))
        return loss(z, None, other)

    @lenient
    def mean(params: PyTree, support: Any, query: Any) -> Any:
        found = lax.map(lambda data: ravel_pytree(jax.grad(value)(params, *data))[0], (support, query))
        return found.mean(0)

    with jax.enable_x64(True):
        exact = jax.tree.map(
            lambda a: jnp.asarray(a, jnp.float64 if np.issubdtype(a.dtype, np.floating) else None),
            (model.params, support, query),
        )
        return np.asarray(jax.jit(mean)(*exact))


def _ours(loop: str, kind: str, sizes: Sizes, *, form: Form = "matmul", checkpoint: str = "step", devices: int = 1) -> Function:
    """An update of MAML, of which the first link of the outer optimiser keeps the gradient."""
    loss = loss_of(network(kind, sizes, form))
    links = [optax.ema(0.0, debias=False), optax.sgd(1e-3)]
    if devices > 1:
        links.insert(0, optax.stateless(lambda updates, params: lax.pmean(updates, "tasks")))
    opts = Vars(inner=optax.sgd(RATE), outer=optax.chain(*links))
    solver = solvers.maml(Problem(loss, loss), opts, inner_steps=sizes.steps, loop=loop, checkpoint=checkpoint)

    def gradient(params: PyTree, support: Any, query: Any) -> PyTree:
        batch = Batch(*jax.tree.map(lambda leaf: leaf[None], (support, query)))
        state = solver.update(solver.init(Vars(outer=params), batch), batch)
        return state.stages[0].opt[-2].ema

    if devices > 1:
        mesh = jax.make_mesh((devices,), ("tasks",), axis_types=(jax.sharding.AxisType.Auto,))
        of_tasks, whole = PartitionSpec("tasks"), PartitionSpec()
        sharded = jax.shard_map(gradient, mesh=mesh, in_specs=(whole, of_tasks, of_tasks), out_specs=whole, check_vma=False)
    else:
        sharded = gradient
    return lenient(lambda params, support, query: Outcome(ravel_pytree(sharded(params, support, query))[0]))


def _sharded(kind: str, sizes: Sizes) -> Function:
    if jax.device_count() < 2:
        raise ImportError("needs two devices: XLA_FLAGS=--xla_force_host_platform_device_count=2")
    return _ours("scan", kind, sizes, devices=2)


VARIANTS: dict[str, Callable[[str, Sizes], Function]] = {
    "ours scan": partial(_ours, "scan"),
    "ours scan, no checkpoints": partial(_ours, "scan", checkpoint="none"),
    "ours scan, two devices": _sharded,
    "ours vmap": partial(_ours, "vmap"),
    "ours vmap, no checkpoints": partial(_ours, "vmap", checkpoint="none"),
    "ours map": partial(_ours, "map"),
    "ours unrolled": partial(_ours, "unrolled"),
    "ours scan, lax.conv": partial(_ours, "scan", form="convolution"),
    "ours vmap, lax.conv": partial(_ours, "vmap", form="convolution"),
}
