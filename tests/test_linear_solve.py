"""Linear solvers: closed forms, what they say of bad systems, transformations and derivatives."""

import sys
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bilevel_jax.linear_solve import (
    auto,
    cg,
    dense,
    from_lineax,
    heavy_ball,
    nested_batches,
    neumann,
    random_neumann,
    richardson,
)
from bilevel_jax.results import Result
from tests.tables import thinned

lineax = pytest.importorskip("lineax")

N = 6
LOW, HIGH = 0.1, 1.0
Q, _ = np.linalg.qr(np.random.default_rng(0).normal(size=(N, N)))
B = np.random.default_rng(1).normal(size=N)
SPD = Q * np.geomspace(LOW, HIGH, N) @ Q.T
SKEW = SPD + 0.3 * (np.triu(Q) - np.triu(Q).T)  # positive definite, not symmetric

#: Every deterministic solver, in a version that solves an SPD system with eigenvalues in [0.1, 1].
SOLVERS = {
    "cg": lambda: cg(max_steps=50, rtol=1e-12),
    "dense": dense,
    "dense lu": lambda: dense(positive_definite=False),
    "auto": lambda: auto(dense_below=N - 1, rtol=1e-12),
    "heavy_ball": lambda: heavy_ball(steps=100, smoothness=HIGH, strong_convexity=LOW),
    "richardson": lambda: richardson(steps=300, rate=1 / HIGH),
    "neumann": lambda: neumann(terms=300, rate=1 / HIGH),
    "lineax cg": lambda: from_lineax(lineax.CG(rtol=1e-12, atol=1e-12, max_steps=50), positive_definite=True),
    "lineax gmres": lambda: from_lineax(lineax.GMRES(rtol=1e-12, atol=1e-12, max_steps=50, restart=N)),
    "lineax bicgstab": lambda: from_lineax(lineax.BiCGStab(rtol=1e-12, atol=1e-12, max_steps=50)),
    "lineax lu": lambda: from_lineax(lineax.LU()),
}
every_solver = pytest.mark.parametrize("name", SOLVERS)
STARTED = ("cg", "heavy_ball", "richardson", "lineax cg")  # those whose guess is tested; dense and neumann ignore it
UNSYMMETRIC = ("dense lu", "richardson", "lineax gmres", "lineax lu")


def compiled(f):
    """Under jit, with NumPy results, so that the checks compile nothing."""
    f = jax.jit(f)
    return lambda *args: jax.device_get(f(*args))


@cache
def solve(name):
    """``(A, b, guess) -> (u, Stats)``, compiled once."""
    solver = SOLVERS[name]()
    return compiled(lambda A, b, guess: solver.solve(lambda u: A @ u, b, guess))


def spectrum(*values):
    return Q * np.asarray(values) @ Q.T


OK, STEPS, CURVED, SINGULAR, DIVERGED = (
    Result.SUCCESSFUL,
    Result.MAX_STEPS_REACHED,
    Result.NEGATIVE_CURVATURE,
    Result.SINGULAR,
    Result.DIVERGED,
)
FLAT = spectrum(0, 0, 0.2, 0.4, 0.6, 1.0)
#: What each solver says of a system: A, b, then a code by solver (a tuple: one of them; missing: not asked).
SYSTEMS = {
    "indefinite": (
        spectrum(-0.5, -0.2, 0.1, 0.3, 0.6, 1.0),
        B,
        {"cg": CURVED, "dense": CURVED, "dense lu": OK, "auto": CURVED, "lineax gmres": OK, "lineax lu": OK},
    ),
    "negative definite": (
        -SPD,
        B,
        {"cg": CURVED, "dense": CURVED, "auto": CURVED, "lineax cg": CURVED, "neumann": DIVERGED, "richardson": DIVERGED}
        | {"heavy_ball": DIVERGED, "dense lu": OK, "lineax lu": OK, "lineax gmres": OK},
    ),
    "no curvature at the first step": (
        np.diag([1.0, -1.0] * (N // 2)),
        np.ones(N),
        {"cg": CURVED, "dense": CURVED, "auto": CURVED, "lineax cg": CURVED, "dense lu": OK, "lineax lu": OK},
    ),
    "singular, consistent": (
        FLAT,
        FLAT @ B,
        {"cg": (OK, CURVED), "dense": SINGULAR, "dense lu": SINGULAR, "neumann": OK, "richardson": OK, "lineax gmres": OK},
    ),
    "singular, inconsistent": (
        FLAT,
        B,
        {"cg": CURVED, "dense": SINGULAR, "dense lu": SINGULAR, "auto": CURVED, "lineax lu": SINGULAR},
    ),
    "the zero matrix": (
        0 * SPD,
        B,
        {"cg": CURVED, "dense": SINGULAR, "dense lu": SINGULAR, "auto": CURVED, "lineax lu": SINGULAR, "neumann": OK},
    ),
    "too large for the rate": (
        100 * SPD,
        B,
        {"neumann": DIVERGED, "richardson": DIVERGED, "heavy_ball": DIVERGED, "cg": OK, "dense": OK, "lineax lu": OK},
    ),
    "too large by far for the rate": (1e6 * SPD, B, {"neumann": DIVERGED, "richardson": DIVERGED, "heavy_ball": DIVERGED}),
    "nan in A": (np.where(np.arange(N) == 3, np.nan, SPD), B, dict.fromkeys(SOLVERS, Result.NONFINITE)),
    "inf in A": (np.where(np.eye(N) == 1, np.inf, SPD), B, dict.fromkeys(SOLVERS, Result.NONFINITE)),
    "nan in b": (SPD, np.where(np.arange(N) == 3, np.nan, B), dict.fromkeys(SOLVERS, Result.NONFINITE)),
    "inf in b": (SPD, np.where(np.arange(N) == 3, np.inf, B), dict.fromkeys(SOLVERS, Result.NONFINITE)),
    "b is 0": (SPD, 0 * B, dict.fromkeys(SOLVERS, OK)),
    "b is tiny": (SPD, 1e-200 * B, {"cg": Result.BREAKDOWN, "auto": Result.BREAKDOWN, "dense": OK, "neumann": OK}),
    "b is huge": (SPD, 1e200 * B, {"cg": Result.BREAKDOWN, "auto": Result.BREAKDOWN, "dense": OK, "neumann": Result.NONFINITE}),
}


@every_solver
def test_solution(name):
    """The solution, its residual, the cost; from a guess too, and exactly 0 for 0 whatever the guess."""
    exact = np.linalg.solve(SPD, B)
    for guess in (None, 1.001 * exact, np.full(N, np.nan)) if name in STARTED else (None,):
        u, stats = solve(name)(SPD, B, guess)
        np.testing.assert_allclose(u, exact, atol=1e-10)
        assert stats.code == OK
        assert stats.code.dtype == stats.steps.dtype == jnp.int32
        if name != "neumann":
            np.testing.assert_allclose(stats.residual, np.linalg.norm(SPD @ u - B), atol=1e-14)
        assert not float(stats.steps) > SOLVERS[name]().applications
    if name in STARTED:
        np.testing.assert_array_equal(solve(name)(SPD, 0 * B, B)[0], 0)
    if name in UNSYMMETRIC:
        np.testing.assert_allclose(solve(name)(SKEW, B, None)[0], np.linalg.solve(SKEW, B), atol=1e-10)


@every_solver
def test_codes(name):
    """Never a silent failure, and never NaN: 0 if b is not finite."""
    for system, (A, b, codes) in SYSTEMS.items():
        u, stats = solve(name)(A, b, None)
        assert np.isfinite(u).all(), system
        if not np.isfinite(b).all():
            np.testing.assert_array_equal(u, 0)
        expected = codes.get(name, tuple(Result))
        assert Result(int(stats.code)) in (expected if isinstance(expected, tuple) else (expected,)), system


def test_messages():
    assert list(Result) == sorted(Result)
    assert min(Result) == Result.SUCCESSFUL == 0
    assert max(Result) == Result.NONFINITE
    assert len({code.message for code in Result}) == len(Result)


# --- conjugate gradients -----------------------------------------------------------------------------------------------------


def test_cg_ends_after_as_many_steps_as_eigenvalues():
    A = spectrum(1, 1, 1, 3, 3, 7)
    u, stats = compiled(lambda b: cg(max_steps=9, rtol=1e-13).solve(lambda u: A @ u, b))(B)
    np.testing.assert_allclose(u, np.linalg.solve(A, B), atol=1e-14)
    assert stats.code == OK
    assert stats.steps == 3 + 1


def test_cg_is_as_fast_as_its_bound():
    """|e_k|_A <= 2 ((sqrt kappa - 1) / (sqrt kappa + 1))^k |e_0|_A."""
    a = np.geomspace(0.01, 1, 60)
    b, exact = np.ones(60), 1 / a
    run = compiled(jax.vmap(lambda b, k: cg(max_steps=40, atol=k, rtol=0.0).solve(lambda u: a * u, b), (None, 0)))
    us, stats = run(b, np.geomspace(1, 1e-3, 5))
    steps = stats.steps - 1  # all but the last check
    energy = np.sqrt((a * (us - exact) ** 2).sum(1) / (a * exact**2).sum())
    assert (stats.code == OK).all()
    assert (np.diff(steps) > 0).all()
    assert (energy <= 2 * (9 / 11) ** np.asarray(steps)).all()


def test_cg_sees_negative_curvature_at_a_small_residual():
    a = np.array([1.0, 2.0, -1.0])
    solver = cg(max_steps=20, rtol=1e-12)
    run = compiled(lambda b, guess: solver.solve(lambda u: a * u, b, guess))
    u, stats = run(jnp.array([1.0, 1.0, 1e-8]), jnp.zeros(3))
    assert stats.code == CURVED
    assert stats.residual < 1e-7
    np.testing.assert_allclose(u, [1, 0.5, 0], atol=1e-7)  # the iterate before the step
    b = jnp.array([0.1, 0.1, 1.0])
    u, stats = run(b, b / a)  # a guess that solves the system
    assert stats.code == CURVED
    assert stats.steps == 1


def test_cg_stagnation_returns_the_best_iterate():
    """Products rounded to float32: a residual of 1e-12 is out of reach, though the recursion claims it."""
    A = jnp.asarray(SPD, jnp.float32)
    solver = cg(max_steps=200, rtol=1e-12)
    u, stats = compiled(lambda b: solver.solve(lambda u: (A @ u.astype(A.dtype)).astype(u.dtype), b))(B)
    assert stats.code == Result.STAGNATION
    assert stats.steps < 100
    assert stats.residual < 1e-6
    np.testing.assert_allclose(SPD @ u, B, atol=1e-6)


def test_cg_keeps_its_directions_where_the_tolerance_is_out_of_reach():
    """Condition 1e4 in float32: exchanging the residual on the way, at the floor of the precision, ends 100 times worse."""
    n = 150
    basis, _ = np.linalg.qr(np.random.default_rng(2).normal(size=(n, n)))
    A, b = basis * np.geomspace(1e-4, 1.0, n) @ basis.T, np.random.default_rng(3).normal(size=n)
    A32 = jnp.asarray(A, jnp.float32)
    u, stats = compiled(lambda b: cg(max_steps=1500, rtol=1e-5).solve(lambda u: A32 @ u, b))(np.float32(b))
    exact = np.linalg.solve(A, b)
    assert np.linalg.norm(u - exact) < 1e-3 * np.linalg.norm(exact)
    assert stats.steps < 1000


def test_cg_counts_its_applications_and_checks_the_true_residual():
    count = []

    def matvec(u):
        jax.debug.callback(lambda: count.append(1))
        return SPD @ u

    _, stats = cg(max_steps=4, rtol=1e-14).solve(matvec, jnp.asarray(B), jnp.asarray(B))
    jax.effects_barrier()
    assert stats.steps == len(count) == 1 + 4 + 1  # the guess, the steps, the end
    assert stats.code == STEPS


def test_max_steps_is_information():
    """A few steps from the last solution: what AID does."""
    solver = cg(max_steps=2, rtol=1e-10)
    run = compiled(lambda b, guess: solver.solve(lambda u: SPD @ u, b, guess))
    u, first = run(B, jnp.zeros(N))
    for _ in range(30):
        u, stats = run(B, u)
        assert stats.code in (OK, STEPS)
        assert float(stats.steps) <= solver.applications
    assert first.code == STEPS
    assert first.residual > 1e-2
    np.testing.assert_allclose(SPD @ u, B, atol=1e-8)


@pytest.mark.parametrize("make", [cg, auto, dense, from_lineax])
def test_damping(make):
    """The solution is that of the damped system, the residual that of the other one."""
    solver = {
        cg: lambda: cg(max_steps=50, rtol=1e-12, damping=0.7),
        auto: lambda: auto(damping=0.7),
        dense: lambda: dense(damping=0.7),
        from_lineax: lambda: from_lineax(lineax.LU(), damping=0.7),
    }[make]()
    A = spectrum(-0.5, 0, 0.1, 0.3, 0.6, 1.0)
    u, stats = compiled(lambda b: solver.solve(lambda u: A @ u, b))(B)
    np.testing.assert_allclose(u, np.linalg.solve(A + 0.7 * np.eye(N), B), atol=1e-10)
    np.testing.assert_allclose(stats.residual, np.linalg.norm(A @ u - B), rtol=1e-10)
    assert stats.residual > 0.1
    assert stats.code == OK


# --- polynomials of A --------------------------------------------------------------------------------------------------------


def power(rate, k):
    return np.linalg.matrix_power(np.eye(N) - rate * SPD, k)


@pytest.mark.parametrize("terms", [1, 7])
def test_neumann_sum(terms):
    u, stats = compiled(lambda b: neumann(terms=terms, rate=0.8).solve(lambda u: SPD @ u, b))(B)
    np.testing.assert_allclose(u, np.linalg.solve(SPD, (np.eye(N) - power(0.8, terms + 1)) @ B), atol=1e-12)
    np.testing.assert_allclose(stats.residual, np.linalg.norm(power(0.8, terms) @ B), atol=1e-12)
    by_steps, stats = compiled(lambda b: richardson(steps=terms + 1, rate=0.8).solve(lambda u: SPD @ u, b))(B)
    np.testing.assert_allclose(u, by_steps, atol=1e-12)
    np.testing.assert_allclose(stats.residual, np.linalg.norm(power(0.8, terms + 1) @ B), atol=1e-12)


def test_random_neumann_mean_over_its_lengths():
    terms, rate = 5, 0.8
    solver = random_neumann(terms=terms, rate=rate)
    keys = jax.random.split(jax.random.key(0), 1000)
    us, stats = compiled(jax.vmap(lambda key: solver.solve(lambda u: SPD @ u, jnp.asarray(B), key=key)))(keys)
    ps = stats.steps
    np.testing.assert_allclose(np.bincount(ps, minlength=terms) / 1000, 1 / terms, atol=0.04)
    for p in range(terms):
        np.testing.assert_allclose(us[ps == p][0], terms * rate * power(rate, p) @ B, atol=1e-12)
    mean = np.mean([us[ps == p][0] for p in range(terms)], axis=0)
    np.testing.assert_allclose(mean, np.linalg.solve(SPD, (np.eye(N) - power(rate, terms)) @ B), atol=1e-12)
    assert solver.applications == 2


#: One matrix an application.
STACK = SPD + 0.05 * np.random.default_rng(2).normal(size=(4, N, N))


def by_hand(make, stack, b, rate=0.5):
    """The sums and products written out, in the order of the samples."""
    u, r, s = jnp.zeros_like(b), b, b
    for A in stack:
        u, r = u - rate * (A @ u - b), r - rate * A @ r
        s = s + r
    return {neumann: rate * s, random_neumann: len(STACK) * rate * r, richardson: u}[make]


@pytest.mark.parametrize("make", [neumann, random_neumann, richardson])
def test_fresh_samples(make):
    """Application k uses sample k; derivatives are those of what is written."""
    count = {"steps" if make is richardson else "terms": len(STACK)}
    solver = make(**count, rate=0.5, fresh=True)
    assert solver.draws == len(STACK)

    def ours(stack, b):
        u, stats = solver.solve(lambda u, k: stack[k] @ u, b, key=jax.random.key(2))
        return u @ u, (u, stats)

    slopes, (u, stats) = compiled(jax.grad(ours, (0, 1), has_aux=True))(STACK, B)
    assert stats.code == OK
    assert 2 <= stats.steps <= len(STACK)

    def expected(stack, b):
        u = by_hand(make, stack[: stats.steps], b)
        return u @ u, u

    expected_slopes, expected_u = compiled(jax.grad(expected, (0, 1), has_aux=True))(STACK, B)
    np.testing.assert_allclose(u, expected_u, atol=1e-13)
    jax.tree.map(partial(np.testing.assert_allclose, atol=1e-11), slopes, expected_slopes)


def test_rates_may_be_traced():
    """As schedules at a traced step, in float32 too; they do not compile again."""
    traces = []

    def solvers(rate):
        traces.append(1)
        heavy = heavy_ball(steps=3, smoothness=1 / rate, strong_convexity=LOW)
        return neumann(terms=3, rate=rate), random_neumann(terms=3, rate=rate), richardson(steps=4, rate=rate), heavy

    def ours(step, b):
        key = jax.random.key(3)
        return [solver.solve(lambda u: SPD @ u, b, key=key)[0] for solver in solvers(0.8 / (1 + step))]

    run = compiled(ours)
    for step in (np.float32(0.0), np.float32(1.0)):
        sums, product, steps, heavy = run(step, B)
        rate = 0.8 / (1 + float(step))
        np.testing.assert_allclose(sums, np.linalg.solve(SPD, (np.eye(N) - power(rate, 4)) @ B), atol=1e-6)
        np.testing.assert_allclose(steps, sums, atol=1e-12)
        assert min(np.abs(product - 3 * rate * power(rate, p) @ B).max() for p in range(3)) < 1e-6
        assert np.linalg.norm(SPD @ heavy - B) < np.linalg.norm(B)
    assert len(traces) == 1


#: A function of one number t, each in one argument of a linear solver, and whether it is differentiated.
DIFFERENTIATED = {
    "damping of cg": lambda t: cg(max_steps=30, rtol=1e-14, damping=t),
    "damping of dense": lambda t: dense(damping=t),
    "damping of dense, LU": lambda t: dense(positive_definite=False, damping=t),
    "damping of auto": lambda t: auto(damping=t),
    "damping of lineax": lambda t: from_lineax(lineax.LU(), damping=t),
    "rate of fresh richardson": lambda t: richardson(steps=4, rate=t, fresh=True),
    "rate of fresh neumann": lambda t: neumann(terms=4, rate=t, fresh=True),
    "rate of random_neumann": lambda t: random_neumann(terms=4, rate=t),
}
REFUSED = {
    "rtol": [lambda t: cg(max_steps=30, rtol=t), lambda t: auto(rtol=t)],
    "atol": [lambda t: cg(max_steps=30, atol=t)],
    "rate": [lambda t: richardson(steps=4, rate=t), lambda t: neumann(terms=4, rate=t)],
    "smoothness": [lambda t: heavy_ball(steps=4, smoothness=t, strong_convexity=LOW)],
    "strong_convexity": [lambda t: heavy_ball(steps=4, smoothness=HIGH, strong_convexity=t)],
    "solver": [lambda t: from_lineax(lineax.CG(rtol=t, atol=t), positive_definite=True)],
}


def sum_of_solution(make):
    """``t -> sum u`` with the matrix SPD and the right-hand side B."""

    def value(t):
        solver = make(t)
        matvec = (lambda u, k: SPD @ u) if solver.draws else (lambda u: SPD @ u)
        return solver.solve(matvec, jnp.asarray(B), key=jax.random.key(1))[0].sum()

    return value


@pytest.mark.parametrize("name", DIFFERENTIATED)
def test_derivatives_in_the_numbers_of_a_solver(name):
    """Forward, reverse and second order, against central differences."""
    value = sum_of_solution(DIFFERENTIATED[name])
    t, h = np.float64(0.7), 1e-4

    def derivatives(t):
        slope = jax.grad(value)
        return value(t), slope(t), jax.jacfwd(value)(t), jax.jacfwd(slope)(t)

    run = compiled(jax.vmap(derivatives))
    (low, _, high), slopes, forward, curvature = run(np.array([t - h, t, t + h]))
    assert abs(slopes[1]) > 1e-2
    np.testing.assert_allclose(slopes[1], (high - low) / (2 * h), rtol=1e-6)
    np.testing.assert_allclose(forward, slopes, rtol=1e-10)
    np.testing.assert_allclose(curvature[1], (slopes[2] - slopes[0]) / (2 * h), rtol=1e-5)


@pytest.mark.parametrize(("argument", "make"), [(name, make) for name, makes in REFUSED.items() for make in makes])
def test_numbers_that_have_no_derivative_are_refused(argument, make):
    """Only where the derivative in them is asked for: traced, mapped over, or stopped they pass."""
    value, t = sum_of_solution(make), np.float64(0.5)
    for derivative in (jax.grad, jax.jacfwd, lambda f: jax.grad(jax.jit(f))):
        with pytest.raises(TypeError, match=f"{argument}: got a number that is differentiated, expected a constant"):
            jax.eval_shape(derivative(value), t)
    jax.eval_shape(jax.vmap(value), jnp.full(2, t))
    jax.eval_shape(jax.grad(lambda t: value(jax.lax.stop_gradient(t)) * t), t)


def test_neumann_with_nested_batches():
    """Each factor averages its own samples, the first applied the most; for one matrix it is the exact sum."""
    batches = nested_batches(3, rate=0.8, strong_convexity=LOW, blocks=2)
    assert batches == (6, 6, 6)  # 6, 5.52, 5.08, rounded up
    assert nested_batches(3, rate=0.5, strong_convexity=1.0) == (3, 2, 1)
    solver = neumann(terms=3, rate=0.8, fresh=True, batches=(3, 2, 1))
    assert solver.draws == solver.applications == 6
    run = compiled(lambda stack, b: solver.solve(lambda u, k: stack[k] @ u, b))
    u, stats = run(np.stack([SPD] * 6), B)
    np.testing.assert_allclose(u, np.linalg.solve(SPD, (np.eye(N) - power(0.8, 4)) @ B), atol=1e-12)
    assert (stats.code, stats.steps) == (OK, 6)
    stack = SPD + 0.05 * np.random.default_rng(4).normal(size=(6, N, N))
    means = [stack[:3].mean(0), stack[3:5].mean(0), stack[5]]
    np.testing.assert_allclose(run(stack, B)[0], by_hand(neumann, means, B, 0.8), atol=1e-13)


def test_divergence_keeps_the_last_finite_iterate():
    b = jnp.asarray(B)
    for solver in (neumann(terms=2000, rate=1.0), richardson(steps=2000, rate=1.0)):
        u, stats = compiled(lambda b, solver=solver: solver.solve(partial(jnp.multiply, 100.0), b))(b)
        assert stats.code == DIVERGED
        assert np.isfinite(u).all()
        assert np.abs(u).max() > 1e100
    u, stats = compiled(lambda b: richardson(steps=3, rate=1e300).solve(lambda u: u, b))(1e20 * B)  # not even the first step
    assert stats.code == Result.NONFINITE
    np.testing.assert_array_equal(u, 0)
    noisy = richardson(steps=5, rate=1.0, fresh=True)  # noise at the solution is no divergence
    code = compiled(lambda b: noisy.solve(lambda u, k: u + 0.1 * k.astype(u.dtype) * u, b, b)[1].code)
    assert code(b) == OK
    assert code(10 * b) == OK
    unstable = richardson(steps=30, rate=1.0, fresh=True)
    code = compiled(lambda b, a: unstable.solve(lambda u, k: a * u, b)[1].code)
    assert code(b, 1.99) == OK
    assert code(b, 2.3) == DIVERGED
    code = compiled(lambda b, rate: richardson(steps=50, rate=rate).solve(lambda u: u, b, b * 1.1)[1].code)
    assert code(b, 1.9) == OK
    assert code(b, 2.1) == DIVERGED


def test_heavy_ball():
    """The recursion of the paper, to rounding; and its rate."""
    L, mu = 1.0, 0.01
    a, b = np.geomspace(mu, L, 50), np.ones(50)
    lam = 4 / (L**0.5 + mu**0.5) ** 2
    th = max((1 - (lam * mu) ** 0.5) ** 2, (1 - (lam * L) ** 0.5) ** 2)
    u = previous = np.zeros(50)
    errors = []
    for _ in range(200):
        u, previous = u - lam * (a * u - b) + th * (u - previous), u
        errors.append(np.linalg.norm(u - b / a))
    solver = heavy_ball(steps=200, smoothness=L, strong_convexity=mu)
    ours, stats = compiled(lambda b: solver.solve(lambda u: a * u, b))(b)
    np.testing.assert_allclose(ours, u, atol=1e-10)
    np.testing.assert_allclose(stats.residual, np.linalg.norm(a * u - b), atol=1e-12)
    slope = np.polyfit(np.arange(10, 100), np.log(errors[10:100]), 1)[0]
    np.testing.assert_allclose(slope, np.log((L**0.5 - mu**0.5) / (L**0.5 + mu**0.5)), rtol=0.15)


def test_heavy_ball_does_not_call_its_own_overshoot_divergence():
    run = compiled(
        jax.vmap(
            lambda a, L, mu: heavy_ball(steps=7, smoothness=L, strong_convexity=mu).solve(lambda u: a * u, jnp.ones(()))[1]
        )
    )
    mu = np.repeat(np.geomspace(1e-6, 0.9, 20), 20)
    a = mu ** np.tile(np.linspace(0, 1, 20), 20)
    assert (run(a, np.ones(400), mu).code == OK).all()


# --- pytrees, dtypes, transformations ----------------------------------------------------------------------------------------


@every_solver
def test_structure_and_dtype(name):
    """Kept leaf by leaf by every solver, the numbers are those of the coarsest leaf."""
    solver = SOLVERS[name]()
    a = {"w": jnp.array([[0.25, 0.5]], jnp.float32), "s": jnp.array(1.0, jnp.bfloat16)}
    rhs = {"w": jnp.array([[1.0, 2.0]], jnp.float32), "s": jnp.array(-3.0, jnp.bfloat16)}

    def run(rhs, guess):
        return solver.solve(lambda u: jax.tree.map(jnp.multiply, a, u), rhs, guess)

    for guess in (None, rhs) if name == "cg" else (None,):
        u, stats = jax.eval_shape(run, rhs, guess)
        assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), u) == jax.tree.map(
            lambda leaf: (leaf.shape, leaf.dtype), rhs
        )
        assert stats.residual.dtype == jnp.float32
        assert not any(leaf.weak_type for leaf in jax.tree.leaves((u, stats)))
    if name in ("cg", "dense", "neumann"):
        u, _ = compiled(run)(rhs, None)
        exact = jax.tree.map(jnp.divide, rhs, a)
        jax.tree.map(lambda x, y: np.testing.assert_allclose(np.float32(x), np.float32(y), rtol=2e-2), u, exact)


def test_the_finest_dtype_counts():
    rhs = {"a": jnp.ones(2, jnp.float32), "b": jnp.ones(2)}
    u, stats = jax.eval_shape(lambda b: cg(max_steps=9).solve(lambda u: u, b), rhs)
    assert (u["a"].dtype, u["b"].dtype, stats.residual.dtype) == (jnp.float32, jnp.float64, jnp.float64)


def test_jit_is_eager():
    u, stats = SOLVERS["cg"]().solve(lambda u: jnp.asarray(SPD) @ u, jnp.asarray(B))
    v, jitted = solve("cg")(SPD, B, None)
    np.testing.assert_allclose(u, v, atol=1e-14)
    assert (stats.code, stats.steps) == (jitted.code, jitted.steps)


@pytest.mark.parametrize("name", ["cg", "dense"])
def test_vmap_is_a_loop(name):
    """Lanes that end at different times, and in different ways; a guess or none."""
    b = np.where(np.arange(N) == 2, np.nan, B)
    systems = [(SPD, B), (np.eye(N), B), (SPD, 0 * B), *((A, b) for A, b, _ in SYSTEMS.values()), (SPD, b)]
    A, b = (np.stack(parts) for parts in zip(*systems, strict=True))
    batched, stats = compiled(jax.vmap(lambda A, b: SOLVERS[name]().solve(lambda u: A @ u, b)))(A, b)
    assert len(set(stats.steps.tolist())) > (4 if name == "cg" else 0)
    for i in range(len(A)):
        u, alone = solve(name)(A[i], b[i], None)
        # An iterate that stops for its curvature may be large: compare relative to it.
        np.testing.assert_allclose(batched[i], u, rtol=1e-6, atol=1e-12 * (1 + np.abs(u).max()))
        assert (stats.code[i], stats.steps[i]) == (alone.code, alone.steps)


# --- derivatives -------------------------------------------------------------------------------------------------------------


def system(t, symmetric):
    """A matrix and a right-hand side that depend on t, float [2]."""
    A = (SPD if symmetric else SKEW)[:3, :3] + t[0] ** 2 * jnp.eye(3) + t[1] * jnp.diag(jnp.array([0.1, 0.2, 0.3]))
    return A, jnp.asarray(B[:3]) * jnp.exp(t[0]) * t[1]


def derivatives(u):
    """Forward, reverse, and forward over reverse."""

    def reverse(t):
        slope = jax.jacrev(u)(t)
        return slope, slope

    def both(t):
        second, slope = jax.jacfwd(reverse, has_aux=True)(t)
        return jax.jacfwd(u)(t), slope, second

    return compiled(both)(jnp.array([0.3, 0.8]))


@cache
def exact_derivatives(symmetric):
    return derivatives(lambda t: jnp.linalg.solve(*system(t, symmetric)))


@thinned("name", ["cg", "dense", "heavy_ball", "lineax cg", "dense lu"], "cg", "dense")
def test_derivatives(name):
    """To second order, against those of a dense solve."""
    solver = SOLVERS[name]()
    symmetric = name not in UNSYMMETRIC
    guess = jnp.ones(3) if name == "cg" else None

    def u(t):
        A, b = system(t, symmetric)
        return solver.solve(lambda u: A @ u, b, guess)[0]

    for got, expected in zip(derivatives(u), exact_derivatives(symmetric), strict=True):
        np.testing.assert_allclose(got, expected, atol=1e-9)


def test_derivatives_of_batches_of_what_matvec_closes_over():
    """Under vmap, with integers, keys and a traced tolerance in the closure, and a guess that depends on t."""
    stack = jnp.stack([SPD[:3, :3], 2 * SPD[:3, :3]])
    keys = jax.random.split(jax.random.key(0), 2)

    def parts(i, key, t):
        shift = jax.random.uniform(key)
        return (lambda u: t * (stack[i] @ u) + shift * u), jnp.asarray(B[:3]) * t**2

    def ours(i, key, t):
        matvec, b = parts(i, key, t)
        u, _ = cg(max_steps=20, rtol=1e-12 * jax.lax.stop_gradient(t)).solve(matvec, b, t * jnp.ones(3))
        return u @ u

    def exact(i, key, t):
        matvec, b = parts(i, key, t)
        u = jnp.linalg.solve(jax.vmap(matvec)(jnp.eye(3)), b)
        return u @ u

    got, expected = (
        compiled(jax.vmap(jax.value_and_grad(f, 2), (0, 0, None)))(jnp.arange(2), keys, 0.9) for f in (ours, exact)
    )
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-9), got, expected)


def test_derivatives_at_the_solution():
    """Where residuals vanish, and their norms have no derivative."""
    solver = richardson(steps=3, rate=0.5, fresh=True)
    slope = compiled(jax.grad(lambda b: solver.solve(lambda u, k: u, b, b)[0].sum()))
    for b in (B, 0 * B):
        np.testing.assert_allclose(slope(b), 1, atol=1e-14)


# --- refusals ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: cg(max_steps=0), ValueError, "max_steps: got 0, expected at least 1"),
        (lambda: cg(max_steps=2.0), TypeError, "max_steps: got 2.0 of type float"),
        (lambda: cg(max_steps=2, rtol=-1.0), ValueError, "rtol: got -1.0"),
        (lambda: cg(max_steps=2, atol=np.nan), ValueError, "atol: got nan"),
        (lambda: cg(max_steps=2, damping=-1), ValueError, "damping: got -1"),
        (lambda: neumann(terms=0, rate=0.1), ValueError, "terms: got 0"),
        (lambda: neumann(terms=2, rate=0.0), ValueError, "rate: got 0.0, expected a finite number above 0"),
        (lambda: neumann(terms=2, rate=None), TypeError, "rate: got None of type NoneType"),
        (lambda: neumann(terms=2, rate=0.1, batches=(1, 1)), ValueError, "batches: got them without fresh=True"),
        (lambda: neumann(terms=2, rate=0.1, fresh=True, batches=(1,)), ValueError, "batches: got 1 of them, expected .* 2"),
        (lambda: neumann(terms=1, rate=0.1, fresh=True, batches=(0,)), ValueError, "batches: got 0, expected at least 1"),
        (lambda: nested_batches(2, rate=2.0, strong_convexity=1.0), ValueError, "rate: got 2.0, expected at most"),
        (lambda: random_neumann(terms=0, rate=0.1), ValueError, "terms: got 0"),
        (lambda: richardson(steps=0, rate=0.1), ValueError, "steps: got 0"),
        (lambda: heavy_ball(steps=0, smoothness=1.0, strong_convexity=0.1), ValueError, "steps: got 0"),
        (lambda: heavy_ball(steps=1, smoothness=1.0, strong_convexity=2.0), ValueError, "smoothness: got 1.0"),
        (lambda: heavy_ball(steps=1, smoothness=1.0, strong_convexity=0.0), ValueError, "strong_convexity: got 0.0"),
        (lambda: dense(damping=-1.0), ValueError, "damping: got -1.0"),
        (lambda: auto(dense_below=-1), ValueError, "dense_below: got -1"),
        (lambda: from_lineax(cg), TypeError, "solver: got function, expected a solver of lineax"),
        (lambda: random_neumann(terms=2, rate=0.1).solve(lambda u: u, jnp.ones(2)), ValueError, "key: got None"),
        (lambda: dense().solve(lambda u: u, jnp.ones(2, jnp.int32)), TypeError, "rhs: got int32"),
        (lambda: dense().solve(lambda u: u, None), TypeError, "rhs: got None"),
        (
            lambda: dense().solve(lambda u: u[:1], jnp.ones(2)),
            ValueError,
            r"matvec\(u\): got float64\[1\], expected float64\[2\]",
        ),
        (lambda: auto().solve(lambda u: (u,), jnp.ones(2)), ValueError, r"matvec\(u\): got the structure"),
        (lambda: cg(max_steps=1).solve(lambda u: u, jnp.ones(2), jnp.ones(3)), ValueError, r"guess: got float64\[3\]"),
    ],
)
def test_refusals(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_auto_takes_gmres_where_the_matrix_is_not_symmetric(monkeypatch):
    solver = auto(positive_definite=False, dense_below=2, rtol=1e-12)
    u, stats = compiled(lambda b: solver.solve(lambda u: SKEW @ u, b))(B)
    np.testing.assert_allclose(u, np.linalg.solve(SKEW, B), atol=1e-10)
    assert stats.code == OK
    monkeypatch.setitem(sys.modules, "lineax", None)
    with pytest.raises(ImportError, match=r"6 unknowns .* pip install lineax"):
        solver.solve(lambda u: SKEW @ u, jnp.asarray(B))
    with pytest.raises(ImportError, match=r"from_lineax: needs lineax.* pip install lineax"):
        from_lineax(None)
    auto(dense_below=2).solve(lambda u: u, jnp.ones(3))  # nothing else needs it
