"""The hypergradient as a function, and derivatives of black-box inner solvers: closed forms, slopes, transformations."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from bilevel_jax import Batch, Problem, Result, hypergrad, linear_solve, testing
from bilevel_jax.hypergrad import hypergradient, implicit, implicit_fixed_point, implicit_root, iterative, one_step, t1_t2

pytestmark = pytest.mark.slow  # many small compilations: minutes


@pytest.fixture(scope="module")
def quadratic():
    return testing.quadratic(jax.random.key(3), inner_dim=6, outer_dim=4, inner_samples=4, outer_samples=4, dtype=jnp.float64)


@pytest.fixture(scope="module")
def logistic():
    """A strongly convex inner problem that is not quadratic: (problem, batch, x, z*(x))."""
    random = np.random.default_rng(0)
    a, b = (jnp.asarray(random.normal(size=(30, 5))) for _ in range(2))
    labels = jnp.sign(a @ jnp.ones(5)), jnp.sign(b @ jnp.ones(5) + 0.3)

    def fit(z, rows):
        features, labels = rows
        return jax.nn.softplus(-labels * (features @ z["w"]))

    problem = Problem(lambda z, x, d: fit(z, d) + 0.5 * jnp.sum(jnp.exp(x) * z["w"] ** 2), lambda z, x, d: fit(z, d))
    batch = Batch(inner=(a, labels[0]), outer=(b, labels[1]))
    x = jnp.linspace(-2.0, 0.0, 5)
    return problem, batch, x, {"w": newton(problem, batch)(x)}


def newton(problem, batch):
    def solve(x):
        g = lambda w: problem.inner({"w": w}, x, batch.inner).mean()
        step = lambda _, w: w - jnp.linalg.solve(jax.hessian(g)(w), jax.grad(g)(w))
        return jax.lax.fori_loop(0, 12, step, jnp.zeros(5))

    return solve


def reference(problem, batch, x):
    """grad h by central differences of the value at a Newton solution."""
    solve = newton(problem, batch)
    h = lambda x: problem.outer({"w": solve(x)}, x, batch.outer).mean()
    steps = 1e-5 * jnp.eye(x.size)
    return jnp.array([(h(x + s) - h(x - s)) / 2e-5 for s in steps])


@pytest.mark.parametrize(
    "method",
    [
        implicit(),
        implicit(linear_solve.dense()),
        implicit(linear_solve.cg(max_steps=30, rtol=1e-12)),
        implicit(linear_solve.neumann(terms=2000, rate=0.9)),
        iterative(optax.sgd(0.9), 2000, checkpoint="none"),
    ],
    ids=["auto", "dense", "cg", "neumann", "itd"],
)
def test_quadratic_closed_form(quadratic, method):
    at = quadratic.at(quadratic.start.outer)
    value, gradient, stats = jax.jit(hypergradient(quadratic.problem, method))(at.inner, at.outer, Batch(*quadratic.data))
    np.testing.assert_allclose(gradient, quadratic.gradient(at.outer), rtol=1e-9, atol=1e-11)
    np.testing.assert_allclose(value, quadratic.value(at.outer), rtol=1e-12)
    assert stats.inner_residual < 1e-12
    assert stats.code == Result.SUCCESSFUL
    if stats.aux is not None:
        np.testing.assert_allclose(stats.aux, at.aux, rtol=1e-8, atol=1e-10)
        assert stats.adjoint_residual < 1e-9


def test_logistic_against_finite_differences(logistic):
    problem, batch, x, z = logistic
    expected = reference(problem, batch, x)
    for method in (implicit(), implicit(linear_solve.cg(max_steps=20, rtol=1e-13)), iterative(optax.sgd(0.5), 800)):
        _, gradient, stats = jax.jit(hypergradient(problem, method))(z, x, batch)
        np.testing.assert_allclose(gradient, expected, atol=2e-10)
        assert stats.inner_residual < 1e-12


def slope(errors, counts):
    return np.polyfit(np.asarray(counts, float), np.log(np.asarray(errors)), 1)[0]


def test_truncation_error_of_itd_has_the_slope_of_theory():
    """On a quadratic the error of D steps is (1 - a mu)^D: log(1 - a mu) within 5 %, from z* so that only d z*/dx errs."""
    q = testing.quadratic(
        jax.random.key(1), inner_dim=6, outer_dim=3, inner_samples=1, outer_samples=1, condition=20.0, dtype=jnp.float64
    )
    at = q.at(q.start.outer)
    counts = [60, 90, 120, 150]
    errors = []
    for d in counts:
        _, gradient, _ = jax.jit(hypergradient(q.problem, iterative(optax.sgd(1.0), d)))(at.inner, at.outer, Batch(*q.data))
        errors.append(float(jnp.linalg.norm(gradient - q.gradient(at.outer))))
    assert slope(errors, counts) == pytest.approx(np.log(1 - 1 / 20), rel=0.05)


def test_neumann_is_its_closed_form(quadratic):
    at = quadratic.at(quadratic.start.outer)
    eta, terms = 0.7, 9
    a = quadratic.data.inner["A"].mean(0)
    _, _, stats = hypergradient(quadratic.problem, implicit(linear_solve.neumann(terms=terms, rate=eta)))(
        at.inner, at.outer, Batch(*quadratic.data)
    )
    power = jnp.linalg.matrix_power(jnp.eye(6) - eta * a, terms + 1)
    np.testing.assert_allclose(stats.aux, (jnp.eye(6) - power) @ at.aux, atol=1e-12)
    # a bound that costs no application more: the last term, of which the residual is the next
    last = jnp.linalg.matrix_power(jnp.eye(6) - eta * a, terms) @ a @ at.aux
    np.testing.assert_allclose(stats.adjoint_residual, jnp.linalg.norm(last), rtol=1e-8)
    assert jnp.linalg.norm(power @ a @ at.aux) < stats.adjoint_residual


def test_truncated_itd_is_a_short_itd_from_the_last_iterates(quadratic):
    z, x, batch = quadratic.start.inner, quadratic.start.outer, Batch(*quadratic.data)
    a, c, b = (quadratic.data.inner[k].mean(0) for k in "ACb")
    for _ in range(15):
        z = z - 0.5 * (a @ z + x @ c + b)
    expected = hypergradient(quadratic.problem, iterative(optax.sgd(0.5), 5))(z, x, batch)[1]
    actual = hypergradient(quadratic.problem, iterative(optax.sgd(0.5), 20, truncate=5))(quadratic.start.inner, x, batch)[1]
    np.testing.assert_allclose(actual, expected, rtol=1e-12)


@pytest.mark.parametrize("steps", [1, 7, 16])
def test_checkpointing_changes_nothing_but_memory(logistic, steps):
    problem, batch, x, _ = logistic
    start = {"w": jnp.ones(5)}
    run = lambda checkpoint: hypergradient(problem, iterative(optax.adam(0.1), steps, checkpoint=checkpoint))(start, x, batch)
    plain = run("none")
    for checkpoint in ("step", "sqrt"):
        for one, other in zip(jax.tree.leaves(run(checkpoint)), jax.tree.leaves(plain), strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-12, atol=1e-15)


def test_sqrt_checkpoints_keep_less_memory():
    """Temporary memory of the compiled gradient through 100 steps on 20,000 variables."""
    problem = Problem(lambda z, x, _: jnp.sum(jnp.cosh(z) + jnp.tanh(x) * z), lambda z, x, _: jnp.sum(z**2))
    z = x = jnp.ones(20_000)

    def memory(checkpoint):
        run = hypergradient(problem, iterative(optax.sgd(0.1), 100, checkpoint=checkpoint))
        with jax.disable_jit(False):
            compiled = jax.jit(lambda z, x: run(z, x, Batch(inner=0, outer=0))[1]).lower(z, x).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert memory("sqrt") < 0.4 * memory("none")


def test_one_step_and_t1_t2_agree_for_gradient_steps(quadratic):
    at, batch = quadratic.at(quadratic.start.outer), Batch(*quadratic.data)
    one = hypergradient(quadratic.problem, one_step(optax.sgd(1.0)))(at.inner, at.outer, batch)[1]
    other = hypergradient(quadratic.problem, t1_t2())(at.inner, at.outer, batch)[1]
    np.testing.assert_allclose(one, other, atol=1e-12)
    assert jnp.linalg.norm(one - quadratic.gradient(at.outer)) > 1e-2  # both are biased


def test_warm_start_helps(quadratic):
    at, batch = quadratic.at(quadratic.start.outer), Batch(*quadratic.data)
    run = hypergradient(quadratic.problem, implicit(linear_solve.cg(max_steps=2, rtol=0.0)))
    _, _, cold = run(at.inner, at.outer, batch)
    _, _, warm = run(at.inner, at.outer, batch, guess=cold.aux)
    assert warm.adjoint_residual < 0.5 * cold.adjoint_residual


def test_codes():
    batch = Batch(inner=0, outer=0)
    saddle = Problem(lambda z, x, _: z[0] ** 2 - z[1] ** 2 + x @ z, lambda z, x, _: jnp.sum(z) + x[0])
    z, x = jnp.zeros(2), jnp.ones(2)
    for solver in (linear_solve.cg(max_steps=10), linear_solve.dense(), linear_solve.auto()):
        _, gradient, stats = hypergradient(saddle, implicit(solver))(z, x, batch)
        assert stats.code == Result.NEGATIVE_CURVATURE
        assert jnp.isfinite(gradient).all()
    bowl = Problem(lambda z, x, _: jnp.sum((z - x) ** 2), lambda z, x, _: jnp.sum(z**2))
    assert hypergradient(bowl, implicit(tolerance=1e-6))(z, x, batch)[2].code == Result.INNER_NOT_CONVERGED
    assert hypergradient(bowl, implicit(tolerance=1e-6))(x, x, batch)[2].code == Result.SUCCESSFUL
    assert hypergradient(bowl, implicit(linear_solve.neumann(terms=50, rate=3.0)))(x, x, batch)[2].code == Result.DIVERGED
    assert hypergradient(bowl, iterative(optax.sgd(1e300), 5))(z, x, batch)[2].code == Result.NONFINITE


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: iterative(optax.sgd(0.1), 0), "steps: got 0, expected at least 1"),
        (lambda: iterative(optax.sgd(0.1), 5, truncate=6), "truncate: got 6, expected at most steps = 5"),
        (lambda: iterative(optax.sgd(0.1), 5, checkpoint="all"), "checkpoint: got 'all'"),
        (lambda: implicit(linear_solve.neumann(terms=3, rate=0.1, fresh=True)), "fresh=False"),
    ],
)
def test_bad_methods(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_bad_arguments(quadratic):
    run, q = hypergradient(quadratic.problem, implicit()), quadratic
    with pytest.raises(TypeError, match=r"z: got int64\[6\], expected a floating-point array"):
        run(jnp.zeros(6, int), q.start.outer, Batch(*q.data))
    with pytest.raises(TypeError, match="batch: got tuple"):
        run(q.start.inner, q.start.outer, tuple(q.data))
    with pytest.raises(ValueError, match="guess"):
        run(q.start.inner, q.start.outer, Batch(*q.data), guess=jnp.zeros(5))


class TestImplicitRoot:
    """What users of jaxopt's custom_root and custom_fixed_point do, and what they miss there."""

    @staticmethod
    def ridge(solver=None, has_aux=False, positive_definite=True):
        """argmin_z |A z - b|^2 / 2 + exp(theta) |z|^2 / 2 by gradient descent; closed form known."""
        random = np.random.default_rng(1)
        a, b = jnp.asarray(random.normal(size=(12, 4))), jnp.asarray(random.normal(size=12))
        loss = lambda z, p: 0.5 * jnp.sum((a @ z["z"] - p["b"]) ** 2) + 0.5 * jnp.exp(p["theta"]) * jnp.sum(z["z"] ** 2)

        @implicit_root(jax.grad(loss), solver=solver, positive_definite=positive_definite, has_aux=has_aux)
        def solve(init, p):
            step = lambda z: jax.tree.map(lambda z, d: z - 0.03 * d, z, jax.grad(loss)(z, p))
            # a while loop: reverse mode cannot go through it
            count, z = jax.lax.while_loop(lambda c: c[0] < 2000, lambda c: (c[0] + 1, step(c[1])), (0, init))
            return (z, {"steps": count, "size": jnp.sum(z["z"])}) if has_aux else z

        closed = lambda p: {"z": jnp.linalg.solve(a.T @ a + jnp.exp(p["theta"]) * jnp.eye(4), a.T @ p["b"])}
        return solve, closed, {"z": jnp.zeros(4)}, {"theta": jnp.asarray(0.3), "b": b}

    @pytest.mark.parametrize(
        "solver", [None, linear_solve.cg(max_steps=30, rtol=1e-13), linear_solve.dense(positive_definite=False)]
    )
    @pytest.mark.parametrize("jacobian", [jax.jacfwd, jax.jacrev])
    def test_jacobians(self, solver, jacobian):
        solve, closed, init, p = self.ridge(solver)
        actual, expected = jax.jit(jacobian(lambda p: solve(init, p)))(p), jacobian(closed)(p)
        jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-9, atol=1e-11), actual, expected)

    @pytest.mark.parametrize("positive_definite", [pytest.param(True, marks=pytest.mark.slow), False])
    def test_hessian_through_a_solve(self, positive_definite):
        solve, closed, init, p = self.ridge(positive_definite=positive_definite)
        outer = lambda solve: lambda t: jnp.sum(solve({**p, "theta": t})["z"] ** 3)
        for twice in (jax.hessian, lambda f: jax.grad(jax.grad(f)), lambda f: jax.jacfwd(jax.jacfwd(f))):
            actual = twice(outer(lambda p: solve(init, p)))(p["theta"])
            np.testing.assert_allclose(actual, jax.hessian(outer(closed))(p["theta"]), rtol=1e-8)

    def test_vmap_of_gradients_and_gradients_of_vmap(self):
        solve, closed, init, p = self.ridge()
        thetas = jnp.linspace(-1.0, 1.0, 3)
        f = lambda solve: lambda t: jnp.sum(solve({**p, "theta": t})["z"] ** 2)
        ours = f(lambda p: solve(init, p))
        expected = jax.vmap(jax.grad(f(closed)))(thetas)
        np.testing.assert_allclose(jax.vmap(jax.grad(ours))(thetas), expected, rtol=1e-9)
        np.testing.assert_allclose(jax.grad(lambda t: jax.vmap(ours)(t).sum())(thetas), expected, rtol=1e-9)

    def test_aux_outputs(self):
        solve, closed, init, p = self.ridge(has_aux=True)

        def outer(p):
            z, aux = solve(init, p)
            return jnp.sum(z["z"] ** 2) + aux["size"], aux

        gradient, aux = jax.jit(jax.grad(outer, has_aux=True))(p)
        assert aux["steps"] == 2000
        expected = jax.grad(lambda p: jnp.sum(closed(p)["z"] ** 2))(p)  # aux is not differentiated
        jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-9), gradient, expected)

    def test_init_gets_no_derivative(self):
        solve, _, init, p = self.ridge()
        gradient = jax.grad(lambda init: jnp.sum(solve(init, p)["z"]))(init)
        np.testing.assert_array_equal(gradient["z"], jnp.zeros(4))

    def test_several_parameters_and_integers(self):
        @implicit_root(lambda z, a, k, b: z * a - k.astype(float) * b)
        def solve(init, a, k, b):
            return k.astype(float) * b / a

        gradients = jax.grad(solve, argnums=(1, 3))(jnp.ones(()), jnp.asarray(2.0), jnp.asarray(3), jnp.asarray(5.0))
        np.testing.assert_allclose(gradients, (-15 / 4, 3 / 2))

    def test_projected_gradient(self):
        """A box-constrained least squares, by its fixed point: derivatives on the free coordinates only."""
        m = jnp.array([[2.0, 0.5], [0.5, 1.0]])

        def step(z, theta):
            return jnp.clip(z - 0.3 * (m @ z - theta), 0.0, 1.0)

        @implicit_fixed_point(step)
        def solve(init, theta):
            return jax.lax.fori_loop(0, 300, lambda _, z: step(z, theta), init)

        theta = jnp.array([1.0, 3.0])  # the second coordinate is at its bound
        jacobian = jax.jacrev(solve, argnums=1)(jnp.zeros(2), theta)
        np.testing.assert_allclose(jacobian, [[0.5, 0.0], [0.0, 0.0]], atol=1e-12)

    def test_non_symmetric_system(self):
        m = jnp.array([[2.0, 1.0], [0.0, 3.0]])
        solve = implicit_root(lambda z, theta: m @ z - theta)(lambda init, theta: jnp.linalg.solve(m, theta))
        for jacobian in (jax.jacfwd, jax.jacrev):
            actual = jacobian(solve, argnums=1)(jnp.zeros(2), jnp.ones(2))
            np.testing.assert_allclose(actual, jnp.linalg.inv(m), atol=1e-13)

    def test_a_solver_of_another_library_through_a_callback(self):
        from sklearn.linear_model import Ridge

        random = np.random.default_rng(2)
        a, b = random.normal(size=(20, 3)), random.normal(size=20)

        @implicit_root(lambda z, alpha: a.T @ (a @ z - b) + alpha * z, positive_definite=True)
        def solve(init, alpha):
            fit = lambda alpha: Ridge(alpha=float(alpha), fit_intercept=False, tol=1e-12).fit(a, b).coef_
            return jax.pure_callback(fit, jax.ShapeDtypeStruct((3,), jnp.float64), alpha, vmap_method="sequential")

        closed = lambda alpha: jnp.linalg.solve(a.T @ a + alpha * jnp.eye(3), a.T @ b)
        alphas = jnp.array([0.5, 2.0])
        actual = jax.jit(jax.vmap(jax.jacrev(lambda alpha: solve(jnp.zeros(3), alpha))))(alphas)
        np.testing.assert_allclose(actual, jax.vmap(jax.jacfwd(closed))(alphas), rtol=1e-8)

    def test_nested(self):
        """A bilevel problem inside a bilevel problem: z(y) inside y(x)."""
        inner = implicit_root(lambda z, y: 3 * z - jnp.sin(y), positive_definite=True)(lambda init, y: jnp.sin(y) / 3)

        def middle(y, x):
            return y - 0.5 * inner(jnp.zeros(()), y) * x - x**2

        @implicit_root(middle)
        def outer(init, x):
            return jax.lax.fori_loop(0, 60, lambda _, y: 0.5 * inner(jnp.zeros(()), y) * x + x**2, init)

        x = jnp.asarray(0.7)
        actual = jax.grad(outer, argnums=1)(jnp.zeros(()), x)
        slope = (outer(jnp.zeros(()), x + 1e-5) - outer(jnp.zeros(()), x - 1e-5)) / 2e-5
        np.testing.assert_allclose(actual, slope, rtol=1e-8)

    def test_the_backward_pass_compiles_once(self):
        solve, _, init, p = self.ridge()
        traces = []

        @jax.jit
        def gradient(p):
            traces.append(1)
            return jax.grad(lambda p: jnp.sum(solve(init, p)["z"]))(p)

        for theta in (0.1, 0.2, 0.3):
            gradient({**p, "theta": jnp.asarray(theta)})
        assert len(traces) == 1

    def test_wrong_structure_of_the_optimality(self):
        solve = implicit_root(lambda z, theta: (z - theta, z))(lambda init, theta: theta)
        with pytest.raises(ValueError, match="optimality: got the structure"):
            jax.grad(solve, argnums=1)(jnp.zeros(()), jnp.ones(()))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_dtype_is_kept(dtype):
    q = testing.quadratic(jax.random.key(0), inner_dim=4, outer_dim=3, inner_samples=2, outer_samples=2, dtype=dtype)
    for method in (implicit(), implicit(linear_solve.cg(max_steps=10)), iterative(optax.sgd(0.5), 4), t1_t2()):
        value, gradient, stats = hypergradient(q.problem, method)(q.start.inner, q.start.outer, Batch(*q.data))
        assert {leaf.dtype for leaf in (value, gradient, stats.inner, stats.inner_residual)} == {jnp.dtype(dtype)}


def test_remainder_weights_reach_the_losses(quadratic):
    weight = jnp.array([1.0, 0.0, 0.0, 0.0])
    batch = Batch(*quadratic.data)._replace(weight=type(quadratic.data)(weight, weight))
    g = hypergrad.bind(quadratic.problem, batch).g(quadratic.start.inner, quadratic.start.outer)
    first = jax.tree.map(lambda leaf: leaf[:1], quadratic.data.inner)
    np.testing.assert_allclose(g, quadratic.problem.inner(quadratic.start.inner, quadratic.start.outer, first)[0])
