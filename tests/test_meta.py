"""Algorithm-based solvers against their closed forms on quadratics, the formulas of ANIL, and solvers that they reduce to."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from bilevel_jax import Levels, Problem, Vars, linear_solve, run, samplers, solvers, sweep, tasks
from tests.checks import check_same
from tests.tables import distance, thinned
from tests.task_problems import (
    DIM,
    HEAD,
    NETWORK,
    POINT,
    QUADRATIC,
    TASKS,
    direction,
    drawn,
    mean_over_tasks,
    network,
    network_loss,
    of_head,
    opts,
    quadratics,
)


def contraction(alpha, steps):
    """``(I - alpha A_i)^steps`` of every task."""
    A = np.asarray(quadratics()["A"])
    return np.stack([np.linalg.matrix_power(np.eye(DIM) - alpha * a, steps) for a in A])


def moments(alpha, steps, first_order=False):
    """H_i of (2.40): ``(I - alpha A)^2N A``, of FOMAML ``(I - alpha A)^N A``; and the stationary point."""
    A, c = (np.asarray(quadratics()[name]) for name in "Ac")
    H = contraction(alpha, steps if first_order else 2 * steps) @ A
    return H, np.linalg.solve(H.sum(0), np.einsum("tij,tj->i", H, c))


def slope(H, x):
    return np.einsum("tij,tj->i", H, np.asarray(x) - np.asarray(quadratics()["c"])) / TASKS


# ---- closed forms -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("first_order", [False, True])
@pytest.mark.parametrize("steps", [1, 5])
def test_gradient_on_quadratics(steps, first_order):
    solver = solvers.maml(QUADRATIC, opts(0.3), inner_steps=steps, first_order=first_order)
    H, _ = moments(0.3, steps, first_order)
    assert distance(direction(solver, POINT, drawn(quadratics())), slope(H, POINT)) < 1e-12


def stationary(make, steps=400):
    """Where x ends."""
    solver = make(QUADRATIC, opts(0.3, 3.0), inner_steps=5)
    data = Levels(quadratics(), quadratics())
    go = jax.jit(lambda: run(solver, samplers.full(), Vars(outer=jnp.zeros(DIM)), data, jax.random.key(0), steps=steps)[0])
    return go().state.vars.outer


def test_maml_ends_at_the_optimum():
    assert distance(stationary(solvers.maml), moments(0.3, 5)[1]) < 1e-10


def test_fomaml_ends_beside_it():
    """At a point known in closed form, where the gradient is not 0, however long it runs."""
    x, (H, best) = stationary(solvers.fomaml), moments(0.3, 5)
    assert distance(x, moments(0.3, 5, first_order=True)[1]) < 1e-10
    assert np.linalg.norm(slope(H, x)) > 1e-3
    assert distance(x, best) > 1e-2


def test_bias_of_fomaml_is_of_the_order_of_the_inner_rate():
    def bias(alpha):
        return np.linalg.norm(slope(moments(alpha, 5)[0], moments(alpha, 5, first_order=True)[1]))

    assert bias(1e-4) / bias(1e-5) == pytest.approx(10, rel=1e-2)


def test_adapted_point():
    """``vars.inner`` is z_N of the last task."""
    solver, batch = solvers.maml(QUADRATIC, opts(0.3), inner_steps=3), drawn(quadratics())
    state = solver.update(solver.init(Vars(outer=POINT), batch), batch)
    A, c = (leaf[-1] for leaf in (quadratics()["A"], quadratics()["c"]))
    assert distance(state.vars.inner, c + np.linalg.matrix_power(np.eye(DIM) - 0.3 * A, 3) @ (POINT - c)) < 1e-13


def test_support_and_query_data_differ():
    """Inner steps on the support, the last gradient on the query data."""
    query = {"A": quadratics()["A"][::-1], "c": 2 * quadratics()["c"]}
    way = direction(solvers.maml(QUADRATIC, opts(0.3), inner_steps=2), POINT, drawn(quadratics(), query))
    P, c = contraction(0.3, 2), np.asarray(quadratics()["c"])
    last = c + np.einsum("tij,tj->ti", P, POINT - c)
    expected = np.einsum("tji,tjk,tk->i", P, query["A"], last - np.asarray(query["c"])) / TASKS
    assert distance(way, expected) < 1e-12


def test_reptile_moves_by_the_displacement():
    way = direction(solvers.reptile(QUADRATIC, opts(0.3), inner_steps=5), POINT, drawn(quadratics()))
    moved = POINT - np.asarray(quadratics()["c"])
    assert distance(way, np.einsum("tij,tj->i", np.eye(DIM) - contraction(0.3, 5), moved) / TASKS) < 1e-13


# ---- iMAML ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("inner", [optax.sgd(0.3), optax.sgd(0.3, momentum=0.5)], ids=["sgd", "momentum"])
def test_imaml_is_the_implicit_gradient(inner):
    """``mean (I + A / lam)^-1 d f(z)`` at the minimiser z of g + lam |z - x|^2 / 2, whatever led to z."""
    lam = 2.0
    solve = linear_solve.cg(rtol=1e-12, max_steps=20)
    solver = solvers.imaml(
        QUADRATIC, Vars(inner=inner, outer=optax.sgd(1.0)), strength=lam, inner_steps=80, linear_solver=solve
    )
    A, c = (np.asarray(quadratics()[name]) for name in "Ac")
    z = np.linalg.solve(A + lam * np.eye(DIM), np.einsum("tij,tj->ti", A, c)[..., None] + lam * POINT[:, None])[..., 0]
    fz = np.einsum("tij,tj->ti", A, z - c)
    expected = np.linalg.solve(np.eye(DIM) + A / lam, fz[..., None])[..., 0].mean(0)
    assert distance(direction(solver, POINT, drawn(quadratics())), expected) < 1e-10


# ---- ANIL -------------------------------------------------------------------------------------------------------------


def anil_by_formula(params, support, query, alpha, steps):
    """(2.41) and (2.42), with dense Hessians."""
    body, z = params["body"].ravel(), params["head"]
    g = lambda z, x: network_loss({"body": x.reshape(5, HEAD), "head": z}, None, support).mean()
    f = lambda z, x: network_loss({"body": x.reshape(5, HEAD), "head": z}, None, query).mean()
    path = [z]
    for _ in range(steps):
        path.append(path[-1] - alpha * jax.grad(g)(path[-1], body))
    way, into_body = jax.grad(f)(path[-1], body), jax.grad(f, 1)(path[-1], body)
    for z in reversed(path[:-1]):
        into_body -= alpha * jax.jacobian(jax.grad(g), 1)(z, body).T @ way
        way = way - alpha * jax.hessian(g)(z, body) @ way
    return {"body": into_body.reshape(5, HEAD), "head": way}


def test_anil_follows_its_formulas():
    params, support, query = network()
    way = direction(solvers.anil(NETWORK, opts(0.4), adapted=of_head, inner_steps=3), params, drawn(support, query))
    formula = mean_over_tasks(jax.jit(partial(anil_by_formula, params, alpha=0.4, steps=3)))
    assert max(jax.tree.leaves(jax.tree.map(distance, way, formula))) < 1e-12


@pytest.mark.more
def test_anil_is_back_propagation():
    params, support, query = network()

    @jax.jit
    def value(params, support, query):
        z = params["head"]
        for _ in range(3):
            z = z - 0.4 * jax.grad(lambda z: network_loss(params | {"head": z}, None, support).mean())(z)
        return network_loss(params | {"head": z}, None, query).mean()

    expected = mean_over_tasks(partial(jax.grad(value), params))
    way = direction(solvers.anil(NETWORK, opts(0.4), adapted=of_head, inner_steps=3), params, drawn(support, query))
    assert max(jax.tree.leaves(jax.tree.map(distance, way, expected))) < 1e-12


@thinned("first_order", [False, True], True)
def test_a_start_that_is_not_learned_is_itd_bio(first_order):
    """One task: the body moves as in (FO-)ITD-BiO with z the head, from the start in ``vars.aux``; the head of x stays."""
    params, support, query = network()
    one = jax.tree.map(lambda leaf: leaf[:1], (support, query))
    task = jax.tree.map(lambda leaf: leaf[0], one)
    start = jnp.full(HEAD, 0.3)
    solver = solvers.anil(NETWORK, opts(0.4), adapted=of_head, inner_steps=3, learn_start=False, first_order=first_order)
    way = direction(solver, Vars(aux={"body": None, "head": start}, outer=params), drawn(*one))
    assert distance(way["head"], jnp.zeros(HEAD)) == 0

    whole = lambda z, x, data: network_loss({"body": x, "head": z}, None, data)
    make = solvers.fo_itd_bio if first_order else solvers.itd_bio
    itd = make(Problem(whole, whole), opts(0.4), inner_steps=3)
    expected = direction(itd, Vars(inner=start, outer=params["body"]), drawn(*task))
    assert distance(way["body"], expected) < 1e-13
    assert jnp.abs(expected).max() > 1e-3


@pytest.mark.more
def test_the_kept_start_is_that_of_the_model():
    params, support, query = network()
    solver = solvers.anil(NETWORK, opts(), adapted=of_head, learn_start=False)
    state = solver.init(Vars(outer=params), drawn(support, query))
    new = solver.update(state, drawn(support, query))
    check_same(new.vars.aux, {"body": None, "head": params["head"]})
    assert jax.tree.structure(new.vars.inner) == jax.tree.structure(new.vars.aux)


def test_anil_of_first_order():
    """The start moves along d_z f, the body along d_x f, both at z_N."""
    params, support, query = network()
    solver = solvers.anil(NETWORK, opts(0.4), adapted=of_head, inner_steps=3, first_order=True)

    @jax.jit
    def at_the_end(support, query):
        z = params["head"]
        for _ in range(3):
            z = z - 0.4 * jax.grad(lambda z: network_loss(params | {"head": z}, None, support).mean())(z)
        return jax.grad(lambda p: network_loss(p, None, query).mean())(params | {"head": z})

    way = direction(solver, params, drawn(support, query))
    assert max(jax.tree.leaves(jax.tree.map(distance, way, mean_over_tasks(at_the_end)))) < 1e-13


# ---- Meta-SGD ----


def test_rates_that_are_learned():
    """Meta-SGD: three lines; the rates move along the derivative of (2.40) in them."""
    solver = sweep(
        tasks.over_tasks(
            tasks.through_steps(
                QUADRATIC,
                optax.sgd(1.0),
                2,
                start=lambda vars: vars.outer["start"],
                scale=lambda way, x: jax.tree.map(jnp.multiply, x["rates"], way),
            ),
            optax.sgd(1.0),
        ),
        inner=lambda x: x["start"],
    )
    x = {"start": jnp.asarray(POINT), "rates": jnp.asarray(np.random.default_rng(6).uniform(0.1, 0.4, DIM))}

    def value(x):
        A, c = quadratics()["A"], quadratics()["c"]
        step = jnp.eye(DIM)[None] - x["rates"][None, :, None] * A
        left = jnp.einsum("tij,tjk,tk->ti", step, step, x["start"][None] - c)
        return 0.5 * jnp.einsum("ti,tij,tj->", left, A, left) / TASKS

    check_same(direction(solver, x, drawn(quadratics())), jax.grad(value)(x), tol=1e-12)
