"""The bilevel problem of the search, and the methods: z the weights of the supernet, x the logits of its mixtures.

g is the cross-entropy on one half of the training images and half the weight decay times ``|z|^2``; f is the cross-entropy on
the other half.
"""

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from bilevel_jax import Batch, Levels, Problem, Solver, Vars, descend, hypergradient, solvers, sweep
from bilevel_jax.hypergrad import iterative
from bilevel_jax.oracles import losses
from bilevel_jax.types import Array, Calls, Oracle, PyTree, Terms
from experiments.architecture_search.network import Cells, Network, Shape, everything, mixture
from experiments.architecture_search.operations import Name

Part = tuple[Array, Array]  # images and labels
Method = Literal["darts_first", "darts_second", "meha"]


class Rates(NamedTuple):
    """Optimisers of a search: SGD with momentum, clipped gradients and cosine decay on z, Adam on x."""

    inner: float
    floor: float  # that the rate of z falls to
    outer: float
    inner_decay: float = 3e-4
    outer_decay: float = 1e-3
    momentum: float = 0.9
    gamma: float = 100.0  # of MEHA's envelope
    c_low: float = 1.0  # of MEHA's multiplier c_low (k + 1)^p
    p: float = 0.49


def supernet(shape: Shape, operations: tuple[Name, ...]) -> Network:
    """The network that is searched."""
    return Network(shape, everything(shape.nodes, operations), affine=False)


def start(network: Network, operations: tuple[Name, ...], key: Array) -> Vars:
    """Random weights, and logits that are nearly 0."""
    images = jnp.zeros((1, network.shape.size, network.shape.size, 3))
    keys = jax.random.split(key, 3)
    edges = sum(map(len, network.cells.normal))
    x = Cells(*(1e-3 * jax.random.normal(k, (edges, len(operations))) for k in keys[1:]))
    return Vars(inner=network.init(keys[0], images, mixture(x)), outer=x)


def bilevel(network: Network, decay: float) -> Problem:
    """z the variables of the network, x the logits (`Cells`), data (images [n, size, size, 3], labels [n])."""

    def entropy(z: PyTree, x: Cells, batch: Part) -> Array:
        images, labels = batch
        return optax.softmax_cross_entropy_with_integer_labels(network.apply(z, images, mixture(x)), labels)  # type: ignore

    def inner(z: PyTree, x: Cells, batch: Part) -> Array:
        return entropy(z, x, batch) + 0.5 * decay * sum(jnp.vdot(leaf, leaf) for leaf in jax.tree.leaves(z))

    return Problem(inner=inner, outer=entropy)


def alternating(problem: Problem) -> Oracle:
    """``Dz = d_z g`` and ``Dx = d_x f``: each level as if the other one were fixed."""
    g, f = losses(problem)

    def terms(vars: Vars, batch: Batch, step: Array) -> Terms:
        del step
        z, _, x = vars
        return Terms(Vars(inner=jax.grad(g)(z, x, batch)), Vars(outer=jax.grad(f, argnums=1)(z, x, batch)))

    return Oracle(terms, lambda moved: Calls(inner_gradient=float(moved.inner), outer_gradient=float(moved.outer)))


def lookahead(problem: Problem, rate: optax.Schedule) -> Oracle:
    """Dx, the derivative of ``x -> f(z - rate d_z g(z, x), x)``.

    The step ahead is a plain one; the public code of DARTS adds the momentum of z to it, and takes differences for the second
    derivative, which is exact here.
    """

    def terms(vars: Vars, batch: Batch, step: Array) -> Terms:
        method = iterative(optax.sgd(lambda count: rate(step)), 1, checkpoint="none")
        _, gradient, _ = hypergradient(problem, method)(vars.inner, vars.outer, batch)
        return Terms(outer=Vars(outer=gradient))

    return Oracle(terms, lambda moved: Calls(1.0, 1.0, 1.0, 1.0))


def build(method: Method, problem: Problem, rates: Rates, steps: int) -> Solver:
    """The method of a name, its rate of z decaying over ``steps`` updates.

    DARTS is composed by hand, x before z: the momentum of z must outlive a sweep, and in `bilevel_jax.solvers.itd_bio` and
    `fo_itd_bio`, where inner steps start anew, it does not.
    """
    rate = optax.cosine_decay_schedule(rates.inner, steps, rates.floor / rates.inner)
    inner = optax.chain(optax.clip_by_global_norm(5.0), optax.sgd(rate, momentum=rates.momentum))
    outer = optax.chain(optax.add_decayed_weights(rates.outer_decay), optax.adam(rates.outer, b1=0.5))
    first = alternating(problem)
    match method:
        case "darts_first":
            return sweep(descend(first, Vars(outer=outer)), descend(first, Vars(inner=inner)))
        case "darts_second":
            return sweep(descend(lookahead(problem, rate), Vars(outer=outer)), descend(first, Vars(inner=inner)))
        case "meha":
            opts = Vars(inner=inner, aux=inner, outer=outer)
            return solvers.meha(problem, opts, gamma=rates.gamma, c_low=rates.c_low, p=rates.p)


def measure(network: Network, vars: Vars, parts: dict[str, Part]) -> dict[str, Array]:
    """Loss and accuracy of the supernet on each part, in batches as large as those that it is normalised by in the search."""
    found, weights = {}, mixture(vars.outer)
    for name, (images, labels) in parts.items():  # [batches, rows, ...]
        logits = jax.lax.map(lambda batch: network.apply(vars.inner, batch, weights), images)
        found[f"{name}_loss"] = optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
        found[f"{name}_accuracy"] = (logits.argmax(-1) == labels).mean(dtype=jnp.float32)
    return found


def batched(part: Part, batch_size: int, rows: int) -> Part:
    """The first rows, whole batches only: ``[batches, batch_size, ...]``."""
    batches = min(rows, len(part[1])) // batch_size
    images, labels = (leaf[: batches * batch_size].reshape(batches, batch_size, *leaf.shape[1:]) for leaf in part)
    return images, labels


def halves(images: Array, labels: Array, key: Array) -> Levels:
    """The training images in random order, one half for g and one for f."""
    order, half = jax.random.permutation(key, len(labels)), len(labels) // 2
    return Levels(*((images[part], labels[part]) for part in (order[:half], order[half : 2 * half])))
