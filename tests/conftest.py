"""Strict settings for every test of this folder; the doctests of the package run before, under a user's own settings."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # before jax is imported

import jax
import pytest
from hypothesis import settings

settings.register_profile("tests", derandomize=True, deadline=None, max_examples=15)
settings.load_profile("tests")

STRICT = {
    "jax_enable_x64": True,
    "jax_numpy_rank_promotion": "raise",
    "jax_numpy_dtype_promotion": "strict",
    "jax_disable_most_optimizations": True,  # compiles in half the time; test_tables, which looks at programs, undoes it
}


@pytest.fixture(scope="package", autouse=True)
def strict():
    """float64, no implicit broadcasting between ranks, no implicit promotion of dtypes."""
    before = {name: jax.config.values[name] for name in STRICT}
    for name, value in STRICT.items():
        jax.config.update(name, value)
    yield
    for name, value in before.items():
        jax.config.update(name, value)
