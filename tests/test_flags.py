"""Debug flags of JAX, and transformations, on healthy problems: no solver and no function of the library fails under them."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
import pytest
from jax import lax
from jax.sharding import PartitionSpec as P

from bilevel_jax import (
    Batch,
    Levels,
    Problem,
    Vars,
    guard,
    hypergrad,
    implicit_diff,
    linear_solve,
    moreau,
    nonsmooth,
    projections,
    run,
    samplers,
    solvers,
)
from bilevel_jax.control_flow import cond, scan, while_loop
from bilevel_jax.distributed import adbo, simulate
from bilevel_jax.distributed.fednest import fednest
from bilevel_jax.distributed.gossip import complete, d_soba, per_agent
from bilevel_jax.parallel import data_mesh
from tests.checks import check_same
from tests.tables import (
    SOLVERS,
    STEPS,
    build,
    distance,
    donated_update,
    every_kind,
    stream,
    thinned,
    tiny,
    tiny_sampler,
    tiny_start,
)

# ---- every solver -----------------------------------------------------------------------------------------------------

some_solvers = thinned("name", SOLVERS, "saba", "hoag", "itd_bio")


def short_run(name: str, steps: int = 2) -> Callable[[jax.Array], Vars]:
    """The variables after a run from a key on the problem of scalars, with one metric."""
    setting, start, solver = tiny(), tiny_start(name), build(name, tiny().problem)  # made before anything is traced
    measure = lambda vars, data: {"x": vars.outer}

    def go(key: jax.Array) -> Vars:
        carry, _ = run(solver, tiny_sampler(), start, setting.data, key, steps=steps, every=1, metrics=measure)
        return carry.state.vars

    return go


def no_nan_no_infinity() -> ExitStack:
    """Every array that is made must be finite."""
    stack = ExitStack()
    stack.enter_context(jax.debug_nans(True))
    stack.enter_context(jax.debug_infs(True))
    return stack


def two_updates(name: str, update: Any) -> Any:
    solver = build(name, tiny().problem)
    batches = stream(solver.draws)[:2]
    state = solver.init(tiny_start(name), batches[0])
    for batch in batches:
        state = (update or solver.update)(state, batch)
    return state


@every_kind
def test_no_solver_makes_nan_or_infinity(name):
    """One operation at a time, and compiled."""
    with no_nan_no_infinity():
        eager, compiled = two_updates(name, None), two_updates(name, donated_update(name))
    assert distance(eager.vars, compiled.vars) < 1e-12
    assert distance(eager.vars, tiny_start(name)) > 1e-4


@some_solvers
def test_no_solver_leaks_tracers(name):
    with jax.checking_leaks():
        shapes = jax.eval_shape(short_run(name), jax.random.key(0))
    assert shapes.outer.shape == ()


@some_solvers
def test_solvers_run_without_jit(name):
    """Whole runs, with the strict promotion of dtypes of all tests."""
    with jax.disable_jit():
        found = short_run(name)(jax.random.key(0))
    check_same(found, jax.jit(short_run(name))(jax.random.key(0)), tol=1e-12)


# ---- shard_map --------------------------------------------------------------------------------------------------------


def over_seeds(function: Callable[[jax.Array], Any], devices: int) -> Callable[[jax.Array], Any]:
    """``function(key)`` for as many keys as devices, each on one of them, with the default check of `jax.shard_map`."""
    one = lambda keys: jax.tree.map(lambda leaf: leaf[None], function(keys[0]))
    return jax.shard_map(one, mesh=data_mesh(devices, "seeds"), in_specs=P("seeds"), out_specs=P("seeds"))


def keys(count: int) -> jax.Array:
    return jax.random.split(jax.random.key(3), count)


def test_the_name_of_the_sum_is_known():
    """A control of the tests here: a derivative in a variable that is the same on all devices is a psum."""
    one = lambda row: jax.grad(lambda z: z * row[0])(jnp.ones((), row.dtype))
    program = jax.make_jaxpr(jax.shard_map(one, mesh=data_mesh(1, "seeds"), in_specs=P("seeds"), out_specs=P()))(jnp.ones(1))
    assert "psum" in str(program)


@every_kind
def test_independent_seeds_in_shard_map(name):
    """Nothing is exchanged between the devices: JAX would sum derivatives by what is the same on all of them."""
    program = jax.make_jaxpr(over_seeds(short_run(name), 1))(keys(1))
    assert "psum" not in str(program)
    alone = jax.eval_shape(short_run(name), keys(1)[0])
    assert [aval.shape[1:] for aval in program.out_avals] == [leaf.shape for leaf in jax.tree.leaves(alone)]


def on_own_rows(name: str, marked: bool, rows: Any) -> Any:
    """A run on data of which each device has its own, from a start that is the same on all, or marked as different."""
    start, solver = tiny_start(name), build(name, tiny().problem)
    start = lax.pcast(start, "seeds", to="varying") if marked else start
    return run(solver, samplers.full(), start, rows, jax.random.key(0), steps=1)[0].state.vars


@some_solvers
def test_sums_over_the_devices_are_refused(name):
    """JAX sums derivatives by a variable that is the same on all devices: of losses that differ, that is no run of any one."""
    rows = jax.tree.map(lambda leaf: leaf[None], tiny().data)
    for marked in (True, False):
        each = lambda data, marked=marked: on_own_rows(name, marked, jax.tree.map(lambda leaf: leaf[0], data)).outer[None]
        many = jax.shard_map(each, mesh=data_mesh(1, "seeds"), in_specs=P("seeds"), out_specs=P("seeds"))
        if marked:
            assert "psum" not in str(jax.make_jaxpr(many)(rows))
        else:
            with pytest.raises(ValueError, match="JAX would sum its derivatives over the devices"):
                jax.eval_shape(many, rows)


#: With a table, a branch, a loop that a tolerance ends, a random length, a path with its worst iterate, random directions.
SEEDED = ("saba", "srba", "hoag", "bsa", "iaptt", "pzobo")


def main() -> None:
    jax.config.update("jax_enable_x64", True)
    jax.config.update("jax_disable_most_optimizations", True)
    devices, found = jax.device_count(), {}
    for name in SEEDED:
        one = jax.jit(short_run(name, steps=3))
        alone = [one(key) for key in keys(devices)]
        together = jax.jit(over_seeds(one, devices))(keys(devices))
        apart = distance(*(part.outer for part in alone[:2]))
        found[name] = [distance(together, jax.tree.map(lambda *leaves: jnp.stack(leaves), *alone)), apart]
    print(json.dumps({"devices": devices, "solvers": found}))


@pytest.fixture(scope="module")
def two_devices() -> dict[str, Any]:
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "2"}
    command, root = [sys.executable, "-m", "tests.test_flags"], Path(__file__).parent.parent
    done = subprocess.run(command, env=environment, cwd=root, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("name", SEEDED)
def test_each_device_runs_its_own_seed(name, two_devices):
    assert two_devices["devices"] == 2
    difference, apart = two_devices["solvers"][name]
    assert difference < 1e-13
    assert apart > 1e-5, "the seeds make no difference"


def test_loops_and_branches_agree_on_what_varies():
    """A carry of four entries, each of which only varies once the one before does; what does not vary is left as it is."""

    def shifted(carry: tuple, by: jax.Array) -> tuple:
        return (by, *carry[:-1])

    def chain(key: jax.Array) -> Any:
        seed = jax.random.uniform(key, (), jnp.float32)
        zeros = (jnp.float32(0),) * 4
        scanned, _ = scan(lambda c, _: ((shifted(c[0], seed), c[1] + 1), None), (zeros, jnp.float32(0)), None, length=6)
        looped = while_loop(lambda c: c[1] < 6, lambda c: (shifted(c[0], seed), c[1] + 1), (zeros, jnp.float32(0)))
        branch = cond(seed > 2, lambda a: (a, jnp.float32(1)), lambda a: (seed, jnp.float32(1)), jnp.float32(0))
        empty, _ = scan(lambda c, x: (c + x, None), seed, jnp.zeros(0, jnp.float32))
        same = [lax.pcast(part, "seeds", to="varying") for part in (scanned[1], looped[1])]  # refused where they vary already
        return scanned[0], looped[0], branch[0], empty, same

    (scanned, looped, branch, empty, same) = jax.jit(over_seeds(chain, 1))(keys(1))
    seed = jax.random.uniform(keys(1)[0], (), jnp.float32)
    assert {float(leaf[0]) for leaf in (*scanned, *looped, branch, empty)} == {float(seed)}
    assert [float(leaf[0]) for leaf in same] == [6, 6]


# ---- export -----------------------------------------------------------------------------------------------------------


@some_solvers
def test_runs_lower_for_accelerators(name):
    """On a machine that has none."""
    go = short_run(name)
    program = jax.jit(lambda bits: go(jax.random.wrap_key_data(bits)))
    exported = jax.export.export(program, platforms=["cuda", "tpu"])(jax.random.key_data(jax.random.key(0)))
    assert exported.platforms == ("cuda", "tpu")
    assert len(exported.mlir_module_serialized) > 1000


# ---- everything else --------------------------------------------------------------------------------------------------


def smooth() -> Problem:
    """``z* = (x + a) / 1.5``; losses of one value a sample."""
    return Problem(
        lambda z, x, a: 0.5 * ((z[None] - x[None] - a) ** 2).sum(1) + 0.25 * (z**2).sum(),
        lambda z, x, b: 0.5 * ((z[None] - b) ** 2).sum(1) + 0.5 * (x**2).sum(),
    )


Z, X, DATA = jnp.ones(2, jnp.float32), jnp.full(2, 0.5, jnp.float32), jnp.arange(6, dtype=jnp.float32).reshape(3, 2) / 8
BATCH = Batch(inner=DATA, outer=DATA)
SPD = jnp.array([[2.0, 0.5], [0.5, 1.0]], jnp.float32)


def hypergradient(method: Any) -> Callable[[jax.Array], Any]:
    return lambda z: hypergrad.hypergradient(smooth(), method)(z, X, BATCH, None, jax.random.key(0))[:2]


def system(solver: linear_solve.LinearSolver, **options: Any) -> Callable[[jax.Array], Any]:
    matvec = (lambda u, k: SPD @ u) if solver.draws else (lambda u: SPD @ u)
    return lambda b: solver.solve(matvec, b, **options)


def root(theta: jax.Array) -> jax.Array:
    solve = implicit_diff.implicit_root(lambda z, t: z**3 + z - t)(
        lambda init, t: lax.fori_loop(0, 30, lambda _, z: z - (z**3 + z - t) / (3 * z**2 + 1), init)
    )
    return solve(0 * theta + 1, theta).sum()


def stepped(opt: optax.GradientTransformation) -> Callable[[jax.Array], Any]:
    return lambda z: opt.update(z, opt.init(z), z)[0]


def solver_of(make: Callable[[], Any], data: Levels, start: Vars, sampler: samplers.Sampler) -> Callable[[jax.Array], Any]:
    def go(x: jax.Array) -> Any:
        return run(make(), sampler, start._replace(outer=x), data, jax.random.key(0), steps=2)[0].state.vars

    return go


OPTS = Vars(*(optax.sgd(step) for step in STEPS))
TWO = OPTS._replace(aux=None)
AGENTS = Levels(jnp.stack([DATA, 2 * DATA]), jnp.stack([DATA, DATA]))
TASKS = Levels(DATA[:, None], DATA[:, None])


def asynchronous(x: jax.Array) -> Any:
    rates = adbo.Rates(*(0.05,) * 6)
    method = adbo.adbo(smooth(), Vars(Z, None, x), rates, n_workers=2, cut_period=2, max_cuts=2, estimate_rounds=2)
    plan = simulate.schedule(simulate.Cluster(simulate.constant(1.0)), method, steps=4, quorum=1, max_staleness=4)
    return simulate.simulate(method, samplers.full(), plan, AGENTS, jax.random.key(0))


TERM = nonsmooth.sparse_group_lasso([0, 1])
METHODS = {
    "implicit": hypergrad.implicit(),
    "iterative": hypergrad.iterative(optax.adam(0.1, eps_root=1e-8), 3, truncate=2),
    "sqrt checkpoints": hypergrad.iterative(optax.sgd(0.1), 5, checkpoint="sqrt"),
    "zeroth_order": hypergrad.zeroth_order(optax.sgd(0.1), 3),
    "one_step": hypergrad.one_step(optax.sgd(0.1)),
    "t1_t2": hypergrad.t1_t2(),
}
LINEAR = {
    "cg": system(linear_solve.cg(max_steps=4)),
    "cg from a guess": system(linear_solve.cg(max_steps=4), guess=Z),
    "cg, no step": system(linear_solve.cg(max_steps=4, atol=10.0)),
    "dense": system(linear_solve.dense()),
    "lu": system(linear_solve.dense(positive_definite=False)),
    "auto": system(linear_solve.auto(dense_below=0)),
    "richardson": system(linear_solve.richardson(steps=3, rate=0.3)),
    "fresh richardson": system(linear_solve.richardson(steps=3, rate=0.3, fresh=True)),
    "heavy_ball": system(linear_solve.heavy_ball(steps=3, smoothness=3.0, strong_convexity=0.5)),
    "neumann": system(linear_solve.neumann(terms=3, rate=0.3)),
    "nested neumann": system(linear_solve.neumann(terms=2, rate=0.3, fresh=True, batches=(2, 1))),
    "random_neumann": system(linear_solve.random_neumann(terms=3, rate=0.3), key=jax.random.key(0)),
    "derivative of a solve": jax.grad(lambda b: system(linear_solve.cg(max_steps=4))(b)[0].sum()),
}
FULL = samplers.full()
CASES: dict[str, Callable[[jax.Array], Any]] = {
    **{f"hypergradient, {name}": hypergradient(method) for name, method in METHODS.items()},
    **{f"linear system, {name}": solve for name, solve in LINEAR.items()},
    "implicit_root": root,
    "implicit_root, reverse": jax.grad(root),
    "implicit_root, forward": jax.jacfwd(root),
    "box": nonsmooth.box(0.0, 0.5),
    "box to infinity": nonsmooth.box(0.0, 9.0),
    "ball": nonsmooth.ball(0.5),
    "ball, origin": lambda z: nonsmooth.ball(0.5)(0 * z),
    "ball, derivative at the origin": lambda z: jax.jacobian(nonsmooth.ball(0.5))(0 * z),
    "simplex": nonsmooth.simplex(),
    "term": lambda z: (TERM.value(z, None), TERM.prox(z, 0.1, None)),
    "term at the origin": lambda z: (jax.grad(TERM.value)(0 * z, None), TERM.prox(0 * z, 0.1, None)),
    "proximal_sgd": stepped(projections.proximal_sgd(0.1, TERM)),
    "project": stepped(optax.chain(optax.sgd(0.1), projections.project(nonsmooth.simplex()))),
    "envelope": lambda z: moreau.envelope(smooth(), z, X, BATCH, gamma=0.5, rate=0.3, max_steps=50),
    "residual": lambda z: moreau.residual(smooth(), z, X, BATCH, multiplier=2.0, gamma=0.5, rate=0.2),
    "gossip": solver_of(lambda: d_soba(smooth(), OPTS, complete(2)), AGENTS, Vars(Z), per_agent(samplers.uniform(2))),
    "fednest": solver_of(
        lambda: fednest(smooth(), inner_rate=0.1, outer_rate=0.1, neumann_rate=0.3, local_steps=2), AGENTS, Vars(Z), FULL
    ),
    "adbo": asynchronous,
    "guard": solver_of(lambda: guard(solvers.saba(smooth(), OPTS)), Levels(DATA, DATA), Vars(Z), samplers.uniform(2)),
    "maml": solver_of(lambda: solvers.maml(smooth(), TWO, inner_steps=2), TASKS, Vars(), FULL),
    "imaml": solver_of(lambda: solvers.imaml(smooth(), TWO, inner_steps=2), TASKS, Vars(), FULL),
    "reptile": solver_of(lambda: solvers.reptile(smooth(), TWO, inner_steps=2), TASKS, Vars(), FULL),
}
#: Loops, branches, random lengths, paths.
WITHOUT_JIT = (
    "hypergradient, iterative",
    "linear system, cg",
    "linear system, random_neumann",
    "implicit_root",
    "envelope",
    "adbo",
)
#: And one of each other kind.
OFTEN = (*WITHOUT_JIT, "hypergradient, implicit", "hypergradient, zeroth_order", "linear system, dense", "ball, origin", "term")
OFTEN += ("linear system, derivative of a solve", "term at the origin", "residual", "gossip", "fednest", "maml")
some_cases = thinned("case", CASES, *OFTEN)


@some_cases
def test_no_function_makes_nan_or_infinity(case):
    with no_nan_no_infinity():
        eager, compiled = CASES[case](Z), jax.jit(CASES[case])(Z)
    check_same(eager, compiled, tol=2e-5)


@thinned("case", CASES, *WITHOUT_JIT)
def test_functions_run_without_jit(case):
    with jax.disable_jit():
        found = CASES[case](Z)
    check_same(found, CASES[case](Z), tol=2e-5)


@some_cases
def test_no_function_leaks_tracers(case):
    with jax.checking_leaks():
        assert jax.tree.leaves(jax.eval_shape(CASES[case], Z))


@some_cases
def test_functions_of_independent_points_in_shard_map(case):
    mesh = data_mesh(1, "points")
    one = lambda zs: jax.tree.map(lambda leaf: jnp.asarray(leaf)[None], CASES[case](zs[0]))
    many = jax.shard_map(one, mesh=mesh, in_specs=P("points"), out_specs=P("points"))
    program, alone = jax.make_jaxpr(many)(Z[None]), jax.eval_shape(CASES[case], Z)
    assert "psum" not in str(program)
    assert [aval.shape[1:] for aval in program.out_avals] == [leaf.shape for leaf in jax.tree.leaves(alone)]


if __name__ == "__main__":
    main()
