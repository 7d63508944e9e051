"""Where optax is called.

Under standard dtype promotion, because several of its parts (adam, debiased ema, cosine schedules) break under the strict
promotion that the rest of this library keeps.
"""

from typing import Any

import jax
import optax

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
