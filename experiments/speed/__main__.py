"""The command: ``python -m experiments.speed --help``.  What the columns mean: see the package."""

import json
import os
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import jax
import tyro

import bilevel_jax
from experiments.speed import steps
from experiments.speed.timing import CAN_PIN, pinned


@dataclass(frozen=True)
class Settings:
    """Step times of solvers beside the floor."""

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
    settings = tyro.cli(Settings, args=args, prog="python -m experiments.speed", description=Settings.__doc__)
    for name in ("repeats", "seeds_vmapped"):
        if getattr(settings, name) < 1:
            raise ValueError(f"{name}: got {getattr(settings, name)}, expected at least 1")
    settings.out.mkdir(parents=True, exist_ok=True)
    with pinned(settings.pin):
        config = conditions(settings)
        tables = steps.measure(settings.shapes, settings.solvers, settings.repeats, settings.seeds_vmapped, settings.quick)
    config["load_at_end"] = _load()
    (settings.out / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    for name, table in tables.items():
        table.to_csv(settings.out / f"{name}.csv", index=False)
        print(f"\n{name}\n{table.to_string(index=False, float_format=lambda value: f'{value:.4g}')}")
    print(f"\n{config['device']} ({config['processor']}), {config['usable_cores']} core(s), jax {config['versions']['jax']}")


def conditions(settings: Settings) -> dict[str, Any]:
    """What the figures depend on."""
    versions = {"python": platform.python_version(), "bilevel_jax": bilevel_jax.__version__}
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "settings": asdict(settings) | {"out": str(settings.out)},
        "versions": versions | {name: version(name) for name in ("jax", "jaxlib", "optax", "numpy")},
        "device": jax.devices()[0].device_kind,
        "devices": jax.device_count(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "usable_cores": len(os.sched_getaffinity(0)) if CAN_PIN else os.cpu_count(),
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
        "compilation_cache": bool(jax.config.values.get("jax_compilation_cache_dir")),  # if so, compile_s may be a look-up
        "load_at_start": _load(),
    }


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor()


def _load() -> float | None:
    """Programs that wanted a core in the last minute, of this machine."""
    return round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None


if __name__ == "__main__":
    main()
