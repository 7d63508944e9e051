"""The tiers of tests: what has no case in `make test` is listed here, with the test that `make test` runs instead."""

from fnmatch import fnmatch
from pathlib import Path

import pytest

from tests.conftest import COLLECTED
from tests.tables import KINDS, SOLVERS, thinned
from tests.test_sabotage import CHANGED, FIRST_ORDER_FAULTS

COMMAND = "test_experiments.py::test_files_and_columns"
GOLDEN = "test_closed_forms.py::test_golden_trajectory"
#: Tests that have no default case: pattern -> the default test nearest to it, and why the default tier leaves it out.
ONLY_MORE = {
    # Processes, pages, and the experiments, of whose commands one runs by default
    "test_ray.py::*": ("test_cluster.py::test_a_worker_that_is_restored_was_merely_late", "kills processes"),
    "test_multihost.py::test_*": ("test_parallel.py::test_a_run_on_dealt_shares_equals_one_device", "two processes"),
    "test_checkpoints.py::test_kill*": ("test_checkpoints.py::test_taken_up_after_an_error", "kills processes"),
    "test_notebooks.py::test_runs": ("test_notebooks.py::test_committed_outputs", "starts kernels"),
    "test_benchopt_plugin.py::test_*": ("test_benchopt_plugin.py::test_results_survive_*", "commands, and a second library"),
    "test_migration.py::*_closed_forms": ("test_docs.py::test_blocks_run_in_order", "the longest page"),
    "test_release.py::test_imports_of_the_exp*": ("test_release.py::test_import_touches_no_*", "imports every experiment"),
    "*::test_command*": (COMMAND, "a whole command"),
    "*::test_experiment": (COMMAND, "a whole command"),
    "*::test_data_cleaning": (COMMAND, "a whole command"),
    "test_experiments.py::test_*": (COMMAND, "a whole command"),
    "test_grid.py::test_*": (COMMAND, "searches"),
    "test_speed*.py::test_*": (COMMAND, "programs of the comparisons of speed"),
    "test_asynchronous.py::test_*": ("test_asynchronous.py::test_toy_falls", "a whole command, threads and searches"),
    "test_architecture_search.py::test_*": ("test_architecture_search.py::test_momentum_*", "compiles a network"),
    "test_claims.py::test_*": ("test_claims.py::test_a_changed_number_changes_the_verdict", "reads every saved result"),
    "test_few_shot.py::test_*": ("test_tasks.py::test_finite_differences_on_a_convolution_network", "compiles a network"),
    "test_hyper_representation.py::test_*": ("test_hyper_representation.py::test_unrolled_is_the_*", "many samples"),
    "test_learned_*::test_the_real_messages": ("test_learned_*::test_derivatives", "a real data set"),
    "test_maml_theory.py::test_*": ("test_maml_theory.py::test_closed_form_is_the_gradient_*", "long runs"),
    "test_nonconvex.py::test_*": ("test_nonconvex.py::test_counts", "long runs"),
    "test_rates_experiment.py::test_*": ("test_rates_experiment.py::test_cold_v_stalls", "long runs"),
    "test_data.py::test_real_*": ("test_data.py::test_real_covtype_sample", "a large data set"),
    # Long runs, of which a shorter one is near
    "test_checkpoints.py::test_halved_rates_*": ("test_guard.py::test_lanes_halve_on_their_own", "long runs"),
    "test_checkpoints.py::test_a_stream_is_taken_up": ("test_streaming.py::test_a_stream_from_files_*", "long runs"),
    "test_parallel.py::test_a_long_run_*": ("test_checkpoints.py::test_finished_and_extended", "long runs on devices"),
    "test_cluster.py::test_a_master_that_is_*": ("test_cluster.py::test_a_master_that_was_*", "every message, one by one"),
    "test_cluster.py::test_a_worker_that_keeps_*": ("test_cluster.py::test_waiting_is_bounded_*", "waits"),
    "test_streaming.py::test_memory_*": ("test_streaming.py::test_batches_are_read_*", "large files"),
    "test_adbo.py::test_the_optimal_value_*": ("test_adbo.py::test_with_one_round_no_point_*", "solves many programs"),
    "test_adbo.py::test_the_toy_ends_*": ("test_adbo.py::test_the_simulator_is_the_sequential_reference", "long runs"),
    "test_fednest.py::test_without_the_correction_*": ("test_fednest.py::test_it_ends_where_*", "long runs"),
    "test_gossip.py::test_constant_steps_*": ("test_gossip.py::test_d_soba_is_its_numpy_reference", "long runs"),
    "test_identities.py::test_saga_in_float32_*": ("test_contract.py::test_estimates_are_kept_in_float32_*", "long runs"),
    "test_lower_bounds.py::test_accbio_against_numpy": (GOLDEN, "long runs"),
    "test_lower_bounds.py::test_chain_of_the_solver": ("test_lower_bounds.py::test_chain_in_rational_*", "four programs"),
    "test_lower_bounds.py::test_convex_bound": ("test_lower_bounds.py::test_closed_forms", "long runs"),
    "test_lower_bounds.py::test_optimum_of_the_worst_case": ("test_lower_bounds.py::test_closed_forms", "long runs"),
    "test_moreau.py::test_an_envelope_*": ("test_double_loop.py::test_inner_problems_that_are_not_solved_*", "long runs"),
    "test_moreau.py::test_meha_among_*": ("test_moreau.py::test_meha_on_a_merely_convex_problem", "long runs"),
    "test_moreau.py::test_unrolling_is_blind_*": ("test_moreau.py::test_meha_on_a_merely_convex_problem", "long runs"),
    "test_projections.py::test_proximal_saba_*": ("test_projections.py::test_projected_saba_*", "long runs"),
    "test_rates.py::test_double_momentum_*": ("test_rates.py::test_variance_reduction_reaches_*", "long runs"),
    "test_rates.py::test_variance_reduction_of_*": ("test_rates.py::test_variance_reduction_reaches_*", "long runs"),
    "test_double_loop.py::test_acceleration_*": ("test_double_loop.py::test_accbio_is_the_scheme_*", "long runs"),
    "test_double_loop.py::test_aid_needs_*": (GOLDEN, "long runs"),
    "test_double_loop.py::test_hoag_to_*": (GOLDEN, "long runs"),
    "test_double_loop.py::test_mean_of_pzobo_*": ("test_hypergrad.py::test_zeroth_order_is_the_gradient_*", "many samples"),
    "test_double_loop.py::test_noiseless_*": ("test_double_loop.py::test_double_momentum_*", "long runs"),
    # Many programs, of which others are near
    "test_double_loop.py::test_amigo_*": (GOLDEN, "one operation at a time"),
    "test_fednest.py::test_rates_may_be_traced_*": ("test_gossip.py::test_the_matrix_may_be_traced", "compiles four times"),
    "test_fednest.py::test_runs_are_jitted_*": ("test_gossip.py::test_runs_are_jitted_mapped_*", "compiles four times"),
    "test_fixed_points.py::test_random_lengths_*": ("test_fixed_points.py::test_a_random_product_*", "many samples"),
    "test_fixed_points.py::test_the_mean_of_pzobo_*": ("test_hypergrad.py::test_zeroth_order_*", "many samples"),
    "test_implicit_root.py::test_derivatives_on_any_*": ("test_implicit_root.py::test_structures_*", "many structures"),
    "test_optimisers.py::test_the_page_is_*": ("test_optimisers.py::test_the_page_has_all_*", "runs every optimiser"),
    "test_first_order.py::test_bda_*": ("test_double_loop.py::test_truncated_gradient_is_its_closed_form", "long paths"),
    "test_hypergrad.py::test_paths_that_*": ("test_hypergrad.py::test_closed_form", "compiles many paths"),
    "test_meta.py::test_anil_is_back_propagation": ("test_meta.py::test_anil_follows_its_formulas", "compiles a network"),
    "test_meta.py::test_the_kept_start_*": ("test_tasks.py::test_a_part_and_the_way_back", "compiles a network"),
    "test_simulate.py::test_the_loops_*": ("test_tasks.py::test_loops_agree", "compiles two loops"),
    "test_tables.py::test_naive_saga_is_saga": ("test_tables.py::test_the_check_finds_*", "only checks a foil of that test"),
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
    """Every entry matches a test, and its stand-in runs by default."""
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
