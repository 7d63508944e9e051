"""The command: ``python -m experiments.speed --device gpu``.  Updates of solvers beside what the device can do.

Prints, and writes to *devices.csv*, one row a case and solver: time of an update, over that of a floor written by hand, and
floating-point operations and bytes a second as a share of two ceilings measured in the same run, a triad (``a + s b``) and a
product of matrices, both float32 at the default precision (on recent GPUs: TF32; the ceiling at full precision is printed too).

=====================================  ==================================================================================
``update_us``, ``spread``              wall time: median, and distance of the quartiles over it
``over_floor``                         median ratio within a repeat
``gflop``, ``gbyte``, ``counted``      of one update, and how they were counted.  By hand: products with the rows, two a
                                       gradient or Hessian-vector product, each reading its rows once (an implementation
                                       that shares the reading of two products can do better); variables; rows of tables
``xla_gflop``                          XLA's count, where an update holds no loop (of which it counts the body once)
``flop_share``, ``byte_share``         of the ceilings.  The larger of the two says how near the device's limit it is
``finite``                             if not, the times mean nothing
=====================================  ==================================================================================
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
import tyro

from bilevel_jax.results import all_finite
from experiments.speed import device_cases
from experiments.speed.conditions import conditions, load
from experiments.speed.device_cases import Entry, Size
from experiments.speed.meta_cases import Sizes as Tasks
from experiments.speed.shapes import Sizes
from experiments.speed.timing import Program, build, interleave


@dataclass(frozen=True)
class Scale:
    """How large the cases and the ceilings are."""

    vector: int  # floats of the triad
    matrix: int  # side of the product of matrices
    logistic: Size
    softmax: Size
    tasks: Tasks


#: On an accelerator: 4 GB of data; batches of 268 and 134 MB; an update of SOBA does 4e11 operations in the case "softmax".
LARGE = Scale(
    vector=2**28,
    matrix=8192,
    logistic=Size(Sizes(2**19, 2**17, 1024, 2), 2**16),
    softmax=Size(Sizes(2**16, 2**14, 4096, 1000), 2**13),
    tasks=Tasks(tasks=256),
)
CPU = Scale(
    vector=2**24,
    matrix=2048,
    logistic=Size(Sizes(2**15, 2**13, 256, 2), 2**12),
    softmax=Size(Sizes(2**12, 2**10, 512, 128), 2**9),
    tasks=Tasks(tasks=8),
)
QUICK = Scale(
    vector=2**12,
    matrix=32,
    logistic=Size(Sizes(256, 128, 16, 2), 64),
    softmax=Size(Sizes(256, 128, 32, 8), 64),
    tasks=Tasks(tasks=2, ways=3, queries=2, side=8, steps=2),
)
Name = Literal["soba", "saba", "srba", "aid_cg", "meha", "maml"]


@dataclass(frozen=True)
class Settings:
    """Updates of solvers beside the ceilings of a device, at sizes that fill it."""

    device: Literal["gpu", "tpu", "cpu"] = "gpu"
    """what to measure; where there is none, the CPU is, at smaller sizes"""
    cases: tuple[Literal["logistic", "softmax", "maml"], ...] = ("logistic", "softmax", "maml")
    """one output (bound by memory), many (bound by products), few-shot tasks on two convolutions"""
    solvers: tuple[Name, ...] = ("soba", "saba", "srba", "aid_cg", "meha", "maml")
    """which solvers to time: maml in its own case, the others in the first two"""
    repeats: int = 11
    """measurements of each program, of which the median is reported"""
    out: Path = Path("results/speed")
    """folder for devices.csv and devices.json"""
    quick: bool = False
    """tiny sizes, to see that everything runs: too small for the ceilings to mean anything"""


def find(kind: str) -> Any:
    """A device of that kind, or the CPU."""
    try:
        return jax.devices(kind)[0]
    except RuntimeError as error:
        print(f"no {kind} here ({error}): measured on the CPU, at smaller sizes", flush=True)
        return jax.devices("cpu")[0]


def ceilings(scale: Scale, repeats: int) -> dict[str, float]:
    """GB/s of a triad, and GFLOP/s of a product of matrices, at the default and at the highest precision."""
    a, b = (jnp.asarray(np.random.default_rng(i).random(scale.vector, np.float32)) for i in range(2))
    triad = build(jax.jit(lambda a, b: 0.5 * a + 0.5 * b, donate_argnums=0), a, b)
    left, right = (
        jnp.asarray(np.random.default_rng(i).standard_normal((scale.matrix,) * 2, np.float32)) / scale.matrix**0.5
        for i in range(2)
    )
    programs = {"triad": Program(lambda a: triad.call(a, b), a, 1)}
    for precision in ("default", "highest"):
        product = build(jax.jit(lambda a, b, p=precision: jnp.matmul(a, b, precision=p)), left, right)
        programs[precision] = Program(lambda a, call=product.call: call(a, right), left, 1)
    times = {name: np.median(found.wall) for name, found in interleave(programs, repeats).items()}
    operations = 2e-3 * scale.matrix**3
    return {
        "gbyte_per_s": 12e-3 * scale.vector / times["triad"],
        "gflop_per_s": operations / times["default"],
        "gflop_per_s_highest": operations / times["highest"],
    }


def rows(case: str, entries: dict[str, Entry], top: dict[str, float], repeats: int) -> list[dict[str, Any]]:
    """One row a program, floors among them, all timed in turn."""
    times = interleave({name: entry.program for name, entry in entries.items()}, repeats)
    found = []
    for name, entry in entries.items():
        row = {"case": case, "solver": name, "update_us": times[name].row()["wall_us"], "spread": times[name].row()["spread"]}
        if entry.work is not None:
            work, seconds = entry.work(entry.program.carry), 1e-6 * row["update_us"]
            row |= {"over_floor": times[name].over(times[entry.floor])[0]}
            row |= {
                "gflop": 1e-9 * work.flop,
                "gbyte": 1e-9 * work.bytes,
                "counted": work.how,
                "xla_gflop": 1e-9 * work.xla_flop,
            }
            row |= {"flop_share": 1e-9 * work.flop / seconds / top["gflop_per_s"]}
            row |= {"byte_share": 1e-9 * work.bytes / seconds / top["gbyte_per_s"]}
        row |= {"compile_s": entry.built.seconds, "peak_mb": 1e-6 * entry.built.peak}
        numbers = [leaf for leaf in jax.tree.leaves(entry.program.carry) if jnp.issubdtype(leaf.dtype, jnp.floating)]
        found.append(row | {"finite": bool(all_finite(numbers))})
    return found


def measure(settings: Settings, scale: Scale, top: dict[str, float]) -> pd.DataFrame:
    """All the cases."""
    found = []
    for case in settings.cases:
        if case == "maml":
            entries = device_cases.maml(scale.tasks) if "maml" in settings.solvers else {}
        else:
            kind, size = {"logistic": ("ijcnn1", scale.logistic), "softmax": ("cleaning", scale.softmax)}[case]
            entries = device_cases.linear(kind, size, settings.solvers)
        found += rows(case, entries, top, settings.repeats)
    return pd.DataFrame(found)


def main(args: Sequence[str]) -> pd.DataFrame:
    """Measure, print and write."""
    settings = tyro.cli(Settings, args=args, prog="python -m experiments.speed --device", description=Settings.__doc__)
    if settings.repeats < 1:
        raise SystemExit(f"--repeats: got {settings.repeats}, expected at least 1")
    settings.out.mkdir(parents=True, exist_ok=True)
    device = find(settings.device)
    scale = QUICK if settings.quick else CPU if device.platform == "cpu" else LARGE
    with jax.default_device(device):
        facts = conditions(settings) | {"device": device.device_kind, "platform": device.platform}
        top = ceilings(scale, settings.repeats)
        print(
            f"{device.platform}: {device.device_kind}. Ceilings: {' '.join(f'{k} {v:.4g}' for k, v in top.items())}", flush=True
        )
        table = measure(settings, scale, top)
    versions = {name: facts["versions"][name] for name in ("jax", "jaxlib")}
    table = table.assign(date=facts["date"], device=device.device_kind, **top, **versions)
    table.to_csv(settings.out / "devices.csv", index=False)
    facts |= {"ceilings": top, "load_at_end": load()}
    (settings.out / "devices.json").write_text(json.dumps(facts, indent=2) + "\n")
    shown = table.drop(columns=["counted", "date", "device", *top, *versions])
    print(shown.to_string(index=False, float_format="{:.3g}".format, na_rep=""))
    return table
