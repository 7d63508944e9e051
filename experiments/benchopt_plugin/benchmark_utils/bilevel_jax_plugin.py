"""Solvers of bilevel_jax in the form of benchopt, for objectives that are functions of a range of samples.

What the objective passes to a solver is all that is assumed: ``f_inner(z, x, start, batch_size)`` and ``f_outer`` alike, each
the mean over the samples start ... start + batch_size - 1 as a pure JAX function with a static ``batch_size``; the numbers of
samples ``n_inner_samples`` and ``n_outer_samples``; and the starts ``inner_var0`` and ``outer_var0``, arrays or pytrees.  The
result of a solver is ``inner_var`` and ``outer_var``.

A sample of the library is here a *block* of samples of the objective, and the data are the numbers of the blocks.
"""
# benchopt calls these methods with the names that an objective gives, and sets parameters as attributes.
# pyright: basic, reportAssignmentType=false

from abc import abstractmethod
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from benchopt import BaseSolver
from benchopt.stopping_criterion import NoCriterion

from bilevel_jax import Levels, Problem, Solver, Vars, begin, checks, default_opts, resume, samplers
from bilevel_jax.types import Array, Loss, PyTree

#: ``(z, x, start, batch_size=...) -> scalar``.
RangeLoss = Callable[..., Array]


def block_loss(function: RangeLoss, samples: int, size: int) -> Loss:
    """The loss ``(z, x, blocks)`` of one block of ``size`` samples, or of all the blocks, from a function of a range.

    Blocks are weighed by their samples, so that their mean is the mean over the samples, exactly, with a ragged last block
    too: ``blocks * rows / samples`` times the mean over the rows of a block.

    Args:
        function: ``(z, x, start, batch_size=...) -> scalar``, the mean over that range.
        samples: how many there are.
        size: samples of a block; the last one has ``samples mod size``, where that is not 0.

    Raises:
        ValueError: (when traced) for several blocks that are not all.

    Example:
        >>> f = lambda z, x, start, batch_size: jnp.arange(10.0)[start : start + batch_size].mean()
        >>> [float(block_loss(f, 10, 4)(None, None, jnp.arange(3)))]
        [4.5]
    """
    count, rest = samplers.blocks(samples, size), samples % size

    def loss(z: PyTree, x: PyTree, blocks: Array) -> Array:
        if len(blocks) == count:
            return function(z, x, 0, batch_size=samples)
        if len(blocks) != 1:
            raise ValueError(f"blocks: got {len(blocks)}, expected 1 or all {count}")

        def whole() -> Array:
            return count * size / samples * function(z, x, blocks[0] * size, batch_size=size)

        def last() -> Array:
            return count * rest / samples * function(z, x, samples - rest, batch_size=rest)

        return jax.lax.cond(blocks[0] == count - 1, last, whole) if rest else whole()

    return loss


class BilevelSolver(BaseSolver):
    """Runs a solver of the library in compiled stretches of ``eval_freq`` updates, with an evaluation after each.

    A subclass has ``name``, ``requirements`` and ``parameters``, as literals that benchopt can read where the file cannot be
    imported, and ``build``.  The parameters are ``step_size`` of z and v, ``outer_ratio``, that step size over the one of x,
    ``eval_freq``, ``random_state``, the seed of the draws, those of the solver's own, and ``batch_size``, samples of a block
    at either level: without it every draw is all the data.
    """

    name: str
    step_size: float
    outer_ratio: float
    eval_freq: int
    random_state: int
    sampling_strategy = "callback"
    # A stochastic method may be worse after a stretch than before: only the number of evaluations and the time end a run.
    stopping_criterion = NoCriterion(strategy="callback", key_to_monitor="objective_value")

    @abstractmethod
    def build(self, problem: Problem, blocks: Levels) -> Solver:
        """The solver, for a problem with so many blocks at its levels."""

    def opts(self, make: Callable[..., Solver]) -> Vars:
        """The optimisers of a constructor that steps z, v and x: the schedules of its paper from the parameters."""
        return default_opts(make, self.step_size, self.step_size, self.step_size / self.outer_ratio)

    def two(self, make: Callable[..., Solver]) -> Vars:
        """The same, of a constructor that steps z and x only."""
        return default_opts(make, inner=self.step_size, outer=self.step_size / self.outer_ratio)

    def skip(self, n_inner_samples: int, n_outer_samples: int, **others: Any) -> tuple[bool, str | None]:
        """Refuses a block that is larger than the data."""
        del others
        size, fewest = getattr(self, "batch_size", 1), min(n_inner_samples, n_outer_samples)
        if size > fewest:
            return True, f"batch_size: got {size}, expected at most {fewest}, the samples there are"
        return False, None

    def set_objective(
        self,
        f_inner: RangeLoss,
        f_outer: RangeLoss,
        n_inner_samples: int,
        n_outer_samples: int,
        inner_var0: PyTree,
        outer_var0: PyTree,
    ) -> None:
        """Builds the solver; nothing is compiled yet.

        Raises:
            TypeError, ValueError: for parameters out of range.
        """
        for name in ("step_size", "outer_ratio"):
            checks.positive(name, getattr(self, name))
        checks.positive_int("eval_freq", self.eval_freq)
        size = getattr(self, "batch_size", None)
        if size is not None:
            checks.positive_int("batch_size", size)
        samples = Levels(int(n_inner_samples), int(n_outer_samples))
        sizes = Levels(*(n if size is None else size for n in samples))
        blocks = Levels(*map(samplers.blocks, samples, sizes))
        solver = self.build(Problem(*map(block_loss, (f_inner, f_outer), samples, sizes)), blocks)
        sampler = samplers.full() if size is None else samplers.uniform(1)
        data = Levels(*(jnp.arange(count, dtype=jnp.int32) for count in blocks))
        start, key = Vars(inner_var0, None, outer_var0), jax.random.key(self.random_state)
        self._begin = partial(begin, solver, sampler, start, data, key)
        # The carry is donated, so that no table is copied from stretch to stretch.
        self._advance = jax.jit(lambda carry: resume(solver, sampler, carry, data, steps=self.eval_freq)[0], donate_argnums=0)

    def warm_up(self) -> None:
        """Compiles, off the clock."""
        jax.block_until_ready(self._advance(self._begin()))

    def get_next(self, stop_val: int) -> int:
        """An evaluation after every stretch."""
        return stop_val + 1

    def pre_run_hook(self, stop_val: Any) -> None:
        """The state at the start, off the clock: most of it is tracing for shapes."""
        del stop_val
        self._carry = self._begin()

    def run(self, cb: Callable[[], bool]) -> None:
        """Updates until benchopt has enough."""
        while cb():
            self._carry = jax.block_until_ready(self._advance(self._carry))

    def get_result(self) -> dict[str, PyTree]:
        """The variables as they are, NaN included; copies, because the next stretch overwrites them."""
        z, _, x = jax.tree.map(jnp.copy, self._carry.state.vars)
        return {"inner_var": z, "outer_var": x}
