"""Hypergradients at a given inner solution: a logistic regression with one log-L2 weight a feature.

Inner loss ``mean softplus(-y a'z) + sum_j exp(x_j) z_j^2 / 2``, outer loss ``mean softplus(-y a'z)`` on other rows.  The inner
solution is Newton's in float64, so that what differs between the variants is the linear system only.
"""

import importlib
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bilevel_jax import Batch, Levels, Problem, hypergrad, linear_solve
from bilevel_jax.linear_solve import LinearSolver
from bilevel_jax.types import Array
from experiments.speed.cases import Case, Function, Outcome, lenient

TOLERANCE, MOST = 1e-6, 1000  # of every variant that is not named after another tolerance


def _fit(z: Array, data: tuple[Array, Array]) -> Array:
    features, labels = data
    return jax.nn.softplus(-labels * (features @ z))


PROBLEM = Problem(
    inner=lambda z, x, data: _fit(z, data) + 0.5 * (jnp.exp(x) * z**2).sum(),
    outer=lambda z, x, data: _fit(z, data),
)


def case(rows: int, features: int, dtype: Any = np.float32) -> Case:
    """``rows`` inner rows, a quarter as many outer ones; seed 0; the reference is a float64 solve with the dense Hessian."""
    rng = np.random.default_rng(0)
    scales = np.exp(rng.uniform(np.log(0.3), np.log(3.0), features))
    everything = rng.standard_normal((rows + rows // 4, features)) * scales
    margins = everything @ (rng.standard_normal(features) / np.sqrt(features))
    signs = np.where(rng.uniform(size=len(margins)) < _sigmoid(margins), 1.0, -1.0)
    x = rng.normal(-5.0, 1.0, features)
    inner, outer = (everything[:rows], signs[:rows]), (everything[rows:], signs[rows:])

    z, reference, smoothness, rhs = _newton(inner, outer, x)
    z, x, inner, outer = jax.tree.map(lambda a: jnp.asarray(a, dtype), (z, x, inner, outer))
    arrays = {"z": z, "x": x, "inner": inner[0], "inner_labels": inner[1], "outer": outer[0], "outer_labels": outer[1]}
    return Case(
        f"implicit {rows} x {features}",
        (z, x, Levels(inner, outer)),
        reference,
        {name: partial(make, smoothness) for name, make in VARIANTS.items()},
        floor="cg by hand",
        scale=rhs,
        arrays={"kind": np.array("implicit"), **jax.tree.map(np.asarray, arrays)},
    )


def _sigmoid(a: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-a))


def _newton(inner: tuple, outer: tuple, x: np.ndarray) -> tuple[np.ndarray, np.ndarray, float, float]:
    """``z*``, the hypergradient, the largest eigenvalue of the Hessian, and the norm of ``d_z f``."""
    (features, labels), weights = inner, np.exp(x)
    z = np.zeros_like(x)

    def hessian() -> np.ndarray:
        p = _sigmoid(features @ z)
        return (features.T * (p * (1 - p))) @ features / len(labels) + np.diag(weights)

    for _ in range(50):
        slope = -features.T @ (labels * _sigmoid(-labels * (features @ z))) / len(labels) + weights * z
        step = np.linalg.solve(hessian(), slope)
        z = z - step
        if np.linalg.norm(step) < 1e-13:
            break
    features_out, labels_out = outer
    fz = -features_out.T @ (labels_out * _sigmoid(-labels_out * (features_out @ z))) / len(labels_out)
    matrix = hessian()
    gradient = -weights * z * np.linalg.solve(matrix, fz)
    return z, gradient, float(np.linalg.eigvalsh(matrix)[-1]), float(np.linalg.norm(fz))


def _ours(solver: LinearSolver) -> Function:
    evaluate = hypergrad.hypergradient(PROBLEM, hypergrad.implicit(solver))

    def function(z: Array, x: Array, data: Levels) -> Outcome:
        _, gradient, stats = evaluate(z, x, Batch(*data))
        return Outcome(gradient, stats.adjoint_residual, stats.code)

    return function


def _slope(z: Array, x: Array, data: Levels) -> Array:
    return jax.grad(lambda z: PROBLEM.inner(z, x, data.inner).mean())(z)


def _outer_slope(z: Array, x: Array, data: Levels) -> Array:
    return jax.grad(lambda z: PROBLEM.outer(z, x, data.outer).mean())(z)


def _by_hand(solve: Callable[[Callable, Array], Array]) -> Function:
    """What one would write without a library: linearise once, solve, pull back."""

    def function(z: Array, x: Array, data: Levels) -> Outcome:
        _, hessian = jax.linearize(lambda z: _slope(z, x, data), z)
        v = solve(hessian, -_outer_slope(z, x, data))
        return Outcome(jax.vjp(lambda x: _slope(z, x, data), x)[1](v)[0])

    return function


def _jax_cg(hessian: Callable, rhs: Array, tolerance: float = TOLERANCE) -> Array:
    return jax.scipy.sparse.linalg.cg(hessian, rhs, tol=tolerance, maxiter=MOST)[0]


def _jax_dense(hessian: Callable, rhs: Array) -> Array:
    matrix = jax.vmap(hessian)(jnp.eye(rhs.size, dtype=rhs.dtype))  # symmetric: rows are columns
    return jax.scipy.linalg.solve(matrix, rhs, assume_a="pos")


def _jaxopt(**kwargs: Any) -> Function:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it says that it is no longer maintained
        jaxopt: Any = importlib.import_module("jaxopt")
    more = {"solve": partial(jaxopt.linear_solve.solve_cg, **kwargs)} if kwargs else {}

    def function(z: Array, x: Array, data: Levels) -> Outcome:
        cotangent = _outer_slope(z, x, data)
        return Outcome(jaxopt.implicit_diff.root_vjp(lambda z, x: _slope(z, x, data), z, (x,), cotangent, **more)[0])

    return lenient(function)


def _optimistix(**kwargs: Any) -> Function:
    """One step of L-BFGS from the inner solution, which it refuses: its derivative is what is timed."""
    optx: Any = importlib.import_module("optimistix")
    lx: Any = importlib.import_module("lineax")
    adjoint = optx.ImplicitAdjoint(lx.CG(**kwargs)) if kwargs else optx.ImplicitAdjoint()

    def function(z: Array, x: Array, data: Levels) -> Outcome:
        def loss(x: Array) -> Array:
            found = optx.minimise(
                lambda z, x: PROBLEM.inner(z, x, data.inner).mean(),
                optx.LBFGS(rtol=TOLERANCE, atol=TOLERANCE),
                z,
                x,
                max_steps=1,
                adjoint=adjoint,
                throw=False,
                tags=frozenset({lx.positive_semidefinite_tag}),
            )
            return PROBLEM.outer(found.value, x, data.outer).mean()

        return Outcome(jax.grad(loss)(x))

    return lenient(function)


def _loose(dtype: Any) -> float:
    return float(jnp.finfo(dtype).eps) ** 0.5


#: From the largest eigenvalue of the Hessian.  The tolerance is 1e-6 |d_z f| but where the name says otherwise; "loose" is the
#: default of `linear_solve.cg`, the root of the machine epsilon.
VARIANTS: dict[str, Callable[[float], Function]] = {
    "cg by hand": lambda _: _by_hand(_jax_cg),
    "ours cg": lambda _: _ours(linear_solve.cg(max_steps=MOST, rtol=TOLERANCE)),
    "jaxopt cg": lambda _: _jaxopt(tol=TOLERANCE, maxiter=MOST),
    "optimistix cg": lambda _: _optimistix(rtol=TOLERANCE, atol=TOLERANCE, max_steps=MOST),
    "cg by hand, loose": lambda _: _by_hand(lambda hessian, rhs: _jax_cg(hessian, rhs, _loose(rhs.dtype))),
    "ours cg, loose": lambda _: _ours(linear_solve.cg(max_steps=MOST)),
    "dense by hand": lambda _: _by_hand(_jax_dense),
    "ours dense": lambda _: _ours(linear_solve.dense()),
    "optimistix default (dense)": lambda _: _optimistix(),
    "ours auto": lambda _: _ours(linear_solve.auto(max_steps=MOST, rtol=TOLERANCE)),
    "jaxopt default (normal equations)": lambda _: _jaxopt(),
    "ours neumann, 100 terms": lambda smoothness: _ours(linear_solve.neumann(terms=100, rate=1 / smoothness)),
}
