"""The table of all solvers, and the problems they are tested on: adding a solver adds a row here."""

from collections.abc import Callable, Iterable
from functools import cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from bilevel_jax import Batch, BilevelState, Levels, Problem, Solver, Vars, samplers, solvers
from bilevel_jax.linear_solve import cg, richardson
from bilevel_jax.samplers import Sampler
from bilevel_jax.testing import Quadratic, quadratic

THETA, PERIOD, PROBABILITY = 0.3, 4, 0.3  # of MA-SOBA, SRBA (and VRBO) and SPABA
STEPS = Vars(0.2, 0.2, 0.1)

Rows = dict[str, Callable[[Problem, Vars], Solver]]


def without_aux(make: Callable[..., Solver], **options: Any) -> Callable[[Problem, Vars], Solver]:
    """A row of a solver that solves for v, or has none."""
    return lambda problem, opts: make(problem, opts._replace(aux=None), **options)


def without_opts(make: Callable[..., Solver]) -> Callable[[Problem, Vars], Solver]:
    """A row of a solver whose steps come from constants, such as hold on both problems below."""
    return lambda problem, opts: make(problem, **CONSTANTS, inner_steps=2, aux_steps=2)


RATE, MU, TAU, RADIUS, NESTED = 0.5, 0.2, 0.4, 0.1, (2, 1)  # of linear solvers; of STABLE; of PZOBO; of stocBiO
CONSTANTS = {"smoothness": 2.0, "strong_convexity": MU, "outer_smoothness": 3.0, "outer_strong_convexity": 0.5}


def falling_rate(t: Any) -> Any:
    return RATE * (t + 1.0) ** -0.25


def falling_tolerance(t: Any) -> Any:
    return 0.1 * 0.9**t


def growing_steps(t: Any) -> Any:
    return (t + 1.0) ** 0.5


GAMMA, C_LOW, POWER = 0.7, 2.0, 0.25  # of MEHA: parameter of the envelope, c_k = C_LOW (k + 1)^POWER
MULTIPLIER, NODES = 8.0, 4  # of F2BA; of F2SA-p, whose order it is, too
BALL, SPREAD = 1.5, 1.0  # of HJFBiO: where v stays, and how far apart gradients are taken (on quadratics any will do)


def growing_multiplier(t: Any) -> Any:
    return MULTIPLIER * (t + 1.0) ** 0.1


REGULARISATION, STRENGTH, WIDTH = 0.02, 0.5, 0.5  # of BVFIM and BVFSM, so small that gaps cross the boundary


def falling(size: float) -> Callable[[Any], Any]:
    return lambda t: size * 1.01**-t


def falling_weight(t: Any) -> Any:
    return 0.5 * (t + 1.0) ** -0.25


#: name -> (problem, opts) -> solver.  Those that move all three variables with the optimisers given,
SINGLE_LOOP: Rows = {
    "soba": solvers.soba,
    "ma_soba": partial(solvers.ma_soba, theta=THETA),
    "saba": solvers.saba,
    "srba": partial(solvers.srba, period=PERIOD),
    "spaba": partial(solvers.spaba, probability=PROBABILITY),
    "storm_soba": solvers.storm_soba,
    "fsla": solvers.fsla,
}
#: those that move z and x,
NESTED_LOOPS: Rows = {
    "aid_bio": without_aux(solvers.aid_bio, inner_steps=2, linear_solver=cg(max_steps=2, rtol=1e-9)),
    "aid_fp": without_aux(solvers.aid_bio, inner_steps=2, linear_solver=richardson(steps=2, rate=RATE)),
    "ba": without_aux(solvers.ba, inner_steps=growing_steps),
    "hoag": without_aux(solvers.hoag, tolerance=falling_tolerance),
    "bsa": without_aux(solvers.bsa, rate=falling_rate, inner_steps=2, terms=2),
    "ttsa": without_aux(solvers.ttsa, rate=RATE, terms=3),
    "stocbio": without_aux(solvers.stocbio, rate=RATE, inner_steps=1, terms=2, batches=NESTED),
    "amigo": without_aux(solvers.amigo, aux_rate=falling_rate, inner_steps=2, aux_steps=2),
    "mrbo": without_aux(solvers.mrbo, rate=RATE, terms=2),
    "sustain": without_aux(solvers.sustain, rate=RATE, terms=2),
    "vrbo": without_aux(solvers.vrbo, rate=RATE, period=PERIOD, inner_steps=1, terms=2),
    "stable": without_aux(solvers.stable, strong_convexity=MU, tau=TAU),
    "itd_bio": without_aux(solvers.itd_bio, inner_steps=2, checkpoint="none", fresh=True),
    "fo_itd_bio": without_aux(solvers.fo_itd_bio, inner_steps=2),
    "pzobo": without_aux(solvers.pzobo, inner_steps=2, radius=RADIUS),
}
#: and those that bring their own steps.
ACCELERATED: Rows = {"accbio": without_opts(solvers.accbio), "accbio_bg": without_opts(solvers.accbio_bg)}
#: Those of first order, and others whose aux is a second inner iterate or the start of a path.
FIRST_ORDER: Rows = {
    "meha": partial(solvers.meha, gamma=GAMMA, c_low=C_LOW, p=POWER),
    "f2sa": partial(solvers.f2sa, multiplier=growing_multiplier, inner_steps=2),
    "f2ba": partial(solvers.f2ba, multiplier=MULTIPLIER, inner_steps=2),
    "f2sa_p": without_aux(solvers.f2sa_p, multiplier=growing_multiplier, order=NODES, inner_steps=2),
    "bome": partial(solvers.bome, inner_steps=2),
    "pbgd": partial(solvers.pbgd, multiplier=growing_multiplier, inner_steps=2),
    "bvfim": partial(
        solvers.bvfim,
        inner_steps=2,
        regularisation=falling(REGULARISATION),
        strength=falling(STRENGTH),
        slack=falling(WIDTH),
    ),
    "bvfsm": partial(solvers.bvfsm, inner_steps=2, regularisation=falling(REGULARISATION), width=falling(WIDTH)),
    "hjfbio": partial(solvers.hjfbio, radius=BALL, scale=SPREAD),
    "fdehbo": partial(solvers.fdehbo, radius=BALL, scale=SPREAD),
    "sl_bamm": partial(solvers.sl_bamm, weight=falling_weight),
    "bda": without_aux(solvers.bda, inner_steps=3),
    "iaptt": partial(solvers.iaptt, inner_steps=3),
}
#: Rows of these whose aux is v.
WITH_V = {"hjfbio", "fdehbo", "sl_bamm"}
SOLVERS: Rows = SINGLE_LOOP | NESTED_LOOPS | ACCELERATED | FIRST_ORDER

#: One row of each kind: single loop, table, refreshes, double loop, while loop, recursive estimates, unrolled, first order.
KINDS = ("soba", "saba", "srba", "aid_bio", "hoag", "vrbo", "itd_bio", "meha", "bome")


def thinned(names: str | tuple[str, ...], cases: Iterable[Any], *default: Any, slow: Iterable[Any] = (), **options: Any) -> Any:
    """Parametrise over all cases.  `make test` runs those in ``default``, `make test-all` all but those that are slow."""
    cases = list(cases)
    assert default, f"{names}: no default case"
    assert all(case in cases for case in default), f"{names}: a default case is not among the cases"
    slow, single = list(slow), isinstance(names, str)

    def marked(case: Any) -> Any:
        marks = [] if case in default else [pytest.mark.slow if case in slow else pytest.mark.more]
        return pytest.param(*([case] if single else case), marks=marks)

    return pytest.mark.parametrize(names, [marked(case) for case in cases], **options)


def kinds(*without: str, also: Iterable[str] = ()) -> Any:
    """All rows but those in ``without``.  `make test` runs those of `KINDS` and ``also``."""
    names = [name for name in SOLVERS if name not in without]
    return thinned("name", names, *(name for name in names if name in (*KINDS, *also)))


#: All rows in `make test`, for what neither compiles nor runs long; and one of each kind there.
every_solver = pytest.mark.parametrize("name", SOLVERS)
every_kind = kinds()


def build(name: str, problem: Problem, steps: Vars = STEPS) -> Solver:
    """The solver of a row, with optax.sgd of the given step sizes (numbers, or traced)."""
    return SOLVERS[name](problem, Vars(*map(optax.sgd, steps)))


def aux_like(name: str, tree: Any) -> Any:
    """A tree like z in the place of aux: as many times as a row has iterates there."""
    return jax.tree.map(lambda leaf: jnp.stack([leaf] * NODES), tree) if name == "f2sa_p" else tree


# ---- a problem of scalars, for what must compile fast -----------------------------------------------------------------


class Setting(NamedTuple):
    problem: Problem
    data: Levels
    start: Vars
    solution: Vars


@cache
def tiny() -> Setting:
    """``g_i = a_i z^2 / 2 + x z + b_i z`` and ``f_j = (z - e_j)^2 / 2 + x^2 / 2`` on 7 and 7 rows, in float64.

    ``z* = -(x + b) / a``, ``v* = -(z* - e) / a``, and ``x* = -(b / a^2 + e / a) / (1 + 1 / a^2)``, with the means.
    """
    rows = np.arange(7.0)
    a, b, e = 1 + 0.3 * np.cos(rows), np.sin(rows), 1 + rows / 7
    problem = Problem(lambda z, x, s: 0.5 * s[0] * z**2 + x * z + s[1] * z, lambda z, x, s: 0.5 * (z - s) ** 2 + 0.5 * x**2)
    x = -(b.mean() / a.mean() ** 2 + e.mean() / a.mean()) / (1 + 1 / a.mean() ** 2)
    z = -(x + b.mean()) / a.mean()
    solution, start = Vars(z, -(z - e.mean()) / a.mean(), x), Vars(*map(np.float64, (1, 0.5, 2)))
    with jax.enable_x64(True), jax.ensure_compile_time_eval():  # the first call may be at import, or inside a trace
        return Setting(problem, *jax.tree.map(jnp.asarray, (Levels((a, b), e), start, solution)))


def tiny_start(name: str) -> Vars:
    """Where a row starts on `tiny`."""
    return tiny().start._replace(aux=aux_like(name, tiny().start.aux))


def tiny_sampler() -> Sampler:
    """3 inner blocks (3, 3 and 1 rows) and 4 outer ones (2, 2, 2 and 1 rows)."""
    return samplers.uniform(3, outer_batch_size=2)


@cache
def donated_update(name: str) -> Callable[[BilevelState, Batch], BilevelState]:
    """The compiled update of a solver on `tiny`, with a donated state: compiled once for all suites."""
    return jax.jit(build(name, tiny().problem).update, donate_argnums=0)


@cache
def stream(draws: int, seed: int = 7) -> list[Batch]:
    """The batches of 20 updates on `tiny`, those that `bilevel_jax.run` would make of the same key."""
    draw = jax.jit(lambda start: tiny_sampler().batches(tiny().data, jax.random.key(seed), start, draws))
    return [draw(jnp.int32(t * draws)) for t in range(20)]


# ---- the quadratic, for closed forms ----------------------------------------------------------------------------------


@cache
def small() -> Quadratic:
    """The shipped quadratic, in float64.  One for all suites: its making is a hundred small compilations."""
    with jax.enable_x64(True), jax.ensure_compile_time_eval():
        return quadratic(
            jax.random.key(0), inner_dim=5, outer_dim=3, inner_samples=32, outer_samples=32, noise=0.1, dtype=jnp.float64
        )


def ragged() -> Sampler:
    """Draws of `small` with 3 inner blocks (12, 12 and 8 rows) and 4 outer ones (9, 9, 9 and 5 rows)."""
    return samplers.uniform(12, outer_batch_size=9)


@cache
def small_stream(draws: int) -> list[Batch]:
    """The batches of 20 updates on `small`."""
    draw = jax.jit(lambda start: ragged().batches(small().data, jax.random.key(7), start, draws))
    return [draw(jnp.int32(t * draws)) for t in range(20)]


def distance(a: Any, b: Any) -> float:
    """The largest difference between two trees of one structure; None against None is none."""
    gaps = jax.tree.map(lambda u, w: np.abs(np.asarray(u) - np.asarray(w)).max(initial=0.0), a, b)
    return max((float(gap) for gap in jax.tree.leaves(gaps)), default=0.0)
