"""Claims about other methods, most of them later, where saved results bear on them."""

from collections.abc import Callable

import numpy as np

from experiments.claims.claim import Body, Claim, Found
from experiments.claims.measures import TITLES, first_below, row, rows
from experiments.claims.saved import Saved

REFERENCES = {
    "SRBA": "Dagréou, Moreau, Vaiter, Ablin, A lower bound and a near-optimal algorithm for bilevel empirical risk "
    "minimization, AISTATS 2024, arXiv 2302.08766",
    "SPABA": "Chu, Xu, Yao, Zhang, SPABA: a single-loop and probabilistic stochastic bilevel algorithm achieving optimal "
    "sample complexity, ICML 2024, arXiv 2405.18777",
    "MA-SOBA": "Chen, Xiao, Balasubramanian, Optimal algorithms for stochastic bilevel optimization under relaxed smoothness "
    "conditions, JMLR 2024, arXiv 2306.12067",
    "FSLA": "Li, Gu, Huang, A fully single loop algorithm for bilevel optimization without Hessian inverse, AAAI 2022, "
    "arXiv 2112.04660",
    "AmIGO": "Arbel, Mairal, Amortized implicit differentiation for stochastic bilevel optimization, ICLR 2022, "
    "arXiv 2111.14580",
    "F2SA-p": "Chen, Li, Chayti, Zhang, Faster gradient methods for highly-smooth stochastic bilevel optimization, ICLR 2026, "
    "arXiv 2509.02937",
    "ANIL": "Raghu, Raghu, Bengio, Vinyals, Rapid learning or feature reuse? Towards understanding the effectiveness of MAML, "
    "ICLR 2020, arXiv 1909.09157",
}


def converges(name: str) -> Callable[[Saved], Found]:
    """Constant steps on the quadratic: the error reached, and how straight its logarithm is."""
    line = f"{name}: R^2 of a line through the log error above 1e-12"
    return rows("rates", "table.csv", {"error reached": f"{name}: error reached with constant steps", "R^2 of a line": line})


def slope(claim: str) -> Callable[[Saved], Found]:
    """Of the squared gradient against K."""
    return row("rates", "table.csv", f"{claim}: E |grad h|^2 against K")


def srba_below(saved: Saved) -> Found:
    """Oracle calls to a gap of 1e-3 on IJCNN1."""
    way = first_below(saved.table("ijcnn1"), "suboptimality", 1e-3, "oracle_calls")
    ours = ", ".join(f"{TITLES[s]} {way[s]:.2g}" for s in ("srba", "saba"))
    return Found(
        f"oracle calls to 1e-3: {ours}",
        {"SRBA with fewer calls than SABA": bool(way["srba"] < way["saba"])},
    )


def amigo_ahead(saved: Saved) -> Found:
    """Oracle calls to a test loss of 0.6 in the cleaning of MNIST."""
    way = first_below(saved.table("thesis_cleaning"), "test_loss", 0.6, "oracle_calls")
    ours = ", ".join(f"{TITLES[s]} {way[s]:,.0f}" for s in ("amigo", "stocbio"))
    return Found(
        f"oracle calls to a test loss of 0.6: {ours}",
        {"fewer than stocBiO": bool(way["amigo"] < way["stocbio"])},
    )


def f2sa_p_fails(saved: Saved) -> Found:
    """F2SA-2 on an inner loss that is merely convex."""
    found = saved.table("nonconvex_merely_convex", "table.csv").set_index("method").loc["F2SA-2"]
    return Found(f"{found['solved']} of {found['settings']} settings solve it", {"none": bool(found["solved"] == 0)})


def anil_is_maml(saved: Saved) -> Found:
    """Accuracies on held-out characters at the end."""
    ends = saved.table("few_shot_omniglot").groupby("solver").last()
    anil, maml = ends.loc["anil"], ends.loc["maml"]
    words = ", ".join(
        f"{n} {100 * r['accuracy']:.1f} % +- {100 * r['interval']:.1f}" for n, r in (("ANIL", anil), ("MAML", maml))
    )
    margin = np.hypot(anil["interval"], maml["interval"])
    parts = {
        "no difference beyond the intervals": bool(abs(anil["accuracy"] - maml["accuracy"]) <= margin),
        "less time for as many updates": bool(anil["seconds"] < maml["seconds"]),
    }
    return Found(f"{words}; {anil['seconds']:.0f} and {maml['seconds']:.0f} s", parts)


BODY = Body(
    "Other methods",
    REFERENCES,
    (
        Claim(
            "SRBA: the variance vanishes, so that constant steps lead to the solution of a finite sum (here linearly)",
            "SRBA",
            "method",
            runs=("rates",),
            measure=converges("SRBA"),
        ),
        Claim(
            "SPABA, whose refresh is decided by a coin: constant steps lead to the solution of a finite sum (here linearly)",
            "SPABA",
            "method",
            runs=("rates",),
            measure=converges("SPABA"),
        ),
        Claim(
            "SRBA needs sqrt(n + m) / eps samples where SABA needs (n + m)^2/3 / eps: fewer calls to 1e-3 on IJCNN1",
            "SRBA",
            "abstract",
            "sqrt(n + m)",
            runs=("ijcnn1",),
            measure=srba_below,
        ),
        Claim(
            "MA-SOBA: the squared gradient falls like K^-1/2",
            "MA-SOBA",
            "theorem",
            "-1/2",
            runs=("rates",),
            measure=slope("MA-SOBA"),
        ),
        Claim(
            "FSLA: the squared gradient falls like K^-1/2", "FSLA", "theorem", "-1/2", runs=("rates",), measure=slope("FSLA")
        ),
        Claim(
            "AmIGO: v, kept from update to update, saves calls against a Neumann sum that starts anew",
            "AmIGO",
            "title: amortized",
            runs=("thesis_cleaning",),
            measure=amigo_ahead,
        ),
        Claim(
            "F2SA-p with p = 2 needs g - f / lambda to be convex: it fails where the inner loss is merely convex",
            "F2SA-p",
            "formula: nodes at negative multipliers",
            runs=("nonconvex_merely_convex",),
            measure=f2sa_p_fails,
        ),
        Claim(
            "ANIL is as accurate as MAML: features are reused",
            "ANIL",
            "Omniglot",
            runs=("few_shot_omniglot",),
            measure=anil_is_maml,
        ),
    ),
)
