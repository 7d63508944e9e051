"""The programs that are compiled: no table is ever copied, and a refresh stays a branch."""

import inspect
from itertools import product
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax

from bilevel_jax import (
    BilevelState,
    Levels,
    Problem,
    Vars,
    begin,
    descend,
    guard,
    implicit,
    resume,
    run,
    samplers,
    solvers,
    sweep,
)
from bilevel_jax.estimators import saga, total
from bilevel_jax.types import Batch, Estimator, Solver, Table, Terms
from tests.checks import check_no_copies, optimised, table_copies
from tests.tables import SOLVERS, STEPS, build, thinned, tiny, tiny_sampler, tiny_start

OPTS = Vars(*map(optax.sgd, STEPS))
SLOTS = (37, 41)  # unmistakable numbers of blocks
LANES = 3


#: Sizes of z and x: rows that the library may keep together, and rows too long for that.
SIZES = {"short rows": (53, 59), "long rows": (4099, 59)}


def setting(size: str) -> tuple[Problem, samplers.Sampler, Vars, Levels]:
    """A separable problem with every term, and blocks of two rows."""
    p, d = SIZES[size]

    def inner(z, x, a):
        return 0.5 * ((z[None] - a) ** 2).sum(1) + 0.1 * jnp.sin(x.sum() * z.sum()) + 0.05 * (z**2).sum()

    def outer(z, x, b):
        return 0.5 * ((z[None] - b) ** 2).sum(1) + 0.5 * (x**2).sum() * (1 + b[:, 0] ** 2)

    rng = np.random.default_rng(0)
    data = Levels(*(jnp.asarray(rng.normal(size=(2 * slots, p))) for slots in SLOTS))
    return Problem(inner, outer), samplers.uniform(2), Vars(jnp.zeros(p), None, jnp.ones(d)), data


def shapes_of_tables(state: Any, lanes: int = 0) -> set[tuple[int, ...]]:
    """The shapes of the tables of a state, of one lane."""
    nodes = jax.tree.leaves(state, is_leaf=lambda node: isinstance(node, Table))
    rows = jax.tree.leaves([node for node in nodes if isinstance(node, Table)])
    return {leaf.shape[1:] if lanes else leaf.shape for leaf in rows}


def scan_text(solver: Solver, size: str, lanes: int = 0) -> tuple[str, set[tuple[int, ...]]]:
    """The optimised program of a donated `resume`, possibly of many seeds, and the shapes of its tables."""
    _, sampler, start, data = setting(size)

    def first(key):
        return begin(solver, sampler, start, data, key)

    def go(carry):
        return resume(solver, sampler, carry, data, steps=6, every=3, metrics=lambda v, _: {"x": v.outer.sum()})

    key = jax.random.key(0)
    carry = jax.eval_shape(jax.vmap(first), jax.random.split(key, lanes)) if lanes else jax.eval_shape(first, key)
    return optimised(jax.jit(jax.vmap(go) if lanes else go, donate_argnums=0), carry), shapes_of_tables(carry, lanes)


def host_text(solver: Solver, size: str) -> tuple[str, set[tuple[int, ...]]]:
    """The optimised program of one donated update of a host loop."""
    _, sampler, start, data = setting(size)
    batches = jax.eval_shape(lambda: sampler.batches(data, jax.random.key(0), 0, solver.draws))
    state = jax.eval_shape(solver.init, start, batches)
    return optimised(jax.jit(solver.update, donate_argnums=0), state, batches), shapes_of_tables(state)


@thinned(
    ("how", "size"),
    list(product(("scan", "host loop", "seeds", "guard"), ("short rows", "long rows"))),
    ("host loop", "short rows"),
    ("guard", "long rows"),  # harder than the scan without a guard
)
def test_saba_copies_no_table(how, size):
    solver = solvers.saba(setting(size)[0], OPTS)
    if how == "host loop":
        text, shapes = host_text(solver, size)
    else:
        text, shapes = scan_text(guard(solver) if how == "guard" else solver, size, LANES if how == "seeds" else 0)
    assert {shape[0] for shape in shapes} == set(SLOTS)
    check_no_copies(text, *shapes)


def test_stages_with_inner_steps_copy_no_table():
    """Three tables of stages of their own, written several times a sweep, guarded."""
    directions = implicit(setting("short rows")[0])
    solver = sweep(
        descend(directions, Vars(inner=OPTS.inner), steps=3, estimator=saga()),
        descend(directions, Vars(aux=OPTS.aux), steps=2, fresh=False, estimator=saga()),
        descend(directions, Vars(outer=OPTS.outer), estimator=saga()),
    )
    text, shapes = scan_text(guard(solver), "short rows")
    check_no_copies(text, *shapes)


def naive_saga() -> Estimator:
    """SAGA as one writes it down first: read the row, then write it, in one step."""

    def init(oracle: Any, vars: Vars, batch: Batch) -> Any:
        zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), jax.eval_shape(oracle, vars, batch))
        assert batch.slot is not None
        counts = [slot.count for slot in batch.slot]
        rows = [jax.tree.map(lambda z, n=n: jnp.zeros((n, *z.shape)), part) for part, n in zip(zeros, counts, strict=True)]
        return Table(Terms(*rows)), zeros

    def update(oracle: Any, vars: Vars, batch: Batch, count: Any, state: Any) -> Any:
        del count
        (table,), means, new = state[0], state[1], oracle(vars, batch)
        parts, rows, averages = [], [], []
        for part, tab, mean, slot in zip(new, table, means, batch.slot or (), strict=True):
            i = slot.index
            change = jax.tree.map(lambda n, t, i=i: n - lax.dynamic_index_in_dim(t, i, 0, keepdims=False), part, tab)
            parts.append(jax.tree.map(jnp.add, change, mean))
            averages.append(jax.tree.map(lambda m, c, slot=slot: m + c / slot.count, mean, change))
            rows.append(jax.tree.map(lambda t, n, i=i: lax.dynamic_update_index_in_dim(t, n, i, 0), tab, part))
        return total(Terms(*parts)), (Table(Terms(*rows)), Terms(*averages))

    return Estimator(init, update)


def naive_guard(solver: Solver) -> Solver:
    """A guard that selects over the whole state."""

    def update(state: BilevelState, batches: Batch) -> BilevelState:
        new = solver.update(state, batches)
        fine = jnp.isfinite(new.vars.outer).all()
        return jax.tree.map(lambda n, o: jnp.where(fine, n, o), new, state)

    return solver._replace(update=update)


def test_the_check_finds_copies_where_they_are():
    """A naive SAGA in a scan, and a naive guard around a good one."""
    naive = sweep(descend(implicit(setting("long rows")[0]), OPTS, estimator=naive_saga()))
    text, shapes = scan_text(naive, "long rows")
    assert any(table_copies(text, *shape) for shape in shapes)
    with pytest.raises(AssertionError, match="copies of a table"):
        check_no_copies(text, *shapes)

    text, shapes = scan_text(naive_guard(solvers.saba(setting("short rows")[0], OPTS)), "short rows")
    with pytest.raises(AssertionError, match="copies of a table"):
        check_no_copies(text, *shapes)
    with pytest.raises(AssertionError, match="no table"):
        check_no_copies(text, (1234, 5))


@pytest.mark.more
def test_naive_saga_is_saga():
    """So that the copies above are the price of the layout, not of another method."""
    problem, sampler, start, data = setting("short rows")
    ends, batches = [], []
    for estimator in (naive_saga(), saga()):
        solver = sweep(descend(implicit(problem), OPTS, estimator=estimator))
        update, make = jax.jit(solver.update), jax.jit(lambda t: sampler.batches(data, jax.random.key(0), t, 1))
        batches = [make(jnp.int32(t)) for t in range(60)] if not ends else batches
        state = solver.init(start, batches[0])
        for batch in batches:
            state = update(state, batch)
        ends.append(state.vars)
    for a, b in zip(*ends, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-12)


def primitives(jaxpr: Any) -> list[str]:
    """The names of all primitives of a jaxpr, at any depth."""
    names = []
    for eqn in jaxpr.eqns:
        names.append(eqn.primitive.name)
        for inner in jax.tree.leaves(tuple(eqn.params.values()), is_leaf=lambda p: hasattr(p, "eqns") or hasattr(p, "jaxpr")):
            body = getattr(inner, "jaxpr", inner)
            names += primitives(body) if hasattr(body, "eqns") else []
    return names


#: In the program of one run, and of several.
BRANCHES = {"srba": (1, 1), "vrbo": (1, 1), "spaba": (1, 0), "sustain": (2, 0)}
BRANCHES |= dict.fromkeys(("aid_bio", "ba", "hoag", "bsa", "ttsa"), (1, 0))


@thinned(
    ("name", "guarded"),
    [*((name, False) for name in SOLVERS), ("srba", True)],
    ("saba", False),
    ("hoag", False),
    ("vrbo", False),
    ("srba", False),
    ("srba", True),
)
def test_branches_under_vmap(name, guarded):
    """Refreshes stay branches under vmap over keys; SPABA's coins, lengths of products and checks of conjugate gradients
    differ from lane to lane, so they cannot."""
    q, solver = tiny(), build(name, tiny().problem)
    solver = guard(solver) if guarded else solver

    def go(key):
        return run(solver, tiny_sampler(), tiny_start(name), q.data, key, steps=2)

    alone = primitives(jax.make_jaxpr(go)(jax.random.key(0)).jaxpr).count("cond")
    lanes = primitives(jax.make_jaxpr(jax.vmap(go))(jax.random.split(jax.random.key(0), LANES)).jaxpr).count("cond")
    assert (alone, lanes) == BRANCHES.get(name, (0, 0))


def test_what_spaba_costs_under_vmap_is_documented():
    text = inspect.getdoc(solvers.spaba) or ""
    assert "jax.vmap" in text
    assert "jax.lax.map" in text
