"""The solvers once more, in plain NumPy, from the formulas of their papers and for the quadratic only.

Nothing here comes from the library: a block is the sum of its rows times blocks/n, a direction is written out, and a SAGA
table is five arrays that are read and written at once.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np

from tests.tables import PERIOD, THETA

Arrays = dict[str, np.ndarray]
Point = tuple[np.ndarray, np.ndarray, np.ndarray]


class Data(NamedTuple):
    """The samples of the quadratic, cut into blocks."""

    inner: Arrays
    outer: Arrays
    sizes: tuple[int, int]  # rows of an inner, of an outer block

    def blocks(self, level: int) -> int:
        rows = len(next(iter(self[level].values())))
        return -(-rows // self.sizes[level])

    def block(self, level: int, index: int) -> Arrays:
        """The rows of a block, summed, so that the mean over the blocks is the mean over the rows."""
        rows = slice(index * self.sizes[level], (index + 1) * self.sizes[level])
        return {name: leaf[rows].sum(0) * self.blocks(level) / len(leaf) for name, leaf in self[level].items()}

    def mean(self, level: int) -> Arrays:
        return {name: leaf.mean(0) for name, leaf in self[level].items()}


class Run(NamedTuple):
    """What a reference is run on."""

    data: Data
    draws: list[list[tuple[int, int]]]  # [updates][draws] of (inner block, outer block)
    start: Point
    steps: Callable[[int], tuple[float, float, float]]  # of z, v and x at update t
    refresh: list[bool]  # the coins of SPABA


def inner_terms(g: Arrays, z: np.ndarray, v: np.ndarray, x: np.ndarray) -> list[np.ndarray]:
    """d_z g, d2_zz g v, d2_xz g v."""
    return [g["A"] @ z + g["C"].T @ x + g["b"], g["A"] @ v, g["C"] @ v]


def outer_terms(f: Arrays, z: np.ndarray, x: np.ndarray) -> list[np.ndarray]:
    """d_z f, d_x f."""
    return [f["B"] @ z + f["E"].T @ x + f["e"], f["D"] @ x + f["E"] @ z + f["d"]]


def combine(terms: list[np.ndarray]) -> Point:
    """The three directions from the five terms."""
    dz, hv, cross, fz, fx = terms
    return dz, hv + fz, cross + fx


def direction(g: Arrays, f: Arrays, point: Point) -> Point:
    z, _, x = point
    return combine(inner_terms(g, *point) + outer_terms(f, z, x))


def move(point: Point, direction: Any, steps: tuple[float, float, float]) -> Point:
    z, v, x = (p - s * d for p, s, d in zip(point, steps, direction, strict=True))
    return z, v, x


def at_blocks(run: Run, draw: tuple[int, int], point: Point) -> Point:
    return direction(run.data.block(0, draw[0]), run.data.block(1, draw[1]), point)


def at_full(run: Run, point: Point) -> Point:
    return direction(run.data.mean(0), run.data.mean(1), point)


def soba(run: Run) -> Iterator[Point]:
    point = run.start
    for t, (draw,) in enumerate(run.draws):
        point = move(point, at_blocks(run, draw, point), run.steps(t))
        yield point


def ma_soba(run: Run) -> Iterator[Point]:
    """x moves along the new average (the paper's, along the old one)."""
    point, average = run.start, np.zeros_like(run.start[2])
    for t, (draw,) in enumerate(run.draws):
        dz, dv, dx = at_blocks(run, draw, point)
        average = (1 - THETA) * average + THETA * dx
        point = move(point, (dz, dv, average), run.steps(t))
        yield point


def saba(run: Run) -> Iterator[Point]:
    point = run.start
    (p, _, d), counts = (len(part) for part in run.start), (run.data.blocks(0), run.data.blocks(1))
    shapes = [(0, p), (0, p), (0, d), (1, p), (1, d)]
    tables = [np.zeros((counts[level], size)) for level, size in shapes]
    means = [np.zeros(size) for _, size in shapes]
    for t, (draw,) in enumerate(run.draws):
        z, v, x = point
        new = inner_terms(run.data.block(0, draw[0]), z, v, x) + outer_terms(run.data.block(1, draw[1]), z, x)
        terms = []
        for (level, _), table, mean, term in zip(shapes, tables, means, new, strict=True):
            change = term - table[draw[level]]
            terms.append(change + mean)  # the old mean
            mean += change / counts[level]
            table[draw[level]] = term
        point = move(point, combine(terms), run.steps(t))
        yield point


def recursive(run: Run, refresh: list[bool]) -> Iterator[Point]:
    """SARAH on all directions: SRBA and SPABA differ in when they refresh."""
    point = old = run.start
    way = tuple(np.zeros_like(part) for part in point)
    for t, (draw,) in enumerate(run.draws):
        if refresh[t]:
            way = at_full(run, point)
        else:
            new, before = at_blocks(run, draw, point), at_blocks(run, draw, old)
            way = tuple(w + n - b for w, n, b in zip(way, new, before, strict=True))
        old, point = point, move(point, way, run.steps(t))
        yield point


def srba(run: Run) -> Iterator[Point]:
    return recursive(run, [t % PERIOD == 0 for t in range(len(run.draws))])


def spaba(run: Run) -> Iterator[Point]:
    return recursive(run, run.refresh)


def storm_soba(run: Run) -> Iterator[Point]:
    """eta_t = (t + 1)^-2/3."""
    point = old = run.start
    way = tuple(np.zeros_like(part) for part in point)
    for t, (draw,) in enumerate(run.draws):
        new, before, eta = at_blocks(run, draw, point), at_blocks(run, draw, old), (t + 1) ** (-2 / 3)
        way = tuple(n + (1 - eta) * (w - b) for n, w, b in zip(new, way, before, strict=True))
        old, point = point, move(point, way, run.steps(t))
        yield point


def fsla(run: Run) -> Iterator[Point]:
    """z, then v, then x along its momentum, each on a draw of its own; eta_t = (t + 1)^-1/2."""
    (z, v, x), momentum, old = run.start, np.zeros_like(run.start[2]), None
    for t, (first, second, third) in enumerate(run.draws):
        a, b, c = run.steps(t)
        z = z - a * at_blocks(run, first, (z, v, x))[0]
        v = v - b * at_blocks(run, second, (z, v, x))[1]
        new, eta = at_blocks(run, third, (z, v, x))[2], (t + 1) ** -0.5
        before = new if old is None else at_blocks(run, third, old)[2]
        momentum = new if old is None else new + (1 - eta) * (momentum - before)
        old, x = (z, v, x), x - c * momentum
        yield z, v, x


REFERENCES: dict[str, Callable[[Run], Iterator[Point]]] = {
    "soba": soba,
    "ma_soba": ma_soba,
    "saba": saba,
    "srba": srba,
    "spaba": spaba,
    "storm_soba": storm_soba,
    "fsla": fsla,
}
