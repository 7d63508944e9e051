"""Checkpoints of a master of ADBO: its state, and what its host loop knows; whole or not there at all."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from bilevel_jax.distributed.adbo import Master


class Store:
    """A folder with the last three checkpoints."""

    def __init__(self, folder: Path, manager: Any) -> None:
        self.folder, self.manager = folder, manager

    def save(self, number: int, master: Master, known: dict[str, Any]) -> None:
        """Save a state under a number that grows; nothing happens if it is there.  ``known`` is of lists, numbers and text."""
        import orbax.checkpoint as ocp

        if number not in self.manager.all_steps():
            args = ocp.args.Composite(master=ocp.args.StandardSave(master), known=ocp.args.JsonSave(known))
            self.manager.save(number, args=args)
            self.manager.wait_until_finished()

    def last(self, settings: dict[str, Any], shapes: Master) -> tuple[Master, dict[str, Any]] | None:
        """The last state and what was known, or None; ValueError if it is of a run with other settings."""
        import orbax.checkpoint as ocp

        number = self.manager.latest_step()
        if number is None:
            return None
        known = self.manager.restore(number, args=ocp.args.Composite(known=ocp.args.JsonRestore())).known
        other = [name for name, value in settings.items() if known["settings"].get(name) != value]
        if other:
            differ = ", ".join(f"{name} = {known['settings'].get(name)}, expected {settings[name]}" for name in other)
            raise ValueError(f"checkpoint: {self.folder} holds a run with {differ}: give another folder")
        args = ocp.args.Composite(master=ocp.args.StandardRestore(shapes))
        return self.manager.restore(number, args=args).master, known


@contextmanager
def store(folder: Path | str | None) -> Iterator[Store | None]:
    """The checkpoints of a folder, which is made; None without one."""
    if folder is None:
        yield None
        return
    try:
        import orbax.checkpoint as ocp
    except ImportError as error:
        raise ImportError("checkpoint: needs orbax, expected pip install 'bilevel-jax[cluster]'") from error
    folder = Path(folder).absolute()
    with ocp.CheckpointManager(folder, options=ocp.CheckpointManagerOptions(max_to_keep=3)) as manager:
        yield Store(folder, manager)
