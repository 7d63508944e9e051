"""Many devices give the numbers of one: strong scaling (one batch shared out) and weak scaling (so much a device), as tables.

A machine without accelerators is given virtual devices, which share its cores: this measures that the answers agree and what
the devices send each other, not seconds.  Writes config.json and scaling.csv.
"""

import dataclasses
import re
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pandas as pd
import tyro
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from tqdm import tqdm

from bilevel_jax import BilevelState, Levels, Problem, Solver, Vars, run, samplers, solvers, testing
from bilevel_jax.linear_solve import cg
from bilevel_jax.parallel import data_mesh, data_parallel, deal, place
from experiments.lower_bounds import record, write
from experiments.multihost import Processes, join

DEVICES = (1, 2, 4, 8)  # by default
TURNS = 10  # of the inner loop of AID, and of its conjugate gradients, whose number XLA does not know

SOLVERS: dict[str, Callable[[Problem, Vars], Solver]] = {
    "soba": solvers.soba,
    "saba": solvers.saba,
    "srba": partial(solvers.srba, period=8),
    "aid_cg": lambda problem, opts: solvers.aid_bio(
        problem, opts._replace(aux=None), inner_steps=TURNS, linear_solver=cg(max_steps=TURNS)
    ),
    "meha": partial(solvers.meha, gamma=1.0),
}
STEPS = Vars(*map(optax.sgd, (0.1, 0.1, 0.05)))


@dataclasses.dataclass(frozen=True)
class Config:
    """Equality of one and many devices, on the shipped quadratic in float64."""

    solvers: tuple[Literal["soba", "saba", "srba", "aid_cg", "meha"], ...] = ("soba", "saba", "srba", "aid_cg", "meha")
    """solvers to run"""
    devices: tuple[int, ...] | None = None
    """numbers of devices (default: 1, 2, 4, 8, where there are so many); several processes take all that they have together"""
    updates: int = 50
    """updates after which the states are compared"""
    batch: int = 64
    """rows of a draw on all devices together (strong scaling)"""
    batch_per_device: int = 16
    """rows of a draw on each device (weak scaling)"""
    samples: int = 1000
    """of either level; what the batch does not divide is filled up with rows of weight 0"""
    out: Path = Path("results/scaling")
    """folder to write to"""
    processes: tyro.conf.OmitArgPrefixes[Processes] = dataclasses.field(default_factory=Processes)


# ---- what the devices send --------------------------------------------------------------------------------------------

COLLECTIVE = re.compile(
    r"= (.*?) (all-reduce|all-gather|reduce-scatter|collective-permute|all-to-all|collective-broadcast)(?:-start)?\("
)
SIZES = {"pred": 1, "s32": 4, "u32": 4, "bf16": 2, "f32": 4, "f64": 8}


class Sent(NamedTuple):
    """The collectives of an optimised program."""

    instructions: dict[str, int]  # kind -> how many there are in its text
    all_reduced: float  # bytes that one device puts into all-reduces when it runs; of two branches the larger


def sent(program: str, turns: int = TURNS) -> Sent:
    """Read the collectives off a compiled program (``compiled.as_text()``), as often as its loops run them.

    Args:
        program: text of the optimised program.
        turns: of the loops whose number of turns XLA does not know.
    """
    bodies, name = {}, ""
    for line in program.splitlines():
        head = re.match(r"(ENTRY )?%?([\w.-]+) \(.*\{$", line)
        if head:
            name = "ENTRY" if head[1] else head[2]
            bodies[name] = []
        elif name:
            bodies[name].append(line)

    def put_in(name: str) -> float:
        total = 0.0
        for line in bodies[name]:
            found = COLLECTIVE.search(line)
            if found and found[2] == "all-reduce":
                total += size(found[1])
            called = re.findall(r"(?:body|condition)=%?([\w.-]+)", line)
            known = re.search(r'"known_trip_count":\{"n":"(\d+)"', line)
            total += (int(known[1]) if known else turns) * sum(map(put_in, called))
            branches = re.search(r"branch_computations=\{(.*?)\}", line)
            names = (
                re.findall(r"[\w.-]+", branches[1]) if branches else re.findall(r"(?:true|false)_computation=%?([\w.-]+)", line)
            )
            total += max(map(put_in, names), default=0.0)
            if re.search(r" call\(", line):
                total += sum(map(put_in, re.findall(r"to_apply=%?([\w.-]+)", line)))
        return total

    kinds = [found[2] for found in COLLECTIVE.finditer(program)]
    return Sent({kind: kinds.count(kind) for kind in sorted(set(kinds))}, put_in("ENTRY"))


def size(types: str) -> int:
    """Bytes of ``f32[3,4]{1,0}``, or of a tuple of such."""
    parts = re.findall(r"(\w+)\[([\d,]*)\]", re.sub(r"\{.*?\}|/\*.*?\*/", "", types))
    return sum(SIZES[kind] * int(np.prod([int(n) for n in dims.split(",") if n], dtype=int)) for kind, dims in parts)


# ---- runs -------------------------------------------------------------------------------------------------------------


def after(solver: Solver, batch: int, start: Vars, updates: int, data: Levels) -> BilevelState:
    """The state after some updates."""
    return run(solver, samplers.uniform(batch), start, data, jax.random.key(1), steps=updates)[0].state


def shared_out(name: str, q: testing.Quadratic, batch: int, updates: int, mesh: Mesh) -> tuple[BilevelState, Sent]:
    """The same on a mesh: every device runs the whole loop on its share of the rows."""
    axis = mesh.axis_names[0]
    data = place(deal(q.data, mesh.size, batch), mesh, P(axis))
    solver = SOLVERS[name](data_parallel(q.problem, axis), STEPS)
    local = partial(after, solver, batch // mesh.size, q.start, updates)
    program = jax.jit(jax.shard_map(local, mesh=mesh, in_specs=P(axis), out_specs=P())).lower(data).compile()
    return program(data), sent(str(program.as_text()))


def distance(left: Any, right: Any) -> float:
    """The largest difference between two states, over their size (of 1 at least)."""
    pairs = zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True)
    arrays = [(np.asarray(a, float), np.asarray(b, float)) for a, b in pairs]
    return max(float((np.abs(a - b) / np.maximum(np.abs(b), 1)).max(initial=0.0)) for a, b in arrays)


def measure(config: Config) -> pd.DataFrame:
    """One row a kind of scaling, solver and number of devices."""
    q = testing.quadratic(jax.random.key(0), inner_samples=config.samples, outer_samples=config.samples, dtype=jnp.float64)
    devices = config.devices or DEVICES
    cases = [("strong", name, n, config.batch) for name in config.solvers for n in devices]
    cases += [("weak", name, n, n * config.batch_per_device) for name in config.solvers for n in devices]
    rows, known = [], {}
    for kind, name, count, batch in tqdm(cases, unit="run", file=sys.stderr):
        if (name, batch) not in known:
            single = partial(after, SOLVERS[name](q.problem, STEPS), batch, q.start, config.updates)
            known[name, batch] = jax.jit(single)(q.data)
        state, collectives = shared_out(name, q, batch, config.updates, data_mesh(count))
        rows.append(
            {
                "scaling": kind,
                "solver": name,
                "devices": count,
                "batch": batch,
                "difference": distance(state, known[name, batch]),
                "all_reduces": collectives.instructions.get("all-reduce", 0),
                "other_collectives": sum(collectives.instructions.values()) - collectives.instructions.get("all-reduce", 0),
                "bytes_an_update": collectives.all_reduced / config.updates,
            }
        )
    return pd.DataFrame(rows)


def check(config: Config, devices: tuple[int, ...]) -> None:
    """Refuse what cannot be run on so many devices."""
    for name in ("updates", "batch", "batch_per_device", "samples"):
        if getattr(config, name) < 1:
            raise SystemExit(f"--{name.replace('_', '-')}: got {getattr(config, name)}, expected at least 1")
    if not devices or min(devices) < 1:
        raise SystemExit(f"--devices: got {devices}, expected positive numbers")
    if not config.solvers:
        raise SystemExit("--solvers: got none, expected at least one")
    for count in devices:
        if config.batch % count:
            raise SystemExit(f"--batch: got {config.batch}, expected a multiple of {count}, one of --devices")
        largest = max(config.batch, count * config.batch_per_device)
        if largest > config.samples:
            raise SystemExit(f"--samples: got {config.samples}, expected at least {largest}, the rows of a draw")


def main(config: Config) -> None:
    """Measure, print and write."""
    counts = DEVICES if config.devices is None else config.devices
    check(config, counts)
    jax.config.update("jax_enable_x64", True)
    if config.processes.coordinator is None:
        jax.config.update("jax_num_cpu_devices", max(counts))
    writes = join(config.processes)
    there = jax.device_count()
    if jax.process_count() > 1:
        counts = (there,)
        check(config, counts)
    elif config.devices is None:
        counts = tuple(count for count in counts if count <= there)
    if there < max(counts):
        raise SystemExit(f"--devices: got {max(counts)}, expected at most {there}, the devices there are")
    config = dataclasses.replace(config, devices=counts)
    table = measure(config)
    if writes:
        record(config, config.out)
        write(config.out, scaling=table)
        print(
            "\ndifference: largest in the whole state, over the size of the number; bytes: what a device puts into all-reduces."
        )
        print("Virtual devices share the cores of one machine: seconds would say nothing, and are not measured.")


if __name__ == "__main__":
    main(tyro.cli(Config))
