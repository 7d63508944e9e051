"""The saved results: what is kept of the folder of a run, where it lies, and the command that made it."""

import csv
import io
import json
import math
import shutil
from collections import defaultdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from experiments.catalogue import FIGURES

#: The committed folder.
SAVED = Path(__file__).parents[1] / "saved"
#: A table of more rows than the first number is thinned to about the second: evenly spaced ones of each run, and its ends.
LONG, THINNED = 3200, 600
#: Of a run: states, and the seconds of each of its pieces.
SKIPPED = {"checkpoints", "timing.csv"}
#: Columns whose values tell runs apart.
RUN = (
    "family",
    "solver",
    "method",
    "stragglers",
    "seed",
    "features",
    "estimate_rounds",
    "cut_period",
    "warm_start",
    "geometry",
    "N",
)
#: Runs of which no figure is drawn, for a claim or two: commands, as in `experiments.catalogue`.
MORE = {
    "claims_checks": "experiments.claims.checks",
    "few_shot_omniglot_six": "experiments.few_shot --dataset omniglot --solvers maml anil fomaml meha reptile imaml",
    "few_shot_omniglot_itd": "experiments.few_shot --dataset omniglot --solvers maml anil itd_bio fo_itd_bio --steps 600",
    "ijcnn1_fsla": "experiments.hyperparameter_selection --dataset ijcnn1 --solvers fsla --seeds 3",
    "mnist_cleaning_70": "experiments.data_cleaning --dataset mnist --corruption 0.7 --solvers soba saba fsla --seeds 3",
    "mnist_cleaning_90": "experiments.data_cleaning --dataset mnist --corruption 0.9 --solvers soba saba fsla --seeds 3",
    "mnist_cleaning_bsa": "experiments.data_cleaning --dataset mnist --corruption 0.5 --solvers bsa --step-size 0.316 "
    "--outer-ratio 1e-5 --seeds 1",
    "mnist_cleaning_stocbio": "experiments.data_cleaning --dataset mnist --corruption 0.5 --solvers stocbio --step-size 0.0316 "
    "--outer-ratio 1e-4 --seeds 1",
    "newsgroups_batches": "experiments.learned_regularisation --solvers stocbio --batch-sizes 100 500 1000 2000",
    "speed_first_order": "experiments.speed first_order --torch-python PYTHON",
}
COMMANDS = {figure.name: figure.command for figure in FIGURES} | MORE


def command(name: str) -> str:
    """What follows ``python -m`` in the command that made a folder of saved results."""
    return COMMANDS[name]


class Saved(NamedTuple):
    """A folder of saved results."""

    folder: Path = SAVED

    def table(self, name: str, file: str = "history.csv") -> Any:
        """One table of a run."""
        path = self.folder / name / file
        if not path.is_file():
            advice = f"run `python -m {command(name)}` and `python -m experiments.claims --save FOLDER --as {name}`"
            raise SystemExit(f"--saved: got {self.folder}, which has no {name}/{file}: {advice}")
        return pd.read_csv(path)

    def code(self, name: str, solver: str) -> str:
        """How a solver ended, in brackets; nothing where it did so well, or where the experiment does not say."""
        path = self.folder / name / "results.json"
        codes = json.loads(path.read_text()).get(solver, []) if path.is_file() else []
        return "".join(f" ({code})" for code in sorted(set(codes) - {"SUCCESSFUL"}))

    def row(self, name: str, file: str, claim: str) -> Any:
        """The row of a table of claims of an experiment."""
        table = self.table(name, file)
        rows = table[table["claim"] == claim]
        if len(rows) != 1:
            raise SystemExit(f"--saved: got {self.folder}, in which {name}/{file} has {len(rows)} rows {claim!r}, expected one")
        return rows.iloc[0]


# ---- saving -----------------------------------------------------------------------------------------------------------


def keep(source: Path, name: str, folder: Path = SAVED) -> Path:
    """Copy the tables and settings of a run: numbers to six digits, long tables thinned, paths of the machine left out."""
    if name not in COMMANDS:
        raise SystemExit(f"--as: got {name!r}, expected one of {', '.join(sorted(COMMANDS))}")
    if not any(source.glob("*.csv")):
        raise SystemExit(f"--save: got {source}, expected the folder of a finished run, with tables (.csv)")
    found = {p.relative_to(source): p for p in sorted(source.rglob("*")) if p.suffix in (".csv", ".json")}
    texts = {path: _text(file) for path, file in found.items() if not SKIPPED & {*path.parts}}
    # all is read before the old files go: a folder can be saved onto itself, and one that cannot be read costs nothing
    target = folder / name
    shutil.rmtree(target, ignore_errors=True)
    for path, text in texts.items():
        (target / path).parent.mkdir(parents=True, exist_ok=True)
        (target / path).write_text(text)
    return target


def _portable(value: Any) -> Any:
    """Without the entries that are paths of a machine."""
    if isinstance(value, dict):
        return {k: _portable(v) for k, v in value.items() if not (isinstance(v, str) and Path(v).is_absolute())}
    return [_portable(v) for v in value] if isinstance(value, list) else value


def _text(path: Path) -> str:
    """What is kept of a file."""
    if path.suffix == ".json":
        return json.dumps(_portable(json.loads(path.read_text())), indent=1, ensure_ascii=False) + "\n"
    with path.open(newline="") as file:
        table = list(csv.reader(file))
    if not table:
        raise SystemExit(f"--save: got {path}, which is empty, expected the tables of a finished run")
    header, *rows = table
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    writer.writerows([_short(field) for field in row] for row in _thinned(header, rows))
    return text.getvalue()


def _thinned(header: list[str], rows: list[list[str]]) -> list[list[str]]:
    if len(rows) <= LONG:
        return rows
    places = [header.index(name) for name in RUN if name in header]
    runs: defaultdict[tuple[str, ...], list[int]] = defaultdict(list)
    for number, row in enumerate(rows):
        runs[tuple(row[place] for place in places)].append(number)
    each = max(2, THINNED // len(runs))
    kept = set()
    for numbers in runs.values():
        kept |= {numbers[int(i)] for i in np.linspace(0, len(numbers) - 1, min(each, len(numbers))).round()}
    return [rows[number] for number in sorted(kept)]


def _short(field: str) -> str:
    """A number with a point or an exponent to six significant digits; anything else as it is."""
    if field.lstrip("+-").isdigit():
        return field
    try:
        number = float(field)
    except ValueError:
        return field
    return f"{number:.6g}" if math.isfinite(number) else field
