"""What holds for every solver: transformations, dtypes, trees, resuming, donation, optimisers, and the declared cost."""

from collections import Counter
from collections.abc import Callable
from functools import cache, partial
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
    begin,
    descend,
    guard,
    implicit,
    projections,
    resume,
    run,
    samplers,
    sweep,
)
from bilevel_jax import stream as stream_run
from bilevel_jax.estimators import flush, saga, storm, total
from bilevel_jax.samplers import take_draw
from bilevel_jax.types import Slot, Terms
from tests.checks import ZERO, check_same, walk
from tests.tables import (
    FIRST_ORDER,
    NODES,
    PERIOD,
    PROBABILITY,
    SOLVERS,
    STEPS,
    aux_like,
    build,
    distance,
    donated_update,
    every_kind,
    kinds,
    stream,
    thinned,
    tiny,
    tiny_sampler,
    tiny_start,
)

# ---- a light problem on trees: z = {"a": [2], "b": {"c": [3]}}, x = [[], [3]] -----------------------------------------

#: name -> dtypes of z and v, of x, of the data.
DTYPES = {
    "float32": (jnp.float32,) * 3,
    "float64": (jnp.float64,) * 3,
    "bfloat16": (jnp.bfloat16,) * 3,
    "mixed": (jnp.float32, jnp.float64, jnp.bfloat16),
}


def widest(*arrays: jax.Array) -> Any:
    return max((a.dtype for a in arrays), key=lambda dtype: dtype.itemsize)


def light() -> Problem:
    """Separable and strongly convex, on trees, in any dtypes."""

    def inner(z, x, a):
        wide = widest(z["a"], x[0], a)
        a, s, t = a.astype(wide), x[0].astype(wide), x[1].astype(wide)
        first, second = z["a"].astype(wide), z["b"]["c"].astype(wide)
        return 0.5 * a * (first @ first) + s * first.sum() + 0.5 * ((second[None] - a[:, None] * t[None]) ** 2).sum(1)

    def outer(z, x, b):
        wide = widest(z["a"], x[0], b)
        fit = (z["b"]["c"].sum().astype(wide) + z["a"].sum().astype(wide) - b.astype(wide)) ** 2
        return 0.5 * fit + 0.5 * (x[0].astype(wide) ** 2 + (x[1].astype(wide) ** 2).sum())

    return Problem(inner, outer)


def light_start(dtypes: Any = DTYPES["float64"]) -> Vars:
    z, x, _ = dtypes
    inner = {"a": np.ones(2), "b": {"c": np.full(3, 0.5)}}
    return Vars(
        jax.tree.map(lambda leaf: jnp.asarray(leaf, z), inner), None, [jnp.asarray(0.5, x), jnp.asarray([1.0, 2.0, 3.0], x)]
    )


def light_data(dtypes: Any = DTYPES["float64"], shift: float = 0.0) -> Levels:
    rows = 1.0 + shift + 0.25 * np.cos(np.arange(7))
    return Levels(jnp.asarray(rows, dtypes[2]), jnp.asarray(rows[:5], dtypes[2]))


def light_sampler() -> samplers.Sampler:
    return samplers.uniform(3, outer_batch_size=2)


@cache
def light_batches(draws: int) -> list[Batch]:
    draw = jax.jit(lambda t: light_sampler().batches(light_data(), jax.random.key(6), t, draws))
    return [draw(jnp.int32(t * draws)) for t in range(4)]


def first_norm(vars: Vars, data: Levels) -> dict[str, jax.Array]:
    del data
    return {"norm": jnp.sqrt((vars.inner["a"] ** 2).sum()), "x": vars.outer[0]}


# ---- transformations, on the problem of scalars -----------------------------------------------------------------------


def distance_to_solution(vars: Vars, data: Levels) -> dict[str, jax.Array]:
    del data
    return {"x": jnp.abs(vars.outer - tiny().solution.outer), "z": vars.inner}


class Traced:
    """A compiled function that counts how often it was traced."""

    def __init__(self, function: Any, **options: Any):
        self.count = 0

        def counted(*args: Any) -> Any:
            self.count += 1
            return function(*args)

        self.call = jax.jit(counted, **options)


@cache
def compiled_run(name: str) -> Traced:
    """``(rates, key, data) -> run`` of 8 updates, with 2 evaluations: the solver is built inside."""

    def whole(rates: Vars, key: jax.Array, data: Levels) -> Any:
        solver = build(name, tiny().problem, rates)
        return run(solver, tiny_sampler(), tiny_start(name), data, key, steps=8, every=4, metrics=distance_to_solution)

    return Traced(whole)


def rates(scale: float = 1.0) -> Vars:
    return Vars(*(jnp.asarray(np.float64(scale * step)) for step in STEPS))


@every_kind
def test_jit_is_eager(name):
    """Two updates, so that SRBA takes one of either kind."""
    solver, update = build(name, tiny().problem), donated_update(name)
    batches = stream(solver.draws)[:2]
    state = solver.init(tiny_start(name), batches[0])
    for eager, batch in zip(walk(solver, tiny_start(name), batches), batches, strict=True):
        state = update(state, batch)
        check_same(state.vars, eager, tol=1e-13)


@every_kind
def test_vmap_over_keys_and_rates_is_a_loop(name):
    keys = jax.random.split(jax.random.key(4), 3)
    lanes = Vars(*(jnp.stack([r, 0.5 * r, 0.25 * r]) for r in rates()))
    together = jax.jit(jax.vmap(lambda r, k: compiled_run(name).call(r, k, tiny().data)))(lanes, keys)
    for lane, key in enumerate(keys):
        alone = compiled_run(name).call(rates(0.5**lane), key, tiny().data)
        check_same(jax.tree.map(lambda leaf, lane=lane: leaf[lane], together), alone, tol=1e-12)
    assert distance(together[0].state.vars.outer[0], together[0].state.vars.outer[1]) > 1e-3


@every_kind
def test_new_keys_rates_and_data_do_not_recompile(name):
    traced = compiled_run(name)
    _, first = traced.call(rates(), jax.random.key(0), tiny().data)
    _, second = traced.call(rates(0.5), jax.random.key(1), jax.tree.map(lambda leaf: 0.5 + leaf, tiny().data))
    assert traced.count == 1
    assert first["step"].tolist() == [0, 4, 8]
    assert distance(first["x"][0], second["x"][0]) == 0
    assert distance(first["x"][1], second["x"][1]) > 1e-4


@every_kind
def test_a_bad_sample_is_reported(name):
    """NaN in one row, which no check sees as the data are traced: whatever a solver makes of it, the run says so."""
    (a, b), outer = tiny().data
    (carry, _), (clean, _) = (
        compiled_run(name).call(rates(), jax.random.key(4), Levels((rows, b), outer)) for rows in (a.at[4].set(jnp.nan), a)
    )
    assert int(carry.result) == Result.NONFINITE
    assert int(clean.result) <= Result.MAX_STEPS_REACHED
    assert all(bool(jnp.isfinite(leaf).all()) for leaf in carry.finite)


@every_kind
@pytest.mark.parametrize("guarded", [False, True])
def test_state_is_stable_under_scan(name, guarded):
    """Structure, shapes, dtypes and weak types of what update returns are those that it was given."""
    q, solver = tiny(), build(name, tiny().problem)
    solver = guard(solver) if guarded else solver
    check_stable(solver, tiny_start(name), lambda: tiny_sampler().batches(q.data, jax.random.key(0), 0, solver.draws))


def check_stable(solver: Solver, start: Vars, make: Callable[[], Batch]) -> None:
    def both() -> Any:
        batches = make()
        state = solver.init(start, batches)
        return state, solver.update(state, batches)

    state, after = jax.eval_shape(both)
    assert jax.tree.structure(after) == jax.tree.structure(state)
    assert jax.tree.map(kind, after) == jax.tree.map(kind, state)


def kind(leaf: Any) -> str:
    return f"{leaf.dtype}{leaf.shape}{'weak' if leaf.weak_type else ''}"


def test_weakly_typed_variables_do_not_trace_twice():
    """Scalars as jnp.asarray(1.0) makes them are weakly typed; an update must not make them strong behind one's back."""
    problem = Problem(lambda z, x, a: 0.5 * (z - x) ** 2 + 0.0 * a, lambda z, x, b: 0.5 * (z - b) ** 2)
    solver = build("soba", problem)
    batch = Batch(inner=jnp.zeros((1, 2)), outer=jnp.ones((1, 2)))
    update = Traced(solver.update)
    state = solver.init(Vars(jnp.asarray(1.0), None, jnp.asarray(2.0)), batch)
    for _ in range(3):
        state = update.call(state, batch)
    assert update.count == 1


def test_number_of_draws_is_that_of_the_stages():
    problem, opt = light(), optax.sgd(0.1)
    directions = implicit(problem)
    stages = [
        descend(directions, Vars(inner=opt), steps=3),
        descend(directions, Vars(aux=opt), steps=2, fresh=False),
        descend(directions, Vars(outer=opt)),
    ]
    assert [stage.draws for stage in stages] == [3, 1, 1]
    assert sweep(*stages).draws == 5


# ---- dtypes and trees -------------------------------------------------------------------------------------------------


@every_kind
@thinned("dtypes", ["float32", "bfloat16", "mixed"], "mixed")
def test_dtypes_and_trees_are_kept(name, dtypes):
    """Of every variable, and of the state of a run on trees; nothing is promoted on the way."""
    start, data, solver = light_start(DTYPES[dtypes]), light_data(DTYPES[dtypes]), build(name, light())
    carry, history = jax.eval_shape(
        lambda key: run(solver, light_sampler(), start, data, key, steps=4, every=2, metrics=first_norm), jax.random.key(0)
    )
    expected = jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), start._replace(aux=aux_like(name, start.inner)))
    for vars in (carry.state.vars, carry.finite):
        assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), vars) == expected
    assert history["norm"].dtype == start.inner["a"].dtype
    assert history["x"].dtype == start.outer[0].dtype


@cache
def light_end(dtypes: str) -> Vars:
    """Where SABA ends on trees, with tables in the dtypes of the variables, as float64."""
    start, data, solver = light_start(DTYPES[dtypes]), light_data(DTYPES[dtypes]), build("saba", light())
    go = jax.jit(lambda key: run(solver, light_sampler(), start, data, key, steps=20))
    return jax.tree.map(lambda leaf: leaf.astype(jnp.float64), go(jax.random.key(0))[0].state.vars)


@thinned(("dtypes", "tol"), [("bfloat16", 0.3), ("mixed", 0.05)], ("bfloat16", 0.3))
def test_low_precision_runs_near_the_high_one(dtypes, tol):
    assert distance(light_end(dtypes), light_end("float64")) < tol
    assert distance(light_end("float64").outer, light_start().outer) > 0.4


@kinds("pzobo")  # its directions are drawn leaf by leaf, so that those of a vector are others
def test_trees_move_as_the_vector_does(name):
    """A problem on nested dictionaries and lists, against the same one on vectors."""

    def inner(z, x, a):
        return 0.5 * a * (z @ z) + jnp.tile(x, 2) @ z + 0.1 * a**2 * z[0]

    def outer(z, x, b):
        return 0.5 * b * (z.sum() - 1) ** 2 + 0.5 * (x @ x)

    def cut(z, x):
        return {"a": z[:1], "b": {"c": z[1:]}}, [x[0], x[1:]]

    def join(z, x):
        return jnp.concatenate([z["a"], z["b"]["c"]], axis=-1), jnp.concatenate([x[0][None], x[1]])

    flat = Problem(inner, outer)
    nested = Problem(*(lambda z, x, s, loss=loss: loss(*join(z, x), s) for loss in flat))
    z, x = jnp.arange(1.0, 5.0), jnp.array([0.5, 2.0])
    both = []
    for problem, (z0, x0) in ((flat, (z, x)), (nested, cut(z, x))):
        solver = build(name, problem)
        update, batches = jax.jit(solver.update), light_batches(solver.draws)
        state = solver.init(Vars(z0, None, x0), batches[0])
        for batch in batches:
            state = update(state, batch)
        both.append(state.vars)
    (z1, x1), (v1, _) = join(both[1].inner, both[1].outer), join(both[1].aux, both[1].outer)
    check_same(Vars(z1, v1, x1), both[0], tol=1e-13)
    assert distance(both[0].outer, x) > 1e-2


def test_estimates_are_kept_in_float32_at_least():
    """A running mean, or a sum of differences, in bfloat16 drifts: after 200 updates it is still that of the table."""
    directions, estimator = jnp.asarray(1 + 0.37 * np.cos(np.arange(5)), jnp.bfloat16), saga()

    def oracle(vars: Vars, batch: Batch) -> Terms:
        return Terms(inner=Vars(inner=directions[batch.inner] + vars.inner))

    def step(state: Any, turn: tuple[jax.Array, jax.Array]) -> tuple[Any, jax.Array]:
        i, z = turn
        batch = Batch(inner=i, slot=Levels(Slot(i, 5), None))
        way, state = estimator.update(oracle, Vars(inner=z), batch, ZERO, state)
        return state, way.inner

    rng = np.random.default_rng(0)
    turns = jnp.asarray(rng.integers(0, 5, 200), jnp.int32), jnp.asarray(rng.normal(size=200), jnp.bfloat16)
    start = estimator.init(oracle, Vars(inner=turns[1][0]), Batch(inner=turns[0][0], slot=Levels(Slot(turns[0][0], 5), None)))
    state, ways = jax.jit(partial(jax.lax.scan, step))(start, turns)
    (table,), (mean,) = (jax.tree.leaves(part) for part in (flush(state).table, state.mean))
    assert (table.dtype, mean.dtype, ways.dtype) == (jnp.bfloat16, jnp.float32, jnp.bfloat16)
    assert abs(float(mean) - float(table.astype(jnp.float32).mean())) < 1e-5


# ---- resuming, donation, streaming ------------------------------------------------------------------------------------


def through_numpy(tree: Any) -> Any:
    """A tree saved as NumPy arrays and read back, keys as their data."""

    def save(leaf):
        return np.asarray(jax.random.key_data(leaf) if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf).copy()

    def load(leaf, like):
        return jax.random.wrap_key_data(leaf) if jnp.issubdtype(like.dtype, jax.dtypes.prng_key) else jnp.asarray(leaf)

    return jax.tree.map(load, jax.tree.map(save, tree), tree)


@every_kind
def test_resumed_is_uninterrupted_bit_for_bit(name):
    """8 updates in one run, and as 4 and 4 with the carry saved through NumPy in between."""
    key, data, solver = jax.random.key(6), tiny().data, build(name, tiny().problem, rates())
    whole, history = compiled_run(name).call(rates(), key, data)
    half = jax.jit(lambda c: resume(solver, tiny_sampler(), c, data, steps=4, metrics=distance_to_solution))
    carry, rows = begin(solver, tiny_sampler(), tiny_start(name), data, key), []
    for _ in range(2):
        carry, row = half(through_numpy(carry))
        rows.append(row)
    check_same(carry, whole)
    check_same(jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *rows), jax.tree.map(lambda leaf: leaf[1:], history))
    assert int(carry.state.step) == 8


@every_kind
def test_state_may_be_donated_and_the_start_survives(name):
    """Twice: the second time from the start that the caller still owns."""
    start, solver, update = tiny_start(name), build(name, tiny().problem), donated_update(name)
    before, first = jax.tree.map(np.array, start), stream(solver.draws)[0]
    states = []
    for _ in range(2):
        state = solver.init(start, first)
        for batch in stream(solver.draws)[:3]:
            old = state
            state = update(state, batch)
            assert old.vars.outer.is_deleted()  # x is read by every update, z and aux are not
        states.append(state)
        check_same(jax.tree.map(jnp.asarray, before), start)
    check_same(*states)


def test_carry_may_be_donated_and_what_the_caller_owns_survives():
    q, solver, key = tiny(), build("saba", tiny().problem), jax.random.key(6)
    go = jax.jit(lambda c: resume(solver, tiny_sampler(), c, q.data, steps=2)[0], donate_argnums=0)
    ends = []
    for _ in range(2):
        carry = begin(solver, tiny_sampler(), q.start, q.data, key)
        old, carry = carry, go(go(carry))
        assert old.state.vars.inner.is_deleted()
        ends.append(carry)
    check_same(*ends)
    assert not key.is_deleted()
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(q.start))


@every_kind
def test_no_two_leaves_of_a_state_share_a_buffer(name):
    q, solver = tiny(), build(name, tiny().problem)
    shared = q.start._replace(aux=aux_like(name, q.start.inner))  # one buffer in two variables
    state = solver.init(shared, stream(solver.draws)[0])
    places = [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(state) if leaf.size]
    assert len(set(places)) == len(places)
    assert not {leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(shared)} & set(places)


def test_init_only_needs_shapes():
    solver = build("saba", tiny().problem)
    batches = stream(1)[0]
    shapes = jax.eval_shape(lambda b: b, batches)
    check_same(solver.init(tiny().start, shapes), solver.init(tiny().start, batches))


@thinned("name", ["saba", "fsla", "vrbo", "ttsa"], "saba", "vrbo")
def test_stream_is_run(name):
    """A host loop over the batches that a run would draw gives its iterates; a state goes on where it was left.

    Of several draws an update, a run gathers each when it is taken, and a stream has them stacked."""
    q, solver = tiny(), build(name, tiny().problem)
    batches = stream(solver.draws)
    whole, history = compiled_run(name).call(rates(), jax.random.key(7), q.data)

    def norm(vars):
        return distance_to_solution(vars, q.data)

    ((state, row),) = stream_run(solver, q.start, iter(batches[:4]), every=4, metrics=norm)
    rows = [row]
    kept = jax.tree.map(jnp.copy, state)
    ((end, row),) = stream_run(solver, kept, iter(batches[4:8]), every=4, metrics=norm)
    rows.append(row)
    check_same(end, whole.state, tol=1e-14)
    check_same({k: jnp.stack([r[k] for r in rows]) for k in rows[0]}, jax.tree.map(lambda h: h[1:], history), tol=1e-14)
    assert int(kept.step) == 4, "the state given was donated"
    ((_, row),) = stream_run(solver, q.start, iter(batches[:3]), every=4)
    assert int(row["step"]) == 3, "what is left over at the end is yielded, too"
    assert list(stream_run(solver, q.start, iter([]), every=4)) == []


# ---- optimisers -------------------------------------------------------------------------------------------------------


def clip(tree: Any) -> Any:
    return jax.tree.map(lambda leaf: jnp.clip(leaf, -0.5, 0.75), tree)


OPTIMISERS = {
    "adam": lambda: optax.adam(0.05),
    "momentum": lambda: optax.sgd(0.05, momentum=0.9, nesterov=True),
    "cosine": lambda: optax.sgd(optax.cosine_decay_schedule(0.1, 10)),
    "projected": lambda: optax.chain(optax.sgd(0.1), projections.project(clip)),
    "proximal": lambda: optax.chain(optax.sgd(0.1), projections.prox(lambda u, s: jax.tree.map(lambda a: a / (1 + s), u), 0.1)),
    "clipped": lambda: optax.chain(optax.clip_by_global_norm(0.5), optax.adamw(0.05, weight_decay=0.01)),
}


@pytest.mark.parametrize("optimiser", OPTIMISERS)
def test_optimisers_are_applied_to_the_directions(optimiser):
    """SOBA against a loop that calls the oracle and optax by hand."""
    opt, oracle = OPTIMISERS[optimiser](), implicit(tiny().problem)
    solver = SOLVERS["soba"](tiny().problem, Vars(opt, opt, opt))
    update, batches = jax.jit(solver.update), stream(1)[:4]
    state = solver.init(tiny().start, batches[0])
    vars = state.vars
    states = Vars(*(opt.init(part) for part in vars))

    @jax.jit
    def by_hand(vars, states, batch):
        way = total(oracle.terms(vars, take_draw(batch, 0), ZERO))
        with jax.numpy_dtype_promotion("standard"):
            pairs = [opt.update(d, s, p) for d, s, p in zip(way, states, vars, strict=True)]
            return Vars(*(optax.apply_updates(p, u) for p, (u, _) in zip(vars, pairs, strict=True))), Vars(
                *(s for _, s in pairs)
            )

    for batch in batches:
        state = update(state, batch)
        vars, states = by_hand(vars, states, batch)
    check_same(state.vars, vars, tol=1e-13)
    check_same(state.stages[0].opts, states, tol=1e-13)
    assert distance(vars.outer, tiny().start.outer) > 0.05


@every_kind
def test_every_solver_takes_every_optimiser(name):
    """On trees of mixed dtypes, all of them in one chain: what update returns is shaped as what it was given."""
    start, data = light_start(DTYPES["mixed"]), light_data(DTYPES["mixed"])
    opt = optax.chain(*(make() for make in OPTIMISERS.values()))
    solver = SOLVERS[name](light(), Vars(opt, opt, opt))
    check_stable(solver, start, lambda: light_sampler().batches(data, jax.random.key(0), 0, solver.draws))


# ---- declared cost ----------------------------------------------------------------------------------------------------

# Rows tell the level and whether a product is on a draw or on all the data; columns tell z's matrix from x's.
ROWS = {3: ("draw", "inner"), 5: ("draw", "outer"), 30: ("full", "inner"), 50: ("full", "outer")}
DIM_Z, DIM_X = 7, 11


def linear() -> tuple[Problem, Vars, Levels]:
    """Least squares ``|Az + Bx - y|^2 / 2`` at both levels.  In the inner one ``B x`` is formed for every inner gradient and
    nothing else, ``A'`` for inner gradients and Hessian-vector products, ``B'`` for cross products."""

    def loss(z, x, rows):
        a, b, y = rows
        return 0.5 * (a @ z + b @ x - y) ** 2

    def rows(n):
        rng = np.random.default_rng(n)
        return tuple(jnp.asarray(rng.normal(size=shape)) for shape in ((n, DIM_Z), (n, DIM_X), (n,)))

    return Problem(loss, loss), Vars(jnp.ones(DIM_Z), None, jnp.ones(DIM_X)), Levels(rows(30), rows(50))


def products(jaxpr: Any, share: float = 1.0, taken: float | None = None) -> Counter:
    """How often each product with a data matrix is formed: scans and batches multiply, branches are averaged.

    Keys are (draw or full, level, "A" or "B", forward or transposed).
    """
    found = Counter()
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "dot_general":
            contracted, _ = eqn.params["dimension_numbers"]
            for operand, vectors, dims in zip(eqn.invars, eqn.invars[::-1], contracted, strict=True):
                shape = operand.aval.shape
                if len(shape) == 2 and shape[0] in ROWS and shape[1] in (DIM_Z, DIM_X):
                    way = "forward" if tuple(dims) == (1,) else "transposed"
                    count = vectors.aval.size / shape[dims[0]]
                    found[(*ROWS[shape[0]], "A" if shape[1] == DIM_Z else "B", way)] += share * count
        elif eqn.primitive.name == "cond":
            assert taken is not None, "a branch where none is declared"
            no, yes = eqn.params["branches"]
            found += products(no.jaxpr, share * (1 - taken), taken)
            found += products(yes.jaxpr, share * taken, taken)
        else:
            times = eqn.params["length"] if eqn.primitive.name == "scan" else 1
            for inner in jax.tree.leaves(
                tuple(eqn.params.values()), is_leaf=lambda p: hasattr(p, "eqns") or hasattr(p, "jaxpr")
            ):
                body = getattr(inner, "jaxpr", inner)
                if hasattr(body, "eqns"):
                    found += products(body, share * times, taken)
    return found


def second_order(found: Counter, where: str) -> tuple[float, ...]:
    """Calls where ``d_x g`` is taken in cross products only."""
    gradients = found[where, "inner", "B", "forward"]
    vector = found[where, "inner", "A", "transposed"] - gradients
    return gradients, vector, found[where, "inner", "B", "transposed"], found[where, "outer", "B", "forward"]


def first_order(found: Counter, where: str, points: int = 1) -> tuple[float, ...]:
    """Calls where ``d_x g`` is taken at ``points`` z for each x: a gradient in z, in x or in both forms ``A z`` and ``B x``,
    and at most one product with each transposed matrix.  What goes beyond counts as products with second derivatives."""
    gradients = points * found[where, "inner", "B", "forward"]
    vector = found[where, "inner", "A", "forward"] - gradients
    more = (found[where, "inner", matrix, "transposed"] - gradients for matrix in "AB")
    return gradients, vector, sum(max(count, 0) for count in more), points * found[where, "outer", "B", "forward"]


def on_one_draw(found: Counter, where: str, again: float, more: float) -> tuple[float, ...]:
    """Calls of a path all of whose steps share one ``B x``: an ``A z`` is of a gradient, or of a product beside a cross one.

    Not declared are ``again`` steps that checkpoints take again, and ``more`` values, or products, of f."""
    cross, every = found[where, "inner", "B", "transposed"], found[where, "inner", "A", "transposed"]
    if where == "full":
        again = more = 0
    gradients = found[where, "inner", "A", "forward"] - cross - again
    return gradients, every - gradients - again, cross, found[where, "outer", "A", "forward"] - more


def counted_calls(solver: Any, taken: float | None = None, read: Any = second_order) -> dict[str, tuple]:
    """Oracle calls of one update, read off its jaxpr without what is never used."""
    problem, start, data = linear()
    del problem
    sampler = samplers.uniform(3, outer_batch_size=5)
    batches = jax.eval_shape(lambda: sampler.batches(data, jax.random.key(0), 0, solver.draws))
    state = jax.eval_shape(solver.init, start, batches)
    jaxpr = jax.make_jaxpr(solver.update)(state, batches).jaxpr
    jaxpr, _ = partial_eval.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))
    found = products(jaxpr, taken=taken)
    return {where: read(found, where) for where in ("draw", "full")}


#: How often a branch is taken: refreshes, and the factors of products of random length, half of them on average.
TAKEN = {"srba": 1 / PERIOD, "vrbo": 1 / PERIOD, "spaba": PROBABILITY, "bsa": 0.5, "ttsa": 0.5, "sustain": 0.5}
#: Loops that a tolerance ends, and dense matrices: these count as they go, and `test_double_loop` looks at what they say.
COUNTED = {"aid_bio", "ba", "hoag", "stable"}
#: How the others are read, but for those with products of second derivatives.
READ = dict.fromkeys(set(FIRST_ORDER) - {"sl_bamm", "bda", "iaptt"}, first_order)
READ["bda"] = partial(on_one_draw, again=0, more=3)  # of its three steps, products with second derivatives of f
READ["iaptt"] = partial(on_one_draw, again=3, more=3)
READ["f2sa_p"] = partial(first_order, points=NODES)


@kinds(*COUNTED)
def test_declared_cost_is_that_of_the_program(name):
    solver = build(name, linear()[0])
    calls = counted_calls(solver, TAKEN.get(name), READ.get(name, second_order))
    np.testing.assert_allclose(calls["draw"], solver.cost.draw, atol=1e-12)
    np.testing.assert_allclose(calls["full"], solver.cost.full, atol=1e-12)
    assert sum(solver.cost.draw) >= 3


def test_declared_cost_of_stages_with_inner_steps():
    """Scan lengths are multiplied, and what a stage does not move is not paid for."""
    problem, opt = linear()[0], optax.sgd(0.1)
    directions = implicit(problem)
    solver = sweep(
        descend(directions, Vars(inner=opt), steps=10, estimator=saga()),
        descend(directions, Vars(aux=opt), steps=4, estimator=storm(0.5)),
        descend(directions, Vars(outer=opt), steps=2, fresh=False),
    )
    calls = counted_calls(solver)
    assert calls["draw"] == tuple(solver.cost.draw) == (10, 8, 2, 10)
    assert calls["full"] == tuple(solver.cost.full) == (0, 0, 0, 0)


@pytest.mark.parametrize("mode", ["reverse", "forward"])
def test_both_modes_form_each_product_once(mode):
    problem, start, data = linear()
    oracle = implicit(problem, mode=mode)
    vars, batch = start._replace(aux=start.inner), Batch(inner=data.inner, outer=data.outer)
    jaxpr = jax.make_jaxpr(lambda v, b: oracle.terms(v, b, ZERO))(vars, batch).jaxpr
    jaxpr, _ = partial_eval.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))
    found = products(jaxpr)
    assert found["full", "inner", "B", "forward"] == 1
    assert found["full", "inner", "A", "transposed"] == 2
    assert found["full", "inner", "B", "transposed"] == 1  # the d_x g of forward mode is not used
    assert found["full", "inner", "A", "forward"] == 2
