"""The methods that `experiments.nonconvex` compares, the settings that it tries, and runs of many settings at once."""

import time
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from sklearn.model_selection import ParameterGrid

from bilevel_jax import Solver, Vars, descend, linear_solve, samplers, solvers, spent, sweep
from bilevel_jax.sweep import same
from bilevel_jax.types import Array
from bilevel_jax.value_oracles import moreau
from experiments.nonconvex_problems import NOTHING, Case

#: Numbers of a method: step sizes and parameters.
Setting = dict[str, Any]
#: Inner steps of an update of the double loops and of the unrolled methods.
INNER_STEPS = 10


def meha(
    case: Case, *, beta: Any, eta: Any, alpha: Any, gamma: Any, c: Any, p: Any, theta_steps: int = 1, z_first: bool = False
) -> Solver:
    """`bilevel_jax.solvers.meha`, and what the paper does not do.

    ``theta_steps`` steps of theta an update; z before x; a negative p, with which the weight 1/c_k of f grows.
    """
    oracle = moreau(case.problem, lambda k: c * (k + 1.0) ** p, gamma=gamma, nonsmooth=case.term)
    theta = descend(oracle, Vars(aux=case.inner(eta)), steps=theta_steps, fresh=False)
    x, z = descend(oracle, Vars(outer=case.outer(alpha))), descend(oracle, Vars(inner=case.inner(beta)))
    return sweep(theta, *((z, x) if z_first else (x, z)), aux=same)


def _three(case: Case, inner: Any, aux: Any, outer: Any) -> Vars:
    return Vars(case.inner(inner), case.inner(aux), case.outer(outer))


def f2sa(case: Case, *, inner: Any, outer: Any, c: Any, p: Any) -> Solver:
    """With lam = c (k + 1)^p."""
    opts = _three(case, inner, inner, outer)
    return solvers.f2sa(case.problem, opts, multiplier=lambda k: c * (k + 1.0) ** p, inner_steps=INNER_STEPS)


def f2sa_2(case: Case, *, inner: Any, outer: Any, c: Any) -> Solver:
    """With a fixed lam = c: central differences."""
    opts = _three(case, inner, None, outer)._replace(aux=None)
    return solvers.f2sa_p(case.problem, opts, multiplier=c, inner_steps=INNER_STEPS)


def pbgd(case: Case, *, inner: Any, aux: Any, outer: Any, c: Any, p: Any) -> Solver:
    """With lam = c (k + 1)^p."""
    opts = _three(case, inner, aux, outer)
    return solvers.pbgd(case.problem, opts, multiplier=lambda k: c * (k + 1.0) ** p, inner_steps=INNER_STEPS)


def bome(case: Case, *, inner: Any, outer: Any, eta: Any) -> Solver:
    """With one step size for y and x, as in the paper."""
    return solvers.bome(case.problem, _three(case, inner, outer, outer), eta=eta, inner_steps=INNER_STEPS)


def bda(case: Case, *, inner: Any, outer: Any, weight: Any, fall: Any) -> Solver:
    """With mu = weight (k + 1)^-fall."""
    opts = _three(case, inner, None, outer)._replace(aux=None)
    return solvers.bda(case.problem, opts, weight=lambda k: weight * (k + 1.0) ** -fall, inner_steps=INNER_STEPS)


def iaptt(case: Case, *, inner: Any, aux: Any, outer: Any) -> Solver:
    """``aux`` is the step size of the start of the path."""
    return solvers.iaptt(case.problem, _three(case, inner, aux, outer), inner_steps=INNER_STEPS)


def bvfim(
    case: Case,
    *,
    inner: Any,
    aux: Any,
    outer: Any,
    strength: Any,
    fall: Any,
    ratio: Any,
    inner_steps: int = INNER_STEPS,
) -> Solver:
    """With mu = ratio^-k, tau = strength (k + 1)^-1/4, sigma = (k + 1)^-fall: all fall to 0, and sigma faster than tau.

    If tau and sigma fall like 1.01^-k, as in the paper, the barrier keeps its slope at first, and then grows stiffer than any
    step size allows.
    """
    opts = _three(case, inner, aux, outer)
    return solvers.bvfim(
        case.problem,
        opts,
        inner_steps=inner_steps,
        regularisation=lambda k: jnp.asarray(ratio) ** -k,
        strength=lambda k: strength * (k + 1.0) ** -0.25,
        slack=lambda k: (k + 1.0) ** -fall,
    )


def bvfsm(
    case: Case, *, inner: Any, aux: Any, outer: Any, width: Any, fall: Any, ratio: Any, inner_steps: int = INNER_STEPS
) -> Solver:
    """With mu = ratio^-k, sigma = width (k + 1)^-fall."""
    opts = _three(case, inner, aux, outer)
    return solvers.bvfsm(
        case.problem,
        opts,
        inner_steps=inner_steps,
        regularisation=lambda k: jnp.asarray(ratio) ** -k,
        width=lambda k: width * (k + 1.0) ** -fall,
    )


def sl_bamm(case: Case, *, inner: Any, aux: Any, outer: Any, weight: Any, fall: Any) -> Solver:
    """With mu = weight (k + 1)^-fall; v is not constrained."""
    opts = Vars(case.inner(inner), case._replace(projections=(None, None)).inner(aux), case.outer(outer))
    return solvers.sl_bamm(case.problem, opts, weight=lambda k: weight * (k + 1.0) ** -fall)


def aid_cg(case: Case, *, inner: Any, outer: Any) -> Solver:
    """With ten steps of conjugate gradients."""
    opts = _three(case, inner, None, outer)._replace(aux=None)
    linear_solver = linear_solve.cg(max_steps=INNER_STEPS)
    return solvers.aid_bio(case.problem, opts, inner_steps=INNER_STEPS, linear_solver=linear_solver)


def itd(case: Case, *, inner: Any, outer: Any) -> Solver:
    """Reverse differentiation through the inner steps (RHG)."""
    opts = _three(case, inner, None, outer)._replace(aux=None)
    return solvers.itd_bio(case.problem, opts, inner_steps=INNER_STEPS, checkpoint="none")


class Method(NamedTuple):
    """A constructor, and what is tried: the product of the values."""

    make: Callable[..., Solver]
    grid: dict[str, tuple[float, ...]]
    answer: str = "inner"  # the field of ``Vars`` that holds the z to be judged

    @property
    def settings(self) -> list[Setting]:
        """All of them."""
        return list(ParameterGrid(self.grid))


INNER, OUTER = (0.1, 0.3, 1.0), (0.03, 0.1, 0.3, 1.0)
_PENALTY = {"c": (1.0, 3.0, 10.0, 30.0), "p": (0.0, 0.49)}
_WEIGHT = {"weight": (0.1, 0.5, 0.9), "fall": (0.0, 0.25, 1.0)}
_VALUE = {"inner": (0.3,), "ratio": (1.01, 1.03, 1.1)}
_FAR = _VALUE | {"aux": (0.1, 0.3), "outer": (0.3, 1.0), "fall": (0.25, 0.49, 0.98)}
_NEAR = _VALUE | {"aux": (0.01, 0.03), "outer": (0.1, 0.3), "fall": (0.75, 0.98)}
_COMMON = {
    "BOME": Method(bome, {"inner": INNER, "outer": (0.01, *OUTER), "eta": (0.1, 0.5, 0.9)}, "aux"),
    "F2SA": Method(f2sa, {"inner": INNER, "outer": OUTER} | _PENALTY, "aux"),
    "F2SA-2": Method(f2sa_2, {"inner": INNER, "outer": OUTER, "c": _PENALTY["c"]}),
    "PBGD": Method(
        pbgd,
        {"inner": (1.0,), "aux": (0.1, 0.3), "outer": (0.003, 0.01, *OUTER), "c": (1.0, 10.0, 30.0, 100.0), "p": (0.0, 0.49)},
        "aux",
    ),
    "BDA": Method(bda, {"inner": INNER, "outer": OUTER} | _WEIGHT),
    "IAPTT": Method(iaptt, {"inner": INNER, "aux": OUTER, "outer": OUTER}),
    "sl-BAMM": Method(sl_bamm, {"inner": (0.1, 0.3), "aux": (0.1, 0.3), "outer": OUTER[:3]} | _WEIGHT),
    "AID-CG": Method(aid_cg, {"inner": INNER, "outer": OUTER}),
    "ITD": Method(itd, {"inner": INNER, "outer": OUTER}),
}
#: By problem.  On merely_convex the path of BVFIM and BVFSM must be long: y starts at the inner solution, far from z2 = x.
METHODS: dict[str, dict[str, Method]] = {
    "merely_convex": {
        "MEHA": Method(
            meha,
            {
                "alpha": (0.02, 0.1, 0.5),
                "beta": (0.1, 0.3),
                "eta": (0.1, 0.5),
                "gamma": (1.0, 5.0, 20.0),
                "c": (0.1, 0.5, 2.0),
                "p": (0.25, 0.49),
            },
        ),
        **_COMMON,
        "BVFIM": Method(partial(bvfim, inner_steps=50), _FAR | {"strength": (0.1, 1.0)}, "aux"),
        "BVFSM": Method(partial(bvfsm, inner_steps=50), _FAR | {"width": (1.0, 10.0)}, "aux"),
    },
    "sine": {
        "MEHA": Method(
            meha,
            {
                "alpha": (0.1, 0.3, 0.5, 1.0),
                "beta": (0.1, 0.3),
                "eta": (0.1, 0.3),
                "gamma": (0.45,),
                "c": (0.25, 0.5, 1.0, 2.0, 5.0),
                "p": (0.25, 0.4, 0.49),
            },
        ),
        **_COMMON,
        "BVFIM": Method(bvfim, _NEAR | {"strength": (0.3, 1.0)}, "aux"),
        "BVFSM": Method(bvfsm, _NEAR | {"width": (0.003, 0.01, 0.1)}, "aux"),
    },
}
#: Settings of MEHA that solve the problems, with a gamma that theory allows.
KNOWN: dict[str, Setting] = {
    "merely_convex": {"alpha": 0.5, "beta": 0.3, "eta": 0.5, "gamma": 1.0, "c": 0.1, "p": 0.49},
    "sine": {"alpha": 1.0, "beta": 0.3, "eta": 0.3, "gamma": 0.45, "c": 5.0, "p": 0.49},
    "lasso": {"alpha": 0.2, "beta": 0.1, "eta": 0.5, "gamma": 10.0, "c": 10.0, "p": 0.25},  # c times n
}


class Lanes(NamedTuple):
    """Runs of one method, leaves ``[settings, starts, ...]``."""

    kept: np.ndarray  # the update from which on the error is within the tolerance until the end, inf if there is none
    first: np.ndarray  # the update at which it is within the tolerance for the first time, inf if there is none
    error: np.ndarray  # at the end
    calls: np.ndarray  # oracle calls of an update, on average
    vars: Vars  # at the end


def lanes(method: Method, case: Case, settings: list[Setting], starts: Vars, updates: int, tolerance: float = 0.01) -> Lanes:
    """All settings from all starts (leaves ``[starts, ...]``), in one compiled run.

    An error that comes within the tolerance in the last tenth of the run only may be on its way out again: it does not count.
    """
    columns = {name: jnp.asarray([float(s[name]) for s in settings]) for name in settings[0]}

    def one(setting: dict[str, Array], start: Vars) -> Any:
        solver, batches, measure = _program(method, case, setting)

        def body(k: Array, carry: tuple[Any, Array, Array]) -> tuple[Any, Array, Array]:
            state, kept, first = carry
            state, k = solver.update(state, batches), k.astype(kept.dtype)
            fine = measure(state.vars) <= tolerance  # NaN is not
            return state, jnp.where(fine, kept, k + 2.0), jnp.where(fine, jnp.minimum(first, k + 1.0), first)

        state = solver.init(start, batches)
        fine = measure(state.vars) <= tolerance
        begin = state, jnp.where(fine, 0.0, 1.0), jnp.where(fine, 0.0, jnp.inf)
        state, kept, first = jax.lax.fori_loop(0, updates, body, begin)
        kept = jnp.where(kept <= 0.9 * updates, kept, jnp.inf)
        return kept, first, measure(state.vars), sum(spent(solver, state)) / updates, state.vars

    every = jax.vmap(jax.vmap(one, in_axes=(None, 0)), in_axes=(0, None))
    return Lanes(*jax.tree.map(np.asarray, jax.jit(every)(columns, starts)))


def trace(method: Method, case: Case, setting: Setting, updates: int) -> np.ndarray:
    """The error at the start and after each update."""
    solver, batches, measure = _program(method, case, setting)

    def body(state: Any, _: None) -> tuple[Any, Array]:
        state = solver.update(state, batches)
        return state, measure(state.vars)

    @jax.jit
    def go(start: Vars) -> Array:
        state = solver.init(start, batches)
        return jnp.append(measure(state.vars), jax.lax.scan(body, state, None, length=updates)[1])

    return np.asarray(go(case.start))


def seconds(method: Method, case: Case, setting: Setting, updates: int, repeats: int = 5) -> float:
    """Of that many updates, compilation and measurements excluded: the least of some repeats."""
    solver, batches, _ = _program(method, case, setting)
    state, times = solver.init(case.start, batches), []
    go = jax.jit(lambda state, count: jax.lax.fori_loop(0, count, lambda _, s: solver.update(s, batches), state))
    jax.block_until_ready(go(state, updates))
    for _ in range(repeats):
        tick = time.perf_counter()
        jax.block_until_ready(go(state, updates))
        times.append(time.perf_counter() - tick)
    return min(times)


def single(start: Vars) -> Vars:
    """One start as many."""
    return jax.tree.map(lambda leaf: leaf[None], start)


def _program(method: Method, case: Case, setting: Setting) -> tuple[Solver, Any, Callable[[Vars], Array]]:
    solver = method.make(case, **setting)
    batches = samplers.full().batches(NOTHING, jax.random.key(0), 0, solver.draws)
    return solver, batches, lambda vars: case.error(getattr(vars, method.answer), vars.outer)
