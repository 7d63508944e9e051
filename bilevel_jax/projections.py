"""Constraints and nonsmooth terms as links of an `optax.chain`: put them last."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from bilevel_jax.types import Array, PyTree, Schedule


def project(projection: Callable[[PyTree], PyTree]) -> optax.GradientTransformation:
    """Projected steps: the iterate after the step is ``projection(params + updates)``.

    A constraint on the inner variable makes ``z*`` solve a variational inequality, so that ``v*`` of the unconstrained
    formula is wrong wherever the constraint is active: use it on the outer variable, or unroll.

    Args:
        projection: maps a pytree to one of the same structure, shapes and dtypes.

    Raises:
        ValueError: (when traced) if ``params`` is missing, or the projection changes structure, shape or dtype.

    Example:
        >>> opt = optax.chain(optax.sgd(1.0), project(lambda x: jnp.clip(x, 0.0, 1.0)))
        >>> x = jnp.array([0.5, 0.5])
        >>> updates, _ = opt.update(jnp.array([2.0, 0.25]), opt.init(x), x)
        >>> [float(v) for v in optax.apply_updates(x, updates)]
        [0.0, 0.25]
    """

    def update(updates: PyTree, state: optax.EmptyState, params: PyTree | None = None) -> tuple[PyTree, optax.EmptyState]:
        return _land(projection, updates, params), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)  # type: ignore[arg-type]


class ProxState(NamedTuple):
    """What `prox` keeps."""

    steps: Array  # int32 [], number of steps done


def prox(operator: Callable[[PyTree, Array | float], PyTree], step_size: Schedule) -> optax.GradientTransformation:
    """Proximal steps: the iterate after the step is ``operator(params + updates, step_size)``.

    Args:
        operator: ``(point, step) -> argmin_u r(u) + |u - point|^2 / (2 step)``, keeping structure, shapes and dtypes.
        step_size: the step of the gradient part: a number or a schedule of the number of applications.

    Raises:
        ValueError: (when traced) if ``params`` is missing, or the operator changes structure, shape or dtype.

    Example:
        >>> def soft(v, step):
        ...     return jnp.sign(v) * jnp.maximum(jnp.abs(v) - step, 0.0)
        >>> opt = optax.chain(optax.sgd(0.5), prox(soft, 0.5))
        >>> z = jnp.array([1.0, 0.25])
        >>> updates, _ = opt.update(jnp.zeros(2), opt.init(z), z)
        >>> [float(v) for v in optax.apply_updates(z, updates)]
        [0.5, 0.0]
    """

    def init(params: PyTree) -> ProxState:
        del params
        return ProxState(jnp.zeros((), jnp.int32))

    def update(updates: PyTree, state: ProxState, params: PyTree | None = None) -> tuple[PyTree, ProxState]:
        step = step_size(state.steps) if callable(step_size) else step_size
        return _land(lambda point: operator(point, step), updates, params), ProxState(state.steps + 1)

    return optax.GradientTransformation(init, update)  # type: ignore[arg-type]


def _land(operator: Callable[[PyTree], PyTree], updates: PyTree, params: PyTree | None) -> PyTree:
    """The updates that lead from ``params`` to ``operator(params + updates)``."""
    if params is None:
        raise ValueError("params: got None, expected the current iterate, which a projection or prox needs")
    point = jax.tree.map(lambda p, u: (p + u).astype(p.dtype), params, updates)
    landed = operator(point)
    shapes = [jax.tree.map(lambda a: jax.ShapeDtypeStruct(jnp.shape(a), jnp.result_type(a)), t) for t in (landed, point)]
    if jax.tree.structure(shapes[0]) != jax.tree.structure(shapes[1]) or jax.tree.leaves(shapes[0]) != jax.tree.leaves(
        shapes[1]
    ):
        raise ValueError(f"operator: got an output of {shapes[0]}, expected {shapes[1]}, as its input")
    return jax.tree.map(jnp.subtract, landed, params)
