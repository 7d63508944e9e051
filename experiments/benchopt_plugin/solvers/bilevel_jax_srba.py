"""SRBA of bilevel_jax, for benchopt."""
# ruff: noqa: RUF012 (benchopt reads these literals from the source)

from benchmark_utils.bilevel_jax_plugin import BilevelSolver

from bilevel_jax import solvers


class Solver(BilevelSolver):
    """Constant steps; a full pass every ``period_frac * (inner + outer blocks)`` updates."""

    name = "bilevel_jax SRBA"
    requirements = ["pip::bilevel-jax"]
    parameters = {
        "step_size": [0.1],
        "outer_ratio": [1.0],
        "eval_freq": [128],
        "random_state": [1],
        "batch_size": [64],
        "period_frac": [0.5],
    }

    period_frac: float

    def build(self, problem, blocks):
        period = max(1, int(self.period_frac * sum(blocks)))
        return solvers.srba(problem, self.opts(solvers.srba), period=period)
