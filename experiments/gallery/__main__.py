"""Collect the figures of all experiments into one static page, with the commands and settings that made them.

``python -m experiments.gallery`` writes experiments/gallery/index.html over the figures that were reported;
``python -m experiments.gallery --figures results/figures`` one over the figures that `experiments.reproduce` has made.
"""

import dataclasses
from pathlib import Path

import tyro

from experiments.catalogue import FIGURES
from experiments.gallery.page import Shown, page
from experiments.reproduce import reproduced

HERE = Path(__file__).parent


@dataclasses.dataclass(frozen=True)
class Config:
    """One page over all figures."""

    figures: Path | None = None
    """folder of a run of experiments.reproduce, where the page is written to (default: experiments/gallery, the figures that
    were reported)"""


def reported() -> str:
    """The page over the pictures of this folder."""
    introduction = (
        "Each picture was made by the command named beside it. `make figures` runs the laptop commands of all of them, and "
        "python -m experiments.reproduce --only NAME that of one. What was found is said in experiments/README.md."
    )
    drawn = [figure for figure in FIGURES if figure.drawn]
    saved = HERE.parent / "saved"
    return page((Shown(figure, figure.command, f"{figure.name}.png", saved / figure.name) for figure in drawn), introduction)


def main(config: Config) -> None:
    """Write the page."""
    if config.figures is not None and not config.figures.is_dir():
        raise SystemExit(f"--figures: got {config.figures}, expected a folder that experiments.reproduce has written")
    folder = config.figures or HERE
    (folder / "index.html").write_text(reproduced(folder) if config.figures else reported())
    print(f"page: {folder / 'index.html'}")


if __name__ == "__main__":
    main(tyro.cli(Config))
