"""Bad input: refused before anything is compiled, with the name of the argument, what was given and what was expected."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from bilevel_jax import (
    Batch,
    Levels,
    Problem,
    Vars,
    begin,
    descend,
    estimators,
    guard,
    hypergrad,
    hypergradient,
    implicit,
    linear_solve,
    nonsmooth,
    per_sweep,
    resume,
    run,
    samplers,
    solve_aux,
    solve_inner,
    solvers,
    sweep,
    unroll,
)
from bilevel_jax import stream as stream_run
from bilevel_jax.estimators import ema, page, saga, sarah, storm
from bilevel_jax.linear_solve import cg
from bilevel_jax.loop import several
from bilevel_jax.oracles import aid
from bilevel_jax.projections import proximal_sgd
from bilevel_jax.testing import quadratic
from bilevel_jax.types import Slot
from bilevel_jax.value_oracles import moreau
from tests.checks import ZERO
from tests.tables import FIRST_ORDER, NESTED_LOOPS, SINGLE_LOOP, SOLVERS, thinned

ROWS = (10, 6)
OPTS = Vars(*map(optax.sgd, (0.1, 0.1, 0.1)))
TWO = OPTS._replace(aux=None)


def good() -> Problem:
    return Problem(
        lambda z, x, a: ((z[None] - a) ** 2).sum(1) + x.sum() * z.sum(), lambda z, x, b: ((z[None] - b) ** 2).sum(1) + x.sum()
    )


def start() -> Vars:
    return Vars(jnp.ones(2), None, jnp.ones(3))


def data(**changes: Any) -> Levels:
    return Levels(*(jnp.ones((n, 2)) for n in ROWS))._replace(**changes)


def go(
    problem: Problem | None = None,
    solver: Any = None,
    sampler: Any = None,
    vars: Any = None,
    data: Any = data,
    key: Any = None,
    steps: Any = 4,
    **options: Any,
) -> Any:
    """A run that is fine, with what is given changed."""
    solver = solvers.soba(problem or good(), OPTS) if solver is None else solver
    return run(
        solver,
        samplers.uniform(2) if sampler is None else sampler,
        start() if vars is None else vars,
        data() if callable(data) else data,
        jax.random.key(0) if key is None else key,
        steps=steps,
        **options,
    )


def step(solver: Any, batches: Any, vars: Vars | None = None) -> Any:
    return solver.update(solver.init(start() if vars is None else vars, batches), batches)


def one_batch(**changes: Any) -> Batch:
    return Batch(inner=jnp.ones((1, 2, 2)), outer=jnp.ones((1, 2, 2)))._replace(**changes)


def draws_of(count: int) -> Batch:
    """Stacked draws with neither keys nor the full data."""
    return Batch(inner=jnp.ones((count, 2, 2)), outer=jnp.ones((count, 2, 2)))


def accelerated(make: Any = solvers.accbio, **changes: Any) -> Any:
    constants = {"smoothness": 2.0, "strong_convexity": 1.0, "outer_smoothness": 2.0, "outer_strong_convexity": 1.0}
    return make(good(), **(constants | changes))


def estimated(estimator: Any) -> Any:
    return sweep(descend(implicit(good()), OPTS, estimator=estimator))


def other_slots() -> Any:
    """A state made for 5 and 3 blocks, updated with batches of 2 and 1."""
    solver = solvers.saba(good(), OPTS)
    state = solver.init(start(), samplers.uniform(2).batches(data(), jax.random.key(0), 0, 1))
    return solver.update(state, samplers.uniform(5).batches(data(), jax.random.key(0), 0, 1))


def with_loss(inner: Any = None, outer: Any = None) -> Problem:
    return Problem(inner or good().inner, outer or good().outer)


def proximal(change: Any) -> Any:
    """MEHA with a proximal operator that changes what it is given."""
    term = nonsmooth.Nonsmooth(lambda z, x: jnp.zeros(()), lambda point, step, x: change(point))
    return solvers.meha(good(), Vars(*[proximal_sgd(0.1, term)] * 2, OPTS.outer), gamma=1.0, nonsmooth=term)


def spoilt(value: float) -> np.ndarray:
    """Of NumPy, so that it is concrete while the call around it is traced."""
    return np.array([[1.0, 1.0]] * 9 + [[1.0, value]])


class Case(NamedTuple):
    call: Callable[[], Any]
    error: type[Exception]
    parts: tuple[str, ...]  # name, given, expected


CASES = {
    # variables
    "vars is a tuple": Case(lambda: go(vars=tuple(start())), TypeError, ("vars:", "tuple", "expected Vars")),
    "inner of integers": Case(
        lambda: go(vars=start()._replace(inner=jnp.ones(2, jnp.int32))),
        TypeError,
        ("vars.inner", "int32[2]", "expected a floating-point array"),
    ),
    "outer leaf of integers": Case(
        lambda: go(vars=start()._replace(outer={"w": jnp.ones(3), "n": jnp.ones(3, jnp.int32)})),
        TypeError,
        ("vars.outer['n']", "int32[3]", "expected a floating-point array"),
    ),
    "outer is None": Case(
        lambda: go(vars=start()._replace(outer=None)), TypeError, ("vars.outer", "None", "expected a pytree")
    ),
    "inner of floats": Case(lambda: go(vars=start()._replace(inner=[1.0])), TypeError, ("vars.inner:", "list", "an array")),
    "aux of integers": Case(
        lambda: go(vars=start()._replace(aux=jnp.ones(2, jnp.int32))), TypeError, ("vars.aux", "int32[2]", "floating-point")
    ),
    "aux of another shape": Case(
        lambda: go(vars=start()._replace(aux=jnp.ones(4))),
        ValueError,
        ("vars.aux", "float64[4]", "expected float64[2]", "vars.inner"),
    ),
    "aux of another dtype": Case(
        lambda: go(vars=start()._replace(aux=jnp.ones(2, jnp.float32))),
        ValueError,
        ("vars.aux", "float32[2]", "expected float64[2]", "vars.inner"),
    ),
    "aux of another structure": Case(
        lambda: go(vars=start()._replace(aux=[jnp.ones(2)])), ValueError, ("vars.aux", "structure", "expected", "vars.inner")
    ),
    "NaN in the start": Case(
        lambda: go(vars=start()._replace(inner=spoilt(np.nan)[-1])),
        ValueError,
        ("vars.inner", "1 values that are NaN", "finite"),
    ),
    "infinity in a leaf of the start": Case(
        lambda: go(
            vars=start()._replace(outer={"w": np.array([1.0, np.inf])}),
            problem=with_loss(*[lambda z, x, a: z.sum() + x["w"].sum()] * 2),
        ),
        ValueError,
        ("vars.outer['w']", "1 values", "expected finite"),
    ),
    "NaN in the start of a stream": Case(
        lambda: next(stream_run(solvers.soba(good(), OPTS), start()._replace(inner=spoilt(np.nan)[-1]), [])),
        ValueError,
        ("start.inner", "1 values that are NaN", "expected finite"),
    ),
    # losses
    "inner loss of rank 2": Case(
        lambda: go(with_loss(inner=lambda z, x, a: a)),
        ValueError,
        ("problem.inner", "(2, 2)", "expected a scalar or one value"),
    ),
    "outer loss of rank 2": Case(
        lambda: go(with_loss(outer=lambda z, x, b: b)),
        ValueError,
        ("problem.outer", "(2, 2)", "expected a scalar or one value"),
    ),
    "integer loss": Case(
        lambda: go(with_loss(inner=lambda z, x, a: jnp.int32(1))), TypeError, ("problem.inner", "int32", "floating-point")
    ),
    "scalar loss, ragged batch": Case(
        lambda: go(with_loss(inner=lambda z, x, a: ((z - x.sum()) ** 2).sum()), sampler=samplers.uniform(3)),
        ValueError,
        ("problem.inner", "a scalar loss", "expected one value a sample", "remainder='drop'"),
    ),
    "loss of another length": Case(
        lambda: go(with_loss(outer=lambda z, x, b: z[:1])), ValueError, ("problem.outer", "(1,)", "(2,), one value a sample")
    ),
    "a loss and something else": Case(
        lambda: go(with_loss(inner=lambda z, x, a: (z.sum(), a))),
        TypeError,
        ("problem.inner", "tuple", "expected a scalar or one value a sample"),
    ),
    "problem is a tuple": Case(lambda: solvers.soba(tuple(good()), OPTS), TypeError, ("problem:", "tuple", "expected Problem")),
    "loss of another length, ragged batch": Case(
        lambda: go(with_loss(inner=lambda z, x, a: a[:2].sum(1)), sampler=samplers.uniform(3)),
        ValueError,
        ("problem.inner", "(2,)", "expected (3,)"),
    ),
    # batches
    "batches is a tuple": Case(
        lambda: step(solvers.soba(good(), OPTS), (1, 2)), TypeError, ("batches:", "tuple", "expected a Batch")
    ),
    "batches not stacked": Case(
        lambda: step(solvers.soba(good(), OPTS), Batch(inner=jnp.ones((2, 2)), outer=jnp.ones((2, 2)))),
        ValueError,
        ("batches.inner", "(2, 2)", "expected a leading axis of length 1", "number of draws"),
    ),
    "batches of too few draws": Case(
        lambda: step(SOLVERS["fsla"](good(), OPTS), one_batch()),
        ValueError,
        ("batches.inner", "(1, 2, 2)", "expected a leading axis of length 3", "number of draws"),
    ),
    "a leaf without axes": Case(
        lambda: step(solvers.soba(good(), OPTS), one_batch(key=jax.random.key(0))),
        ValueError,
        ("batches.key", "()", "expected a leading axis of length 1"),
    ),
    "no outer data": Case(
        lambda: step(solvers.soba(good(), OPTS), one_batch(outer=None)),
        ValueError,
        ("opts.aux", "no direction", "is batch.outer or vars.aux None?"),
    ),
    "state is something else": Case(
        lambda: solvers.soba(good(), OPTS).update(start(), one_batch()),  # pyright: ignore[reportArgumentType]
        TypeError,
        ("state:", "Vars", "expected the BilevelState"),
    ),
    # tables and refreshes
    "other number of slots": Case(other_slots, ValueError, ("batch.slot", "2 blocks", "expected 5", "table")),
    "no slots": Case(
        lambda: step(solvers.saba(good(), OPTS), one_batch()), ValueError, ("batch.slot", "None", "expected a Slot")
    ),
    "no full data for sarah": Case(
        lambda: step(estimated(sarah(2)), one_batch()), ValueError, ("batch.full", "None", "expected the full data", "sarah")
    ),
    "no full data for page": Case(
        lambda: step(estimated(page(0.5)), one_batch(key=jax.random.split(jax.random.key(0), 1))),
        ValueError,
        ("batch.full", "None", "expected the full data", "page"),
    ),
    "no key for page": Case(
        lambda: step(estimated(page(0.5)), one_batch(full=data())), ValueError, ("batch.key", "None", "expected a key", "page")
    ),
    # compositions
    "opts is a tuple": Case(lambda: solvers.soba(good(), tuple(OPTS)), TypeError, ("opts:", "tuple", "expected Vars")),  # pyright: ignore[reportArgumentType]
    "opts of a stage is a dict": Case(
        lambda: descend(implicit(good()), {"inner": OPTS.inner}),  # pyright: ignore[reportArgumentType]
        TypeError,
        ("opts:", "dict", "expected Vars"),
    ),
    "no optimiser at all": Case(
        lambda: descend(implicit(good()), Vars()), ValueError, ("opts:", "no transformation", "expected one")
    ),
    "a rate in place of an optimiser": Case(
        lambda: descend(implicit(good()), Vars(inner=0.1)),
        TypeError,
        ("opts.inner", "float", "expected an optax transformation"),
    ),
    "empty sweep": Case(sweep, ValueError, ("stages:", "none", "expected at least one")),
    "unknown mode": Case(
        lambda: implicit(good(), mode="sideways"), ValueError, ("mode", "'sideways'", "'reverse' or 'forward'")
    ),
    "unknown solver": Case(
        lambda: solvers.default_opts(sweep, 0.1, 0.1, 0.1), ValueError, ("solver:", "sweep", "expected one of", "soba")
    ),
    "the name of a solver": Case(
        lambda: solvers.default_opts("saba", 0.1, 0.1, 0.1),  # pyright: ignore[reportArgumentType]
        TypeError,
        ("solver:", "'saba'", "expected the function, as bilevel_jax.solvers.saba"),
    ),
    "a solver that is built already": Case(
        lambda: solvers.default_opts(solvers.soba(good(), OPTS), 0.1),  # pyright: ignore[reportArgumentType]
        TypeError,
        ("solver: got Solver", "expected the function"),
    ),
    **{
        f"a step size of {value!r}": Case(
            lambda value=value: solvers.default_opts(solvers.saba, 0.1, 0.1, value),
            error,
            ("outer: got", repr(value), expected),
        )
        for value, error, expected in (
            (-0.1, ValueError, "expected a finite number of at least 0"),
            (float("nan"), ValueError, "expected a finite number of at least 0"),
            (float("inf"), ValueError, "expected a finite number of at least 0"),
            ("0.1", TypeError, "expected a number"),
        )
    },
    # parts that are not called, or of another kind
    "a sampler that is not called": Case(
        lambda: go(sampler=samplers.full),
        TypeError,
        ("sampler:", "the function full", "expected a Sampler", "did you mean full()?"),
    ),
    "a sampler without its size": Case(
        lambda: go(sampler=samplers.uniform), TypeError, ("sampler:", "the function uniform", "did you mean uniform(...)?")
    ),
    "a constructor of a solver": Case(
        lambda: go(solver=solvers.saba),
        TypeError,
        ("solver:", "the function saba", "expected a Solver: did you mean saba(...)?"),
    ),
    "a constructor of a solver, resumed": Case(
        lambda: resume(solvers.saba, samplers.full(), None, data(), steps=1),  # pyright: ignore[reportArgumentType]
        TypeError,
        ("solver:", "the function saba", "expected a Solver"),
    ),
    "a constructor of a solver, streamed": Case(
        lambda: next(stream_run(solvers.saba, start(), [])),  # pyright: ignore[reportArgumentType]
        TypeError,
        ("solver:", "the function saba", "expected a Solver"),
    ),
    "several of a stage": Case(
        lambda: several(descend(implicit(good()), OPTS), 2),  # pyright: ignore[reportArgumentType]
        TypeError,
        ("solver: got Stage, expected a Solver",),
    ),
    "sampler and solver swapped": Case(
        lambda: go(solver=samplers.full(), sampler=solvers.soba(good(), OPTS)),
        TypeError,
        ("solver: got Sampler, expected a Solver",),
    ),
    "an estimator that is not called": Case(
        lambda: estimated(estimators.saga), TypeError, ("estimator:", "the function saga", "expected an Estimator", "saga()?")
    ),
    "the name of an estimator": Case(
        lambda: estimated("saga"),
        TypeError,
        ("estimator:", "'saga'", "expected an Estimator, as bilevel_jax.estimators.saga()"),
    ),
    "a problem for an oracle": Case(
        lambda: descend(good(), OPTS),  # pyright: ignore[reportArgumentType]
        TypeError,
        ("oracle: got Problem", "expected an Oracle, as implicit(problem)"),
    ),
    "an oracle that is not called, for a path": Case(
        lambda: unroll(good(), TWO, 3, direction=implicit),  # pyright: ignore[reportArgumentType]
        TypeError,
        ("direction:", "the function implicit", "expected an Oracle", "did you mean implicit(...)?"),
    ),
    "an oracle for a stage": Case(
        lambda: sweep(descend(implicit(good()), OPTS), implicit(good())),  # pyright: ignore[reportArgumentType]
        TypeError,
        ("stages[1]: got Oracle", "expected a Stage, as descend(oracle, opts)"),
    ),
    "a method that is not called": Case(
        lambda: hypergradient(good(), hypergrad.implicit),  # pyright: ignore[reportArgumentType]
        TypeError,
        ("method:", "the function implicit", "expected a method of bilevel_jax.hypergrad", "did you mean implicit()?"),
    ),
    "an oracle for a method": Case(
        lambda: hypergradient(good(), implicit),  # pyright: ignore[reportArgumentType]
        TypeError,
        ("method:", "the function implicit", "as hypergrad.implicit(solver)"),
    ),
    "a linear solver for a method": Case(
        lambda: hypergradient(good(), cg(max_steps=2)),  # pyright: ignore[reportArgumentType]
        TypeError,
        ("method: got LinearSolver", "expected a method of bilevel_jax.hypergrad, as hypergrad.implicit(solver)"),
    ),
    **{
        f"{says} for the linear solver of {make.__name__}": Case(
            lambda make=make, given=given: make(good(), TWO, linear_solver=given),
            TypeError,
            ("linear_solver:", says, "expected a solver of bilevel_jax.linear_solve", hint),
        )
        for make in (solvers.aid_bio, solvers.ba, solvers.imaml)
        for given, says, hint in (("cg", "'cg'", ""), (linear_solve.cg, "the function cg", "did you mean cg(...)?"))
    },
    "a linear solver that is not called": Case(
        lambda: solve_aux(good(), linear_solve.cg), TypeError, ("solver:", "the function cg", "did you mean cg(...)?")
    ),
    # solvers that solve for v, or unroll
    "an optimiser of v": Case(
        lambda: solvers.stocbio(good(), OPTS, rate=0.1),
        ValueError,
        ("opts.aux", "an optimiser", "expected None", "z and x only"),
    ),
    "opts of two is a tuple": Case(
        lambda: solvers.itd_bio(good(), tuple(OPTS)),  # pyright: ignore[reportArgumentType]
        TypeError,
        ("opts:", "tuple", "expected Vars"),
    ),
    "problem of a composite oracle is a tuple": Case(
        lambda: solvers.mrbo(tuple(good()), TWO, rate=0.1), TypeError, ("problem:", "tuple", "expected Problem")
    ),
    "a number for a linear solver": Case(
        lambda: solvers.aid_bio(good(), TWO, linear_solver=10),  # pyright: ignore[reportArgumentType]
        TypeError,
        ("solver:", "int", "expected a solver of bilevel_jax.linear_solve"),
    ),
    "a function that makes no linear solver": Case(
        lambda: solve_aux(good(), lambda step: 10), TypeError, ("solver:", "int", "expected a solver")
    ),
    "a number for the solver of an oracle": Case(
        lambda: aid(good(), 10),  # pyright: ignore[reportArgumentType]
        TypeError,
        ("solver:", "int", "expected a solver"),
    ),
    "a rate of 0": Case(
        lambda: solvers.bsa(good(), TWO, rate=0.0), ValueError, ("rate", "0.0", "expected a finite number above 0")
    ),
    "batches that are not as many as the terms": Case(
        lambda: solvers.stocbio(good(), TWO, rate=0.1, terms=3, batches=(2, 1)),
        ValueError,
        ("batches", "2 of them", "expected one a factor, 3"),
    ),
    "eta above 1": Case(lambda: solvers.mrbo(good(), TWO, rate=0.1, eta=1.5), ValueError, ("eta", "1.5", "[0, 1]")),
    "tau below 0": Case(
        lambda: solvers.stable(good(), TWO, strong_convexity=1.0, tau=-0.5), ValueError, ("tau", "-0.5", "[0, 1]")
    ),
    "no curvature for stable": Case(
        lambda: solvers.stable(good(), TWO, strong_convexity=0.0),
        ValueError,
        ("strong_convexity", "0.0", "expected a finite number above 0"),
    ),
    "more convexity than smoothness": Case(
        lambda: accelerated(strong_convexity=3.0),
        ValueError,
        ("strong_convexity", "3.0", "smoothness = 2.0", "expected 0 < strong_convexity <= smoothness"),
    ),
    "no outer convexity": Case(
        lambda: accelerated(outer_strong_convexity=0.0),
        ValueError,
        ("outer_strong_convexity", "0.0", "expected 0 < outer_strong_convexity <= outer_smoothness"),
    ),
    "infinite smoothness": Case(
        lambda: accelerated(solvers.accbio_bg, outer_smoothness=float("inf")),
        ValueError,
        ("outer_smoothness = inf", "expected 0 <"),
    ),
    "smoothness is text": Case(
        lambda: accelerated(smoothness="2"), TypeError, ("smoothness", "'2'", "expected a Python number")
    ),
    "more steps differentiated than done": Case(
        lambda: solvers.itd_bio(good(), TWO, inner_steps=2, truncate=3),
        ValueError,
        ("truncate", "3", "expected at most steps = 2"),
    ),
    "unknown checkpoint": Case(
        lambda: solvers.itd_bio(good(), TWO, checkpoint="all"), ValueError, ("checkpoint", "'all'", "expected 'sqrt'")
    ),
    "a negative tolerance": Case(
        lambda: solve_inner(good(), TWO.inner, max_steps=3, tolerance=-0.1), ValueError, ("tolerance", "-0.1", "at least 0")
    ),
    "a path without an optimiser": Case(
        lambda: unroll(good(), Vars(outer=TWO.outer), 3),
        (TypeError, ValueError),
        ("opts.inner", "None", "expected an optax transformation"),
    ),
    "an accuracy of 1": Case(
        lambda: accelerated(accuracy=1.0), ValueError, ("accuracy", "1.0", "expected a number between 0 and 1")
    ),
    "a radius of 0": Case(lambda: solvers.pzobo(good(), TWO, radius=0.0), ValueError, ("radius", "0.0", "expected a positive")),
    "first order without an outer term of x": Case(
        lambda: go(solver=solvers.fo_itd_bio(with_loss(outer=lambda z, x, b: ((z[None] - b) ** 2).sum(1)), TWO)),
        ValueError,
        ("truncate", "0", "expected at least 1", "does not depend on x"),
    ),
    "no key for a random length": Case(
        lambda: step(solvers.ttsa(good(), TWO, rate=0.1, terms=2), draws_of(5)),
        ValueError,
        ("key", "None", "expected a key", "random_neumann"),
    ),
    "no key for a random length at two points": Case(
        lambda: step(solvers.sustain(good(), TWO, rate=0.1, terms=2), draws_of(3)),
        ValueError,
        ("key", "None", "expected a key"),
    ),
    "no key for random directions": Case(
        lambda: step(solvers.pzobo(good(), TWO), draws_of(1)), ValueError, ("key", "None", "expected a key", "directions")
    ),
    "no full data for vrbo": Case(
        lambda: step(solvers.vrbo(good(), TWO, rate=0.1, inner_steps=1, terms=2), draws_of(6)),
        ValueError,
        ("batch.full", "None", "expected the full data", "vrbo"),
    ),
    "no outer data for a linear system": Case(
        lambda: step(SOLVERS["aid_bio"](good(), OPTS), draws_of(3)._replace(outer=None)),
        ValueError,
        ("batch.outer", "None", "expected data of the outer loss"),
    ),
    "no outer data for a path": Case(
        lambda: step(solvers.itd_bio(good(), TWO), one_batch(outer=None)), ValueError, ("batch.outer", "None", "expected data")
    ),
    "no outer data for dense matrices": Case(
        lambda: step(SOLVERS["stable"](good(), OPTS), one_batch(outer=None)),
        ValueError,
        ("batch.outer", "None", "expected data"),
    ),
    "aux of another shape to start at": Case(
        lambda: go(solver=solvers.aid_bio(good(), TWO), vars=start()._replace(aux=jnp.ones(4))),
        ValueError,
        ("vars.aux", "float64[4]", "expected float64[2]"),
    ),
    **{
        f"{estimator.__name__} of a composite oracle": Case(
            lambda make=estimator, option=option: descend(aid(good(), cg(max_steps=2)), TWO, estimator=make(*option)),
            ValueError,
            ("estimator", "averages terms over the samples", "expected plain, ema or storm", "composite"),
        )
        for estimator, option in ((saga, ()), (sarah, (2,)), (page, (0.5,)))
    },
    # first order
    "gamma above 1 / (2 rho)": Case(
        lambda: solvers.meha(good(), OPTS, gamma=0.6, rho=1.0), ValueError, ("gamma", "0.6", "at most 1 / (2 rho) = 0.5")
    ),
    **{
        f"p of {p}": Case(lambda p=p: solvers.meha(good(), OPTS, gamma=1.0, p=p), ValueError, ("p:", f"{p}", "[0, 1/2)"))
        for p in (0.5, -0.1)
    },
    **{
        f"{name} of {value}": Case(
            lambda name=name, value=value: solvers.meha(good(), OPTS, **{"gamma": 1.0, name: value}),
            ValueError,
            (f"{name}:", f"{value}", "expected a positive number"),
        )
        for name, value in (("gamma", 0.0), ("gamma", float("nan")), ("c_low", -1.0), ("rho", 0.0))
    },
    **{
        f"multiplier of {value} for {make.__name__}": Case(
            lambda make=make, value=value: make(good(), TWO if make is solvers.f2sa_p else OPTS, multiplier=value),
            error,
            ("multiplier:", f"{value!r}", "expected a positive number"),
        )
        for make in (solvers.f2sa, solvers.f2ba, solvers.f2sa_p, solvers.pbgd)
        for value, error in ((0.0, ValueError), (float("inf"), ValueError), ("10", TypeError))
    },
    "nonsmooth without its prox": Case(
        lambda: solvers.meha(good(), OPTS, gamma=1.0, nonsmooth=nonsmooth.l1()),
        ValueError,
        ("opts.inner", "another proximal step", "expected proximal_sgd(rate, nonsmooth)"),
    ),
    "a prox without nonsmooth": Case(
        lambda: solvers.meha(good(), OPTS._replace(aux=proximal_sgd(0.1, nonsmooth.l1())), gamma=1.0),
        ValueError,
        ("opts.aux", "another proximal step", "expected no proximal_sgd without nonsmooth="),
    ),
    "the prox of another term": Case(
        lambda: solvers.meha(
            good(), Vars(*[proximal_sgd(0.1, nonsmooth.l1())] * 2, OPTS.outer), gamma=1.0, nonsmooth=nonsmooth.l1()
        ),
        ValueError,
        ("opts.inner", "another proximal step than that of nonsmooth"),
    ),
    "a function for a term": Case(
        lambda: moreau(good(), 1.0, gamma=1.0, nonsmooth=jnp.abs),  # pyright: ignore[reportArgumentType]
        TypeError,
        ("nonsmooth:", "expected a term of bilevel_jax.nonsmooth"),
    ),
    "a function for a term of proximal_sgd": Case(
        lambda: proximal_sgd(0.1, jnp.abs),  # pyright: ignore[reportArgumentType]
        TypeError,
        ("term:", "expected a term of bilevel_jax.nonsmooth"),
    ),
    **{
        f"a prox that changes the {what}": Case(
            partial(go, solver=proximal(change)), ValueError, ("operator:", given, "expected", "float64")
        )
        for what, change, given in (
            ("shape", lambda z: z[:1], "shape=(1,)"),
            ("dtype", lambda z: z.astype(jnp.float32), "float32"),
            ("structure", lambda z: {"u": z}, "'u'"),
        )
    },
    "theta of another shape": Case(
        lambda: go(solver=SOLVERS["meha"](good(), OPTS), vars=start()._replace(aux=jnp.ones(4))),
        ValueError,
        ("vars.aux", "float64[4]", "expected float64[2]", "vars.inner"),
    ),
    "one iterate for all nodes": Case(
        lambda: go(solver=SOLVERS["f2sa_p"](good(), OPTS), vars=start()._replace(aux=jnp.ones(2))),
        ValueError,
        ("vars.aux", "(2,)", "expected a leading axis of length 4", "one iterate a node"),
    ),
    **{
        f"order {order}": Case(
            lambda order=order: solvers.f2sa_p(good(), TWO, order=order), error, ("order:", f"{order}", "expected", says)
        )
        for order, error, says in (
            (3, ValueError, "1 or an even number"),
            (0, ValueError, "at least 1"),
            (2.0, TypeError, "an int"),
        )
    },
    "an optimiser of the nodes as aux": Case(
        lambda: solvers.f2sa_p(good(), OPTS), ValueError, ("opts.aux", "an optimiser", "expected None")
    ),
    "unknown control": Case(
        lambda: solvers.bome(good(), OPTS, control="norm"), ValueError, ("control", "'norm'", "'gradient' or 'value'")
    ),
    "a rate of the barrier of 0": Case(
        lambda: solvers.bome(good(), OPTS, eta=0.0), ValueError, ("eta", "0.0", "expected a positive number")
    ),
    **{
        f"{name} of 0": Case(
            lambda make=make, name=name: make(good(), OPTS, **{name: 0.0}),
            ValueError,
            (f"{name}:", "0.0", "expected a positive number"),
        )
        for make, name in ((solvers.bvfim, "strength"), (solvers.bvfim, "slack"), (solvers.bvfsm, "width"))
    },
    "a ball of radius 0": Case(
        lambda: solvers.hjfbio(good(), OPTS, radius=0.0), ValueError, ("radius", "0.0", "expected a positive number")
    ),
    "differences without a distance": Case(
        lambda: solvers.fdehbo(good(), OPTS, radius=1.0, scale=-1.0), ValueError, ("scale", "-1.0", "expected a positive")
    ),
    "eta of fdehbo above 1": Case(
        lambda: solvers.fdehbo(good(), OPTS, radius=1.0, eta=2.0), ValueError, ("eta", "2.0", "[0, 1]")
    ),
    "more than all the weight on f": Case(
        lambda: solvers.sl_bamm(good(), OPTS, weight=1.5), ValueError, ("weight", "1.5", "[0, 1]")
    ),
    "a negative weight of f on a path": Case(
        lambda: solvers.bda(good(), TWO, weight=-0.5), ValueError, ("weight", "-0.5", "[0, 1]")
    ),
    "an optimiser of a start that is not used": Case(
        lambda: go(solver=sweep(unroll(good(), OPTS, 2))),
        ValueError,
        ("opts.aux", "an optimiser", "expected None", "does not start from vars.aux"),
    ),
    "a learned start of a path cut short": Case(
        lambda: unroll(good(), OPTS, 2, start=lambda vars: vars.aux, truncate=1),
        ValueError,
        ("truncate", "1", "expected None", "because the start moves"),
    ),
    **{
        f"no outer data for {name}": Case(
            lambda name=name: step(
                SOLVERS[name](good(), OPTS), draws_of(SOLVERS[name](good(), OPTS).draws)._replace(outer=None)
            ),
            ValueError,
            (says,),
        )
        for name, says in {
            **dict.fromkeys(("meha", "f2sa", "f2ba", "pbgd", "hjfbio", "fdehbo"), "(is batch.outer or vars.aux None?)"),
            **dict.fromkeys(("bome", "bvfim", "bvfsm", "sl_bamm", "bda", "iaptt", "f2sa_p"), "batch.outer: got None, expected"),
        }.items()
    },
    # nonsmooth terms and projections
    "groups with a gap": Case(
        lambda: nonsmooth.group_lasso([0, 0, 2]), ValueError, ("groups", "[0, 2]", "expected 0, 1, ... without a gap")
    ),
    "groups from 1 on": Case(
        lambda: nonsmooth.sparse_group_lasso([1, 2]), ValueError, ("groups", "[1, 2]", "expected 0, 1, ... without a gap")
    ),
    **{
        f"groups of {what}": Case(lambda groups=groups: nonsmooth.group_lasso(groups), TypeError, ("groups", given, "ints"))
        for what, groups, given in (
            ("floats", [0.0, 1.0], "float64[2]"),
            ("nothing", [], "[0]"),
            ("a matrix", [[0, 1]], "int64[1, 2]"),
        )
    },
    "z that is not as long as its groups": Case(
        lambda: nonsmooth.group_lasso([0, 1]).prox(jnp.ones(3), 1.0, None), ValueError, ("z:", "(3,)", "expected (2,)")
    ),
    "low above high": Case(lambda: nonsmooth.box([0.0, 2.0], 1.0), ValueError, ("low", "[0.0, 2.0]", "at most high = 1.0")),
    "low is NaN": Case(lambda: nonsmooth.box(float("nan"), 1.0), ValueError, ("low", "nan", "at most high = 1.0")),
    "radius of a ball": Case(lambda: nonsmooth.ball(-1.0), ValueError, ("radius", "-1.0", "expected a positive number")),
    "total of a simplex": Case(lambda: nonsmooth.simplex(0.0), ValueError, ("total", "0.0", "expected a positive number")),
    # default step sizes
    "default steps of a solver without opts": Case(
        lambda: solvers.default_opts(solvers.accbio, 0.1, outer=0.1), ValueError, ("solver:", "accbio", "expected one of")
    ),
    "no default step of v": Case(
        lambda: solvers.default_opts(solvers.soba, 0.1, outer=0.1),
        ValueError,
        ("aux", "None", "expected a step size", "soba moves v"),
    ),
    "a default step of v that is not wanted": Case(
        lambda: solvers.default_opts(solvers.ttsa, 0.1, 0.1, 0.1),
        ValueError,
        ("aux", "0.1", "expected None", "ttsa does not move v"),
    ),
    "no default step of x": Case(
        lambda: solvers.default_opts(solvers.ttsa, 0.1), ValueError, ("outer", "None", "expected the step size of x")
    ),
    # estimators
    "theta above 1": Case(lambda: solvers.ma_soba(good(), OPTS, theta=1.5), ValueError, ("theta", "1.5", "[0, 1]")),
    "theta of ema below 0": Case(lambda: ema(-0.1), ValueError, ("theta", "-0.1", "[0, 1]")),
    "eta is NaN": Case(lambda: storm(float("nan")), ValueError, ("eta", "nan", "[0, 1]")),
    "theta is text": Case(lambda: ema("0.5"), TypeError, ("theta", "'0.5'", "[0, 1]")),  # pyright: ignore[reportArgumentType]
    "probability above 1": Case(lambda: page(2), ValueError, ("probability", "2", "[0, 1]")),
    # data
    "NaN in inner data": Case(
        lambda: go(data=data(inner=spoilt(np.nan))), ValueError, ("data.inner", "1 values that are NaN", "expected finite")
    ),
    "infinity in a leaf of outer data": Case(
        lambda: go(data=data(outer={"b": spoilt(np.inf)})), ValueError, ("data.outer['b']", "1 values", "expected finite")
    ),
    "data is a tuple": Case(lambda: go(data=tuple(data())), TypeError, ("data:", "tuple", "expected Levels")),
    "data is a dict": Case(lambda: go(data=data()._asdict()), TypeError, ("data:", "dict", "expected Levels")),
    "data is a tuple, full batch": Case(
        lambda: go(data=tuple(data()), sampler=samplers.full()), TypeError, ("data:", "tuple", "expected Levels")
    ),
    "rows that do not match": Case(
        lambda: go(data=data(inner={"a": jnp.ones((4, 2)), "y": jnp.ones(5)})),
        ValueError,
        ("data.inner", "4", "5", "expected one common number of samples"),
    ),
    "a scalar among the data": Case(
        lambda: go(data=data(inner={"a": jnp.ones((4, 2)), "s": jnp.ones(())})),
        ValueError,
        ("data.inner", "['s']", "expected one common number of samples"),
    ),
    "no samples": Case(
        lambda: go(data=data(inner=jnp.ones((0, 2)))), ValueError, ("data.inner", "no samples", "expected at least 1")
    ),
    "slot out of range in a stream": Case(
        lambda: next(samplers.from_stream([Batch(slot=Levels(Slot(np.int32(5), 5), None))], draws=1)),
        ValueError,
        ("batch.slot", "index 5", "expected one of 5 blocks"),
    ),
    "no data": Case(lambda: go(data=data(outer=())), ValueError, ("data.outer", "()", "expected a pytree of arrays")),
    "inner batch larger than the data": Case(
        lambda: go(sampler=samplers.uniform(11, outer_batch_size=2)),
        ValueError,
        ("batch_size", "11", "data.inner", "expected at most 10"),
    ),
    "outer batch larger than the data": Case(
        lambda: go(sampler=samplers.epochs(2, outer_batch_size=7)),
        ValueError,
        ("outer_batch_size", "7", "data.outer", "expected at most 6"),
    ),
    "unknown remainder": Case(
        lambda: samplers.uniform(2, remainder="pad"), ValueError, ("remainder", "'pad'", "expected 'mask' or 'drop'")
    ),
    "a stream of arrays": Case(
        lambda: next(samplers.from_stream([jnp.ones(2)], draws=1)),  # pyright: ignore[reportArgumentType]
        TypeError,
        ("batches", "item", "expected Batch"),
    ),
    "lists of numbers": Case(
        lambda: go(data=data(inner=([[1.0, 2.0]] * 4, [1.0] * 4))), TypeError, ("data.inner[0]: got list, expected an array",)
    ),
    "lists of numbers for a sampler": Case(
        lambda: samplers.uniform(2).batches(data(outer=[1.0] * 6), jax.random.key(0), 0, 1),
        TypeError,
        ("data.outer: got list, expected an array",),
    ),
    **{
        f"a legacy key for {make().__class__.__name__} number {number}": Case(
            lambda make=make: make().batches(data(), jax.random.PRNGKey(0), 0, 1),
            TypeError,
            ("key: got uint32[2], expected a typed key",),
        )
        for number, make in enumerate((samplers.full, partial(samplers.uniform, 2), partial(samplers.epochs, 2)))
    },
    # runs
    "steps not a multiple of every": Case(
        lambda: go(steps=10, every=3), ValueError, ("steps", "10", "expected a multiple of every = 3")
    ),
    "a legacy key": Case(lambda: go(key=jax.random.PRNGKey(0)), TypeError, ("key", "uint32[2]", "expected a typed key")),
    "a legacy key of NumPy": Case(
        lambda: go(key=np.zeros(2, np.uint32)), TypeError, ("key", "uint32[2]", "expected a typed key")
    ),
    "a seed for a key": Case(lambda: go(key=7), TypeError, ("key", "int", "expected a typed key")),
    "several keys for one": Case(
        lambda: go(key=jax.random.split(jax.random.key(0), 2)),
        (ValueError, TypeError),
        ("key", "(2,)"),  # type: ignore[arg-type]
    ),
    "a metric that is no scalar": Case(
        lambda: go(metrics=lambda vars, data: {"x": vars.outer}), ValueError, ("metrics", "'x'", "(3,)", "expected a scalar")
    ),
    "a metric called step": Case(
        lambda: go(metrics=lambda vars, data: {"step": vars.outer.sum()}),
        TypeError,
        ("metrics: got 'step'", "expected", "none of them called 'step'"),
    ),
}

COUNTS = {
    "inner_steps of f2sa": lambda n: solvers.f2sa(good(), OPTS, inner_steps=n),
    "inner_steps of f2sa_p": lambda n: solvers.f2sa_p(good(), TWO, inner_steps=n),
    "inner_steps of bda": lambda n: solvers.bda(good(), TWO, inner_steps=n),
    "inner_steps of iaptt": lambda n: solvers.iaptt(good(), OPTS, inner_steps=n),
    "steps": lambda n: go(steps=n),
    "every": lambda n: go(every=n),
    "batch_size": lambda n: samplers.uniform(n),
    "outer_batch_size": lambda n: samplers.epochs(2, outer_batch_size=n),
    "period": lambda n: solvers.srba(good(), OPTS, period=n),
    "inner_steps of aid_bio": lambda n: solvers.aid_bio(good(), TWO, inner_steps=n),
    "inner_steps of ba": lambda n: solvers.ba(good(), TWO, inner_steps=n),
    "inner_steps of stocbio": lambda n: solvers.stocbio(good(), TWO, rate=0.1, inner_steps=n),
    "inner_steps of vrbo": lambda n: solvers.vrbo(good(), TWO, rate=0.1, inner_steps=n),
    "inner_steps of itd_bio": lambda n: solvers.itd_bio(good(), TWO, inner_steps=n),
    "inner_steps of pzobo": lambda n: solvers.pzobo(good(), TWO, inner_steps=n),
    "inner_steps of accbio": lambda n: accelerated(inner_steps=n),
    "aux_steps of accbio_bg": lambda n: accelerated(solvers.accbio_bg, aux_steps=n),
    "aux_steps of amigo": lambda n: solvers.amigo(good(), TWO, aux_rate=0.1, aux_steps=n),
    "max_steps of hoag": lambda n: solvers.hoag(good(), TWO, max_steps=n),
    "terms of bsa": lambda n: solvers.bsa(good(), TWO, rate=0.1, terms=n),
    "terms of mrbo": lambda n: solvers.mrbo(good(), TWO, rate=0.1, terms=n),
    "period of vrbo": lambda n: solvers.vrbo(good(), TWO, rate=0.1, period=n),
    "directions of pzobo": lambda n: solvers.pzobo(good(), TWO, directions=n),
    "steps of a stage": lambda n: descend(implicit(good()), OPTS, steps=n),
    "steps of per_sweep": lambda n: per_sweep(0.1, n),
    "draws": lambda n: next(samplers.from_stream([], draws=n)),
    "every of a stream": lambda n: next(stream_run(solvers.soba(good(), OPTS), start(), [], every=n)),
    "inner_dim": lambda n: quadratic(jax.random.key(0), inner_dim=n),
    "outer_samples": lambda n: quadratic(jax.random.key(0), outer_samples=n),
}

#: given -> error and what is said of it.
NOT_COUNTS = {
    0: (ValueError, "got 0, expected at least 1"),
    -3: (ValueError, "got -3, expected at least 1"),
    2.0: (TypeError, "got 2.0 of type float, expected an int"),
    "4": (TypeError, "got '4' of type str, expected an int"),
    True: (TypeError, "got True of type bool, expected an int"),
}


def refused(call: Callable[[], Any], error: Any, parts: tuple[str, ...]) -> None:
    """The call fails while it is traced (`jax.eval_shape` compiles nothing), and says all the parts in order."""
    with pytest.raises(error) as info:
        jax.eval_shape(call)
    message, place = str(info.value), 0
    for part in parts:
        assert part in message[place:], f"{part!r} is not (in this order) in: {message}"
        place = message.index(part, place)


@pytest.mark.parametrize("name", CASES)
def test_bad_input_is_refused(name):
    case = CASES[name]
    refused(case.call, case.error, case.parts)


@pytest.mark.parametrize("given", NOT_COUNTS, ids=repr)
@pytest.mark.parametrize("name", COUNTS)
def test_counts_are_positive_ints(name, given):
    error, says = NOT_COUNTS[given]
    refused(partial(COUNTS[name], given), error, (f"{name.split(' of ')[0]}: {says}",))


def broken(vars: Vars, data: Levels) -> Any:
    return {"product": vars.inner @ vars.outer}


#: What fails in a user's function -> the note on it.
NOTED = {
    "shapes of a loss": (
        lambda: go(with_loss(inner=lambda z, x, a: a @ x)),
        "while evaluating problem.inner(z: float64[2], x: float64[3], data: float64[2, 2])",
    ),
    "arguments of a loss": (
        lambda: go(with_loss(outer=lambda z, x: z.sum()), data=data(outer={"b": jnp.ones((6, 2)), "y": jnp.ones(6)})),
        "while evaluating problem.outer(z: float64[2], x: float64[3], data: {'b': float64[2, 2], 'y': float64[2]})",
    ),
    "a loss of a hypergradient": (
        lambda: hypergradient(good(), hypergrad.implicit())(jnp.ones(4), jnp.ones(3), Batch(*data())),
        "while evaluating problem.outer(z: float64[4], x: float64[3], data: float64[6, 2])",
    ),
    "metrics": (
        lambda: go(metrics=broken),
        "while evaluating metrics(vars: Vars(inner=float64[2], aux=float64[2], outer=float64[3]), "
        "data: Levels(inner=float64[10, 2], outer=float64[6, 2]))",
    ),
    "metrics of a stream": (
        lambda: next(stream_run(solvers.soba(good(), OPTS), start(), [one_batch()], metrics=partial(broken, data=data()))),
        "while evaluating metrics(vars: Vars(inner=float64[2], aux=float64[2], outer=float64[3]))",
    ),
}


@pytest.mark.parametrize("name", NOTED)
def test_errors_of_losses_and_metrics_say_what_they_were_called_with(name):
    """Once, on the error of JAX or Python itself, so that the place in the user's code stays."""
    call, note = NOTED[name]
    with pytest.raises(TypeError) as info:
        jax.eval_shape(lambda: [call(), None][1])
    assert info.value.__notes__.count(note) == 1
    assert "while evaluating" not in str(info.value)


def test_messages_stay_short():
    """Two of the leaves that differ, and none of the numbers."""
    leaves = [jnp.ones(4)] * 20 + [jnp.ones(5)] * 20
    with pytest.raises(ValueError, match=r"leading axes \{'data.inner\[0\]': 4, 'data.inner\[20\]': 5\}, expected") as info:
        go(data=data(inner=leaves))
    many = {f"layer {i}": jnp.ones(3) for i in range(200)}
    with pytest.raises(AttributeError) as noted:
        go(vars=start()._replace(outer=many))
    assert max(len(str(info.value)), len(noted.value.__notes__[0])) < 500


#: The variables that a solver moves.
MOVED = dict.fromkeys((*SINGLE_LOOP, *FIRST_ORDER), Vars._fields)
MOVED |= dict.fromkeys((*NESTED_LOOPS, "f2sa_p", "bda"), ("inner", "outer"))


@pytest.mark.parametrize(("name", "missing"), [(name, missing) for name in MOVED for missing in MOVED[name]])
def test_every_solver_wants_an_optimiser_of_what_it_moves(name, missing):
    call = partial(SOLVERS[name], good(), OPTS._replace(**{missing: None}))
    refused(call, ValueError, (f"opts.{missing}", "None", "expected an optax transformation"))


def single(make: Any, multiplier: Any, dtype: Any) -> Any:
    """One update of a solver in a precision, from its multiplier on."""
    vars = jax.tree.map(lambda leaf: leaf.astype(dtype), start())
    return step(make(multiplier), jax.tree.map(lambda leaf: leaf.astype(dtype), draws_of(make(multiplier).draws)), vars)


MULTIPLIED = {
    "meha": lambda c: solvers.meha(good(), OPTS, gamma=1.0, c_low=c, p=0.0),
    "f2sa": lambda c: solvers.f2sa(good(), OPTS, multiplier=lambda k: c * (k + 1.0) ** 0.0, inner_steps=1),
    "f2ba": lambda c: solvers.f2ba(good(), OPTS, multiplier=c, inner_steps=1),
    "f2sa_p": lambda c: solvers.f2sa_p(good(), TWO, multiplier=c, inner_steps=1),
    "pbgd": lambda c: solvers.pbgd(good(), OPTS, multiplier=c, inner_steps=1),
}


@thinned("name", MULTIPLIED, "meha", "f2sa_p")
def test_a_multiplier_that_leaves_no_digits_warns(name):
    """1e5 times a difference in float32, eps 1.2e-7, has 1.9 digits; in float64 it has ten; 100 is fine in both."""
    call = partial(single, MULTIPLIED[name])
    with pytest.warns(UserWarning, match=r"multiplier.*: got 100000, which leaves about 1\.9 decimal digits.*in float32"):
        jax.eval_shape(lambda: call(1e5, jnp.float32))
    jax.eval_shape(lambda: [call(*case) for case in ((1e5, jnp.float64), (100.0, jnp.float32))])  # warnings are errors here


def test_the_good_call_is_good():
    """So that the cases fail for what they change."""
    carry, history = jax.eval_shape(go)
    assert history["step"].shape == (2,)
    assert carry.state.vars.inner.shape == (2,)
    for solver in SOLVERS.values():
        jax.eval_shape(partial(go, solver=guard(solver(good(), OPTS)), sampler=samplers.uniform(3)))


def test_positive_ints_of_numpy_are_ints():
    assert samplers.uniform(np.int64(2)).whole(data()).inner.shape == (10, 2)  # pyright: ignore[reportArgumentType]
    assert jax.eval_shape(partial(go, steps=np.int32(4), every=np.int64(2)))[1]["step"].shape == (3,)


def test_nan_is_found_in_concrete_data_only():
    """As an argument of a compiled program the data are not known: the run then reports it (see test_guard)."""
    bad = data(inner=spoilt(np.nan))
    with pytest.raises(ValueError, match=r"data\.inner"):
        jax.eval_shape(lambda: begin(solvers.soba(good(), OPTS), samplers.uniform(2), start(), bad, jax.random.key(0)))
    assert jax.eval_shape(lambda d: go(data=d), bad)[1]["step"].shape == (2,)


def test_what_is_no_mistake_passes():
    """Step sizes of 0 or traced, a start that is traced, a function from the sweep to a linear solver, an own method."""
    solvers.default_opts(solvers.soba, 0, np.float32(0.1), jnp.float32(0.1))
    jax.eval_shape(lambda rate: step(solvers.soba(good(), solvers.default_opts(solvers.soba, *[rate] * 3)), one_batch()), -1.0)
    bad = start()._replace(inner=jnp.full(2, jnp.nan))
    assert jax.eval_shape(lambda vars: go(vars=vars), bad)[1]["step"].shape == (2,)

    def falling(step: jax.Array) -> linear_solve.LinearSolver:
        return cg(max_steps=2, rtol=0.0, atol=1 / (step + 1.0))

    assert solve_aux(good(), falling).draws == 1
    own = hypergradient(good(), lambda losses, z, x, guess, key: losses.f(z, x))  # pyright: ignore[reportArgumentType]
    assert jax.eval_shape(lambda: own(jnp.ones(2), jnp.ones(3), Batch(*data()))).shape == ()  # pyright: ignore


def test_integer_data_are_welcome():
    labels = Levels(*({"a": jnp.ones((n, 2)), "n": jnp.arange(n, dtype=jnp.int32)} for n in ROWS))
    problem = Problem(*(lambda z, x, d, loss=loss: loss(z, x, d["a"]) * d["n"].astype(jnp.float64) for loss in good()))
    assert jax.eval_shape(partial(go, problem, data=labels))[1]["step"].shape == (2,)


def test_inner_only_stage_wants_neither_outer_data_nor_slots_of_them():
    solver = sweep(descend(implicit(good()), Vars(inner=OPTS.inner), estimator=saga()))
    batch = samplers.uniform(2).batches(data(), jax.random.key(0), 0, 1)
    bare = batch._replace(outer=None, slot=Levels(batch.slot.inner if batch.slot else None, None))
    shapes = jax.eval_shape(lambda: step(solver, bare))
    assert shapes.vars.inner.shape == (2,)
    terms = implicit(good()).terms(start(), Batch(inner=jnp.ones((2, 2))), ZERO)
    assert terms.outer == Vars()
