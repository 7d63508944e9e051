"""Oracles of methods that compare values of the inner loss: first derivatives only, no Hessian-vector products.

The constraint "z minimises g(., x)" becomes a bound on ``g(y, x) - min g(., x)``, or on its difference to a Moreau envelope,
that enters with a multiplier.  A second inner iterate stands in ``vars.aux``:

| oracle | ``vars.inner`` | ``vars.aux`` |
|---|---|---|
| `penalty` | z, near argmin g | y, near argmin g + f / multiplier |
| `differences` | (not used) | y_k, near argmin g + s_k f, leaves [nodes, ...] |
| `barrier` | w, near argmin g | y, moved along with x |
| `value_function` | z, near argmin g + mu z'z / 2 | y, near argmin of f and the constraint's term |
| `moreau` | z, moved along with x | theta, near the proximal point of z |
"""

import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from bilevel_jax import checks
from bilevel_jax.inspection import Uses, depends
from bilevel_jax.nonsmooth import Nonsmooth, zero
from bilevel_jax.optimisers import value_at
from bilevel_jax.oracles import inspected, losses, outer_pair
from bilevel_jax.samplers import take_draw
from bilevel_jax.trees import norm, over, scaled
from bilevel_jax.types import Array, Batch, Calls, Oracle, Problem, PyTree, Schedule, Terms, Vars


def penalty(problem: Problem, multiplier: Schedule) -> Oracle:
    """F2SA: ``Dz = d_z g(z)``, ``Dy = d_z g(y) + d_z f(y) / lam``, ``Dx = d_x f(y) + lam (d_x g(y) - d_x g(z))``, at x.

    The direction of y is that of the paper over lam, so that its step size is bounded by 1/L whatever lam is.  At the exact z
    and y the direction of x is grad h up to O(1 / lam).

    Args:
        problem: the two losses.
        multiplier: lam > 0, a number or a schedule of the update.  The difference loses log10(lam) digits.

    Raises:
        TypeError, ValueError: for anything but a ``Problem``, and a multiplier that is not positive.

    Warns:
        UserWarning: when the multiplier (of a schedule: at its start) leaves fewer than four digits in the dtype of x.

    Cost: one inner gradient for z, one and an outer pair for y; two and an outer pair for x.  A gradient in z and in x at one
    point counts once.

    Reference: Kwon, Kwon, Wright, Nowak, "A fully first-order method for stochastic bilevel optimization", ICML 2023, arXiv
    2301.10945.

    Example:
        >>> problem = Problem(lambda z, x, a: 0.5 * ((z - x) ** 2).sum(), lambda z, x, b: 0.5 * (z**2).sum())
        >>> at = Vars(jnp.ones(1), jnp.full(1, 10 / 11), jnp.ones(1))  # z and y exact for x = 1 and lam = 10
        >>> terms = penalty(problem, 10.0).terms(at, Batch(outer=jnp.zeros(1)), jnp.int32(0))
        >>> round(float(terms.inner.outer[0]), 4)  # grad h = 1
        0.9091
    """
    g, f = losses(problem)
    checks.positive("multiplier", multiplier, schedule=True)

    def terms(vars: Vars, batch: Batch, step: Array) -> Terms:
        z, y, x = vars
        dz, gx_z = jax.grad(g, argnums=(0, 1))(z, x, batch)
        if y is None or batch.outer is None:
            return Terms(inner=Vars(inner=dz))
        checks.same_shapes("vars.aux", y, z, "vars.inner")
        lam = value_at(multiplier, step)
        warn_digits("multiplier", multiplier, x)
        dy, gx_y = jax.grad(g, argnums=(0, 1))(y, x, batch)
        fz, fx = outer_pair(f, y, x, batch)
        gap = scaled(lam, jax.tree.map(jnp.subtract, gx_y, gx_z))
        return Terms(inner=Vars(dz, dy, gap), outer=Vars(None, over(lam, fz), fx))

    def calls(moved: Vars) -> Calls:
        z, y = bool(moved.inner or moved.outer), bool(moved.aux or moved.outer)
        return Calls(inner_gradient=float(z + y), outer_gradient=float(y))

    return Oracle(terms, calls, check=inspected(problem))


def stencil(order: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Nodes s_k lam, weights w_k of the difference of that order for a derivative at 0, and weights of the value at 0.

    Forward for order 1, central for even orders, whose node 0 has no weight and is left out.

    Example:
        >>> [part.tolist() for part in stencil(2)]
        [[-1.0, 1.0], [-0.5, 0.5], [0.5, 0.5]]
    """
    half = order // 2
    nodes = np.array([0.0, 1.0]) if order == 1 else np.array([k for k in range(-half, half + 1) if k], float)
    powers = nodes[None] ** np.arange(len(nodes))[:, None]  # sum_k w_k s_k^j is 1 for j = 1, and 0 for the others
    derivative, value = np.linalg.solve(powers, np.eye(len(nodes))[:, [1, 0]]).T
    return nodes, derivative, value


def differences(problem: Problem, multiplier: Schedule, order: int = 2) -> Oracle:
    """F2SA-p: ``Dy_k = d_z g(y_k) + s_k d_z f(y_k)``, ``Dx = lam sum_k w_k (d_x g(y_k) + s_k d_x f(y_k))``, s_k = k / lam.

    With ``l(s) = min_z g + s f``, h = dl/ds at 0, so that grad h is the derivative of d_x l at 0, here by the difference of
    order p: forward for p = 1 (where Dx is that of `penalty`), central for even p, where some s_k are negative: g + s_k f must
    be convex, that is, lam > k L_f / mu.  The error is O(lam^-p).

    Args:
        problem: the two losses.
        multiplier: as for `penalty`.
        order: p, 1 or an even number; there are 2 nodes for p = 1, p nodes otherwise.

    Raises:
        TypeError, ValueError: as `penalty`, and for another order.

    Warns:
        UserWarning: as `penalty`.

    Cost: one inner gradient and one outer pair a node for y, the same for x.

    Reference: Chen, Li, Chayti, Zhang, "Faster gradient methods for highly-smooth stochastic bilevel optimization", ICLR 2026,
    arXiv 2509.02937.

    Example:
        >>> problem = Problem(lambda z, x, a: 0.5 * ((z - x) ** 2).sum(), lambda z, x, b: 0.5 * (z**2).sum())
        >>> y = jnp.array([[1 / 0.9], [1 / 1.1]])  # exact for x = 1, lam = 10
        >>> at = Vars(jnp.ones(1), y, jnp.ones(1))
        >>> round(float(differences(problem, 10.0).terms(at, Batch(outer=jnp.zeros(1)), jnp.int32(0)).inner.outer[0]), 4)
        1.0101
    """
    g, f = losses(problem)
    checks.positive("multiplier", multiplier, schedule=True)
    order = checks.positive_int("order", order)
    if order != 1 and order % 2:
        raise ValueError(f"order: got {order}, expected 1 or an even number")
    nodes, weights, _ = stencil(order)

    def terms(vars: Vars, batch: Batch, step: Array) -> Terms:
        _, ys, x = vars
        if batch.outer is None:
            raise ValueError("batch.outer: got None, expected data of the outer loss, which enters every direction")
        checks.leading_axis("vars.aux", ys, len(nodes), "one iterate a node")
        lam = value_at(multiplier, step)
        warn_digits("multiplier", multiplier, x)
        dy, gx = jax.vmap(lambda y: jax.grad(g, argnums=(0, 1))(y, x, batch))(ys)
        fz, fx = jax.vmap(lambda y: jax.grad(f, argnums=(0, 1))(y, x, batch))(ys)
        fz = jax.tree.map(lambda leaf: leaf * _column(nodes, leaf), over(lam, fz))
        gap = scaled(lam, jax.tree.map(lambda leaf: (leaf * _column(weights, leaf)).sum(0), gx))
        outer = jax.tree.map(lambda leaf: (leaf * _column(weights * nodes, leaf)).sum(0), fx)
        if not depends(lambda x: f(jax.tree.map(lambda leaf: leaf[0], ys), x, batch), x):
            outer = None
        return Terms(inner=Vars(None, dy, gap), outer=Vars(None, fz, outer))

    def calls(moved: Vars) -> Calls:
        each = float(len(nodes) * bool(moved.aux or moved.outer))
        return Calls(inner_gradient=each, outer_gradient=each)

    return Oracle(terms, calls, check=inspected(problem, Uses(z=True)))


def barrier(problem: Problem, *, eta: float = 0.5, control: str = "gradient") -> Oracle:
    """BOME's dynamic barrier: ``D = grad f + lam grad q`` in (y, x), ``q = g(y, x) - g(w, x)``, w held constant.

    ``lam = max(phi - <grad f, grad q>, 0) / |grad q|^2`` makes q fall at the rate ``phi = eta |grad q|^2`` (or ``eta q``) at
    least.  Where grad q vanishes lam is 0: there is nothing to be gained in q, and the step is one on f.

    Composite: lam is not a mean over the samples.  The method is deterministic: use it on all the data.

    Args:
        problem: the two losses.
        eta: rate of q, a positive number.
        control: ``"gradient"``, ``phi = eta |grad q|^2``, or ``"value"``, ``phi = eta q``.

    Raises:
        TypeError, ValueError: for anything but a ``Problem``, a rate that is not positive, and another control.

    Cost: two inner gradients and one outer pair.

    Reference: Liu, Ye, Wright, Stone, Liu, "BOME! Bilevel optimization made easy: a simple first-order approach", NeurIPS 2022,
    arXiv 2209.08709.

    Example:
        >>> problem = Problem(lambda z, x, a: 0.5 * ((z - x) ** 2).sum(), lambda z, x, b: 0.5 * (z**2).sum())
        >>> at = Vars(jnp.ones(1), jnp.full(1, 2.0), jnp.ones(1))
        >>> terms, _ = barrier(problem).terms(at, Batch(inner=jnp.zeros((1, 1)), outer=jnp.zeros((1, 1))), jnp.int32(0))
        >>> terms.inner.aux.tolist(), terms.outer.aux.tolist()  # lam = 0: the step on f lowers q fast enough
        ([0.0], [2.0])
    """
    g, f = losses(problem)
    checks.positive("eta", eta)
    if control not in ("gradient", "value"):
        raise ValueError(f"control: got {checks.shown(control)}, expected 'gradient' or 'value'")

    def terms(vars: Vars, batches: Batch, step: Array) -> tuple[Terms, Array]:
        del step
        (w, y, x), batch = vars, take_draw(batches, 0)
        _wanted(batch, y, w)
        high, (qy, gx_y) = jax.value_and_grad(g, argnums=(0, 1))(y, x, batch)
        low, gx_w = jax.value_and_grad(g, argnums=1)(w, x, batch)
        fz, fx = jax.grad(f, argnums=(0, 1))(y, x, batch)
        slope, ascent = (qy, jax.tree.map(jnp.subtract, gx_y, gx_w)), (fz, fx)
        square = norm(slope) ** 2
        phi = eta * square if control == "gradient" else eta * (high - low).astype(square.dtype)
        along = sum(
            jnp.vdot(a.astype(square.dtype), b.astype(square.dtype))
            for a, b in zip(jax.tree.leaves(slope), jax.tree.leaves(ascent), strict=True)
        )
        lam = jnp.where(square > 0, jnp.maximum(phi - along, 0) / jnp.where(square > 0, square, 1), 0)
        qy, qx = scaled(lam, slope)
        return Terms(inner=Vars(None, qy, qx), outer=Vars(None, fz, fx)), jnp.zeros((), jnp.int32)

    cost = Calls(inner_gradient=2.0, outer_gradient=1.0)
    return Oracle(terms, lambda moved: cost, draws=1, check=inspected(problem, Uses(z=True)))


#: ``(gap, step) -> P'(gap)``: the derivative of the term that keeps ``gap = g(y) - min (g + mu |.|^2 / 2)`` small.
Slope = Callable[[Array, Array], Array]


def value_function(problem: Problem, slope: Slope, regularisation: Schedule) -> Oracle:
    """BVFIM, BVFSM: a function of ``g(y) - min (g + mu |.|^2 / 2)`` with slope s stands for the constraint on y.

    ::

        Dz = d_z g(z) + mu z     Dy = d_z f(y) + s d_z g(y) + mu y     Dx = d_x f(y) + s (d_x g(y) - d_x g(z))

    s is taken at ``g(y) - g(z) - mu |z|^2 / 2`` and is that of `interior`, `quadratic`, or your own.  Regularising both levels
    picks one solution where there are several.

    Composite: s is not a mean over the samples.  The methods are deterministic: use them on all the data.

    Args:
        problem: the two losses.
        slope: the derivative of the constraint's term.
        regularisation: mu >= 0, a number or a schedule of the update; papers: falling to 0.

    Raises:
        TypeError, ValueError: for anything but a ``Problem`` and a function, and a negative regularisation.

    Cost: one inner gradient for z; two and an outer pair for y, and for x (the value of g at z counts as a gradient).

    Reference: Liu, Liu, Yuan, Zeng, Zhang, "A value-function-based interior-point method for non-convex bi-level optimization",
    ICML 2021, arXiv 2106.07991; Liu, Liu, Zeng, Zhang, Zhang, "Value-function-based sequential minimization for bi-level
    optimization", TPAMI 2023, arXiv 2110.04974.

    Example:
        >>> problem = Problem(lambda z, x, a: 0.5 * ((z - x) ** 2).sum(), lambda z, x, b: 0.5 * (z**2).sum())
        >>> oracle = value_function(problem, quadratic(0.5), 0.0)
        >>> at = Vars(jnp.ones(1), jnp.full(1, 2.0), jnp.ones(1))
        >>> terms, _ = oracle.terms(at, Batch(inner=jnp.zeros((1, 1)), outer=jnp.zeros((1, 1))), jnp.int32(0))
        >>> terms.inner.aux.tolist(), terms.outer.aux.tolist()  # slope 0.5 / 0.5 = 1
        ([1.0], [2.0])
    """
    g, f = losses(problem)
    if not callable(slope):
        raise TypeError(
            f"slope: got {type(slope).__name__}, expected a function of the gap and the update, such as quadratic(0.1)"
        )
    if not callable(regularisation) and not isinstance(regularisation, Tracer) and not regularisation >= 0:
        raise ValueError(f"regularisation: got {regularisation}, expected a number of at least 0 or a schedule")

    def terms(vars: Vars, batches: Batch, step: Array) -> tuple[Terms, Array]:
        (z, y, x), batch = vars, take_draw(batches, 0)
        _wanted(batch, y, z)
        mu, fine = value_at(regularisation, step), jnp.zeros((), jnp.int32)
        low, (gz, gx_z) = jax.value_and_grad(g, argnums=(0, 1))(z, x, batch)
        high, (gy, gx_y) = jax.value_and_grad(g, argnums=(0, 1))(y, x, batch)
        fz, fx = jax.grad(f, argnums=(0, 1))(y, x, batch)
        squares = norm(z) ** 2
        gap = (high - low).astype(squares.dtype) - jnp.asarray(mu, squares.dtype) / 2 * squares
        with jax.numpy_dtype_promotion("standard"):  # slopes may be users' code
            s = slope(gap, step)
        dz = jax.tree.map(jnp.add, gz, scaled(mu, z))
        dy = jax.tree.map(jnp.add, scaled(s, gy), scaled(mu, y))
        dx = scaled(s, jax.tree.map(jnp.subtract, gx_y, gx_z))
        return Terms(inner=Vars(dz, dy, dx), outer=Vars(None, fz, fx)), fine

    def calls(moved: Vars) -> Calls:
        both = bool(moved.aux or moved.outer)
        return Calls(inner_gradient=float((bool(moved.inner) or both) + both), outer_gradient=float(both))

    return Oracle(terms, calls, draws=1, check=inspected(problem, Uses(z=True)))


def interior(strength: Schedule, slack: Schedule) -> Slope:
    """The slope of the logarithmic barrier ``-tau log(sigma - gap)``, ``tau / (sigma - gap)``: BVFIM.

    Closer to the boundary than sigma / 10, and beyond it, where the barrier is infinite and a step of fixed size may well land,
    its tangent goes on: the slope there is 10 tau / sigma, a penalty.  The paper's y stays inside by assumption.

    Args:
        strength, slack: tau and sigma > 0, numbers or schedules of the update; paper: falling to 0.  Let sigma fall faster than
            tau: the multiplier that holds y is at most 10 tau / sigma, and must grow.

    Raises:
        ValueError: for numbers that are not positive.

    Example:
        >>> float(interior(1.0, 2.0)(jnp.float32(0.0), jnp.int32(0))), float(interior(1.0, 2.0)(jnp.float32(5.0), jnp.int32(0)))
        (0.5, 5.0)
    """
    checks.positive("strength", strength, schedule=True)
    checks.positive("slack", slack, schedule=True)

    def slope(gap: Array, step: Array) -> Array:
        sigma = value_at(slack, step)
        return value_at(strength, step) / jnp.maximum(sigma - gap, sigma / 10)

    return slope


def quadratic(width: Schedule) -> Slope:
    """The slope of the quadratic penalty ``max(gap, 0)^2 / (2 sigma)``: BVFSM.

    Args:
        width: sigma > 0, a number or a schedule of the update; paper: falling to 0.

    Raises:
        ValueError: for a number that is not positive.

    Example:
        >>> float(quadratic(0.5)(jnp.float32(2.0), jnp.int32(0))), float(quadratic(0.5)(jnp.float32(-2.0), jnp.int32(0)))
        (4.0, 0.0)
    """
    checks.positive("width", width, schedule=True)
    return lambda gap, step: jnp.maximum(gap, 0) / value_at(width, step)


def moreau(problem: Problem, multiplier: Schedule, *, gamma: float, nonsmooth: Nonsmooth | None = None) -> Oracle:
    """MEHA: first derivatives of ``f / c + g - m_gamma``, the Moreau envelope m_gamma with theta for its proximal point.

    With ``g = gs + r``, gs smooth and given as ``problem.inner``::

        Dtheta = d_z gs(theta) + (theta - z) / gamma
        Dx     = d_x f(z) / c + d_x g(z) - d_x g(theta)
        Dz     = d_z f(z) / c + d_z gs(z) - (z - theta) / gamma          (theta constant)

    The z-part of r is left to the proximal steps of z and theta; its derivative in x is in Dx.

    Args:
        problem: f, and the smooth part of g.
        multiplier: c > 0, a number or a schedule of the update.
        gamma: parameter of the envelope, below 1 / (2 rho) in theory where g is rho-weakly convex in z.
        nonsmooth: r, of `bilevel_jax.nonsmooth`.

    Raises:
        TypeError, ValueError: for anything but a ``Problem``, numbers that are not positive, and a term that is none.

    Warns:
        UserWarning: when the multiplier (of a schedule: at its start) leaves fewer than four digits in the dtype of x.

    Cost: one inner gradient for theta, two and an outer pair for x, one and an outer pair for z.

    Reference: Liu, Liu, Yao, Zeng, Zhang, "Moreau envelope for nonconvex bi-level optimization: a single-loop and Hessian-free
    solution strategy", ICML 2024, arXiv 2405.09927.

    Example:
        >>> problem = Problem(lambda z, x, a: 0.5 * ((z - x) ** 2).sum(), lambda z, x, b: 0.5 * (z**2).sum())
        >>> at = Vars(jnp.ones(1), jnp.ones(1), jnp.ones(1))  # z = theta = z*(x): only f is left
        >>> terms = moreau(problem, 10.0, gamma=1.0).terms(at, Batch(outer=jnp.zeros(1)), jnp.int32(0))
        >>> float(terms.inner.inner[0]), float(terms.inner.outer[0]), round(float(terms.outer.inner[0]), 3)
        (0.0, 0.0, 0.1)
    """
    g, f = losses(problem)
    checks.positive("multiplier", multiplier, schedule=True)
    checks.positive("gamma", gamma)
    if nonsmooth is not None and not isinstance(nonsmooth, Nonsmooth):
        raise TypeError(f"nonsmooth: got {type(nonsmooth).__name__}, expected a term of bilevel_jax.nonsmooth")

    def terms(vars: Vars, batch: Batch, step: Array) -> Terms:
        z, theta, x = vars
        checks.same_shapes("vars.aux", theta, z, "vars.inner")
        gz, gx_z = jax.grad(g, argnums=(0, 1))(z, x, batch)
        gt, gx_t = jax.grad(g, argnums=(0, 1))(theta, x, batch)
        apart = scaled(1 / gamma, jax.tree.map(jnp.subtract, z, theta))
        dtheta, dz = jax.tree.map(jnp.subtract, gt, apart), jax.tree.map(jnp.subtract, gz, apart)
        dx = jax.tree.map(jnp.subtract, gx_z, gx_t)
        if nonsmooth is not None:
            rx_z, rx_t = (jax.grad(nonsmooth.value, argnums=1)(at, x) for at in (z, theta))
            dx = jax.tree.map(lambda d, a, b: d + (a - b), dx, rx_z, rx_t)
        if batch.outer is None:  # theta moves without f
            return Terms(inner=Vars(aux=dtheta))
        c = value_at(multiplier, step)
        warn_digits("multiplier (of meha: c_low)", multiplier, x)
        fz, fx = outer_pair(f, z, x, batch)
        return Terms(inner=Vars(dz, dtheta, dx), outer=Vars(over(c, fz), None, None if fx is None else over(c, fx)))

    def calls(moved: Vars) -> Calls:
        z, theta = bool(moved.inner or moved.outer), bool(moved.aux or moved.outer)
        return Calls(inner_gradient=float(z + theta), outer_gradient=float(z))

    def check(vars: Vars, draw: Batch) -> None:
        by_term = depends(lambda x: (nonsmooth or zero()).value(vars.inner, x), vars.outer)
        inspected(problem, Uses(z=True, x=by_term))(vars, draw)

    return Oracle(terms, calls, check=check)


# ---- what they share ---------------------------------------------------------------------------------------------------


def digits_left(multiplier: float, dtype: Any) -> float:
    """Decimal digits of a difference of near-equal numbers of a dtype that are left after multiplication.

    Example:
        >>> round(digits_left(1e5, jnp.float32), 1)
        1.9
    """
    return float(-np.log10(float(jnp.finfo(dtype).eps) * multiplier))


def warn_digits(name: str, multiplier: Schedule, x: PyTree) -> None:
    """Warn if a concrete multiplier of a difference leaves fewer than four digits, having cost three or more; or under one."""
    with jax.ensure_compile_time_eval():  # of a schedule, its start, also while the update is traced
        start = value_at(multiplier, jnp.zeros((), jnp.int32))
    if isinstance(start, Tracer):
        return
    lam = float(start)
    kinds = [leaf.dtype for leaf in jax.tree.leaves(x)]
    coarse = max(kinds, key=lambda kind: float(jnp.finfo(kind).eps))
    left = digits_left(lam, coarse)
    if left < 1 or (left < 4 and lam > 1e3):
        warnings.warn(
            f"{name}: got {lam:g}, which leaves about {max(left, 0):.1f} decimal digits of the differences that it multiplies "
            f"in {jnp.dtype(coarse).name}: take a smaller one, or compute in float64",
            stacklevel=2,
        )


def _wanted(batch: Batch, y: PyTree, z: PyTree) -> None:
    if batch.outer is None:
        raise ValueError("batch.outer: got None, expected data of the outer loss")
    checks.same_shapes("vars.aux", y, z, "vars.inner")


def _column(values: np.ndarray, like: Array) -> Array:
    """Numbers along the leading axis, to be multiplied with a leaf ``[nodes, ...]``."""
    return jnp.asarray(values, like.dtype).reshape(-1, *(1,) * (like.ndim - 1))
