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
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

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
    p, d = inner_dim, outer_dim
    data = _draw(key, p, d, inner_samples, outer_samples, float(condition), float(noise), dtype)
    problem = Problem(
        inner=lambda z, x, s: (s["A"] @ z) @ z / 2 + (x @ s["C"]) @ z + s["b"] @ z,
        outer=lambda z, x, s: (s["B"] @ z) @ z / 2 + (s["D"] @ x) @ x / 2 + (x @ s["E"]) @ z + s["e"] @ z + s["d"] @ x,
    )
    start = Vars(jnp.zeros(p, dtype), jnp.zeros(p, dtype), jnp.ones(d, dtype))
    means = (jax.tree.map(lambda leaf: leaf.mean(0), part) for part in data)
    return _solved(problem, data, start, *means)


@partial(jax.jit, static_argnums=range(1, 8))  # one compilation in place of a hundred small ones, for all keys
def _draw(key: Array, p: int, d: int, n: int, m: int, condition: float, noise: float, dtype: Any) -> Levels:
    """The samples of `quadratic`."""
    keys = iter(jax.random.split(key, 32))

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
    return Levels(inner, outer)


def worst_case(
    dim: int,
    *,
    outer_strong_convexity: float = 0.05,
    inner_strong_convexity: float = 0.3,
    inner_smoothness: float = 1.0,
    coupling: float = 1.0,
    curvature: float = 1.0,
    dtype: Any = jnp.float32,
) -> Quadratic:
    """The worst strongly convex problem for methods that move in the span of the oracles' answers from x = 0.

    With Z the antidiagonal identity less the diagonal below it, ``T = Z^2 = tridiag(-1, 2, -1)`` but for ``T_11 = 1``, and
    ``beta = (Lg - mu_g) / 4``::

        g(z, x) = z' (beta T + mu_g I) z / 2 - (Lxz / 2) x' Z z + b' z        f(z, x) = mu_x |x|^2 / 2 + Lz |z|^2 / 2

    Each product with the inner Hessian lets one more entry of x move, and b is such that all of them count: ``x*_i = r^i``
    up to O(r^dim), with the r of `worst_case_ratio`.  So the error after n products is at least c r^n.

    Args:
        dim: size of z and of x.
        outer_strong_convexity: mu_x, of f and so of h.
        inner_strong_convexity, inner_smoothness: mu_g < Lg, the bounds of the inner Hessian.
        coupling, curvature: Lxz and Lz.
        dtype: of everything.

    Raises:
        TypeError, ValueError: for ``dim`` below 3, constants that are not positive, and mu_g >= Lg.

    Cost of an oracle call: O(dim); of the closed forms O(dim^2).

    Reference: Ji, Liang, "Lower bounds and accelerated algorithms for bilevel optimization", JMLR 2023, arXiv 2102.03926,
    without the terms of g and f that cancel in h.

    Example:
        >>> q = worst_case(40)
        >>> r = worst_case_ratio(0.05, 0.3)
        >>> bool(jnp.abs(q.solution.outer[:3] - jnp.array([r, r**2, r**3])).max() < 1e-4)
        True
    """
    checks.positive_int("dim", dim, 3)
    constants = outer_strong_convexity, inner_strong_convexity, inner_smoothness, coupling, curvature
    mu_x, mu_g, Lg, Lxz, Lz = map(float, constants)
    r, (beta, lam, tau) = worst_case_ratio(*constants), _chain_constants(*constants)
    image = np.zeros(dim)  # Z b
    image[:2] = (2 + lam + tau) * r - (3 + lam) * r**2 + r**3, r - 1
    return _chain(2 * beta**2 * mu_x / (Lz * Lxz) * image, mu_x, 0.0, mu_g, Lg, Lxz, Lz, dtype)


def worst_case_ratio(
    outer_strong_convexity: float,
    inner_strong_convexity: float,
    inner_smoothness: float = 1.0,
    coupling: float = 1.0,
    curvature: float = 1.0,
) -> float:
    """The r of `worst_case`: ``1 / (1 - r) = sqrt(Lz) Lxz / (2 sqrt(mu_x) mu_g) (1 + o(1))``.

    The root in (0, 1) nearest to 1 of ``1 - (4 + lam) r + (6 + 2 lam + tau) r^2 - (4 + lam) r^3 + r^4``, with
    ``lam = (Lxz^2 Lz + 8 beta mu_x mu_g) / (4 beta^2 mu_x)`` and ``tau = (mu_g / beta)^2``.  Read backwards the polynomial is
    the same, so that ``y = r + 1/r - 2`` solves ``y^2 - lam y + tau = 0``.

    Example:
        >>> round(1 / (1 - worst_case_ratio(1e-2, 0.1)), 1)
        50.5
    """
    _, lam, tau = _chain_constants(outer_strong_convexity, inner_strong_convexity, inner_smoothness, coupling, curvature)
    y = 2 * tau / (lam + (lam**2 - 4 * tau) ** 0.5)  # the smaller root, without cancellation
    return 1 + y / 2 - (y + y**2 / 4) ** 0.5


def convex_worst_case(
    dim: int,
    *,
    inner_strong_convexity: float = 0.3,
    outer_smoothness: float = 1.0,
    inner_smoothness: float = 1.0,
    coupling: float = 1.0,
    curvature: float = 1.0,
    radius: float = 1.0,
    dtype: Any = jnp.float32,
) -> Quadratic:
    """The worst convex problem: `worst_case` with the -1 of Z above the antidiagonal, and ``Lx x'T x / 8`` in f.

    That stands for ``mu_x |x|^2 / 2``.  T ends in ``T_dd = 1``, its smallest eigenvalue goes to 0 with dim, and
    ``x* = radius / sqrt(dim) (1, ..., 1)``.

    Args:
        outer_smoothness: Lx, that of f in x.
        radius: norm of x*.

    Other arguments, Raises, Cost, Reference: as for `worst_case`.

    Example:
        >>> convex_worst_case(4, radius=2.0).solution.outer.round(4).tolist()
        [1.0, 1.0, 1.0, 1.0]
    """
    checks.positive_int("dim", dim, 3)
    _positive(outer_smoothness=outer_smoothness, radius=radius)
    constants = outer_smoothness, inner_strong_convexity, inner_smoothness, coupling, curvature
    Lx, mu_g, Lg, Lxz, Lz = map(float, constants)
    beta, *_ = _chain_constants(1.0, mu_g, Lg, Lxz, Lz)
    image = np.zeros(dim)  # Z b
    image[0] = Lx * (5 / 4 * beta**2 + beta * mu_g + mu_g**2 / 4) + Lxz**2 * Lz / 4
    image[1:3] = -Lx * beta * (beta + mu_g / 2), Lx * beta**2 / 4
    return _chain(2 / (Lz * Lxz) * radius / dim**0.5 * image, 0.0, Lx, mu_g, Lg, Lxz, Lz, dtype)


def dense_spectrum(
    dim: int = 300, *, outer_strong_convexity: float = 0.01, inner_strong_convexity: float = 0.1, dtype: Any = jnp.float32
) -> Quadratic:
    """A diagonal problem whose Hessians have eigenvalues at all scales, so that no method is lucky with its spectrum::

        g(z, x) = sum a_i z_i^2 / 2 + c_i x_i z_i       f(z, x) = mu_x |x|^2 / 2 + |z|^2 / 2 - sum sqrt(h_i) x_i

    c goes geometrically from 1e-3 to 1; a, at every other place, from mu_g to 1, and is mu_g at the others.  The Hessian of h
    is diagonal with ``h_i = mu_x + (c_i / a_i)^2``, and ``x*_i = 1 / sqrt(h_i)``: the gap at 0 is 1/2 from every
    entry.

    Args:
        dim: size of z and of x.
        outer_strong_convexity, inner_strong_convexity: mu_x > 0 and mu_g in (0, 1].
        dtype: of everything.

    Raises:
        TypeError, ValueError: for ``dim`` below 2, and constants that are not positive.

    Cost of an oracle call: O(dim); of the closed forms O(dim^2).

    Example:
        >>> q = dense_spectrum(4, outer_strong_convexity=0.5, inner_strong_convexity=0.5)
        >>> bool(jnp.allclose(q.solution.outer[-1], 4.5**-0.5))
        True
    """
    checks.positive_int("dim", dim, 2)
    _positive(outer_strong_convexity=outer_strong_convexity, inner_strong_convexity=inner_strong_convexity)
    mu_x, mu_g = float(outer_strong_convexity), float(inner_strong_convexity)
    a, c = np.full(dim, mu_g), np.geomspace(1e-3, 1, dim)
    a[::2] = np.geomspace(mu_g, 1, len(a[::2]))
    d = -np.sqrt(mu_x + (c / a) ** 2)
    problem = Problem(
        inner=lambda z, x, s: s["a"] @ z**2 / 2 + s["c"] @ (x * z),
        outer=lambda z, x, s: mu_x * x @ x / 2 + z @ z / 2 + s @ x,
    )
    data, eye = Levels({"a": a, "c": c}, d), np.eye(dim)
    return _one_row(problem, data, dtype, A=np.diag(a), C=np.diag(c), b=0 * a, B=eye, D=mu_x * eye, d=d)


def _chain_constants(mu_x: float, mu_g: float, Lg: float, Lxz: float, Lz: float) -> tuple[float, float, float]:
    """beta, lam and tau of `worst_case`."""
    _positive(outer_strong_convexity=mu_x, inner_strong_convexity=mu_g, inner_smoothness=Lg, coupling=Lxz, curvature=Lz)
    if mu_g >= Lg:
        raise ValueError(f"inner_smoothness: got {Lg}, expected more than inner_strong_convexity, {mu_g}")
    beta = (Lg - mu_g) / 4
    return beta, (Lxz**2 * Lz + 8 * beta * mu_x * mu_g) / (4 * beta**2 * mu_x), (mu_g / beta) ** 2


def _chain(image: np.ndarray, mu_x: float, Lx: float, mu_g: float, Lg: float, Lxz: float, Lz: float, dtype: Any) -> Quadratic:
    """The worst cases, ``f = (mu_x |x|^2 + Lx |Z x|^2 / 4 + Lz |z|^2) / 2`` and ``image = Z b``; Lx = 0 if strongly convex."""

    def chain(u: Array) -> Array:
        """Z u."""
        zero = jnp.zeros(1, u.dtype)
        return -jnp.diff(jnp.flip(u), append=zero) if Lx else jnp.diff(jnp.flip(u), prepend=zero)

    b = np.cumsum(image[::-1]) if Lx else np.cumsum(image)[::-1]
    beta, eye = (Lg - mu_g) / 4, np.eye(len(b))
    Z = np.asarray(jax.vmap(chain)(jnp.asarray(eye, jnp.float32)), np.float64)  # of 0, 1 and -1; symmetric
    problem = Problem(
        inner=lambda z, x, s: (beta * chain(z) @ chain(z) + mu_g * z @ z - Lxz * x @ chain(z)) / 2 + s @ z,
        outer=lambda z, x, s: (mu_x * x @ x + Lx / 4 * chain(x) @ chain(x) + Lz * z @ z) / 2,
    )
    matrices = {"A": beta * Z @ Z + mu_g * eye, "C": -Lxz / 2 * Z, "B": Lz * eye, "D": mu_x * eye + Lx / 4 * Z @ Z}
    return _one_row(problem, Levels(b, np.zeros(1)), dtype, **matrices, b=b, d=0 * b)


def _one_row(problem: Problem, data: Levels, dtype: Any, *, A: Any, C: Any, b: Any, B: Any, D: Any, d: Any) -> Quadratic:
    """A problem with one sample a level, ``E = e = 0``, that starts at 0."""
    data, g, f = jax.tree.map(
        lambda leaf: jnp.asarray(leaf, dtype),
        (
            jax.tree.map(lambda leaf: leaf[None], data),
            {"A": A, "C": C, "b": b},
            {"B": B, "D": D, "E": 0 * C, "e": 0 * b, "d": d},
        ),
    )
    return _solved(problem, data, Vars(*(jnp.zeros(len(leaf), dtype) for leaf in (b, b, d))), g, f)


def _solved(problem: Problem, data: Levels, start: Vars, g: dict[str, Array], f: dict[str, Array]) -> Quadratic:
    """A problem with its closed forms, from the means of its matrices and vectors."""
    factors = jax.scipy.linalg.lu_factor(g["A"])

    def at(x: Array) -> Vars:
        z = -jax.scipy.linalg.lu_solve(factors, x @ g["C"] + g["b"])
        return Vars(z, -jax.scipy.linalg.lu_solve(factors, f["B"] @ z + x @ f["E"] + f["e"]), x)

    def value(x: Array) -> Array:
        z = at(x).inner
        return z @ f["B"] @ z / 2 + x @ f["D"] @ x / 2 + x @ f["E"] @ z + f["e"] @ z + f["d"] @ x

    def gradient(x: Array) -> Array:
        z, v, _ = at(x)
        return f["D"] @ x + f["E"] @ z + f["d"] + g["C"] @ v

    # grad h is affine in x: x* solves grad h(0) + (d grad h / dx) x = 0.
    origin = jnp.zeros_like(start.outer)
    best = -jnp.linalg.solve(jax.jacobian(gradient)(origin), gradient(origin))
    return Quadratic(problem, data, start, at(best), at, value, gradient)


def _positive(**values: float) -> None:
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise TypeError(f"{name}: got {checks.shown(value)} of type {type(value).__name__}, expected a float")
        if not 0 < value < float("inf"):
            raise ValueError(f"{name}: got {value}, expected a finite number above 0")
