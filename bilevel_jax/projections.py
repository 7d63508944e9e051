"""Constraints and nonsmooth terms as links of an `optax.chain`: put them last."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from bilevel_jax import checks
from bilevel_jax.nonsmooth import Nonsmooth
from bilevel_jax.optimisers import value_at
from bilevel_jax.types import Array, PyTree, Schedule


def project(projection: Callable[[PyTree], PyTree]) -> optax.GradientTransformation:
    """Projected steps: the iterate after the step is ``projection(params + updates)``.

    A constraint on the inner variable makes ``z*`` solve a variational inequality, so that ``v*`` of the unconstrained
    formula is wrong wherever the constraint is active: use it on the outer variable, in methods without v, or unroll.

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


def prox(
    operator: Nonsmooth | Callable[[PyTree, Array | float], PyTree], step_size: Schedule
) -> optax.GradientTransformationExtraArgs:
    """Proximal steps: the iterate after the step is ``operator(params + updates, step_size)``.

    Args:
        operator: a term of `bilevel_jax.nonsmooth`, whose weights may depend on the current x; or a function
            ``(point, step) -> argmin_u r(u) + |u - point|^2 / (2 step)``, keeping structure, shapes and dtypes.
        step_size: the step of the gradient part: a number or a schedule of the number of applications.

    Raises:
        ValueError: (when traced) if ``params`` is missing, or the operator changes structure, shape or dtype.

    Example:
        >>> from bilevel_jax.nonsmooth import l1
        >>> opt = optax.chain(optax.sgd(0.5), prox(l1(1.0), 0.5))
        >>> z = jnp.array([1.0, 0.25])
        >>> updates, _ = opt.update(jnp.zeros(2), opt.init(z), z)
        >>> [float(v) for v in optax.apply_updates(z, updates)]
        [0.5, 0.0]
    """

    if isinstance(operator, Nonsmooth):
        apply = operator.prox
    else:
        plain = operator
        apply = lambda point, step, outer: plain(point, step)  # noqa: E731

    def init(params: PyTree) -> ProxState:
        del params
        return ProxState(jnp.zeros((), jnp.int32))

    def update(
        updates: PyTree, state: ProxState, params: PyTree | None = None, *, outer: PyTree = None, **others: Any
    ) -> tuple[PyTree, ProxState]:
        del others
        step = value_at(step_size, state.steps)
        return _land(lambda point: apply(point, step, outer), updates, params), ProxState(state.steps + 1)

    return optax.GradientTransformationExtraArgs(init, update)  # type: ignore[arg-type]


class _ProximalUpdate(NamedTuple):
    """An optax update that says which term it ends with."""

    apply: Callable[..., Any]
    term: Nonsmooth

    def __call__(self, updates: PyTree, state: PyTree, params: PyTree | None = None, **others: Any) -> Any:
        return self.apply(updates, state, params, **others)


def proximal_sgd(rate: Schedule, term: Nonsmooth) -> optax.GradientTransformationExtraArgs:
    """Proximal gradient steps, ``prox_{rate r(., x)}(z - rate direction)``: the gradient and the prox take one step size.

    Args:
        rate: a number or a schedule of the number of applications.
        term: r, of `bilevel_jax.nonsmooth`; its weights are taken at the current x.

    Raises:
        TypeError: for anything but a ``Nonsmooth``; ValueError: (when traced) for an operator that changes structure, shape or
            dtype.

    Example:
        >>> from bilevel_jax.nonsmooth import l1
        >>> from bilevel_jax.optimisers import moved
        >>> opt, z = proximal_sgd(0.5, l1(lambda x: x)), jnp.array([1.0, 0.25])
        >>> moved(opt, jnp.zeros(2), opt.init(z), z, outer=jnp.array([1.0, 1.0]))[0].tolist()
        [0.5, 0.0]
    """
    if not isinstance(term, Nonsmooth):
        raise TypeError(f"term: got {type(term).__name__}, expected a term of bilevel_jax.nonsmooth")
    steps = optax.chain(optax.sgd(rate), prox(term, rate))  # type: ignore[arg-type]
    return optax.GradientTransformationExtraArgs(steps.init, _ProximalUpdate(steps.update, term))


def term_of(opt: Any) -> Nonsmooth | None:
    """The term of an optimiser that `proximal_sgd` made, None of any other."""
    return getattr(getattr(opt, "update", None), "term", None)


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
        raise ValueError(f"operator: got an output of {checks.cut(shapes[0])}, expected {checks.cut(shapes[1])}, as its input")
    return jax.tree.map(jnp.subtract, landed, params)
