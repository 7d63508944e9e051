"""Static checks of two losses: which variables they depend on, and which they broadcast.

A loss is traced to its jaxpr, and marks on its inputs are followed to its outputs.  Nothing is computed.
"""

import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.extend.core
import numpy as np

from bilevel_jax.checks import path_name
from bilevel_jax.types import Loss, PyTree

#: A rule: the marks of the outputs of an equation, from those of its inputs.
Rule = Callable[[Any, list[frozenset]], frozenset]

#: Equations whose own jaxpr takes the same inputs, and is entered.
_ENTERED = ("jit", "remat2", "checkpoint", "shard_map")


def _follow(jaxpr: Any, marks: list[frozenset], rule: Rule) -> list[frozenset]:
    """The marks of the outputs of a jaxpr, from those of its inputs."""
    held = dict(zip(jaxpr.invars, marks, strict=True))

    def of(one: Any) -> frozenset:
        return frozenset() if isinstance(one, jax.extend.core.Literal) else held.get(one, frozenset())

    for equation in jaxpr.eqns:
        given = [of(one) for one in equation.invars]
        if equation.primitive.name in _ENTERED:
            inside = equation.params["jaxpr"]
            found = _follow(getattr(inside, "jaxpr", inside), given, rule)
        else:
            found = [rule(equation, given)] * len(equation.outvars)
        held.update(zip(equation.outvars, found, strict=True))
    return [of(one) for one in jaxpr.outvars]


def uses(function: Callable[..., PyTree], *arguments: PyTree) -> list[bool]:
    """Of every argument, whether the value of a function can depend on it (True when in doubt).

    Example:
        >>> uses(lambda z, x: (z**2).sum(), np.ones(2), np.ones(3))
        [True, False]
    """
    jaxpr = jax.make_jaxpr(function)(*arguments).jaxpr
    marks = [frozenset([n]) for n, argument in enumerate(arguments) for _ in jax.tree.leaves(argument)]
    reached = frozenset().union(*_follow(jaxpr, marks, lambda _, given: frozenset().union(*given)))
    return [n in reached for n in range(len(arguments))]


def depends(function: Callable[..., PyTree], argument: PyTree, *others: PyTree) -> bool:
    """Whether the value of a function can depend on its first argument (True when in doubt)."""
    return uses(function, argument, *others)[0]


class Uses(NamedTuple):
    """Which of the two variables enter a loss, or a method by another way than its losses."""

    z: bool = False
    x: bool = False


def check_uses(g: Uses, f: Uses, elsewhere: Uses) -> None:
    """Refuse losses that leave a variable where it is, and warn of an outer loss without z.

    Args:
        g, f: which variables the inner and the outer loss use.
        elsewhere: whether z moves along f, too; whether x enters by a start, a nonsmooth term or an optimiser.

    Raises:
        ValueError: where z or x would never move.

    Warns:
        UserWarning: for an outer loss without z; for an inner one without z where z moves along f.
    """
    if not (f.z or f.x):
        raise ValueError("problem.outer: got a loss that depends on neither z nor x, expected one of z and x, or of z")
    if not (f.x or g.x or elsewhere.x):
        raise ValueError("problem: got losses that do not depend on x, expected x in one of them: x would never move")
    if not g.z:
        lacks = "problem.inner: got a loss that does not depend on z, expected one of z and x"
        if not elsewhere.z:
            raise ValueError(f"{lacks}: z would never move")
        warnings.warn(f"{lacks}: z moves along the outer loss alone", stacklevel=3)
    if not f.z:
        warnings.warn(
            "problem.outer: got a loss that does not depend on z, expected one of z and x: the inner problem does not "
            "influence x",
            stacklevel=3,
        )


#: Equations of two operands, one of which may have an axis of length 1 where the other is longer.
_ELEMENTWISE = ("add", "sub", "mul", "div", "max", "min", "pow")


def _stretched(loss: Loss, z: PyTree, x: PyTree, data: PyTree, rows: int) -> set[int]:
    """Which leaves of (z, x) have the shape (1,), and are broadcast along an axis of that many rows."""
    jaxpr = jax.make_jaxpr(loss)(z, x, data).jaxpr
    leaves, found = jax.tree.leaves((z, x)), set()
    marks = [frozenset([(n, 0)]) if np.shape(leaf) == (1,) else frozenset() for n, leaf in enumerate(leaves)]

    def rule(equation: Any, given: list[frozenset]) -> frozenset:
        """A mark is a leaf, and the axis of length 1 that it became."""
        name, kept = equation.primitive.name, set()
        shape = equation.outvars[0].aval.shape if len(equation.outvars) == 1 else ()
        for operand, (leaf, axis) in ((o, mark) for o, marks in zip(equation.invars, given, strict=True) for mark in marks):
            if name == "broadcast_in_dim":
                axis = int(equation.params["broadcast_dimensions"][axis])
            elif not (name in _ELEMENTWISE or (len(given) == 1 and operand.aval.shape == shape)):
                continue
            if shape[axis] == 1:
                kept.add((leaf, axis))
            elif shape[axis] == rows:
                found.add(leaf)
        return frozenset(kept)

    _follow(jaxpr, marks + [frozenset()] * (len(jaxpr.invars) - len(marks)), rule)
    return found


def warn_stretched(name: str, loss: Loss, z: PyTree, x: PyTree, data: PyTree) -> None:
    """Warn of variables of shape (1,) that a loss broadcasts against the samples of its data.

    The loss is traced on one sample more, too: an axis that is as long as the number of samples by chance stays as it is.
    Where it cannot be traced on another number of samples, there is no warning.
    """
    leaves = jax.tree_util.tree_leaves_with_path((z, x))
    sizes = {np.shape(leaf)[:1] for leaf in jax.tree.leaves(data)}
    if len(sizes) != 1 or sizes & {(), (1,)} or all(np.shape(leaf) != (1,) for _, leaf in leaves):
        return
    ((rows,),) = sizes
    more = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((rows + 1, *leaf.shape[1:]), leaf.dtype), data)
    try:
        found = _stretched(loss, z, x, data, rows) & _stretched(loss, z, x, more, rows + 1)
    except Exception:  # whatever a loss raises on data that were not made for it
        return
    for number in sorted(found):
        path, _ = leaves[number]
        variable = path_name(("vars.inner", "vars.outer")[path[0].idx], path[1:])
        warnings.warn(
            f"{variable}: got the shape (1,), which {name} broadcasts against its {rows} samples, expected the shape () for "
            "one number that all samples share",
            stacklevel=3,
        )
