"""The closed-form quadratic of bilevel_jax as a data set."""
# ruff: noqa: RUF012 (it reads these literals from the source)
# benchopt sets the parameters as attributes.
# pyright: basic, reportAssignmentType=false

import jax
from benchopt import BaseDataset

from bilevel_jax import testing


class Dataset(BaseDataset):
    """Random quadratics whose solution is known.  No usual batch size divides 203 and 149: the last blocks are ragged."""

    name = "simulated"
    parameters = {"inner_samples": [203], "outer_samples": [149], "random_state": [0]}
    requirements = ["pip::bilevel-jax"]
    inner_samples: int
    outer_samples: int
    random_state: int

    def get_data(self):
        """A `bilevel_jax.testing.Quadratic`."""
        key = jax.random.key(self.random_state)
        return {"quadratic": testing.quadratic(key, inner_samples=self.inner_samples, outer_samples=self.outer_samples)}
