"""Problems with closed forms, shipped so that users can test their own solvers.

The quadratic is the yardstick of this library::

    g_i(z, x) = z' A_i z / 2 + x' C_i z + b_i' z
    f_j(z, x) = z' B_j z / 2 + x' D_j x / 2 + x' E_j z + e_j' z + d_j' x

With A ... e the means over the samples (derived by setting d_z g = A z + C' x + b to zero, and so on)::

    z*(x) = -A^-1 (C' x + b)      v*(x) = -A^-1 (B z* + E' x + e)      grad h(x) = D x + E z* + d + C v*(x)

The noise of the samples is on the matrices too: purely additive noise is cancelled exactly by STORM and SPIDER, and would
hide errors.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from bilevel_jax import checks
from bilevel_jax.types import Array, Levels, Problem, Vars


class Quadratic(NamedTuple):
    """A quadratic bilevel problem, as a finite sum, with its solution."""

    problem: Problem  # losses return one value a sample
    data: Levels  # the matrices and vectors of the samples
    start: Vars  # z = 0, x = 1
    solution: Vars  # (z*, v*, x*)
    at: Callable[[Array], Vars]  # x -> (z*(x), v*(x), x)
    value: Callable[[Array], Array]  # x -> h(x)
    gradient: Callable[[Array], Array]  # x -> grad h(x)

    def metrics(self, vars: Vars, data: Any = None) -> dict[str, Array]:
        """Hypergradient norm, value gap, and the distances of z and v to their solutions at the current x."""
        del data
        z, v, x = vars
        best = self.at(x)
        return {
            "gradient_norm": jnp.linalg.norm(self.gradient(x)),
            "suboptimality": self.value(x) - self.value(self.solution.outer),
            "inner_error": jnp.linalg.norm(z - best.inner),
            "aux_error": jnp.linalg.norm(v - best.aux) if v is not None else jnp.zeros(()),
        }


def quadratic(
    key: Array,
    *,
    inner_dim: int = 20,
    outer_dim: int = 8,
    inner_samples: int = 32,
    outer_samples: int = 32,
    condition: float = 5.0,
    noise: float = 0.02,
    dtype: Any = jnp.float32,
) -> Quadratic:
    """A random quadratic bilevel problem with closed-form solution.

    Args:
        key: typed key.
        inner_dim, outer_dim: sizes of z and x.
        inner_samples, outer_samples: numbers of g_i and f_j.
        condition: of the mean inner Hessian A, whose eigenvalues go geometrically from 1/condition to 1.
        noise: standard deviation of the zero-mean perturbations of the samples' matrices (five times that on vectors).
        dtype: of everything.

    Raises:
        TypeError, ValueError: for sizes that are not positive ints.

    Example:
        >>> q = quadratic(jax.random.key(0))
        >>> bool(jnp.abs(q.gradient(q.solution.outer)).max() < 1e-5)
        True
    """
    sizes = {"inner_dim": inner_dim, "outer_dim": outer_dim, "inner_samples": inner_samples, "outer_samples": outer_samples}
    for name, size in sizes.items():
        checks.positive_int(name, size)
    keys = iter(jax.random.split(key, 32))
    p, d, n, m = inner_dim, outer_dim, inner_samples, outer_samples

    def normal(*shape: int) -> Array:
        return jax.random.normal(next(keys), shape, dtype)

    def spectrum(size: int, low: float) -> Array:
        basis = jnp.linalg.qr(normal(size, size))[0]
        return basis @ jnp.diag(jnp.geomspace(low, 1.0, size, dtype=dtype)) @ basis.T

    def samples(mean: Array, count: int, scale: float, symmetric: bool = False) -> Array:
        draws = scale * normal(count, *mean.shape)
        draws = (draws + draws.mT) / 2 if symmetric else draws
        return mean[None] + draws - draws.mean(0, keepdims=True)

    inner = {
        "A": samples(spectrum(p, 1 / condition), n, noise, symmetric=True),
        "C": samples(0.15 * normal(d, p), n, noise),
        "b": samples(normal(p), n, 5 * noise),
    }
    outer = {
        "B": samples(spectrum(p, 0.1), m, noise, symmetric=True),
        "D": samples(spectrum(d, 0.5), m, noise, symmetric=True),
        "E": samples(0.05 * normal(d, p), m, noise),
        "e": samples(normal(p), m, 5 * noise),
        "d": samples(normal(d), m, 5 * noise),
    }
    g, f = (jax.tree.map(lambda leaf: leaf.mean(0), part) for part in (inner, outer))

    def at(x: Array) -> Vars:
        z = -jnp.linalg.solve(g["A"], x @ g["C"] + g["b"])
        return Vars(z, -jnp.linalg.solve(g["A"], f["B"] @ z + x @ f["E"] + f["e"]), x)

    def value(x: Array) -> Array:
        z = at(x).inner
        return z @ f["B"] @ z / 2 + x @ f["D"] @ x / 2 + x @ f["E"] @ z + f["e"] @ z + f["d"] @ x

    def gradient(x: Array) -> Array:
        z, v, _ = at(x)
        return f["D"] @ x + f["E"] @ z + f["d"] + g["C"] @ v

    # grad h is affine in x: x* solves grad h(0) + (d grad h / dx) x = 0.
    origin = jnp.zeros(d, dtype)
    best = -jnp.linalg.solve(jax.jacobian(gradient)(origin), gradient(origin))
    problem = Problem(
        inner=lambda z, x, s: (s["A"] @ z) @ z / 2 + (x @ s["C"]) @ z + s["b"] @ z,
        outer=lambda z, x, s: (s["B"] @ z) @ z / 2 + (s["D"] @ x) @ x / 2 + (x @ s["E"]) @ z + s["e"] @ z + s["d"] @ x,
    )
    start = Vars(jnp.zeros(p, dtype), jnp.zeros(p, dtype), jnp.ones(d, dtype))
    return Quadratic(problem, Levels(inner, outer), start, at(best), at, value, gradient)
