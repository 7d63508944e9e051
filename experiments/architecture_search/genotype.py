"""Discrete cells: from the logits of a search, at random, and as text."""

from typing import Any

import numpy as np

from experiments.architecture_search.network import Cells, Edge, Network, Node, Shape, parameters
from experiments.architecture_search.operations import Name


def discrete(x: Cells, operations: tuple[Name, ...]) -> Cells:
    """The two strongest edges into each node, each with its strongest operation; "none" does not count.

    The strength of an edge is the weight of that operation in its mixture.
    """
    real: list[int] = [k for k, name in enumerate(operations) if name != "none"]

    def cell(logits: np.ndarray) -> tuple[Node, ...]:
        weights = np.exp(logits - logits.max(-1, keepdims=True))
        weights = (weights / weights.sum(-1, keepdims=True))[:, real]
        nodes, row = [], 0
        while row < len(weights):
            mine = weights[row : row + len(nodes) + 2]
            sources = sorted(np.argsort(-mine.max(-1), kind="stable")[:2].tolist())
            nodes.append(tuple(Edge(s, (operations[real[int(mine[s].argmax())]],)) for s in sources))
            row += len(mine)
        return tuple(nodes)

    return Cells(*(cell(np.asarray(logits, np.float64)) for logits in x))


def random(rng: np.random.Generator, nodes: int, operations: tuple[Name, ...]) -> Cells:
    """Two edges into each node from different earlier states, each with an operation other than "none", all equally likely."""
    real: list[Name] = [name for name in operations if name != "none"]

    def edges(node: int) -> Node:
        sources = sorted(rng.choice(node + 2, size=2, replace=False).tolist())
        return tuple(Edge(source, (real[rng.integers(len(real))],)) for source in sources)

    def cell() -> tuple[Node, ...]:
        return tuple(edges(node) for node in range(nodes))

    return Cells(cell(), cell())


def of_size(
    budgets: list[int], rng: np.random.Generator, shape: Shape, operations: tuple[Name, ...], draws: int = 60
) -> list[Cells]:
    """A random cell for each number of parameters: of ``draws`` random cells the one nearest to it, none taken twice."""
    drawn = list(dict.fromkeys(random(rng, shape.nodes, operations) for _ in range(draws)))
    sizes = [parameters(Network(shape, cells, affine=True)) for cells in drawn]
    chosen = []
    for budget in budgets:
        k = min((k for k in range(len(drawn)) if k not in chosen), key=lambda k: abs(sizes[k] - budget))
        chosen.append(k)
    return [drawn[k] for k in chosen]


def as_json(cells: Cells) -> dict[str, Any]:
    """``{"normal": [[[operation, source], [operation, source]], ...], "reduction": ...}``: a list of edges a node."""
    return {
        kind: [[[edge.operations[0], edge.source] for edge in node] for node in nodes]
        for kind, nodes in zip(Cells._fields, cells, strict=True)
    }


def from_json(known: dict[str, Any]) -> Cells:
    """The inverse of `as_json`."""
    return Cells(
        *(tuple(tuple(Edge(source, (name,)) for name, source in node) for node in known[kind]) for kind in Cells._fields)
    )
