"""The table of step times: that it is complete, that its floor is the solver it is a floor of, that its counter counts."""

import json
import os

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
import pytest
from jax import lax

from bilevel_jax import BilevelState, Solver, Vars, samplers
from experiments.speed.__main__ import Settings, main
from experiments.speed.shapes import BATCH, FULL, QUICK, SHAPES
from experiments.speed.steps import SOLVERS
from experiments.speed.timing import CAN_PIN, Program, Times, build, copies, interleave, pinned
from tests.tables import thinned

MEASURED = ["wall_us", "process_us", "spread", "compile_s", "peak_mb"]


@pytest.mark.more
@pytest.mark.usefixtures("optimised")
def test_command_writes_complete_tables(tmp_path, capsys):
    out = tmp_path / "new" / "folder"
    main(["--quick", "--no-pin", "--shapes", "ijcnn1", "--solvers", "saba", "--repeats", "3", "--out", str(out)])

    steps = pd.read_csv(out / "steps.csv")
    assert list(steps["solver"]) == ["floor", "soba", "saba"]
    ratios = [f"{clock}_over_{other}" for clock in ("wall", "process") for other in ("floor", "soba")]
    assert set(steps) == {"shape", "solver", *MEASURED, *ratios, "data_mb", "tables_mb", "finite"}
    assert np.isfinite(steps[[*MEASURED, *ratios]].to_numpy()).all()
    by_solver = steps.set_index("solver")
    assert by_solver.loc["floor", ["wall_over_floor", "process_over_floor"]].tolist() == [1, 1]
    assert by_solver.loc["soba", ["wall_over_soba", "process_over_soba"]].tolist() == [1, 1]
    assert steps["finite"].tolist() == [True] * 3

    blocks = [-(-rows // BATCH) for rows in (QUICK["ijcnn1"].inner, QUICK["ijcnn1"].outer)]
    floats = QUICK["ijcnn1"].features * (3 * blocks[0] + blocks[1])  # z, v and x inside; v outside, where x is absent
    held = dict(zip(steps["solver"], steps["tables_mb"], strict=True))
    assert held == {"floor": 0, "soba": 0, "saba": pytest.approx(4e-6 * floats)}

    tables = pd.read_csv(out / "tables.csv")
    assert list(tables["program"]) == ["scan", "host loop", "vmap, 8 seeds", "guard"]
    assert set(tables) == {"shape", "program", "copies", *MEASURED, "wall_over_scan", "process_over_scan", "finite"}
    assert np.isfinite(tables[[*MEASURED, "wall_over_scan", "process_over_scan"]].to_numpy()).all()
    assert tables["copies"].tolist() == [0, 0, 0, 0]
    assert tables["finite"].tolist() == [True] * 4

    config = json.loads((out / "config.json").read_text())
    assert config["settings"]["repeats"] == 3
    assert config["versions"]["jax"] == jax.__version__
    printed = capsys.readouterr().out
    assert all(name in printed for name in ("saba", "host loop", "peak_mb"))


@pytest.mark.more
@pytest.mark.parametrize("name", SHAPES)
def test_floor_is_soba(name):
    shape = SHAPES[name](QUICK[name])._replace(rates=Vars(0.1, 0.1, 1.0))  # so large that x moves, too
    batches = samplers.uniform(BATCH).batches(shape.data, jax.random.key(2), 0, 50)._replace(full=None)
    one = jax.tree.map(lambda leaf: leaf[:, None], batches)

    def after(solver: Solver) -> BilevelState:
        state = solver.init(shape.start, jax.tree.map(lambda leaf: leaf[0], one))
        return jax.jit(lambda state: lax.scan(lambda s, b: (solver.update(s, b), None), state, one)[0])(state)

    floor, soba = after(SOLVERS["floor"](shape)), after(SOLVERS["soba"](shape))
    assert int(floor.step) == int(soba.step) == 50
    for theirs, ours, start in zip(floor.vars, soba.vars, shape.start, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-6)
        assert np.abs(ours - (0 if start is None else start)).max() > 1e-3


@pytest.mark.usefixtures("optimised")
def test_counter_sees_the_copies_of_a_naive_table():
    table, rows = jnp.zeros((64, 128), jnp.float32), jnp.arange(10) % 64

    def naive(table, rows):
        def body(carry, i):
            table, total = carry
            old = lax.dynamic_index_in_dim(table, i, keepdims=False)
            return (lax.dynamic_update_index_in_dim(table, 2 * old + 1, i, 0), total + old), None

        return lax.scan(body, (table, jnp.zeros(128, jnp.float32)), rows)[0]

    text = build(jax.jit(naive, donate_argnums=0), table, rows).text
    assert copies(text, [table]) > 0
    assert copies(text, [jnp.zeros((64, 129), jnp.float32), jnp.zeros((64, 128), jnp.int32)]) == 0


@pytest.mark.parametrize(
    ("line", "count"),
    [
        ("  %copy.1 = f32[8,3]{1,0} copy(%x)", 1),
        ('  %copy.1 = f32[3,8]{0,1:T(8,128)} copy(%x), metadata={op_name="a"}', 1),
        ("  %s = (f32[24]{0}, f32[24]{0}, u32[]{:S(2)}) copy-start(%x)", 1),
        ("  %d = f32[24]{0} copy-done(%s)", 0),
        ("  %copy.1 = f32[8,4]{1,0} copy(%x)", 0),
        ("  %copy.1 = s32[8,3]{1,0} copy(%x)", 0),
        ("  %copy_fusion = f32[8,3]{1,0} fusion(%copy.1), calls=%fused_copy", 0),
    ],
)
def test_copies_are_told_by_size_and_type(line, count):
    assert copies(line, [jnp.zeros((8, 3), jnp.float32)]) == count


def test_interleaving_alternates_and_divides_by_steps():
    calls = []

    def tick(name: str):
        return lambda carry: calls.append(name) or carry + 1

    programs = {name: Program(tick(name), 0, steps) for name, steps in (("a", 1), ("b", 4))}
    times = interleave(programs, repeats=2, least_seconds=0.0)
    assert calls == ["a", "b", "a", "b", "b", "a"]  # a warm-up, then one order and its reverse
    assert programs["a"].carry == 3
    assert times["a"].wall.shape == times["b"].process.shape == (2,)
    twice = Times(2 * times["a"].wall, 3 * np.ones(2))
    assert twice.over(Times(times["a"].wall, np.ones(2))) == (pytest.approx(2), pytest.approx(3))


@pytest.mark.skipif(not CAN_PIN, reason="this system cannot pin a process to a core")
def test_pinning_ends_with_the_block():
    before = os.sched_getaffinity(0)
    with pinned(True):
        assert len(os.sched_getaffinity(0)) == 1
    assert os.sched_getaffinity(0) == before


def test_nonsense_is_refused(tmp_path):
    with pytest.raises(ValueError, match="repeats: got 0"):
        main(["--repeats", "0", "--out", str(tmp_path)])


@thinned("name", SOLVERS, "floor", "saba")
def test_options_name_every_case(name):
    assert name == "floor" or name in Settings().solvers
    assert Settings().shapes == tuple(SHAPES) == tuple(QUICK) == tuple(FULL)
    shape = SHAPES["cleaning"](QUICK["cleaning"])
    solver = SOLVERS[name](shape)
    batches = samplers.uniform(BATCH).batches(shape.data, jax.random.key(0), 0, solver.draws)
    state = solver.init(shape.start, batches)
    after = jax.eval_shape(solver.update, state, batches)
    assert jax.tree.structure(after) == jax.tree.structure(state)
