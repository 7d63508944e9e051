"""Numbers that may be traced are differentiated, as central differences show, or refused by name."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from bilevel_jax import Batch, Levels, Problem, Vars, guard, hypergrad, projections, solvers
from bilevel_jax.distributed import adbo, d_soba, fednest
from bilevel_jax.distributed.rates import Rates
from bilevel_jax.hypergrad import hypergradient
from bilevel_jax.linear_solve import cg, neumann, richardson
from bilevel_jax.moreau import envelope, residual
from bilevel_jax.nonsmooth import ball, box, group_lasso, l1, simplex, sparse_group_lasso
from bilevel_jax.samplers import full
from bilevel_jax.stages import solve_inner
from bilevel_jax.sweep import sweep
from tests.tables import STEPS, tiny, tiny_sampler

POINT = np.array([1.5, -0.7, 0.4, 2.0])
#: name -> a function of one number that returns an array, and where it is differentiated.
FUNCTIONS: dict[str, tuple[Callable[[Any], Any], float]] = {
    "low of box": (lambda t: box(t, 3.0)(POINT), 0.1),
    "high of box": (lambda t: box(-3.0, t)(POINT), 0.7),
    "radius of ball": (lambda t: ball(t)(POINT), 0.7),
    "total of simplex": (lambda t: simplex(t)(POINT), 0.7),
    "weights of l1": (lambda t: l1(t).prox(POINT, 0.5, None) ** 2 + l1(t).value(POINT, None), 0.7),
    "step of l1": (lambda t: l1(0.5).prox(POINT, t, None) ** 2, 0.7),
    "weights of group_lasso": (lambda t: group_lasso([0, 0, 1, 1], t).prox(POINT, 0.5, None), 0.7),
    "group_weights of sparse_group_lasso": (lambda t: sparse_group_lasso([0, 0, 1, 1], t, 0.1).prox(POINT, 0.5, None), 0.7),
    "l1_weights of sparse_group_lasso": (lambda t: sparse_group_lasso([0, 0, 1, 1], 0.1, t).prox(POINT, 0.5, None), 0.7),
    "step_size of prox": (lambda t: moved(projections.prox(l1(0.5), t)), 0.7),
    "rate of proximal_sgd": (lambda t: moved(projections.proximal_sgd(t, l1(0.5))), 0.2),
}


def moved(opt: Any) -> Any:
    point = jnp.asarray(POINT)
    return opt.update(0.1 * point**2, opt.init(point), point)[0]


def batch() -> Batch:
    return Batch(*tiny().data, key=jax.random.key(2))


def by_method(method: Any, z: Any = 1.0) -> Any:
    """The gradient of `tiny` by a method of `bilevel_jax.hypergrad`, at or from z."""
    at, x = jnp.asarray(z, jnp.float64), tiny().start.outer
    return hypergradient(tiny().problem, method)(at, x, batch(), key=jax.random.key(1))[1]


FUNCTIONS |= {
    "scale of t1_t2": (lambda t: by_method(hypergrad.t1_t2(t)), 0.7),
    "radius of zeroth_order": (lambda t: by_method(hypergrad.zeroth_order(optax.rmsprop(0.1), 3, radius=t)), 0.7),
    "start of iterative": (lambda t: by_method(hypergrad.iterative(optax.sgd(0.1), 3), t), 0.7),
    "start of implicit": (lambda t: by_method(hypergrad.implicit(), t), 0.7),
    "rate of iterative": (lambda t: by_method(hypergrad.iterative(optax.sgd(t), 3)), 0.3),
    "damping of implicit": (lambda t: by_method(hypergrad.implicit(cg(max_steps=5, damping=t))), 0.3),
}


def after(make: Callable[[Problem], Any], aux: bool = True, updates: int = 2) -> Any:
    """The variables of a solver after some updates on `tiny`."""
    solver = make(tiny().problem)
    start = tiny().start if aux else tiny().start._replace(aux=None)
    state = None
    for t in range(updates):
        batches = tiny_sampler().batches(tiny().data, jax.random.key(3), t * solver.draws, solver.draws)
        state = solver.init(start, batches) if state is None else state
        state = solver.update(state, batches)
    return jnp.concatenate([leaf.ravel() for leaf in jax.tree.leaves(state.vars)])


OPTS = Vars(*map(optax.sgd, STEPS))
TWO = OPTS._replace(aux=None)


def solver(make: Callable[..., Any], argument: str, at: float, opts: Vars = OPTS, **others: Any) -> tuple[Any, float]:
    """A row: two updates of a solver as a function of one of its numbers."""
    return lambda t: after(lambda problem: make(problem, opts, **others, **{argument: t}), opts.aux is not None), at


LOOPS = {"inner_steps": 2, "terms": 3}
SOLVERS: dict[str, tuple[Callable[[Any], Any], float]] = {
    "rate of soba": (lambda t: after(lambda p: solvers.soba(p, solvers.default_opts(solvers.soba, t, 0.2, 0.1))), 0.2),
    "theta of ma_soba": solver(solvers.ma_soba, "theta", 0.3),
    "eta of storm_soba": solver(solvers.storm_soba, "eta", 0.3),
    "eta of fsla": solver(solvers.fsla, "eta", 0.3),
    "weight of sl_bamm": solver(solvers.sl_bamm, "weight", 0.3),
    "rate of bsa": solver(solvers.bsa, "rate", 0.3, TWO, **LOOPS),
    "rate of ttsa": solver(solvers.ttsa, "rate", 0.3, TWO, terms=3),
    "rate of stocbio": solver(solvers.stocbio, "rate", 0.3, TWO, **LOOPS),
    "aux_rate of amigo": solver(solvers.amigo, "aux_rate", 0.3, TWO, inner_steps=2, aux_steps=2),
    "rate of mrbo": solver(solvers.mrbo, "rate", 0.3, TWO, terms=3),
    "eta of sustain": solver(solvers.sustain, "eta", 0.3, TWO, rate=0.3, terms=3),
    "rate of vrbo": solver(solvers.vrbo, "rate", 0.3, TWO, period=2, **LOOPS),
    "tau of stable": solver(solvers.stable, "tau", 0.3, TWO, strong_convexity=0.2),
    "strong_convexity of stable": solver(solvers.stable, "strong_convexity", 2.0, TWO),
    "radius of pzobo": solver(solvers.pzobo, "radius", 0.3, Vars(optax.rmsprop(0.1), None, optax.sgd(0.1)), inner_steps=2),
    "weight of bda": solver(solvers.bda, "weight", 0.3, TWO, inner_steps=2),
    "gamma of meha": solver(solvers.meha, "gamma", 0.7),
    "c_low of meha": solver(solvers.meha, "c_low", 2.0, gamma=0.7),
    "p of meha": solver(solvers.meha, "p", 0.2, gamma=0.7),
    "multiplier of f2sa": solver(solvers.f2sa, "multiplier", 8.0, inner_steps=2),
    "multiplier of f2ba": solver(solvers.f2ba, "multiplier", 8.0, inner_steps=2),
    "multiplier of f2sa_p": solver(solvers.f2sa_p, "multiplier", 8.0, TWO, inner_steps=2),
    "eta of bome": solver(solvers.bome, "eta", 0.9, inner_steps=2),
    "multiplier of pbgd": solver(solvers.pbgd, "multiplier", 8.0, inner_steps=2),
    "regularisation of bvfim": solver(solvers.bvfim, "regularisation", 0.3, inner_steps=2),
    "strength of bvfim": solver(solvers.bvfim, "strength", 0.3, inner_steps=2),
    "slack of bvfim": solver(solvers.bvfim, "slack", 3.0, inner_steps=2),
    "width of bvfsm": solver(solvers.bvfsm, "width", 0.3, inner_steps=2, regularisation=0.5),
    "radius of hjfbio": solver(solvers.hjfbio, "radius", 0.4),
    "eta of fdehbo": solver(solvers.fdehbo, "eta", 0.3, radius=5.0),
}


def of_tasks(make: Callable[..., Any], rate: Any = 0.1, **numbers: Any) -> Any:
    """An update on two tasks."""
    loss = lambda z, x, c: jnp.sum(jnp.cosh(z - c))
    learner = make(Problem(loss, loss), Vars(inner=optax.sgd(rate), outer=optax.sgd(0.1)), inner_steps=2, **numbers)
    points = jnp.array([[[1.0], [3.0]]])
    draw = Batch(inner=points, outer=points)
    return learner.update(learner.init(Vars(outer=jnp.zeros(1)), draw), draw).vars.outer


def federated(**numbers: Any) -> Any:
    g = lambda z, x, a: jnp.sum(jnp.cosh((z - x)[None] - a), axis=-1)
    f = lambda z, x, b: jnp.sum((z[None] - b) ** 2, axis=-1) + 0.5 * jnp.sum(x**2)
    settings = {"inner_rate": 0.1, "outer_rate": 0.1, "neumann_rate": 0.3} | numbers
    server = fednest(Problem(g, f), **settings, local_steps=2, neumann_terms=3)
    data = Levels(jnp.arange(4.0).reshape(2, 2, 1), jnp.ones((2, 2, 1)))
    batches = full().batches(data, jax.random.key(5), 0, server.draws)
    vars = server.update(server.init(Vars(jnp.zeros(1), None, jnp.ones(1)), batches), batches).vars
    return jnp.concatenate([vars.inner, vars.outer])


def decentralised(t: Any) -> Any:
    agents = jnp.array([[1 - t, t], [t, 1 - t]])
    method = d_soba(tiny().problem, OPTS, agents, momentum=0.3)
    data = jax.tree.map(lambda leaf: jnp.stack([leaf[:3], leaf[3:6]]), tiny().data)
    batches = Batch(*jax.tree.map(lambda leaf: leaf[None], data), key=jax.random.split(jax.random.key(0), (1, 2)))
    state = method.init(tiny().start, batches)
    for _ in range(2):
        state = method.update(state, batches)
    return state.vars.outer


def asynchronous(**numbers: Any) -> Any:
    """Two iterations of the master, and a cut between them."""
    toy = Problem(lambda z, x, b: jnp.sum((z - x - b) ** 2) / 2, lambda z, x, a: jnp.sum((z - a) ** 2) / 2)
    settings = {"penalty": 0.8, "cut_tolerance": 1e-3, "cut_damping": 0.1, "consensus_damping": 0.1} | numbers
    rates = settings.pop("rates", Rates(0.1, 0.1, 0.1, 0.1, 0.5, 0.1))
    method = adbo.adbo(toy, Vars(jnp.zeros(1), None, jnp.ones(1)), rates, n_workers=2, max_cuts=2, **settings)
    data = Batch(inner=jnp.array([[1.0], [2.0]]), outer=jnp.array([[0.5], [1.5]]))
    master = method.init(Vars(inner=jnp.array([[0.3], [0.9]])))
    master = method.cut(master, *adbo.rounds(method, master, data))
    for _ in range(2):
        master = method.update(master, jnp.array([True, True]))
    return jnp.concatenate([master.consensus_outer, master.consensus_inner, master.cuts.multiplier])


def of_envelope(**numbers: Any) -> Any:
    at = tiny().start
    settings = {"gamma": 0.7, "rate": 0.3} | numbers
    return envelope(tiny().problem, at.inner, at.outer, batch(), **settings, max_steps=5).value


SOLVERS |= {
    "strength of imaml": (lambda t: of_tasks(solvers.imaml, strength=t), 0.7),
    "inner rate of imaml": (lambda t: of_tasks(solvers.imaml, t, strength=0.7), 0.1),
    "inner rate of reptile": (lambda t: of_tasks(solvers.reptile, t), 0.1),
    "inner rate of maml": (lambda t: of_tasks(solvers.maml, t), 0.1),
    "inner_rate of fednest": (lambda t: federated(inner_rate=t), 0.1),
    "outer_rate of fednest": (lambda t: federated(outer_rate=t), 0.1),
    "neumann_rate of fednest": (lambda t: federated(neumann_rate=t), 0.3),
    "mixing of gossip": (decentralised, 0.3),
    "penalty of adbo": (lambda t: asynchronous(penalty=t), 0.8),
    "cut_tolerance of adbo": (lambda t: asynchronous(cut_tolerance=t), 1e-2),
    "cut_damping of adbo": (lambda t: asynchronous(cut_damping=t), 0.5),
    "consensus_outer of rates": (lambda t: asynchronous(rates=Rates(0.1, 0.1, t, 0.1, 0.5, 0.1)), 0.2),
    "gamma of envelope": (lambda t: of_envelope(gamma=t), 0.7),
    "rate of envelope": (lambda t: of_envelope(rate=t), 0.3),
    "multiplier of residual": (
        lambda t: residual(tiny().problem, tiny().start.inner, tiny().start.outer, batch(), multiplier=t, gamma=0.7, rate=0.3),
        2.0,
    ),
}


@pytest.fixture(autouse=True)
def cached():
    """The shared problem is made outside of any trace."""
    tiny()


#: Of each kind one: a moving average, a linear solver, a schedule in a table of weights, a first-order oracle, a federation.
QUICK = {"theta of ma_soba", "rate of bsa", "gamma of meha", "tau of stable"}


def cases(table: dict[str, Any], quick: set[str]) -> Any:
    return pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.more] * (n not in quick)) for n in table])


def check_derivative(function: Callable[[Any], Any], at: float) -> None:
    """The derivative is not 0, and that of central differences."""
    h = 1e-5 * at

    @jax.jit
    def both(t: Any) -> Any:
        values = jax.lax.map(function, t + jnp.array([-h, h]))
        return jax.jvp(function, (t,), (jnp.ones(()),))[1], (values[1] - values[0]) / (2 * h)

    slope, difference = both(jnp.asarray(at, jnp.float64))
    assert np.abs(difference).max() > 1e-6
    np.testing.assert_allclose(slope, difference, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_numbers_of_projections_terms_and_methods(name):
    check_derivative(*FUNCTIONS[name])


@cases(SOLVERS, QUICK)
def test_numbers_of_solvers(name):
    check_derivative(*SOLVERS[name])


def by_inner(**numbers: Any) -> Any:
    stage = solve_inner(tiny().problem, optax.sgd(0.1), **({"max_steps": 3} | numbers))
    return after(lambda problem: sweep(stage))


#: argument -> functions of one number that only decides something: which steps are taken, what a code says.
REFUSED = {
    "probability": [solver(solvers.spaba, "probability", 0.3)[0]],
    "tolerance": [
        solver(solvers.hoag, "tolerance", 0.1, TWO, max_steps=3)[0],
        lambda t: by_inner(tolerance=t),
        lambda t: by_inner(tolerance=lambda step: t / (step + 1.0)),
        lambda t: by_method(hypergrad.implicit(tolerance=t)),
    ],
    "max_steps": [lambda t: by_inner(max_steps=lambda step: t + 1)],
    "limit": [lambda t: after(lambda p: guard(solvers.soba(p, OPTS), limit=100 * t))],
    "rate": [
        solver(lambda p, o, r: solvers.aid_bio(p, o, linear_solver=richardson(steps=2, rate=r)), "r", 0.3, TWO)[0],
        lambda t: by_method(hypergrad.implicit(neumann(terms=3, rate=t))),
    ],
}


@pytest.mark.parametrize(("argument", "function"), [(name, f) for name, fs in REFUSED.items() for f in fs])
def test_numbers_that_only_decide_are_refused_where_they_are_differentiated(argument, function):
    with pytest.raises(TypeError, match=f"{argument}: got a number that is differentiated, expected a constant"):
        jax.eval_shape(lambda t: jax.jvp(function, (t,), (jnp.ones(()),)), jnp.asarray(0.3, jnp.float64))
    jax.eval_shape(function, jnp.asarray(0.3, jnp.float64))


@pytest.mark.parametrize("make", [solvers.accbio, solvers.accbio_bg])
def test_constants_from_which_steps_are_computed_are_python_numbers(make):
    def build(t: Any) -> Any:
        constants = {"smoothness": 2.0, "strong_convexity": 0.2, "outer_smoothness": 3.0, "outer_strong_convexity": t}
        return after(lambda problem: make(problem, **constants, inner_steps=2, aux_steps=2))

    with pytest.raises(TypeError, match=r"outer_strong_convexity: got .*, expected a Python number"):
        jax.eval_shape(build, jnp.asarray(0.5))
