"""Where optax is called.

Under standard dtype promotion, because several of its parts (adam, debiased ema, cosine schedules) break under the strict
promotion that the rest of this library keeps.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from bilevel_jax.trees import narrow, widen
from bilevel_jax.types import Array, PyTree, Schedule


def moved(opt: optax.GradientTransformation, direction: PyTree, state: PyTree, value: PyTree, outer: PyTree) -> Any:
    """``value`` after a step of an optimiser along ``direction``, and its new state.

    ``outer``, the current x, is given to the optimiser as an extra argument: the weights of a proximal link may depend on it.
    """
    with jax.numpy_dtype_promotion("standard"):
        updates, state = optax.with_extra_args_support(opt).update(direction, state, value, outer=outer)
        return optax.apply_updates(value, updates), state


def value_at(schedule: Schedule, count: Array) -> Any:
    """A schedule after ``count`` steps; a number is itself.  Schedules are users' code, written as for optax."""
    with jax.numpy_dtype_promotion("standard"):
        return schedule(count) if callable(schedule) else schedule


def weight_at(schedule: Schedule, count: Array) -> Any:
    """A weight in [0, 1] after ``count`` steps: values of a schedule, and traced numbers, are clipped."""
    if isinstance(schedule, int | float):
        return schedule
    with jax.numpy_dtype_promotion("standard"):
        return jnp.clip(value_at(schedule, count), 0.0, 1.0)


def moving_average(weight: Schedule) -> optax.GradientTransformation:
    """``mean <- (1 - weight) mean + weight direction``, started at 0, as a link of a chain; it passes on the mean.

    Args:
        weight: of the new direction, a number in [0, 1] or a schedule of the number of applications, clipped to [0, 1].
            1 passes on the direction, exactly.

    Returns:
        A transformation whose mean is kept in float32 at least.
    """

    def update(updates: PyTree, state: optax.EmaState, params: PyTree | None = None) -> tuple[PyTree, optax.EmaState]:
        del params
        old = 1 - weight_at(weight, state.count)

        def leaf(new: Array, mean: Array) -> Array:
            kept = old if isinstance(old, int | float) else old.astype(mean.dtype)
            return (1 - kept) * new + kept * mean

        mean = jax.tree.map(leaf, widen(updates), state.ema)
        return narrow(mean, updates), optax.EmaState(state.count + 1, mean)

    def init(params: PyTree) -> optax.EmaState:
        return optax.EmaState(jnp.zeros((), jnp.int32), jax.tree.map(jnp.zeros_like, widen(params)))

    return optax.GradientTransformation(init, update)  # type: ignore[arg-type]


def in_float32(opt: optax.GradientTransformation) -> optax.GradientTransformation:
    """An optimiser whose state and arithmetic are in float32 at least; its updates have the dtypes of the directions."""

    def update(updates: PyTree, state: PyTree, params: PyTree | None = None) -> tuple[PyTree, PyTree]:
        wide, state = opt.update(widen(updates), state, widen(params))
        return narrow(wide, updates), state

    return optax.GradientTransformation(lambda params: opt.init(widen(params)), update)  # type: ignore[arg-type]
