"""The tiers of tests: what has no case in `make test` is listed here, with the test that `make test` runs instead."""

from fnmatch import fnmatch
from pathlib import Path

import pytest

from tests.conftest import COLLECTED
from tests.tables import KINDS, SOLVERS, thinned
from tests.test_sabotage import CHANGED, FIRST_ORDER_FAULTS

COMMAND = "test_experiments.py::test_files_and_columns"
#: Tests that have no default case: pattern -> the default test nearest to it, and why the default tier leaves it out.
ONLY_MORE = {
    # Processes, commands and pages
    "test_ray.py::*": ("test_cluster.py::test_a_worker_that_is_restored_was_merely_late", "kills processes"),
    "test_multihost.py::test_*": ("test_parallel.py::test_a_run_on_dealt_shares_equals_one_device", "two processes"),
    "test_checkpoints.py::test_kill*": ("test_checkpoints.py::test_taken_up_after_an_error", "kills processes"),
    "test_benchopt_plugin.py::test_the_readme_*": ("test_benchopt_plugin.py::test_blocks_average_to_the_whole", "commands"),
    "test_migration.py::*_closed_forms": ("test_docs.py::test_blocks_run_in_order", "the longest page"),
    "test_release.py::test_imports_of_the_exp*": ("test_release.py::test_import_touches_no_*", "imports every experiment"),
    "*::test_command*": (COMMAND, "a whole command"),
    "*::test_experiment": (COMMAND, "a whole command"),
    "*::test_data_cleaning": (COMMAND, "a whole command"),
    "*::test_interrupted_and_resumed_*": ("test_checkpoints.py::test_taken_up_after_an_error", "a whole command"),
    "test_experiments.py::test_coin_*": (COMMAND, "a whole command"),
    "test_learned_*::test_the_real_messages": ("test_learned_*::test_derivatives", "a real data set"),
    "test_data.py::test_real_*": ("test_data.py::test_real_covtype_sample", "a large data set"),
    "test_optimisers.py::test_the_page_is_what_*": ("test_optimisers.py::test_the_page_has_*", "the longest table"),
    # Long runs, of which a shorter one is near
    "test_checkpoints.py::test_halved_rates_*": ("test_guard.py::test_lanes_halve_on_their_own", "long runs"),
    "test_checkpoints.py::test_a_stream_is_taken_up": ("test_streaming.py::test_a_stream_from_files_*", "long runs"),
    "test_parallel.py::test_a_long_run_*": ("test_checkpoints.py::test_finished_and_extended", "long runs on devices"),
    "test_cluster.py::test_a_master_that_is_*": ("test_cluster.py::test_a_master_that_was_*", "every message, one by one"),
    "test_cluster.py::test_a_worker_that_keeps_*": ("test_cluster.py::test_waiting_is_bounded_*", "waits"),
    "test_double_loop.py::test_acceleration_*": ("test_double_loop.py::test_accbio_is_the_scheme_*", "long runs"),
    "test_double_loop.py::test_aid_needs_*": ("test_closed_forms.py::test_golden_trajectory", "long runs"),
    "test_double_loop.py::test_amigo_*": ("test_closed_forms.py::test_golden_trajectory", "one operation at a time"),
    "test_double_loop.py::test_noiseless_*": ("test_double_loop.py::test_double_momentum_*", "long runs"),
    "test_fednest.py::test_rates_may_be_traced_*": ("test_fednest.py::test_runs_are_jitted_*", "compiles four times"),
    "test_rates.py::test_double_momentum_*": ("test_rates.py::test_variance_reduction_reaches_*", "long runs"),
    "test_tables.py::test_naive_saga_is_saga": ("test_tables.py::test_the_check_finds_*", "only checks a foil of that test"),
    "test_simulate.py::test_the_loops_*": ("test_simulate.py::test_minibatches_of_a_worker_*", "compiles two loops"),
    "test_adbo.py::test_the_optimal_value_*": ("test_adbo.py::test_with_one_round_no_point_*", "solves many programs"),
    "test_grid.py::test_*": ("test_grid.py::test_lanes_are_plain_runs", "searches"),
    "test_maml_theory.py::test_*": ("test_maml_theory.py::test_closed_form_is_the_gradient_*", "long runs"),
    "test_few_shot.py::test_sinusoids_are_learned": ("test_few_shot.py::test_adaptation_at_test_time", "trains"),
    "test_lower_bounds.py::test_*_bound": ("test_lower_bounds.py::test_closed_forms", "long runs"),
    "test_lower_bounds.py::test_optimum_of_the_worst_case": ("test_lower_bounds.py::test_closed_forms", "long runs"),
    "test_lower_bounds.py::test_accbio_against_numpy": ("test_closed_forms.py::test_golden_trajectory", "long runs"),
    "test_projections.py::test_proximal_saba_*": ("test_projections.py::test_projected_saba_*", "long runs"),
    "test_asynchronous.py::test_*": ("test_asynchronous.py::test_toy_falls", "a whole command, threads and searches"),
    "test_architecture_search.py::test_grad*": ("test_architecture_search.py::test_methods_descend", "compiles a network"),
    "test_streaming.py::test_memory_*": ("test_streaming.py::test_batches_are_read_*", "large files"),
    "test_hyper_representation.py::test_*": ("test_hyper_representation.py::test_unrolled_is_the_*", "many samples"),
    "test_rates_experiment.py::test_*": ("test_rates_experiment.py::test_cold_v_stalls", "long runs"),
    "test_claims.py::test_identities_*": ("test_claims.py::test_every_condition_*", "trains"),
    "test_speed_first_order.py::test_the_best_*": ("test_speed_first_order.py::test_what_does_not_get_there_*", "a search"),
    "test_speed_devices.py::test_floor_of_maml_*": ("test_speed_devices.py::test_floors_are_the_solvers", "one case more"),
    "test_speed_devices.py::test_counts_*": ("test_speed_devices.py::test_floors_are_the_solvers", "optimised programs"),
    "test_speed_meta.py::test_another_gradient_*": ("test_speed_meta.py::test_variants_agree_*", "processes"),
    "test_speed_hypergradients.py::test_neumann_*": ("test_speed_hypergradients.py::test_implicit_*", "an eigenvalue"),
}


@pytest.fixture(scope="module")
def tiers(pytestconfig):
    """Case -> its tier, of all tests of this folder."""
    found = {
        name.removeprefix("tests/"): "slow" if "slow" in marks else "more" if "more" in marks else "default"
        for name, marks in pytestconfig.stash[COLLECTED]
        if name.startswith("tests/")
    }
    if {name.split("::")[0] for name in found} != {path.name for path in Path(__file__).parent.glob("test_*.py")}:
        pytest.skip("needs a session that collects the whole suite, such as make test")
    return found


@pytest.fixture(scope="module")
def alone(tiers):
    """Test functions that have cases in `more`, and none by default."""
    functions = {tier: {name.split("[")[0] for name, own in tiers.items() if own == tier} for tier in ("more", "default")}
    return functions["more"] - functions["default"]


def test_what_has_no_default_case_is_listed(alone):
    assert [name for name in sorted(alone) if not any(fnmatch(name, pattern) for pattern in ONLY_MORE)] == []


@pytest.mark.parametrize("pattern", ONLY_MORE)
def test_the_list_is_up_to_date(pattern, alone, tiers):
    """Every entry is needed, and the test that stands in for it runs by default."""
    stand_in, _ = ONLY_MORE[pattern]
    assert any(fnmatch(name, pattern) for name in alone)
    assert any(tier == "default" and fnmatch(name.split("[")[0], stand_in) for name, tier in tiers.items())


def test_faults_of_the_sabotage_suite_are_caught_by_default(tiers):
    """Each changed solver or reference has its golden trajectory in the default tier, and so has all of the suite."""
    for name, *_ in (*CHANGED.values(), *FIRST_ORDER_FAULTS.values()):
        assert tiers[f"test_closed_forms.py::test_golden_trajectory[{name}]"] == "default"
    assert {tier for name, tier in tiers.items() if name.startswith("test_sabotage.py")} == {"default"}


def test_kinds_are_rows():
    assert set(KINDS) < set(SOLVERS)


def test_thinned_marks_all_but_the_default_cases():
    (mark,) = [thinned("case", ("a", "b", "c"), "a", slow=("c",)).mark]
    assert [[m.name for m in case.marks] for case in mark.args[1]] == [[], ["more"], ["slow"]]
    with pytest.raises(AssertionError, match="a default case is not among the cases"):
        thinned("case", ("a", "b"), "d")
    with pytest.raises(AssertionError, match="no default case"):
        thinned("case", ("a", "b"))
