"""How fast data stream from a file that is mapped into memory, beside the same updates on data that lie on the device.

``python -m experiments.streaming`` prints a table, and writes it, with config.json, to ``--out``.

=================================  ======================================================================================
``source``                         of the stream: ``files``, or a ``loader``, which yields one draw at a time, as your own would
``updates_a_call``                 updates in a call from the host (`bilevel_jax.loop.several`)
``memory_us``, ``stream_us``       wall time of an update, median over the repeats
``ratio``, ``spread``              updates a second of the stream over those in memory, median of the ratios within a repeat,
                                   and the distance of their quartiles
``process_ratio``                  the same of process time, which counts the work of all threads and none of other programs:
                                   what the ratio is where no core is free for the reader
``read_mb_s``                      megabytes a second that the stream reads
=================================  ======================================================================================

Both sides do the same updates of the same solver: in memory as one scan a call (`bilevel_jax.resume`), the stream with
`bilevel_jax.readers.from_arrays`, on the same draws, or on NumPy arrays of a loader that `bilevel_jax.samplers.from_stream`
stacks, on draws of its own, in the thread that makes the calls.  They alternate; each first makes some calls that are not
timed.  Data are synthetic, of the shapes of the papers' data sets; a ``.npy`` file for each array, small enough for the system
to keep what has been read of it in memory.  Of files that are larger than that a stream can be no faster than the disk: compare
``read_mb_s``.
"""

import itertools
import shutil
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pandas as pd
import tyro
from tqdm import tqdm

from bilevel_jax import Batch, Levels, Solver, Vars, begin, readers, resume, samplers, solvers, stream
from bilevel_jax.loop import several
from bilevel_jax.types import Slot
from experiments.lower_bounds import record
from experiments.speed.shapes import BATCH, FULL, QUICK, SHAPES, Shape

#: Calls that are made before the clock starts: more than are read ahead.
WARM = 4
#: Updates in a call.  One alone shows what the host costs; the other takes ten milliseconds or more.
UPDATES = {"ijcnn1": (1, 1000), "cleaning": (1, 50)}
#: Of the stream.
SOURCES = ("files", "loader")


@dataclass(frozen=True)
class Config:
    """Throughput of a stream from files, over that of data in memory."""

    shapes: tuple[Literal["ijcnn1", "cleaning"], ...] = ("ijcnn1", "cleaning")
    """problems to time"""
    solver: Literal["soba", "saba"] = "saba"
    """solver to time"""
    repeats: int = 15
    """measurements, of which the median is reported"""
    seconds: float = 0.5
    """of a measurement"""
    quick: bool = False
    """small shapes, to see that everything runs"""
    out: Path = Path("results/streaming")
    """folder to write to; the data files lie there, too, while they are needed"""

    def __post_init__(self) -> None:
        if self.repeats < 1:
            raise SystemExit(f"--repeats: got {self.repeats}, expected at least 1")
        if not self.seconds > 0:
            raise SystemExit(f"--seconds: got {self.seconds}, expected a positive number")


def to_files(data: Levels, folder: Path) -> list[Path]:
    """Write every array of the data into a file of its own."""
    folder.mkdir(parents=True, exist_ok=True)  # a run that was killed leaves it
    paths = [folder / f"{i}.npy" for i in range(len(jax.tree.leaves(data)))]
    for path, leaf in zip(paths, jax.tree.leaves(data), strict=True):
        np.save(path, leaf)
    return paths


def mapped(data: Levels, paths: list[Path]) -> Levels:
    """The same data, in the files."""
    return jax.tree.unflatten(jax.tree.structure(data), [np.load(path, mmap_mode="r") for path in paths])


def in_memory(shape: Shape, solver: Solver, updates: int) -> Iterator[Any]:
    """Endless calls of so many updates on data on the device."""
    sampler, data = samplers.uniform(BATCH), jax.tree.map(jnp.asarray, shape.data)
    call = jax.jit(lambda carry, data: resume(solver, sampler, carry, data, steps=updates)[0], donate_argnums=0)
    carry = begin(solver, sampler, shape.start, data, jax.random.key(0))
    while True:
        carry = call(carry, data)
        yield carry.state


def loader(data: Levels) -> Iterator[Batch]:
    """Endless single draws of a user's own, in NumPy: whole blocks, at random."""
    rng = np.random.default_rng(0)
    counts = [len(jax.tree.leaves(part)[0]) // BATCH for part in data]
    while True:
        slots = [Slot(np.int32(rng.integers(count)), count) for count in counts]  # type: ignore[arg-type]
        starts = [BATCH * int(slot.index) for slot in slots]
        parts = [
            jax.tree.map(lambda leaf, at=at: np.asarray(leaf[at : at + BATCH]), part)
            for part, at in zip(data, starts, strict=True)
        ]
        yield Batch(*parts, slot=Levels(*slots))


def streamed(shape: Shape, solver: Solver, updates: int, data: Levels, source: str = "files") -> Iterator[Any]:
    """The same of data in files."""
    many = several(solver, updates)
    if source == "files":
        batches = readers.from_arrays(samplers.uniform(BATCH), data, jax.random.key(0), draws=many.draws)
    else:
        batches = samplers.from_stream(loader(data), many.draws)
    for state, _ in stream(many, shape.start, batches):
        yield state


def timed(calls: Iterator[Any], count: int) -> tuple[float, float]:
    """Wall and process seconds of so many calls, after some that are not timed."""
    jax.block_until_ready(last(calls, WARM))
    wall, process = time.perf_counter(), time.process_time()
    jax.block_until_ready(last(calls, count))
    return time.perf_counter() - wall, time.process_time() - process


def last(calls: Iterator[Any], count: int) -> Any:
    """The last of so many."""
    *_, end = itertools.islice(calls, count)
    return end


def measure(config: Config, name: str, updates: int, source: str, bar: tqdm) -> dict[str, Any]:
    """A row of the table."""
    shape = SHAPES[name]((QUICK if config.quick else FULL)[name])
    solver = getattr(solvers, config.solver)(shape.problem, Vars(*map(optax.sgd, shape.rates)))
    folder = config.out / "data"
    paths = to_files(shape.data, folder)
    try:
        memory = in_memory(shape, solver, updates)
        files = streamed(shape, solver, updates, mapped(shape.data, paths), source)
        timed(files, 1)  # compiles
        timed(memory, 1)
        count = max(1, round(config.seconds / timed(memory, 1)[0]))
        count = max(1, round(config.seconds * count / timed(memory, count)[0]))
        pairs = []
        for repeat in range(config.repeats):
            order = (memory, files) if repeat % 2 else (files, memory)
            spent = {id(calls): timed(calls, count) for calls in order}
            pairs.append((spent[id(memory)], spent[id(files)]))
            bar.update()
    finally:
        shutil.rmtree(folder)
    times = np.array(pairs)  # [repeats, memory or stream, wall or process]
    (memory_s, stream_s), ratios = np.median(times[..., 0], axis=0), times[:, 0] / times[:, 1]
    rows = solver.draws * BATCH * updates * count
    read = sum(rows * leaf[0].nbytes for leaf in jax.tree.leaves(shape.data))
    return {
        "shape": name,
        "solver": config.solver,
        "source": source,
        "updates_a_call": updates,
        "memory_us": 1e6 * memory_s / (count * updates),
        "stream_us": 1e6 * stream_s / (count * updates),
        "ratio": np.median(ratios[:, 0]),
        "spread": np.subtract(*np.quantile(ratios[:, 0], (0.75, 0.25))),
        "process_ratio": np.median(ratios[:, 1]),
        "read_mb_s": read / stream_s / 1e6,
    }


def main(config: Config) -> pd.DataFrame:
    """Measure, print and write."""
    record(config, config.out)
    cases = [(name, updates, source) for name in config.shapes for updates in UPDATES[name] for source in SOURCES]
    with tqdm(total=len(cases) * config.repeats, unit="repeat", file=sys.stderr) as bar:
        table = pd.DataFrame([measure(config, *case, bar) for case in cases])
    table.to_csv(config.out / "streaming.csv", index=False)
    print(table.to_string(index=False, float_format=lambda value: f"{value:.4g}"))
    return table


if __name__ == "__main__":
    main(tyro.cli(Config, description=Config.__doc__))
