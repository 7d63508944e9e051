"""The folder of a search: config.json, history.csv, cells.json, evaluation.csv, checkpoints of the running search, figure."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from experiments import figures
from experiments.architecture_search.genotype import as_json, from_json
from experiments.architecture_search.network import Cells
from experiments.figures import plt

LABELS = {"darts_first": "DARTS, first order", "darts_second": "DARTS, one step ahead", "meha": "MEHA"}
figures.STYLES |= {"darts_first": ("#E69F00", "-"), "darts_second": ("#44AA99", "-"), "meha": ("#D55E00", "-")}


@dataclasses.dataclass(frozen=True)
class Record:
    """What is known of the runs so far."""

    out: Path

    def table(self, name: str) -> pd.DataFrame:
        """The rows of history.csv or evaluation.csv."""
        path = self.out / f"{name}.csv"
        return pd.read_csv(path) if path.exists() else pd.DataFrame({"solver": [], "seed": [], "step": [], "kind": []})

    def add(self, name: str, row: dict[str, Any]) -> None:
        """Append a row."""
        path = self.out / f"{name}.csv"
        pd.DataFrame([row]).to_csv(path, mode="a", index=False, header=not path.exists())

    def forget(self, solver: str, seed: int, after: int) -> float:
        """Drop what a search wrote after a step; returns the seconds up to there."""
        known: Any = self.table("history")
        mine: Any = (known["solver"] == solver) & (known["seed"] == seed)
        if not mine.any():
            return 0.0
        known = known[~mine | (known["step"] <= after)]
        known.to_csv(self.out / "history.csv", index=False)
        return float(known.loc[mine & (known["step"] <= after), "seconds"].max()) if after >= 0 else 0.0

    def cells(self) -> dict[str, Cells]:
        """The cells found so far, by ``solver/seed``."""
        path = self.out / "cells.json"
        return {name: from_json(known) for name, known in json.loads(path.read_text()).items()} if path.exists() else {}

    def keep(self, name: str, cells: Cells) -> None:
        """Write the cells that a search has found."""
        known = {name: as_json(c) for name, c in {**self.cells(), name: cells}.items()}
        lines = ",\n".join(f"  {json.dumps(name)}: {json.dumps(one)}" for name, one in known.items())
        (self.out / "cells.json").write_text("{\n" + lines + "\n}\n")

    def evaluated(self, solver: str, seed: int, kind: str) -> bool:
        """Whether the accuracy of these cells is known."""
        known: Any = self.table("evaluation")
        return bool(((known["solver"] == solver) & (known["seed"] == seed) & (known["kind"] == kind)).any())

    def draw(self, title: str) -> None:
        """figure.png and figure.pdf: the searches, and searched against random cells."""
        history, evaluation = self.table("history"), self.table("evaluation")
        figure, axes = plt.subplots(1, 3, figsize=(12, 3.6), layout="constrained")
        for solver, part in history.groupby("solver", sort=False):
            color, _ = figures.STYLES[str(solver)]
            for axis, column in zip(axes, ("validation_accuracy", "test_accuracy"), strict=False):
                by_step = part.groupby("step")[column]
                x, spread = np.array(sorted(part["step"].unique())), (by_step.min(), by_step.max())
                axis.plot(x, by_step.mean(), color=color, label=LABELS[str(solver)], linewidth=1.8)
                axis.fill_between(x, *spread, color=color, alpha=0.18, linewidth=0)
        for axis, name in zip(axes, ("validation", "test"), strict=False):
            axis.set(xlabel="updates", ylabel=f"{name} accuracy of the supernet")
        limits = [limit for axis in axes[:2] for limit in axis.get_ylim()]
        for axis in axes[:2]:
            axis.set_ylim(min(limits), max(limits))
        solvers = list(dict.fromkeys(evaluation["solver"]))
        for place, solver in enumerate(solvers):
            for kind, offset, marker in (("searched", -0.12, "o"), ("random", 0.12, "x")):
                color = figures.STYLES[str(solver)][0] if kind == "searched" else "0.35"
                part = evaluation.query("solver == @solver and kind == @kind")["accuracy"]
                axes[2].plot([place + offset] * len(part), part, marker, color=color)
                axes[2].hlines(part.mean(), place + offset - 0.09, place + offset + 0.09, color="black")
        axes[2].set_xticks(range(len(solvers)), [LABELS[str(s)].replace(", ", ",\n") for s in solvers])
        axes[2].set_ylabel("test accuracy, trained from scratch")
        axes[2].set_xlabel("o searched, x random of the same size, - mean")
        for axis in axes:
            axis.grid(visible=True, alpha=0.25)
            axis.spines[["top", "right"]].set_visible(False)
        axes[0].legend(frameon=False, loc="lower right")
        figure.suptitle(title, fontsize=10)
        for ending in ("png", "pdf"):
            figure.savefig(self.out / f"figure.{ending}", dpi=150)
        plt.close(figure)

    def summary(self) -> pd.DataFrame:
        """Accuracy of searched and random cells by method, and the mean of their differences seed by seed."""
        wide = self.table("evaluation").pivot_table(index=["solver", "seed"], columns="kind", values="accuracy", sort=False)
        wide["difference"] = wide["searched"] - wide["random"]
        return wide.groupby("solver", sort=False).agg(["mean", "std"])
