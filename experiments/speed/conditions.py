"""What measured figures depend on."""

import os
import platform
from collections.abc import Iterable
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import jax

import bilevel_jax
from experiments.speed.timing import CAN_PIN


def conditions(settings: Any) -> dict[str, Any]:
    """Settings (a dataclass), versions, and the machine and its load."""
    versions = {"python": platform.python_version(), "bilevel_jax": bilevel_jax.__version__}
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "settings": asdict(settings) | {"out": str(settings.out)},
        "versions": versions | installed(("jax", "jaxlib", "optax", "numpy")),
        "device": jax.devices()[0].device_kind,
        "devices": jax.device_count(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "usable_cores": len(os.sched_getaffinity(0)) if CAN_PIN else os.cpu_count(),
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
        "compilation_cache": bool(jax.config.values.get("jax_compilation_cache_dir")),  # if so, compile_s may be a look-up
        "load_at_start": load(),
    }


def installed(names: Iterable[str]) -> dict[str, str]:
    """Versions of those packages that are there."""
    found = {}
    for name in names:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def load() -> float | None:
    """Programs that wanted a core in the last minute, of this machine."""
    return round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor()
