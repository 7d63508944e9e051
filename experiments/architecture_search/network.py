"""Networks of two-input cells: the supernet, whose edges mix operations, and discrete networks, whose edges have one each.

Both are the same module on other edges: a discrete network is the supernet with everything left out that its cells do not
use, and so are its parameters.
"""

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from bilevel_jax.types import Array
from experiments.architecture_search.operations import ALL, Form, Halve, Name, Operation, Project, Stem


class Edge(NamedTuple):
    """From state ``source`` (0 and 1: the outputs of the two cells before; 2, ...: nodes) by one of the operations."""

    source: int
    operations: tuple[Name, ...]


#: For programs that draw starts: many small operations, which compile in a third of the time without optimisations.
QUICK = {"xla_backend_optimization_level": 0}

Node = tuple[Edge, ...]  # the edges that come in


class Cells(NamedTuple):
    """One entry for each of the two kinds of cells: nodes, or logits or weights of the mixtures ``[edges, operations]``."""

    normal: Any
    reduction: Any


class Shape(NamedTuple):
    """What a network has beside its cells."""

    cells: int  # those at one and at two thirds of the depth are reductions
    nodes: int  # of a cell
    channels: int  # of a node of the first cell
    size: int  # height and width of the images
    stride: int  # of the stem
    classes: int = 10
    form: Form = "matrix"


def everything(nodes: int, operations: tuple[Name, ...]) -> Cells:
    """The edges of the supernet: all operations from every earlier state to every node."""
    cell = tuple(tuple(Edge(source, operations) for source in range(node + 2)) for node in range(nodes))
    return Cells(cell, cell)


class Cell(nn.Module):
    """Two inputs, nodes that are sums over their edges, and the nodes side by side as output.

    Each state sends each operation to all nodes that take it, at once.  ``weights [edges, operations]``, edges in the order of
    the nodes; without, an edge is the sum of its operations (a discrete cell has one on each).
    """

    nodes: tuple[Node, ...]
    channels: int
    reduces: bool
    after_reduction: bool  # the older input is then twice as large as the newer one
    affine: bool
    form: Form

    @nn.compact
    def __call__(self, older: Array, newer: Array, weights: Array | None) -> Array:
        fit = Halve if self.after_reduction else Project
        inputs = [
            fit(self.channels, self.affine, name="older")(older),
            Project(self.channels, self.affine, name="newer")(newer),
        ]
        edges = [(n, edge) for n, node in enumerate(self.nodes) for edge in node]
        sums: list[list[Array]] = [[] for _ in self.nodes]
        for source in range(len(self.nodes) + 2):
            state = inputs[source] if source < 2 else sum(sums[source - 2][1:], sums[source - 2][0])
            if source >= 2:
                inputs.append(state)
            for name in ALL:
                takers = [
                    (n, row, edge) for row, (n, edge) in enumerate(edges) if edge.source == source and name in edge.operations
                ]
                if not takers:
                    continue
                stride = 2 if self.reduces and source < 2 else 1
                send = Operation(name, stride, self.affine, len(takers), self.form, name=f"from{source}_{name}")
                for image, (n, row, edge) in zip(send(state), takers, strict=True):
                    weight = 1.0 if weights is None else weights[row, edge.operations.index(name)]
                    sums[n].append(weight * image)
        return jnp.concatenate(inputs[2:])


class Network(nn.Module):
    """Images ``[batch, size, size, 3]`` to logits ``[batch, classes]``; ``weights``: of the mixtures of the edges, `Cells`."""

    shape: Shape
    cells: Cells
    affine: bool  # whether normalisations in the cells have scales and biases: not during a search

    @nn.compact
    def __call__(self, images: Array, weights: Cells | None = None) -> Array:
        shape, channels, reduced = self.shape, self.shape.channels, False
        older = newer = Stem(3 * channels, shape.stride, name="stem")(images.transpose(3, 0, 1, 2))
        for k in range(shape.cells):
            reduces = k in reductions(shape.cells)
            channels *= 2 if reduces else 1
            kind = "reduction" if reduces else "normal"
            cell = Cell(getattr(self.cells, kind), channels, reduces, reduced, self.affine, shape.form, name=f"cell{k}")
            older, newer = newer, cell(older, newer, None if weights is None else getattr(weights, kind))
            reduced = reduces
        return nn.Dense(shape.classes, param_dtype=images.dtype, name="classifier")(newer.mean((2, 3)).T)


def reductions(cells: int) -> set[int]:
    """The places of the reduction cells."""
    return {cells // 3, 2 * cells // 3}


def mixture(x: Cells) -> Cells:
    """The weights of the operations of every edge: the softmax of the logits ``[edges, operations]``."""
    return Cells(*(jax.nn.softmax(logits, axis=-1) for logits in x))


def parameters(network: Network) -> int:
    """How many there are."""
    size = network.shape.size
    images = jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32)
    return sum(leaf.size for leaf in jax.tree.leaves(jax.eval_shape(network.init, jax.random.key(0), images)))
