"""docs/jaxopt.md: its blocks run in their order, its results are closed forms, and every row of its table is jaxopt's."""

import re
import warnings
from functools import cache
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

PAGE = Path(__file__).parent.parent / "docs" / "jaxopt.md"
pytest.importorskip("lineax")


@pytest.fixture(autouse=True)
def newcomer():
    """JAX as it comes, but in float64, as the page has it."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


@cache
def page():
    """The names that the blocks leave behind."""
    names = {}
    for block in re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL):
        exec(compile(block, str(PAGE), "exec"), names)
    return names


def close(ours, theirs, tol=1e-7):
    np.testing.assert_allclose(ours, theirs, rtol=tol, atol=tol)


def numbers():
    return (np.asarray(page()[name]) for name in ("features", "targets", "theta"))


@pytest.mark.more
def test_results_are_closed_forms():
    a, b, theta = numbers()
    inverse = np.linalg.inv(a.T @ a + theta * np.eye(4))
    z = inverse @ a.T @ b
    slope = -inverse @ z
    ours = page()
    for name in ("by_lbfgs", "by_descent", "by_cg", "pushed"):
        close(ours[name], slope)
    close(ours["pulled"], slope.sum())
    close(ours["aux"]["loss"], 0.5 * np.sum((a @ z - b) ** 2) + 0.5 * theta * z @ z)
    close(ours["curvature"], 2 * slope @ slope + 4 * z @ inverse @ inverse @ z)
    u, v = np.zeros(4), 0.0
    for _ in range(50):
        v = v - 0.01 * (a.T @ (a @ v) + theta * v + u if np.ndim(v) else u)
        u = u - 0.01 * (a.T @ (a @ u - b) + theta * u)
    close(ours["through_steps"], 2 * u @ v)
    plain = np.linalg.solve(a.T @ a, a.T @ b)
    for name, (found, _) in ours["solved"].items():
        close(found, z if name == "cg" else plain)


@pytest.mark.more
def test_fixed_points_are_closed_forms():
    """On the free coordinates the constrained solutions are those of smaller systems, the others do not move."""
    a, _, theta = numbers()
    ours = page()
    for name, solve, x, ridge, push in (
        ("on_the_cone", "non_negative", theta, theta, lambda z: z),
        ("of_the_lasso", "lasso", page()["weight"], 0.0, np.sign),
    ):
        z = np.asarray(ours[solve](ours["init"], x))
        free = z != 0
        assert 0 < free.sum() < 4
        expected = np.zeros(4)
        expected[free] = -np.linalg.solve(a[:, free].T @ a[:, free] + ridge * np.eye(free.sum()), push(z[free]))
        close(ours[name], expected)
    z = 0.0
    for _ in range(100):
        z = 0.5 * np.cos(z) + theta
    close(ours["of_cosine"], 1 / (1 + 0.5 * np.sin(z)))
    close(ours["of_cubic"], 0.25)


def jaxopt():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # it warns at import that it is no longer maintained
        return pytest.importorskip("jaxopt", reason="nothing to compare with")


def run(make, *args, argnum=1):
    """The derivative of ``.run(init, *args).params`` in its first parameter."""
    return jax.jacrev(lambda *args: make().run(*args).params, argnum)(*args)


#: What jaxopt gives for a row of the table, by the beginning of the row, and the name of what the page gives.
ROWS = {
    "`implicit_diff.custom_root(F)": (
        lambda j, p: jax.jacrev(j.implicit_diff.custom_root(jax.grad(p["ridge"]))(lambda i, t: p["direct"](i, t)[0]), 1)(
            p["init"], p["theta"]
        ),
        "by_lbfgs",
    ),
    "`custom_root(F, has_aux=True)": (
        lambda j, p: jax.jacrev(j.implicit_diff.custom_root(jax.grad(p["ridge"]), has_aux=True)(p["direct"]), 1, has_aux=True)(
            p["init"], p["theta"]
        )[0],
        "by_cg",
    ),
    "`custom_root(F, solve=": (
        lambda j, p: jax.jacrev(
            j.implicit_diff.custom_root(jax.grad(p["ridge"]), solve=j.linear_solve.solve_cg)(lambda i, t: p["direct"](i, t)[0]),
            1,
        )(p["init"], p["theta"]),
        "by_cg",
    ),
    "`implicit_diff.custom_fixed_point": (
        lambda j, p: jax.jacrev(j.implicit_diff.custom_fixed_point(p["proximal"])(p["follow"](p["proximal"])), 1)(
            p["init"], p["weight"]
        ),
        "of_the_lasso",
    ),
    "`implicit_diff.root_vjp": (
        lambda j, p: j.implicit_diff.root_vjp(jax.grad(p["ridge"]), p["solution"], (p["theta"],), jnp.ones(4))[0],
        "pulled",
    ),
    "`implicit_diff.root_jvp": (
        lambda j, p: j.implicit_diff.root_jvp(jax.grad(p["ridge"]), p["solution"], (p["theta"],), (jnp.ones(()),)),
        "pushed",
    ),
    "`linear_solve.solve_cg": (
        lambda j, p: j.linear_solve.solve_cg(
            lambda u: p["gram"] @ u, p["moments"], ridge=p["theta"], init=p["init"], tol=1e-10
        ),
        "cg",
    ),
    "`linear_solve.solve_cholesky": (
        lambda j, p: j.linear_solve.solve_cholesky(lambda u: p["gram"] @ u, p["moments"]),
        "cholesky",
    ),
    "`linear_solve.solve_lu": (lambda j, p: j.linear_solve.solve_lu(lambda u: p["gram"] @ u, p["moments"]), "lu"),
    "`linear_solve.solve_gmres": (
        lambda j, p: j.linear_solve.solve_gmres(lambda u: p["gram"] @ u, p["moments"], tol=1e-10),
        "gmres",
    ),
    "`linear_solve.solve_normal_cg": (
        lambda j, p: j.linear_solve.solve_normal_cg(lambda u: p["gram"] @ u, p["moments"], tol=1e-12),
        "auto",
    ),
    "`LBFGS(f)": (lambda j, p: run(lambda: j.LBFGS(p["ridge"], tol=1e-9), p["init"], p["theta"]), "by_lbfgs"),
    "`GradientDescent(f).run": (
        lambda j, p: run(lambda: j.GradientDescent(p["ridge"], tol=1e-9, maxiter=5000), p["init"], p["theta"]),
        "by_descent",
    ),
    "`GradientDescent(f, implicit_diff=False": (
        lambda j, p: jax.grad(
            lambda t: jnp.sum(
                j.GradientDescent(p["ridge"], stepsize=0.01, acceleration=False, maxiter=50, tol=0.0, implicit_diff=False)
                .run(p["init"], t)
                .params
                ** 2
            )
        )(p["theta"]),
        "through_steps",
    ),
    "`ProjectedGradient": (
        lambda j, p: jax.jacrev(
            lambda t: (
                j.ProjectedGradient(p["ridge"], j.projection.projection_non_negative, tol=1e-10, maxiter=5000)
                .run(p["init"], None, t)
                .params
            )
        )(p["theta"]),
        "on_the_cone",
    ),
    "`ProximalGradient": (
        lambda j, p: run(
            lambda: j.ProximalGradient(
                lambda z: 0.5 * jnp.sum((p["features"] @ z - p["targets"]) ** 2), j.prox.prox_lasso, tol=1e-10, maxiter=5000
            ),
            p["init"],
            p["weight"],
        ),
        "of_the_lasso",
    ),
    "`prox.prox_lasso": (lambda j, p: j.prox.prox_lasso(p["point"], 0.5, 1.0), "l1"),
    "`prox.prox_group_lasso": (lambda j, p: j.prox.prox_group_lasso(p["point"], 0.5, 1.0), "group"),
    "`projection.projection_box": (lambda j, p: j.projection.projection_box(p["point"], (-0.1, 1.0)), "box"),
    "`projection.projection_l2_ball": (lambda j, p: j.projection.projection_l2_ball(p["point"], 1.0), "ball"),
    "`projection.projection_simplex": (lambda j, p: j.projection.projection_simplex(p["point"], 1.0), "simplex"),
    "`FixedPointIteration": (
        lambda j, p: run(lambda: j.FixedPointIteration(p["cosine"], tol=1e-10), jnp.zeros(()), p["theta"]),
        "of_cosine",
    ),
    "`Bisection": (
        lambda j, p: run(
            lambda: j.Bisection(lambda z, t: z**3 + z - t, lower=-5.0, upper=5.0, tol=1e-10, maxiter=60, check_bracket=False),
            None,
            jnp.asarray(2.0),
        ),
        "of_cubic",
    ),
}


def test_every_row_has_its_comparison():
    rows = [line[2:] for line in PAGE.read_text().splitlines() if line.startswith("| `")]
    for row in rows:
        assert sum(row.startswith(begin) for begin in ROWS) == 1, row
    assert len(rows) == len(ROWS)


@pytest.mark.slow
@pytest.mark.parametrize("row", ROWS)
def test_row_is_as_in_jaxopt(row):
    theirs, name = ROWS[row]
    names = page()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its own use of names that jax deprecates
        expected = theirs(jaxopt(), names)
    ours = {**{key: value for key, (value, _) in names["solved"].items()}, **names["near"], **names}
    close(ours[name], expected, tol=1e-6)
