"""ADBO in real processes: the host loop of the master, over any transport of five calls.

The numerics are the pure functions of `bilevel_jax.distributed.adbo`, and who is waited for is decided as by the virtual clock
of `bilevel_jax.distributed.simulate`: this module adds losses, time and disk.  `bilevel_jax.distributed.ray_transport` has
workers in processes of their own, on this machine or on many; `bilevel_jax.distributed.transport` has them in this one, for
trials.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bilevel_jax import checks
from bilevel_jax.distributed.adbo import Adbo, Master
from bilevel_jax.distributed.host import ClusterError, Run
from bilevel_jax.distributed.store import Store, store
from bilevel_jax.distributed.transport import Inline, Transport, slept
from bilevel_jax.types import Array, Vars

__all__ = ["ClusterError", "Inline", "slept", "train"]


def train(
    method: Adbo,
    transport: Transport,
    *,
    steps: int,
    quorum: int,
    max_staleness: int,
    on_lost: str = "restore",
    master: Master | None = None,
    patience: float = 60.0,
    checkpoint: Path | str | None = None,
    every: int | None = None,
    metrics: Callable[[Vars], dict[str, Array]] | None = None,
    on_row: Callable[[dict[str, Any]], None] | None = None,
) -> tuple[Master, dict[str, np.ndarray]]:
    """Run the master of ADBO over workers in real time, through losses of workers and, with a checkpoint, of itself.

    The master goes on when at least ``quorum`` workers have answered and the last answer of every worker is less than
    ``max_staleness`` iterations old, exactly as in `bilevel_jax.distributed.simulate.schedule`; cuts are barriers.

    A worker is lost when its process dies, when it gives no answer for ``patience`` seconds, when it answers NaN or infinity,
    and when it raises an exception (one that cannot even start ends the run).  The patience is judged while the master waits
    and nothing comes from anyone: as long as the others keep it going it goes on, up to ``max_staleness``.  Then, by
    ``on_lost``:

    - ``"restore"``: it is restarted, and sent all that it held, which the master keeps: it does its step anew, and was merely
      late.  After three faults in a row the run ends.
    - ``"wait"``: the transport brings it back by itself (Ray does, with ``revive=True``); meanwhile the master goes on, until
      the worker is ``max_staleness`` iterations behind.  When nothing comes from anyone for ``patience`` seconds, or NaN do,
      the run ends.
    - ``"evict"``: it is dropped for good, with its terms of the problem; a cut under way begins again without it.

    Args:
        method: of `bilevel_jax.distributed.adbo.adbo`.
        transport: to ``method.n_workers`` workers that are not started yet; serves one run.
        steps: iterations, in all; a multiple of ``method.cut_period``.
        quorum: S; with ``n_workers`` the method is synchronous (SDBO).
        max_staleness: tau.
        on_lost: ``"restore"``, ``"wait"`` or ``"evict"``.
        master: where to start: ``method.init()`` by default.  Not looked at when a run is taken up.
        patience: seconds; covers a worker's start as well: its imports, its data, its compilation.  While workers start, it
            begins again with each that is up.
        checkpoint: folder of checkpoints (orbax), the last three kept.  A run that was ended, by an error or by a kill of the
            master, goes on from the last one when ``train`` is called again.  Another run wants another folder: sizes, quorum
            and staleness are compared; that losses, rates, the sampler, its key and the data are the same is up to the caller.
        every: iterations from one checkpoint to the next, ten cut periods by default.
        metrics: ``(consensus variables) -> {name: array}``, compiled here; measured on the clock.
        on_row: called with each row of the history as it is made.

    Returns:
        The master, and a history of a row a period, as of `bilevel_jax.distributed.simulate.simulate`, in NumPy: ``step``,
        ``seconds`` (on the wall, from when all workers are up; what earlier sessions spent until their checkpoints counts),
        ``inner_gap``, ``cuts``, ``made``, ``refused``, ``inner_apart``, ``outer_apart``, ``result``, and the metrics; ``up``,
        ``down``: numbers sent so far, as `bilevel_jax.distributed.simulate.traffic` has them; ``restored``: numbers sent apart
        from those, to bring workers up, the first time too; ``lost``: losses so far.

    Raises:
        TypeError, ValueError: for counts that are not positive ints, a quorum above N, steps that are no whole periods, a
            master or a checkpoint of another problem, metrics with names of other columns or not those of the checkpoint,
            and waiting for workers that do not come back by themselves.
        ClusterError: when the run cannot go on: a worker that does not come back or keeps failing, no worker left, NaN or
            infinity in the master itself (too large steps).  The state is saved first; the message says where.

    Cost: as of `bilevel_jax.distributed.simulate.simulate`; a few milliseconds an iteration for the host and the transport.

    Example:
        >>> from bilevel_jax.distributed import adbo
        >>> from bilevel_jax.samplers import full
        >>> from bilevel_jax.types import Levels, Problem
        >>> toy = Problem(lambda z, x, b: ((z - x - b) ** 2).sum() / 2, lambda z, x, a: ((z - a) ** 2).sum() / 2)
        >>> start, rates = Vars(jnp.zeros(1), None, jnp.zeros(1)), adbo.Rates(*(0.1,) * 6)
        >>> method = adbo.adbo(toy, start, rates, n_workers=3, cut_period=5)
        >>> load = lambda worker: Levels(jnp.full(1, 0.5), jnp.full(1, float(worker)))
        >>> workers = Inline(method, full(), load, jax.random.key(0))
        >>> master, history = train(method, workers, steps=20, quorum=2, max_staleness=5)
        >>> int(master.step), history["step"]
        (20, array([ 0,  5, 10, 15, 20]))
    """
    steps, quorum = checks.positive_int("steps", steps), checks.positive_int("quorum", quorum)
    max_staleness = checks.positive_int("max_staleness", max_staleness)
    every = 10 * method.cut_period if every is None else checks.positive_int("every", every)
    checks.positive("patience", patience)
    if steps % method.cut_period:
        raise ValueError(f"steps: got {steps}, expected a multiple of the method's cut_period = {method.cut_period}")
    if quorum > method.n_workers:
        raise ValueError(f"quorum: got {quorum}, expected at most n_workers = {method.n_workers}")
    if on_lost not in ("wait", "restore", "evict"):
        raise ValueError(f"on_lost: got {checks.shown(on_lost)}, expected 'wait', 'restore' or 'evict'")
    if on_lost == "wait" and not getattr(transport, "revive", True):
        raise ValueError("on_lost: got 'wait' and workers with revive=False, expected revive=True, or 'restore' or 'evict'")
    fresh = jax.eval_shape(method.init)
    if master is not None:
        checks.same_shapes("master", master, fresh, "that of method.init")
    with store(checkpoint) as kept:
        run = Run(method, transport, quorum, max_staleness, on_lost, patience, metrics, on_row)
        if not run.take_up(kept):
            # a copy: the loop donates its state
            run.begin(method.init() if master is None else jax.tree.map(jnp.copy, master))
        try:
            run.go(steps, every, kept)
        except BaseException as error:
            where = _rescue(run, kept)
            if isinstance(error, ClusterError):
                error.master, error.history = run.master, run.history()
                error.args = (f"{error.args[0]} (iteration {int(run.master.step)}; the state is {where})",)
            elif kept:
                error.add_note(f"bilevel_jax.distributed.cluster.train: the state is {where}")
            raise
        return run.master, run.history()


def _rescue(run: Run, kept: Store | None) -> str:
    """Save what there is, and say where; the error that ended the run is not to be replaced by one of the disk."""
    if kept is None:
        return "not saved: checkpoint was not given"
    if not run.started:
        return f"not saved: nothing was done, and {kept.folder} is as it was"
    try:
        run.save(kept)
    except Exception as error:
        return f"not saved: {type(error).__name__}: {error}"
    return f"saved in {kept.folder}"
