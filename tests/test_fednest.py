"""FedNest: what it reduces to, its NumPy reference message by message, its fixed point, what is counted and refused."""

from collections import Counter
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.interpreters import partial_eval

from bilevel_jax import (
    Batch,
    Levels,
    Problem,
    Result,
    Solver,
    Vars,
    descend,
    guard,
    implicit,
    linear_solve,
    run,
    samplers,
    solve_aux,
    spent,
    sweep,
    worst,
)
from bilevel_jax.distributed import fednest, per_agent
from bilevel_jax.distributed.fednest import rounds, sent_bytes
from bilevel_jax.testing import Quadratic, quadratic
from tests.checks import check_runs, check_same, follow
from tests.references import inner_terms, outer_terms
from tests.tables import distance, thinned

CLIENTS, ROWS = 6, 2
RATES = {"inner_rate": 0.2, "outer_rate": 0.1, "neumann_rate": 0.5}


@pytest.fixture(scope="module")
def q() -> Quadratic:
    sizes = {"inner_samples": CLIENTS * ROWS, "outer_samples": CLIENTS * ROWS}
    return quadratic(jax.random.key(0), inner_dim=5, outer_dim=3, condition=3.0, noise=0.1, dtype=jnp.float64, **sizes)


def split(q: Quadratic, clients: int = CLIENTS) -> Levels:
    """Two rows for each of six clients: their problems differ, and the mean of them is the quadratic."""
    return jax.tree.map(lambda leaf: leaf.reshape(clients, -1, *leaf.shape[1:]), q.data)


def draws(solver: Solver, data: Levels, updates: int, sampler: samplers.Sampler | None = None) -> list[Batch]:
    sampler = samplers.full() if sampler is None else sampler
    make = jax.jit(lambda t: sampler.batches(data, jax.random.key(1), t, solver.draws))
    return [make(t * solver.draws) for t in range(updates)]


# ---- what it reduces to -----------------------------------------------------------------------------------------------


@thinned("random_terms", [True, False], True, ids=["random", "sum"])
@thinned(
    ("clients", "steps", "turns"),
    [(1, 3, 2), (CLIENTS, 1, 4)],
    (CLIENTS, 1, 4),
    ids=["one client, three steps", "six clients, one step"],
)
def test_without_clients_or_local_steps_it_is_a_double_loop(q, clients, steps, turns, random_terms):
    """The library's own stages on all the rows: z by gradient steps, v by the series, x by one step.

    (With one client the local steps in x move d_x f only, so that they are compared where they are one.)
    """
    terms = 4
    solver = fednest(
        q.problem, **RATES, inner_rounds=turns, local_steps=steps, neumann_terms=terms, random_terms=random_terms, fresh=False
    )
    series = linear_solve.random_neumann if random_terms else linear_solve.neumann
    linear = series(terms=terms if random_terms else terms - 1, rate=RATES["neumann_rate"])
    central = sweep(
        descend(implicit(q.problem), Vars(inner=optax.sgd(RATES["inner_rate"])), steps=turns * steps, fresh=False),
        solve_aux(q.problem, linear, warm=False),
        descend(implicit(q.problem), Vars(outer=optax.sgd(RATES["outer_rate"]))),
    )
    assert solver.draws == central.draws == 3
    many = follow(solver, q.start, draws(solver, split(q, clients), 5))
    one = follow(central, q.start, draws(central, q.data, 5))
    count = 5 if steps == 1 else 1
    for state, expected in zip(many[:count], one[:count], strict=True):
        check_same(state.vars._replace(outer=None), expected.vars._replace(outer=None), tol=1e-13)
        if steps == 1:
            check_same(state.vars, expected.vars, tol=1e-13)
            assert int(state.stages[1].tally.calls.hessian_vector) == int(expected.stages[1].tally.calls.hessian_vector)
    assert distance(many[-1].vars.outer, q.start.outer) > 0.01


def test_clients_that_are_alike_are_one(q):
    solver = fednest(q.problem, **RATES, inner_rounds=2, local_steps=3, fresh=False)
    one, many = split(q, 1), jax.tree.map(lambda leaf: jnp.stack([leaf] * CLIENTS), q.data)
    for state, expected in zip(
        follow(solver, q.start, draws(solver, many, 5)), follow(solver, q.start, draws(solver, one, 5)), strict=True
    ):
        check_same(state.vars, expected.vars, tol=1e-13)


# ---- the algorithm of the paper, message by message ---------------------------------------------------------------------


class Wire:
    """Counts what goes between the server and its clients: every exchange is a message to each and an answer of each."""

    def __init__(self) -> None:
        self.rounds = self.bytes = 0

    def exchange(self, sent: list[np.ndarray], answers: list[np.ndarray]) -> np.ndarray:
        self.rounds += 1
        self.bytes += len(answers) * sum(part.nbytes for part in sent) + sum(answer.nbytes for answer in answers)
        return np.mean(answers, axis=0)


def reference(draw: Any, start: tuple, *, turns: int, steps: int, products: int, scale: float, corrected: bool, wire: Wire):
    """One update; ``draw(k)`` gives the matrices of draw k of every client, ``(g_i, f_i)``.  ``scale`` is N of the series, or
    None for the sum; the p of the paper is -v."""
    z, x = start
    beta, alpha, ell = RATES["inner_rate"], RATES["outer_rate"], RATES["neumann_rate"]
    zero = np.zeros_like(z)

    def slope(g, z):
        return inner_terms(g, z, zero, x)[0]

    for t in range(turns):
        at = [draw(t * steps + k)[0] for k in range(steps)]
        sent, q = [z, x] if t == 0 else [z], zero
        if corrected:
            q = wire.exchange(sent, [slope(g, z) for g in at[0]])
            sent = [q]
        ends = []
        for i in range(len(at[0])):
            here = z
            for g in at:
                way = slope(g[i], here)
                here = here - beta * (way - slope(g[i], z) + q if corrected else way)
            ends.append(here)
        z = wire.exchange(sent, ends)
    base = turns * steps
    p = total = wire.exchange([z], [outer_terms(f, z, x)[0] for f in draw(base)[1]])
    for n in range(products):
        p = wire.exchange([p], [p - ell * inner_terms(g, z, p, x)[1] for g in draw(base + 1 + n)[0]])
        total = total + p
    p = ell * (total if scale is None else scale * p)
    base += 1 + (products if scale is None else scale)
    gs, fs = draw(base)
    h = wire.exchange([p], [outer_terms(f, z, x)[1] - inner_terms(g, z, p, x)[2] for g, f in zip(gs, fs, strict=True)])
    ends = []
    for i in range(len(fs)):
        here = x
        for k in range(steps):
            f = draw(base + k)[1][i]
            here = here - alpha * (outer_terms(f, z, here)[1] - outer_terms(f, z, x)[1] + h)
        ends.append(here)
    return z, -p, wire.exchange([h], ends)


CASES = {
    "random": {"corrected": True, "random_terms": True},
    "sum": {"corrected": True, "random_terms": False},
    "sgd": {"corrected": False, "random_terms": True},
}


@thinned("case", CASES, "random")
def test_it_is_its_numpy_reference(q, case):
    """Every client on blocks of its own, fresh ones for every gradient and every product; and what it sends for that."""
    sizes = {"inner_rounds": 2, "local_steps": 3, "neumann_terms": 3}
    solver = fednest(q.problem, **RATES, **sizes, **CASES[case])
    data, random_terms, corrected = split(q), CASES[case]["random_terms"], CASES[case]["corrected"]
    batches, before, lengths = draws(solver, data, 12, per_agent(samplers.uniform(1))), 0, set()
    start, states = (np.asarray(q.start.inner), np.asarray(q.start.outer)), follow(solver, q.start, batches)
    for batch, state in zip(batches, states, strict=True):
        rows = [{name: np.asarray(leaf).mean(2) for name, leaf in part.items()} for part in (batch.inner, batch.outer)]

        def draw(k, rows=rows):
            return [[{name: leaf[k, i] for name, leaf in part.items()} for i in range(CLIENTS)] for part in rows]

        wire, after = Wire(), int(state.stages[1].tally.calls.hessian_vector)
        products, before = after - before, after
        lengths.add(products)
        z, v, x = reference(
            draw, start, turns=2, steps=3, products=products, scale=3 if random_terms else None, corrected=corrected, wire=wire
        )
        for got, expected in zip(state.vars, (z, v, x), strict=True):
            np.testing.assert_allclose(got, expected, atol=1e-12, rtol=1e-12)
        start = z, x
        assert wire.rounds == rounds(inner_rounds=2, products=products, corrected=corrected)
        assert wire.bytes == sent_bytes(state.vars, CLIENTS, inner_rounds=2, products=products, corrected=corrected)
    assert lengths == ({0, 1, 2} if random_terms else {2}), "a length does not occur: choose another seed"
    assert solver.draws == 2 * 3 + 1 + (3 if random_terms else 2) + 3
    assert int(spent(solver, states[-1]).hessian_vector) == before
    assert distance(states[-1].vars.outer, q.start.outer) > 0.01


# ---- where it ends ----------------------------------------------------------------------------------------------------


def end(q: Quadratic, solver: Solver, updates: int = 400) -> Any:
    go = jax.jit(partial(run, solver, samplers.full(), steps=updates))
    return go(q.start, split(q), jax.random.key(0))[0].state


def steady(q: Quadratic, **changed: Any) -> Solver:
    sizes = {"inner_rounds": 5, "local_steps": 5, "neumann_terms": 60, "random_terms": False, "fresh": False}
    return fednest(q.problem, **{**RATES, **sizes, **changed})


def test_it_ends_where_the_hypergradient_is_zero(q):
    """Clients that differ, five local steps: the solution of the mean, to the bias of the series, (1 - rate / 3)^60."""
    state = end(q, steady(q))
    assert float(jnp.linalg.norm(q.gradient(q.start.outer))) > 0.1
    assert float(jnp.linalg.norm(q.gradient(state.vars.outer))) < 1e-4
    assert distance(state.vars.inner, q.at(state.vars.outer).inner) < 1e-9
    assert int(worst(state)) == Result.SUCCESSFUL


@pytest.mark.more
def test_without_the_correction_the_clients_drift(q):
    """Local steps keep the solution with the correction of FedInn, and leave it without."""
    kept, left, single = (
        end(q, steady(q, **changed)).vars for changed in ({}, {"corrected": False}, {"corrected": False, "local_steps": 1})
    )
    off = [float(jnp.linalg.norm(vars.inner - q.solution.inner)) for vars in (kept, left, single)]
    assert off[0] < 1e-4
    assert off[2] < 1e-4
    assert off[1] > 1e-2
    assert float(jnp.linalg.norm(q.gradient(left.outer))) > 100 * float(jnp.linalg.norm(q.gradient(kept.outer)))


def test_the_correction_in_x_keeps_the_solution(q):
    """A start at (z*, x*) on all the data stays there, whatever the number of local steps, but for the bias of the series."""
    solver = steady(q, neumann_terms=200)
    (batch,) = draws(solver, split(q), 1)
    state = follow(solver, q.solution, [batch])[-1]
    assert distance(state.vars, q.solution) < 1e-12


# ---- transformations --------------------------------------------------------------------------------------------------


@pytest.mark.more
def test_runs_are_jitted_mapped_and_resumed(q):
    solver = fednest(q.problem, **RATES, inner_rounds=2, local_steps=2, neumann_terms=3)
    sampler, data = per_agent(samplers.uniform(1)), split(q)
    by_hand = follow(solver, q.start, draws(solver, data, 4, sampler))[-1]
    check_runs(solver, sampler, q.start, data, 4, by_hand)


@pytest.mark.more
def test_rates_may_be_traced_and_scheduled(q):
    make = partial(fednest, q.problem, local_steps=2, neumann_terms=3, fresh=False)
    batches = draws(make(**RATES), split(q), 2)

    @jax.jit
    def go(rates):
        solver = make(**rates)
        state = solver.init(q.start, batches[0])
        for batch in batches:
            state = solver.update(state, batch)
        return state.vars

    constant = go(jax.tree.map(jnp.float64, RATES))
    check_same(constant, follow(make(**RATES), q.start, batches)[-1].vars, tol=1e-14)
    schedules = {name: lambda t, rate=rate: rate / (t + 1.0) for name, rate in RATES.items()}
    halved = {name: rate / 2 for name, rate in RATES.items()}
    middle = follow(make(**RATES), q.start, batches[:1])[-1].vars
    expected = follow(make(**halved), middle, batches[1:])[-1].vars
    check_same(follow(make(**schedules), q.start, batches)[-1].vars, expected, tol=1e-14)


def test_ragged_blocks_and_dtypes(q):
    """Weights go with the rows of a client; a float32 problem stays so."""
    data = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), split(q, 4))  # of three rows
    start = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), q.start)
    solver = fednest(q.problem, **RATES, inner_rounds=1, local_steps=1, neumann_terms=1)
    (batch,) = draws(solver, data, 1, per_agent(samplers.uniform(2)))
    assert batch.weight.inner.shape == (solver.draws, 4, 2)
    state = follow(solver, start, [batch])[-1]
    assert {leaf.dtype for leaf in state.vars} == {np.dtype(np.float32)}
    rows = np.einsum("cr,crd->d", np.asarray(batch.weight.inner[0]), np.asarray(batch.inner["b"][0])) / 4
    mean = np.einsum("cr,crdp->dp", np.asarray(batch.weight.inner[0]), np.asarray(batch.inner["C"][0])) / 4
    np.testing.assert_allclose(state.vars.inner, -0.2 * (rows + np.ones(3) @ mean), rtol=1e-5, atol=1e-6)


# ---- what is counted, what is refused ---------------------------------------------------------------------------------

DIM_Z, DIM_X = 7, 11


def products(jaxpr: Any, times: float = 1.0) -> Counter:
    """How often a client forms a product with each of its matrices: scans multiply, and clients count as one.

    Keys are (level, "A" or "B", forward or transposed); ``B x`` is formed for every gradient and nothing else, ``A'`` for
    inner gradients and Hessian-vector products, ``B'`` of the inner level for cross products.
    """
    found = Counter()
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "dot_general":
            contracted, batched = eqn.params["dimension_numbers"]
            for side in (0, 1):
                shape = eqn.invars[side].aval.shape
                if len(shape) == 3 and shape[0] == CLIENTS and shape[2] in (DIM_Z, DIM_X):
                    used = [shape[d] for d in (*contracted[side], *batched[side])]
                    way = "forward" if tuple(contracted[side]) == (2,) else "transposed"
                    key = ("inner" if shape[1] == 3 else "outer", "A" if shape[2] == DIM_Z else "B", way)
                    found[key] += times * eqn.invars[1 - side].aval.size / np.prod(used)
        length = eqn.params["length"] if eqn.primitive.name == "scan" else 1
        for inner in jax.tree.leaves(tuple(eqn.params.values()), is_leaf=lambda p: hasattr(p, "eqns") or hasattr(p, "jaxpr")):
            body = getattr(inner, "jaxpr", inner)
            if hasattr(body, "eqns"):
                found += products(body, times * length)
    return found


@thinned("corrected", [True, False], True)
@thinned("steps", [1, 4], 4)
def test_declared_cost_is_that_of_the_program(steps, corrected):
    def loss(z, x, rows):
        a, b, y = rows
        return 0.5 * (a @ z + b @ x - y) ** 2

    def rows(n):
        return tuple(jnp.ones((CLIENTS, n, *rest)) for rest in ((DIM_Z,), (DIM_X,), ()))

    sizes = {"inner_rounds": 3, "local_steps": steps, "neumann_terms": 6, "random_terms": False, "corrected": corrected}
    solver, data = fednest(Problem(loss, loss), **RATES, **sizes), Levels(rows(3), rows(5))
    batches = samplers.full().batches(data, jax.random.key(0), 0, solver.draws)
    state = jax.eval_shape(solver.init, Vars(jnp.ones(DIM_Z), None, jnp.ones(DIM_X)), batches)
    jaxpr = jax.make_jaxpr(solver.update)(state, batches).jaxpr
    found = products(partial_eval.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))[0])
    gradients = found["inner", "B", "forward"]
    outer = found["outer", "B", "transposed"]
    counted = gradients, found["inner", "A", "transposed"] - gradients, found["inner", "B", "transposed"], outer
    # of the outer pairs, the right-hand side's d_x f is not used
    assert counted == (3 * (2 * steps - 1 if corrected else steps), 5, 1, 2 * steps - 1)
    assert tuple(solver.cost.draw) == (*counted[:3], counted[3] + 1)


def test_cost_and_rounds():
    problem = Problem(lambda z, x, a: ((z - x) ** 2).sum(), lambda z, x, b: (z**2).sum())
    solver = fednest(problem, **RATES, inner_rounds=2, local_steps=3, neumann_terms=5)
    assert tuple(solver.cost.draw) == (10.0, 2.0, 1.0, 6.0)
    assert rounds(inner_rounds=2, products=4) == 2 * 2 + 4 + 3
    assert rounds(inner_rounds=2, products=4, corrected=False) == 2 + 4 + 3


@thinned("level", Levels._fields, "inner")
def test_a_client_that_breaks_is_seen(q, level):
    """NaN in the data of one of six clients: a code, and under the guard the last finite state."""
    solver = steady(q)
    (good,) = draws(solver, split(q), 1)
    name = {"inner": "A", "outer": "e"}[level]
    part = getattr(good, level)
    bad = good._replace(**{level: {**part, name: part[name].at[:, 3].set(jnp.nan)}})
    assert int(worst(follow(solver, q.start, [bad])[-1])) == Result.NONFINITE
    state, after = follow(guard(solver), q.start, [good, bad])
    assert int(worst(after)) == Result.NONFINITE
    check_same(after.vars, state.vars)
    assert all(bool(jnp.isfinite(leaf).all()) for leaf in after.vars)


def test_a_series_that_diverges_is_told(q):
    state = end(q, steady(q, neumann_rate=5.0, outer_rate=1e-30), updates=1)
    assert int(worst(state)) == Result.DIVERGED


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"inner_rounds": 0}, ValueError, "inner_rounds: got 0"),
        ({"local_steps": 1.5}, TypeError, "local_steps: got 1.5"),
        ({"neumann_terms": 0}, ValueError, "neumann_terms: got 0"),
        ({"inner_rate": -1.0}, ValueError, "inner_rate: got -1.0"),
        ({"outer_rate": "fast"}, TypeError, "outer_rate: got 'fast'"),
        ({"neumann_rate": jnp.inf}, ValueError, "neumann_rate: got inf"),
    ],
)
def test_bad_arguments_are_refused(q, changed, error, message):
    with pytest.raises(error, match=message):
        fednest(q.problem, **{**RATES, **changed})


def test_bad_data_are_refused(q):
    solver = fednest(q.problem, **RATES)
    data = split(q)
    (batch,) = draws(solver, data, 1)
    with pytest.raises(TypeError, match="problem: got Quadratic"):
        fednest(q, **RATES)
    with pytest.raises(ValueError, match="expected one number of clients"):
        solver.init(q.start, batch._replace(outer=jax.tree.map(lambda leaf: leaf[:, :3], batch.outer)))
    with pytest.raises(ValueError, match=r"batches\.outer: got None"):
        solver.init(q.start, batch._replace(outer=None))
    with pytest.raises(ValueError, match="key: got None"):
        solver.init(q.start, batch._replace(key=None))
    with pytest.raises(ValueError, match="the number of draws of the solver"):
        solver.init(q.start, jax.tree.map(lambda leaf: leaf[:2], batch._replace(full=None)))
