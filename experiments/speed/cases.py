"""What a hypergradient to be timed is: arguments, variants that compute it, and a reference."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bilevel_jax.types import Array


class Outcome(NamedTuple):
    """What a variant returns: the hypergradient, and what its library says of it."""

    gradient: Array  # [outer variables]
    residual: Any = jnp.nan  # of the linear system; nan where the library reports none
    code: Any = -1  # int32 [], a `bilevel_jax.Result`; -1 of other libraries


#: ``(z, x, data) -> Outcome``
Function = Callable[..., Outcome]


class Case(NamedTuple):
    """A hypergradient, to be computed by several variants."""

    name: str
    args: tuple  # (z, x, data)
    reference: np.ndarray  # float64 [outer variables]
    variants: Mapping[str, Callable[[], Function]]  # each raises ImportError where its library is not installed
    floor: str  # the variant that times are divided by
    scale: float  # that residuals are divided by
    arrays: Mapping[str, np.ndarray]  # the same for `torch_worker`, which has no jax


def lenient(function: Function) -> Function:
    """For libraries that rely on implicit promotion, which the tests of this repository forbid."""

    def called(*args: Any) -> Outcome:
        with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
            return function(*args)

    return called
