"""The hypergradient as a function, and derivatives of black-box inner solvers: closed forms, slopes, transformations.

Methods are compared inside one compiled function, because compiling is what takes the time here.
"""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from bilevel_jax import Batch, Problem, Result, hypergrad, linear_solve
from bilevel_jax.hypergrad import hypergradient, implicit, iterative, one_step, t1_t2, zeroth_order
from bilevel_jax.implicit_diff import implicit_fixed_point, implicit_root, root_jvp, root_vjp
from tests.checks import whole
from tests.tables import small, thinned

close = partial(np.testing.assert_allclose, rtol=1e-9, atol=1e-11)


def compiled(f):
    """Under jit, with NumPy results, so that the checks compile nothing."""
    f = jax.jit(f)
    return lambda *args: jax.device_get(f(*args))


def each(problem, methods, *args):
    """``(value, gradient, Stats)`` of every method, compiled at once."""
    return compiled(lambda args: {name: hypergradient(problem, method)(*args) for name, method in methods.items()})(args)


def same(left, right, **tolerances):
    jax.tree.map(partial(close, **tolerances), left, right)


# --- the quadratic -----------------------------------------------------------------------------------------------------------

EXACT = {
    "auto": implicit(),
    "cg": implicit(linear_solve.cg(max_steps=30, rtol=1e-12)),
    "neumann": implicit(linear_solve.neumann(terms=1000, rate=0.9)),
    "itd": iterative(optax.sgd(0.9), 1000, checkpoint="none"),
}
BIASED = {
    "one step": one_step(optax.sgd(0.7)),
    "t1-t2": t1_t2(0.7),
    "neumann 9": implicit(linear_solve.neumann(terms=9, rate=0.7)),
    "itd 20": iterative(optax.sgd(0.7), 20),
    "itd 40": iterative(optax.sgd(0.7), 40),
    "itd 60": iterative(optax.sgd(0.7), 60),
}


@cache
def at_the_solution():
    """Of all the methods, at (z*, x); and that point, value and gradient."""
    q, x = small(), small().start.outer
    point, value, gradient = compiled(lambda x: (q.at(x), q.value(x), q.gradient(x)))(x)
    return each(q.problem, EXACT | BIASED, point.inner, x, whole(q)), point, value, gradient


@pytest.mark.parametrize("name", EXACT)
def test_closed_form(name):
    results, point, value, gradient = at_the_solution()
    ours, slope, stats = results[name]
    close(slope, gradient)
    close(ours, value)
    assert stats.inner_residual < 1e-12
    assert stats.code == Result.SUCCESSFUL
    if stats.aux is None:
        assert stats.adjoint_residual is None
    else:
        close(stats.aux, point.aux)
        assert stats.adjoint_residual < 1e-9


def test_invariances():
    """Under z -> M z and g -> 3 g; equivariance under x -> R x; linearity in f; terms that are absent."""
    q, x = small(), small().start.outer
    point = at_the_solution()[1]
    rng = np.random.default_rng(0)
    m, r = rng.normal(size=(5, 5)), np.linalg.qr(rng.normal(size=(3, 3)))[0]
    g, f = q.problem
    cases = {
        "z and g": (
            Problem(lambda z, x, d: 3 * g(m @ z, x, d), lambda z, x, d: f(m @ z, x, d)),
            np.linalg.inv(m) @ point.inner,
            x,
        ),
        "x": (Problem(lambda z, x, d: g(z, r @ x, d), lambda z, x, d: f(z, r @ x, d)), point.inner, r.T @ x),
        "f": (Problem(g, lambda z, x, d: 2 * f(z, x, d) + jnp.sum(x)), point.inner, x),
        "f without z": (Problem(g, lambda z, x, d: jnp.sum(x**2)), point.inner, x),
        "g without x": (Problem(lambda z, x, d: g(z, 0 * x, d), f), point.inner, x),
    }
    run = lambda problem, z, x: hypergradient(problem, implicit())(z, x, whole(q))[1]
    found = compiled(lambda points: {k: run(p, *points[k]) for k, (p, _, _) in cases.items()})(
        {k: (jnp.asarray(z), jnp.asarray(x)) for k, (_, z, x) in cases.items()}
    )
    gradient = at_the_solution()[3]
    outer = {name: np.asarray(leaf.mean(0)) for name, leaf in q.data.outer.items()}
    close(found["z and g"], gradient)
    close(found["x"], r.T @ gradient)
    close(found["f"], 2 * gradient + 1)
    close(found["f without z"], 2 * x)
    close(found["g without x"], outer["D"] @ x + outer["E"] @ point.inner + outer["d"])


def hessian():
    return np.asarray(small().data.inner["A"].mean(0))


def test_biased_methods_are_their_closed_forms():
    """v = -A^-1 (I - (I - a A)^k) d_z f: k = 1 for one step and T1-T2, Q + 1 for a Neumann sum, D for D steps."""
    results, point, _, gradient = at_the_solution()
    cross = np.asarray(small().data.inner["C"].mean(0))
    for name, k in {"one step": 1, "t1-t2": 1, "neumann 9": 10, "itd 20": 20}.items():
        rest = np.linalg.matrix_power(np.eye(5) - 0.7 * hessian(), k) @ point.aux
        close(results[name][1], gradient - cross @ rest, atol=1e-12)
        if name in ("t1-t2", "neumann 9"):
            close(results[name][2].aux, point.aux - rest, atol=1e-12)
    close(results["t1-t2"][2].adjoint_residual, np.linalg.norm(hessian() @ (results["t1-t2"][2].aux - point.aux)))
    assert np.linalg.norm(results["t1-t2"][1] - gradient) > 1e-2


def test_truncation_error_of_itd_has_the_slope_of_theory():
    """The error of D steps goes like (1 - a mu)^D, from z*, so that only d z*/dx errs."""
    results, _, _, gradient = at_the_solution()
    errors = [np.linalg.norm(results[f"itd {d}"][1] - gradient) for d in (20, 40, 60)]
    slope = np.polyfit([20, 40, 60], np.log(errors), 1)[0]
    assert slope == pytest.approx(np.log(1 - 0.7 * np.linalg.eigvalsh(hessian())[0]), rel=0.05)


@pytest.mark.more
def test_paths_that_start_elsewhere():
    """Truncation is a short path from the last iterates; checkpoints change nothing but memory; weights reach the losses."""
    q, x = small(), small().start.outer
    sgd, adam = optax.sgd(0.5), optax.adam(0.1)
    z = {0: np.asarray(q.start.inner)}
    a, c, b = (np.asarray(q.data.inner[name].mean(0)) for name in "ACb")
    for k in range(5):
        z[k + 1] = z[k] - 0.5 * (a @ z[k] + x @ c + b)
    paths = {kind: iterative(adam, 7, checkpoint=kind) for kind in ("none", "step", "sqrt")}
    paths |= {"cut": iterative(sgd, 8, truncate=3), "no derivative": iterative(sgd, 8, truncate=0)}
    found = each(q.problem, paths, z[0], x, whole(q))
    for kind in ("step", "sqrt"):
        same(found[kind], found["none"], rtol=1e-12, atol=1e-14)
    short = each(q.problem, {"short": iterative(sgd, 3)}, z[5], x, whole(q))["short"]
    same(found["cut"][:2], short[:2], rtol=1e-12, atol=1e-14)
    assert (found["cut"][2].steps, short[2].steps) == (8, 3)
    _, fx = compiled(jax.value_and_grad(lambda x, z: q.problem.outer(z, x, q.data.outer).mean()))(
        x, found["no derivative"][2].inner
    )
    close(found["no derivative"][1], fx)


def test_sqrt_checkpoints_keep_less_memory():
    """Temporary memory of the compiled gradient through 100 steps on 20,000 variables."""
    problem = Problem(lambda z, x, _: jnp.sum(jnp.cosh(z) + jnp.tanh(x) * z), lambda z, x, _: jnp.sum(z**2))
    z = x = jnp.ones(20_000)

    def memory(checkpoint):
        run = hypergradient(problem, iterative(optax.sgd(0.1), 100, checkpoint=checkpoint))
        compiled = jax.jit(lambda z, x: run(z, x, Batch(inner=jnp.zeros(()), outer=jnp.zeros(())))[1]).lower(z, x).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert memory("sqrt") < 0.4 * memory("none")


def test_zeroth_order_is_the_gradient_of_the_path_on_average():
    """The path is affine in x, so that differences are exact for any radius, and E u u' = I is the only error."""
    q, x, directions = small(), small().start.outer, 4000
    wide, narrow = (zeroth_order(optax.sgd(0.5), 4, directions=directions, radius=radius) for radius in (1.0, 1e-3))
    run = lambda method, key: hypergradient(q.problem, method)(q.start.inner, x, whole(q), key=key)
    found = compiled(lambda key: [run(method, key) for method in (wide, narrow, iterative(optax.sgd(0.5), 4, truncate=0))])
    a, b, fx = found(jax.random.key(0))
    exact = each(q.problem, {"": iterative(optax.sgd(0.5), 4)}, q.start.inner, x, whole(q))[""]
    close(a[1], b[1], atol=1e-9)
    close(a[0], exact[0])
    bound = 3 * np.sqrt((x.size + 1) / directions) * np.linalg.norm(exact[1] - fx[1])
    assert 0 < np.linalg.norm(a[1] - exact[1]) < bound < 0.2 * np.linalg.norm(exact[1] - fx[1])


def test_warm_start_helps():
    q, point = small(), at_the_solution()[1]
    method = hypergradient(q.problem, implicit(linear_solve.cg(max_steps=2, rtol=0.0)))
    run = compiled(lambda guess: method(point.inner, point.outer, whole(q), guess)[2])
    cold = run(np.zeros(5))
    warm = run(cold.aux)
    assert warm.adjoint_residual < 0.5 * cold.adjoint_residual
    assert cold.code == warm.code == Result.MAX_STEPS_REACHED  # information, not a failure
    assert run(np.asarray(point.aux)).steps == 1 + 1 + 2  # a guess that solves it already is seen to, once


# --- an inner problem that is not quadratic ----------------------------------------------------------------------------------


def test_logistic_against_finite_differences():
    """grad h by central differences of the value at Newton solutions, in NumPy."""
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(30, 5)), rng.normal(size=(30, 5))
    rows = (a, np.sign(a.sum(1))), (b, np.sign(b.sum(1) + 0.3))

    def fit(z, data):
        features, labels = data
        return jax.nn.softplus(-labels * (features @ z["w"]))

    def newton(x):
        w = np.zeros(5)
        for _ in range(12):
            p = 1 / (1 + np.exp(rows[0][1] * (a @ w)))
            slope = -a.T @ (p * rows[0][1]) / 30 + np.exp(x) * w
            w = w - np.linalg.solve((a.T * (p * (1 - p))) @ a / 30 + np.diag(np.exp(x)), slope)
        return w

    problem = Problem(lambda z, x, d: fit(z, d) + 0.5 * jnp.sum(jnp.exp(x) * z["w"] ** 2), lambda z, x, d: fit(z, d))
    x = np.linspace(-2.0, 0.0, 5)
    h = lambda x: np.logaddexp(0, -rows[1][1] * (b @ newton(x))).mean()
    expected = np.array([(h(x + s) - h(x - s)) / 2e-5 for s in 1e-5 * np.eye(5)])
    methods = {
        "auto": implicit(),
        "cg": implicit(linear_solve.cg(max_steps=20, rtol=1e-13)),
        "itd": iterative(optax.sgd(0.5), 500),
    }
    for value, gradient, stats in each(problem, methods, {"w": jnp.asarray(newton(x))}, jnp.asarray(x), Batch(*rows)).values():
        np.testing.assert_allclose(gradient, expected, atol=2e-10)
        close(value, h(x))
        assert stats.inner_residual < 1e-12


# --- failures ----------------------------------------------------------------------------------------------------------------


def test_codes():
    """Never a small residual as a success: the Hessian ``diag(a)`` of each row, by every kind of solver."""
    problem = Problem(lambda z, x, a: 0.5 * jnp.sum(a * z**2) + x @ z, lambda z, x, _: jnp.sum(z) + x[0])
    methods = {
        "auto": implicit(),
        "cg": implicit(linear_solve.cg(max_steps=10)),
        "neumann": implicit(linear_solve.neumann(terms=50, rate=0.5)),
        "inner": implicit(tolerance=1e-6),
    }
    run = compiled(
        jax.vmap(lambda a, z: {name: hypergradient(problem, m)(z, jnp.ones(2), Batch(a, a))[1:] for name, m in methods.items()})
    )
    a = np.array([[1.0, -1.0], [1.0, 0.0], [1.0, np.nan], [1.0, np.inf], [1.0, 1.0], [1.0, 1.0], [9.0, 1.0]])
    z = np.array([[-1.0, 1.0], [0.0, 0.0], [0.0, 0.0], [0.0, 0.0], [-1.0, -1.0], [0.0, 0.0], [-1 / 9, -1.0]])
    found = run(a, z)
    codes = {name: [Result(int(code)).name for code in stats.code] for name, (_, stats) in found.items()}
    bad = ["NONFINITE", "NONFINITE"]
    assert codes["auto"] == ["NEGATIVE_CURVATURE", "SINGULAR", *bad, "SUCCESSFUL", "SUCCESSFUL", "SUCCESSFUL"]
    assert codes["cg"] == ["NEGATIVE_CURVATURE", "NEGATIVE_CURVATURE", *bad, "SUCCESSFUL", "SUCCESSFUL", "SUCCESSFUL"]
    assert codes["neumann"] == [
        "DIVERGED",
        "SUCCESSFUL",
        *bad,
        "SUCCESSFUL",
        "SUCCESSFUL",
        "DIVERGED",
    ]  # flat: see the residual
    assert found["neumann"][1].adjoint_residual[1] > 0.9
    assert codes["inner"] == ["NEGATIVE_CURVATURE", "SINGULAR", *bad, "SUCCESSFUL", "INNER_NOT_CONVERGED", "SUCCESSFUL"]
    close(found["inner"][1].inner_residual[5], np.sqrt(2))
    for gradient, stats in found.values():
        assert np.isfinite(gradient[stats.code < Result.NONFINITE]).all()
        assert np.isfinite(stats.aux).all()


def test_a_path_that_overflows_says_so():
    problem = Problem(lambda z, x, _: jnp.sum((z - x) ** 2), lambda z, x, _: jnp.sum(z**2))
    for name, (_, _, stats) in each(
        problem,
        {"itd": iterative(optax.sgd(1e300), 5), "one": one_step(optax.sgd(0.1))},
        jnp.zeros(2),
        jnp.ones(2),
        Batch(0, 0),
    ).items():
        assert stats.code == (Result.NONFINITE if name == "itd" else Result.SUCCESSFUL)


FRESH = linear_solve.neumann(terms=3, rate=0.1, fresh=True)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: iterative(optax.sgd(0.1), 0), ValueError, "steps: got 0, expected at least 1"),
        (lambda: iterative(optax.sgd(0.1), 5, truncate=6), ValueError, "truncate: got 6, expected at most steps = 5"),
        (lambda: iterative(optax.sgd(0.1), 5, checkpoint="all"), ValueError, "checkpoint: got 'all'"),
        (lambda: zeroth_order(optax.sgd(0.1), 5, directions=0), ValueError, "directions: got 0"),
        (lambda: zeroth_order(optax.sgd(0.1), 5, radius=0.0), ValueError, "radius: got 0.0"),
        (lambda: t1_t2(0.0), ValueError, "scale: got 0.0"),
        (lambda: hypergradient(jnp.sin, implicit()), TypeError, "problem: got"),
        (lambda: implicit(tolerance=-1.0), ValueError, "tolerance: got -1.0"),
        (lambda: implicit(FRESH), ValueError, "solver: .* fresh=False"),
        (lambda: implicit_root(jnp.sin, solver=FRESH), ValueError, "solver: .* fresh=False"),
        (
            lambda: implicit_root(jnp.sin, solver=linear_solve.cg),
            TypeError,
            "solver: got the function cg, expected a LinearSolver: did you",
        ),
        (
            lambda: root_vjp(lambda z, t: z - t, jnp.ones(2), (jnp.ones(2),), jnp.ones(3)),
            ValueError,
            r"cotangent: got float64\[3\]",
        ),
        (lambda: root_vjp(jnp.subtract, jnp.ones(2), jnp.ones(2), jnp.ones(2)), TypeError, "params: got .*, expected a tuple"),
        (lambda: root_jvp(jnp.subtract, jnp.int32(1), (1.0,), (1.0,)), TypeError, r"solution: got int32\[\]"),
        (lambda: root_jvp(lambda z, t: (z, t), jnp.ones(()), (1.0,), (1.0,)), ValueError, "optimality: got the structure"),
    ],
)
def test_bad_methods(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_bad_arguments():
    q = small()
    run = hypergradient(q.problem, implicit())
    for z, batch, options, error, message in (
        (jnp.zeros(5, int), whole(q), {}, TypeError, r"z: got int64\[5\], expected a floating-point array"),
        (q.start.inner, tuple(q.data), {}, TypeError, "batch: got tuple"),
        (q.start.inner, whole(q), {"guess": jnp.zeros(4)}, ValueError, "guess"),
    ):
        with pytest.raises(error, match=message):
            run(z, q.start.outer, batch, **options)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64, jnp.bfloat16])
def test_dtype_is_kept(dtype):
    problem = Problem(lambda z, x, _: jnp.sum((z["a"] - x) ** 2) + jnp.sum(z["b"] ** 2), lambda z, x, _: jnp.sum(z["a"] ** 2))
    x = jax.ShapeDtypeStruct((3,), dtype)
    for method in (implicit(), implicit(linear_solve.cg(max_steps=10)), iterative(optax.sgd(0.5), 4), t1_t2()):
        value, gradient, stats = jax.eval_shape(hypergradient(problem, method), {"a": x, "b": x}, x, Batch(0, 0))
        assert {leaf.dtype for leaf in (value, gradient, *stats.inner.values())} == {jnp.dtype(dtype)}
        assert stats.inner_residual.dtype == (jnp.float64 if dtype == jnp.float64 else jnp.float32)


def test_remainder_weights_reach_the_losses():
    q = small()
    weight = jnp.zeros(32).at[0].set(1.0)
    batch = whole(q)._replace(weight=type(q.data)(weight, weight))
    g = compiled(lambda z, x: hypergrad.bind(q.problem, batch).g(z, x))(*q.start[::2])
    first = jax.tree.map(lambda leaf: leaf[:1], q.data.inner)
    close(g, compiled(lambda z, x: q.problem.inner(z, x, first)[0])(*q.start[::2]))


# --- derivatives of black boxes ----------------------------------------------------------------------------------------------

A, B = np.random.default_rng(1).normal(size=(12, 4)), np.random.default_rng(2).normal(size=12)
P = {"theta": np.float64(0.3), "b": B}
INIT = {"z": np.zeros(4)}


def ridge(has_aux=False, **options):
    """argmin_z |A z - b|^2 / 2 + exp(theta) |z|^2 / 2 by gradient descent."""
    loss = lambda z, p: 0.5 * jnp.sum((A @ z["z"] - p["b"]) ** 2) + 0.5 * jnp.exp(p["theta"]) * jnp.sum(z["z"] ** 2)

    @implicit_root(jax.grad(loss), has_aux=has_aux, **options)
    def solve(init, p):
        step = lambda z: jax.tree.map(lambda z, d: z - 0.03 * d, z, jax.grad(loss)(z, p))
        # a while loop: reverse mode cannot go through it
        count, z = jax.lax.while_loop(lambda c: c[0] < 500, lambda c: (c[0] + 1, step(c[1])), (0, init))
        return (z, {"steps": count, "size": jnp.sum(z["z"])}) if has_aux else z

    return solve


def closed(init, p):
    return {"z": jnp.linalg.solve(A.T @ A + jnp.exp(p["theta"]) * jnp.eye(4), A.T @ p["b"])}


SOLVERS = {
    "auto": {"positive_definite": True},
    "auto, not symmetric": {},
    "cg": {"solver": linear_solve.cg(max_steps=30, rtol=1e-13), "positive_definite": True},
    "richardson": {"solver": linear_solve.richardson(steps=300, rate=0.04)},
}


def test_jacobians():
    """Forward and reverse, by several solvers."""

    def jacobians(solve):
        return jax.jacfwd(solve, 1)(INIT, P), jax.jacrev(solve, 1)(INIT, P)

    names = ("auto", "cg", "richardson")
    *found, expected = compiled(lambda: [jacobians(ridge(**SOLVERS[name])) for name in names] + [jacobians(closed)])()
    for ours in found:
        same(ours, expected)


@thinned("name", ["auto", "auto, not symmetric", "cg"], "auto, not symmetric")
def test_hessian_through_a_solve(name):
    """jax.hessian, reverse over reverse, forward over forward; of a function of theta."""

    def hessians(solve):
        f = lambda theta: jnp.sum(solve(INIT, {**P, "theta": theta})["z"] ** 3)
        return [
            twice(f)(P["theta"])
            for twice in (jax.hessian, lambda f: jax.grad(jax.grad(f)), lambda f: jax.jacfwd(jax.jacfwd(f)))
        ]

    ours, expected = compiled(lambda: (hessians(ridge(**SOLVERS[name])), hessians(closed)))()
    same(ours, expected, rtol=1e-8)


def test_vmap_of_gradients_and_gradients_of_vmap():
    thetas = jnp.linspace(-1.0, 1.0, 3)

    def slopes(solve):
        f = lambda theta: jnp.sum(solve(INIT, {**P, "theta": theta})["z"] ** 2)
        return jax.vmap(jax.grad(f))(thetas), jax.grad(lambda thetas: jax.vmap(f)(thetas).sum())(thetas)

    ours, expected = compiled(lambda: (slopes(ridge(positive_definite=True)), slopes(closed)))()
    same(ours, expected)


def test_aux_outputs_and_init_get_no_derivative():
    def outer(solve):
        def value(init, p):
            z, aux = solve(init, p)
            return jnp.sum(z["z"] ** 2) + aux["size"], aux

        return jax.grad(value, (0, 1), has_aux=True)(INIT, P)

    without = lambda init, p: (closed(init, p), {"size": 0.0})
    ((init, gradient), aux), (expected, _) = compiled(lambda: (outer(ridge(has_aux=True)), outer(without)))()
    assert aux["steps"] == 500
    same(gradient, expected[1])
    np.testing.assert_array_equal(init["z"], 0)


def test_several_parameters_and_integers():
    """Eagerly too: numbers that are not differentiated, keys and None among them."""

    @implicit_root(lambda z, a, k, b, rest: z * a - k.astype(float) * b)
    def solve(init, a, k, b, rest):
        return k.astype(float) * b / a

    rest = {"key": jax.random.key(0), "none": None, "flag": jnp.array(True)}
    gradients = jax.grad(solve, argnums=(1, 3))(jnp.ones(()), jnp.asarray(2.0), jnp.asarray(3), jnp.asarray(5.0), rest)
    close(gradients, (-15 / 4, 3 / 2))


def test_fixed_points():
    """Projected gradient on a box: derivatives on the free coordinates only; and a system that is not symmetric."""
    m, n = jnp.array([[2.0, 0.5], [0.5, 1.0]]), jnp.array([[2.0, 1.0], [0.0, 3.0]])
    step = lambda z, theta: jnp.clip(z - 0.3 * (m @ z - theta), 0.0, 1.0)

    @implicit_fixed_point(step)
    def box(init, theta):
        return jax.lax.fori_loop(0, 300, lambda _, z: step(z, theta), init)

    skew = implicit_root(lambda z, theta: n @ z - theta)(lambda init, theta: jnp.linalg.solve(n, theta))
    theta = jnp.array([1.0, 3.0])  # the second coordinate is at its bound
    for on_box, off in compiled(
        lambda: [(f(box, 1)(0 * theta, theta), f(skew, 1)(0 * theta, theta)) for f in (jax.jacfwd, jax.jacrev)]
    )():
        close(on_box, [[0.5, 0.0], [0.0, 0.0]])
        close(off, np.linalg.inv(n))


def test_nested():
    """A bilevel problem inside a bilevel problem: z(y) inside y(x)."""
    inner = implicit_root(lambda z, y: 3 * z - jnp.sin(y), positive_definite=True)(lambda init, y: jnp.sin(y) / 3)
    image = lambda y, x: 0.5 * inner(jnp.zeros(()), y) * x + x**2

    @implicit_fixed_point(image)
    def outer(init, x):
        return jax.lax.fori_loop(0, 60, lambda _, y: image(y, x), init)

    run = compiled(jax.value_and_grad(lambda x: outer(jnp.zeros(()), x)))
    slope = (run(0.7 + 1e-5)[0] - run(0.7 - 1e-5)[0]) / 2e-5
    close(run(0.7)[1], slope, rtol=1e-8)


@pytest.mark.parametrize("library", ["sklearn", "optimistix"])
def test_a_solver_of_another_library(library):
    """Through a callback to the host under jit and vmap, or in JAX under its own promotion rules."""
    closed = lambda alpha: jnp.linalg.solve(A.T @ A + alpha * jnp.eye(4), A.T @ B)
    optimality = lambda z, alpha: A.T @ (A @ z - B) + alpha * z
    if library == "sklearn":
        Ridge = pytest.importorskip("sklearn.linear_model").Ridge

        def fit(init, alpha):
            host = lambda alpha: Ridge(alpha=float(alpha), fit_intercept=False, tol=1e-12).fit(A, B).coef_
            return jax.pure_callback(host, jax.ShapeDtypeStruct((4,), jnp.float64), alpha, vmap_method="sequential")
    else:
        optimistix = pytest.importorskip("optimistix")

        def fit(init, alpha):
            with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
                return optimistix.root_find(optimality, optimistix.Newton(rtol=1e-10, atol=1e-10), init, alpha).value

    solve = implicit_root(optimality, positive_definite=True)(fit)
    alphas = jnp.array([0.5, 2.0])
    ours, expected = compiled(
        lambda: (jax.vmap(jax.jacrev(solve, 1), (None, 0))(jnp.zeros(4), alphas), jax.vmap(jax.jacfwd(closed))(alphas))
    )()
    close(ours, expected, rtol=1e-8)


def test_plain_python_and_the_backward_pass_is_compiled_once():
    """A solver that only runs on the host, outside of jit: its optimality is not traced again for new values."""
    traces = []

    def optimality(z, theta):
        traces.append(1)
        return A.T @ (A @ z - B) + jnp.exp(theta) * z

    solve = implicit_root(optimality, positive_definite=True)(
        lambda init, theta: jnp.asarray(np.linalg.solve(A.T @ A + np.exp(float(theta)) * np.eye(4), A.T @ B))
    )
    slope = jax.grad(lambda theta: jnp.sum(solve(jnp.zeros(4), theta)))
    first = slope(jnp.asarray(0.1))
    count = len(traces)
    second = slope(jnp.asarray(0.2))
    assert len(traces) == count
    for theta, got in ((0.1, first), (0.2, second)):
        inverse = np.linalg.inv(A.T @ A + np.exp(theta) * np.eye(4))
        close(got, -np.exp(theta) * np.sum(inverse @ inverse @ A.T @ B))


def test_failed_systems_give_nan_and_their_functions_say_why():
    """z^2 = theta: singular at 0, of negative curvature at the lower root, not solved elsewhere."""
    optimality = lambda z, theta: z**2 - theta
    roots = {pd: implicit_root(optimality, positive_definite=pd)(lambda init, theta: init) for pd in (True, False)}
    one = jnp.ones(())

    def at(z):
        theta = z**2
        slopes = [slope(roots[pd], 1)(z, theta) for pd in (True, False) for slope in (jax.grad, jax.jacfwd)]
        told = [root_vjp(optimality, z, (theta + 0.1,), one, positive_definite=pd, tolerance=0.01) for pd in (True, False)]
        return slopes, told, root_jvp(optimality, z, (theta,), (one,))

    slopes, told, along = compiled(jax.vmap(at))(np.array([2.0, 0.0, -2.0, np.nan]))
    for slope in slopes[:2]:
        np.testing.assert_array_equal(slope, [0.25, np.nan, np.nan, np.nan])
    for slope in slopes[2:]:
        np.testing.assert_array_equal(slope, [0.25, np.nan, -0.25, np.nan])
    codes = [[Result(int(code)).name for code in stats.code] for _, stats in (*told, along)]
    assert codes[0] == ["INNER_NOT_CONVERGED", "SINGULAR", "NEGATIVE_CURVATURE", "NONFINITE"]
    assert codes[1] == ["INNER_NOT_CONVERGED", "SINGULAR", "INNER_NOT_CONVERGED", "NONFINITE"]
    assert codes[2] == ["SUCCESSFUL", "SINGULAR", "SUCCESSFUL", "NONFINITE"]
    close(told[1][1].inner_residual[:3], 0.1)
    close(told[1][0][0][:3], [0.25, 0, -0.25])
    close(told[1][1].aux[:3], [-0.25, 0, 0.25])
    close(along[0][:3], [0.25, 0, -0.25])


def test_few_steps_are_no_failure():
    """What the solver was told to do: a biased derivative, not NaN."""
    solve = ridge(solver=linear_solve.cg(max_steps=1), positive_definite=True)
    slope = compiled(jax.grad(lambda p: jnp.sum(solve(INIT, p)["z"])))(P)["theta"]
    assert np.isfinite(slope)
    assert slope != 0


def test_what_is_differentiated_must_be_a_parameter():
    def solve_at(x):
        solve = implicit_root(lambda z, y: z - x * y)(lambda init, y: x * y)
        return solve(jnp.zeros(()), x)

    with pytest.raises(jax.errors.UnexpectedTracerError):
        jax.grad(solve_at)(2.0)
    slope = jax.vmap(jax.grad(lambda y, c: implicit_root(lambda z, y: z - c * y)(lambda init, y: c * y)(y, y)), (None, 0))
    close(compiled(slope)(2.0, np.arange(3.0)), np.arange(3.0))  # what is not, may be closed over


def test_wrong_structures():
    with pytest.raises(TypeError, match=r"solve: got .*, expected \(solution, aux\)"):
        implicit_root(jnp.subtract, has_aux=True)(lambda init, theta: theta)(jnp.ones(()), jnp.ones(()))
    for make, message in (
        (implicit_root(lambda z, theta: (z - theta, z)), "optimality: got the structure"),
        (implicit_fixed_point(lambda z, theta: theta[None]), r"fixed_point: got float64\[1\]"),
    ):
        with pytest.raises(ValueError, match=message):
            jax.grad(make(lambda init, theta: theta), argnums=1)(jnp.zeros(()), jnp.ones(()))
