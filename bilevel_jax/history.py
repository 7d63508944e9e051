"""The rows of a long run on disk: whole after any kill."""

import csv
import io
import os
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np


class History:
    """Rows in a csv file: whole after any kill, as a row is one write, and a line that was cut off is dropped."""

    def __init__(self, path: Path, shapes: dict[str, Any]) -> None:
        """Of rows of scalars with these names and dtypes."""
        names = ["step", *(name for name in shapes if name != "step")]
        self.path, self.dtypes = path, {name: np.dtype(shapes[name].dtype) for name in names}
        for name, dtype in self.dtypes.items():
            if not (isinstance(name, str) and name.isprintable()):
                raise ValueError(f"metrics: got the name {name!r}, expected one of printable characters, on one line")
            if jnp.issubdtype(dtype, jnp.complexfloating):
                raise ValueError(f"metrics: got {name!r} of dtype {dtype}, expected a real number")

    def take_up(self, step: int, every: int) -> bool:
        """Drop the rows after a step, to be computed again; False if there is no file."""
        if not self.path.exists():
            return False
        lines, count = self.path.read_text().splitlines(keepends=True), 2 + step // every
        if len(lines) < count or lines[count - 1].rstrip("\n").split(",")[0] != str(step):
            raise ValueError(f"folder: got {self.path} of {len(lines)} lines, expected the rows of a run up to step {step}")
        write(self.path, "".join(lines[:count]))
        return True

    def begin(self, row: dict[str, np.ndarray]) -> None:
        """Make the file, with its first row."""
        head = io.StringIO()
        csv.writer(head, lineterminator="\n").writerow(self.dtypes)  # names may hold commas
        write(self.path, head.getvalue() + self._line(row))

    def add(self, row: dict[str, np.ndarray]) -> None:
        """Write a row."""
        with self.path.open("a") as file:
            file.write(self._line(row))

    def sync(self) -> None:
        """Make the rows as durable as the checkpoint that counts on them."""
        with self.path.open("a") as file:
            os.fsync(file.fileno())

    def columns(self) -> dict[str, np.ndarray]:
        """All rows, one array a name."""
        with self.path.open(newline="") as file:
            rows = list(csv.DictReader(file))
        return {name: np.array([float(row[name]) for row in rows]).astype(dtype) for name, dtype in self.dtypes.items()}

    def _line(self, row: dict[str, np.ndarray]) -> str:
        known = numbers(row)  # as Python writes them, which loses no digit
        return ",".join(repr(known[name]) for name in self.dtypes) + "\n"


def numbers(row: dict[str, np.ndarray]) -> dict[str, float]:
    """A row of scalars as Python's numbers, which lose no digit when they are written."""
    return {name: int(value) if np.issubdtype(value.dtype, np.bool_) else value.item() for name, value in row.items()}


def write(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    part = path.with_name(path.name + ".part")
    with part.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)
