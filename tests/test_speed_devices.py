"""The job for an accelerator: that its floors are the solvers they are floors of, that its counts count, what it writes."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
import pytest

from bilevel_jax import Vars, samplers
from experiments.speed import device_cases, devices
from experiments.speed.__main__ import main
from experiments.speed.device_cases import Size
from experiments.speed.shapes import SHAPES, Sizes

SMALL = Size(Sizes(256, 128, 8, 3), 64)
#: Step sizes of x so large that it moves: a row of "cleaning" carries 1 / 256.
RATES = {"ijcnn1": 1.0, "cleaning": 300.0}


def after(solver, shape, steps, at):
    batch = samplers.full().batches(shape.data, jax.random.key(0), 0, solver.draws)
    state = solver.init(at, batch)
    update = jax.jit(solver.update)
    for _ in range(steps):
        state = update(state, batch)
    return state.vars


@pytest.mark.more
@pytest.mark.parametrize("kind", RATES)
@pytest.mark.parametrize("name", ["aid_cg", "meha"])
def test_floors_are_the_solvers(name, kind):
    shape = SHAPES[kind](SMALL.sizes)._replace(rates=Vars(0.1, 0.1, RATES[kind]))
    solver, by_hand = device_cases.deterministic(name, shape)
    start = shape.start._replace(inner=shape.start.inner + 0.1)
    at = start._replace(aux=jnp.zeros_like(start.inner))  # where both start v and theta
    ours, theirs = after(solver, shape, 3, at), after(by_hand, shape, 3, at)
    for a, b, before in zip(ours, theirs, at, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
        assert np.abs(a - before).max() > 1e-3


@pytest.mark.more
def test_floor_of_maml_is_maml():
    entries = device_cases.maml(devices.QUICK.tasks)
    ends = {name: entry.program.call(entry.program.carry) for name, entry in entries.items()}
    start = jax.tree.leaves(device_cases.meta_cases.network("convolution", devices.QUICK.tasks).params)
    ours, theirs = jax.tree.leaves(ends["maml"].vars.outer), jax.tree.leaves(ends["floor of maml"])
    assert max(np.abs(a - b).max() for a, b in zip(ours, start, strict=True)) > 1e-4
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.more
@pytest.mark.usefixtures("optimised")
def test_counts_are_those_of_xla_where_it_can_count():
    """At a size where products are nearly all."""
    size = Size(Sizes(512, 256, 128, 64), 128)
    shape = SHAPES["cleaning"](size.sizes)
    solver = device_cases.SOLVERS["soba"](shape)
    carry = device_cases.begin(solver, samplers.uniform(size.batch), shape.start, shape.data, jax.random.key(0))
    work = device_cases.products("soba", shape, size, solver, carry)
    assert work.flop == 2 * 128 * 128 * 64 * 6
    assert work.flop < work.xla_flop < 1.1 * work.flop
    # six products read a batch each; z and v of 128 x 64 floats and x of 512 are read and written
    assert work.bytes == 4 * (6 * 128 * 128 + 2 * (2 * 128 * 64 + 512))


@pytest.mark.more
def test_counts_by_hand():
    work = {}
    for name in ("soba", "saba", "srba", "aid_cg"):
        (entry,) = (e for n, e in device_cases.linear("ijcnn1", SMALL, (name,)).items() if n == name)
        assert entry.work is not None
        work[name] = entry.work(entry.program.call(entry.program.carry))
    flop = {name: found.flop / (2 * 8) for name, found in work.items()}  # products times rows
    assert flop["soba"] == flop["saba"] == 64 * 6
    # blocks 4 + 2, so one update in 3 is a pass over 256 and 128 rows, and the others evaluate a batch at two points
    assert flop["srba"] == pytest.approx(64 * 12 * 2 / 3 + (4 * 256 + 2 * 128) / 3)
    # five inner gradients, the linearisation with the cross product, and at least five products in the solver
    assert flop["aid_cg"] >= 256 * (2 * 5 + 2 + 2 * 5) + 128 * 2
    assert flop["aid_cg"] <= 256 * (2 * 5 + 2 + 2 * 8) + 128 * 2
    rows = 4 * (3 * 8 + 8)  # of the tables: z, v and x inside, v outside
    assert work["saba"].bytes == work["soba"].bytes + 2 * rows


@pytest.mark.more
def test_command(tmp_path, capsys):
    given = ["--cases", "logistic", "--solvers", "saba", "meha", "--quick", "--repeats", "2", "--out", str(tmp_path)]
    main(["--device=gpu", *given])
    said = capsys.readouterr().out
    if jax.default_backend() == "cpu":
        assert "no gpu here" in said
        assert "measured on the CPU" in said
    table = pd.read_csv(tmp_path / "devices.csv")
    assert list(table["solver"]) == ["floor", "saba", "floor of meha", "meha"]
    ours = table[table["over_floor"].notna()]
    numbers = ["update_us", "over_floor", "gflop", "gbyte", "flop_share", "byte_share", "gbyte_per_s", "gflop_per_s"]
    assert (ours[numbers].to_numpy() > 0).all()
    assert np.isfinite(ours[numbers].to_numpy()).all()
    expected = ours["gflop"] / (1e-6 * ours["update_us"]) / ours["gflop_per_s"]
    np.testing.assert_allclose(ours["flop_share"], expected, rtol=1e-6)
    assert (table["jax"] == jax.__version__).all()
    assert table["device"].nunique() == table["date"].nunique() == 1
    assert table["finite"].all()
    facts = json.loads((tmp_path / "devices.json").read_text())
    assert facts["ceilings"]["gflop_per_s"] == pytest.approx(table["gflop_per_s"][0])


def test_nonsense_is_refused(tmp_path):
    with pytest.raises(SystemExit, match="--repeats: got 0"):
        main(["--device", "cpu", "--repeats", "0", "--out", str(tmp_path)])
