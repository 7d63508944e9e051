"""Times of first-order methods: that the table is complete, its counts those of the runs, and what is absent named."""

import os
import sys

import numpy as np
import pandas as pd
import pytest

from experiments.nonconvex_methods import KNOWN, Method, meha
from experiments.nonconvex_problems import merely_convex
from experiments.speed.__main__ import main
from experiments.speed.first_order import Settings, best, boat, updates

TORCH_PYTHON = os.environ.get("TORCH_PYTHON", sys.executable)
NOTES, MEHA = KNOWN["merely_convex"], Method(meha, {})


@pytest.mark.more
def test_the_best_setting_is_the_one_of_the_fewest_calls():
    """36 updates at the first setting; the second gets there later, the third not at all."""
    row = best(MEHA, merely_convex(3), [NOTES | {"alpha": 0.02}, NOTES, NOTES | {"c": 1e6}], Settings(limit=200))
    assert row["setting"] == NOTES
    assert (row["reached"], row["updates"], row["calls"]) == (True, 36, 216.0)
    end = updates(MEHA, merely_convex(5), row)(merely_convex(5).start, None)
    assert 1e-3 < float(merely_convex(5).error(end.inner, end.outer)) <= 0.01


def test_what_does_not_get_there_is_said():
    row = best(MEHA, merely_convex(3), [NOTES | {"c": 1e6}], Settings(limit=50))
    assert (row["reached"], row["updates"]) == (False, 50)


@pytest.mark.more
def test_command_writes_a_complete_table(tmp_path):
    main(
        ["first_order", "--problems", "merely_convex", "--dim", "4", "--limit", "60", "--repeats", "1", "--out", str(tmp_path)]
    )
    table = pd.read_csv(tmp_path / "first_order.csv").set_index("method")
    assert {"MEHA", "MEHA, p = 1/4", "BOME", "F2SA-2", "AID-CG"} <= set(table.index)
    assert table.loc["MEHA", "updates"] <= 45
    assert table.loc["MEHA", "update_over_meha"] == 1
    assert np.isinf(table.loc["AID-CG", "to_accuracy_ms"]), "the Hessian of the inner loss is singular"
    assert (table["update_us"] > 0).all()


def test_the_other_library_solves_the_same_problem():
    case = {"problem": "merely_convex", "dim": 3, "accuracy": 0.01, "limit": 200}
    case |= {"alpha": 0.1, "beta": 0.3, "eta": 0.5, "gamma": 5.0, "c_low": 0.5}
    with boat(TORCH_PYTHON, case) as (said, run):
        if run is None:
            pytest.skip(f"boat-torch: {said['left_out']}")
        assert said["updates"] < 200
        np.testing.assert_allclose(said["end"], 1, atol=0.01)
        run(True, None)
        run(False, None)


def test_an_absent_library_is_named(tmp_path):
    """An interpreter without it: isolated from all packages."""
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" -S -I "$@"\n')
    python.chmod(0o755)
    with boat(str(python), {"problem": "sine"}) as (said, run):
        assert run is None
        assert "torch" in said["left_out"]
