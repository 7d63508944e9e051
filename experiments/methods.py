"""The solvers of the comparisons, by name: how each is built from a step size, a ratio and the numbers of blocks."""

from collections.abc import Callable
from typing import Literal, NamedTuple

from bilevel_jax import Levels, Problem, Solver, Vars, default_opts, solvers

Name = Literal["soba", "ma_soba", "saba", "srba", "spaba", "storm_soba", "fsla"]


class Rates(NamedTuple):
    """Step size of z and v, and its ratio to the step size of x."""

    step_size: float
    outer_ratio: float

    def opts(self, solver: Callable[..., Solver]) -> Vars:
        """The schedules of the solver's paper, from these numbers."""
        return default_opts(solver, self.step_size, self.step_size, self.step_size / self.outer_ratio)


class Method(NamedTuple):
    """``build(problem, rates, blocks) -> Solver``; ``coin`` marks methods whose lanes branch differently under vmap."""

    build: Callable[[Problem, Rates, Levels], Solver]
    coin: bool = False


def _plainly(make: Callable[..., Solver]) -> Method:
    return Method(lambda problem, rates, blocks: make(problem, rates.opts(make)))


METHODS: dict[str, Method] = {
    "soba": _plainly(solvers.soba),
    "ma_soba": _plainly(solvers.ma_soba),
    "saba": _plainly(solvers.saba),
    # A full pass every (n + m) / (2 batch) steps: period_frac = .5, the public benchmark's default, and its best on IJCNN1
    # (on covtype and MNIST its best are 8 and 512, that is, hardly any full pass; not followed here).
    "srba": Method(
        lambda problem, rates, blocks: solvers.srba(
            problem, rates.opts(solvers.srba), period=max(1, (blocks.inner + blocks.outer) // 2)
        )
    ),
    # The same number of full passes on average.
    "spaba": Method(
        lambda problem, rates, blocks: solvers.spaba(
            problem, rates.opts(solvers.spaba), probability=2 / (blocks.inner + blocks.outer)
        ),
        coin=True,
    ),
    "storm_soba": _plainly(solvers.storm_soba),
    # eta = 1 / sqrt(t + 1), the paper's schedule; the public benchmark scales it by the step size.
    "fsla": _plainly(solvers.fsla),
}
