"""Hypergradients through 100 steps of gradient descent: weights of the examples of a 784-128-10 tanh network.

Inner loss ``mean_i sigmoid(x_i) CE_i(z)``, outer loss ``mean CE(z)`` on other examples; full batches, learning rate 0.05.
"""

import importlib
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from bilevel_jax import Batch, Levels, Problem, hypergrad
from bilevel_jax.types import Array, PyTree
from experiments.speed.cases import Case, Function, Outcome, lenient

RATE = 0.05


class Sizes(NamedTuple):
    """Examples of each level, sizes of the layers, inner steps."""

    examples: int = 512
    layers: tuple[int, int, int] = (784, 128, 10)
    steps: int = 100


def _cross_entropy(z: PyTree, data: tuple[Array, Array]) -> Array:
    features, labels = data
    hidden = jnp.tanh(features @ z["w1"] + z["b1"][None])
    return optax.softmax_cross_entropy_with_integer_labels(hidden @ z["w2"] + z["b2"][None], labels)


PROBLEM = Problem(
    inner=lambda z, x, data: jax.nn.sigmoid(x) * _cross_entropy(z, data),
    outer=lambda z, x, data: _cross_entropy(z, data),
)


def case(sizes: Sizes, dtype: Any = np.float32) -> Case:
    """Seed 0; the reference is the gradient of the plain scan, without checkpoints."""
    rng = np.random.default_rng(0)
    inputs, hidden, classes = sizes.layers
    inner, outer = (rng.standard_normal((sizes.examples, inputs)) for _ in range(2))
    inner_labels, outer_labels = (rng.integers(0, classes, sizes.examples, np.int32) for _ in range(2))
    w1, w2 = rng.standard_normal((inputs, hidden)) / 28, rng.standard_normal((hidden, classes)) / 11
    x = 0.1 * rng.standard_normal(sizes.examples)
    z = {"w1": w1, "b1": np.zeros(hidden), "w2": w2, "b2": np.zeros(classes)}

    z, x, inner, outer = jax.tree.map(lambda a: jnp.asarray(a, dtype), (z, x, inner, outer))
    data = Levels((inner, jnp.asarray(inner_labels)), (outer, jnp.asarray(outer_labels)))
    variants = {name: partial(make, sizes.steps) for name, make in VARIANTS.items()}
    arrays = {**z, "x": x, "inner": inner, "inner_labels": data.inner[1], "outer": outer, "outer_labels": data.outer[1]}
    return Case(
        f"unrolled {sizes.steps} steps",
        (z, x, data),
        np.asarray(jax.jit(_plain(sizes.steps))(z, x, data).gradient, float),
        variants,
        floor="scan by hand",
        scale=1.0,
        arrays={
            "kind": np.array("unrolled"),
            "steps": np.array(sizes.steps),
            "rate": np.array(RATE),
            **jax.tree.map(np.asarray, arrays),
        },
    )


def _plain(steps: int) -> Function:
    def function(z: PyTree, x: Array, data: Levels) -> Outcome:
        def loss(x: Array) -> Array:
            def step(z: PyTree, _: None) -> tuple[PyTree, None]:
                slope = jax.grad(lambda z: PROBLEM.inner(z, x, data.inner).mean())(z)
                return jax.tree.map(lambda a, b: a - RATE * b, z, slope), None

            return PROBLEM.outer(lax.scan(step, z, None, length=steps)[0], x, data.outer).mean()

        return Outcome(jax.grad(loss)(x))

    return function


def _ours(checkpoint: str, steps: int) -> Function:
    method = hypergrad.iterative(optax.sgd(RATE), steps, checkpoint=checkpoint)
    evaluate = hypergrad.hypergradient(PROBLEM, method)

    def function(z: PyTree, x: Array, data: Levels) -> Outcome:
        _, gradient, stats = evaluate(z, x, Batch(*data))
        return Outcome(gradient, code=stats.code)

    return function


def _optimistix(steps: int) -> Function:
    """Its gradient descent returns the iterate before the last step, hence one step more."""
    optx: Any = importlib.import_module("optimistix")

    def function(z: PyTree, x: Array, data: Levels) -> Outcome:
        def loss(x: Array) -> Array:
            found = optx.minimise(
                lambda z, x: PROBLEM.inner(z, x, data.inner).mean(),
                optx.GradientDescent(RATE, rtol=0.0, atol=0.0),
                z,
                x,
                max_steps=steps + 1,
                adjoint=optx.RecursiveCheckpointAdjoint(),
                throw=False,
            )
            return PROBLEM.outer(found.value, x, data.outer).mean()

        return Outcome(jax.grad(loss)(x))

    return lenient(function)


VARIANTS: dict[str, Callable[[int], Function]] = {
    "scan by hand": _plain,
    "ours none": partial(_ours, "none"),
    "ours step": partial(_ours, "step"),
    "ours sqrt": partial(_ours, "sqrt"),
    "optimistix recursive": _optimistix,
}
