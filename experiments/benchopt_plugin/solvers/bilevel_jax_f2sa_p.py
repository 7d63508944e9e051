"""F2SA-p of bilevel_jax, for benchopt."""
# ruff: noqa: RUF012 (benchopt reads these literals from the source)

from benchmark_utils.bilevel_jax_plugin import BilevelSolver

from bilevel_jax import solvers


class Solver(BilevelSolver):
    """Constant steps; gradients only, ``inner_steps`` of them on each of the p perturbed inner problems."""

    name = "bilevel_jax F2SA-p"
    requirements = ["pip::bilevel-jax"]
    parameters = {
        "step_size": [0.1],
        "outer_ratio": [1.0],
        "eval_freq": [128],
        "random_state": [1],
        "batch_size": [64],
        "multiplier": [100.0],
        "order": [2],
        "inner_steps": [10],
    }

    multiplier: float
    order: int
    inner_steps: int

    def build(self, problem, blocks):
        own = {"multiplier": self.multiplier, "order": self.order, "inner_steps": self.inner_steps}
        return solvers.f2sa_p(problem, self.two(solvers.f2sa_p), **own)
