"""The table of all solvers, and the small problem they are tested on: adding a solver adds a row here."""

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
import pytest

from bilevel_jax import Batch, BilevelState, Problem, Solver, Vars, samplers, solvers
from bilevel_jax.samplers import Sampler
from bilevel_jax.testing import Quadratic, quadratic

THETA, PERIOD, PROBABILITY = 0.3, 4, 0.3  # of MA-SOBA, SRBA and SPABA
STEPS = Vars(0.2, 0.2, 0.1)

#: name -> (problem, opts) -> solver.
SOLVERS: dict[str, Callable[[Problem, Vars], Solver]] = {
    "soba": solvers.soba,
    "ma_soba": partial(solvers.ma_soba, theta=THETA),
    "saba": solvers.saba,
    "srba": partial(solvers.srba, period=PERIOD),
    "spaba": partial(solvers.spaba, probability=PROBABILITY),
    "storm_soba": solvers.storm_soba,
    "fsla": solvers.fsla,
}

every_solver = pytest.mark.parametrize("name", SOLVERS)


def build(name: str, problem: Problem, steps: Vars = STEPS) -> Solver:
    """The solver of a row, with optax.sgd of the given step sizes."""
    return SOLVERS[name](problem, Vars(*map(optax.sgd, steps)))


@cache
def small() -> Quadratic:
    """The quadratic of most suites, in float64.  One for all: its making is a hundred small compilations."""
    return quadratic(
        jax.random.key(0), inner_dim=5, outer_dim=3, inner_samples=32, outer_samples=32, noise=0.1, dtype=jnp.float64
    )


def ragged() -> Sampler:
    """Draws of `small` with 3 inner blocks (12, 12 and 8 rows) and 4 outer ones (9, 9, 9 and 5 rows)."""
    return samplers.uniform(12, outer_batch_size=9)


@cache
def donated_update(name: str) -> Callable[[BilevelState, Batch], BilevelState]:
    """The compiled update of a solver on `small`, with a donated state: compiled once for all suites."""
    return jax.jit(build(name, small().problem).update, donate_argnums=0)


@cache
def stream(draws: int, count: int = 20, seed: int = 7) -> list[Batch]:
    """The batches of ``count`` updates on `small`, those that `bilevel_jax.run` would make of the same key."""
    draw = jax.jit(lambda start: ragged().batches(small().data, jax.random.key(seed), start, draws))
    return [draw(jnp.int32(t * draws)) for t in range(count)]


def distance(a: Any, b: Any) -> float:
    """The largest difference between two trees of one structure; None against None is none."""
    gaps = jax.tree.map(lambda u, w: jnp.abs(u - w).max(initial=0.0), a, b)
    return max((float(gap) for gap in jax.tree.leaves(gaps)), default=0.0)
