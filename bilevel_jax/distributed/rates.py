"""The step sizes of ADBO, and the schedules of its regularisation."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp

from bilevel_jax import checks
from bilevel_jax.optimisers import value_at
from bilevel_jax.types import Array, Schedule


class Rates(NamedTuple):
    """Step sizes: positive numbers, or functions of the master's iteration.  The estimate's are those of the inner
    variables where they are None."""

    outer: Schedule  # of a worker
    inner: Schedule
    consensus_outer: Schedule  # of the master
    consensus_inner: Schedule
    cut: Schedule  # ascent in the cut multipliers
    consensus: Schedule  # ascent in the consensus multipliers
    estimate_inner: Schedule | None = None
    estimate_consensus: Schedule | None = None
    estimate_multiplier: Schedule | None = None


def filled(rates: Rates) -> Rates:
    """With the estimate's rates where they are None; TypeError, ValueError for what is no step size."""
    if not isinstance(rates, Rates):
        raise TypeError(f"rates: got {type(rates).__name__}, expected Rates(outer=..., inner=..., ...)")
    rates = rates._replace(
        estimate_inner=rates.inner if rates.estimate_inner is None else rates.estimate_inner,
        estimate_consensus=rates.consensus_inner if rates.estimate_consensus is None else rates.estimate_consensus,
        estimate_multiplier=rates.inner if rates.estimate_multiplier is None else rates.estimate_multiplier,
    )
    for name, rate in rates._asdict().items():
        checks.positive(f"rates.{name}", rate, schedule=True)
    return rates


def damping(rate: Schedule, floor: float = 1e-3) -> Callable[[Array], Any]:
    """The schedule ``max(1 / (rate (t + 1)^(1/4)), floor)`` of the theory, for the multipliers that ascend with ``rate``.

    Example:
        >>> [round(float(damping(0.1)(jnp.int32(t))), 3) for t in (0, 15)]
        [10.0, 5.0]
    """
    checks.positive("rate", rate, schedule=True)
    return lambda t: jnp.maximum(1 / (value_at(rate, t) * (t + 1.0) ** 0.25), floor)
