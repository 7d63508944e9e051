"""Several processes, one a machine or on one: start the same command in each, with the same options but the last.

    python -m experiments.scaling --coordinator 10.0.0.1:9000 --process 0/2      # on the first machine, whose address it is
    python -m experiments.scaling --coordinator 10.0.0.1:9000 --process 1/2      # on the second

JAX then sees the devices of all of them.  Every process runs the same program on the same seeds, and only process 0 writes.
"""

import re
from dataclasses import dataclass

import jax


@dataclass(frozen=True)
class Processes:
    """Which of several processes this is."""

    coordinator: str | None = None
    """host:port where process 0 listens, the same in every process; ``auto`` on a cluster that JAX knows; none: one process"""
    process: str = "0/1"
    """number of this process, and how many there are: 0/2 and 1/2; not with --coordinator auto, where the cluster says it"""


def join(processes: Processes) -> bool:
    """Wait for the other processes, before anything else is asked of JAX, and say whether this one writes.

    Raises:
        SystemExit: for an address or a number that cannot be read, and for one of them without the other.
    """
    number = re.fullmatch(r"(\d+)/(\d+)", processes.process)
    if not number or not int(number[1]) < int(number[2]):
        raise SystemExit(f"--process: got {processes.process!r}, expected the number of this process as in 0/2 or 1/2")
    index, count = int(number[1]), int(number[2])
    if processes.coordinator is None:
        if count > 1:
            raise SystemExit(f"--coordinator: got none, expected host:port of process 0, as --process is {processes.process}")
        return True
    if processes.coordinator == "auto" and processes.process != Processes.process:
        raise SystemExit(f"--process: got {processes.process!r}, expected none with --coordinator auto: the cluster says it")
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    if processes.coordinator == "auto":
        jax.distributed.initialize()
        return jax.process_index() == 0
    if not re.fullmatch(r"[^:\s]+:\d+|\[[0-9a-fA-F:]+\]:\d+", processes.coordinator):
        raise SystemExit(f"--coordinator: got {processes.coordinator!r}, expected host:port, as in 127.0.0.1:9000")
    jax.distributed.initialize(processes.coordinator, num_processes=count, process_id=index)
    return index == 0
