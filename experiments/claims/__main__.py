"""The table of claims, CLAIMS.md, from saved results; or save the results of a run for it.

``python -m experiments.claims``

``python -m experiments.claims --save results/ijcnn1 --as ijcnn1``
"""

import dataclasses
from pathlib import Path
from typing import Annotated

import tyro

from experiments.claims import adbo, later, meha, soba_saba, thesis
from experiments.claims.claim import VERDICTS
from experiments.claims.page import page
from experiments.claims.saved import SAVED, Saved, keep

BODIES = (soba_saba.BODY, thesis.BODY, meha.BODY, adbo.BODY, later.BODY)


@dataclasses.dataclass(frozen=True)
class Config:
    """Write the table of claims from saved results."""

    saved: Path = SAVED
    """folder of saved results"""
    out: Path = SAVED.parent / "CLAIMS.md"
    """file to write"""
    save: Path | None = None
    """copy the tables and settings of this finished run into the saved results, and write nothing else"""
    name: Annotated[str | None, tyro.conf.arg(name="as")] = None
    """the name of that run: one of experiments/catalogue.py or experiments/claims/saved.py"""

    def __post_init__(self) -> None:
        if (self.save is None) != (self.name is None):
            raise SystemExit("--save, --as: got one of them, expected both or neither")


def main(config: Config) -> None:
    """Save a run, or write the table."""
    if config.save is not None and config.name is not None:
        print(f"saved: {keep(config.save, config.name, config.saved)}")
        return
    text, counts = page(BODIES, Saved(config.saved))
    config.out.parent.mkdir(parents=True, exist_ok=True)
    config.out.write_text(text, encoding="utf-8")
    print(f"{config.out}: " + ", ".join(f"{counts[verdict]} {verdict}" for verdict in VERDICTS))


if __name__ == "__main__":
    main(tyro.cli(Config))
