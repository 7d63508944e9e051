"""How claims of the paper on MEHA are measured."""

from collections.abc import Callable
from typing import Any

import numpy as np

from experiments.claims.claim import Found
from experiments.claims.measures import TITLES, at_end, gap, percent, rows
from experiments.claims.saved import Saved

CONVEX, SINE, LASSO = "nonconvex_merely_convex", "nonconvex_sine", "nonconvex_lasso"
#: First-order methods that the paper compares on the toy problems.
NAMED = ("BOME", "BVFIM", "IAPTT")
#: Sampling error of one accuracy near a half on 1,000 test images.
SAMPLING = 0.5 / np.sqrt(1000)


def _methods(saved: Saved, name: str) -> Any:
    return saved.table(name, "table.csv").set_index("method")


def cheaper(name: str) -> Callable[[Saved], Found]:
    """Gradient calls of MEHA to 1 % against those of methods that the paper names, to stay there and to the first time."""

    def measure(saved: Saved) -> Found:
        table = _methods(saved, name)
        ours, parts = [], {}
        for column, words in (("gradient_calls", "to stay within 1 %"), ("first_calls", "to the first time")):
            calls = table[column]
            ours.append(f"{words}: MEHA {calls['MEHA']:.0f}, " + ", ".join(f"{m} {_count(calls[m])}" for m in NAMED))
            parts |= {f"fewer than {m} {words}": bool(calls["MEHA"] < calls[m]) for m in NAMED}
        return Found("gradient calls " + "; ".join(ours), parts)

    return measure


def _count(calls: float) -> str:
    return f"{calls:.0f}" if np.isfinite(calls) else "never"


def times_on_sine(saved: Saved) -> Found:
    """Gradient calls of BOME and BVFIM over those of MEHA."""
    calls = _methods(saved, SINE)["gradient_calls"]
    found = {m: calls[m] / calls["MEHA"] for m in ("BOME", "BVFIM")}
    ours = "times the gradient calls: " + ", ".join(f"{m} {ratio:.3g}" for m, ratio in found.items())
    return Found(ours, {f"{m} between 2 and 70": bool(2 <= ratio <= 70) for m, ratio in found.items()})


def seconds_against_bome(saved: Saved) -> Found:
    """Of one run to 1 %, compiled, on a CPU, n = 1,000."""
    table = saved.table("speed_first_order", "first_order.csv")
    parts, ours = {}, []
    for problem, part in table.groupby("problem"):
        times = part.set_index("method")["to_accuracy_ms"]
        ratio = times["BOME"] / times["MEHA"]
        ours.append(f"{str(problem).replace('_', ' ')} {times['MEHA']:.2g} and {times['BOME']:.2g} ms (ratio {ratio:.2g})")
        parts[f"MEHA sooner, {str(problem).replace('_', ' ')}"] = bool(ratio > 1)
    return Found("MEHA and BOME to 1 %: " + "; ".join(ours), parts)


def solves(name: str, variant: str, at_most: int) -> Callable[[Saved], Found]:
    """The numbers of updates to 1 % at all sizes."""

    def measure(saved: Saved) -> Found:
        table = saved.table(name, "sizes.csv")
        part = table[table["variant"] == variant]
        best = part.groupby("n")["updates"].min()
        ours = "updates: " + ", ".join(f"{updates:.0f} (n = {n:,})" for n, updates in best.items())
        return Found(ours, {f"at most {at_most:,} at n = {n:,}": bool(u <= at_most) for n, u in best.items()})

    return measure


def size_independent(saved: Saved) -> Found:
    """One setting, all sizes: the same number of updates."""
    parts, ours = {}, []
    for name, words in ((CONVEX, "merely convex"), (SINE, "sine"), (LASSO, "lasso")):
        table = saved.table(name, "sizes.csv").query("variant == 'one x a z'")
        keys = [k for k in ("alpha", "beta", "eta", "gamma", "p") if k in table]
        counts = table.groupby(keys)["updates"].agg(["min", "max"])
        ours.append(f"{words} {table['updates'].min():.0f} to {table['updates'].max():.0f}")
        parts[f"{words}: the same at every n"] = bool((counts["min"] == counts["max"]).all())
    return Found("updates of all settings and sizes: " + "; ".join(ours), parts)


def first_order(saved: Saved) -> Found:
    """Oracle calls of an update of MEHA on the toy problems."""
    calls = {
        words: _methods(saved, name).loc["MEHA", "calls_an_update"]
        for name, words in ((CONVEX, "merely convex"), (SINE, "sine"))
    }
    ours = "partial gradients an update: " + ", ".join(f"{words} {round(float(c), 3):g}" for words, c in calls.items())
    return Found(ours, {f"six, {words}": bool(abs(c - 6) < 1e-3) for words, c in calls.items()})


def others_fail(saved: Saved) -> Found:
    """Methods that follow the inner problem alone, on the merely convex problem."""
    table = _methods(saved, CONVEX)
    ours = ", ".join(
        f"{m} solves it with {table.loc[m, 'solved']} of {table.loc[m, 'settings']} settings" for m in ("ITD", "AID-CG")
    )
    x = saved.row(CONVEX, "claims.csv", "ITD: x at the end, (1 + z2) / 2")["measured"]
    return Found(
        f"{ours}; ITD (RHG) ends at x = {x:.3f}, not 1",
        {f"{m} with none": bool(table.loc[m, "solved"] == 0) for m in ("ITD", "AID-CG")},
    )


def replay(saved: Saved) -> Found:
    """The recurrence of the public code on the merely convex problem."""
    found = saved.table(CONVEX, "released_code.csv").iloc[0]
    ours = f"{found['updates']:.0f} updates, x = {found['x']:.4f}, z = {found['z1']:.4f}, {found['z2']:.4f}"
    log = {"x": 1.0002, "z1": 1.0144, "z2": 1.0161}
    return Found(
        ours,
        {
            "113 updates": found["updates"] == 113,
            "the values of the log": all(abs(found[k] - v) < 6e-5 for k, v in log.items()),
        },
    )


def public_code_on_sine(saved: Saved) -> Found:
    """Where the recurrence of the public code ends, and where the solution is."""
    ends = saved.table(SINE, "released_code.csv")
    solution = 0.75 * np.pi
    error = (ends["x"] - solution).abs() / solution
    ours = "x, z: " + "; ".join(f"{r['x']:.4f}, {r['z']:.4f} (theta {r['theta']})" for _, r in ends.iterrows())
    return Found(
        f"{ours}; solution {solution:.4f}, {solution + 2:.4f}", {"x within 1 % of the solution": bool((error <= 0.01).all())}
    )


def searches_on_lasso(saved: Saved) -> Found:
    """The largest problem of the paper: what searches and MEHA reach."""
    table = saved.table(LASSO, "table.csv").query("n == 1000 and scale == 'x in [0, 1]'").set_index("method")
    gaps = {"grid": "grid, one value", "random": "random", "TPE": "TPE", "MEHA": "MEHA"}
    found = {words: table.loc[m, "gap"] for words, m in gaps.items()}
    ours = "f - f* at the inner solution: " + ", ".join(f"{words} {abs(g):.2g}" for words, g in found.items())
    parts = {"MEHA reaches 0.01": bool(found["MEHA"] <= 0.01)}
    return Found(ours, parts | {f"{w} does not within 200 calls": bool(found[w] > 0.01) for w in ("grid", "random", "TPE")})


def public_numbers_on_lasso(saved: Saved) -> Found:
    """The numbers of the public code in the paper's algorithm."""
    table = saved.table(LASSO, "table.csv").query("n == 1000").set_index("method")
    found, tuned = table.loc["MEHA, numbers of the public code", "gap"], saved.table(LASSO, "sizes.csv")["updates"].max()
    ours = f"f - f* = {found:.2g} after 120 updates (0.5: nothing solved); {tuned:.0f} updates to 2 % at other settings"
    return Found(ours, {"f - f* below 0.01 after 120 updates": bool(found < 0.01)})


def group_lasso(*rivals: str, seconds: str = "seconds") -> Callable[[Saved], Found]:
    """Test errors and processor time at all sizes, means over five data sets."""

    def measure(saved: Saved) -> Found:
        table = saved.table("group_lasso", "table.csv").pivot(
            index="features", columns="method", values=["test_error", seconds]
        )
        names = {"tpe": "TPE"}
        ours, parts = [], {}
        for rival in rivals:
            errors = (table["test_error"][rival] - table["test_error"]["meha"]).round(2) + 0.0  # not -0.00
            times = table[seconds][rival] / table[seconds]["meha"]
            word = names.get(rival, rival)
            spans = f"{errors.min():+.2f} to {errors.max():+.2f}", f"{times.min():.2g} to {times.max():.2g}"
            ours.append(f"{word}: test error {spans[0]}, {spans[1]} times the seconds")
            parts |= {
                f"lower error than {word} at all sizes": bool((errors > 0).all()),
                f"less time than {word} at all sizes": bool((times > 1).all()),
            }
        return Found("against MEHA, " + "; ".join(ours), parts)

    return measure


def _cleaning(saved: Saved, data: str) -> tuple[Any, Any, Any]:
    """Accuracies, F1 and recalls at the end, medians of three draws, of the solvers (not of the baselines)."""
    table = saved.table(f"meha_cleaning_{data}")
    table = table[~table["solver"].str.contains(" ")]
    return 1 - at_end(table, "test_error"), at_end(table, "f1"), at_end(table, "recall")


def best_at_cleaning(data: str) -> Callable[[Saved], Found]:
    """MEHA is first of ten solvers in accuracy and in F1."""

    def measure(saved: Saved) -> Found:
        accuracy, f1, _ = _cleaning(saved, data)
        ours = (
            f"accuracy {percent(accuracy['meha'])}, best {percent(accuracy.max())} ({TITLES[str(accuracy.idxmax())]}); "
            f"F1 {f1['meha']:.3f}, best {f1.max():.3f} ({TITLES[str(f1.idxmax())]})"
        )
        return Found(ours, {"highest accuracy": accuracy.idxmax() == "meha", "highest F1": f1.idxmax() == "meha"})

    return measure


def competitive_at_cleaning(saved: Saved) -> Found:
    """Within a point of the best accuracy, and .02 of the best F1."""
    parts, ours = {}, []
    for data, words in (("mnist", "MNIST"), ("fashion_mnist", "Fashion-MNIST")):
        accuracy, f1, recall = _cleaning(saved, data)
        behind = accuracy.max() - accuracy["meha"], f1.max() - f1["meha"]
        ours.append(
            f"{words}: behind by {percent(behind[0])} and {behind[1]:.3f}; recall {recall['meha']:.3f}, best {recall.max():.3f}"
        )
        parts |= {f"{words}: accuracy within 1 %": bool(behind[0] <= 0.01), f"F1 within .02, {words}": bool(behind[1] <= 0.02)}
    return Found("; ".join(ours), parts)


def ninety_percent(saved: Saved) -> Found:
    """Seconds to 90 % on held-out characters, 5-way 1-shot, of six methods."""
    table = saved.table("few_shot_omniglot_six")
    first = table[table["accuracy"] >= 0.9].groupby("solver")["seconds"].first().sort_values()
    ours = "seconds to 90 %: " + ", ".join(f"{TITLES[str(solver)]} {s:.0f}" for solver, s in first.items())
    return Found(
        ours,
        {"MEHA reaches 90 %": "meha" in first}
        | {
            f"sooner than {words}": bool(first.get("meha", np.inf) < first.get(key, np.inf))
            for key, words in (("anil", "ANIL"), ("maml", "MAML"))
        },
    )


def searched_cells(saved: Saved) -> Found:
    """Test accuracies of networks of the cells found, means of three seeds."""
    table = saved.table("architecture_search", "evaluation.csv").query("kind == 'searched'")
    mean = table.groupby("solver")["accuracy"].mean()
    rival = mean.drop("meha").max()
    ours = ", ".join(f"{TITLES[str(solver)]} {percent(accuracy, 1)}" for solver, accuracy in mean.items())
    undecided = abs(mean["meha"] - rival) < SAMPLING
    why = f"a small space, short searches: they differ by less than the sampling error of an accuracy, {percent(SAMPLING, 1)}"
    return Found(ours, {"MEHA ahead of both": bool(mean["meha"] > rival)}, why if undecided else "")


def searching_valid(saved: Saved) -> Found:
    """Accuracies of the supernet on the half of the images that the outer loss sees, means of three seeds."""
    table = saved.table("architecture_search")
    mean = table.sort_values("step").groupby(["solver", "seed"]).tail(1).groupby("solver")["validation_accuracy"].mean()
    ours = ", ".join(f"{TITLES[str(solver)]} {percent(accuracy, 1)}" for solver, accuracy in mean.items())
    return Found(ours, {"MEHA highest": mean.idxmax() == "meha"})


def fixed_penalty(saved: Saved) -> Found:
    """Slopes of the gap with p = 0."""
    found = {
        words: saved.row(name, "claims.csv", "p = 0: gap against K, slope")
        for name, words in ((SINE, "sine"), (LASSO, "lasso"))
    }
    ours = "slope of the gap: " + ", ".join(f"{words} {abs(r['measured']):.2g}" for words, r in found.items())
    return Found(
        ours, {f"at least 0, to {r['tolerance']:g}, {words}": bool(gap(r) <= r["tolerance"]) for words, r in found.items()}
    )


def slopes(name: str, quantity: str, powers: tuple[str, ...]) -> Callable[[Saved], Found]:
    """The slopes of a quantity over the last decade of updates, at several powers p of the penalty."""
    return rows(name, "claims.csv", {f"p = {p}:": f"p = {p}: {quantity} against K, slope" for p in powers})
