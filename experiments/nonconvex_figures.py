"""Figures of `experiments.nonconvex`."""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.colors import LogNorm
from matplotlib.lines import Line2D

from experiments.figures import plt

#: One colour and line style a method.
STYLES = {
    "MEHA": ("#D55E00", "-"),
    "BOME": ("#0072B2", "-"),
    "F2SA": ("#009E73", "-"),
    "F2SA-2": ("#009E73", "--"),
    "PBGD": ("#56B4E9", "-"),
    "BDA": ("#882255", "-"),
    "IAPTT": ("#AA4499", "--"),
    "BVFIM": ("#999933", "-"),
    "BVFSM": ("#999933", "--"),
    "sl-BAMM": ("#000000", "-"),
    "AID-CG": ("#332288", ":"),
    "ITD": ("#44AA99", "--"),
    "grid, one value": ("#000000", "-"),
    "random": ("#999933", "-"),
    "TPE": ("#E69F00", "-"),
    "exact derivative, from 0": ("#332288", "-"),
    "exact derivative, from the upper end": ("#332288", ":"),
    "MEHA, numbers of the public code": ("#D55E00", ":"),
}
POWERS = {0.0: "#000000", 0.25: "#0072B2", 0.49: "#D55E00"}
DASHES = {"residual": "-", "theta": ":", "gap": "--"}
NAMES = {"residual": "least R so far", "theta": "least |theta - theta*| so far", "gap": "gap"}


def draw(problem: str, tables: dict[str, pd.DataFrame], path: Path) -> None:
    """Writes ``path`` with the endings .png and .pdf."""
    if problem == "sine":
        figure = plt.figure(figsize=(13, 11), layout="constrained")
        rows: Any = figure.subfigures(3, 1, height_ratios=(4, 3, 4))
        upper, lower = rows[0].subplots(1, 2), rows[2].subplots(1, 2)
        errors(upper[0], tables["runs"], "from x = -6, z = 0")
        success(upper[1], tables["starts"])
        heat(rows[1], tables["basins"])
        rates(lower[0], tables["rates"])
        scaling(lower[1], tables["sizes"].query("variant == 'one x a z'"))
    elif problem == "merely_convex":
        figure, axes = plt.subplots(1, 3, figsize=(16, 4.8), layout="constrained")
        errors(axes[0], tables["runs"], "from 0.01")
        rates(axes[1], tables["rates"])
        scaling(axes[2], tables["sizes"])
    else:
        dims = tables["runs"]["n"].unique()
        figure, axes = plt.subplots(1, len(dims) + 1, figsize=(4.6 * (len(dims) + 1), 4.8), layout="constrained")
        for axis, n in zip(axes, dims, strict=False):
            gaps(axis, tables["runs"].query("n == @n and scale == 'x in [0, 1]'"), f"n = {n}, x in [0, 1]")
        figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=7, frameon=False)
        rates(axes[-1], tables["rates"])
    for axis in figure.get_axes():
        axis.title.set_fontsize(10)
        axis.spines[["top", "right"]].set_visible(False)
    for ending in ("png", "pdf"):
        figure.savefig(path.with_suffix(f".{ending}"), dpi=150)
    plt.close(figure)


def errors(axis: Any, runs: pd.DataFrame, where: str) -> None:
    """The error against gradient calls, to three times those that it takes to 1 %."""
    for name in runs["method"].unique():
        color, style = STYLES[name]
        part: Any = runs[(runs["method"] == name) & (runs["update"] > 0)]
        axis.plot(
            part["gradient_calls"], part["error"].where(part["error"] < 100), style, color=color, label=name, linewidth=1.6
        )
    axis.axhline(0.01, color="grey", linewidth=0.8)
    axis.set(xscale="log", yscale="log", ylim=(1e-4, 30), xlabel="gradient calls", ylabel="largest relative error of x and z")
    axis.set_title(f"each method at its fastest setting, {where}")
    axis.legend(frameon=False, fontsize=8, ncols=2, loc="lower left")
    axis.grid(visible=True, alpha=0.25)


def success(axis: Any, table: pd.DataFrame) -> None:
    """From how many starts of the grid each method solves the problem, and how fast."""
    table = table.sort_values(["solved", "gradient_calls"], ascending=[True, False])
    colors = [STYLES[name][0] for name in table["method"]]
    bars = axis.barh(table["method"], table["solved"], color=colors, height=0.7)
    words = [f"{calls:,.0f} calls" if np.isfinite(calls) else "" for calls in table["gradient_calls"]]
    axis.bar_label(bars, words, padding=4, fontsize=8)
    axis.set(xlim=(0, 31), xlabel=f"of {table['starts'].iloc[0]} starts in [-8, 8]^2, solved (to the right: median calls)")
    axis.set_title("each method at the setting that solves the most")


def heat(figure: Any, table: pd.DataFrame) -> None:
    """Updates of MEHA from every start, one panel a c_low; crosses where it does not solve the problem."""
    levels = table["c_low"].unique()
    axes = figure.subplots(1, len(levels), sharey=True)
    updates = table["updates"].to_numpy()
    solved = updates[np.isfinite(updates)]
    norm = LogNorm(max(solved.min(), 1), max(solved.max(), 2)) if len(solved) else LogNorm(1, 2)
    image = None
    for axis, c in zip(axes, levels, strict=True):
        part = table.query("c_low == @c").pivot(index="z", columns="x", values="updates")
        image = axis.imshow(part.replace(np.inf, np.nan), origin="lower", norm=norm, cmap="viridis_r")
        for (i, j), value in np.ndenumerate(part.to_numpy()):
            text, color = (
                (f"{value:.0f}", "white" if norm(value) > 0.5 else "black") if np.isfinite(value) else ("x", "#D55E00")
            )
            axis.text(j, i, text, ha="center", va="center", fontsize=7, color=color)
        axis.set_xticks(range(len(part.columns)), [f"{x:g}" for x in part.columns])
        axis.set_yticks(range(len(part.index)), [f"{z:g}" for z in part.index])
        axis.set(xlabel="x at the start", title=f"c_low = {c:g}: {np.isfinite(part.to_numpy()).sum()} of {part.size}")
    axes[0].set_ylabel("z at the start")
    figure.colorbar(image, ax=axes, label="updates", fraction=0.02)
    figure.suptitle("MEHA, gamma = 0.45, p = 0.49: updates to 1 %, x: not solved", fontsize=10)


def rates(axis: Any, table: pd.DataFrame) -> None:
    """R_k, gap and theta against K, for each p."""
    for p in table["p"].unique():
        part = table.query("p == @p")
        for name, style in DASHES.items():
            values = part[name].where(part[name] > 1e-12)
            axis.loglog(part["update"], values, style, color=POWERS[p], linewidth=1.4)
    handles = [Line2D([], [], color=color, label=f"p = {p:g}") for p, color in POWERS.items()]
    handles += [Line2D([], [], color="grey", ls=style, label=NAMES[name]) for name, style in DASHES.items()]
    axis.legend(handles=handles, frameon=False, fontsize=8, loc="lower left")
    axis.set(xlabel="updates K", title="MEHA: residual, gap and theta")
    axis.grid(visible=True, alpha=0.25)


def scaling(axis: Any, table: pd.DataFrame) -> None:
    """Seconds and updates to the tolerance against n."""
    first = table.dropna(subset="seconds")
    axis.loglog(first["n"], first["seconds"], "o-", color="#0072B2", label="seconds to 1 %")
    last = first.iloc[-1]
    axis.loglog(first["n"], last["seconds"] * first["n"] / last["n"], ":", color="grey", label="proportional to n")
    axis.set(xlabel="n", ylabel="seconds", title="MEHA at one setting: " + _same(first["updates"]))
    axis.legend(frameon=False, fontsize=8)
    axis.grid(visible=True, alpha=0.25)


def _same(updates: Any) -> str:
    low, high = updates.min(), updates.max()
    return f"{low:.0f} updates for every n" if low == high else f"{low:.0f} to {high:.0f} updates"


def gaps(axis: Any, runs: pd.DataFrame, title: str) -> None:
    """f - f* at the inner solution for x against gradient calls."""
    for name, part in runs.groupby("method", sort=False):
        color, style = STYLES[str(name)]
        axis.plot(part["gradient_calls"], part["gap"].clip(lower=1e-6), style, color=color, label=name, linewidth=1.6)
    axis.set(xscale="log", yscale="log", ylim=(8e-7, 2), xlabel="gradient calls", ylabel="f - f* at the inner solution")
    axis.set_title(title)
    axis.grid(visible=True, alpha=0.25)
