"""Strict settings for every test of this folder; the doctests of the package run before, under a user's own settings.

Most of the time of the tests goes into compiling programs that run for a moment, so that they are compiled with little
effort.  Tests that look at programs (`tests.checks.optimised`) compile as users do.
"""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # before jax is imported

import jax
import pytest
from hypothesis import settings

# Also for doctests, whose numbers these leave as they are, and for the processes that tests start.
if jax.__version_info__ < (0, 11):  # a flag that XLA does not know ends the process
    os.environ.setdefault("XLA_FLAGS", "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1")

settings.register_profile("tests", derandomize=True, deadline=None, max_examples=15)
settings.load_profile("tests")

STRICT = {
    "jax_enable_x64": True,
    "jax_numpy_rank_promotion": "raise",
    "jax_numpy_dtype_promotion": "strict",
    "jax_disable_most_optimizations": True,
}


#: Doctests that take seconds.  Other tests cover the same functions by default.
LONG_DOCTESTS = {
    "checkpoints.manager",
    "checkpoints.run_long",
    "distributed.adbo.adbo",
    "distributed.cluster.train",
    "loop.stream",
    "neumann_series.random_neumann",
    "parallel.sharded",
    "parallel.spread",
    "results.spent",
    "samplers.episodes",
    "solvers.first_order.f2sa_p",
    "testing.convex_worst_case",
    "testing.worst_case",
}


#: Names and markers of all tests of a session, before pytest selects some of them.
COLLECTED = pytest.StashKey[list[tuple[str, set[str]]]]()


@pytest.hookimpl(tryfirst=True)  # before pytest selects by marker
def pytest_collection_modifyitems(config, items):
    for item in items:
        if isinstance(item, pytest.DoctestItem) and item.name.removeprefix("bilevel_jax.") in LONG_DOCTESTS:
            item.add_marker(pytest.mark.more)
    config.stash[COLLECTED] = [(item.nodeid, {mark.name for mark in item.iter_markers()}) for item in items]


@pytest.fixture(scope="package", autouse=True)
def strict():
    """float64, no implicit broadcasting between ranks, no implicit promotion of dtypes."""
    before = {name: jax.config.values[name] for name in STRICT}
    for name, value in STRICT.items():
        jax.config.update(name, value)
    yield
    for name, value in before.items():
        jax.config.update(name, value)


@pytest.fixture
def optimised():
    """Programs as users compile them, with their optimisations, in a test that counts copies or follows rounding."""
    name = "jax_disable_most_optimizations"
    before = jax.config.values[name]
    jax.config.update(name, False)
    yield
    jax.config.update(name, before)
