"""Many seeds on the cores of one machine: runs side by side, and the throughput of the ways to get there.

``python -m experiments.seeds``

Times the same runs (seeds, updates, data of the shape of IJCNN1) done in several ways in turn, beside a loop over a compiled
run of one seed, and checks that all end where that loop ends.  What won is `side_by_side`: XLA runs a program of small
operations on the thread that calls it, so each core gets a thread of its own, and vmaps its share of the seeds.

*seeds.csv*: one row a solver and way.  ``wall_us`` and ``process_us``: microseconds an update of one seed, medians; ``ratio``:
times as many runs in the same time as one after the other, median within the repeats; ``difference``: largest, of z, v and x,
from the runs one after the other.
"""

import json
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
import tyro
from jax.sharding import PartitionSpec

from bilevel_jax import BilevelState, Carry, begin, resume, samplers
from bilevel_jax.samplers import Sampler
from bilevel_jax.types import Array, Levels
from experiments.speed.conditions import conditions, load
from experiments.speed.shapes import BATCH, FULL, QUICK, SHAPES, Shape
from experiments.speed.steps import SOLVERS
from experiments.speed.timing import CAN_PIN, Program, interleave

#: Axes of the carry of many runs.  They share the step, so that conditions on it stay conditions.
LANES = Carry(BilevelState(None, 0, 0), 0, 0, 0)  # type: ignore[arg-type]
#: ``(keys, data)`` of some seeds to their carries.
Many = Callable[[Array, Levels], Carry]


def cores() -> int:
    """Programs that run side by side without sharing: one a core of a CPU, one on an accelerator."""
    if jax.default_backend() != "cpu":
        return 1
    return len(os.sched_getaffinity(0)) if CAN_PIN else os.cpu_count() or 1


def side_by_side(function: Callable[..., Any], parts: Sequence[Any]) -> list[Any]:
    """``function`` of each part, in a thread of its own.

    Python threads do, because XLA lets go of Python while it computes.  ``function`` should be compiled beforehand
    (``jax.jit(...).lower(...).compile()``): otherwise each thread may compile it.
    """
    with ThreadPoolExecutor(len(parts)) as pool:
        return list(pool.map(lambda part: jax.block_until_ready(function(part)), parts))


def join(carries: Sequence[Carry]) -> Carry:
    """The carries of `LANES`, one after the other."""
    step = carries[0].state.step
    lanes = [carry._replace(state=carry.state._replace(step=None)) for carry in carries]
    whole = jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *lanes)
    return whole._replace(state=whole.state._replace(step=step))


@dataclass(frozen=True)
class Config:
    """Seeds a second, in several ways."""

    solvers: tuple[Literal["soba", "saba", "srba"], ...] = ("soba", "saba", "srba")
    """which solvers to time"""
    seeds: int = 32
    """runs, which differ in their samples"""
    repeats: int = 7
    """measurements of each way, of which the median is reported"""
    out: Path = Path("results/seeds")
    """folder for seeds.csv and config.json"""
    quick: bool = False
    """a small shape, to see that everything runs"""


def updates(shape: Shape) -> int:
    """About two periods, and a multiple of 8."""
    return 8 * max(1, shape.period // 4)


def run_one(shape: Shape, name: str, sampler: Sampler) -> Callable[[Array, Levels], Carry]:
    """``(key, data) -> carry`` of a run."""
    solver = SOLVERS[name](shape)

    def one(key: Array, data: Levels) -> Carry:
        carry = begin(solver, sampler, shape.start, data, key)
        return resume(solver, sampler, carry, data, steps=updates(shape))[0]

    return one


def run_ahead(shape: Shape, name: str, sampler: Sampler) -> Callable[[Array, Levels], Carry]:
    """The same, but the batches of 8 updates are read at once."""
    solver = SOLVERS[name](shape)

    def one(key: Array, data: Levels) -> Carry:
        def update(state: BilevelState, batch: Any) -> tuple[BilevelState, None]:
            return solver.update(state, jax.tree.map(lambda leaf: leaf[None], batch)._replace(full=data)), None

        def eight(state: BilevelState, _: None) -> tuple[BilevelState, None]:
            batches = sampler.batches(data, key, state.step, 8)._replace(full=None)
            return jax.lax.scan(update, state, batches)[0], None

        carry = begin(solver, sampler, shape.start, data, key)
        return carry._replace(state=jax.lax.scan(eight, carry.state, None, length=updates(shape) // 8)[0])

    return one


def vmapped(one: Callable[[Array, Levels], Carry]) -> Many:
    """The runs of all keys as lanes of one program."""
    return jax.vmap(one, in_axes=(0, None), out_axes=LANES)


def mapped(one: Callable[[Array, Levels], Carry], lanes: int) -> Many:
    """The runs of the keys one after the other, or ``lanes`` at a time, in one program."""

    def many(keys: Array, data: Levels) -> Carry:
        carry = jax.lax.map(lambda part: vmapped(one)(part, data), keys.reshape(-1, lanes))
        step, flat = carry.state.step[0], carry._replace(state=carry.state._replace(step=None))
        flat = jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), flat)
        return flat._replace(state=flat.state._replace(step=step))

    return many


def ways(shape: Shape, name: str, seeds: int) -> dict[str, Callable[[], list[Carry]]]:
    """The ways to run all seeds, by name, each compiled; the first is one after the other."""
    sampler, data, count = samplers.uniform(BATCH), shape.data, cores()
    by_seed = sampler._replace(gather=jax.custom_batching.sequential_vmap(sampler.gather))
    keys = jax.vmap(jax.random.key)(jnp.arange(1, seeds + 1))
    one = run_one(shape, name, sampler)
    shares = jnp.split(keys, count if seeds % count == 0 else 1)

    def compiled(many: Many, keys: Array) -> Callable[[Array], Carry]:
        call = jax.jit(many).lower(keys, data).compile()
        return lambda keys: call(keys, data)

    single, share = compiled(one, keys[0]), compiled(vmapped(one), shares[0])
    each = [list(part) for part in shares]

    def in_turn(part: Sequence[Array]) -> list[Carry]:
        return [jax.block_until_ready(single(key)) for key in part]

    found: dict[str, Callable[[], list[Carry]]] = {
        "one after the other": lambda: [carry for part in each for carry in in_turn(part)],
        "a thread a core, one after the other": lambda: [carry for part in side_by_side(in_turn, each) for carry in part],
        "a thread a core, each a vmap": lambda: side_by_side(share, shares),
        "as many vmaps in flight, no threads": lambda: [share(part) for part in shares],
    }
    programs = {"vmap": vmapped(one)} | {f"map of vmaps of {n}": mapped(one, n) for n in (1, 4, 8, 16) if seeds % n == 0}
    programs["vmap, batches read seed by seed"] = vmapped(run_one(shape, name, by_seed))
    programs["vmap, batches of 8 updates read at once"] = vmapped(run_ahead(shape, name, sampler))
    for way, many in programs.items():
        call = compiled(many, keys)
        found[way] = lambda call=call: [call(keys)]
    return found | on_devices(one, data, keys)


def on_devices(one: Callable[[Array, Levels], Carry], data: Levels, keys: Array) -> dict[str, Callable[[], list[Carry]]]:
    """The seeds shared by the devices that JAX sees; nothing if it sees one."""
    count = jax.device_count()
    if count == 1 or len(keys) % count:
        return {}
    mesh = jax.make_mesh((count,), ("seeds",), axis_types=(jax.sharding.AxisType.Auto,))
    own, shared = PartitionSpec("seeds"), PartitionSpec()
    specs = Carry(BilevelState(shared, own, own), own, own, own)  # type: ignore[arg-type]
    many = jax.shard_map(vmapped(one), mesh=mesh, in_specs=(own, shared), out_specs=specs, check_vma=False)
    keys, data = (jax.device_put(tree, jax.NamedSharding(mesh, spec)) for tree, spec in ((keys, own), (data, shared)))
    call = jax.jit(many).lower(keys, data).compile()
    return {f"{count} devices, each a vmap": lambda: [call(keys, data)]}


def ends(carries: Sequence[Carry]) -> list[np.ndarray]:
    """z, v and x of all runs, flat."""
    return [np.concatenate([np.ravel(carry.state.vars[i]) for carry in carries]) for i in range(3)]


def rows(shape: Shape, name: str, seeds: int, repeats: int) -> list[dict[str, Any]]:
    """One row a way."""
    made = ways(shape, name, seeds)
    programs = {way: Program(lambda _, call=call: call(), None, updates(shape) * seeds) for way, call in made.items()}
    times = interleave(programs, repeats)
    first, found = next(iter(made)), []
    exact = ends(programs[first].carry)
    for way, program in programs.items():
        difference = max(np.abs(a - b).max() for a, b in zip(exact, ends(program.carry), strict=True))
        ratio = {"ratio": times[first].over(times[way])[0]}
        found.append({"solver": name, "way": way} | ratio | times[way].row() | {"difference": difference})
    return found


def main(config: Config) -> pd.DataFrame:
    """Measure, print and write."""
    for option in ("seeds", "repeats"):
        if getattr(config, option) < 1:
            raise SystemExit(f"--{option}: got {getattr(config, option)}, expected at least 1")
    config.out.mkdir(parents=True, exist_ok=True)
    facts = conditions(config)
    shape = SHAPES["ijcnn1"]((QUICK if config.quick else FULL)["ijcnn1"])
    parts = []
    for name in config.solvers:
        table = pd.DataFrame(rows(shape, name, config.seeds, config.repeats))
        print(table.to_string(index=False, float_format="{:.3g}".format), flush=True)
        parts.append(table)
    found = pd.concat(parts)
    found.to_csv(config.out / "seeds.csv", index=False)
    (config.out / "config.json").write_text(json.dumps(facts | {"load_at_end": load()}, indent=2) + "\n")
    print(f"\n{facts['device']} ({facts['processor']}), {facts['usable_cores']} core(s), jax {facts['versions']['jax']}")
    if jax.device_count() == 1:
        print("left out: devices: needs two: XLA_FLAGS=--xla_force_host_platform_device_count=2")
    return found


if __name__ == "__main__":
    main(tyro.cli(Config))
