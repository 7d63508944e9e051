"""The compiled functions of a master of ADBO."""

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp

from bilevel_jax.distributed import adbo
from bilevel_jax.distributed.adbo import Adbo, Master
from bilevel_jax.results import Result, all_finite
from bilevel_jax.types import Array, Vars

#: Columns of the history beside what is found in the master's state.
OWN = ("step", "seconds", "up", "down", "restored", "lost")


@lru_cache(maxsize=4)
def compiled(method: Adbo, metrics: Callable[[Vars], dict[str, Array]] | None) -> tuple[Callable, ...]:
    """The master's functions; runs of one method share them."""

    def iterate(master: Master, outer: Array, inner: Array, fresh: Array, active: Array) -> tuple[Master, Any, Array]:
        new = method.update(adbo.record(master, outer, inner, fresh), active)
        moved = [a for a, b in zip(jax.tree.leaves(new), jax.tree.leaves(master), strict=True) if a is not b]
        good = all_finite(moved)
        # What an iteration leaves as it is (the coefficients of the cuts) is not selected over: that would copy it.
        new = jax.tree.map(lambda a, b: a if a is b else jnp.where(good, a, b), new, master)
        return new, (new.consensus_multiplier, new.received), good

    def row(master: Master) -> dict[str, Array]:
        apart, found = adbo.disagreement(master), method.vars(master)
        code = jnp.where(all_finite((found, apart)), jnp.int32(Result.SUCCESSFUL), jnp.int32(Result.NONFINITE))
        known = {"inner_gap": master.inner_gap, "cuts": master.cuts.live.sum(), "made": master.made}
        known |= {"refused": master.refused, "inner_apart": apart.inner, "outer_apart": apart.outer, "result": code}
        more = metrics(found) if metrics else {}
        if taken := sorted((known.keys() | OWN) & more.keys()):
            raise ValueError(f"metrics: got {taken}, expected names that are not columns of the history already")
        return known | more

    def closed(new: Master) -> tuple[Array, Array, Array]:
        # All cuts but a new one have a multiplier that is, or was, positive: the others have been dropped.
        fresh = new.cuts.live & (new.cuts.multiplier == 0) & (new.cuts.before == 0)
        slot = fresh.argmax()
        return all_finite((new.cuts, new.estimate_multiplier, new.inner_gap)), slot, new.cuts.inner[:, slot]

    def of_worker(master: Master, i: Array) -> adbo.Worker:
        return jax.tree.map(lambda leaf: leaf[i], adbo.workers(master))

    return (jax.jit(iterate, donate_argnums=0), *map(jax.jit, (adbo.record, row, closed, of_worker)))
