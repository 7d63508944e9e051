"""The Moreau envelope and MEHA: gradients, limits in the penalty, contraction, and its three toy problems, in float64."""

from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from bilevel_jax import Batch, Problem, Result, Vars, descend, nonsmooth, solvers, sweep
from bilevel_jax.estimators import total
from bilevel_jax.moreau import envelope, residual
from bilevel_jax.projections import project, proximal_sgd
from bilevel_jax.value_oracles import moreau
from tests.checks import ZERO, check_same
from tests.tables import distance, thinned
from tests.test_first_order import hypergradient, logistic, means, newton, slopes

NOTHING = Batch(inner=np.zeros((1, 1)), outer=np.zeros((1, 1)))


def repeated(batch: Batch, draws: int) -> Batch:
    """The same draw as often as a solver takes one."""
    return jax.tree.map(lambda leaf: jnp.stack([leaf] * draws), batch)


# ---- the envelope as a function ----------------------------------------------------------------------------------------


def exact_point(z: jax.Array, x: jax.Array, gamma: float) -> jax.Array:
    """The proximal point on `logistic`, by Newton steps."""
    problem, _, batch = logistic()
    g, _ = means(problem, batch)
    return newton(lambda theta: g(theta, x) + ((theta - z) ** 2).sum() / (2 * gamma), z)


@cache
def envelope_at() -> Any:
    problem, _, batch = logistic()
    return jax.jit(lambda z, x: envelope(problem, z, x, batch, gamma=0.7, rate=0.15, tolerance=1e-11))


def test_envelope_is_the_minimum():
    """Its point is that of Newton's method, the gap is never negative, and vanishes where z is stationary only."""
    problem, start, batch = logistic()
    g, _ = means(problem, batch)
    rng, x = np.random.default_rng(0), start.outer
    for z in (jnp.asarray(scale * rng.normal(size=4)) for scale in (0.1, 1.0, 10.0)):
        known, point = envelope_at()(z, x), exact_point(z, x, 0.7)
        assert distance(known.point, point) < 1e-10
        value = g(point, x) + ((point - z) ** 2).sum() / 1.4
        np.testing.assert_allclose([known.value, known.gap], [value, g(z, x) - value], atol=1e-11)
        assert float(known.gap) > 1e-3
        assert int(known.code) == Result.SUCCESSFUL
    rest = newton(lambda z: g(z, x), start.inner)
    assert abs(float(envelope_at()(rest, x).gap)) < 1e-14


def test_gradient_of_the_envelope():
    """``((z - theta*) / gamma, d_x g(theta*, x))``, against central differences of its value."""
    problem, start, batch = logistic()
    g, _ = means(problem, batch)
    z, h = jnp.asarray(np.random.default_rng(1).normal(size=4)), 1e-4
    value = jax.jit(jax.vmap(lambda u: envelope_at()(u[:4], u[4:]).value))
    at, eye = jnp.concatenate([z, start.outer]), jnp.eye(7)
    central = (value(at[None] + h * eye) - value(at[None] - h * eye)) / (2 * h)
    theta = exact_point(z, start.outer, 0.7)
    check_same(jnp.concatenate([(z - theta) / 0.7, jax.grad(g, argnums=1)(theta, start.outer)]), central, tol=1e-8)


def test_residual_is_the_gradient_of_the_penalised_loss():
    """Without constraints: |grad (f + c (g - m_gamma))|, which is c times the directions of `moreau` at the exact theta."""
    problem, start, batch = logistic()
    z, x, c = jnp.asarray(np.random.default_rng(1).normal(size=4)), start.outer, 30.0
    found = jax.jit(
        lambda c, steps=100_000: residual(
            problem, z, x, batch, multiplier=c, gamma=0.7, rate=0.15, tolerance=1e-11, max_steps=steps
        )
    )
    way = total(moreau(problem, c, gamma=0.7).terms(Vars(z, exact_point(z, x, 0.7), x), batch, ZERO))
    np.testing.assert_allclose(found(c), c * jnp.sqrt((way.inner**2).sum() + (way.outer**2).sum()), rtol=1e-8)


@pytest.mark.more
def test_an_envelope_that_is_not_solved_says_so():
    problem, start, batch = logistic()
    z, few = jnp.full(4, 3.0), {"gamma": 0.7, "rate": 0.15, "max_steps": 2}
    known = envelope(problem, z, start.outer, batch, **few)
    assert (int(known.code), int(known.steps)) == (Result.MAX_STEPS_REACHED, 2)
    assert np.isnan(float(residual(problem, z, start.outer, batch, multiplier=3.0, **few)))
    assert int(envelope(problem, z * jnp.nan, start.outer, batch, **few).code) == Result.NONFINITE


def test_residual_on_constraints_and_with_a_nonsmooth_part():
    """0 at a solution that is held by a box and by an l1 norm, and not beside it.

    ``g = |z - 2|^2 / 2 + |z|``: z = 1, and x = 0.5 minimises ``f = -x`` over x <= 0.5; f does not see z."""
    problem = Problem(lambda z, x, a: 0.5 * ((z - 2) ** 2).sum(), lambda z, x, b: -x.sum())
    held = nonsmooth.constrained(nonsmooth.l1(), nonsmooth.box(-3.0, 3.0))
    at = lambda z, x: float(
        residual(
            problem,
            jnp.full(1, z),
            jnp.full(1, x),
            Batch(),
            multiplier=5.0,
            gamma=1.0,
            rate=0.4,
            nonsmooth=held,
            projections=(None, nonsmooth.box(0.0, 0.5)),
        )
    )
    assert at(1.0, 0.5) < 1e-9
    assert at(1.0, 0.4) == pytest.approx(1.0)
    # theta* = (z + 1) / 2, so that the prox of 1.2 - rate (-0.8 - 0.1) is 1.16 at rate = 0.4: (1.2 - 1.16) c / rate
    assert at(1.2, 0.5) == pytest.approx(0.5)
    low = envelope(problem, jnp.full(1, 3.0), jnp.zeros(1), Batch(), gamma=1.0, rate=0.4, projection=nonsmooth.box(2.75, 3.0))
    assert float(low.point[0]) == 2.75  # without the box it is 2.5


# ---- limits in c -------------------------------------------------------------------------------------------------------

PENALTIES = (1e2, 1e3, 1e4)


@cache
def limits(gamma: float) -> dict[str, np.ndarray]:
    """At fixed x, the point (z_c, theta_c) where the directions of z and theta vanish, and how far it is from its limits."""
    problem, start, batch = logistic()
    (g, f), x = means(problem, batch), start.outer

    @jax.jit
    def at(c: Any) -> Any:
        oracle = moreau(problem, c, gamma=gamma)
        best = newton(lambda z: g(z, x), start.inner)

        def directions(u):
            way = total(oracle.terms(Vars(u[:4], u[4:], x), batch, ZERO))
            return jnp.concatenate([way.inner, way.aux])

        step = lambda _, u: u - jnp.linalg.solve(jax.jacobian(directions)(u), directions(u))
        u = jax.lax.fori_loop(0, 20, step, jnp.concatenate([best, best]))
        z, theta = u[:4], u[4:]
        v = -jnp.linalg.solve(jax.hessian(g)(best, x), jax.grad(f)(best, x))
        way = total(oracle.terms(Vars(z, theta, x), batch, ZERO)).outer
        return {
            "z": jnp.linalg.norm(z - best),
            "f": f(z, x) - f(best, x),
            "gap": g(z, x) - g(theta, x) - ((z - theta) ** 2).sum() / (2 * gamma),
            "v": jnp.linalg.norm(c * (z - theta) - v),
            "x": jnp.linalg.norm(c * way - hypergradient(problem, best, x, batch)),
            "at": jnp.abs(directions(u)).max(),
        }

    rows = [at(c) for c in PENALTIES]
    return {name: np.array([row[name] for row in rows]) for name in rows[0]}


@thinned("gamma", [0.2, 0.7, 3.0], 0.7)
def test_limits_of_the_penalised_solution(gamma):
    """z is O(1/c) off, f lower by O(1/c), the gap O(1/c^2); ``c (z - theta) -> v*`` and ``c Dx -> grad h``, with its sign."""
    found = limits(gamma)
    assert found["at"].max() < 1e-13
    for name, slope in (("z", -1), ("f", -1), ("gap", -2), ("v", -1), ("x", -1)):
        np.testing.assert_allclose(slopes(np.abs(found[name]), PENALTIES), slope, atol=0.1, err_msg=name)
    assert (found["f"] < 0).all()
    assert (found["gap"] > 0).all()
    assert max(found["v"][-1], found["x"][-1]) < 1e-2


# ---- one step of each --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gamma", [0.2, 0.45])
def test_theta_contracts(gamma):
    """x and z frozen and g 1-weakly convex: by ``1 - eta rho_h`` a step at least, with eta = 2 / (L_h + rho_h)."""
    problem = Problem(lambda z, x, a: jnp.sin(x + z).sum(), lambda z, x, b: 0.0 * z.sum())
    smooth, convex = 1 + 1 / gamma, 1 / gamma - 1
    eta = 2 / (smooth + convex)
    x, z = jnp.asarray(0.3, jnp.float64), jnp.asarray(np.random.default_rng(0).uniform(-6, 6, 20))
    solver = sweep(descend(moreau(problem, 1.0, gamma=gamma), Vars(aux=optax.sgd(eta))))
    batch = repeated(NOTHING, 1)
    known = envelope(problem, z, x, NOTHING, gamma=gamma, rate=1 / smooth, tolerance=1e-13)
    update, state, errors = jax.jit(solver.update), solver.init(Vars(z, z + 3.0, x), batch), [np.inf]
    for _ in range(8):
        errors.append(float(jnp.linalg.norm(state.vars.aux - known.point)))
        state = update(state, batch)
    ratios = np.array(errors[2:]) / errors[1:-1]
    assert (ratios <= 1 - eta * convex + 1e-9).all()
    assert ratios.max() > 0.2 * (1 - eta * convex), "it is far from sharp: the bound shows nothing"


def test_update_is_theta_then_x_then_z():
    """theta at the old x and z, x at the old z and the new theta, z at the new x and the new theta; f over c_k."""
    problem, start, batch = logistic()
    (g, f), gamma, rates = means(problem, batch), 0.7, Vars(0.3, 0.2, 0.4)
    z, theta, x = jnp.arange(4.0), jnp.ones(4), start.outer
    solver = solvers.meha(problem, Vars(*map(optax.sgd, rates)), gamma=gamma, c_low=2.0, p=0.25)
    stacked = repeated(batch, 3)
    state, update = solver.init(Vars(z, theta, x), stacked), jax.jit(solver.update)
    gz, gx, fz, fx = (jax.grad(loss, argnums=side) for loss in (g, f) for side in (0, 1))

    def theta_step(z, theta, x, c):
        return z, theta - rates.aux * (gz(theta, x) + (theta - z) / gamma), x

    def x_step(z, theta, x, c):
        return z, theta, x - rates.outer * (fx(z, x) / c + gx(z, x) - gx(theta, x))

    def z_step(z, theta, x, c):
        return z - rates.inner * (fz(z, x) / c + gz(z, x) - (z - theta) / gamma), theta, x

    right = wrong = (z, theta, x)
    for k in range(2):
        state, c = update(state, stacked), 2.0 * (k + 1) ** 0.25
        for step in (theta_step, x_step, z_step):
            right = step(*right, c)
        for step in (theta_step, z_step, x_step):
            wrong = step(*wrong, c)
    check_same(tuple(state.vars), right, tol=1e-13)
    assert distance(tuple(state.vars), wrong) > 1e-3


# ---- S1: g is merely convex, its solutions are not one -----------------------------------------------------------------


def line(n: int) -> tuple[Problem, Vars]:
    """``f = |x - z2|^2 / 2 + |z1 - 1|^2 / 2``, ``g = |z1|^2 / 2 - x'z1``, whose solution is all ones; all start at 0.01."""
    problem = Problem(
        lambda z, x, a: 0.5 * (z[0] @ z[0]) - x @ z[0],
        lambda z, x, b: 0.5 * ((x - z[1]) ** 2).sum() + 0.5 * ((z[0] - 1) ** 2).sum(),
    )
    return problem, Vars(jnp.full((2, n), 0.01), None, jnp.full(n, 0.01))


def follow(solver: Any, start: Vars, far: Any, updates: int) -> tuple[Vars, np.ndarray]:
    """The last variables, and ``far`` of those of every update, on one draw of nothing."""
    batch = repeated(NOTHING, solver.draws)

    def body(state, _):
        state = solver.update(state, batch)
        return state, far(state.vars)

    state, away = jax.jit(lambda s: jax.lax.scan(body, s, None, length=updates))(solver.init(start, batch))
    return state.vars, np.asarray(away)


def from_ones(vars: Vars) -> jax.Array:
    """The largest relative distance of x, z1 and z2."""
    return jnp.stack([jnp.linalg.norm(u - 1) for u in (vars.outer, *vars.inner)]).max() / vars.outer.size**0.5


def arrival(away: np.ndarray) -> int:
    """From how many updates on the distance stays below 1 %."""
    assert away[-1] < 0.01
    return int(np.flatnonzero(away >= 0.01)[-1]) + 2


@thinned(
    ("rates", "gamma", "updates"),
    [((0.5, 0.3, 0.5), 1.0, 36), ((0.5, 0.1, 0.5), 5.0, 38), ((0.1, 0.3, 0.5), 5.0, 40)],
    ((0.5, 0.3, 0.5), 1.0, 36),
)
def test_meha_on_a_merely_convex_problem(rates, gamma, updates):
    """1 % of the solution after the same number of updates whatever the dimension, and it stays there; rates of x, z, theta."""
    alpha, beta, eta = rates
    opts = Vars(*map(optax.sgd, (beta, eta, alpha)))
    for n in (10, 1000):
        problem, start = line(n)
        _, away = follow(solvers.meha(problem, opts, gamma=gamma, c_low=0.1), start, from_ones, 400)
        assert arrival(away) == updates


@pytest.mark.more
def test_unrolling_is_blind_to_what_the_inner_loss_does_not_see():
    """z2 has no inner gradient and stays where it starts, so that x goes to the mean of that and 1, far from the solution;
    the aggregated steps of BDA move it."""
    problem, start = line(3)
    plain = solvers.itd_bio(problem, Vars(inner=optax.sgd(0.3), outer=optax.sgd(0.3)), inner_steps=30, fresh=False)
    end, _ = follow(plain, start, from_ones, 100)
    np.testing.assert_allclose(end.outer, (0.01 + 1) / 2, atol=1e-4)
    np.testing.assert_allclose(end.inner[1], 0.01, rtol=1e-12)
    opts = Vars(inner=optax.sgd(0.5), outer=optax.sgd(0.2))
    bda = solvers.bda(problem, opts, inner_steps=64, weight=lambda k: 0.5 * (k + 1.0) ** -0.5)
    _, away = follow(bda, start, from_ones, 200)
    assert away[-1] < 0.05


# ---- S2: g has many minima ---------------------------------------------------------------------------------------------


@pytest.mark.more
def test_meha_among_many_inner_minima():
    """``f = (x - 2)^2 + (z - 4)^2``, ``g = sin(x + z - 2)``, from (-6, 0), z in a box, gamma below 1/2: 120 updates to 1 %."""
    problem = Problem(lambda z, x, a: jnp.sin(x + z - 2), lambda z, x, b: (x - 2) ** 2 + (z - 4) ** 2)
    best = Vars(outer=3 * np.pi / 4, inner=3 * np.pi / 4 + 2)
    bounded = optax.chain(optax.sgd(0.3), project(nonsmooth.box(-10.0, 10.0)))
    solver = solvers.meha(problem, Vars(bounded, bounded, optax.sgd(1.0)), gamma=0.45, rho=1.0, c_low=5.0)
    away = lambda vars: jnp.maximum(jnp.abs(vars.outer / best.outer - 1), jnp.abs(vars.inner / best.inner - 1))
    at = lambda value: jnp.asarray(value, jnp.float64)
    end, found = follow(solver, Vars(at(0.0), None, at(-6.0)), away, 1000)
    assert arrival(found) == 120
    f_best = problem.outer(best.inner, best.outer, None)
    assert 0.95 * f_best < float(problem.outer(end.inner, end.outer, None)) < f_best  # from below, O(1/c) off
    tight = optax.chain(optax.sgd(0.3), project(nonsmooth.box(-1.0, 1.0)))
    held, inside = follow(
        solvers.meha(problem, Vars(tight, tight, optax.sgd(1.0)), gamma=0.45, c_low=5.0),
        Vars(at(0.0), None, at(-6.0)),
        lambda vars: jnp.maximum(jnp.abs(vars.inner), jnp.abs(vars.aux)),
        200,
    )
    assert inside.max() == 1.0
    assert float(held.inner) == 1.0


# ---- S3: g is not smooth -----------------------------------------------------------------------------------------------

TERM = nonsmooth.l1(lambda x: x)


def lasso() -> Problem:
    """``f = sum z``, and the smooth part of ``g = |z - a|^2 / 2 + sum_i x_i |z_i|``, for a = (1, -2, 0.5, 3)."""
    return Problem(lambda z, x, a: 0.5 * ((z - jnp.array([1.0, -2.0, 0.5, 3.0])) ** 2).sum(), lambda z, x, b: z.sum())


def test_prox_rests_at_the_inner_solution():
    """At large c, z and theta go to soft(a, x), with the weights of the current x."""
    x = jnp.array([0.4, 0.5, 0.7, 4.0])
    opts = Vars(proximal_sgd(0.3, TERM), proximal_sgd(0.4, TERM), optax.sgd(0.0))
    best = jnp.array([0.6, -1.5, 0.0, 0.0])
    for c in (1e3, 1e6):
        solver = solvers.meha(lasso(), opts, gamma=2.0, c_low=c, p=0.0, nonsmooth=TERM)
        end, _ = follow(solver, Vars(jnp.ones(4), None, x), lambda vars: vars.outer.sum(), 600)
        assert distance(end.inner, best) < 2 / c
        assert distance(end.aux, best) < 2 / c
    solver = solvers.meha(lasso(), opts, gamma=2.0, c_low=1e9, p=0.0, nonsmooth=TERM)
    still, _ = follow(solver, Vars(best, best, x), lambda vars: vars.outer.sum(), 20)
    assert distance((still.inner, still.aux), (best, best)) < 1e-8


def test_derivative_of_the_nonsmooth_part_moves_x():
    """Dx = (|z| - |theta|) here, and the z-part of r is left to the prox; the new x gives the threshold of z."""
    z, theta, x = jnp.array([1.0, -2.0, 0.0, 0.5]), jnp.array([0.5, 3.0, -1.0, 0.0]), jnp.array([0.1, 0.6, 0.3, 0.4])
    way = total(moreau(lasso(), 10.0, gamma=2.0, nonsmooth=TERM).terms(Vars(z, theta, x), NOTHING, ZERO))
    check_same(way.outer, jnp.array([0.5, -1.0, -1.0, 0.5]))
    smooth = total(moreau(lasso(), 10.0, gamma=2.0).terms(Vars(z, theta, x), NOTHING, ZERO))
    check_same((way.inner, way.aux), (smooth.inner, smooth.aux))
    alpha, beta, eta, gamma = 0.2, 0.3, 0.4, 2.0
    opts = Vars(proximal_sgd(beta, TERM), proximal_sgd(eta, TERM), optax.sgd(alpha))
    solver = solvers.meha(lasso(), opts, gamma=gamma, c_low=4.0, p=0.0, nonsmooth=TERM)
    end, _ = follow(solver, Vars(z, theta, x), lambda vars: vars.outer.sum(), 1)
    a, soft = np.array([1.0, -2.0, 0.5, 3.0]), lambda u, t: np.sign(u) * np.maximum(np.abs(u) - t, 0)
    z, theta, x = map(np.asarray, (z, theta, x))
    theta = soft(theta - eta * (theta - a + (theta - z) / gamma), eta * x)
    x = x - alpha * (np.abs(z) - np.abs(theta))
    z = soft(z - beta * (0.25 + z - a - (z - theta) / gamma), beta * x)
    check_same(end, jax.tree.map(jnp.asarray, Vars(z, theta, x)), tol=1e-13)
