"""AID of bilevel_jax, for benchopt."""
# ruff: noqa: RUF012 (benchopt reads these literals from the source)

from benchmark_utils.bilevel_jax_plugin import BilevelSolver

from bilevel_jax import linear_solve, solvers


class Solver(BilevelSolver):
    """All the data in every update: ``inner_steps`` on z, ``linear_steps`` of conjugate gradients for v, one on x."""

    name = "bilevel_jax AID"
    requirements = ["pip::bilevel-jax"]
    parameters = {
        "step_size": [0.1],
        "outer_ratio": [1.0],
        "eval_freq": [16],
        "random_state": [1],
        "inner_steps": [10],
        "linear_steps": [10],
    }

    inner_steps: int
    linear_steps: int

    def build(self, problem, blocks):
        linear_solver = linear_solve.cg(max_steps=self.linear_steps)
        return solvers.aid_bio(problem, self.two(solvers.aid_bio), inner_steps=self.inner_steps, linear_solver=linear_solver)
