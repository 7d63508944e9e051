"""Recursive solvers: z and x along running estimates that are corrected on the same samples at two points.

As in `bilevel_jax.solvers.double_loop`, v is solved for, and ``opts.aux`` stays None.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree

from bilevel_jax import checks
from bilevel_jax.control_flow import cond, scan
from bilevel_jax.estimators import on_full, storm, total
from bilevel_jax.linear_solve import neumann, random_neumann
from bilevel_jax.optimisers import begin, moved, weight_at
from bilevel_jax.oracles import aid, aid_terms, inspected, losses
from bilevel_jax.results import Status, Tally, keep, tally
from bilevel_jax.samplers import take_draw, take_window
from bilevel_jax.solvers.steps import two
from bilevel_jax.sweep import descend, sweep
from bilevel_jax.trees import narrow, widen, widest
from bilevel_jax.types import Array, Batch, Calls, Cost, Problem, PyTree, Schedule, Solver, Stage, Vars


def mrbo(
    problem: Problem,
    opts: Vars,
    *,
    rate: Any,
    terms: int = 10,
    eta: Schedule = lambda t: (t + 1.0) ** (-2 / 3),
) -> Solver:
    """MRBO: z and x move at once along STORM estimates of ``d_z g`` and of the hypergradient by a Neumann sum.

    Both points of a correction are evaluated on the same samples.  Deviations: one momentum weight for both estimates where
    the paper has c_1 and c_2, and one inner sample for ``d_z g`` and the cross product.

    Args:
        problem, opts: as for `aid_bio`.  Paper: steps ~ t^-1/3.
        rate, terms: as for `stocbio`, but a number: the same at both points.
        eta: weight of the new estimate, a number in [0, 1] or a schedule; paper: ~ t^-2/3.  1 is the plain method.

    Raises:
        TypeError, ValueError: as for `aid_bio`; for eta outside [0, 1].

    Cost of an update: two inner gradients, 2 ``terms`` Hessian-vector products, two cross products, two outer gradient pairs.

    Reference: Yang, Ji, Liang, "Provably faster algorithms for bilevel optimization", NeurIPS 2021, arXiv 2106.04692.

    Example:
        >>> import optax
        >>> problem = Problem(lambda z, x, a: ((z - x) ** 2).sum(), lambda z, x, b: (z**2).sum())
        >>> tuple(mrbo(problem, Vars(inner=optax.sgd(0.1), outer=optax.sgd(0.1)), rate=0.1, terms=5).cost.draw)
        (2.0, 10.0, 2.0, 2.0)
    """
    directions = aid(problem, neumann(terms=terms, rate=rate, fresh=True))
    return sweep(descend(directions, two(opts), estimator=storm(eta)))


def sustain(
    problem: Problem,
    opts: Vars,
    *,
    rate: Any,
    terms: int = 10,
    eta: Schedule = lambda t: (t + 1.0) ** (-2 / 3),
) -> Solver:
    """SUSTAIN: `mrbo` with the randomly truncated Neumann product; both points of a correction share its length.

    Deviations: as in `mrbo`, one momentum weight eta for both estimates, where the paper has one for z and one for x, and one
    inner sample for ``d_z g`` and the cross product.

    Args, Raises: as for `mrbo`.

    Cost of an update: two inner gradients, ``terms`` - 1 Hessian-vector products on average, two cross products, two outer
    gradient pairs.

    Reference: Khanduri, Zeng, Hong, Wai, Wang, Yang, "A near-optimal algorithm for stochastic bilevel optimization via
    double-momentum", NeurIPS 2021, arXiv 2102.07367.

    Example:
        >>> import optax
        >>> problem = Problem(lambda z, x, a: ((z - x) ** 2).sum(), lambda z, x, b: (z**2).sum())
        >>> tuple(sustain(problem, Vars(inner=optax.sgd(0.1), outer=optax.sgd(0.1)), rate=0.1, terms=5).cost.draw)
        (2.0, 4.0, 2.0, 2.0)
    """
    directions = aid(problem, random_neumann(terms=terms, rate=rate, fresh=True))
    return sweep(descend(directions, two(opts), estimator=storm(eta)))


def _states(opts: Vars, vars: Vars) -> Vars:
    """The optax states of z and x, whose directions are not gradients of a loss."""

    def of(name: str) -> PyTree:
        value = getattr(vars, name)
        return begin(f"opts.{name}", name, getattr(opts, name), value, vars.outer, loss=False, backward=False)

    return Vars(inner=of("inner"), outer=of("outer"))


class VrboState(NamedTuple):
    """What `vrbo` keeps from sweep to sweep."""

    direction: Vars  # running estimates of d_z g and of the hypergradient, aux None; float32 at least
    opts: Vars  # optax states of z and x
    status: Status  # the worst code of the linear solver


def vrbo(problem: Problem, opts: Vars, *, rate: Any, period: int = 3, inner_steps: int = 10, terms: int = 10) -> Solver:
    """VRBO: SARAH estimates of ``d_z g`` and of the hypergradient, corrected along an inner loop after every step of x.

    With (z, x) the variables and D = (d_z g, hypergradient by a Neumann sum): every ``period`` sweeps D is that of the full
    data; x+ = x - c D_x; then for t = 0..m+1, on fresh samples, D += D(z_t, x+) - D(z_{t-1}, x_{t-1}) and, but for the last t,
    z_{t+1} = z_t - a D_z, where (z_{-1}, x_{-1}) = (z, x) and z_0 = z.  So the first difference is taken across x, the others
    across z, and without noise D is that of the current variables.  Public code takes all differences at the new x, and never
    corrects for the step of x.

    Deviation: the large batch of a refresh is the full data.

    Args:
        problem, opts: as for `aid_bio`.  Paper: constant steps.
        rate, terms: as for `mrbo`.
        period: sweeps from one refresh to the next.
        inner_steps: m + 1, inner steps in a sweep.

    Raises:
        TypeError, ValueError: as for `aid_bio`; (when traced) if ``batch.full`` is missing.

    Cost of an update: ``inner_steps + 1`` times two of `mrbo`'s plain estimates, and one on the full data in every
    ``period``-th.

    Reference: Yang, Ji, Liang, "Provably faster algorithms for bilevel optimization", NeurIPS 2021, arXiv 2106.04692.

    Example:
        >>> import optax
        >>> problem = Problem(lambda z, x, a: ((z - x) ** 2).sum(), lambda z, x, b: (z**2).sum())
        >>> tuple(vrbo(problem, Vars(inner=optax.sgd(0.1), outer=optax.sgd(0.1)), rate=0.1, terms=5, inner_steps=4).cost.draw)
        (10.0, 50.0, 10.0, 10.0)
    """
    opts = two(opts)
    period, inner_steps = checks.positive_int("period", period), checks.positive_int("inner_steps", inner_steps)
    solver = neumann(terms=terms, rate=rate, fresh=True)
    terms_at, width = aid_terms(problem, solver), solver.draws + 1

    def at(z: PyTree, x: PyTree, draw: Callable[[Any], Batch]) -> tuple[Vars, Array]:
        parts, code = terms_at(Vars(z, None, x), draw)
        return widen(total(parts)), code  # sums of differences: see `bilevel_jax.trees.widen`

    def init(vars: Vars, batches: Batch) -> VrboState:
        if batches.outer is None:
            raise ValueError("batch.outer: got None, expected data of the outer loss")
        on_full(batches, "vrbo")
        shapes, _ = jax.eval_shape(lambda b: at(vars.inner, vars.outer, lambda k: take_draw(b, k)), batches)
        inspected(problem)(vars, jax.eval_shape(lambda b: take_draw(b, 0), batches))
        zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
        states = _states(opts, vars)
        return VrboState(zeros, states, Status(jnp.zeros((), jnp.int32)))

    def update(state: VrboState, vars: Vars, batches: Batch, step: Array) -> tuple[Vars, VrboState]:
        z, v, x = vars
        everything = on_full(take_draw(batches, 0), "vrbo")
        held, code = cond(
            step % period == 0, lambda: at(z, x, lambda k: everything), lambda: (state.direction, state.status.code)
        )
        new_x, outer = moved(opts.outer, narrow(held.outer, x), state.opts.outer, x, x)

        def inner(carry: tuple, t: Array) -> tuple[tuple, None]:
            draws = take_window(batches, t * width, width)
            z, old_z, old_x, held, opt, code = carry
            new, new_code = at(z, new_x, lambda k: take_draw(draws, k))
            old, old_code = at(old_z, old_x, lambda k: take_draw(draws, k))
            held = jax.tree.map(lambda d, n, o: d + (n - o), held, new, old)
            next_z, opt = keep(t < inner_steps, moved(opts.inner, narrow(held.inner, z), opt, z, new_x), (z, opt))
            return (next_z, z, new_x, held, opt, jnp.stack([code, new_code, old_code]).max()), None

        carry = (z, z, x, held, state.opts.inner, jnp.maximum(code, state.status.code))
        (z, _, _, held, opt, code), _ = scan(inner, carry, jnp.arange(inner_steps + 1, dtype=jnp.int32))
        return Vars(z, v, new_x), VrboState(held, Vars(inner=opt, outer=outer), Status(code))

    each = Calls(1.0, solver.applications, 1.0, 1.0)
    cost = Cost(Calls(*(2 * (inner_steps + 1) * c for c in each)), Calls(*(c / period for c in each)))
    return sweep(Stage(init, update, (inner_steps + 1) * width, cost, lazy=True))


class StableState(NamedTuple):
    """What `stable` keeps from update to update."""

    hessian: Array  # float [p, p], running estimate of d2_zz g
    cross: Array  # float [d, p], running estimate of d2_xz g
    old: Vars  # z and x at the last update
    opts: Vars  # optax states of z and x
    tally: Tally


def stable(problem: Problem, opts: Vars, *, strong_convexity: float, tau: Schedule = 0.5) -> Solver:
    """STABLE, for tiny problems: dense recursive estimates of both second derivatives; z follows z*(x) along the step of x.

    With H, J the estimates, each ``(1 - tau) (held - that at the old point) + that at the new point`` on one draw:
    ``v = -H^-1 d_z f``, ``x+ = x - c (d_x f + J v)``, ``z+ = z - a d_z g - H^-1 J' (x+ - x)``.  The eigenvalues of H are
    raised to ``strong_convexity`` where it is inverted; the recursion goes on from the estimate as it was.  The first estimates
    are the plain ones.

    Args:
        problem, opts: as for `aid_bio`.  Paper: steps ~ t^-1/2.
        strong_convexity: mu of g in z.
        tau: weight of the new estimates, a number in [0, 1] or a schedule.

    Raises:
        TypeError, ValueError: as for `aid_bio`; for tau outside [0, 1] and strong_convexity that is not above 0.

    Cost of an update: one inner gradient, 2 p Hessian-vector and 2 p cross products (p numbers in z; counted in the state:
    see `bilevel_jax.results.spent`), one outer gradient pair, and an eigendecomposition of a p x p matrix.

    Reference: Chen, Sun, Xiao, Yin, "A single-timescale method for stochastic bilevel optimization", AISTATS 2022, arXiv
    2102.04671.  The paper also bounds the norm of J, which is left out.

    Example:
        >>> import optax
        >>> problem = Problem(lambda z, x, a: ((z - x) ** 2).sum(), lambda z, x, b: (z**2).sum())
        >>> stable(problem, Vars(inner=optax.sgd(0.1), outer=optax.sgd(0.1)), strong_convexity=1.0).draws
        1
    """
    opts = two(opts)
    checks.unit_interval("tau", tau)
    g, f = losses(problem)
    checks.number("strong_convexity", strong_convexity)
    counted = Calls(hessian_vector=math.inf, cross=math.inf)  # 2 p, and p is not known here

    def flat(tree: PyTree, wide: Any) -> tuple[Array, Callable[[Array], PyTree]]:
        """A tree as one vector, and the way back to its dtypes; the dense algebra is in one dtype, float32 at least."""
        vector, back = ravel_pytree(jax.tree.map(lambda leaf: leaf.astype(wide), tree))
        return vector, lambda w: narrow(back(w), tree)

    def matrices(z: PyTree, x: PyTree, draw: Batch) -> tuple[Array, Array]:
        (flat_z, to_z), (flat_x, to_x) = (flat(tree, widest((z, x))) for tree in (z, x))
        slope = lambda z, x: jax.grad(lambda z: g(to_z(z), to_x(x), draw))(z)  # noqa: E731
        return jax.jacfwd(slope)(flat_z, flat_x), jax.jacrev(slope, argnums=1)(flat_z, flat_x).T

    def init(vars: Vars, batches: Batch) -> StableState:
        if batches.outer is None:
            raise ValueError("batch.outer: got None, expected data of the outer loss")
        draw = jax.eval_shape(lambda b: take_draw(b, 0), batches)
        shapes = jax.eval_shape(matrices, vars.inner, vars.outer, draw)
        inspected(problem)(vars, draw)
        hessian, cross = (jnp.zeros(s.shape, s.dtype) for s in shapes)
        states = _states(opts, vars)
        return StableState(hessian, cross, jax.tree.map(jnp.copy, vars._replace(aux=None)), states, tally(counted))

    def update(state: StableState, vars: Vars, batches: Batch, step: Array) -> tuple[Vars, StableState]:
        z, _, x = vars
        draw = take_draw(batches, 0)
        rest = 1 - jnp.where(step == 0, 1.0, weight_at(tau, step))
        new, old = matrices(z, x, draw), matrices(state.old.inner, state.old.outer, draw)
        held = (state.hessian, state.cross)
        hessian, cross = (n + rest.astype(n.dtype) * (h - o) for n, o, h in zip(new, old, held, strict=True))
        hessian = (hessian + hessian.T) / 2
        values, basis = jnp.linalg.eigh(hessian)
        values = jnp.maximum(values, jnp.asarray(strong_convexity, values.dtype))
        invert = lambda w: basis @ ((basis.T @ w) / values)  # noqa: E731

        (fz, fx), dz = jax.grad(f, argnums=(0, 1))(z, x, draw), jax.grad(g)(z, x, draw)
        wide = hessian.dtype
        (_, to_z), (flat_x, to_x) = flat(z, wide), flat(x, wide)
        v = -invert(flat(fz, wide)[0])
        new_x, outer = moved(opts.outer, jax.tree.map(jnp.add, fx, to_x(cross @ v)), state.opts.outer, x, x)
        follow = to_z(invert((flat(new_x, wide)[0] - flat_x) @ cross))
        new_z, inner = moved(opts.inner, dz, state.opts.inner, z, x)
        new_z = jax.tree.map(jnp.subtract, new_z, follow)
        calls = Calls(0, 2 * hessian.shape[0], 2 * hessian.shape[0], 0)
        spent = Tally(jax.tree.map(lambda t, c: t + jnp.int32(c), state.tally.calls, calls), counted)
        return Vars(new_z, to_z(v), new_x), StableState(
            hessian, cross, vars._replace(aux=None), Vars(inner=inner, outer=outer), spent
        )

    return sweep(Stage(init, update, 1, Cost(draw=counted._replace(inner_gradient=1.0, outer_gradient=1.0)), lazy=True))
