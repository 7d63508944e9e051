"""Nonsmooth terms and projections against scipy and optimality conditions, and proximal steps inside the stages."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy.optimize import LinearConstraint, minimize

from bilevel_jax import Batch, Problem, Vars, descend, implicit, nonsmooth, solve_inner, sweep, unroll
from bilevel_jax.optimisers import moved
from bilevel_jax.projections import prox, proximal_sgd, term_of
from tests.checks import check_same
from tests.tables import thinned

GROUPS = np.array([0, 1, 0, 2, 1, 1])
MEMBERS = [np.equal(GROUPS, j) for j in range(3)]
FIRST, SECOND = np.array([0.3, 1.1, 0.6]), np.linspace(0.1, 1.0, 6)
X = {"group": FIRST, "single": SECOND}

#: name -> the term, the weight of every group of `GROUPS`, and of every coordinate.
TERMS = {
    "zero": (nonsmooth.zero(), 0.0, 0.0),
    "l1 of a number": (nonsmooth.l1(0.7), 0.0, 0.7),
    "l1 of an array": (nonsmooth.l1(SECOND), 0.0, SECOND),
    "l1 of x": (nonsmooth.l1(lambda x: x["single"]), 0.0, SECOND),
    "l1 of the exponential of x": (nonsmooth.l1(lambda x: jnp.exp(x["single"])), 0.0, np.exp(SECOND)),
    "groups of a number": (nonsmooth.group_lasso(GROUPS, 0.7), 0.7, 0.0),
    "groups of an array": (nonsmooth.group_lasso(GROUPS, FIRST), FIRST, 0.0),
    "groups of x": (nonsmooth.group_lasso(GROUPS.tolist(), lambda x: x["group"]), FIRST, 0.0),
    "both of numbers": (nonsmooth.sparse_group_lasso(GROUPS, 0.5, 0.2), 0.5, 0.2),
    "both of x": (nonsmooth.sparse_group_lasso(GROUPS, lambda x: x["group"], lambda x: x["single"]), FIRST, SECOND),
}
every_term = pytest.mark.parametrize("name", TERMS)


def value(name: str, z: np.ndarray) -> float:
    """r(z) in plain NumPy."""
    _, whole, single = TERMS[name]
    norms = np.array([np.linalg.norm(z[of]) for of in MEMBERS])
    return float((whole * norms).sum() + (single * np.abs(z)).sum())


def minimiser(name: str, point: np.ndarray, step: float) -> np.ndarray:
    """Of ``r(u) + |u - point|^2 / (2 step)``, by scipy, as a smooth problem: u = p - q with p, q >= 0, and a bound on every
    group norm that is a variable, too."""
    _, whole, single = TERMS[name]
    whole, single = np.broadcast_to(whole, 3), np.broadcast_to(single, 6)
    split = lambda y: (y[:6], y[6:12], y[12:])

    def loss(y):
        p, q, t = split(y)
        return ((p - q - point) ** 2).sum() / (2 * step) + single @ (p + q) + whole @ t

    def slope(y):
        p, q, _ = split(y)
        pull = (p - q - point) / step
        return np.concatenate([pull + single, -pull + single, whole])

    def inside(y):
        p, q, t = split(y)
        return t - np.sqrt(np.array([((p - q)[of] ** 2).sum() for of in MEMBERS]) + 1e-16)

    start = np.concatenate([np.maximum(point, 0), np.maximum(-point, 0), np.full(3, 5.0)])
    found = minimize(
        loss,
        start,
        jac=slope,
        method="SLSQP",
        bounds=[(0, None)] * 15,
        constraints={"type": "ineq", "fun": inside},
        options={"ftol": 1e-14, "maxiter": 500},
    )
    return found.x[:6] - found.x[6:12]


def samples(count: int = 4) -> list[np.ndarray]:
    """Points of several sizes, with zeros, and a group of zeros, among their entries."""
    rng = np.random.default_rng(0)
    found = [scale * rng.normal(size=6) for scale in (0.3, 1.0, 3.0, 1.0)][:count]
    found[3 % count][MEMBERS[1]] = 0.0
    return found


@every_term
def test_value_is_that_of_the_formula(name):
    term = TERMS[name][0]
    for z in samples():
        np.testing.assert_allclose(float(term.value(jnp.asarray(z), X)), value(name, z), rtol=1e-14)
    assert float(term.value(jnp.zeros(6), X)) == 0.0


@thinned("name", TERMS, "l1 of x", "groups of x", "both of x")
def test_prox_is_the_minimiser(name):
    """As low as what scipy finds, to the precision of that, and lower than its neighbours."""
    term, rng = TERMS[name][0], np.random.default_rng(1)
    operator = jax.jit(term.prox)
    for point in samples():
        for step in (0.3, 2.0):
            u = np.asarray(operator(jnp.asarray(point), step, X))
            height = lambda u, point=point, step=step: value(name, u) + ((u - point) ** 2).sum() / (2 * step)
            other = minimiser(name, point, step)
            assert height(u) <= height(other) + 1e-12
            np.testing.assert_allclose(u, other, atol=1e-3)
            for size in (1e-1, 1e-3, 1e-5):
                beside = u[None] + size * rng.normal(size=(50, 6))
                assert min(map(height, beside)) >= height(u) - 1e-12


@every_term
def test_prox_is_firmly_nonexpansive(name):
    """``|Pu - Pw|^2 <= <Pu - Pw, u - w>``, at pairs far and near."""
    operator = jax.jit(jax.vmap(lambda point: TERMS[name][0].prox(point, 0.8, X)))
    rng = np.random.default_rng(2)
    u = 2 * rng.normal(size=(200, 6))
    w = u + np.repeat([3.0, 1e-2], 100)[:, None] * rng.normal(size=(200, 6))
    moved = np.asarray(operator(u)) - np.asarray(operator(w))
    assert ((moved**2).sum(1) <= (moved * (u - w)).sum(1) + 1e-12).all()


def test_every_prox_makes_zeros():
    """Of coordinates, or of whole groups: they are exact."""
    point = jnp.array([0.1, 2.0, -0.2, 0.05, -3.0, 1.0])
    for term, zeros in (
        (nonsmooth.l1(0.3), [0, 2, 3]),
        (nonsmooth.group_lasso(GROUPS, 0.3), [0, 2, 3]),
        (nonsmooth.group_lasso(GROUPS, 10.0), [0, 1, 2, 3, 4, 5]),
        (nonsmooth.sparse_group_lasso(GROUPS, 0.1, 1.0), [0, 2, 3, 5]),
        (nonsmooth.zero(), []),
    ):
        assert np.flatnonzero(np.asarray(term.prox(point, 1.0, X)) == 0).tolist() == zeros


@every_term
def test_step_zero_is_the_identity(name):
    for point in map(jnp.asarray, (*samples(), np.zeros(6))):
        check_same(TERMS[name][0].prox(point, 0.0, X), point)


@pytest.mark.parametrize("name", [name for name in TERMS if "of x" in name or "of the" in name])
def test_derivative_in_x_is_that_of_the_value(name):
    """Against central differences of the NumPy formula, in every entry of x."""
    term, z, h = TERMS[name][0], samples()[1], 1e-6
    found = jax.grad(term.value, argnums=1)(jnp.asarray(z), X)
    for key in X:
        for i in range(len(X[key])):
            beside = [{**X, key: X[key] + way * h * np.eye(len(X[key]))[i]} for way in (1, -1)]
            ends = [float(term.value(jnp.asarray(z), x)) for x in beside]
            np.testing.assert_allclose(found[key][i], (ends[0] - ends[1]) / (2 * h), atol=1e-8)
    if name == "groups of x":
        np.testing.assert_allclose(found["group"], [np.linalg.norm(z[of]) for of in MEMBERS], rtol=1e-14)
    if name == "l1 of x":
        np.testing.assert_allclose(found["single"], np.abs(z), rtol=1e-14)


@thinned("dtype", ["bfloat16", "float32", "float64"], "bfloat16")
@every_term
def test_dtypes_of_terms_are_kept(name, dtype):
    """Whatever that of the weights; and the values are those in float64, to rounding."""
    term, z = TERMS[name][0], jnp.asarray(samples()[1], dtype)
    found = jax.jit(term.prox)(z, 0.5, X)
    assert (found.dtype, found.shape) == (z.dtype, z.shape)
    assert term.value(z, X).dtype == z.dtype
    exact = term.prox(z.astype(jnp.float64), 0.5, X)
    check_same(found.astype(jnp.float64), exact, tol=16 * float(jnp.finfo(dtype).eps))


@every_term
def test_derivatives_at_zero_vectors_are_finite(name):
    """Of the prox, through which paths are differentiated, and of the value in x, with whole groups at 0."""
    term = TERMS[name][0]
    for point in map(jnp.asarray, (samples()[3], np.zeros(6))):
        slopes = jax.grad(lambda p, x: (term.prox(p, 0.3, x) ** 2).sum(), argnums=(0, 1))(point, X)
        in_x = jax.grad(term.value, argnums=1)(point, X)
        assert all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves((slopes, in_x)))


@every_term
def test_derivative_of_the_prox_is_that_of_its_differences(name):
    """In the point and in the weights, away from the kinks."""
    term, h = TERMS[name][0], 1e-6
    point = jnp.array([1.5, -2.0, 0.9, 2.5, 0.4, 1.2])
    v = jnp.asarray(np.random.default_rng(4).normal(size=6))
    score = jax.jit(lambda p, x: v @ term.prox(p, 0.3, x))
    in_p, in_x = jax.grad(score, argnums=(0, 1))(point, X)
    central = [(score(point + h * e, X) - score(point - h * e, X)) / (2 * h) for e in jnp.eye(6)]
    np.testing.assert_allclose(in_p, central, atol=1e-8)
    ends = [score(point, jax.tree.map(lambda w, d, s=s: w + s * h * d, X, in_x)) for s in (1, -1)]
    along = sum(float((leaf**2).sum()) for leaf in jax.tree.leaves(in_x))
    np.testing.assert_allclose((ends[0] - ends[1]) / (2 * h), along, atol=1e-7)


def test_trees_are_taken_leaf_by_leaf():
    """zero and l1 on any pytree, of mixed dtypes."""
    tree = {"a": jnp.array([2.0, -0.25]), "b": [jnp.asarray(-3.0, jnp.float32)]}
    check_same(nonsmooth.zero().prox(tree, 1.0, None), tree)
    check_same(nonsmooth.l1(0.5).prox(tree, 2.0, None), {"a": jnp.array([1.0, 0.0]), "b": [jnp.asarray(-2.0, jnp.float32)]})
    one = {"a": jnp.array([2.0, -0.25]), "b": [jnp.asarray(-3.0, jnp.float64)]}
    assert float(nonsmooth.l1(2.0).value(one, None)) == 10.5
    assert float(nonsmooth.zero().value(one, None)) == 0.0


# ---- projections -------------------------------------------------------------------------------------------------------

#: name -> projection, bounds and constraints of scipy.
SETS: dict[str, Any] = {
    "box": (nonsmooth.box(-0.5, 0.75), [(-0.5, 0.75)] * 6, ()),
    "box of arrays": (nonsmooth.box(-SECOND, np.inf), [(-low, None) for low in SECOND], ()),
    "ball": (nonsmooth.ball(1.3), None, ({"type": "ineq", "fun": lambda u: 1.3**2 - u @ u, "jac": lambda u: -2 * u},)),
    "simplex": (nonsmooth.simplex(), [(0, None)] * 6, (LinearConstraint(np.ones((1, 6)), 1.0, 1.0),)),
    "simplex of another total": (nonsmooth.simplex(2.5), [(0, None)] * 6, (LinearConstraint(np.ones((1, 6)), 2.5, 2.5),)),
}
every_set = pytest.mark.parametrize("name", SETS)


@every_set
def test_projection_is_the_nearest_point(name):
    """Against scipy, and twice is once."""
    projection, bounds, constraints = SETS[name]
    operator = jax.jit(projection)
    for point in (*samples(), np.full(6, 0.1), np.ones(6)):
        found = operator(jnp.asarray(point))
        nearest = minimize(
            lambda u, point=point: 0.5 * ((u - point) ** 2).sum(),
            np.full(6, 1 / 6),
            jac=lambda u, point=point: u - point,
            method="SLSQP",
            bounds=bounds,
            constraints=constraints,
            options={"ftol": 1e-15, "maxiter": 300},
        )
        np.testing.assert_allclose(found, nearest.x, atol=1e-6)
        check_same(operator(found), found, tol=1e-15)


def test_projections_leave_what_is_inside():
    inside = jnp.array([0.1, 0.2, 0.3, 0.15, 0.25, 0.0])
    for name in ("box", "ball", "simplex"):
        check_same(SETS[name][0](inside), inside, tol=1e-15)
    check_same(nonsmooth.ball(2.0)(jnp.zeros(6)), jnp.zeros(6))
    assert bool(jnp.isfinite(jax.grad(lambda u: nonsmooth.ball(2.0)(u).sum())(jnp.zeros(6))).all())


@thinned("dtype", ["bfloat16", "float32", "float64"], "bfloat16")
@every_set
def test_dtypes_and_trees_of_projections_are_kept(name, dtype):
    """Balls and simplices are those of the vector of all leaves; under vmap, of each row."""
    projection = SETS[name][0]
    rows = jnp.asarray(np.stack(samples()), dtype)
    found = jax.jit(jax.vmap(projection))(rows)
    for row, one in zip(rows, found, strict=True):
        check_same(projection(row), one, tol=4 * float(jnp.finfo(dtype).eps))
    if name == "box of arrays":
        return
    tree = {"a": rows[1][:2], "b": [rows[1][2:].reshape(2, 2)]}
    check_same(projection(tree), {"a": found[1][:2], "b": [found[1][2:].reshape(2, 2)]}, tol=4 * float(jnp.finfo(dtype).eps))


# ---- proximal steps ----------------------------------------------------------------------------------------------------

TERM = nonsmooth.l1(lambda x: x)


def lasso() -> tuple[Problem, Vars, np.ndarray]:
    """``g = |z - a|^2 / 2 + x'|z|``, its smooth part, and a; f = |z - 1|^2 / 2."""
    a = np.array([2.0, -1.0, 0.3])
    problem = Problem(lambda z, x, s: 0.5 * ((z - a) ** 2).sum(), lambda z, x, s: 0.5 * ((z - 1) ** 2).sum())
    return problem, Vars(jnp.zeros(3), None, jnp.array([0.5, 0.25, 1.0])), a


def shrunk(u: np.ndarray, threshold: np.ndarray) -> np.ndarray:
    return np.sign(u) * np.maximum(np.abs(u) - threshold, 0)


def test_proximal_sgd_is_a_chain():
    """Of the gradient step and the prox of the same size, a schedule counted alike; and says its term."""
    rate = lambda t: 0.5 / (t + 1.0)
    chain = optax.chain(optax.sgd(rate), prox(TERM, rate))
    opt, z, x = proximal_sgd(rate, TERM), jnp.array([1.0, -0.5, 0.25]), jnp.array([0.5, 0.25, 1.0])
    states, points, plain = [opt.init(z), chain.init(z)], [z, z], np.asarray(z)
    assert jax.tree.structure(states[0]) == jax.tree.structure(states[1])
    for t in range(3):
        slope = points[0] - 2.0
        for i, one in enumerate((opt, chain)):
            points[i], states[i] = moved(one, slope, states[i], points[i], x)
        plain = shrunk(plain - rate(t) * np.asarray(slope), rate(t) * np.asarray(x))
    check_same(points[0], points[1])
    check_same(points[0], jnp.asarray(plain), tol=1e-7)  # optax takes schedules in float32
    assert term_of(opt) is TERM
    assert term_of(chain) is None


def batch_of(draws: int) -> Batch:
    return Batch(inner=jnp.zeros((draws, 1)), outer=jnp.zeros((draws, 1)))


@pytest.mark.filterwarnings("ignore:problem.outer. got a loss that does not depend on z")  # so that x falls by its rate
def test_weights_are_those_of_the_current_x():
    """In a simultaneous step that of the old x, in a later stage that of the new one."""
    problem, start, a = lasso()
    opt, x = proximal_sgd(0.5, TERM), np.asarray(start.outer)
    joint = Problem(problem.inner, lambda z, x, s: x.sum())
    x_step = descend(implicit(joint), Vars(outer=optax.sgd(0.125)))
    solver = sweep(x_step, descend(implicit(problem), Vars(inner=opt)))
    with pytest.warns(UserWarning, match="^problem.outer: got a loss that does not depend on z"):
        first = solver.init(start, batch_of(2))
    state = jax.jit(solver.update)(first, batch_of(2))
    check_same(state.vars.outer, jnp.asarray(x - 0.125), tol=1e-15)
    check_same(state.vars.inner, jnp.asarray(shrunk(0.5 * a, 0.5 * (x - 0.125))), tol=1e-15)
    solver = sweep(descend(implicit(joint), Vars(inner=opt, outer=optax.sgd(0.125))))
    with pytest.warns(UserWarning, match="^problem.outer: got a loss that does not depend on z"):
        first = solver.init(start, batch_of(1))
    state = jax.jit(solver.update)(first, batch_of(1))
    check_same(state.vars.outer, jnp.asarray(x - 0.125), tol=1e-15)
    check_same(state.vars.inner, jnp.asarray(shrunk(0.5 * a, 0.5 * x)), tol=1e-15)


def test_inner_solves_take_proximal_steps():
    problem, start, a = lasso()
    solver = sweep(solve_inner(problem, proximal_sgd(0.5, TERM), max_steps=60))
    state = jax.jit(solver.update)(solver.init(start, batch_of(1)), batch_of(1))
    check_same(state.vars.inner, jnp.asarray(shrunk(a, np.asarray(start.outer))), tol=1e-14)


def test_paths_are_differentiated_through_their_proximal_steps():
    """At the end, z = soft(a, x): dz/dx = -sign(z) where z is not 0, so that x moves by (z - 1) sign(z)."""
    problem, start, a = lasso()
    solver = sweep(unroll(problem, Vars(inner=proximal_sgd(0.5, TERM), outer=optax.sgd(1.0)), 60, fresh=False))
    state = jax.jit(solver.update)(solver.init(start, batch_of(1)), batch_of(1))
    z = shrunk(a, np.asarray(start.outer))
    check_same(state.vars.inner, jnp.asarray(z), tol=1e-14)
    check_same(start.outer - state.vars.outer, jnp.asarray(-(z - 1) * np.sign(z)), tol=1e-13)


# ---- the ends of the range of a dtype ----------------------------------------------------------------------------------


@thinned("dtype", ["float16", "bfloat16", "float32"], "float16")
def test_projections_survive_large_and_shifted_points(dtype):
    """Squares of these points, and sums of them, are out of the range or the precision of their dtype."""
    large = jnp.full(5, 1e4, dtype)
    inside, onto = nonsmooth.ball(1e5)(large), nonsmooth.ball(10.0)(large)
    np.testing.assert_array_equal(inside, large)
    np.testing.assert_allclose(np.asarray(onto, np.float64), 10 / 5**0.5, rtol=1e-2)
    shifted = jnp.asarray([0.5, 0.25, 0.0], dtype) + jnp.asarray(1024, dtype)
    np.testing.assert_allclose(np.asarray(nonsmooth.simplex()(shifted), np.float64).sum(), 1, rtol=1e-2)
    mixed = {"a": jnp.full(2, 3.0, dtype), "b": jnp.full(2, 4.0)}
    for projection in (nonsmooth.ball(1.0), nonsmooth.simplex()):
        landed = projection(mixed)
        assert jax.tree.map(lambda leaf: leaf.dtype, landed) == jax.tree.map(lambda leaf: leaf.dtype, mixed)


def test_nan_is_not_shrunk_away():
    nan = float("nan")
    assert np.isnan(nonsmooth.group_lasso([0, 0], nan).prox(jnp.ones(2), 1.0, None)).all()
    assert np.isnan(nonsmooth.group_lasso([0, 0]).value(jnp.array([nan, 1.0]), None))
    assert np.isnan(nonsmooth.ball(1.0)(jnp.array([nan, 1.0]))).any()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: nonsmooth.l1(-1.0), "weights: got -1.0, expected numbers of at least 0"),
        (lambda: nonsmooth.group_lasso([0, 1], np.array([1.0, -2.0])), "weights: got"),
        (lambda: nonsmooth.ball(lambda k: 1.0), "radius: got .*, expected a positive number"),
        (
            lambda: nonsmooth.box(np.zeros((2, 3)), 1.0)(jnp.ones(3)),
            r"low: got the shape \(2, 3\), expected a number or \(3,\)",
        ),
    ],
)
def test_what_is_no_term_or_set_is_refused(make, message):
    with pytest.raises((TypeError, ValueError), match=message):
        make()


def test_bounds_and_weights_may_be_traced():
    ends = jax.jit(
        lambda low, weight: (nonsmooth.box(low, 1.0)(jnp.zeros(2)), nonsmooth.l1(weight).prox(jnp.ones(2), 1.0, None))
    )
    np.testing.assert_allclose(np.stack(ends(0.5, 0.25)), [[0.5, 0.5], [0.75, 0.75]])


def test_constrained_term_is_exact_where_it_says_so():
    """l1 and a box that holds 0, against a search over the box."""
    term, point = nonsmooth.constrained(nonsmooth.l1(0.5), nonsmooth.box(-0.25, 1.0)), np.array([2.0, -2.0, 0.75, 0.1])
    u = np.linspace(-0.25, 1.0, 200_001)
    best = [u[np.argmin(0.5 * np.abs(u) + (u - p) ** 2 / 2)] for p in point]
    np.testing.assert_allclose(term.prox(jnp.asarray(point), 1.0, None), best, atol=1e-5)
