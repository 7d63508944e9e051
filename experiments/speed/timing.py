"""How to measure: compiled programs, interleaved medians, memory, whole-array copies.  Knows nothing about bilevel problems."""

import os
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import numpy as np

#: An instruction of a compiled text that copies: its result (on accelerators the first of a tuple) and its name.
_COPY = re.compile(r"= \(?(\w+)\[([\d,]*)\][^=]* copy(?:-start)?\(")
#: How compiled texts name types.
_TYPES = {"float32": "f32", "float64": "f64", "bfloat16": "bf16", "float16": "f16"}
CAN_PIN = hasattr(os, "sched_setaffinity")


@contextmanager
def pinned(wanted: bool) -> Iterator[None]:
    """Keep this process on one core.  To be entered before jax starts its threads: they inherit it, and it sizes its pool.

    Raises:
        RuntimeError: if wanted where the system does not offer it.
    """
    if not wanted:
        yield
        return
    if not CAN_PIN:
        raise RuntimeError("--pin: got True, expected --no-pin, because this system cannot pin a process to a core")
    allowed = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {max(allowed)})
    try:
        yield
    finally:
        os.sched_setaffinity(0, allowed)


class Built(NamedTuple):
    """A compiled function, and what its compilation tells."""

    call: Callable[..., Any]
    seconds: float  # to trace, lower and compile
    peak: float  # bytes
    text: str  # optimised program


def build(jitted: Any, *args: Any) -> Built:
    """Compile a ``jax.jit`` function for the given arguments."""
    start = time.perf_counter()
    executable = jitted.lower(*args).compile()
    seconds = time.perf_counter() - start
    return Built(executable, seconds, peak_bytes(executable), executable.as_text())


def peak_bytes(executable: Any) -> float:
    """Arguments, outputs and temporaries, minus the outputs that reuse the memory of arguments; NaN where not known."""
    memory = executable.memory_analysis()
    if memory is None:
        return float("nan")
    used = memory.argument_size_in_bytes + memory.output_size_in_bytes + memory.temp_size_in_bytes
    return used - memory.alias_size_in_bytes


def temporary_bytes(executable: Any) -> float:
    """What a program takes beside its arguments and outputs; NaN where not known."""
    memory = executable.memory_analysis()
    return float("nan") if memory is None else memory.temp_size_in_bytes


def size_bytes(tree: Any) -> int:
    """Bytes of the arrays of a tree."""
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


def copies(text: str, arrays: Iterable[Any]) -> int:
    """Number of instructions of a compiled text that copy something as large as one of ``arrays``.

    Types and numbers of elements are compared, not shapes: XLA may transpose or flatten what it copies.
    """
    wanted = {(_TYPES.get(str(a.dtype), str(a.dtype)), int(np.prod(a.shape))) for a in arrays}
    found = ((kind, shape) for kind, shape in _COPY.findall(text))
    return sum((kind, int(np.prod([int(n) for n in shape.split(",") if n]))) in wanted for kind, shape in found)


@dataclass
class Program:
    """A compiled loop from carry to carry (which may be donated); ``steps`` are the units of work of one call."""

    call: Callable[[Any], Any]
    carry: Any
    steps: int


class Times(NamedTuple):
    """Microseconds a step, one entry a repeat."""

    wall: np.ndarray
    process: np.ndarray

    def row(self) -> dict[str, float]:
        """Medians, and the distance of the quartiles of the wall time over its median."""
        low, middle, high = np.quantile(self.wall, (0.25, 0.5, 0.75))
        return {"wall_us": middle, "process_us": float(np.median(self.process)), "spread": (high - low) / middle}

    def over(self, other: "Times") -> tuple[float, float]:
        """Median ratios to times of the same repeats: wall, process."""
        return float(np.median(self.wall / other.wall)), float(np.median(self.process / other.process))


def interleave(programs: Mapping[str, Program], repeats: int, least_seconds: float = 0.01) -> dict[str, Times]:
    """Time programs in turn, ``repeats`` times, after one call each to warm up.

    Each measurement makes as many calls as fill ``least_seconds``.  The order is reversed from one repeat to the next.
    """
    for program in programs.values():
        _advance(program)
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in programs}
    for repeat in range(repeats):
        for name in list(programs)[:: -1 if repeat % 2 else 1]:
            found[name].append(_measure(programs[name], least_seconds))
    return {name: Times(*(np.array(column) for column in zip(*rows, strict=True))) for name, rows in found.items()}


def _advance(program: Program) -> None:
    program.carry = jax.block_until_ready(program.call(program.carry))


def _measure(program: Program, least_seconds: float) -> tuple[float, float]:
    calls, wall, process = 0, time.perf_counter(), time.process_time()
    while not calls or time.perf_counter() - wall < least_seconds:
        _advance(program)
        calls += 1
    elapsed = time.perf_counter() - wall, time.process_time() - process
    return elapsed[0] / (calls * program.steps) * 1e6, elapsed[1] / (calls * program.steps) * 1e6
