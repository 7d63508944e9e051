"""Claims of the bilevel thesis and of its companion papers."""

from experiments.claims import thesis_measures as find
from experiments.claims.claim import Body, Claim
from experiments.claims.measures import row, rows
from experiments.claims.thesis_theory import LOWER, META

CLEANING, NEWS, HYPER = ("thesis_cleaning",), ("newsgroups",), ("hyper_representation",)
RATES, TABLE = ("rates",), "table.csv"

REFERENCES = {
    "thesis": "Ji, Bilevel optimization for machine learning: algorithm design and convergence analysis, arXiv 2108.00330",
    "stocBiO": "Ji, Yang, Liang, Bilevel optimization: convergence analysis and enhanced design, ICML 2021, arXiv 2010.07962",
    "MRBO/VRBO": "Yang, Ji, Liang, Provably faster algorithms for bilevel optimization, NeurIPS 2021, arXiv 2106.04692",
    "lower bounds": "Ji, Liang, Lower bounds and accelerated algorithms for bilevel optimization, JMLR 2023, arXiv 2102.03926",
    "MAML": "Ji, Yang, Liang, Theoretical convergence of multi-step model-agnostic meta-learning, JMLR 2022, arXiv 2002.07836",
    "ANIL": "Ji, Lee, Liang, Poor, Convergence of meta-learning with task-specific adaptation over partial parameters, "
    "NeurIPS 2020, arXiv 2006.09486",
    "PZOBO": "Sow, Ji, Liang, On the convergence theory for Hessian-free bilevel algorithms, NeurIPS 2022, arXiv 2110.07004",
}

STOCBIO = (
    Claim(
        "ITD: the error of the hypergradient falls like (1 - a mu)^D",
        "stocBiO",
        "analysis of ITD-BiO",
        "log(1 - a mu)",
        runs=RATES,
        measure=row("rates", TABLE, "ITD: log error of the hypergradient against D, log(1 - a mu)"),
    ),
    Claim(
        "ITD-BiO with D fixed stops at a floor, so that D grows with log(1 / eps)",
        "stocBiO",
        "analysis of ITD-BiO",
        "log(1 - a mu)",
        runs=RATES,
        measure=row("rates", TABLE, "ITD-BiO: log floor against D >= 60, log(1 - a mu)"),
    ),
    Claim(
        "AID-BiO needs no log(1 / eps) inner or linear steps, because z and v start where they were",
        "stocBiO",
        "analysis of AID-BiO",
        "D of order kappa, N of order sqrt kappa",
        runs=RATES,
        measure=rows(
            "rates",
            TABLE,
            {
                "3 CG steps, v kept: error reached": "AID-BiO, 3 CG steps, warm v: error reached",
                "v from 0: error reached": "AID-BiO, 3 CG steps, cold v: error at which it stalls",
            },
        ),
    ),
    Claim(
        "The bias of stocBiO's Neumann sum falls like (1 - eta mu)^Q",
        "stocBiO",
        "analysis of the estimator",
        "log(1 - eta mu)",
        runs=RATES,
        measure=row("rates", TABLE, "Neumann: log bias against Q, log(1 - eta mu)"),
    ),
    Claim(
        "Its variance falls like 1 / B, with nested batches and with equal ones",
        "stocBiO",
        "analysis of the estimator",
        "-1",
        runs=RATES,
        measure=rows(
            "rates",
            TABLE,
            {
                "nested": "stocBiO: variance against B, nested batches",
                "equal": "stocBiO: variance against the batch, equal batches",
            },
        ),
    ),
    Claim(
        "20 Newsgroups: stocBiO is ahead of AID-FP, AID-CG, HOAG and reverse differentiation",
        "stocBiO",
        "20 Newsgroups figure",
        ".975 against 1.09, 1.115, 1.12, 1.16 (60 s)",
        runs=NEWS,
        measure=find.newsgroups,
    ),
    Claim(
        "20 Newsgroups: AID-FP, then AID-CG, HOAG, and reverse differentiation",
        "stocBiO",
        "20 Newsgroups figure",
        "1.09, 1.115, 1.12, 1.16 (60 s)",
        runs=NEWS,
        measure=find.order_in_newsgroups,
    ),
    Claim(
        "20 Newsgroups: smaller batches of stocBiO are better after the same time, down to 500 rows",
        "stocBiO",
        "20 Newsgroups figure on batches",
        ".95, .955, .975, 1.015 (100, 500, 1,000, 2,000 rows; 60 s)",
        runs=("newsgroups_batches",),
        measure=find.batches_in_newsgroups,
    ),
)

CLEANED = (
    Claim(
        "Cleaning of MNIST: stocBiO is ahead of AID-CG, AID-FP, HOAG and reverse differentiation (here 40 % of the labels)",
        "thesis",
        "figure on hyper-cleaning; stocBiO, the same",
        "about 1.9 against 2.4 to 2.7 at the end",
        runs=CLEANING,
        measure=find.stocbio_first,
    ),
    Claim(
        "BSA and TTSA are far behind",
        "thesis",
        "figure on hyper-cleaning",
        "3.6 and 17.3",
        runs=CLEANING,
        measure=find.single_rows,
    ),
    Claim(
        "The test loss of stocBiO levels off at 1.8 to 2.0",
        "thesis",
        "figure on hyper-cleaning",
        "1.8 to 2.0",
        runs=CLEANING,
        measure=find.level_of_stocbio,
    ),
    Claim(
        "Among methods with momentum, in hyper-cleaning: VRBO before MRBO before SUSTAIN (here the test loss)",
        "MRBO/VRBO",
        "figure on momentum methods",
        "2.0, 3.6, 9.2 (10 % of the labels)",
        runs=CLEANING,
        measure=find.ordered("vrbo", "mrbo", "sustain"),
    ),
    Claim(
        "VRBO is the best of all in hyper-cleaning",
        "MRBO/VRBO",
        "figure on hyper-cleaning",
        "2.0 against 2.5 (AID-FP, reverse, stocBiO)",
        runs=CLEANING,
        measure=find.below_all("vrbo", "aid_fp", "itd_truncated", "stocbio"),
    ),
    Claim(
        "MRBO does not get ahead of stocBiO in hyper-cleaning",
        "MRBO/VRBO",
        "figure on hyper-cleaning",
        "3.6 against 2.5",
        runs=CLEANING,
        measure=find.ordered("stocbio", "mrbo"),
    ),
)

MOMENTUM = (
    Claim(
        "Double momentum, MRBO: E |grad h|^2 falls like K^-2/3, faster than plain steps",
        "MRBO/VRBO",
        "complexity of MRBO",
        "-2/3 (eps^-1.5 samples)",
        runs=RATES,
        measure=find.faster_double_momentum,
    ),
    Claim(
        "SUSTAIN has the same order",
        "MRBO/VRBO",
        "table of complexities",
        "-2/3 (eps^-1.5 samples)",
        runs=RATES,
        measure=row("rates", TABLE, "SUSTAIN: E |grad h|^2 against K"),
    ),
    Claim(
        "TTSA has the order K^-2/5",
        "MRBO/VRBO",
        "table of complexities",
        "at most -2/5 (eps^-2.5 samples)",
        runs=RATES,
        measure=row("rates", TABLE, "TTSA: E |grad h|^2 against K"),
    ),
)

ZEROTH = (
    Claim(
        "Hyper-representation, linear: PZOBO below AID-FP and AID-CG, HOZOG far behind (its public code)",
        "PZOBO",
        "notebook of the public code",
        ".0185, .077, .0665, 16.9",
        False,
        runs=HYPER,
        measure=find.notebook_order("hyper_representation"),
    ),
    Claim(
        "The same levels",
        "PZOBO",
        "notebook of the public code",
        ".0185, .077, .0665, 16.9",
        False,
        runs=HYPER,
        measure=find.notebook_levels(
            "hyper_representation", {"pzobo_unit": 0.0185, "aid_fp": 0.077, "aid_cg": 0.0665, "hozog": 16.9}
        ),
    ),
    Claim(
        "The estimate of the paper's text, one Gaussian direction without a factor, is ahead of AID-FP, AID-CG and HOZOG, too",
        "PZOBO",
        "algorithm and experiments",
        runs=HYPER,
        measure=find.paper_estimate,
    ),
)

DEEP = (
    Claim(
        "Hyper-representation, two layers, T = 20: the level of PZOBO, and that of HOZOG",
        "PZOBO",
        "notebook of the public code",
        "1.8e-4, 26.6",
        False,
        runs=("hyper_representation_deep",),
        measure=find.notebook_levels("hyper_representation_deep", {"pzobo_unit": 1.8e-4, "hozog": 26.6}),
    ),
)

FEW_SHOT = (
    Claim(
        "ITD-BiO converges faster than MAML and ANIL, its first-order variant faster still (here Omniglot, 5-way 1-shot)",
        "stocBiO",
        "public code, few-shot figures",
        recalled=False,
        runs=("few_shot_omniglot_itd",),
        measure=find.itd_first,
    ),
)

UNCHECKABLE = (
    Claim(
        "stocBiO takes of order kappa^5 eps^-2 gradients of f, kappa^9 eps^-2 of g; BSA kappa^6 eps^-2 and kappa^9 eps^-3",
        "stocBiO",
        "table of complexities",
        "kappa^5, kappa^9",
        reason="upper bounds; on quadratics, where all is known, constants of third derivatives vanish and the powers "
        "are smaller",
    ),
    Claim(
        "The smoothness of h is of order kappa^3",
        "stocBiO",
        "analysis",
        "kappa^3",
        reason="needs an inner loss whose Hessian changes in the worst way; on quadratics it is of order kappa^2",
    ),
    Claim(
        "Convex h: a lower bound of order min(1 / mu_g, eps^-3/2) / sqrt eps, and AccBiO near it",
        "lower bounds",
        "abstract; table of complexities",
        "1 / (sqrt eps mu_g)",
        reason="no run: the instance is built and its optimum tested, but AccBiO needs a regularised form of it",
    ),
    Claim(
        "STABLE and MSTSA end far behind in hyper-cleaning",
        "MRBO/VRBO",
        "figure on momentum methods",
        "19.5, 10",
        reason="neither is in this library: STABLE inverts a dense Hessian, 7,850 by 7,850 here",
    ),
    Claim(
        "ITD-BiO converges faster than MAML and ANIL on miniImageNet and FC100; the first-order variant faster still",
        "stocBiO",
        "few-shot figures; public code",
        reason="64-filter networks on these data sets need a GPU, and the data are not at hand; no numbers are published",
    ),
    Claim(
        "PZOBO is ahead with LeNet on MNIST and in few-shot learning",
        "PZOBO",
        "experiments",
        reason="thousands of steps of convolution networks; settings are known from code that swaps train and test splits",
    ),
)

BODY = Body(
    "The bilevel thesis and its companion papers",
    REFERENCES,
    (*STOCBIO, *CLEANED, *MOMENTUM, *LOWER, *META, *ZEROTH, *DEEP, *FEW_SHOT, *UNCHECKABLE),
)
