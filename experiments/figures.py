"""Figures of the comparisons."""

from pathlib import Path

import matplotlib
import pandas as pd

matplotlib.use("Agg")  # figures go to files, also where there is no screen
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.ticker import MaxNLocator, NullFormatter

from experiments.methods import UNIT

#: One colour and line style a solver, the same in every figure (colours of Okabe and Ito, and of Tol: told apart by all).
STYLES = {
    "soba": ("#0072B2", "-"),
    "ma_soba": ("#56B4E9", "--"),
    "saba": ("#D55E00", "-"),
    "srba": ("#009E73", "-"),
    "spaba": ("#CC79A7", "--"),
    "storm_soba": ("#E69F00", "-."),
    "fsla": ("#000000", ":"),
    "stocbio": ("#882255", "-"),
    "aid_cg": ("#332288", "-"),
    "aid_fp": ("#332288", "--"),
    "hoag": ("#332288", ":"),
    "itd_bio": ("#44AA99", "-"),
    "itd_truncated": ("#44AA99", "--"),
    "pzobo": ("#44AA99", ":"),
    "bsa": ("#999933", "-"),
    "ttsa": ("#999933", "--"),
    "amigo": ("#AA4499", "-."),
    "mrbo": ("#117733", "-"),
    "sustain": ("#117733", "--"),
    "vrbo": ("#DDCC77", "-"),
    "meha": ("#CC3311", "-"),
    "bome": ("#EE7733", "--"),
    "pbgd": ("#EE7733", ":"),
    "f2sa": ("#117733", ":"),
    "f2ba": ("#117733", "-."),
    "f2sa_p": ("#88CCEE", "-"),
    "all rows": ("#777777", "-"),
    "clean rows": ("#777777", "--"),
    "validation rows": ("#777777", ":"),
}


def comparison(rows: pd.DataFrame, labels: dict[str, str], title: str, path: Path, *, log_work: bool = False) -> None:
    """Median and 20/80 % band over seeds of every metric in ``labels``, against seconds and against oracle calls.

    ``log_work`` makes the horizontal axes logarithmic (the start, at 0, is then left out).  Writes ``path`` with the endings
    .png and .pdf.
    """
    axes_of = {"seconds": "seconds (one run, metrics excluded)", "oracle_calls": f"oracle calls (on {UNIT} rows)"}
    if log_work:
        rows = rows.query("step > 0")
    figure, axes = plt.subplots(
        len(labels), 2, figsize=(9.5, 3.2 * len(labels)), sharey="row", squeeze=False, layout="constrained"
    )
    for row, (metric, label) in zip(axes, labels.items(), strict=True):
        for axis, (column, name) in zip(row, axes_of.items(), strict=True):
            for solver, part in rows.groupby("solver", sort=False):
                color, style = STYLES.get(str(solver), (None, "-"))
                # A run that diverged counts as infinitely bad, and is named: left out, it would flatter the others.
                groups = part.assign(**{metric: part[metric].fillna(np.inf)}).groupby("step", sort=True)
                x = groups[column].median()
                low, middle, high = (
                    groups[metric].quantile(q, interpolation="higher").replace(np.inf, np.nan).to_numpy()
                    for q in (0.2, 0.5, 0.8)
                )
                lost = part.loc[part[metric].isna(), "seed"].nunique()
                legend = f"{solver} ({lost} diverged)" if lost else str(solver)
                (line,) = axis.plot(x, middle, style, color=color, label=legend, linewidth=1.8)
                axis.fill_between(x, low, high, color=line.get_color(), alpha=0.18, linewidth=0)
            if metric.endswith(("suboptimality", "norm", "error", "loss")):
                axis.set_yscale("log")
                axis.yaxis.set_major_formatter("{x:.3g}")
                low, high = axis.get_ylim()
                narrow = high < 30 * low
                axis.yaxis.set_minor_formatter("{x:.2g}" if narrow else NullFormatter())
            if log_work:
                axis.set_xscale("log")
                axis.xaxis.set_minor_formatter(NullFormatter())  # on less than a decade they would overlap
            else:
                axis.xaxis.set_major_locator(MaxNLocator(6))
            axis.set_xlabel(name)
            axis.grid(visible=True, which="major", alpha=0.25)
            axis.spines[["top", "right"]].set_visible(False)
        row[0].set_ylabel(label)
    handles, names = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=min(len(names), 7), frameon=False)
    seeds = int(np.max(rows["seed"]))
    figure.suptitle(title + (f"\nmedian and 20/80 % band over {seeds} seeds" if seeds > 1 else ""), fontsize=10)
    for ending in ("png", "pdf"):
        figure.savefig(path.with_suffix(f".{ending}"), dpi=150)
    plt.close(figure)
