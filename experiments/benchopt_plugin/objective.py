"""A small benchmark for the plug-in: the closed-form quadratic, given to the solvers as functions of a range of samples."""
# ruff: noqa: RUF012 (it reads these literals from the source)
# benchopt calls these methods with the names that a data set gives.
# pyright: basic, reportAssignmentType=false

from functools import partial
from typing import Any

import jax
from benchopt import BaseObjective

from bilevel_jax import Vars
from bilevel_jax.testing import Quadratic
from bilevel_jax.types import Array, Loss, PyTree


def on_ranges(loss: Loss, data: PyTree):
    """``(z, x, start, batch_size)``: the mean of a loss over so many samples from ``start`` on."""

    @partial(jax.jit, static_argnames="batch_size")
    def function(z: PyTree, x: PyTree, start: Array | int = 0, batch_size: int = 1) -> Array:
        rows = jax.tree.map(lambda leaf: jax.lax.dynamic_slice_in_dim(leaf, start, batch_size), data)
        return loss(z, x, rows).mean()

    return function


class Objective(BaseObjective):
    """``value = h(x) - h*``, ``gradient_norm = |grad h(x)|`` and ``inner_error = |z - z*(x)|``, in closed form."""

    name = "bilevel quadratic"
    requirements = ["pip::bilevel-jax"]
    min_benchopt_version = "1.10"

    def set_data(self, quadratic: Quadratic) -> None:
        """Keeps the problem; its metrics are compiled once."""
        self.quadratic, self.metrics = quadratic, jax.jit(quadratic.metrics)

    def get_objective(self) -> dict[str, Any]:
        """What a solver gets: the interface that the plug-in is written for."""
        q = self.quadratic
        return {
            "f_inner": on_ranges(q.problem.inner, q.data.inner),
            "f_outer": on_ranges(q.problem.outer, q.data.outer),
            "n_inner_samples": len(q.data.inner["A"]),
            "n_outer_samples": len(q.data.outer["B"]),
            "inner_var0": q.start.inner,
            "outer_var0": q.start.outer,
        }

    def evaluate_result(self, inner_var: PyTree, outer_var: PyTree) -> dict[str, float]:
        """The metrics of what a solver returns."""
        found = self.metrics(Vars(inner_var, None, outer_var))
        return {
            "value": float(found["suboptimality"]),
            "gradient_norm": float(found["gradient_norm"]),
            "inner_error": float(found["inner_error"]),
        }

    def get_one_result(self) -> dict[str, PyTree]:
        """The start, for ``benchopt test``."""
        return {"inner_var": self.quadratic.start.inner, "outer_var": self.quadratic.start.outer}
