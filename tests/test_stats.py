"""The fields of Stats, recomputed from their definitions for every linear solver, method, damping and dtype."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from bilevel_jax import Batch, Problem
from bilevel_jax.hypergrad import hypergradient, implicit, iterative, one_step, t1_t2, zeroth_order
from bilevel_jax.implicit_diff import root_jvp, root_vjp
from bilevel_jax.linear_solve import auto, cg, dense, from_lineax, heavy_ball, neumann, random_neumann, richardson
from bilevel_jax.results import Result

lineax = pytest.importorskip("lineax")

N, LOW, RATE, TERMS = 5, 0.2, 0.9, 4
BASIS, _ = np.linalg.qr(np.random.default_rng(0).normal(size=(N, N)))
A = BASIS * np.geomspace(LOW, 1.0, N) @ BASIS.T
B = np.random.default_rng(1).normal(size=N)
#: name -> the solver of a damping (None where it has none).
SOLVERS: dict[str, Callable[[float], Any]] = {
    "cg": lambda d: cg(max_steps=50, damping=d),
    "cg of two steps": lambda d: cg(max_steps=2, damping=d),
    "cg beyond the precision": lambda d: cg(max_steps=50, rtol=1e-30, damping=d),
    "dense": lambda d: dense(damping=d),
    "dense, LU": lambda d: dense(positive_definite=False, damping=d),
    "auto": lambda d: auto(damping=d),
    "auto, iterative": lambda d: auto(dense_below=2, damping=d),
    "lineax CG": lambda d: from_lineax(lineax.CG(rtol=1e-3, atol=1e-3), positive_definite=True, damping=d),
    "lineax GMRES": lambda d: from_lineax(lineax.GMRES(rtol=1e-2, atol=1e-2, restart=N), damping=d),
    "richardson": lambda d: richardson(steps=TERMS, rate=RATE),
    "heavy_ball": lambda d: heavy_ball(steps=TERMS, smoothness=1.0, strong_convexity=LOW),
    "neumann": lambda d: neumann(terms=TERMS, rate=RATE),
    "random_neumann": lambda d: random_neumann(terms=TERMS, rate=RATE),
    "fresh richardson": lambda d: richardson(steps=TERMS, rate=RATE, fresh=True),
    "fresh neumann": lambda d: neumann(terms=TERMS, rate=RATE, fresh=True),
}
UNDAMPED = {"richardson", "heavy_ball", "neumann", "random_neumann", "fresh richardson", "fresh neumann"}
DTYPES = {"float64": jnp.float64, "float32": jnp.float32, "bfloat16": jnp.bfloat16}
CASES = [(name, damping) for name in SOLVERS for damping in ((0.0,) if name in UNDAMPED else (0.0, 0.7))]
QUICK = {("cg", 0.7), ("dense", 0.7), ("cg of two steps", 0.7), ("neumann", 0.0), ("fresh richardson", 0.0)}
every_case = pytest.mark.parametrize(
    ("name", "damping"), [pytest.param(*case, marks=[pytest.mark.more] * (case not in QUICK)) for case in CASES]
)


def polynomial(k: int) -> np.ndarray:
    """``(I - rate A)^k b``."""
    return np.linalg.matrix_power(np.eye(N) - RATE * A, k) @ B


def wide(array: Any) -> np.ndarray:
    return np.asarray(array).astype(np.float64)


@every_case
@pytest.mark.parametrize("dtype", DTYPES)
def test_stats_of_linear_solvers(name, damping, dtype):
    """The residual of what is returned, without damping; the steps are the products that were taken."""
    kind, solver, taken = DTYPES[dtype], SOLVERS[name](damping), []
    matrix, b = jnp.asarray(A, kind), jnp.asarray(B, kind)

    def matvec(u: Any, k: Any = None) -> Any:
        jax.debug.callback(lambda: taken.append(1))
        return matrix @ u

    solve = jax.jit(lambda b: solver.solve(matvec, b, key=jax.random.key(0)))
    u, stats = jax.block_until_ready(solve(b))
    jax.effects_barrier()
    eps = float(jnp.finfo(kind).eps)
    steps = int(stats.steps)
    if name in ("neumann", "fresh neumann"):
        expected = np.linalg.norm(polynomial(TERMS))  # the last summand over the rate
    elif name == "fresh richardson":
        expected = np.linalg.norm(polynomial(TERMS - 1))  # of the last sample, before its step
    elif name == "random_neumann":
        expected = np.linalg.norm(polynomial(steps))
    else:
        expected = np.linalg.norm(wide(matrix @ u) - wide(b))
    np.testing.assert_allclose(stats.residual, expected, rtol=4 * eps, atol=2 * eps)
    assert stats.residual.dtype == (jnp.float64 if dtype == "float64" else jnp.float32)
    if not name.startswith(("lineax", "dense", "auto")) or name == "auto, iterative":  # those take their products side by side
        assert steps == len(taken)
    if damping:
        assert stats.residual > 0.1
    assert stats.code <= Result.STAGNATION


def problem() -> Problem:
    """``z* = A^-1 x``, and an f that depends on both."""
    matrix = lambda z: jnp.asarray(A, z.dtype)
    return Problem(
        lambda z, x, _: 0.5 * jnp.vdot(z, matrix(z) @ z) - jnp.vdot(x, z),
        lambda z, x, _: 0.5 * jnp.sum(z**2) + 0.5 * jnp.sum(x**2),
    )


DAMPED = {f"implicit, {name}": name for name in ("cg", "dense", "auto", "cg of two steps")}
METHODS = {
    **{method: (lambda d, name=name: implicit(SOLVERS[name](d))) for method, name in DAMPED.items()},
    "implicit, neumann": lambda d: implicit(neumann(terms=TERMS, rate=RATE)),
    "implicit, richardson": lambda d: implicit(richardson(steps=TERMS, rate=RATE)),
    "t1_t2": lambda d: t1_t2(0.5),
    "iterative": lambda d: iterative(optax.sgd(RATE), 3),
    "iterative, truncated": lambda d: iterative(optax.sgd(RATE), 3, truncate=1),
    "one_step": lambda d: one_step(optax.sgd(RATE)),
    "zeroth_order": lambda d: zeroth_order(optax.sgd(RATE), 3, directions=2),
}


@pytest.mark.parametrize(
    ("name", "damping"),
    [
        pytest.param(name, d, marks=[pytest.mark.more] * ((name, d) not in {("implicit, cg", 0.7), ("iterative", 0.0)}))
        for name in METHODS
        for d in ((0.0, 0.7) if name in DAMPED else (0.0,))
    ],
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_stats_of_hypergradients(name, damping, dtype):
    """Both residuals at the z and v that are returned, v without damping, and the steps."""
    kind = DTYPES[dtype]
    eps, rng = float(jnp.finfo(kind).eps), np.random.default_rng(2)
    z, x = (jnp.asarray(rng.normal(size=N), kind) for _ in range(2))
    run = jax.jit(lambda z, x: hypergradient(problem(), METHODS[name](damping))(z, x, Batch(), key=jax.random.key(1)))
    value, gradient, stats = run(z, x)
    rounded = wide(jnp.asarray(A, kind))  # as the losses have it
    close = lambda ours, exact: np.testing.assert_allclose(wide(ours), exact, rtol=8 * eps, atol=8 * eps)
    at, v, x = wide(stats.inner), None if stats.aux is None else wide(stats.aux), wide(x)
    close(stats.inner_residual, np.linalg.norm(rounded @ at - x))
    close(value, 0.5 * at @ at + 0.5 * x @ x)
    if v is None:
        assert stats.adjoint_residual is None
        path = wide(z)
        for _ in range(int(stats.steps)):
            path = path - RATE * (rounded @ path - x)
        close(stats.inner, path)
        assert int(stats.steps) == (1 if name == "one_step" else 3)
    else:
        close(stats.inner, wide(z))
        last = (
            np.linalg.matrix_power(np.eye(N) - RATE * rounded, TERMS) @ at
        )  # the last summand of the Neumann sum, over the rate
        close(stats.adjoint_residual, np.linalg.norm(last if name == "implicit, neumann" else rounded @ v + at))
        close(gradient, x - v)
    if damping:
        assert float(stats.adjoint_residual) > 0.1
    assert stats.code <= Result.STAGNATION


@pytest.mark.parametrize("damping", [0.0, 0.7])
def test_stats_of_the_rules_as_functions(damping):
    """At a point that is no root: the residual of the optimality, and that of the linear system without damping."""
    optimality, rng = lambda z, x: A @ z - x, np.random.default_rng(3)
    z, x, direction = rng.normal(size=(3, N))
    solver = cg(max_steps=50, rtol=1e-12, damping=damping)
    dz, forward = root_jvp(optimality, z, (x,), (direction,), solver=solver)
    (dx,), reverse = root_vjp(optimality, z, (x,), direction, solver=solver)
    for stats, solution in ((forward, dz), (reverse, dx)):  # A dz = direction; A v = -direction, dx = -v
        np.testing.assert_allclose(stats.inner_residual, np.linalg.norm(A @ z - x), rtol=1e-12)
        np.testing.assert_allclose(stats.adjoint_residual, np.linalg.norm(A @ solution - direction), rtol=1e-9, atol=1e-9)
        np.testing.assert_allclose(solution, np.linalg.solve(A + damping * np.eye(N), direction), rtol=1e-9)
    np.testing.assert_array_equal(reverse.aux, -dx)
    assert forward.aux is None
