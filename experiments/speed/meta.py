"""The command: ``python -m experiments.speed meta --help``.  Outer steps a second of MAML, by this library and by others."""

import json
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pandas as pd
import tyro

from experiments.speed import maml_worker, meta_cases
from experiments.speed.conditions import conditions, installed, load
from experiments.speed.hypergradients import measure, torch_variants
from experiments.speed.meta_cases import Sizes
from experiments.speed.timing import pinned

NAMES = (*meta_cases.VARIANTS, *maml_worker.VARIANTS)
TINY = Sizes(tasks=2, ways=3, queries=2, side=8, steps=2)
#: Relative error of a meta-gradient in float32 above which it counts as another one.
TOLERANCE = 1e-5


@dataclass(frozen=True)
class Settings:
    """Time of one meta-gradient of MAML: 32 tasks of 5 classes, one support and 15 query images each, 5 inner steps."""

    networks: tuple[Literal["convolution", "mlp"], ...] = ("convolution", "mlp")
    """Two convolutions of stride 2 and a linear head, and two layers of 64 and a linear head."""
    only: tuple[str, ...] = ()
    """Variants to time, beside "ours scan"; all by default."""
    repeats: int = 7
    """Measurements of each variant, of which the median is reported."""
    torch_python: str = sys.executable
    """Interpreter of an environment with torch, torchopt, higher and learn2learn."""
    out: Path = Path("results/speed")
    """Folder for meta.csv and meta.json."""
    quick: bool = False
    """Tiny sizes, to see that everything runs."""
    pin: bool = False
    """Keep to one core, where process time is the work done."""


def main(args: Sequence[str] | None = None) -> None:
    """Measure, print and write."""
    settings = tyro.cli(Settings, args=args, prog="python -m experiments.speed meta", description=Settings.__doc__)
    check(settings)
    settings.out.mkdir(parents=True, exist_ok=True)
    left_out, tables = {}, []
    with pinned(settings.pin):
        config = conditions(settings)
        config["versions"] |= installed(("flax",))
        for kind in settings.networks:
            case = meta_cases.case(kind, TINY if settings.quick else Sizes())
            with torch_variants(settings.torch_python, case, maml_worker.__file__) as others:
                rows, missing = measure(case, others, settings.only, settings.repeats)
                config["versions"] |= others.versions
            left_out |= missing
            tables.append(table_of(rows))
            print(
                f"\n{case.name}\n{tables[-1].drop(columns='case').to_string(index=False, float_format='{:.3g}'.format)}",
                flush=True,
            )
    table = pd.concat(tables)
    table.to_csv(settings.out / "meta.csv", index=False)
    config |= {"left_out": left_out, "load_at_end": load()}
    (settings.out / "meta.json").write_text(json.dumps(config, indent=2) + "\n")
    for name, why in left_out.items():
        print(f"left out: {name}: {why}")
    print(f"\n{config['device']} ({config['processor']}), {config['usable_cores']} core(s), jax {config['versions']['jax']}")
    wrong = table.query("not error <= @TOLERANCE")
    if len(wrong):
        raise SystemExit(
            f"another meta-gradient than in float64:\n{wrong[['case', 'variant', 'error']].to_string(index=False)}"
        )


def check(settings: Settings) -> None:
    """Refuse what cannot be measured."""
    if settings.repeats < 1:
        raise SystemExit(f"--repeats: got {settings.repeats}, expected at least 1")
    if unknown := set(settings.only) - set(NAMES):
        raise SystemExit(f"--only: got {sorted(unknown)}, expected some of {list(NAMES)}")
    if not settings.networks:
        raise SystemExit("--networks: got none, expected convolution, mlp or both")
    if shutil.which(settings.torch_python) is None:
        raise SystemExit(f"--torch-python: got {settings.torch_python!r}, expected a Python interpreter")


def table_of(rows: list[dict]) -> pd.DataFrame:
    """Outer steps a second (median and best), and over those of the scan."""
    table = pd.DataFrame(rows).drop(columns=["residual", "result"])
    rates = {"steps_per_s": 1e3 / table.pop("wall_ms"), "best_per_s": 1e3 / table.pop("best_ms")}
    for place, (name, column) in enumerate(rates.items(), 2):
        table.insert(place, name, column)
    return table
