"""Many devices equal one: every solver on virtual devices of the CPU, in a process of its own.

The number of devices is fixed when JAX starts, so that one subprocess does all the checks that need several, and prints JSON
(``python -m tests.test_parallel``).
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax
from jax.sharding import PartitionSpec as P

from bilevel_jax import Batch, Levels, Problem, Solver, Vars, implicit, run, samplers, solvers, sweep, testing
from bilevel_jax.checkpoints import run_long
from bilevel_jax.estimators import total
from bilevel_jax.parallel import Weighted, data_mesh, data_parallel, deal, place, sharded, spread
from bilevel_jax.sweep import descend
from experiments.scaling import COLLECTIVE
from tests.checks import OPTIMISED
from tests.tables import KINDS, SOLVERS, STEPS, aux_like, build, distance, ragged, small, stream, thinned, tiny

UPDATES = 5  # one more than the period of SRBA: a refresh in their midst
#: Sizes of the inner and outer batches of the runs on shares that were dealt.
DEALT = {"soba": (8, 8), "saba": (8, 8), "srba": (12, 8)}
#: What `make test` finds out in one process, and `make test-all` in another.
QUICK = ("saba", "means", "tasks", "run of saba")
REST = (*(name for name in KINDS if name != "saba"), "run of soba", "run of srba", "taken up")
#: Sums in another order: some units in the last place of numbers of up to about 10.
ROUNDING = {"float64": 1e-12, "float32": 5e-6}

# ---- in the subprocess ------------------------------------------------------------------------------------------------


def problem_in(dtype: str) -> testing.Quadratic:
    if dtype == "float64":
        return small()
    return testing.quadratic(jax.random.key(0), inner_dim=5, outer_dim=3, inner_samples=32, outer_samples=32, noise=0.1)


def after(solver: Solver, sampler: samplers.Sampler, name: str, q: testing.Quadratic, data: Levels) -> Any:
    """The whole state after a few updates, each compiled as a user would."""
    key = jax.random.key(7)

    @partial(jax.jit, donate_argnums=0)
    def step(state: Any, data: Levels) -> Any:
        return solver.update(state, sampler.batches(data, key, state.step * solver.draws, solver.draws))

    start = q.start._replace(aux=aux_like(name, q.start.aux))
    state = solver.init(start, jax.eval_shape(lambda d: sampler.batches(d, key, 0, solver.draws), data))
    for _ in range(UPDATES):
        state = step(state, data)
    return state


def differences(names: list[str], dtype: str) -> dict[str, dict[str, float]]:
    """Largest difference in the state from that on one device, by solver and way.

    12 inner rows and 9 outer ones a draw, the last blocks ragged: no number of devices divides them all.
    """
    q, mesh, found = problem_in(dtype), data_mesh(), {}
    everywhere = place(q.data, mesh)
    for name in names:
        single = after(build(name, q.problem), ragged(), name, q, q.data)
        found[name] = {
            "spread": distance(after(build(name, q.problem), spread(ragged(), mesh), name, q, everywhere), single),
            "sharded": distance(after(sharded(q.problem, partial(build, name), mesh), ragged(), name, q, everywhere), single),
        }
    return found


def dealt_run(name: str, batch_sizes: tuple[int, int], mesh: Any) -> tuple[float, list[str]]:
    """A run inside one shard_map on shares that were dealt: its difference from one device, and what its program sends."""
    q, key, devices = small(), jax.random.key(3), mesh.size
    data = deal(q.data, devices, batch_sizes[0], outer_batch_size=batch_sizes[1])
    problem = data_parallel(q.problem, "data")

    def go(problem: Problem, sizes: list[int], data: Levels) -> Any:
        sampler = samplers.epochs(sizes[0], outer_batch_size=sizes[1])
        measure = lambda vars, data: {"outer": jnp.mean(problem.outer(vars.inner, vars.outer, data.outer))}
        carry, history = run(build(name, problem), sampler, q.start, data, key, steps=2 * UPDATES, metrics=measure)
        return carry.state, history

    local = partial(go, problem, [size // devices for size in batch_sizes])
    many = jax.jit(jax.shard_map(local, mesh=mesh, in_specs=P("data"), out_specs=P()))
    placed = place(data, mesh, P("data"))
    program = many.lower(placed).compile(compiler_options=OPTIMISED)  # as it is looked at
    single = jax.jit(partial(go, q.problem, list(batch_sizes)))(q.data)
    return distance(program(placed), single), collectives(str(program.as_text()))


def places_of_the_mean(mesh: Any) -> dict[str, Any]:
    """Error of the directions, or the message of the one raised, by where the mean over the devices is taken, and by flag."""
    q, point = small(), jax.tree.map(lambda leaf: leaf + 0.5, small().start)

    def inside(loss: Any) -> Any:
        return lambda z, x, d: lax.pmean(loss(z, x, d).mean(), "data")

    def directions(problem: Problem, data: Levels) -> Vars:
        return total(implicit(problem).terms(point, Batch(*data), jnp.int32(0)))

    ways = {
        "directions": lambda data: lax.pmean(directions(q.problem, data), "data"),
        "loss": lambda data: directions(Problem(*map(inside, q.problem)), data),
    }
    exact, found = directions(q.problem, q.data), {}
    for place_of_mean, way in ways.items():
        for flag in (True, False):
            many = jax.shard_map(way, mesh=mesh, in_specs=P("data"), out_specs=P(), check_vma=flag)
            try:
                found[f"{place_of_mean}, check_vma={flag}"] = distance(jax.jit(many)(q.data), exact)
            except ValueError as error:
                found[f"{place_of_mean}, check_vma={flag}"] = str(error)
    return found


def tasks_apart(mesh: Any) -> float:
    """MAML on tasks that lie on the devices by shares, against one device."""
    rng = np.random.default_rng(0)
    centres = jnp.asarray(rng.normal(size=(8, 3)))
    loss = lambda z, x, c: 0.5 * ((z - c) ** 2 * (1 + c**2)).sum()  # of unequal curvature: mixed tasks would show
    maml = solvers.maml(Problem(loss, loss), Vars(inner=optax.sgd(0.1), outer=optax.sgd(0.5)), inner_steps=3)
    start, batch = Vars(outer=jnp.ones(3)), Batch(inner=centres[None], outer=0.5 * centres[None])
    update = jax.jit(maml.update)
    single = update(maml.init(start, batch), batch)
    return distance(update(maml.init(start, batch), place(batch, mesh, P(None, "data"))).vars, single.vars)


def taken_up(mesh: Any) -> dict[str, bool]:
    """Whether a long run that is taken up again ends with the numbers of one that was not interrupted."""
    q, found = small(), {}
    make = partial(build, "soba")
    ways = {
        "spread": (make(q.problem), spread(ragged(), mesh), place(q.data, mesh)),
        "sharded": (sharded(q.problem, make, mesh), ragged(), q.data),
    }
    for way, (solver, sampler, data) in ways.items():
        with tempfile.TemporaryDirectory() as folder:

            def go(name: str, steps: int, parts: Any = (solver, sampler, q.start, data), folder: str = folder) -> Any:
                settings = {"folder": Path(folder) / name, "every": 2, "save_every": 2}
                return run_long(*parts, jax.random.key(3), steps=steps, **settings)[0].state  # type: ignore[arg-type]

            whole = go("whole", 6)
            go("cut", 4)
            found[way] = all(map(np.array_equal, *map(jax.tree.leaves, (whole, go("cut", 6)))))
    return found


def collectives(program: str) -> list[str]:
    """``kind result-type`` of every instruction of an optimised program by which devices exchange numbers."""
    return [f"{kind} {kept}" for kept, kind in COLLECTIVE.findall(program)]


#: What is found out besides differences of solvers.
PARTS: dict[str, Callable[[Any], Any]] = {"means": places_of_the_mean, "tasks": tasks_apart, "taken up": taken_up}
PARTS |= {f"run of {name}": partial(dealt_run, name, sizes) for name, sizes in DEALT.items()}


def main(dtype: str, *parts: str) -> None:
    jax.config.update("jax_enable_x64", True)
    jax.config.update("jax_numpy_rank_promotion", "raise")
    jax.config.update("jax_numpy_dtype_promotion", "strict")
    jax.config.update("jax_disable_most_optimizations", True)
    mesh, names = data_mesh(), [part for part in parts if part in SOLVERS]
    found = {part: PARTS[part](mesh) for part in parts if part in PARTS}
    print(json.dumps({"devices": mesh.size, **differences(names, dtype), **found}))


# ---- the tests --------------------------------------------------------------------------------------------------------


def measured(devices: int, dtype: str, *parts: str, seconds: int) -> dict[str, Any]:
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(devices)}
    command = [sys.executable, "-m", "tests.test_parallel", dtype, *parts]
    root = Path(__file__).parent.parent
    done = subprocess.run(command, env=environment, cwd=root, capture_output=True, text=True, timeout=seconds)
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["devices"] == devices
    return found


@cache
def together(parts: tuple[str, ...]) -> dict[str, Any]:
    return measured(4, "float64", *parts, seconds=900)


def four(part: str) -> Any:
    """What one part finds on four devices."""
    return together(QUICK if part in QUICK else REST)[part]


@pytest.mark.parametrize("way", ["spread", "sharded"])
@thinned("name", KINDS, "saba")
def test_four_devices_equal_one(name, way):
    assert four(name)[way] < ROUNDING["float64"]


@pytest.mark.slow
@pytest.mark.parametrize(("devices", "dtype"), [(4, "float64"), (4, "float32"), (8, "float64"), (8, "float32")])
def test_every_solver_on_many_devices_equals_one(devices, dtype):
    found = measured(devices, dtype, *SOLVERS, seconds=3600)
    for name in SOLVERS:
        assert max(found[name].values()) < ROUNDING[dtype], (name, found[name])


@thinned("name", DEALT, "saba")
def test_a_run_on_dealt_shares_equals_one_device(name):
    """And only all-reduces are sent: no sample moves."""
    error, sent = four(f"run of {name}")
    assert error < 1e-12
    assert {kind.split()[0] for kind in sent} == {"all-reduce"}


@thinned("name", ["soba", "saba"], "saba")
def test_one_all_reduce_an_update(name):
    """Of the directions: 3 vectors like z (5) and 2 like x (3).  What else is sent are the two values of the metric."""
    _, sent = four(f"run of {name}")
    sizes = [sum(map(int, re.findall(r"f64\[(\d*)\]", one.replace("[]", "[1]")))) for one in sent]
    assert [size for size in sizes if size > 2] == [3 * 5 + 2 * 3]
    assert sum(sizes) == 3 * 5 + 2 * 3 + 2


def test_mean_over_the_devices_belongs_into_the_loss_under_the_flag():
    """Of the other two combinations one is refused, and one is wrong in silence: what `data_parallel` is for."""
    errors = four("means")
    assert errors["loss, check_vma=True"] < 1e-12
    assert errors["directions, check_vma=False"] < 1e-12
    assert "JAX would sum its derivatives over the devices" in errors["directions, check_vma=True"]
    assert errors["loss, check_vma=False"] > 0.1


def test_tasks_on_many_devices_equal_one():
    assert four("tasks") < 1e-12


@pytest.mark.more
@pytest.mark.parametrize("way", ["spread", "sharded"])
def test_a_long_run_on_many_devices_is_taken_up(way):
    assert four("taken up")[way]


# On one device: the rules are the same.


def mean_of(problem: Problem, in_specs: Any, **options: Any) -> Any:
    return jax.shard_map(problem.inner, mesh=data_mesh(), in_specs=in_specs, out_specs=P(), **options)


SQUARES = Problem(lambda z, x, a: (z - a) ** 2, lambda z, x, a: (z - a) ** 2)
ROWS = np.arange(6.0)


@pytest.mark.parametrize(
    ("specs", "options", "match"),
    [
        ((P(), P(), P()), {}, "problem.inner: got data that are the same on all devices of the axis 'data'"),
        ((P(), P(), P("data")), {"check_vma": False}, "problem.inner: got data that are the same on all devices"),
        ((P("data"), P(), P("data")), {}, "problem.inner: got variables that differ from device to device"),
    ],
    ids=["replicated rows", "no flag", "split variables"],
)
def test_data_parallel_refuses(specs, options, match):
    arguments = jnp.ones(6) if specs[0] == P("data") else jnp.ones(()), jnp.ones(()), jnp.asarray(ROWS)
    with pytest.raises(ValueError, match=match):
        mean_of(data_parallel(SQUARES, "data"), specs, **options)(*arguments)


def test_data_parallel_refuses_outside_of_shard_map_and_what_is_no_problem():
    with pytest.raises(ValueError, match=r"call it in jax.shard_map"):
        data_parallel(SQUARES, "data").outer(jnp.ones(()), jnp.ones(()), jnp.asarray(ROWS))
    with pytest.raises(TypeError, match="problem: got tuple"):
        data_parallel((1, 2), "data")


def test_losses_without_data_are_left_as_they_are():
    problem = data_parallel(Problem(lambda z, x, d: z**2, lambda z, x, d: z**2), "data")
    assert problem.inner(jnp.float64(3), None, None) == 9


def test_weighted_rows_need_one_value_a_sample():
    data = Weighted(jnp.asarray(ROWS), jnp.asarray(ROWS / ROWS.mean()))
    specs = (P(), P(), P("data"))
    mean = mean_of(data_parallel(SQUARES, "data"), specs)(jnp.ones(()), jnp.ones(()), data)
    np.testing.assert_allclose(mean, np.average((1 - ROWS) ** 2, weights=ROWS), rtol=1e-12)
    scalar = Problem(*(lambda z, x, a, loss=loss: loss(z, x, a).mean() for loss in SQUARES))
    with pytest.raises(ValueError, match=r"problem.inner: got a scalar loss, expected one value a sample"):
        mean_of(data_parallel(scalar, "data"), specs)(jnp.ones(()), jnp.ones(()), data)


def test_weights_of_a_batch_are_not_lost():
    """`sharded` moves them into the data; a solver in a shard_map of one's own refuses them."""
    problem, batch = tiny().problem, stream(1)[0]
    solver = build("soba", data_parallel(problem, "data"))
    specs = Batch(P(None, "data"), P(None, "data"), P(), P(), P(None, "data"), P("data"))
    state = build("soba", problem).init(tiny().start, batch)
    with pytest.raises(ValueError, match="got a scalar loss, expected one value a sample"):
        jax.eval_shape(jax.shard_map(solver.update, mesh=data_mesh(), in_specs=(P(), specs), out_specs=P()), state, batch)
    moved = sharded(problem, partial(build, "soba"), data_mesh()).update(state, batch)
    assert distance(moved.vars, build("soba", problem).update(state, batch).vars) < 1e-12


def test_sharded_refuses_batches_that_are_not_stacked():
    solver = sharded(small().problem, partial(build, "soba"), data_mesh())
    batch = ragged().batches(small().data, jax.random.key(0), 0, 2)
    state = solver.init(small().start, ragged().batches(small().data, jax.random.key(0), 0, 1))
    with pytest.raises(ValueError, match=r"batches.*expected a leading axis of length 1"):
        solver.update(state, batch)
    with pytest.raises(TypeError, match="batches: got tuple"):
        solver.update(state, tuple(batch))


@pytest.mark.parametrize("devices", [1, 2, 4])
def test_deal_hands_every_device_its_part_of_every_block(devices):
    """Blocks of the shares, put together again, are the blocks of the data, weights included; the mean is that of the data."""
    data = Levels(np.arange(10.0), {"row": np.arange(7.0)})
    dealt = deal(data, devices, 4, outer_batch_size=8)
    for part, whole, size, count in ((dealt.inner, data.inner, 4, 10), (dealt.outer, data.outer["row"], 8, 7)):
        rows = part.rows["row"] if size == 8 else part.rows
        np.testing.assert_allclose((rows * part.weight).mean(), whole.mean(), rtol=1e-12)
        blocks = np.stack(np.split(rows, devices)).reshape(devices, -1, size // devices).swapaxes(0, 1).reshape(-1, size)
        weights = (
            np.stack(np.split(part.weight, devices)).reshape(devices, -1, size // devices).swapaxes(0, 1).reshape(-1, size)
        )
        np.testing.assert_array_equal(blocks[weights > 0], whole)
        np.testing.assert_allclose(weights[weights > 0], blocks.size / count, rtol=1e-12)


def test_deal_leaves_full_blocks_without_weights():
    assert isinstance(deal(Levels(np.arange(8), np.arange(4)), 2, 4).inner, np.ndarray)


def test_deal_refuses():
    data = Levels(np.arange(8), np.arange(8))
    with pytest.raises(ValueError, match="outer_batch_size: got 3, expected a multiple of 2, the number of devices"):
        deal(data, 2, 4, outer_batch_size=3)
    with pytest.raises(ValueError, match=r"data.outer: got leaves"):
        deal(Levels(np.arange(8), (np.arange(8), np.arange(7))), 2, 4)
    with pytest.raises(TypeError, match=r"batch_size: got 2.5"):
        deal(data, 2, 2.5)


@pytest.mark.parametrize("spec", [P("data"), P(None, "data"), P(("data",))])
def test_mesh_and_place_refuse(spec):
    with pytest.raises(ValueError, match=r"tree\['state'\]: got the shape \(\), expected one that the devices"):
        place({"state": np.float32(1)}, data_mesh(), spec)
    with pytest.raises(ValueError, match="devices: got 99, expected at most"):
        data_mesh(99)
    with pytest.raises(TypeError, match=r"devices: got 2.0"):
        data_mesh(2.0)


def test_place_keeps_values_keys_and_dtypes():
    tree = {"key": jax.random.key(3), "rows": np.arange(4, dtype=np.int32), "state": jnp.ones((2, 3), jnp.float32)}
    placed = place(tree, data_mesh())
    assert placed["key"] == tree["key"]
    assert placed["rows"].dtype == np.int32
    np.testing.assert_array_equal(placed["state"], tree["state"])


def test_place_over_two_axes():
    """A leading axis over both, in one entry; what they do not divide together is refused."""
    mesh = jax.make_mesh((1, 1), ("hosts", "data"), devices=jax.devices()[:1])
    np.testing.assert_array_equal(place(np.arange(4.0), mesh, P(("hosts", "data"))), np.arange(4.0))
    wide = jax.sharding.AbstractMesh((2, 3), ("hosts", "data"))
    with pytest.raises(ValueError, match=r"tree: got the shape \(8,\), expected one that the devices {'hosts': 2, 'data': 3}"):
        place(np.arange(8.0), wide, P(("hosts", "data")))  # type: ignore[arg-type]


def test_place_takes_keys_with_several_processes(monkeypatch):
    """As far as one process can tell: each gives the data of the keys."""
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    for impl in ("threefry2x32", "rbg"):
        keys = jax.random.split(jax.random.key(3, impl=impl), 4)
        placed = place({"keys": keys, "rows": np.arange(4)}, data_mesh(), P("data"))["keys"]
        assert placed.dtype == keys.dtype
        np.testing.assert_array_equal(jax.random.key_data(placed), jax.random.key_data(keys))


def test_composes_with_a_solver_of_ones_own():
    """`sharded` takes anything that makes a solver of a problem, and keeps its draws and cost."""
    make = lambda problem: sweep(descend(implicit(problem), Vars(*map(optax.adam, STEPS))))
    solver = sharded(small().problem, make, data_mesh())
    assert (solver.draws, solver.cost) == (1, make(small().problem).cost)
    assert not solver.lazy


def test_losses_that_average_over_devices_are_refused_for_tasks():
    quartic = Problem(lambda z, x, a: ((z - a) ** 4).sum(), lambda z, x, b: ((z - b) ** 2).sum())
    averaged = data_parallel(quartic, "data")
    for make in (solvers.maml, solvers.reptile, solvers.imaml):
        with pytest.raises(ValueError, match="average over the devices of the axis 'data', expected those of one task"):
            make(
                averaged,
                Vars(inner=optax.sgd(0.1), outer=optax.sgd(0.1)),
                **({"strength": 1.0} if make is solvers.imaml else {}),
            )


if __name__ == "__main__":
    main(*sys.argv[1:])
