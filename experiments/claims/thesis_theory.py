"""Claims of the papers on lower bounds, on multi-step MAML and on ANIL, companions of the bilevel thesis."""

from experiments.claims import thesis_measures as find
from experiments.claims.claim import Claim
from experiments.claims.measures import row, rows

BOUNDS, THEORY, OWN = ("lower_bounds",), ("maml_theory",), "claims.csv"

LOWER = (
    Claim(
        "Zero chain: a sweep of N inner and M linear steps moves N + M - 1 more entries of x",
        "lower bounds",
        "worst case, strongly convex",
        "exact",
        runs=BOUNDS,
        measure=row("lower_bounds", OWN, "zero chain: sweeps k with a support other than k (N + M - 1) + 1"),
    ),
    Claim(
        "No method in the span of the oracles needs less work than of order 1 / (sqrt(mu_x) mu_g)",
        "lower bounds",
        "abstract; table of complexities",
        "-1 in mu_g; work at least the bound",
        runs=BOUNDS,
        measure=rows(
            "lower_bounds",
            OWN,
            {
                "bound against mu_g": "worst case, lower bound: products against mu_g",
                "least work over the bound": "worst case: products over the lower bound, least of all runs",
            },
        ),
    ),
    Claim(
        "AccBiO meets the bound on quadratics where the inner curvatures are comparable, BA and AID do not",
        "lower bounds",
        "abstract; table of complexities",
        "a constant ratio, up to logarithms",
        runs=BOUNDS,
        measure=find.accelerated_pays,
    ),
    Claim(
        "AccBiO: sweeps of order mu_x^-1/2, products of order mu_g^-3/2 at most",
        "lower bounds",
        "table of complexities, quadratic inner loss",
        "-1/2; -3/2",
        runs=BOUNDS,
        measure=rows(
            "lower_bounds",
            OWN,
            {
                "sweeps, dense spectrum": "dense spectrum, AccBiO: sweeps against mu_x",
                "sweeps, worst case": "worst case, AccBiO: sweeps against mu_x",
                "products, dense spectrum": "dense spectrum, AccBiO: products against mu_g",
                "products, worst case": "worst case, AccBiO: products against mu_g, the upper bound",
            },
        ),
    ),
    Claim(
        "AccBiO-BG: sweeps of order mu_x^-1/2",
        "lower bounds",
        "table of complexities",
        "-1/2",
        runs=BOUNDS,
        measure=row("lower_bounds", OWN, "dense spectrum, AccBiO-BG: sweeps against mu_x"),
    ),
    Claim(
        "Without acceleration (BA; here AID with gradient steps): sweeps of order 1 / mu_x, products of order mu_g^-3",
        "lower bounds",
        "comparison with BA",
        "-1; -3",
        runs=BOUNDS,
        measure=rows(
            "lower_bounds",
            OWN,
            {
                "sweeps": "dense spectrum, AID-BiO, gradient steps: sweeps against mu_x",
                "products": "dense spectrum, AID-BiO, gradient steps: products against mu_g",
            },
        ),
    ),
)

META = (
    Claim(
        "The gradient of N-step MAML is a product of N Hessian factors (checked on quadratics, by closed forms of ours)",
        "MAML",
        "algorithm",
        "exact",
        runs=THEORY,
        measure=rows(
            "maml_theory",
            OWN,
            {
                "error of the gradient": "MAML: gradient against the closed form, largest error",
                "distance of the end": "MAML: distance of its end to the closed form, largest",
            },
        ),
    ),
    Claim(
        "With a fixed inner rate the smoothness of the meta-objective is bounded by (1 + a L)^2N, exponential in N",
        "MAML",
        "analysis",
        "(1 + a L)^2N",
        runs=THEORY,
        measure=rows(
            "maml_theory",
            OWN,
            {
                "largest over the bound": "smoothness over the paper's bound, largest",
                "growth of its logarithm with N": "smoothness at a fixed rate: log against N",
            },
        ),
    ),
    Claim(
        "An inner rate of order 1 / N keeps it bounded",
        "MAML",
        "abstract",
        "e^1/4 = 1.284 at 1 / (8 N L)",
        runs=THEORY,
        measure=row("maml_theory", OWN, "smoothness at the rate 1 / (8 N L), largest of all N"),
    ),
    Claim(
        "First-order MAML does not reach any accuracy",
        "FOMAML",
        "abstract",
        "a bias that stays",
        runs=THEORY,
        measure=find.bias_stays,
    ),
    Claim(
        "ANIL, strongly convex inner loss: more inner steps are better",
        "ANIL",
        "abstract",
        "faster as N grows",
        runs=THEORY,
        measure=rows(
            "maml_theory",
            OWN,
            {
                "loss, N = 20 over 1, equal updates": "ANIL, strongly convex: loss at equal updates, most steps over fewest",
                "equal oracle calls": "ANIL, strongly convex: loss at equal oracle calls, most steps over fewest",
            },
        ),
    ),
    Claim(
        "ANIL, nonconvex inner loss: more inner steps are worse",
        "ANIL",
        "abstract",
        "slower as N grows",
        runs=THEORY,
        measure=rows(
            "maml_theory",
            OWN,
            {
                "loss, N = 20 over 1, equal updates": "ANIL, nonconvex: loss at equal updates, most steps over fewest",
                "equal oracle calls": "ANIL, nonconvex: loss at equal oracle calls, most steps over fewest",
            },
        ),
    ),
)
