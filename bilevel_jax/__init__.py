"""Bilevel optimization in JAX: solver steps as pure functions, composed from oracles, estimators, optimisers and stages."""

from bilevel_jax import (
    checkpoints,
    checks,
    estimators,
    hypergrad,
    implicit_diff,
    linear_solve,
    moreau,
    nonsmooth,
    oracles,
    parallel,
    precision,
    projections,
    readers,
    samplers,
    solvers,
    tasks,
    testing,
    value_oracles,
)
from bilevel_jax.checkpoints import run_long
from bilevel_jax.hypergrad import hypergradient
from bilevel_jax.implicit_diff import implicit_fixed_point, implicit_root
from bilevel_jax.loop import Carry, begin, resume, run, several, stream
from bilevel_jax.oracles import implicit
from bilevel_jax.results import Result, frozen, guard, spent, worst
from bilevel_jax.solvers import default_opts
from bilevel_jax.stages import assign, solve_aux, solve_inner, unroll
from bilevel_jax.sweep import descend, per_sweep, sweep
from bilevel_jax.types import Batch, BilevelState, Levels, Problem, Solver, Vars

__version__ = "0.1.0"

__all__ = [
    "Batch",
    "BilevelState",
    "Carry",
    "Levels",
    "Problem",
    "Result",
    "Solver",
    "Vars",
    "assign",
    "begin",
    "checkpoints",
    "checks",
    "default_opts",
    "descend",
    "estimators",
    "frozen",
    "guard",
    "hypergrad",
    "hypergradient",
    "implicit",
    "implicit_diff",
    "implicit_fixed_point",
    "implicit_root",
    "linear_solve",
    "moreau",
    "nonsmooth",
    "oracles",
    "parallel",
    "per_sweep",
    "precision",
    "projections",
    "readers",
    "resume",
    "run",
    "run_long",
    "samplers",
    "several",
    "solve_aux",
    "solve_inner",
    "solvers",
    "spent",
    "stream",
    "sweep",
    "tasks",
    "testing",
    "unroll",
    "value_oracles",
    "worst",
]
