"""The command: ``python -m experiments.speed --help``.  What the columns mean: see the package."""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from experiments.speed import devices, first_order, hypergradients, meta, steps
from experiments.speed.conditions import conditions, load
from experiments.speed.timing import CAN_PIN, pinned


@dataclass(frozen=True)
class Settings:
    """Step times of solvers beside the floor.

    ``hypergradients``, ``first_order`` or ``meta`` first times those instead; ``--device gpu`` times updates that fill a device
    beside what it can do.  Each has a ``--help`` of its own.
    """

    shapes: tuple[Literal["ijcnn1", "covtype", "cleaning"], ...] = ("ijcnn1", "covtype", "cleaning")
    """Problems to time."""
    solvers: tuple[Literal["soba", "ma_soba", "saba", "srba"], ...] = ("soba", "ma_soba", "saba", "srba")
    """Solvers to time; SOBA is always among them."""
    repeats: int = 21
    """Measurements of each program, of which the median is reported."""
    seeds_vmapped: int = 8
    """Seeds of the vmapped program of SABA."""
    out: Path = Path("results/speed")
    """Folder for the csv files and config.json."""
    quick: bool = False
    """Small shapes, to see that everything runs."""
    pin: bool = CAN_PIN
    """Keep to one core, where process time is the work done."""


def main(args: Sequence[str] | None = None) -> None:
    """Measure, print and write."""
    args = list(sys.argv[1:] if args is None else args)
    others = {"hypergradients": hypergradients.main, "first_order": first_order.main, "meta": meta.main}
    if args and args[0] in others:
        others[args[0]](args[1:])
        return
    if any(argument.split("=")[0] == "--device" for argument in args):
        devices.main(args)
        return
    settings = tyro.cli(Settings, args=args, prog="python -m experiments.speed", description=Settings.__doc__)
    for name in ("repeats", "seeds_vmapped"):
        if getattr(settings, name) < 1:
            raise ValueError(f"{name}: got {getattr(settings, name)}, expected at least 1")
    settings.out.mkdir(parents=True, exist_ok=True)
    with pinned(settings.pin):
        config = conditions(settings)
        tables = steps.measure(settings.shapes, settings.solvers, settings.repeats, settings.seeds_vmapped, settings.quick)
    config["load_at_end"] = load()
    (settings.out / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    for name, table in tables.items():
        table.to_csv(settings.out / f"{name}.csv", index=False)
        print(f"\n{name}\n{table.to_string(index=False, float_format=lambda value: f'{value:.4g}')}")
    print(f"\n{config['device']} ({config['processor']}), {config['usable_cores']} core(s), jax {config['versions']['jax']}")


if __name__ == "__main__":
    main()
