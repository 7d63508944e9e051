"""The rows of the table of `experiments.rates`: what theory says of a solver, measured on quadratics with closed forms."""

import math
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pandas as pd
from tqdm import tqdm

from bilevel_jax import Batch, Levels, Problem, Solver, Vars, begin, hypergrad, linear_solve, resume, samplers, solvers
from bilevel_jax.testing import Quadratic
from bilevel_jax.types import Array
from experiments.lower_bounds import claim, slope

Rows = list[dict[str, Any]]


def decay(rate: float, exponent: float, delay: float = 1.0) -> Callable[[Any], Any]:
    """``rate / (1 + t / delay)^exponent``."""
    return lambda t: rate * (1 + jnp.asarray(t, jnp.float64) / delay) ** -exponent


def single(make: Callable[..., Solver], inner: Any, outer: Any, **own: Any) -> Callable[[Problem], Solver]:
    """A solver that moves z, v and x, the first two with the same steps."""
    return lambda problem: make(problem, Vars(optax.sgd(inner), optax.sgd(inner), optax.sgd(outer)), **own)


def double(make: Callable[..., Solver], inner: Any, outer: Any, **own: Any) -> Callable[[Problem], Solver]:
    """A solver that moves z and x."""
    return lambda problem: make(problem, Vars(inner=optax.sgd(inner), outer=optax.sgd(outer)), **own)


# ---- the table: hypergradients and linear systems ---------------------------------------------------------------------


def curvature(q: Quadratic) -> tuple[float, float]:
    """The extreme eigenvalues of the Hessian of h."""
    values = jnp.linalg.eigvalsh(jax.jacobian(q.gradient)(q.start.outer))
    return float(values[0]), float(values[-1])


def decline(counts: Any, errors: Any) -> float:
    """Slope of the logarithm of the errors."""
    return float(np.polyfit(np.asarray(counts), np.log(np.asarray(errors)), 1)[0])


def truncation(q: Quadratic, mu: float, counts: tuple[int, ...] = (60, 120, 180, 240)) -> Rows:
    """Error of the hypergradient through D inner steps (z from 0, rate 1/L = 1) and of the Neumann sum.

    The counts are so large, and the eigenvalues so far apart, that only the smallest one is left in the error.
    """
    x = q.start.outer
    exact, best = q.gradient(x), q.at(x)
    A = q.data.inner["A"].mean(0)
    values, basis = np.linalg.eigh(np.asarray(A))
    itd, series, identity = [], [], 0.0
    right = -(A @ best.aux)
    for count in counts:
        method = hypergrad.hypergradient(q.problem, hypergrad.iterative(optax.sgd(1.0), count))
        itd.append(float(jnp.linalg.norm(method(q.start.inner, x, Batch(*q.data))[1] - exact)))
        v, _ = linear_solve.neumann(terms=count, rate=1.0).solve(lambda u: A @ u, -right)
        series.append(float(jnp.linalg.norm(v - best.aux)))
        formula = basis @ ((1 - (1 - values) ** (count + 1)) * (basis.T @ np.asarray(best.aux)))
        identity = max(identity, float(np.abs(v - formula).max()))
    theory = math.log1p(-mu)
    return [
        claim(
            "ITD: log error of the hypergradient against D, log(1 - a mu)",
            "=",
            theory,
            decline(counts, itd),
            -0.05 * theory,
        ),
        claim("Neumann: log bias against Q, log(1 - eta mu)", "=", theory, decline(counts, series), -0.05 * theory),
        claim("Neumann: distance to A^-1 (I - (I - eta A)^(Q+1)) b", "<=", 0, identity, 1e-12),
    ]


def variance(q: Quadratic, mu: float, repeats: int, sizes: tuple[int, ...] = (1, 4, 16), terms: int = 10) -> Rows:
    """E |v_Q - E v_Q|^2 of the stocBiO estimate against the batch of its Hessian products: equal, and nested batches."""
    samples, right, rate = q.data.inner["A"], -q.at(q.start.outer).aux, 0.9
    mean, _ = linear_solve.neumann(terms=terms, rate=rate).solve(lambda u: samples.mean(0) @ u, right)

    def error(batches: tuple[int, ...]) -> float:
        solver = linear_solve.neumann(terms=terms, rate=rate, fresh=True, batches=batches)

        def one(key: Array) -> Array:
            index = jax.random.randint(key, (sum(batches),), 0, len(samples))
            v, _ = solver.solve(lambda u, k: samples[index[k]] @ u, right)
            return jnp.sum((v - mean) ** 2)

        return float(jax.jit(jax.vmap(one))(jax.random.split(jax.random.key(3), repeats)).mean())

    equal = [error((size,) * terms) for size in sizes]
    nested = [error(linear_solve.nested_batches(terms, rate=rate, strong_convexity=mu, blocks=size)) for size in sizes]
    return [
        claim("stocBiO: variance against the batch, equal batches", "=", -1, slope(sizes, equal), 0.1),
        claim("stocBiO: variance against B, nested batches", "=", -1, slope(sizes, nested), 0.1),
    ]


def accelerated(q: Quadratic, mu: float) -> Rows:
    """Conjugate gradients under their bound, and exact after as many steps as unknowns; heavy ball at its rate."""
    A, root = q.data.inner["A"].mean(0), math.sqrt(mu)
    best, rate = q.at(q.start.outer).aux, (1 - root) / (1 + root)
    right = A @ best

    def error(solver: linear_solve.LinearSolver) -> float:
        gap = solver.solve(lambda u: A @ u, right)[0] - best
        return math.sqrt(float(gap @ A @ gap) / float(best @ A @ best))

    counts, balls = (4, 8, 12, 16), (10, 20, 30, 40)
    cg = [error(linear_solve.cg(max_steps=n, rtol=0.0)) for n in counts]
    ball = [error(linear_solve.heavy_ball(steps=n, smoothness=1.0, strong_convexity=mu)) for n in balls]
    n = len(A)
    last = error(linear_solve.cg(max_steps=n, rtol=0.0))
    over = max(e / (2 * rate**k) for e, k in zip(cg, counts, strict=True))
    theory = math.log(rate)
    return [
        claim("CG: energy error over its bound 2 ((sqrt k - 1) / (sqrt k + 1))^N, largest", "<=", 1, over, 0),
        claim("CG: log error against N, at most that of the bound", "<=", theory, decline(counts, cg), 0),
        claim(f"CG: error over its bound after {n} steps on {n} unknowns", "<=", 0, last / (2 * rate**n), 1e-3),
        claim("heavy ball: log error against M >= 10, from above", "=", theory, decline(balls, ball), -0.15 * theory),
    ]


# ---- the table: what solvers reach ------------------------------------------------------------------------------------


def reached(solver: Solver, q: Quadratic, steps: int, sampler: samplers.Sampler | None = None) -> float:
    """Hypergradient norm after some updates, over that at the start."""
    sampler = samplers.full() if sampler is None else sampler

    @jax.jit
    def go(data: Levels) -> Array:
        carry = begin(solver, sampler, q.start, data, jax.random.key(1))
        carry, _ = resume(solver, sampler, carry, data, steps=steps)
        return jnp.linalg.norm(q.gradient(carry.state.vars.outer))

    return float(go(q.data) / jnp.linalg.norm(q.gradient(q.start.outer)))


def floor(q: Quadratic, factors: Callable[[Array], Array]) -> float:
    """What a method reaches that takes ``P v*`` for v*, P the function of A with these eigenvalues: the point where its
    hypergradient ``grad h + C (P - I) v*`` vanishes."""
    values, basis = jnp.linalg.eigh(q.data.inner["A"].mean(0))
    C, change = q.data.inner["C"].mean(0), basis @ jnp.diag(factors(values) - 1) @ basis.T

    def biased(x: Array) -> Array:
        return q.gradient(x) + C @ (change @ q.at(x).aux)

    origin = jnp.zeros_like(q.start.outer)
    x = -jnp.linalg.solve(jax.jacobian(biased)(origin), biased(origin))
    return float(jnp.linalg.norm(q.gradient(x)) / jnp.linalg.norm(q.gradient(q.start.outer)))


def warm_and_cold(q: Quadratic, steps: int = 300) -> Rows:
    """AID-BiO with few steps on v: exact if they start at the last v, stalled if at 0."""
    aid = partial(double, solvers.aid_bio, 1.0, 0.3, inner_steps=5)
    cg, fixed_point = linear_solve.cg(max_steps=3, rtol=0.0), linear_solve.richardson(steps=3, rate=1.0)
    warm, cold = (reached(aid(linear_solver=cg, warm=w)(q.problem), q, steps) for w in (True, False))
    stalled = reached(aid(linear_solver=fixed_point, warm=False)(q.problem), q, steps)
    predicted = floor(q, lambda a: 1 - (1 - a) ** 3)
    return [
        claim("AID-BiO, 3 CG steps, warm v: error reached", "<=", 0, warm, 1e-13),
        claim("AID-BiO, 3 CG steps, cold v: error at which it stalls", ">=", 1e-3, cold, 0),
        claim("AID-BiO, 3 gradient steps, cold v: stall over its closed form", "=", 1, stalled / predicted, 0.01),
    ]


def floors(q: Quadratic, mu: float, counts: tuple[int, ...] = (20, 60, 90, 120), steps: int = 300) -> Rows:
    """The bias of methods that truncate: where they stop, against the closed form."""
    itd = [reached(double(solvers.itd_bio, 1.0, 0.3, inner_steps=count)(q.problem), q, steps) for count in counts]
    predicted = [floor(q, lambda a, n=count: 1 - (1 - a) ** n) for count in counts]
    first_order = reached(double(solvers.fo_itd_bio, 1.0, 0.3)(q.problem), q, steps)
    vrbo = double(solvers.vrbo, 0.2, 0.1, rate=0.9, terms=20, period=3, inner_steps=11)(q.problem)
    sarah = reached(vrbo, q, 600, samplers.uniform(1))
    theory = math.log1p(-mu)
    return [
        claim(
            "ITD-BiO: floor over its closed form, worst D",
            "=",
            1,
            max(np.divide(itd, predicted), key=lambda r: abs(r - 1)),
            0.01,
        ),
        claim("ITD-BiO: log floor against D >= 60, log(1 - a mu)", "=", theory, decline(counts[1:], itd[1:]), -0.05 * theory),
        claim("first-order ITD-BiO: floor over its closed form", "=", 1, first_order / floor(q, jnp.zeros_like), 0.01),
        claim("first-order ITD-BiO: error reached", ">=", 1e-2, first_order, 0),
        claim("VRBO: floor over that of its Neumann sum", "=", 1, sarah / floor(q, lambda a: 1 - (1 - 0.9 * a) ** 21), 0.05),
    ]


def zeroth_order(q: Quadratic, repeats: int, directions: int = 10, rate: float = 0.05) -> Rows:
    """PZOBO stalls where the noise of its directions leaves it: an estimate that is not normalised has the scale of its paper.

    At x* the estimate is d_x f + (1/Q) sum u u' w, w = -d_x f, with the covariance (|w|^2 I + w w') / Q; the steps turn that
    into the covariance S = (I - c H) S (I - c H) + c^2 (|w|^2 I + w w') / Q of x.
    """
    solver = double(solvers.pzobo, 1.0, rate, inner_steps=20, directions=directions)
    measured = squares(solver, q, 1000, repeats, samplers.full())[50:].mean()
    z, _, x = q.solution
    w = np.asarray(jax.grad(lambda x: q.problem.outer(z, x, q.data.outer).mean())(x))
    H, eye = np.asarray(jax.jacobian(q.gradient)(x)), np.eye(len(w))
    step, noise = eye - rate * H, rate**2 * (w @ w * eye + np.outer(w, w)) / directions
    spread = np.linalg.solve(np.eye(len(w) ** 2) - np.kron(step, step), noise.ravel()).reshape(H.shape)
    return [
        claim("PZOBO: E |grad h|^2 at which it stalls, over its closed form", "=", 1, measured / np.trace(H @ spread @ H), 0.1)
    ]


def linear(runs: pd.DataFrame, names: tuple[str, ...] = ("saba", "srba", "spaba")) -> Rows:
    """Variance reduction with constant steps: the log error falls on a line down to rounding."""
    rows = []
    for name in names:
        lane = runs.query("solver == @name").groupby("oracle_calls")["error"].median()
        calls, log = np.asarray(lane.index)[lane > 1e-12], np.log(np.asarray(lane)[lane > 1e-12])
        share = float(np.corrcoef(calls, log)[0, 1] ** 2)
        rows += [
            claim(f"{name.upper()}: R^2 of a line through the log error above 1e-12", ">=", 0.98, share, 0),
            claim(f"{name.upper()}: error reached with constant steps", "<=", 0, lane.iloc[-1], 1e-11),
        ]
    return rows


# ---- the table: sublinear rates ---------------------------------------------------------------------------------------


def squares(
    make: Callable[[Problem], Solver], q: Quadratic, steps: int, repeats: int, sampler: samplers.Sampler | None = None
) -> np.ndarray:
    """Mean square of the hypergradient norm over the repeats at 100 evaluations, on single samples: ``[100]``."""
    solver, sampler = make(q.problem), samplers.uniform(1) if sampler is None else sampler

    def one(key: Array, data: Levels) -> Array:
        def chunk(carry: Any, _: None) -> tuple[Any, Array]:
            carry = resume(solver, sampler, carry, data, steps=steps // 100)[0]
            return carry, jnp.sum(q.gradient(carry.state.vars.outer) ** 2)

        return jax.lax.scan(chunk, begin(solver, sampler, q.start, data, key), None, length=100)[1]

    keys = jax.random.split(jax.random.key(2), repeats)
    return np.asarray(jax.jit(lambda keys, data: jax.vmap(one, in_axes=(0, None))(keys, data).mean(0))(keys, q.data))


def sublinear(q: Quadratic, repeats: int, most: int = 16000) -> Rows:
    """Stochastic methods with the steps of their papers: E |grad h|^2 against K, each over the updates from K / 2 to K.

    The exponents of theory are those of the complexities: eps^-4 calls for |grad h| <= eps is K^-1/2 here, eps^-3 is K^-2/3.
    Momentum weights are small against the steps: otherwise z and x average the noise too, less and less so as K grows, and
    the slopes are flatter on the way there, as one row shows.
    """
    half, third = (decay(1.0, 1 / 2),) * 2, (decay(1.0, 1 / 3),) * 2
    weight = lambda t: (2.0 + t) ** (-2 / 3)  # noqa: E731
    sampled = {"rate": 0.8, "terms": 10}
    cases: dict[str, tuple[float, str, Callable[[Problem], Solver]]] = {
        "SOBA": (-1 / 2, "=", single(solvers.soba, *half)),
        "MA-SOBA": (-1 / 2, "=", single(solvers.ma_soba, *half, theta=decay(1.0, 1 / 2))),
        "FSLA": (-1 / 2, "=", single(solvers.fsla, *half)),
        "STORM-SOBA": (-2 / 3, "=", single(solvers.storm_soba, *third, eta=weight)),
        "TTSA": (-2 / 5, "<=", double(solvers.ttsa, decay(1.0, 2 / 5), decay(1.0, 3 / 5), **sampled)),
        "SUSTAIN": (-2 / 3, "=", double(solvers.sustain, *third, eta=weight, **sampled)),
        "MRBO, twice the weight, half the step of x": (
            -2 / 3,
            "=",
            double(solvers.mrbo, third[0], decay(0.5, 1 / 3), eta=lambda t: 2 * weight(t), **sampled),
        ),
        "MRBO": (-2 / 3, "=", double(solvers.mrbo, *third, eta=weight, **sampled)),
    }
    counts = (most // 8, most // 4, most // 2, most)
    rows, last = [], math.nan
    for name, (theory, relation, make) in tqdm(cases.items(), unit="rate", file=sys.stderr):
        path = squares(make, q, most, repeats)
        means = [path[50 * k // most : 100 * k // most].mean() for k in counts]
        last = means[-1]  # of MRBO in the end
        rows.append(claim(f"{name}: E |grad h|^2 against K", relation, theory, slope(counts, means), 0.07))
    # Without recursion, the steps that theory asks for depend on the horizon.
    horizons, plain = (most // 16, most // 4, most), []
    for k in horizons:
        make = double(solvers.mrbo, 2 * k**-0.5, 2 * k**-0.5, eta=1.0, **sampled)
        plain.append(squares(make, q, k, repeats)[50:].mean())
    rows.append(claim("SGD-type, steps K^-1/2: E |grad h|^2 against K", "=", -1 / 2, slope(horizons, plain), 0.07))
    rows.append(claim(f"MRBO over SGD-type: E |grad h|^2 at K = {most}", "<=", 1, last / plain[-1], 0))
    return rows
