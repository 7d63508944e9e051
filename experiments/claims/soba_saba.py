"""Claims of the paper on SOBA and SABA."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd

from experiments.claims.claim import Body, Claim, Found
from experiments.claims.measures import (
    TITLES,
    at_end,
    first_below,
    higher,
    medians,
    named,
    percent,
    row,
    rows,
    sampling_error,
    short,
)
from experiments.claims.saved import Saved

PAPER = "SOBA/SABA"
#: Gap to the optimum on IJCNN1 that only one single-loop method of the paper passes.
LEVEL = 1e-3
CHECKS = "claims_checks"
#: Test rows of MNIST.
MNIST_TEST = 10_000


def below_level(saved: Saved) -> Found:
    """The lowest median gaps on IJCNN1 of the paper's single-loop methods that were run."""
    lowest = pd.concat([medians(saved.table(name), "suboptimality").min() for name in ("ijcnn1", "ijcnn1_fsla")])
    ours = "lowest median of h - h*: " + ", ".join(f"{TITLES[s]} {short(lowest[s])}" for s in ("saba", "soba", "fsla"))
    parts = {f"SABA below {LEVEL:g}": bool(lowest["saba"] < LEVEL)}
    return Found(ours, parts | {f"{TITLES[s]} not": bool(lowest[s] >= LEVEL) for s in ("soba", "fsla")})


def plateau(saved: Saved) -> Found:
    """SOBA against SABA and FSLA at the first evaluation and at the end."""
    tables = [medians(saved.table(name), "suboptimality") for name in ("ijcnn1", "ijcnn1_fsla")]
    middle = pd.concat(tables, axis=1)[["soba", "saba", "fsla"]]
    first, end = middle.iloc[1], middle.iloc[-1]
    rivals = {s: TITLES[s] for s in ("saba", "fsla")}
    parts = {f"SOBA ends higher than {words}": bool(end["soba"] > end[s]) for s, words in rivals.items()}
    parts |= {f"is lower than {words} at the first evaluation": bool(first["soba"] < first[s]) for s, words in rivals.items()}
    return Found(f"after {middle.index[1]:,} steps: {named(first)}; at the end: {named(end)}", parts)


def _solvers(table: Any, names: tuple[str, ...]) -> Any:
    return table[table["solver"].isin(names)]


def fastest_to_smallest(saved: Saved) -> Found:
    """Test errors on MNIST, half of the labels replaced, of the solvers of the paper that were run."""
    table = _solvers(saved.table("mnist_cleaning"), ("soba", "saba", "fsla"))
    smallest = medians(table, "test_error").min()
    rival = smallest.drop("saba").min()
    ours = "smallest median test error: " + ", ".join(f"{TITLES[str(s)]} {percent(e)}" for s, e in smallest.items())
    ours += f" (sampling error {percent(sampling_error(rival, MNIST_TEST))})"
    parts = {}
    for along, words in (("oracle_calls", "oracle calls"), ("seconds", "seconds")):
        way = first_below(table, "test_error", rival, along)
        parts[f"SABA first to {percent(rival)}, in {words}"] = bool(way["saba"] < way.drop("saba").min())
    return Found(ours, parts)


def fastest_to_its_end(name: str) -> Callable[[Saved], Found]:
    """SABA is the first to its own final test error, to a tenth of a point."""

    def measure(saved: Saved) -> Found:
        table = _solvers(saved.table(name), ("soba", "saba", "fsla"))
        ends = at_end(table, "test_error")
        way = first_below(table, "test_error", ends["saba"] + 1e-3, "oracle_calls")
        ours = "; ".join(f"{TITLES[str(s)]} ends at {percent(e)}, there after {_calls(way[s])}" for s, e in ends.items())
        return Found(ours, {"SABA first to its final error, in oracle calls": bool(way["saba"] < way.drop("saba").min())})

    return measure


def soba_below(saved: Saved) -> Found:
    """Test errors after as many updates, at the paper's best step sizes."""
    runs = {"soba": "mnist_cleaning", "stocbio": "mnist_cleaning_stocbio", "bsa": "mnist_cleaning_bsa"}
    ends = {solver: at_end(saved.table(name), "test_error")[solver] for solver, name in runs.items()}
    ours = "test error after 8,192 updates: " + ", ".join(
        f"{TITLES[s]} {percent(e)}{saved.code(runs[s], s)}" for s, e in ends.items()
    )
    return Found(
        ours, {f"SOBA below {TITLES[s]}": higher(1 - ends["soba"], 1 - ends[s], MNIST_TEST) for s in ("stocbio", "bsa")}
    )


def _calls(calls: float) -> str:
    return f"{calls:,.0f} oracle calls" if np.isfinite(calls) else "never"


def checked(**claims: str) -> Callable[[Saved], Found]:
    """Rows of the table of `experiments.claims.checks`, by what they are called here (_ for a blank)."""
    return rows(CHECKS, "claims.csv", {words.replace("_", " "): claim for words, claim in claims.items()})


BODY = Body(
    "SOBA and SABA",
    {
        PAPER: "Dagréou, Ablin, Vaiter, Moreau, A framework for bilevel optimization that enables stochastic and global "
        "variance reduction algorithms, NeurIPS 2022, arXiv 2201.13409",
    },
    (
        Claim(
            "Where z = z*(x) and v = v*(x), the directions of z and v vanish and that of x is the gradient of h",
            PAPER,
            "proposition 2.1",
            "exact",
            False,
            runs=(CHECKS,),
            measure=checked(
                z_and_v="directions of z and v at z*(x), v*(x), largest entry",
                x_less_grad_h="direction of x there less grad h(x), largest entry",
            ),
        ),
        Claim(
            "Every direction is a sum over samples: SOBA's are unbiased",
            PAPER,
            "framework",
            "exact",
            False,
            runs=(CHECKS,),
            measure=checked(mean_less_full_directions="mean over all pairs of samples less the full directions, largest entry"),
        ),
        Claim(
            "SABA keeps n p + (n + m)(p + d) numbers",
            PAPER,
            "SABA",
            "exact",
            False,
            runs=(CHECKS,),
            measure=checked(numbers_in_its_tables_over_that="SABA: numbers in its tables over n p + (n + m)(p + d)"),
        ),
        Claim(
            "With x at rest SABA is SAGA on the inner problem",
            PAPER,
            "SABA",
            "exact",
            False,
            runs=(CHECKS,),
            measure=checked(difference_in_z="SABA with x at rest less SAGA on the inner problem, z, largest entry"),
        ),
        Claim(
            "Variance reduction has to be global: on z alone, or on x alone, it is not enough (here constant steps)",
            PAPER,
            "SABA",
            "sublinear",
            False,
            runs=(CHECKS,),
            measure=checked(
                error_reached_with_all_three="variance reduced on z, v and x (SABA): error reached",
                z_alone="variance reduced on z alone: error reached",
                x_alone="variance reduced on x alone: error reached",
                none="variance reduced on nothing (SOBA): error reached",
            ),
        ),
        Claim(
            "SABA converges linearly with constant steps where h is Polyak-Lojasiewicz",
            PAPER,
            "theorem 4",
            "linear",
            False,
            runs=("rates",),
            measure=rows(
                "rates",
                "table.csv",
                {
                    "error reached": "SABA: error reached with constant steps",
                    "R^2 of a line through its logarithm": "SABA: R^2 of a line through the log error above 1e-12",
                },
            ),
        ),
        Claim(
            "SOBA: the squared gradient falls at least like T^-2/5",
            PAPER,
            "theorems 1 and 2 of the submission",
            "at most -2/5",
            False,
            reason="not run: it holds for steps of order t^-2/5 and t^-3/5; what is measured (next line) has t^-1/2",
        ),
        Claim(
            "SOBA: the squared gradient falls like T^-1/2",
            PAPER,
            "theorems of the final version",
            "-1/2",
            runs=("rates",),
            measure=row("rates", "table.csv", "SOBA: E |grad h|^2 against K"),
        ),
        Claim(
            "IJCNN1: of the single-loop methods SABA alone goes below 1e-3 (here against SOBA and FSLA)",
            PAPER,
            "figure 2a",
            "below 1e-3",
            False,
            runs=("ijcnn1", "ijcnn1_fsla"),
            measure=below_level,
        ),
        Claim(
            "IJCNN1: SOBA is first to its plateau, which is the highest (here against SABA and FSLA)",
            PAPER,
            "figure 2a",
            recalled=False,
            runs=("ijcnn1", "ijcnn1_fsla"),
            measure=plateau,
        ),
        Claim(
            "Cleaning of MNIST, half of the labels: SABA is the fastest to its smallest test error (here against SOBA "
            "and FSLA)",
            PAPER,
            "figure 2b",
            recalled=False,
            runs=("mnist_cleaning",),
            measure=fastest_to_smallest,
        ),
        Claim(
            "Cleaning of MNIST, 70 % of the labels: SABA is the fastest to its final error (here against SOBA and FSLA)",
            PAPER,
            "appendix",
            runs=("mnist_cleaning_70",),
            measure=fastest_to_its_end("mnist_cleaning_70"),
        ),
        Claim(
            "Cleaning of MNIST, 90 % of the labels: the same",
            PAPER,
            "appendix",
            runs=("mnist_cleaning_90",),
            measure=fastest_to_its_end("mnist_cleaning_90"),
        ),
        Claim(
            "Cleaning of MNIST, half of the labels: SOBA ends below stocBiO and BSA (DIVERGED: the product for v has grown "
            "in some update; the run goes on)",
            PAPER,
            "figure 2b",
            recalled=False,
            runs=("mnist_cleaning", "mnist_cleaning_stocbio", "mnist_cleaning_bsa"),
            measure=soba_below,
        ),
        Claim(
            "IJCNN1: AmIGO ends as low as SABA, but much later; MRBO, TTSA and SUSTAIN stay above 1e-3",
            PAPER,
            "figure 2a",
            recalled=False,
            reason="not run: the paper's best step sizes do not transfer (SOBA's diverge), so that its grid, 63 points and "
            "ten seeds a solver, would have to be searched",
        ),
        Claim(
            "SABA: the squared gradient falls like 1 / T where h is not convex",
            PAPER,
            "theorem 3",
            "-1",
            False,
            reason="the problems with known solutions have a linear rate, which hides it",
        ),
        Claim(
            "SABA takes of order (n + m)^2/3 / eps samples",
            PAPER,
            "theorem of the final version",
            "(n + m)^2/3",
            reason="an upper bound for steps that follow constants of the problem; no sweep over n + m was run with them",
        ),
        Claim(
            "Seven classes of Covertype",
            PAPER,
            "appendix",
            reason="what the figure shows is not known to us",
        ),
    ),
)
