"""What a comparison comes to: seconds to one accuracy, and the figure."""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.ticker import NullFormatter

from experiments.figures import plt

#: One colour and line style a method, and its name.
STYLES = {
    "adbo": ("#D55E00", "-", "ADBO"),
    "sdbo": ("#0072B2", "-", "SDBO"),
    "fednest": ("#009E73", "--", "FedNest"),
    "d_soba": ("#CC79A7", "-.", "D-SOBA on a ring"),
    "saba": ("#000000", ":", "SABA, one machine (no delays)"),
}
#: Share of the lower of two best accuracies that is to be reached.
SHARE = 0.99


def last(history: Any, keys: list[str]) -> Any:
    """The last rows of the runs; one that diverged counts as infinitely bad: left out, it would flatter the others."""
    return history.groupby(keys, sort=False).tail(1).fillna({"accuracy": 0.0, "loss": np.inf})


def reached(part: Any, there: Any, column: str) -> float:
    """The first value of ``column`` in a run where ``there``; infinite if it never is, and for a run that diverged."""
    return float(part[there][column].iloc[0]) if there.any() and part["loss"].notna().all() else np.inf


def ratios(history: Any) -> pd.DataFrame:
    """SDBO, FedNest and D-SOBA against ADBO, a row a rival, straggler setting and seed.

    ``target``: 99 % of the lower one of the best accuracies of the two in the run.  ``ratio``: seconds of the rival to it over
    those of ADBO; ``step_ratio`` (SDBO only): the same of iterations; ``byte_ratio``: the same of bytes.  ``loss_ratio``:
    seconds to the higher one of the lowest test losses, over 0.99, the same way; it says more where most rows are of one class.
    """
    history = history.assign(bytes=history["bytes_up"] + history["bytes_down"])
    rows = []
    for (slow, seed), both in history.groupby(["stragglers", "seed"]):
        parts = dict(tuple(both.groupby("method")))
        for rival in ("sdbo", "fednest", "d_soba"):
            if not {"adbo", rival} <= set(parts):
                continue
            target = SHARE * min(parts[name]["accuracy"].max() for name in ("adbo", rival))
            highest = max(parts[name]["loss"].min() for name in ("adbo", rival)) / SHARE
            pair = [parts[name] for name in ("adbo", rival)]
            found = {c: [reached(part, part["accuracy"] >= target, c) for part in pair] for c in ("seconds", "step", "bytes")}
            by_loss = [reached(part, part["loss"] <= highest, "seconds") for part in pair]
            rows.append(
                {
                    "rival": rival,
                    "stragglers": slow,
                    "seed": seed,
                    "target": target,
                    "adbo_seconds": found["seconds"][0],
                    "rival_seconds": found["seconds"][1],
                    "ratio": found["seconds"][1] / found["seconds"][0],
                    "step_ratio": found["step"][1] / found["step"][0] if rival == "sdbo" else np.nan,
                    "byte_ratio": found["bytes"][1] / found["bytes"][0],
                    "loss_ratio": by_loss[1] / by_loss[0],
                }
            )
    return pd.DataFrame(rows)


def claims(table: Any, *, simulated: bool = True) -> list[dict[str, Any]]:
    """The claims of the paper on this comparison, on the medians over the seeds."""
    if table.empty or "sdbo" not in set(table["rival"]):
        return []
    medians = table[table["rival"] == "sdbo"].groupby("stragglers")[["ratio", "step_ratio"]].median()
    clock, names = "virtual" if simulated else "real", {"sdbo": "SDBO", "fednest": "FedNest"}
    found = [
        {
            "claim": f"ADBO before {names[rival]} in {clock} seconds, {slow} stragglers: ratio above 1",
            "measured": float(ratio),
            "holds": bool(ratio > 1),
        }
        for (rival, slow), ratio in table.groupby(["rival", "stragglers"], sort=False)["ratio"].median().items()
        if rival in names
    ]
    if len(medians) > 1:
        few, many = medians["ratio"].iloc[[0, -1]]
        found.append(
            {
                "claim": "the gap is wider with stragglers: ratio of the ratios above 1",
                "measured": many / few,
                "holds": many > few,
            }
        )
    first = medians["step_ratio"].iloc[0]
    found.append(
        {
            "claim": "per iteration the order is the reverse: SDBO takes no more iterations, ratio at most 1",
            "measured": float(first),
            "holds": bool(first <= 1),
        }
    )
    return found


def draw(history: Any, title: str, path: Path, clock: str) -> None:
    """Accuracy and loss against seconds, without and with stragglers, and against bytes.  Median and range over the seeds.

    Writes ``path`` with the endings .png and .pdf.
    """
    slow = sorted(map(int, history["stragglers"].unique()))
    names = {s: f"{s} straggler{'s' * (s > 1)}" for s in slow} | {0: "all workers alike"}
    panels = [(s, "seconds", f"{clock} seconds, {names[s]}") for s in slow]
    panels.append((slow[0], "bytes", "bytes sent, up and down"))
    history = history.assign(bytes=history["bytes_up"] + history["bytes_down"])
    figure, axes = plt.subplots(
        2, len(panels), figsize=(4.4 * len(panels), 6.4), sharey="row", sharex="col", squeeze=False, layout="constrained"
    )
    for row, metric in zip(axes, ("accuracy", "loss"), strict=True):
        for axis, (condition, column, label) in zip(row, panels, strict=True):
            for name, part in history[history["stragglers"] == condition].groupby("method", sort=False):
                _curve(axis, str(name), part, column, metric)
            axis.set_xscale("log")
            axis.xaxis.set_minor_formatter(NullFormatter())
            if metric == "loss":
                axis.set_yscale("log")
                axis.yaxis.set_major_formatter("{x:.3g}")
                low, high = axis.get_ylim()
                axis.yaxis.set_minor_formatter("{x:.2g}" if high < 10 * low else NullFormatter())
                axis.set_xlabel(label)
            axis.grid(visible=True, which="major", alpha=0.25)
            axis.spines[["top", "right"]].set_visible(False)
        row[0].set_ylabel(f"test {metric} of the consensus")
    best = history.groupby("method")["accuracy"].max().max()
    axes[0][0].set_ylim(max(0.0, axes[0][0].get_ylim()[0]), min(1.0, best + 0.03))
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
    seeds = history["seed"].nunique()
    figure.suptitle(title + (f"\nmedian and range over {seeds} seeds" if seeds > 1 else ""), fontsize=10)
    for ending in ("png", "pdf"):
        figure.savefig(path.with_suffix(f".{ending}"), dpi=150)
    plt.close(figure)


def _curve(axis: Any, name: str, part: Any, column: str, metric: str) -> None:
    color, style, label = STYLES[name]
    lost = part.loc[part[metric].isna(), "seed"].nunique()
    label = f"{label} ({lost} diverged)" if lost else label
    if column == "bytes" and name == "saba":  # sends nothing: where it ends
        end = last(part, ["seed"])[metric].median()
        axis.axhline(end, linestyle=style, color=color, linewidth=1.2)
        return
    worst = 0.0 if metric == "accuracy" else np.inf
    groups = part[part["step"] > 0].fillna({metric: worst}).groupby("step")
    x = groups[column].median()
    middle, low, high = (groups[metric].agg(kind).replace(np.inf, np.nan) for kind in ("median", "min", "max"))
    axis.plot(x, middle, style, color=color, label=label, linewidth=1.7)
    axis.fill_between(x, low, high, color=color, alpha=0.15, linewidth=0)
