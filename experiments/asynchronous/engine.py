"""ADBO and SDBO in real processes: real seconds, and delays that are slept.

The workers make their data themselves, each in its own process; one session serves all runs.
"""

from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

import jax
import pandas as pd

from bilevel_jax import Levels, Vars, samplers
from bilevel_jax.distributed import cluster, ray_transport
from bilevel_jax.distributed.adbo import Adbo
from bilevel_jax.types import Array
from experiments.asynchronous import problems
from experiments.asynchronous.problems import Case, Dataset, Draw, Size

if TYPE_CHECKING:
    from experiments.asynchronous.__main__ import Config


def one_worker(dataset: Dataset, size: Size, seed: int, i: int) -> Levels:
    """The data of worker i."""
    return jax.tree.map(lambda leaf: leaf[i], problems.levels(problems.load(dataset, size, seed)))


def metrics(draw: Draw, vars: Vars) -> dict[str, Array]:
    """Those of the simulator."""
    return problems.measure(vars, draw)


def rows(config: "Config", case: Case, transport: Any = None) -> Iterator[pd.DataFrame]:
    """The rows of every run of ADBO and SDBO, as soon as it is done.

    Args:
        config, case: as of the simulator.
        transport: ``(method, sampler, load, key, *, delay) -> workers``, a context; Ray by default.
    """
    names = [name for name in config.methods if name in ("adbo", "sdbo")]
    if transport is not None:
        yield from _runs(config, case, names, transport)
        return
    with ray_transport.session():
        yield from _runs(config, case, names, ray_transport.RayWorkers)


def _runs(config: "Config", case: Case, names: list[Any], transport: Any) -> Iterator[pd.DataFrame]:
    size = case.size
    for seed in range(1, config.seeds + 1):
        draw = problems.draw(case, seed)
        load = partial(one_worker, case.dataset, size, seed)
        for slow in config.settings:
            delay = cluster.slept(config.machines(slow), size.workers, 2 * size.steps, seed=seed)
            for name in names:
                method = case.method(draw.start)
                with transport(method, samplers.full(), load, jax.random.key(seed), delay=delay) as workers:
                    yield run(config, case, name, method, workers, draw).assign(method=name, stragglers=slow, seed=seed)


def run(config: "Config", case: Case, name: str, method: Adbo, workers: Any, draw: Draw) -> pd.DataFrame:
    """One run, with seconds from when all workers are up."""
    _, history = cluster.train(
        method,
        workers,
        steps=case.size.steps,
        quorum=case.size.active if name == "adbo" else case.size.workers,
        max_staleness=config.staleness,
        master=method.init(workers=draw.workers),
        metrics=partial(metrics, draw),
        patience=60.0 + 5.0 * case.size.workers,  # they all start at once, on however many cores there are
    )
    table = pd.DataFrame({key: history[key] for key in history})
    width = method.dtype.itemsize
    return table.assign(bytes_up=width * table["up"], bytes_down=width * table["down"])
