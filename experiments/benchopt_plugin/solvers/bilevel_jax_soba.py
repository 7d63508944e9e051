"""SOBA of bilevel_jax, for benchopt."""
# ruff: noqa: RUF012 (benchopt reads these literals from the source)

from benchmark_utils.bilevel_jax_plugin import BilevelSolver

from bilevel_jax import solvers


class Solver(BilevelSolver):
    """Steps ~ t^-1/2, on one inner and one outer block an update."""

    name = "bilevel_jax SOBA"
    requirements = ["pip::bilevel-jax"]
    parameters = {"step_size": [0.1], "outer_ratio": [1.0], "eval_freq": [128], "random_state": [1], "batch_size": [64]}

    def build(self, problem, blocks):
        return solvers.soba(problem, self.opts(solvers.soba))
