"""Where solvers rest on a problem that is not quadratic, with trees of variables: at the solution, or where their bias says.

The equations of every resting point are written down here from the two losses, with dense derivatives, and solved by Newton's
method in float64; a solver that starts at such a point must stay there.  Also: the mean over all draws on ragged blocks, and
the end of the variance-reduced solvers on them.
"""

from collections.abc import Callable
from functools import cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax
from jax.flatten_util import ravel_pytree

from bilevel_jax import Batch, Levels, Problem, Solver, Vars, run, samplers, solvers
from bilevel_jax.estimators import total
from bilevel_jax.linear_solve import cg, dense, neumann, random_neumann, richardson
from bilevel_jax.nonsmooth import ball
from bilevel_jax.oracles import aggregated, aid, finite_difference, implicit
from bilevel_jax.projections import project
from bilevel_jax.samplers import Plan, take_draw
from bilevel_jax.types import Array, Oracle, PyTree
from bilevel_jax.value_oracles import stencil
from tests.checks import ZERO

# ---- the problem: labels and counts of one linear model ---------------------------------------------------------------


def inner_loss(z, x, rows):
    """A logistic and a Poisson loss of one score, penalised by exp(x); one value a row."""
    features, label, count = rows["features"], rows["label"], rows["count"]
    (bias, _, (curve,)), (cross,) = z["rest"], x["cross"]
    score = features @ z["w"] + bias + 0.1 * curve.sum() * features[:, 0] ** 2
    sign = (2 * label - 1).astype(score.dtype)
    fit = jnp.logaddexp(0.0, -sign * score) + 0.1 * (jnp.exp(0.3 * score) - 0.3 * count.astype(score.dtype) * score)
    penalty = (jnp.exp(x["penalty"]) * z["w"] ** 2).sum() / 2 + 0.3 * jnp.exp(x["shift"]) * bias**2 + 0.5 * (curve**2).sum()
    return fit + penalty + 0.1 * jnp.sin(cross).sum() * bias + 0.1 * cross[1] * z["w"][0] * z["w"][1]


def outer_loss(z, x, rows):
    """A logistic loss on other rows, which depends on x directly, too; strongly convex in z."""
    (bias, _, (curve,)), (cross,) = z["rest"], x["cross"]
    score = rows["features"] @ z["w"] + bias - 0.2 * curve.sum()
    sign = (2 * rows["label"] - 1).astype(score.dtype)
    own = 0.1 * (x["penalty"] ** 2).sum() + 0.1 * (x["shift"] - 0.3) ** 2 + 0.2 * (cross**2).sum()
    size = (z["w"] ** 2).sum() + bias**2 + (curve**2).sum()
    return jnp.logaddexp(0.0, -sign * score) + own + 0.05 * cross[0] * z["w"][0] + 0.05 * size


PROBLEM = Problem(inner_loss, outer_loss)
START = Vars(
    inner={"w": np.zeros(2), "rest": (np.zeros(()), None, (np.zeros((1, 1)),))},
    outer={"penalty": np.full(2, -1.0), "shift": np.zeros(()), "none": None, "cross": (np.full(2, 0.1),)},
)
ROWS = Levels(7, 5)


@cache
def data() -> Levels:
    random = np.random.default_rng(0)

    def rows(count: int) -> dict[str, np.ndarray]:
        features = random.normal(size=(count, 2))
        label = (features @ [1.0, -0.5] + 0.7 * random.normal(size=count) > 0).astype(np.int32)
        return {"features": features, "label": label, "count": random.poisson(2, count).astype(np.int32)}

    with jax.ensure_compile_time_eval():  # the first call may be inside a trace
        return jax.tree.map(jnp.asarray, Levels(*map(rows, ROWS)))


class Flat(NamedTuple):
    """The mean losses and their derivatives, of vectors."""

    g: Callable[..., Array]
    f: Callable[..., Array]
    gz: Callable[..., Array]
    gx: Callable[..., Array]
    fz: Callable[..., Array]
    fx: Callable[..., Array]
    hessian: Callable[..., Array]  # [p, p]
    cross: Callable[..., Array]  # [d, p]


@cache
def ways() -> Vars:
    """From vectors to trees; aux is like z."""
    to_z, to_x = ravel_pytree(START.inner)[1], ravel_pytree(START.outer)[1]
    return Vars(to_z, to_z, to_x)


def vector(tree: PyTree) -> Array:
    return ravel_pytree(tree)[0]


@cache
def flat(weight: float = 0.0) -> Flat:
    """With the inner loss ``(1 - weight) g + weight f``."""
    to_z, _, to_x = ways()
    f = lambda z, x: PROBLEM.outer(to_z(z), to_x(x), data().outer).mean()
    plain = lambda z, x: PROBLEM.inner(to_z(z), to_x(x), data().inner).mean()
    g = (lambda z, x: (1 - weight) * plain(z, x) + weight * f(z, x)) if weight else plain
    slope = jax.grad(g)
    return Flat(
        g, f, slope, jax.grad(g, 1), jax.grad(f), jax.grad(f, 1), jax.jacfwd(slope), lambda z, x: jax.jacrev(slope, 1)(z, x).T
    )


# ---- where solvers rest -----------------------------------------------------------------------------------------------

#: ``(point, parameters) -> residuals``, all of vectors: the equations of a resting point.
Equations = Callable[[Vars, Any], Vars]


def implicit_equations(point: Vars, weight: Any) -> Vars:
    """z minimises g (or its mixture with f, which is not traced), v solves the linear system, the hypergradient is 0."""
    (z, v, x), at = point, flat(weight)
    return Vars(at.gz(z, x), at.hessian(z, x) @ v + at.fz(z, x), at.fx(z, x) + at.cross(z, x) @ v)


def series_equations(point: Vars, sizes: tuple[Any, Any]) -> Vars:
    """v is the sum of the first ``count`` terms of the Neumann series instead."""
    (z, v, x), at, (rate, count) = point, flat(), sizes
    hessian, right = at.hessian(z, x), -at.fz(z, x)
    short = lax.fori_loop(0, count, lambda _, u: rate * right + u - rate * hessian @ u, jnp.zeros_like(v))
    return Vars(at.gz(z, x), v - short, at.fx(z, x) + at.cross(z, x) @ v)


def difference_equations(point: Vars, scale: Any) -> Vars:
    """Products with second derivatives are central differences along v."""
    (z, v, x), at = point, flat()
    length = scale * (1 + jnp.linalg.norm(z)) / jnp.linalg.norm(v)
    quotient = lambda slope: (slope(z + length * v, x) - slope(z - length * v, x)) / (2 * length)
    return Vars(at.gz(z, x), quotient(at.gz) + at.fz(z, x), at.fx(z, x) + quotient(at.gx))


def penalty_equations(point: Vars, lam: Any) -> Vars:
    """F2SA: y minimises g + f / lam."""
    (z, y, x), at = point, flat()
    return Vars(at.gz(z, x), at.gz(y, x) + at.fz(y, x) / lam, at.fx(y, x) + lam * (at.gx(y, x) - at.gx(z, x)))


def node_equations(point: Vars, lam: Any) -> Vars:
    """F2SA-p: each y_k minimises g + s_k f, and z is their interpolation."""
    (z, ys, x), at = point, flat()
    nodes, weights, at_zero = map(jnp.asarray, stencil(ORDER))
    each = lambda y, s: (at.gz(y, x) + s / lam * at.fz(y, x), at.gx(y, x) + s / lam * at.fx(y, x))
    slopes, pulls = jax.vmap(each)(ys, nodes)
    return Vars(z - at_zero @ ys, slopes, lam * weights @ pulls)


def steps_from(start: Array, count: int, slope: Callable[[Array], Array]) -> Array:
    """Gradient steps with the rate of z."""
    for _ in range(count):
        start = start - RATE * slope(start)
    return start


def lookahead_equations(point: Vars, lam: Any) -> Vars:
    """V-PBGD: w is a few gradient steps away from y."""
    (w, y, x), at = point, flat()
    end = steps_from(y, STEPS, lambda u: at.gz(u, x))
    return Vars(w - end, at.fz(y, x) / lam + at.gz(y, x), at.fx(y, x) + lam * (at.gx(y, x) - at.gx(end, x)))


def value_equations(point: Vars, slope_of: Callable[[Array], Array]) -> Vars:
    """BVFIM, BVFSM: y is a few gradient steps away from z, on f and the constraint's term."""
    (z, y, x), at = point, flat()

    def slope(y: Array) -> Array:
        return slope_of(at.g(y, x) - at.g(z, x) - MU / 2 * z @ z)

    end = steps_from(z, STEPS, lambda u: at.fz(u, x) + slope(u) * at.gz(u, x) + MU * u)
    return Vars(at.gz(z, x) + MU * z, y - end, at.fx(y, x) + slope(y) * (at.gx(y, x) - at.gx(z, x)))


def barrier_slope(gap: Array) -> Array:
    return TAU / (SIGMA - gap)


def quadratic_slope(gap: Array) -> Array:
    return jnp.maximum(gap, 0.0) / SIGMA


def envelope_equations(point: Vars, c: Any) -> Vars:
    """MEHA: theta is the proximal point of z."""
    (z, theta, x), at = point, flat()
    apart = (z - theta) / GAMMA
    pull = at.fx(z, x) / c + at.gx(z, x) - at.gx(theta, x)
    return Vars(at.fz(z, x) / c + at.gz(z, x) - apart, at.gz(theta, x) - apart, pull)


def path_equations(point: Vars, parameters: None) -> Vars:
    """BDA: z is at the end of a path from a start that stays, along a mixture of g and f."""
    (z, origin, x), at = point, flat()

    def end(x: Array) -> Array:
        here = origin
        for k in range(STEPS):
            share = MIXTURE / (k + 1)
            here = here - RATE * ((1 - share) * at.gz(here, x) + share * at.fz(here, x))
        return here

    return Vars(z - end(x), origin, jax.grad(lambda x: at.f(end(x), x))(x))


def start_equations(point: Vars, parameters: None) -> Vars:
    """IAPTT without its maximum: the start of the path moves, too."""
    (z, origin, x), at = point, flat()
    end = lambda origin, x: steps_from(origin, STEPS, lambda u: at.gz(u, x))
    return Vars(z - end(origin, x), *jax.grad(lambda o, x: at.f(end(o, x), x), (0, 1))(origin, x))


RATE, OUTER, STEPS, TERMS = 0.3, 0.2, 3, 4
ORDER, MU, TAU, SIGMA, GAMMA, MIXTURE, WEIGHT, SCALE = 4, 0.1, 0.5, 0.5, 1.0, 0.5, 0.3, 1e-2
SGD = Vars(*map(optax.sgd, (RATE, RATE, OUTER)))
TWO = SGD._replace(aux=None)
CONSTANTS = {"smoothness": 4.0, "strong_convexity": 0.1, "outer_smoothness": 5.0, "outer_strong_convexity": 0.05}


@partial(jax.jit, static_argnums=(0, 2))
def newton(equations: Equations, guess: Vars, fixed: Any, parameters: Any = None) -> tuple[Vars, Array]:
    """The resting point near a guess, and the residual that is left; ``fixed`` parameters are static, the others traced."""
    start, back = ravel_pytree(guess)
    residual = lambda u: vector(equations(back(u), parameters if fixed is None else fixed))

    def step(_: Any, u: Array) -> Array:
        return u - jnp.linalg.solve(jax.jacfwd(residual)(u), residual(u))

    end = lax.fori_loop(0, 12, step, start)
    return back(end), jnp.abs(residual(end)).max()


@jax.jit
def descended() -> Vars:
    """A point near the solution: exact gradient steps on h."""
    at = flat()

    def step(_: Any, point: Vars) -> Vars:
        z, _, x = point
        z = lax.fori_loop(0, 3, lambda _, z: z - jnp.linalg.solve(at.hessian(z, x), at.gz(z, x)), z)
        v = -jnp.linalg.solve(at.hessian(z, x), at.fz(z, x))
        return Vars(z, v, x - at.fx(z, x) - at.cross(z, x) @ v)

    return lax.fori_loop(0, 100, step, Vars(vector(START.inner), vector(START.inner), vector(START.outer)))


@cache
def solution() -> Vars:
    point, left = newton(implicit_equations, descended(), 0.0)
    assert float(left) < 1e-14
    assert float(jnp.linalg.norm(point.aux)) > 0.1
    return point


def rest(equations: Equations, aux: Any = None, fixed: Any = None, parameters: Any = None) -> Vars:
    """The resting point near the solution, with another guess of aux than v, or of all."""
    guess = solution() if aux is None else aux if isinstance(aux, Vars) else solution()._replace(aux=aux)
    point, left = newton(equations, guess, fixed, parameters)
    assert float(left) < 1e-13
    return point


class Case(NamedTuple):
    solver: Callable[[], Solver]
    point: Callable[[], Vars]
    v: bool = True  # whether aux is kept by the solver


def of_z() -> Array:
    return solution().inner


@jax.jit
def descended_start() -> Vars:
    """A point near that where IAPTT rests, by gradient steps."""

    def step(_: Any, point: Vars) -> Vars:
        residual = start_equations(point, None)
        return Vars(point.inner - residual.inner, point.aux - residual.aux, point.outer - residual.outer)

    return lax.fori_loop(0, 3000, step, solution()._replace(aux=of_z()))


def series(count: int, rate: float = RATE) -> Callable[[], Vars]:
    return lambda: rest(series_equations, parameters=(rate, count))


def make(name: str, *args: Any, **own: Any) -> Callable[[], Solver]:
    return lambda: getattr(solvers, name)(PROBLEM, *args, **own)


EXACT = {
    "soba": make("soba", SGD),
    "ma_soba": make("ma_soba", SGD, theta=0.3),
    "saba": make("saba", SGD),
    "srba": make("srba", SGD, period=3),
    "srba_in_a_ball": make("srba", SGD._replace(aux=optax.chain(SGD.aux, project(ball(50.0)))), period=3),
    "spaba": make("spaba", SGD, probability=0.3),
    "storm_soba": make("storm_soba", SGD),
    "fsla": make("fsla", SGD),
    "aid_bio": make("aid_bio", TWO),
    "aid_cold": make("aid_bio", TWO, linear_solver=cg(max_steps=50, rtol=1e-15), warm=False),
    "aid_fp": make("aid_bio", TWO, linear_solver=richardson(steps=2, rate=RATE)),
    "ba": make("ba", TWO, linear_solver=dense()),
    "hoag": make("hoag", TWO, tolerance=1e-13),
    "amigo": make("amigo", TWO, aux_rate=RATE),
    "stable": make("stable", TWO, strong_convexity=1e-3),
    "accbio": make("accbio", **CONSTANTS),
    "accbio_bg": make("accbio_bg", **CONSTANTS),
}
VALUE = {"inner_steps": STEPS, "regularisation": MU}
CASES = {name: Case(solver, solution) for name, solver in EXACT.items()} | {
    "sl_bamm": Case(make("sl_bamm", SGD, weight=WEIGHT), lambda: rest(implicit_equations, fixed=WEIGHT)),
    "stocbio": Case(make("stocbio", TWO, rate=RATE, terms=TERMS), series(TERMS + 1)),
    "mrbo": Case(make("mrbo", TWO, rate=RATE, terms=TERMS), series(TERMS + 1), v=False),
    "vrbo": Case(make("vrbo", TWO, rate=RATE, terms=TERMS), series(TERMS + 1), v=False),
    "bsa": Case(make("bsa", TWO, rate=RATE, terms=1), series(1)),
    "ttsa": Case(make("ttsa", TWO, rate=RATE, terms=1), series(1)),
    "sustain": Case(make("sustain", TWO, rate=RATE, terms=1), series(1), v=False),
    "itd_bio": Case(make("itd_bio", TWO, inner_steps=STEPS), series(STEPS), v=False),
    "itd_truncated": Case(make("itd_bio", TWO, inner_steps=STEPS, truncate=2), series(2), v=False),
    "fo_itd_bio": Case(make("fo_itd_bio", TWO, inner_steps=STEPS), series(0), v=False),
    "hjfbio": Case(make("hjfbio", SGD, radius=50.0, scale=SCALE), lambda: rest(difference_equations, parameters=SCALE)),
    "fdehbo": Case(make("fdehbo", SGD, radius=50.0, scale=SCALE), lambda: rest(difference_equations, parameters=SCALE)),
    "f2sa": Case(make("f2sa", SGD, multiplier=20.0), lambda: rest(penalty_equations, of_z(), parameters=20.0)),
    "f2ba": Case(make("f2ba", SGD, multiplier=20.0), lambda: rest(penalty_equations, of_z(), parameters=20.0)),
    "f2sa_p": Case(
        make("f2sa_p", TWO, multiplier=20.0, order=ORDER),
        lambda: rest(node_equations, jnp.stack([of_z()] * ORDER), parameters=20.0),
    ),
    "pbgd": Case(
        make("pbgd", SGD, multiplier=5.0, inner_steps=STEPS), lambda: rest(lookahead_equations, of_z(), parameters=5.0)
    ),
    "bvfim": Case(
        make("bvfim", SGD, **VALUE, strength=TAU, slack=SIGMA), lambda: rest(value_equations, of_z(), fixed=barrier_slope)
    ),
    "bvfsm": Case(make("bvfsm", SGD, **VALUE, width=SIGMA), lambda: rest(value_equations, of_z(), fixed=quadratic_slope)),
    "meha": Case(make("meha", SGD, gamma=GAMMA, c_low=20.0, p=0.0), lambda: rest(envelope_equations, of_z(), parameters=20.0)),
    "bda": Case(make("bda", TWO, inner_steps=STEPS, weight=lambda k: MIXTURE / (k + 1.0)), lambda: rest(path_equations)),
    "iaptt": Case(make("iaptt", SGD, inner_steps=STEPS, pessimistic=False), lambda: rest(start_equations, descended_start())),
}
#: One of each kind; `pzobo` and `bome` rest nowhere, and have tests of their own.
FEW = {"soba", "hoag", "stocbio", "itd_bio", "fdehbo", "f2sa_p", "meha"}


def some(names: Any, few: set[str]) -> Any:
    return [pytest.param(name, marks=[] if name in few else [pytest.mark.more]) for name in names]


def trees(point: Vars) -> Vars:
    to_z, _, to_x = ways()
    aux = jax.vmap(to_z)(point.aux) if point.aux.ndim == 2 else to_z(point.aux)
    return Vars(to_z(point.inner), aux, to_x(point.outer))


def full_batches(solver: Solver) -> Batch:
    return samplers.full().batches(data(), jax.random.key(3), 0, solver.draws)


def after(solver: Solver, count: int) -> Callable[[Vars], Vars]:
    """The point after some updates on full batches, of vectors; compiled."""

    @jax.jit
    def go(start: Vars) -> Vars:
        batches = full_batches(solver)
        end = lax.fori_loop(0, count, lambda _, state: solver.update(state, batches), solver.init(trees(start), batches))
        z, aux, x = end.vars
        return Vars(vector(z), jax.vmap(vector)(aux) if start.aux.ndim == 2 else vector(aux), vector(x))

    return go


@pytest.mark.parametrize("name", some(CASES, FEW))
def test_a_solver_stays_where_its_equations_hold(name):
    """And leaves a point beside it."""
    case = CASES[name]
    point, go = case.point(), after(case.solver(), 4)
    off = jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), go(point), point)
    assert max(off._replace(aux=off.aux if case.v else 0.0)) < 1e-12
    beside = point._replace(outer=point.outer + 0.1)
    assert float(jnp.abs(go(beside).outer - beside.outer).max()) > 1e-5


#: name -> (equations, whether aux starts at z, parameters of two resting points, the documented size of the bias at them).
BIASES = {
    "a Neumann series": (series_equations, False, ((RATE, 30), (RATE, 50)), lambda p, mu: (1 - p[0] * mu) ** p[1]),
    "differences": (difference_equations, False, (1e-2, 1e-3), lambda p, mu: p**2),
    "a penalty": (penalty_equations, True, (1e2, 1e3), lambda p, mu: 1 / p),
    "four nodes": (node_equations, True, (20.0, 60.0), lambda p, mu: p**-ORDER),
    "an envelope": (envelope_equations, True, (1e3, 1e4), lambda p, mu: 1 / p),
}


@pytest.mark.parametrize("name", some(BIASES, {"a penalty"}))
def test_the_bias_is_of_the_documented_order(name):
    """The distance of the resting point to the solution falls as the docstrings say, within a factor of 2."""
    equations, at_z, parameters, size = BIASES[name]
    best = solution()
    start = jnp.stack([best.inner] * ORDER) if equations is node_equations else best.inner if at_z else None
    mu = float(jnp.linalg.eigvalsh(flat().hessian(best.inner, best.outer))[0])
    gaps = [float(jnp.linalg.norm(rest(equations, start, parameters=p).outer - best.outer)) for p in parameters]
    ratio = (gaps[1] / gaps[0]) / (size(parameters[1], mu) / size(parameters[0], mu))
    assert gaps[0] > 1e-9
    assert 0.5 < ratio < 2


@pytest.mark.parametrize("name", some(("bsa", "ttsa", "sustain"), set()))
def test_random_lengths_move_x_about_the_resting_point_of_their_mean(name):
    """From where the mean over p of the hypergradients is 0, x moves along that of one p, and z does not move."""
    point, at, count = rest(series_equations, parameters=(RATE, 3)), flat(), 3
    z, _, x = point
    hessian, right = at.hessian(z, x), -at.fz(z, x)
    products = [count * RATE * right]
    for _ in range(count - 1):
        products.append(products[-1] - RATE * hessian @ products[-1])
    ways = jnp.stack([at.fx(z, x) + at.cross(z, x) @ v for v in products])
    assert float(jnp.abs(ways.mean(0)).max()) < 1e-13
    solver = getattr(solvers, name)(PROBLEM, TWO, rate=RATE, terms=count)

    @jax.jit
    @jax.vmap
    def move(key: Array) -> Vars:
        batches = full_batches(solver)._replace(key=jax.random.split(key, solver.draws))
        return solver.update(solver.init(trees(point), batches), batches).vars

    now = move(jax.random.split(jax.random.key(0), 12))
    assert float(jnp.abs(jax.vmap(vector)(now.inner) - z[None]).max()) < 1e-13
    off = jnp.abs(jax.vmap(vector)(now.outer)[:, None] - (x[None] - OUTER * ways)[None]).max(2)
    assert float(off.min(1).max()) < 1e-13
    assert set(off.argmin(1).tolist()) == {0, 1, 2}


@pytest.mark.more
def test_the_mean_of_pzobo_is_the_unrolled_hypergradient():
    """At z*, over 2,000 directions, within five standard errors; the radius is so small that the path is straight."""
    z, _, x = solution()
    at, solver = flat(), solvers.pzobo(PROBLEM, TWO, inner_steps=STEPS, radius=1e-6)
    v = jnp.zeros_like(z)
    for _ in range(STEPS):
        v = v - RATE * (at.hessian(z, x) @ v + at.fz(z, x))

    @jax.jit
    @jax.vmap
    def moved(key: Array) -> Array:
        batch = full_batches(solver)._replace(key=key[None])
        return vector(solver.update(solver.init(trees(solution()), batch), batch).vars.outer)

    ways = (x[None] - moved(jax.random.split(jax.random.key(0), 2000))) / OUTER
    error = ways.std(0) / 2000**0.5
    assert float((jnp.abs(ways.mean(0) - (at.fx(z, x) + at.cross(z, x) @ v)) / error).max()) < 5
    assert float(error.max()) < 0.1 * float(jnp.linalg.norm(at.cross(z, x) @ v))


@pytest.mark.parametrize("control", some(("gradient", "value"), {"gradient"}))
def test_bome_steps_along_its_barrier(control):
    """It rests nowhere: at the solution grad q = 0, and the multiplier has no value.  Beside it a step is that of the paper."""
    at, (z, _, x) = flat(), solution()
    y, x = z + 0.3, x - 0.2
    w = steps_from(y, STEPS, lambda u: at.gz(u, x))
    ascent, slope = (at.fz(y, x), at.fx(y, x)), (at.gz(y, x), at.gx(y, x) - at.gx(w, x))
    square = sum(s @ s for s in slope)
    phi = 0.5 * (square if control == "gradient" else at.g(y, x) - at.g(w, x))
    lam = jnp.maximum(phi - sum(a @ s for a, s in zip(ascent, slope, strict=True)), 0) / square
    assert float(lam) > 0.1
    solver = solvers.bome(PROBLEM, SGD, inner_steps=STEPS, control=control)
    end = after(solver, 1)(Vars(y, y, x))
    expected = Vars(w, y - RATE * (ascent[0] + lam * slope[0]), x - OUTER * (ascent[1] + lam * slope[1]))
    for got, wanted in zip(end, expected, strict=True):
        np.testing.assert_allclose(got, wanted, atol=1e-13)


# ---- ragged blocks ----------------------------------------------------------------------------------------------------

SAMPLER = samplers.uniform(3, outer_batch_size=2)  # inner blocks of 3, 3 and 1 rows, outer ones of 2, 2 and 1


def elsewhere() -> Vars:
    """A point that is nothing special."""
    random = np.random.default_rng(1)
    return Vars(*(jnp.asarray(0.5 * random.normal(size=part.shape)) for part in solution()))


def every(draws: list[int]) -> Levels:
    """All numbers of blocks, int32 [combinations, draws], of draws that use their inner (1), outer (2) or both rows (3)."""
    axes = [3 if kind & bit else 1 for kind in draws for bit in (1, 2)]
    table = np.stack(np.meshgrid(*map(np.arange, axes), indexing="ij"), -1).reshape(-1, len(draws), 2).astype(np.int32)
    return Levels(jnp.asarray(table[..., 0]), jnp.asarray(table[..., 1]))


def mean_terms(oracle: Oracle, point: Vars, draws: list[int], *, single: bool = False) -> Callable[[Array], tuple[Vars, Array]]:
    """The mean direction over all draws, and how far one of x is from it; a compiled function of the key."""

    @jax.jit
    def go(key: Array) -> tuple[Vars, Array]:
        def one(block: Levels) -> Vars:
            batch = SAMPLER.stack(data(), Plan(block, jax.random.split(key, len(draws))))
            if single:
                way = total(oracle.terms(trees(point), take_draw(batch, 0), ZERO))
            else:
                way = total(oracle.terms(trees(point), batch, ZERO)[0])  # type: ignore[index]
            return Vars(*(None if part is None else vector(part) for part in way))

        ways = jax.vmap(one)(every(draws))
        mean = jax.tree.map(lambda way: way.mean(0), ways)
        return mean, jnp.abs(ways.outer - mean.outer[None]).max()

    return go


SIMPLE = {
    "implicit": lambda: (implicit(PROBLEM), implicit_equations, 0.0),
    "forward": lambda: (implicit(PROBLEM, mode="forward"), implicit_equations, 0.0),
    "aggregated": lambda: (aggregated(PROBLEM, WEIGHT), implicit_equations, WEIGHT),
    "differences": lambda: (finite_difference(PROBLEM, scale=SCALE), difference_equations, SCALE),
}


@pytest.mark.parametrize("name", some(SIMPLE, {"implicit", "differences"}))
def test_directions_are_unbiased_over_ragged_blocks(name):
    """Their mean over all pairs of blocks is the direction on all rows: the residual of the equations."""
    oracle, equations, parameters = SIMPLE[name]()
    point = elsewhere()
    mean, spread = mean_terms(oracle, point, [3], single=True)(jax.random.key(0))
    expected = equations(point, parameters)
    for got, wanted in zip(mean, expected, strict=True):
        np.testing.assert_allclose(got, wanted, atol=1e-12)
    assert spread > 1e-2


@pytest.mark.parametrize("batches", [pytest.param(None, marks=pytest.mark.more), (2, 1)])
def test_a_neumann_sum_is_unbiased_over_ragged_blocks(batches):
    """Draws of their own for every factor, and several in one: the mean is the sum on all rows."""
    oracle = aid(PROBLEM, neumann(terms=2, rate=RATE, fresh=True, batches=batches))
    draws = [3] + [1] * (sum(batches) if batches else 2)
    point = elsewhere()._replace(aux=jnp.zeros(4))
    mean, spread = mean_terms(oracle, point, draws)(jax.random.key(0))
    v = -series_equations(point, (RATE, 3)).aux
    np.testing.assert_allclose(mean.outer, implicit_equations(point._replace(aux=v), 0.0).outer, atol=1e-12)
    np.testing.assert_allclose(mean.inner, flat().gz(point.inner, point.outer), atol=1e-12)
    assert spread > 1e-2


def test_a_random_product_is_unbiased_over_ragged_blocks():
    """For every length p that a key may draw the mean is the product on all rows; over p it is the Neumann sum."""
    count = 3
    oracle = aid(PROBLEM, random_neumann(terms=count, rate=RATE, fresh=True))
    point = elsewhere()._replace(aux=jnp.zeros(4))
    at, (z, _, x) = flat(), point
    v, expected = -count * RATE * at.fz(z, x), []
    for _ in range(count):
        expected.append(at.fx(z, x) + at.cross(z, x) @ v)
        v = v - RATE * at.hessian(z, x) @ v
    short = -series_equations(point, (RATE, count)).aux
    np.testing.assert_allclose(sum(expected) / count, at.fx(z, x) + at.cross(z, x) @ short, atol=1e-12)
    seen, go = set(), mean_terms(oracle, point, [3, 1, 1, 0])
    for key in jax.random.split(jax.random.key(0), 12):
        mean, spread = go(key)
        off = [float(jnp.abs(mean.outer - way).max()) for way in expected]
        assert min(off) < 1e-12
        assert float(spread) > 1e-2
        seen.add(int(np.argmin(off)))
    assert seen == {0, 1, 2}


def test_a_step_of_saba_is_unbiased_over_ragged_blocks():
    """Whatever its tables hold after a few updates."""
    solver = solvers.saba(PROBLEM, SGD)
    carry, _ = jax.jit(partial(run, solver, SAMPLER, steps=9))(trees(elsewhere()), data(), jax.random.key(9))
    state = carry.state
    point = Vars(*map(vector, state.vars))

    @jax.jit
    @jax.vmap
    def step(block: Levels) -> Vars:
        batch = SAMPLER.stack(data(), Plan(block, jax.random.split(jax.random.key(0), 1)))
        return Vars(*map(vector, solver.update(state, batch).vars))

    ends = step(every([3]))
    ways = implicit_equations(point, 0.0)
    for end, start, way, rate in zip(ends, point, ways, (RATE, RATE, OUTER), strict=True):
        np.testing.assert_allclose(end.mean(0), start - rate * way, atol=1e-13)
    assert float(ends.outer.std(0).max()) > 1e-4


VARIANCE_REDUCED = {"saba": {}, "srba": {"period": 4}, "spaba": {"probability": 0.25}}


@pytest.mark.parametrize("remainder", ["mask", pytest.param("drop", marks=pytest.mark.more)])
@pytest.mark.parametrize("name", some(VARIANCE_REDUCED, {"saba"}))
def test_variance_reduced_solvers_end_at_the_solution(name, remainder):
    """With constant steps, on blocks of unequal sizes, to rounding; without the last block at the solution of the others."""
    solver = getattr(solvers, name)(PROBLEM, Vars(*map(optax.sgd, (RATE, RATE, 0.3))), **VARIANCE_REDUCED[name])
    sampler = samplers.uniform(3, outer_batch_size=2, remainder=remainder)
    go = jax.jit(partial(run, solver, sampler, steps=6000))
    start = jax.tree.map(jnp.asarray, START)
    carry, _ = go(start, data(), jax.random.key(1))
    z, v, x = map(vector, carry.state.vars)
    kept = Levels(*(n - n % size if remainder == "drop" else n for n, size in zip(ROWS, (3, 2), strict=True)))
    rows = jax.tree.map(lambda count, part: jax.tree.map(lambda leaf: leaf[:count], part), kept, data())
    batch = Batch(inner=rows.inner, outer=rows.outer)
    way = total(jax.jit(implicit(PROBLEM).terms)(trees(Vars(z, v, x)), batch, ZERO))
    assert max(float(jnp.abs(vector(part)).max()) for part in way) < 1e-13
    assert float(jnp.abs(x - vector(START.outer)).max()) > 0.1
