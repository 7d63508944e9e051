"""Where optax is called.

Under standard promotion of dtypes and ranks, because several of its parts (adam, debiased ema, cosine schedules, DoG) break
under the strict promotion that the rest of this library keeps.
"""

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import jax
import jax.numpy as jnp
import optax

from bilevel_jax.trees import narrow, widen
from bilevel_jax.types import Array, PyTree, Schedule


@contextmanager
def _permissive() -> Iterator[None]:
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


def begin(
    name: str, variable: str, opt: optax.GradientTransformation, value: PyTree, outer: PyTree, *, loss: bool, backward: bool
) -> PyTree:
    """The state of an optimiser before its first step, after a check that it can do all its steps.

    One step is traced, not compiled, so that an optimiser that cannot work here is refused before compilation.

    Args:
        name: of the argument that holds the optimiser, such as ``opts.inner``.
        variable: the field of ``Vars`` that it moves.
        opt: the optimiser.
        value: the variable.
        outer: the current x.
        loss: whether `moved` will be given the loss whose gradient is the direction.
        backward: whether the step must have a derivative in reverse mode.

    Raises:
        ValueError: for an optimiser that does not work here, with the reason.
    """

    def step(value: PyTree, state: PyTree, outer: PyTree, loss: bool) -> tuple[PyTree, PyTree]:
        return moved(opt, value, state, value, outer, _squares if loss else None)

    def refusal(got: str, expected: str) -> ValueError:
        return ValueError(f"{name}: got an optimiser of vars.{variable} that {got}, expected {expected}")

    works = "an optax transformation that keeps the structure and the shapes of the variable and of its state"
    try:
        state = initial(opt, value)
        jax.eval_shape(lambda v, s, x: step(v, s, x, loss), value, state, outer)
    except Exception as error:
        if _traces(lambda v, x: _step_of_two(opt, v, x), value, outer):
            raise refusal("moves optax.LookaheadParams, which are two copies", "one that moves the variable itself") from error
        if not loss and _traces(lambda v, x: step(v, initial(opt, v), x, True), value, outer):
            why = f"the direction of {variable} here is not the gradient of a loss that the stage can evaluate"
            raise refusal("needs the value of a loss", f"one that needs only a direction, because {why}") from error
        raise refusal(f"cannot do a step ({_summary(error)})", works) from error
    if backward:
        try:
            jax.eval_shape(lambda v, s, x: jax.vjp(lambda v: step(v, s, x, loss)[0], v)[1](v), value, state, outer)
        except Exception as error:
            raise refusal(
                "has no derivative in reverse mode, such as a line search, whose number of steps is not fixed",
                "one through which the path can be differentiated",
            ) from error
    return state


def initial(opt: optax.GradientTransformation, value: PyTree) -> PyTree:
    """The state of an optimiser before its first step.  Its leaves are arrays that are not weakly typed."""
    with _permissive():
        return jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.result_type(leaf)), opt.init(value))


def moved(
    opt: optax.GradientTransformation,
    direction: PyTree,
    state: PyTree,
    value: PyTree,
    outer: PyTree,
    loss: Callable[[PyTree], Array] | None = None,
) -> Any:
    """``value`` after a step of an optimiser along ``direction``, and its new state, in the dtypes of the old ones.

    The optimiser gets as an extra argument, if its update accepts it, ``outer``, the current x: the weights of a proximal link
    may depend on it.  If it does not work so, and ``direction`` is the gradient of ``loss`` at ``value``, it also gets those
    arguments that optax knows for a loss: ``value``, ``grad``, ``value_fn``, ``obj_fn`` and ``grad_fn``.  For other
    optimisers the loss is not evaluated.

    Raises:
        ValueError: for an optimiser that changes the structure or the shapes of the variable or of its state; whatever the
            optimiser raises.
    """
    offers: list[Callable[[], dict[str, Any]]] = [lambda: {"outer": outer}, dict]  # a chain hands on all that it gets
    if loss is not None:
        offers.append(lambda known=loss: {"outer": outer} | _of_a_loss(known, value, direction))
    failed: list[Exception] = []
    with _permissive():
        for offer in offers:
            try:
                updates, new = opt.update(direction, state, value, **_accepted(opt.update, offer))
                break
            except Exception as error:
                failed.append(error)
        else:
            raise failed[0 if loss is None else -1]  # that of the attempt with the most arguments
        if _form(updates) != _form(value):
            raise ValueError("the updates differ from the variable in structure or in shapes")
        if _form(new) != _form(state):
            raise ValueError("the new state differs from the old one in structure or in shapes")
        new = jax.tree.map(_in_its_dtype, new, state)
        return optax.apply_updates(value, updates), new


def value_at(schedule: Schedule, count: Array) -> Any:
    """A schedule after ``count`` steps; a number is itself.  Schedules are users' code, written as for optax."""
    with _permissive():
        return schedule(count) if callable(schedule) else schedule


def weight_at(schedule: Schedule, count: Array) -> Any:
    """A weight in [0, 1] after ``count`` steps: values of a schedule, and traced numbers, are clipped."""
    if isinstance(schedule, int | float):
        return schedule
    with _permissive():
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
        old = 1 - weight_at(weight, jnp.asarray(state.count))

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


def _of_a_loss(loss: Callable[[PyTree], Array], value: PyTree, gradient: PyTree) -> dict[str, Any]:
    """The extra arguments that transformations of optax ask for, of a loss and its gradient at ``value``."""

    def value_fn(value: PyTree, *, outer: Any = None, obj_fn: Any = None, grad_fn: Any = None) -> Array:
        del outer, obj_fn, grad_fn  # line searches refuse arguments that this function does not name
        return loss(value)

    def grad_fn(value: PyTree, _: int) -> PyTree:
        return jax.grad(loss)(value)

    return {"value": loss(value), "grad": gradient, "value_fn": value_fn, "obj_fn": loss, "grad_fn": grad_fn}


def _accepted(update: Callable[..., Any], offer: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Those of the arguments on offer that the signature of an update has a place for."""
    parameters = inspect.signature(update).parameters
    anything = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    return {name: argument for name, argument in offer().items() if anything or name in parameters}


def _in_its_dtype(new: Any, old: Any) -> Any:
    dtype = jnp.result_type(old)
    return new if jnp.result_type(new) == dtype else jnp.asarray(new, dtype)


def _form(tree: PyTree) -> tuple[Any, list[tuple[int, ...]]]:
    return jax.tree.structure(tree), [jnp.shape(leaf) for leaf in jax.tree.leaves(tree)]


def _squares(value: PyTree) -> Array:
    """A loss that stands in for the true one where only shapes matter."""
    return sum((jnp.vdot(leaf, leaf) for leaf in jax.tree.leaves(value)), jnp.zeros(()))


def _step_of_two(opt: optax.GradientTransformation, value: PyTree, outer: PyTree) -> Any:
    pair = optax.LookaheadParams(value, value)
    with _permissive():
        updates: Any = opt.update(value, opt.init(pair), pair, **_accepted(opt.update, lambda: {"outer": outer}))[0]
        return updates.fast


def _traces(function: Callable[..., Any], *arguments: PyTree) -> bool:
    try:
        jax.eval_shape(function, *arguments)
    except Exception:
        return False
    return True


def _summary(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
