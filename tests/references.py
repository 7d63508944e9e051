"""The solvers once more, in plain NumPy, from the formulas of their papers and for the quadratic only.

Nothing here comes from the library: a block is the sum of its rows times blocks/n, a direction is written out, and a SAGA
table is five arrays that are read and written at once.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np

from tests.tables import (
    BALL,
    C_LOW,
    CONSTANTS,
    GAMMA,
    MU,
    MULTIPLIER,
    PERIOD,
    POWER,
    RADIUS,
    RATE,
    REGULARISATION,
    STRENGTH,
    TAU,
    THETA,
    WIDTH,
    falling_rate,
    falling_tolerance,
    falling_weight,
    growing_multiplier,
    growing_steps,
)

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
    chance: list[Any]  # [updates]: coins of SPABA, lengths of random products, directions of PZOBO


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
    return recursive(run, run.chance)


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


# ---- v solved for, in a sweep of z, v and x; H_i v = -d_z f_j ---------------------------------------------------------


def inner(run: Run, draw: tuple[int, int]) -> Arrays:
    return run.data.block(0, draw[0])


def outer(run: Run, draw: tuple[int, int]) -> Arrays:
    return run.data.block(1, draw[1])


def gradient_steps(gs: list[Arrays], z: np.ndarray, x: np.ndarray, steps: list[float]) -> np.ndarray:
    """One step on each of the samples."""
    for g, a in zip(gs, steps, strict=True):
        z = z - a * (g["A"] @ z + g["C"].T @ x + g["b"])
    return z


def outer_step(run: Run, draw: tuple[int, int], point: Point, step: float) -> np.ndarray:
    """x along d_x f + d2_xz g v."""
    z, v, x = point
    return x - step * (outer_terms(outer(run, draw), z, x)[1] + inner(run, draw)["C"] @ v)


def conjugate_gradients(A: np.ndarray, b: np.ndarray, v: np.ndarray, most: int, target: float) -> np.ndarray:
    r = b - A @ v
    p = r
    for _ in range(most):
        if np.linalg.norm(r) <= target:
            break
        alpha = (r @ r) / (p @ A @ p)
        v, new = v + alpha * p, r - alpha * A @ p
        r, p = new, new + (new @ new) / (r @ r) * p
    return v


def heavy_ball(A: np.ndarray, fz: np.ndarray, v: np.ndarray, steps: int, L: float, mu: float) -> np.ndarray:
    lam = 4 / (L**0.5 + mu**0.5) ** 2
    th = max((1 - (lam * mu) ** 0.5) ** 2, (1 - (lam * L) ** 0.5) ** 2)
    before = v
    for _ in range(steps):
        v, before = v - lam * (A @ v + fz) + th * (v - before), v
    return v


def neumann_sum(matrices: list[np.ndarray], fz: np.ndarray, eta: float) -> np.ndarray:
    """-eta sum_q (I - eta H_q-1) ... (I - eta H_0) d_z f, one summand more than matrices."""
    r = -fz
    total = r
    for H in matrices:
        r = r - eta * H @ r
        total = total + r
    return eta * total


def random_product(matrices: list[np.ndarray], fz: np.ndarray, eta: float, terms: int, length: int) -> np.ndarray:
    r = -fz
    for H in matrices[:length]:
        r = r - eta * H @ r
    return terms * eta * r


def sweeps(run: Run, solve_inner: Any, solve_aux: Any, draws: tuple[int, int]) -> Iterator[Point]:
    """z, v and x in turn, on the first ``draws[0]`` draws of an update, the next ``draws[1]``, and one more."""
    z, v, x = run.start
    for t, taken in enumerate(run.draws):
        first, second, (last,) = taken[: draws[0]], taken[draws[0] : sum(draws)], taken[sum(draws) :]
        z = solve_inner(t, [inner(run, d) for d in first], z, x)
        hessians = [inner(run, d)["A"] for d in second]
        v = solve_aux(t, hessians, outer_terms(outer(run, second[0]), z, x)[0], v)
        x = outer_step(run, last, (z, v, x), run.steps(t)[2])
        yield z, v, x


def restarted(run: Run, count: int) -> list[float]:
    """The step sizes of an optimiser of z that is started anew in every sweep."""
    return [run.steps(k)[0] for k in range(count)]


def going_on(run: Run, t: int, count: int) -> list[float]:
    return [run.steps(t * count + k)[0] for k in range(count)]


def aid_bio(run: Run) -> Iterator[Point]:
    """Two inner steps and two steps of conjugate gradients, both warm, each on one draw."""
    return sweeps(
        run,
        lambda t, gs, z, x: gradient_steps(gs * 2, z, x, restarted(run, 2)),
        lambda t, hs, fz, v: conjugate_gradients(hs[0], -fz, v, 2, 0.0),
        (1, 1),
    )


def aid_fp(run: Run) -> Iterator[Point]:
    def fixed_point(t, hs, fz, v):
        for _ in range(2):
            v = v - RATE * (hs[0] @ v + fz)
        return v

    return sweeps(run, lambda t, gs, z, x: gradient_steps(gs * 2, z, x, restarted(run, 2)), fixed_point, (1, 1))


def ba(run: Run) -> Iterator[Point]:
    """More inner steps from sweep to sweep, an accurate solve from 0."""

    def solve_inner(t, gs, z, x):
        count = int(np.ceil(growing_steps(t)))
        return gradient_steps(gs * count, z, x, restarted(run, count))

    return sweeps(
        run, solve_inner, lambda t, hs, fz, v: conjugate_gradients(hs[0], -fz, 0 * v, 99, 1.5e-8 * np.linalg.norm(fz)), (1, 1)
    )


def hoag(run: Run) -> Iterator[Point]:
    """Both levels to a falling tolerance."""

    def solve_inner(t, gs, z, x):
        for k in range(1000):
            slope = gs[0]["A"] @ z + gs[0]["C"].T @ x + gs[0]["b"]
            if np.linalg.norm(slope) <= falling_tolerance(t):
                break
            z = z - run.steps(k)[0] * slope
        return z

    return sweeps(run, solve_inner, lambda t, hs, fz, v: conjugate_gradients(hs[0], -fz, v, 1000, falling_tolerance(t)), (1, 1))


def bsa(run: Run) -> Iterator[Point]:
    return sweeps(
        run,
        lambda t, gs, z, x: gradient_steps(gs, z, x, going_on(run, t, 2)),
        lambda t, hs, fz, v: random_product(hs[1:], fz, falling_rate(t), 2, run.chance[t]),
        (2, 3),
    )


def ttsa(run: Run) -> Iterator[Point]:
    return sweeps(
        run,
        lambda t, gs, z, x: gradient_steps(gs, z, x, going_on(run, t, 1)),
        lambda t, hs, fz, v: random_product(hs[1:], fz, RATE, 3, run.chance[t]),
        (1, 4),
    )


def stocbio(run: Run, summands: int = 3) -> Iterator[Point]:
    """The factor that is applied first is a mean over two samples."""

    def solve_aux(t, hs, fz, v):
        return neumann_sum([(hs[1] + hs[2]) / 2, hs[3]][: summands - 1], fz, RATE)

    return sweeps(run, lambda t, gs, z, x: gradient_steps(gs, z, x, going_on(run, t, 1)), solve_aux, (1, 4))


def amigo(run: Run) -> Iterator[Point]:
    """Steps on v with the right-hand side of one sample."""

    def solve_aux(t, hs, fz, v):
        for H in hs[1:]:
            v = v - falling_rate(t) * (H @ v + fz)
        return v

    return sweeps(run, lambda t, gs, z, x: gradient_steps(gs, z, x, going_on(run, t, 2)), solve_aux, (2, 3))


def accelerated_loops(run: Run, draws: list[tuple[int, int]], z: np.ndarray, v: np.ndarray, x: np.ndarray) -> Any:
    """Nesterov's two sequences and the heavy ball, two steps of each, and the hypergradient at the extrapolated z."""
    L, mu, (first, second, third) = CONSTANTS["smoothness"], CONSTANTS["strong_convexity"], draws
    g, root = inner(run, first), (L / mu) ** 0.5
    before = s = z
    for _ in range(2):
        new = s - (g["A"] @ s + g["C"].T @ x + g["b"]) / L
        s, before = 2 * root / (root + 1) * new - (root - 1) / (root + 1) * before, new
    v = heavy_ball(inner(run, second)["A"], outer_terms(outer(run, second), s, x)[0], v, 2, L, mu)
    return s, v, outer_terms(outer(run, third), s, x)[1] + inner(run, third)["C"] @ v


def accbio(run: Run) -> Iterator[Point]:
    (z, v, x), L, mu = run.start, CONSTANTS["outer_smoothness"], CONSTANTS["outer_strong_convexity"]
    w, q = x, ((L / mu) ** 0.5 - 1) / ((L / mu) ** 0.5 + 1)
    for draws in run.draws:
        z, v, G = accelerated_loops(run, draws, z, v, x)
        new = x - G / L
        x, w = (1 + q) * new - q * w, new
        yield z, v, x


def accbio_bg(run: Run) -> Iterator[Point]:
    (z, v, x), L, mu = run.start, CONSTANTS["outer_smoothness"], CONSTANTS["outer_strong_convexity"]
    alpha, w = 1 / (2 * L), x
    s = (alpha * mu) ** 0.5
    eta, tau, beta = s / (s + 2), s / 2, (alpha / mu) ** 0.5
    for draws in run.draws:
        middle = eta * x + (1 - eta) * w
        z, v, G = accelerated_loops(run, draws, z, v, middle)
        x, w = tau * middle + (1 - tau) * x - beta * G, middle - alpha * G
        yield z, v, eta * x + (1 - eta) * w


# ---- recursive --------------------------------------------------------------------------------------------------------


def estimates(g: Arrays, f: Arrays, z: np.ndarray, x: np.ndarray, solve: Any) -> Any:
    """d_z g, and the hypergradient with v = solve(d_z f)."""
    fz, fx = outer_terms(f, z, x)
    return g["A"] @ z + g["C"].T @ x + g["b"], fx + g["C"] @ solve(fz)


def on_draws(run: Run, draws: list[tuple[int, int]], z: np.ndarray, x: np.ndarray, length: int | None = None) -> Any:
    hs = [inner(run, d)["A"] for d in draws[1:]]

    def solve(fz):
        return neumann_sum(hs, fz, RATE) if length is None else random_product(hs, fz, RATE, len(hs), length)

    return estimates(inner(run, draws[0]), outer(run, draws[0]), z, x, solve)


def double_momentum(run: Run, lengths: list[Any]) -> Iterator[Point]:
    """Both points of a correction on the same samples; eta_t = (t + 1)^-2/3."""
    z, v, x = run.start
    way = old = None
    for t, draws in enumerate(run.draws):
        new, eta = on_draws(run, draws, z, x, lengths[t]), (t + 1) ** (-2 / 3)
        if old is None:
            way = new
        else:
            before = on_draws(run, draws, *old, lengths[t])
            way = tuple(n + (1 - eta) * (w - b) for n, w, b in zip(new, way, before, strict=True))
        a, _, c = run.steps(t)
        old, (z, x) = (z, x), (z - a * way[0], x - c * way[1])
        yield z, v, x


def mrbo(run: Run) -> Iterator[Point]:
    return double_momentum(run, [None] * len(run.draws))


def sustain(run: Run) -> Iterator[Point]:
    return double_momentum(run, run.chance)


def vrbo(run: Run, across_x: bool = True) -> Iterator[Point]:
    """The first difference is taken across the step of x, unless told otherwise, the second across that of z."""
    z, v, x = run.start
    way: Any = None
    for t, draws in enumerate(run.draws):
        if t % PERIOD == 0:
            g, f = run.data.mean(0), run.data.mean(1)
            way = estimates(g, f, z, x, lambda fz, H=g["A"]: neumann_sum([H, H], fz, RATE))
        new_x = x - run.steps(t)[2] * way[1]
        old = (z, x if across_x else new_x)
        for last, window in enumerate((draws[:3], draws[3:])):
            new, before = on_draws(run, window, z, new_x), on_draws(run, window, *old)
            way = tuple(w + n - b for w, n, b in zip(way, new, before, strict=True))
            if not last:
                old, z = (z, new_x), z - run.steps(t)[0] * way[0]
        x = new_x
        yield z, v, x


def stable(run: Run) -> Iterator[Point]:
    """The second derivatives of the quadratic are the same at the old and at the new point."""
    (z, _, x), H, J = run.start, None, None
    for t, (draw,) in enumerate(run.draws):
        g, f = inner(run, draw), outer(run, draw)
        H = g["A"] if H is None else (1 - TAU) * (H - g["A"]) + g["A"]
        J = g["C"] if J is None else (1 - TAU) * (J - g["C"]) + g["C"]
        values, basis = np.linalg.eigh(H)
        inverse = basis @ np.diag(1 / np.maximum(values, MU)) @ basis.T
        (fz, fx), (a, _, c) = outer_terms(f, z, x), run.steps(t)
        v = -inverse @ fz
        new = x - c * (fx + J @ v)
        z = z - a * (g["A"] @ z + g["C"].T @ x + g["b"]) - inverse @ J.T @ (new - x)
        x = new
        yield z, v, x


# ---- unrolled ---------------------------------------------------------------------------------------------------------


def itd_bio(run: Run) -> Iterator[Point]:
    """Two steps, each on a draw of its own, and the reverse pass through them."""
    z, v, x = run.start
    steps = restarted(run, 2)
    for t, draws in enumerate(run.draws):
        gs = [inner(run, d) for d in draws[:2]]
        z = gradient_steps(gs, z, x, steps)
        fz, fx = outer_terms(outer(run, draws[2]), z, x)
        q, S = -fz, np.zeros_like(x)
        for g, a in zip(gs[::-1], steps[::-1], strict=True):
            S = S + a * g["C"] @ q
            q = q - a * g["A"] @ q
        x = x - run.steps(t)[2] * (fx + S)
        yield z, v, x


def fo_itd_bio(run: Run) -> Iterator[Point]:
    z, v, x = run.start
    for t, (draw,) in enumerate(run.draws):
        z = gradient_steps([inner(run, draw)] * 2, z, x, restarted(run, 2))
        x = x - run.steps(t)[2] * outer_terms(outer(run, draw), z, x)[1]
        yield z, v, x


def pzobo(run: Run) -> Iterator[Point]:
    """The difference of two paths from one start, on one draw, along the direction of the update."""
    z, v, x = run.start
    for t, (draw,) in enumerate(run.draws):
        u, gs, steps = run.chance[t], [inner(run, draw)] * 2, restarted(run, 2)
        end, beside = gradient_steps(gs, z, x, steps), gradient_steps(gs, z, x + RADIUS * u, steps)
        fz, fx = outer_terms(outer(run, draw), end, x)
        z, x = end, x - run.steps(t)[2] * (fx + ((beside - end) / RADIUS) @ fz * u)
        yield z, v, x


def bda(run: Run) -> Iterator[Point]:
    """Three steps along both losses, always from one start, and the reverse pass through them, on one draw."""
    z, y, x = run.start
    steps, weights = restarted(run, 3), [0.5 / (k + 1) for k in range(3)]
    for t, (draw,) in enumerate(run.draws):
        g, f, z = inner(run, draw), outer(run, draw), y
        for a, mu in zip(steps, weights, strict=True):
            z = z - a * ((1 - mu) * slope(g, z, x) + mu * outer_terms(f, z, x)[0])
        q, fx = outer_terms(f, z, x)
        S = np.zeros_like(x)
        for a, mu in zip(steps[::-1], weights[::-1], strict=True):
            S = S - a * ((1 - mu) * g["C"] @ q + mu * f["E"] @ q)
            q = q - a * ((1 - mu) * g["A"] @ q + mu * f["B"] @ q)
        x = x - run.steps(t)[2] * (fx + S)
        yield z, y, x


def iaptt(run: Run, pick: Any = np.argmax) -> Iterator[Point]:
    """Three steps from a start that moves, too, and the reverse pass from the worst of them, on one draw."""
    z, y, x = run.start
    for t, (draw,) in enumerate(run.draws):
        g, f, (_, b, c) = inner(run, draw), outer(run, draw), run.steps(t)
        points = [y]
        for a in restarted(run, 3):
            points.append(points[-1] - a * slope(g, points[-1], x))
        worst = int(pick([outer_value(f, z, x) for z in points[1:]]))
        z = points[1 + worst]
        q, fx = outer_terms(f, z, x)
        S = np.zeros_like(x)
        for a in restarted(run, 3)[worst::-1]:
            S = S - a * g["C"] @ q
            q = q - a * g["A"] @ q
        y, x = y - b * q, x - c * (fx + S)
        yield z, y, x


# ---- first order: d_z g = A z + C'x + b, d_x g = C z -------------------------------------------------------------------


def slope(g: Arrays, z: np.ndarray, x: np.ndarray) -> np.ndarray:
    return g["A"] @ z + g["C"].T @ x + g["b"]


def inner_value(g: Arrays, z: np.ndarray, x: np.ndarray) -> Any:
    return z @ g["A"] @ z / 2 + x @ g["C"] @ z + g["b"] @ z


def outer_value(f: Arrays, z: np.ndarray, x: np.ndarray) -> Any:
    return z @ f["B"] @ z / 2 + x @ f["D"] @ x / 2 + x @ f["E"] @ z + f["e"] @ z + f["d"] @ x


def meha(run: Run, order: str = "theta x z") -> Iterator[Point]:
    """theta, x and z in turn, each on a draw of its own, f over c_k; ``theta_0 = z_0`` is what the run is started at."""
    z, theta, x = run.start
    for t, draws in enumerate(run.draws):
        (a, b, c), penalty = run.steps(t), C_LOW * (t + 1) ** POWER
        for name, draw in zip(order.split(), draws, strict=True):
            g, f = inner(run, draw), outer(run, draw)
            fz, fx = outer_terms(f, z, x)
            if name == "theta":
                theta = theta - b * (slope(g, theta, x) + (theta - z) / GAMMA)
            elif name == "x":
                x = x - c * (fx / penalty + g["C"] @ z - g["C"] @ theta)
            else:
                z = z - a * (fz / penalty + slope(g, z, x) - (z - theta) / GAMMA)
        yield z, theta, x


def penalised(run: Run, multiplier: Any, z_and_y: Any) -> Iterator[Point]:
    """Two steps of z and of y by ``z_and_y(t, draws)`` -> samples and steps, then x on the last draw."""
    z, y, x = run.start
    for t, draws in enumerate(run.draws):
        lam, (taken, counts) = multiplier(t), z_and_y(t, draws[:-1])
        for draw, k in zip(taken, counts, strict=True):
            (a, b, _), g = run.steps(k), inner(run, draw)
            z, y = z - a * slope(g, z, x), y - b * (slope(g, y, x) + outer_terms(outer(run, draw), y, x)[0] / lam)
        fx = outer_terms(outer(run, draws[-1]), y, x)[1]
        x = x - run.steps(t)[2] * (fx + lam * inner(run, draws[-1])["C"] @ (y - z))
        yield z, y, x


def f2sa(run: Run) -> Iterator[Point]:
    return penalised(run, growing_multiplier, lambda t, draws: (draws, [2 * t, 2 * t + 1]))


def f2ba(run: Run) -> Iterator[Point]:
    return penalised(run, lambda t: MULTIPLIER, lambda t, draws: (draws * 2, [0, 1]))


def f2sa_p(run: Run) -> Iterator[Point]:
    """Of order 4: the nodes -2, -1, 1, 2 over lam; z is the cubic through the four y at 0."""
    (z, ys, x), nodes, weights = run.start, (-2, -1, 1, 2), (1 / 12, -2 / 3, 2 / 3, -1 / 12)
    for t, (*draws, last) in enumerate(run.draws):
        lam, new = growing_multiplier(t), []
        for s, y in zip(nodes, ys, strict=True):
            for draw, a in zip(draws, going_on(run, t, 2), strict=True):
                y = y - a * (slope(inner(run, draw), y, x) + s / lam * outer_terms(outer(run, draw), y, x)[0])
            new.append(y)
        ys = np.stack(new)
        g, f = inner(run, last), outer(run, last)
        parts = [w * (g["C"] @ y + s / lam * outer_terms(f, y, x)[1]) for w, s, y in zip(weights, nodes, ys, strict=True)]
        z = (-ys[0] + 4 * ys[1] + 4 * ys[2] - ys[3]) / 6
        x = x - run.steps(t)[2] * lam * sum(parts)
        yield z, ys, x


def ahead(run: Run, direction: Any) -> Iterator[Point]:
    """w by two steps from y on one draw, then y and x together on another, along ``direction(t, g, f, w, y, x)``."""
    _, y, x = run.start
    for t, (first, last) in enumerate(run.draws):
        w = gradient_steps([inner(run, first)] * 2, y, x, restarted(run, 2))
        dy, dx = direction(t, inner(run, last), outer(run, last), w, y, x)
        y, x = y - run.steps(t)[1] * dy, x - run.steps(t)[2] * dx
        yield w, y, x


def bome(run: Run) -> Iterator[Point]:
    """phi = |grad q|^2 / 2."""

    def direction(t, g, f, w, y, x):
        size = len(y)
        q, h = np.concatenate([slope(g, y, x), g["C"] @ (y - w)]), np.concatenate(outer_terms(f, y, x))
        way = h + max(0.5 * q @ q - h @ q, 0.0) / (q @ q) * q
        return way[:size], way[size:]

    return ahead(run, direction)


def pbgd(run: Run) -> Iterator[Point]:
    def direction(t, g, f, w, y, x):
        (fz, fx), lam = outer_terms(f, y, x), growing_multiplier(t)
        return fz / lam + slope(g, y, x), fx + lam * g["C"] @ (y - w)

    return ahead(run, direction)


def by_value(run: Run, weigh: Any) -> Iterator[Point]:
    """z by two steps, y by two from there, and x, each on one draw; ``weigh(gap, falling)`` is the slope of the term."""
    z, _, x = run.start
    for t, draws in enumerate(run.draws):
        fall = 1.01**-t
        mu = REGULARISATION * fall
        (g0, g1, g2), (_, f1, f2) = [inner(run, d) for d in draws], [outer(run, d) for d in draws]

        def at_gap(g, y, z, x=x, mu=mu, fall=fall):
            return weigh(inner_value(g, y, x) - inner_value(g, z, x) - mu / 2 * z @ z, fall)

        for a in restarted(run, 2):
            z = z - a * (slope(g0, z, x) + mu * z)
        y = z
        for k in range(2):
            y = y - run.steps(k)[1] * (outer_terms(f1, y, x)[0] + at_gap(g1, y, z) * slope(g1, y, x) + mu * y)
        x = x - run.steps(t)[2] * (outer_terms(f2, y, x)[1] + at_gap(g2, y, z) * g2["C"] @ (y - z))
        yield z, y, x


def bvfim(run: Run) -> Iterator[Point]:
    """Within a tenth of the boundary the barrier goes on as its tangent."""
    return by_value(run, lambda gap, fall: STRENGTH * fall / max(WIDTH * fall - gap, WIDTH * fall / 10))


def bvfsm(run: Run) -> Iterator[Point]:
    return by_value(run, lambda gap, fall: max(gap, 0.0) / (WIDTH * fall))


def in_ball(v: np.ndarray) -> np.ndarray:
    return v * min(1.0, BALL / max(np.linalg.norm(v), 1e-300))


def hjfbio(run: Run) -> Iterator[Point]:
    """On a quadratic the differences of gradients are the products."""
    point = run.start
    for t, (draw,) in enumerate(run.draws):
        z, v, x = move(point, at_blocks(run, draw, point), run.steps(t))
        point = z, in_ball(v), x
        yield point


def fdehbo(run: Run) -> Iterator[Point]:
    """eta_t = (t + 1)^-2/3."""
    point = old = run.start
    way = tuple(np.zeros_like(part) for part in point)
    for t, (draw,) in enumerate(run.draws):
        new, before, eta = at_blocks(run, draw, point), at_blocks(run, draw, old), (t + 1) ** (-2 / 3)
        way = tuple(n + (1 - eta) * (w - b) for n, w, b in zip(new, way, before, strict=True))
        old, (z, v, x) = point, move(point, way, run.steps(t))
        point = z, in_ball(v), x
        yield point


def sl_bamm(run: Run) -> Iterator[Point]:
    """SOBA with (1 - mu) g + mu f for g, where f has second derivatives, too."""
    point = run.start
    for t, (draw,) in enumerate(run.draws):
        (z, v, x), mu, g, f = point, falling_weight(t), inner(run, draw), outer(run, draw)
        dz, hv, cross = inner_terms(g, z, v, x)
        fz, fx = outer_terms(f, z, x)
        way = [(1 - mu) * dz + mu * fz, (1 - mu) * hv + mu * f["B"] @ v + fz, (1 - mu) * cross + mu * f["E"] @ v + fx]
        point = move(point, way, run.steps(t))
        yield point


REFERENCES: dict[str, Callable[[Run], Iterator[Point]]] = {
    reference.__name__: reference
    for family in (
        (soba, ma_soba, saba, srba, spaba, storm_soba, fsla),
        (aid_bio, aid_fp, ba, hoag, bsa, ttsa, stocbio, amigo, accbio, accbio_bg),
        (mrbo, sustain, vrbo, stable, itd_bio, fo_itd_bio, pzobo),
        (meha, f2sa, f2ba, f2sa_p, bome, pbgd, bvfim, bvfsm, hjfbio, fdehbo, sl_bamm, bda, iaptt),
    )
    for reference in family
}
