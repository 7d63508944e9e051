"""Claims of the paper on MEHA."""

from collections.abc import Callable

import numpy as np
import pandas as pd

from experiments.claims.claim import Body, Claim, Found
from experiments.claims.measures import at_end, gap, rows
from experiments.claims.saved import Saved

PAPER = "MEHA"
CONVEX, SINE, LASSO = "nonconvex_merely_convex", "nonconvex_sine", "nonconvex_lasso"
#: First-order methods that the paper compares on the toy problems.
NAMED = ("BOME", "BVFIM", "IAPTT")
#: Sampling error of one accuracy near a half on 1,000 test images.
SAMPLING = 0.5 / np.sqrt(1000)


def _methods(saved: Saved, name: str) -> pd.DataFrame:
    return saved.table(name, "table.csv").set_index("method")


def cheaper(name: str) -> Callable[[Saved], Found]:
    """Gradient calls of MEHA to 1 % against those of the methods that the paper names, counted to stay and to the first time."""

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
            errors = (table["test_error"][rival] - table["test_error"]["meha"]).round(2)
            times = table[seconds][rival] / table[seconds]["meha"]
            word = names.get(rival, rival)
            ours.append(
                f"{word}: test error {errors.min():+.2f} to {errors.max():+.2f}, {times.min():.2g} to {times.max():.2g} times the seconds"
            )
            parts |= {
                f"lower error than {word} at all sizes": bool((errors > 0).all()),
                f"less time than {word} at all sizes": bool((times > 1).all()),
            }
        return Found("against MEHA, " + "; ".join(ours), parts)

    return measure


def _cleaning(saved: Saved, data: str) -> tuple[pd.Series, pd.Series, pd.Series]:
    """Accuracies, F1 and recalls at the end, medians of three draws, of the solvers (not of the baselines)."""
    table = saved.table(f"meha_cleaning_{data}")
    table = table[~table["solver"].str.contains(" ")]
    return 1 - at_end(table, "test_error"), at_end(table, "f1"), at_end(table, "recall")


def best_at_cleaning(data: str) -> Callable[[Saved], Found]:
    """MEHA is first of ten solvers in accuracy and in F1."""

    def measure(saved: Saved) -> Found:
        accuracy, f1, _ = _cleaning(saved, data)
        ours = (
            f"accuracy {accuracy['meha']:.2%}, best {accuracy.max():.2%} ({accuracy.idxmax()}); "
            f"F1 {f1['meha']:.3f}, best {f1.max():.3f} ({f1.idxmax()})"
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
            f"{words}: behind by {behind[0]:.2%} and {behind[1]:.3f}; recall {recall['meha']:.3f}, best {recall.max():.3f}"
        )
        parts |= {f"{words}: accuracy within 1 %": bool(behind[0] <= 0.01), f"F1 within .02, {words}": bool(behind[1] <= 0.02)}
    return Found("; ".join(ours), parts)


def ninety_percent(saved: Saved) -> Found:
    """Seconds to 90 % on held-out characters, 5-way 1-shot, of six methods."""
    table = saved.table("few_shot_omniglot_six")
    first = table[table["accuracy"] >= 0.9].groupby("solver")["seconds"].first().sort_values()
    ours = "seconds to 90 %: " + ", ".join(f"{solver} {s:.0f}" for solver, s in first.items())
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
    ours = (
        f"MEHA {mean['meha']:.1%}, DARTS {mean['darts_first']:.1%} (first order), {mean['darts_second']:.1%} (one step ahead)"
    )
    behind = abs(mean["meha"] - rival) < SAMPLING
    why = f"a small space, short searches; the methods differ by less than the sampling error of an accuracy, {SAMPLING:.1%}"
    return Found(ours, {"MEHA ahead of both": bool(mean["meha"] > rival)}, why if behind else "")


def searching_valid(saved: Saved) -> Found:
    """Accuracies of the supernet on the half of the images that the outer loss sees, means of three seeds."""
    table = saved.table("architecture_search")
    mean = table.sort_values("step").groupby(["solver", "seed"]).tail(1).groupby("solver")["validation_accuracy"].mean()
    ours = ", ".join(f"{solver} {accuracy:.1%}" for solver, accuracy in mean.items())
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


BODY = Body(
    "MEHA: Moreau envelope, Hessian-free, single loop",
    {
        PAPER: "Liu, Liu, Yao, Zeng, Zhang, Moreau envelope for nonconvex bi-level optimization: a single-loop and Hessian-free "
        "solution strategy, ICML 2024, arXiv 2405.09927",
    },
    (
        Claim(
            "One loop and first derivatives alone: an update is six partial gradients",
            PAPER,
            "algorithm",
            "6 gradients",
            runs=(CONVEX, SINE),
            measure=first_order,
        ),
        Claim(
            "It solves a problem whose inner loss is merely convex, at any size",
            PAPER,
            "toy problem with a merely convex inner loss",
            "113 updates (log of the public code, n = 10)",
            runs=(CONVEX,),
            measure=solves(CONVEX, "one x a z", 113),
        ),
        Claim(
            "On it MEHA is faster than BOME, BVFIM and IAPTT",
            PAPER,
            "toy problem with a merely convex inner loss",
            runs=(CONVEX,),
            measure=cheaper(CONVEX),
        ),
        Claim(
            "On it some of the methods compared fail (here RHG and CG, which never see the part of z without an inner gradient)",
            PAPER,
            "toy problem with a merely convex inner loss",
            runs=(CONVEX,),
            measure=others_fail,
        ),
        Claim(
            "The log of the public code on that problem can be repeated",
            PAPER,
            "public code",
            "113 updates, x = 1.0002, z = 1.0144, 1.0161",
            False,
            runs=(CONVEX,),
            measure=replay,
        ),
        Claim(
            "It solves a problem whose inner loss is nonconvex, in dimensions 2 to 1,000 (one x a z)",
            PAPER,
            "toy problem with a sine",
            runs=(SINE,),
            measure=solves(SINE, "one x a z", 2000),
        ),
        Claim(
            "The same with one x for all z, at gammas that the theory allows among others",
            PAPER,
            "toy problem with a sine",
            runs=(SINE,),
            measure=solves(SINE, "one x in all", 2000),
        ),
        Claim(
            "On it MEHA is faster than BOME, BVFIM and IAPTT",
            PAPER,
            "toy problem with a sine",
            "0.774, 5.062, 53.5 s (MEHA, BOME, BVFIM; n = 1)",
            runs=(SINE,),
            measure=cheaper(SINE),
        ),
        Claim(
            "MEHA is 2 to 70 times faster than BOME and BVFIM",
            PAPER,
            "toy problem with a sine",
            "6.5, 69",
            runs=(SINE,),
            measure=times_on_sine,
        ),
        Claim(
            "MEHA is faster than BOME in seconds (here n = 1,000, both compiled)",
            PAPER,
            "toy problems",
            "ratio 6.5 (sine, n = 1)",
            runs=("speed_first_order",),
            measure=seconds_against_bome,
        ),
        Claim(
            "The shipped run of the public code on the sine solves that problem",
            PAPER,
            "public code",
            "x = 2.0011, z = 4.0004",
            False,
            runs=(SINE,),
            measure=public_code_on_sine,
        ),
        Claim(
            "Updates do not grow with the size (separable problems)",
            PAPER,
            "large-scale experiments; public code",
            runs=(CONVEX, SINE, LASSO),
            measure=size_independent,
        ),
        Claim(
            "Nonsmooth inner loss, 1,000 dimensions: MEHA solves it, where searches take 30 to 98 times longer",
            PAPER,
            "toy lasso",
            "22.83 s, grid 700.74 s, TPE 2,244.44 s",
            runs=(LASSO,),
            measure=searches_on_lasso,
        ),
        Claim(
            "On it MEHA takes 97 updates at the settings of its public code",
            PAPER,
            "toy lasso; public code",
            "97 updates",
            runs=(LASSO,),
            measure=public_numbers_on_lasso,
        ),
        Claim(
            "Distance of theta from the proximal point: O(K^-1/2), sine",
            PAPER,
            "theorem 1",
            "at most -1/2",
            runs=(SINE,),
            measure=slopes(SINE, "min |theta - theta*|", ("0", "0.25", "0.49")),
        ),
        Claim(
            "Residual of stationarity: O(K^-(1 - 2p)/2), sine",
            PAPER,
            "theorem 1",
            "at most -1/2, -1/4, -0.01",
            runs=(SINE,),
            measure=slopes(SINE, "min R", ("0", "0.25", "0.49")),
        ),
        Claim(
            "Gap of the inner problem with a growing penalty: O(K^-p), sine",
            PAPER,
            "theorem 1",
            "at most -p",
            runs=(SINE,),
            measure=slopes(SINE, "gap", ("0.25", "0.49")),
        ),
        Claim(
            "The three bounds on a nonsmooth problem, lasso, p = 0.49",
            PAPER,
            "theorem 1",
            "at most -1/2, -0.01, -p",
            runs=(LASSO,),
            measure=rows(
                LASSO,
                "claims.csv",
                {
                    "theta": "p = 0.49: min |theta - theta*| against K, slope",
                    "residual": "p = 0.49: min R against K, slope",
                    "gap": "p = 0.49: gap against K, slope",
                },
            ),
        ),
        Claim(
            "With a fixed penalty infeasibility does not vanish",
            PAPER,
            "theorem 1",
            "0",
            runs=(SINE, LASSO),
            measure=fixed_penalty,
        ),
        Claim(
            "Group lasso: lowest test error and time at all sizes, against grid, random search and TPE",
            PAPER,
            "group lasso",
            runs=("group_lasso",),
            measure=group_lasso("grid", "random", "tpe"),
        ),
        Claim(
            "The same against a method that follows the implicit derivative in all penalties (in the paper IGJO; here projected steps)",
            PAPER,
            "group lasso",
            runs=("group_lasso",),
            measure=group_lasso("implicit"),
        ),
        Claim(
            "Hyper-cleaning on MNIST: best accuracy and best F1",
            PAPER,
            "data hyper-cleaning",
            runs=("meha_cleaning_mnist",),
            measure=best_at_cleaning("mnist"),
        ),
        Claim(
            "Hyper-cleaning on Fashion-MNIST: best accuracy and best F1",
            PAPER,
            "data hyper-cleaning",
            runs=("meha_cleaning_fashion_mnist",),
            measure=best_at_cleaning("fashion_mnist"),
        ),
        Claim(
            "Hyper-cleaning: competitive",
            PAPER,
            "data hyper-cleaning",
            runs=("meha_cleaning_mnist", "meha_cleaning_fashion_mnist"),
            measure=competitive_at_cleaning,
        ),
        Claim(
            "Few-shot learning on Omniglot: 90 % before a method that unrolls (here 5-way, half the filters; ANIL and MAML for RHG)",
            PAPER,
            "few-shot classification",
            "130.81 s, RHG 557 s (10-way)",
            runs=("few_shot_omniglot_six",),
            measure=ninety_percent,
        ),
        Claim(
            "Architecture search: better cells than DARTS (here a small space and subset of CIFAR-10)",
            PAPER,
            "neural architecture search",
            "96.07 %, DARTS 95.57 %",
            runs=("architecture_search",),
            measure=searched_cells,
        ),
        Claim(
            "Architecture search: the supernet's accuracy on the validation half is highest with MEHA",
            PAPER,
            "neural architecture search",
            "99.764 %, DARTS 88.940 %",
            runs=("architecture_search",),
            measure=searching_valid,
        ),
        Claim(
            "Few-shot learning, 10-way and 20-way 1-shot",
            PAPER,
            "few-shot classification",
            "91.17 % (10-way), 89.96 % (20-way; others 90.00 to 90.17 %)",
            reason="64 filters and 16 tasks a batch need a GPU; the public code differs from the algorithm, and that of the other methods is not published",
        ),
        Claim(
            "Architecture search at full size",
            PAPER,
            "neural architecture search",
            "96.07 % (RHG, CG, IAPTT and three kinds of DARTS: 95.57 to 95.84 %)",
            reason="days of a GPU; `--setting full` has been traced, not run; the code of the search is not published",
        ),
        Claim(
            "Toy lasso: 86 to 199 updates over a table of settings",
            PAPER,
            "sensitivity table",
            reason="two quotations of the table contradict each other",
        ),
        Claim(
            "The step sizes of x and z of the theory",
            PAPER,
            "theorem 1",
            reason="they are said to exist; there is no formula to test",
        ),
    ),
)
