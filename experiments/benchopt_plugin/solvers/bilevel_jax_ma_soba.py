"""MA-SOBA of bilevel_jax, for benchopt."""
# ruff: noqa: RUF012 (benchopt reads these literals from the source)

from benchmark_utils.bilevel_jax_plugin import BilevelSolver

from bilevel_jax import solvers


class Solver(BilevelSolver):
    """Steps ~ t^-1/2; x along a moving average in which a new direction weighs ``theta``."""

    name = "bilevel_jax MA-SOBA"
    requirements = ["pip::bilevel-jax"]
    parameters = {
        "step_size": [0.1],
        "outer_ratio": [1.0],
        "eval_freq": [128],
        "random_state": [1],
        "batch_size": [64],
        "theta": [0.1],
    }

    theta: float

    def build(self, problem, blocks):
        return solvers.ma_soba(problem, self.opts(solvers.ma_soba), theta=self.theta)
