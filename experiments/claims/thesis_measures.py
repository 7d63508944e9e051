"""How claims of the bilevel thesis and of its companion papers are measured."""

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np

from experiments.claims.claim import Found
from experiments.claims.measures import TITLES, at_end, first_below, gap, named, percent, short
from experiments.claims.saved import Saved

#: Test loss of the cleaning of MNIST that the faster half of the thirteen solvers reaches.
LOSS = 0.6
FULL_BATCH = ("aid_cg", "aid_fp", "hoag", "itd_truncated")


# ---- hyper-cleaning ---------------------------------------------------------------------------------------------------


def _ends(saved: Saved) -> Any:
    return at_end(saved.table("thesis_cleaning"), "test_loss")


def stocbio_first(saved: Saved) -> Found:
    """Oracle calls to a test loss on MNIST, against the full-batch methods of the thesis."""
    way = first_below(saved.table("thesis_cleaning"), "test_loss", LOSS, "oracle_calls")
    words = [f"{TITLES[s]} {'never' if np.isinf(way[s]) else format(way[s], ',.0f')}" for s in ("stocbio", *FULL_BATCH)]
    parts = {f"before {TITLES[s]}": bool(way["stocbio"] < way[s]) for s in FULL_BATCH}
    return Found(f"oracle calls to a test loss of {LOSS}: " + ", ".join(words), parts)


def ordered(*solvers: str) -> Callable[[Saved], Found]:
    """Test losses at the end, one below the next."""

    def measure(saved: Saved) -> Found:
        ends = _ends(saved)
        parts = {f"{TITLES[a]} below {TITLES[b]}": bool(ends[a] < ends[b]) for a, b in pairwise(solvers)}
        return Found("test loss at the end: " + named(ends[list(solvers)]), parts)

    return measure


def below_all(best: str, *others: str) -> Callable[[Saved], Found]:
    """The test loss of one at the end is below that of each of the others."""

    def measure(saved: Saved) -> Found:
        ends = _ends(saved)
        parts = {f"{TITLES[best]} below {TITLES[s]}": bool(ends[best] < ends[s]) for s in others}
        return Found("test loss at the end: " + named(ends[[best, *others]]), parts)

    return measure


def single_rows(saved: Saved) -> Found:
    """BSA and TTSA end above the methods on batches and on all rows that the figure shows, and TTSA above BSA."""
    ends = _ends(saved)
    shown = ends[["stocbio", *FULL_BATCH]]
    parts = {
        "BSA above all of them": bool(ends["bsa"] > shown.max()),
        "TTSA above BSA": bool(ends["ttsa"] > ends["bsa"]),
    }
    return Found(f"test loss at the end: {named(ends[['bsa', 'ttsa']])}, highest of the others {short(shown.max())}", parts)


# ---- 20 Newsgroups ----------------------------------------------------------------------------------------------------

ITD_IN_NEWSGROUPS = {"itd_bio": "reverse"}


def newsgroups(saved: Saved) -> Found:
    """Test losses after the same seconds, in turns on one machine."""
    ends = at_end(saved.table("newsgroups"), "test_loss")
    rivals = ("aid_fp", "aid_cg", "hoag", "itd_bio")
    rivals += ("fixed_x",)
    parts = {f"below {(TITLES | ITD_IN_NEWSGROUPS)[s]}": bool(ends["stocbio"] < ends[s]) for s in rivals}
    return Found(f"test loss after 25 s: {named(ends[['stocbio', *rivals]], ITD_IN_NEWSGROUPS)}", parts)


def order_in_newsgroups(saved: Saved) -> Found:
    """The order of the full-batch methods."""
    ends = at_end(saved.table("newsgroups"), "test_loss")
    names, titles = ("aid_fp", "aid_cg", "hoag", "itd_bio"), TITLES | ITD_IN_NEWSGROUPS
    parts = {f"{titles[a]} below {titles[b]}": bool(ends[a] < ends[b]) for a, b in pairwise(names)}
    return Found("test loss after 25 s: " + named(ends[list(names)], ITD_IN_NEWSGROUPS), parts)


def batches_in_newsgroups(saved: Saved) -> Found:
    """Test losses of stocBiO by the rows of its batches, and how many updates it had time for, there and in another run."""
    table = saved.table("newsgroups_batches")
    table = table.assign(solver=table["solver"].str.extract(r"(\d+)$", expand=False).astype(int))
    ends, updates = at_end(table, "test_loss"), at_end(table, "step")
    elsewhere = at_end(saved.table("newsgroups"), "step")["stocbio"]
    parts = {f"{a:,} below {b:,}": bool(ends[a] < ends[b]) for a, b in ((500, 1000), (1000, 2000))}
    parts["100 level with 500, to .02"] = bool(abs(ends[100] - ends[500]) <= 0.02)
    ours = ", ".join(f"{short(v)} ({n:,} rows, {updates[n]:.0f} updates)" for n, v in ends.items())
    return Found(
        f"test loss after 25 s: {ours}; in the run of the two lines above 1,000 rows had {elsewhere:.0f} updates", parts
    )


# ---- hyper-representation ---------------------------------------------------------------------------------------------


def notebook_order(name: str) -> Callable[[Saved], Found]:
    """The outer loss after the inner steps, as the notebook prints it."""

    def measure(saved: Saved) -> Found:
        ends = at_end(saved.table(name), "outer_loss")
        names = ("pzobo_unit", "aid_fp", "aid_cg", "hozog")
        parts = {f"public PZOBO below {TITLES[s]}": bool(ends["pzobo_unit"] < ends[s]) for s in names[1:]}
        parts["HOZOG over 100 times higher"] = bool(ends["hozog"] > 100 * ends["pzobo_unit"])
        return Found(f"{named(ends[list(names)])}; without the response of z: {short(ends['fo_itd_bio'])}", parts)

    return measure


def notebook_levels(name: str, levels: dict[str, float]) -> Callable[[Saved], Found]:
    """The same levels, to a factor of 3."""

    def measure(saved: Saved) -> Found:
        ends = at_end(saved.table(name), "outer_loss")
        parts = {
            f"{TITLES[s]} within a factor of 3 of {level:g}": bool(level / 3 <= ends[s] <= 3 * level)
            for s, level in levels.items()
        }
        return Found(named(ends[list(levels)]), parts)

    return measure


def paper_estimate(saved: Saved) -> Found:
    """The estimate from one Gaussian direction, as in the paper's text, not scaled down by the dimension."""
    ends = at_end(saved.table("hyper_representation"), "outer_loss")
    parts = {f"below {TITLES[s]}": bool(ends["pzobo"] < ends[s]) for s in ("aid_fp", "aid_cg", "hozog")}
    return Found(named(ends[["pzobo", "aid_fp", "aid_cg", "hozog"]]), parts)


# ---- few shots --------------------------------------------------------------------------------------------------------


def itd_first(saved: Saved) -> Found:
    """Seconds to 99 % of the lowest of the best accuracies on held-out characters."""
    table = saved.table("few_shot_omniglot_itd")
    level = 0.99 * table.groupby("solver")["accuracy"].max().min()
    way = (
        table[table["accuracy"] >= level]
        .groupby("solver")["seconds"]
        .first()
        .reindex(table["solver"].unique(), fill_value=np.inf)
    )
    parts = {f"ITD-BiO sooner than {TITLES[s]}": bool(way["itd_bio"] < way[s]) for s in ("maml", "anil")}
    parts["first-order sooner than ITD-BiO"] = bool(way["fo_itd_bio"] < way["itd_bio"])
    ours = ", ".join(
        f"{TITLES[str(s)]} {'never' if np.isinf(seconds) else format(seconds, '.0f')}" for s, seconds in way.items()
    )
    return Found(f"seconds to {percent(level, 1)}: {ours}", parts)


# ---- MAML, ANIL, bounds -----------------------------------------------------------------------------------------------


def bias_stays(saved: Saved) -> Found:
    """Norms of the meta-gradient where MAML and FOMAML end, by the inner rate."""
    table = saved.table("maml_theory", "bias.csv").set_index(["method", "rate"])["gradient_norm"]
    biased, exact = table["fomaml"], table["maml"]
    ours = "gradient norms at the end: " + ", ".join(f"{short(v)} (rate {rate:g})" for rate, v in biased.items())
    parts = {
        "above 1e-4 at every rate": bool((biased > 1e-4).all()),
        "MAML's below 1e-10": bool((exact < 1e-10).all()),
    }
    return Found(f"{ours}; MAML {short(exact.max())} at most", parts)


def accelerated_pays(saved: Saved) -> Found:
    """Products of AccBiO and of AID-BiO on the worst case, over the lower bound, at the hardest problem."""
    table = saved.table("lower_bounds", "work.csv").query("instance == 'worst' and swept == 'mu_g'")
    over = (table["products"] / table["bound"]).groupby(table["method"])
    growth = over.max() / over.min()
    ours = "largest over least ratio to the bound: " + ", ".join(
        f"{words} {growth[m]:.3g}" for m, words in (("accbio", "AccBiO"), ("aid_bio", "AID-BiO"))
    )
    return Found(ours, {"AccBiO: at most 2": bool(growth["accbio"] <= 2), "AID-BiO: more": bool(growth["aid_bio"] > 2)})


def faster_double_momentum(saved: Saved) -> Found:
    """The slopes at two settings, and the error against plain steps at the end."""
    name = "MRBO{}: E |grad h|^2 against K"
    first, second = (saved.row("rates", "table.csv", name.format(s)) for s in ("", ", twice the weight, half the step of x"))
    ratio = saved.row("rates", "table.csv", "MRBO over SGD-type: E |grad h|^2 at K = 16000")
    ours = f"slope {short(first['measured'])}; with twice the weight and half the step of x {short(second['measured'])}"
    parts = {
        "-2/3 to .07": bool(gap(first) <= first["tolerance"]),
        "the other setting, too": bool(gap(second) <= second["tolerance"]),
        "below plain steps at the end": bool(gap(ratio) <= 0),
    }
    return Found(f"{ours}; squared error over that of plain steps at K = 16,000: {short(ratio['measured'])}", parts)
