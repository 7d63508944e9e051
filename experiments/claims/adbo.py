"""Claims of the paper on ADBO."""

from collections.abc import Callable
from typing import Any

import numpy as np

from experiments.asynchronous import report
from experiments.claims.claim import Body, Claim, Found
from experiments.claims.saved import Saved

PAPER = "ADBO"
RIVALS = {"sdbo": "SDBO", "fednest": "FedNest"}
#: Name of the saved run, name of the data, figures of the paper.
DATA = (
    ("asynchronous_mnist", "MNIST", "figures 1 and 2"),
    ("asynchronous_fashion_mnist", "Fashion-MNIST", "figures 1 and 2"),
    ("asynchronous_ijcnn1", "IJCNN1", "figures 3 and 4"),
    ("asynchronous_covtype", "Covertype (16 % sample)", "figures 3 and 4"),
)
#: Share of the wrong labels among the rows of lowest weight from which on the weights are said to find them.
FOUND = 0.5


def ratios(saved: Saved, name: str, rival: str) -> Any:
    """Seconds of the rival over those of ADBO: index the number of stragglers, medians and ranges over the seeds."""
    table = report.ratios(saved.table(name))
    part = table[table["rival"] == rival].groupby("stragglers")
    found = part[["ratio", "loss_ratio", "step_ratio", "adbo_seconds", "rival_seconds"]].median()
    return found.assign(least=part["ratio"].min(), most=part["ratio"].max())


def sooner(name: str, rival: str, *, stragglers: bool = False) -> Callable[[Saved], Found]:
    """ADBO is sooner than the rival, to one accuracy and to one loss."""

    def measure(saved: Saved) -> Found:
        found = ratios(saved, name, rival).iloc[1 if stragglers else 0]
        ours = f"seconds over ADBO's: {found['ratio']:.3g} to one accuracy"
        if found["least"] < found["most"]:
            ours += f" (seeds: {found['least']:.3g} to {found['most']:.3g})"
        parts = {"sooner to one accuracy": found["ratio"] > 1, "to one loss": found["loss_ratio"] > 1}
        return Found(f"{ours}, {found['loss_ratio']:.3g} to one loss", parts)

    return measure


def wider(name: str) -> Callable[[Saved], Found]:
    """Slow workers put SDBO further behind."""

    def measure(saved: Saved) -> Found:
        found = ratios(saved, name, "sdbo")
        without, slow = found.iloc[0], found.iloc[1]
        ours = [f"{w} {without[c]:.3g}, then {slow[c]:.3g}" for w, c in (("accuracy", "ratio"), ("loss", "loss_ratio"))]
        parts = {
            "ahead with slow workers": slow["ratio"] > 1,
            "further than without, to one accuracy": slow["ratio"] > without["ratio"],
            "to one loss": slow["loss_ratio"] > without["loss_ratio"],
        }
        return Found("SDBO's seconds over ADBO's, without and with: " + "; ".join(ours), parts)

    return measure


def fednest_with_stragglers(saved: Saved) -> Found:
    """On the four data sets."""
    found = {data: ratios(saved, name, "fednest").iloc[1]["ratio"] for name, data, _ in DATA}
    ours = "seconds over ADBO's: " + ", ".join(f"{data} {ratio:.2g}" for data, ratio in found.items())
    return Found(ours, {f"sooner on {data}": ratio > 1 for data, ratio in found.items()})


def degradation(saved: Saved) -> Found:
    """By what factor slow workers lengthen the way to one accuracy."""
    adbo, sdbo = {}, {}
    for name, data, _ in DATA:
        found = ratios(saved, name, "sdbo")
        for factors, who in ((adbo, "adbo"), (sdbo, "rival")):
            factors[data] = found[f"{who}_seconds"].iloc[1] / found[f"{who}_seconds"].iloc[0]
    ours = "factors of ADBO and SDBO: " + "; ".join(f"{data} {adbo[data]:.2f} and {sdbo[data]:.2f}" for data in adbo)
    parts = {
        "ADBO's factor below SDBO's on all": all(adbo[data] < sdbo[data] for data in adbo),
        "ADBO's below 1.25 on all": max(adbo.values()) < 1.25,
    }
    return Found(ours, parts)


def staleness(saved: Saved) -> Found:
    """Iterations of SDBO over those of ADBO to one accuracy, on the four data sets."""
    found = {data: ratios(saved, name, "sdbo").iloc[0]["step_ratio"] for name, data, _ in DATA}
    ours = "iterations of SDBO over ADBO's: " + ", ".join(f"{data} {ratio:.2g}" for data, ratio in found.items())
    return Found(ours, {f"below 1 on {data}": ratio < 1 for data, ratio in found.items()})


def _toy(saved: Saved, column: str, start: bool = False) -> Any:
    """Medians over the seeds at the end of the quadratic, by rounds, cut period, and whether multipliers are kept."""
    keys = ["estimate_rounds", "cut_period", "warm_start"]
    runs = saved.table("asynchronous_toy").sort_values("step").groupby([*keys, "seed"])[column]
    ends = runs.last() / runs.first() if start else runs.last()
    return ends.groupby(keys).median()


def stationary(saved: Saved) -> Found:
    """How far the norm of the hypergradient falls on the quadratic."""
    found = _toy(saved, "hypergradient", start=True)
    published = found[1, 50, False]
    ours = f"over its start: {published:.2f} as published (K = 1, a cut every 50), {found.min():.2f} in the best of 8 variants"
    return Found(ours, {"as published: below a tenth": published < 0.1, "best variant: below a tenth": found.min() < 0.1})


def agreement(saved: Saved) -> Found:
    """How far the inner variables of the workers of the quadratic are apart, where their own optima have deviation 1."""
    found = _toy(saved, "inner_apart")
    published, kept = found[1, 50, False], found[1, 50, True]
    ours = f"largest distance {published:.2f} as published; {kept:.2f} with multipliers kept from cut to cut"
    return Found(
        ours, {"as published: below a fifth of the spread of the optima": published < 0.2, "multipliers kept": kept < 0.2}
    )


def recall(saved: Saved) -> Found:
    """The share of the wrong labels among as many rows of lowest weight, at the end, without stragglers."""

    def at_end(name: str) -> Any:
        table = saved.table(name).query("stragglers == 0").sort_values("step")
        return table.groupby(["method", "seed"])["recall"].last()

    mnist, moved = at_end("asynchronous_mnist"), at_end("asynchronous_digits_cleaning")["adbo"].median()
    ours = (
        f"MNIST: {mnist['adbo'].min():.2f} to {mnist['adbo'].max():.2f} (chance .10; FedNest {mnist['fednest'].median():.2f}); "
        f"digits, steps of x a million times larger: {moved:.2f}"
    )
    return Found(ours, {f"MNIST: above {FOUND:g} in every seed": bool(np.all(mnist["adbo"] > FOUND))})


def _compared() -> list[Claim]:
    made = []
    for rival, title in RIVALS.items():
        for name, data, where in DATA:
            text = f"ADBO reaches a test accuracy and a test loss before {title}, {data}"
            made.append(Claim(text, PAPER, where, runs=(name,), measure=sooner(name, rival)))
    for name, data, _ in DATA:
        text = f"With stragglers, workers four times slower, ADBO's lead over SDBO is larger: {data}"
        made.append(Claim(text, PAPER, "figures 5 and 6", runs=(name,), measure=wider(name)))
    return made


EVERY = tuple(name for name, *_ in DATA)

BODY = Body(
    "ADBO: asynchronous distributed bilevel optimization",
    {
        PAPER: "Jiao, Yang, Wu, Song, Jian, Asynchronous distributed bilevel optimization, ICLR 2023, arXiv 2212.10048",
    },
    (
        *_compared(),
        Claim(
            "With stragglers ADBO reaches a test accuracy before FedNest",
            PAPER,
            "figures 5 and 6",
            runs=EVERY,
            measure=fednest_with_stragglers,
        ),
        Claim("Stragglers slow SDBO down, ADBO hardly", PAPER, "figures 5 and 6", runs=EVERY, measure=degradation),
        Claim(
            "Waiting for fewer workers costs iterations: the bound on them grows with N - S and with the age of answers",
            PAPER,
            "iteration complexity, as a follow-up copies it",
            "a term in N - S",
            runs=EVERY,
            measure=staleness,
        ),
        Claim(
            "ADBO is ahead of SDBO at the step sizes of its public code (here on digits)",
            PAPER,
            "public code",
            runs=("asynchronous_digits_published",),
            measure=sooner("asynchronous_digits_published", "sdbo"),
        ),
        Claim(
            "ADBO is ahead of SDBO in real processes and seconds (here four workers, digits)",
            PAPER,
            "experiments",
            runs=("asynchronous_ray",),
            measure=sooner("asynchronous_ray", "sdbo"),
        ),
        Claim(
            "The same with a straggler, in real processes",
            PAPER,
            "figures 5 and 6",
            runs=("asynchronous_ray",),
            measure=wider("asynchronous_ray"),
        ),
        Claim(
            "The gradients vanish: any accuracy is reached (here the hypergradient of a quadratic, 3,000 iterations)",
            PAPER,
            "convergence theorem",
            "a bound of order 1 / accuracy^2",
            runs=("asynchronous_toy",),
            measure=stationary,
        ),
        Claim(
            "The inner variables of the workers come to agree (here on a quadratic)",
            PAPER,
            "the constraints of the problem",
            runs=("asynchronous_toy",),
            measure=agreement,
        ),
        Claim(
            "Hyper-cleaning at the outer step sizes of the public code finds the wrong labels (the task; the paper "
            "reports accuracy and loss)",
            PAPER,
            "experiments; public code",
            runs=("asynchronous_mnist", "asynchronous_digits_cleaning"),
            measure=recall,
        ),
        Claim(
            "An accuracy e of the stationarity gap takes O(1 / e^2) iterations",
            PAPER,
            "iteration complexity",
            "1 / e^2",
            recalled=False,
            reason="an upper bound whose constants, and the step sizes it asks for, are not known to us: the form at "
            "hand is a scan of a follow-up",
        ),
        Claim(
            "A theorem counts the bits sent until an accuracy is reached",
            PAPER,
            "communication complexity",
            reason="the formula is not known to us; messages and bytes are counted in experiments/asynchronous/README.md",
        ),
        Claim(
            "The curves at the published sizes: 3,330 rows a worker and 10,000 iterations (MNIST), 5,000 and 15,000 (IJCNN1)",
            PAPER,
            "figures 1 to 4; public code",
            recalled=False,
            reason="no value of a curve is known; runs have a fifth of the rows, and 2,000 and 5,000 "
            "iterations: the full sizes were not run",
        ),
        Claim(
            "The curves at the paper's step sizes on Fashion-MNIST and Covertype",
            PAPER,
            "figures 1 to 4",
            reason="its settings there are not known, nor those of FedNest on any data set; ours were searched, see "
            "experiments/asynchronous/README.md",
        ),
        Claim(
            "Times on a cluster of containers, one a worker",
            PAPER,
            "experiments; public code",
            recalled=False,
            reason="several machines are not at hand: times are simulated, or those of processes on one machine",
        ),
        Claim(
            "A centralised variant with cutting planes (CPBO) against methods by implicit and by iterative differentiation",
            PAPER,
            "appendix",
            reason="what it shows is not known to us",
        ),
        Claim(
            "Training goes on when workers fail",
            PAPER,
            "introduction, as motivation",
            recalled=False,
            reason="no saved result: the public code does not do it; what this library does when a worker is lost is "
            "tested in tests/test_cluster.py",
        ),
    ),
)
