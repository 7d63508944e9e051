"""Loops and branches of `jax.lax` that also work inside `jax.shard_map` with ``check_vma=True``, its default.

With that flag JAX keeps track of the mesh axes over which an array varies.  It refuses a loop whose carry is the same on all
devices at the start (a constant, or the start of a run) and differs between devices after a step, and branches whose outputs
vary over different axes.  The functions here mark the carry, or the outputs of the branches, as varying over all these axes.
Outside of `jax.shard_map` they are the functions of `jax.lax`; inside, they trace a loop body one or two times more.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from bilevel_jax.types import Array, PyTree


def scan(body: Callable[[Any, Any], tuple[Any, Any]], carry: Any, xs: PyTree, **options: Any) -> tuple[Any, Any]:
    """`jax.lax.scan`, of no turn without jit, too."""
    if any(leaf.shape[0] == 0 for leaf in jax.tree.leaves(xs)):
        turn = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), xs)
        return carry, jax.tree.map(lambda y: jnp.zeros((0, *y.shape), y.dtype), jax.eval_shape(body, carry, turn)[1])

    def once(carry: Any, xs: PyTree) -> Any:
        return body(carry, jax.tree.map(lambda leaf: leaf[0], xs))[0]

    def agreed(carry: Any, x: Any) -> tuple[Any, Any]:
        new, y = body(carry, x)
        return varying(new, carry), y

    return lax.scan(agreed if _in_shard_map() else body, settled(once, carry, xs), xs, **options)


def while_loop(condition: Callable[[Any], Array], body: Callable[[Any], Any], carry: Any) -> Any:
    """`jax.lax.while_loop`."""
    agreed = (lambda carry: varying(body(carry), carry)) if _in_shard_map() else body
    return lax.while_loop(condition, agreed, settled(body, carry))


def cond(predicate: Array, true: Callable[..., Any], false: Callable[..., Any], *operands: Any) -> Any:
    """`jax.lax.cond`."""
    if not _in_shard_map():
        return lax.cond(predicate, true, false, *operands)
    outputs = [jax.eval_shape(branch, *operands) for branch in (true, false)]
    branches = (lambda *args, branch=branch: varying(branch(*args), *outputs) for branch in (true, false))
    return lax.cond(predicate, *branches, *operands)


def settled(body: Callable[..., Any], carry: Any, *others: Any) -> Any:
    """The carry with the axes that ``body(carry, *others)`` adds to it, as often as it adds any."""
    while _in_shard_map():
        before, carry = carry, varying(carry, jax.eval_shape(body, carry, *others))
        if all(map(lambda a, b: _axes(a) == _axes(b), *map(jax.tree.leaves, (before, carry)))):
            break
    return carry


def _in_shard_map() -> bool:
    return bool(jax.sharding.get_abstract_mesh().manual_axes)


def varying(tree: Any, *like: Any) -> Any:
    """A tree whose leaves vary over the axes over which one of the others does."""

    def leaf(value: Any, *others: Any) -> Any:
        missing = frozenset().union(*map(_axes, others)) - _axes(value)
        return lax.pcast(value, tuple(sorted(missing)), to="varying") if missing else value

    return jax.tree.map(leaf, tree, *like)


def marked(tree: Any, *like: Any) -> Any:
    """A tree all of whose leaves vary over the axes over which some leaf, of it or of the others, does.

    Inside `jax.shard_map` the derivative by what is the same on all devices is summed over them: variables of which each device
    has its own must be marked before they are differentiated.
    """
    if not _in_shard_map():
        return tree
    return jax.tree.map(lambda leaf: varying(leaf, *jax.tree.leaves((tree, like))), tree)


def unmarked(tree: Any, *like: Any) -> list[str]:
    """The mesh axes over which some leaf of either tree varies, and over which some leaf of the first does not."""
    if not _in_shard_map():
        return []
    every = frozenset().union(*map(_axes, jax.tree.leaves((tree, like))))
    return sorted(frozenset().union(*(every - _axes(leaf) for leaf in jax.tree.leaves(tree))))


def _axes(leaf: Any) -> frozenset[str]:
    return jax.typeof(leaf).manual_axis_type.varying
