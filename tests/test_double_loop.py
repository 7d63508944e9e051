"""What is true of one double-loop, recursive, accelerated or unrolled solver only: identities, limits, counts and codes."""

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from bilevel_jax import (
    Batch,
    Levels,
    Problem,
    Result,
    Solver,
    Vars,
    descend,
    guard,
    implicit,
    run,
    samplers,
    solvers,
    spent,
    sweep,
)
from bilevel_jax.linear_solve import cg, heavy_ball, neumann, random_neumann, richardson
from bilevel_jax.oracles import aid
from bilevel_jax.solvers.steps import DECAYS
from bilevel_jax.testing import dense_spectrum
from tests import references
from tests.checks import check_same, lengths, rows_of
from tests.tables import CONSTANTS, Setting, build, distance, small, stream, thinned, tiny, tiny_sampler

TWO = Vars(inner=optax.sgd(0.2), outer=optax.sgd(0.1))
FAST = Vars(inner=optax.sgd(1.0), outer=optax.sgd(0.3))  # steps of about 1/L on `small`


def jump(solver: Solver, start: Vars, batches: list[Batch]) -> list[Any]:
    """The states of a solver, compiled."""
    update, state, states = jax.jit(solver.update), solver.init(start, batches[0]), []
    for batch in batches:
        state = update(state, batch)
        states.append(state)
    return states


def iterates(states: list[Any]) -> list[Vars]:
    return [state.vars for state in states]


def on_full(solver: Solver, q: Any, count: int = 1, start: Vars | None = None) -> list[Any]:
    """All the data in every draw, the same keys in every update."""
    batch = samplers.full().batches(q.data, jax.random.key(1), 0, solver.draws)
    return jump(solver, q.start if start is None else start, [batch] * count)


def same_draw(batch: Batch, draws: int) -> Batch:
    """One draw, several times over."""
    repeated = jax.tree.map(lambda leaf: jnp.repeat(leaf, draws, axis=0), batch._replace(full=None))
    return repeated._replace(full=batch.full)


@cache
def means() -> tuple[references.Arrays, references.Arrays]:
    g, f = ({name: leaf.mean(0) for name, leaf in part.items()} for part in rows_of(small()))
    return g, f


def truncated(z: np.ndarray, x: np.ndarray, terms: int, rate: float) -> np.ndarray:
    """-(I - (I - rate H)^terms) H^-1 d_z f, by its closed form."""
    g, f = means()
    rest = np.eye(len(z)) - np.linalg.matrix_power(np.eye(len(z)) - rate * g["A"], terms)
    return -rest @ np.linalg.solve(g["A"], references.outer_terms(f, z, x)[0])


def hypergradient(z: np.ndarray, v: np.ndarray, x: np.ndarray) -> np.ndarray:
    g, f = means()
    return references.outer_terms(f, z, x)[1] + g["C"] @ v


def run_on_full(solver: Solver, q: Any, steps: int, every: int | None = None) -> Any:
    go = partial(run, solver, samplers.full(), q.start, q.data, steps=steps, every=every, metrics=q.metrics)
    return jax.jit(go)(jax.random.key(0))


# ---- v ----------------------------------------------------------------------------------------------------------------


def test_neumann_sum_of_stocbio_is_its_closed_form():
    """On full batches, with a traced rate; Q + 1 fixed-point steps from 0 are the same."""
    q, start = small(), small().start._replace(aux=jnp.ones(5))

    @jax.jit
    def both(rate):
        stoc = solvers.stocbio(q.problem, TWO, rate=rate, inner_steps=1, terms=4, batches=(3, 2, 1, 1))
        fixed = richardson(steps=5, rate=rate)
        point = solvers.aid_bio(q.problem, TWO, inner_steps=1, linear_solver=fixed, warm=False)
        batches = (samplers.full().batches(q.data, jax.random.key(1), 0, s.draws) for s in (stoc, point))
        return [s.update(s.init(start, b), b).vars for s, b in zip((stoc, point), batches, strict=True)]

    summed, stepped = both(jnp.float64(0.7))
    check_same(summed, stepped, tol=1e-14)
    z, v, x = map(np.asarray, (summed.inner, summed.aux, start.outer))
    np.testing.assert_allclose(v, truncated(z, x, 5, 0.7), rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(summed.outer, x - 0.1 * hypergradient(z, v, x), rtol=1e-12)


def test_mean_over_the_random_lengths_is_the_truncated_inverse():
    """-H^-1 (I - (I - eta H)^Q) d_z f, from one v of every length."""
    q, terms = small(), 4
    solver = solvers.bsa(q.problem, TWO, rate=0.7, inner_steps=1, terms=terms)
    batch = samplers.full().batches(q.data, jax.random.key(1), 0, solver.draws)
    keys = jax.random.split(jax.random.key(3), 32)

    def with_key(key):
        keyed = batch._replace(key=jnp.broadcast_to(key, (solver.draws,)))
        return solver.update(solver.init(q.start, keyed), keyed).vars

    found = jax.jit(jax.vmap(with_key))(keys)
    drawn = lengths([Batch(key=key[None]) for key in keys], 0, terms)
    chosen = [drawn.index(length) for length in range(terms)]
    mean = np.asarray(found.aux)[chosen].mean(0)
    z = np.asarray(found.inner[0])
    np.testing.assert_allclose(mean, truncated(z, np.asarray(q.start.outer), terms, 0.7), rtol=1e-12, atol=1e-12)


@pytest.mark.more
def test_aid_needs_its_warm_start():
    """Three steps of conjugate gradients a sweep reach rounding from the last v, and stall from 0."""
    q = small()
    for warm, low, high in ((True, 0.0, 1e-13), (False, 1e-3, 1.0)):
        solver = solvers.aid_bio(q.problem, FAST, inner_steps=5, linear_solver=cg(max_steps=3, rtol=0.0), warm=warm)
        carry, history = run_on_full(solver, q, 300)
        first, last = history["gradient_norm"]
        assert low <= last / first <= high
        assert int(carry.result) == Result.MAX_STEPS_REACHED, "few steps are information, not failure"


# ---- what solvers reduce to -------------------------------------------------------------------------------------------


@pytest.mark.more
def test_amigo_with_single_steps_on_one_sample_is_alternating_soba():
    q, draws = tiny(), stream(1)[:4]
    directions = implicit(q.problem)
    steps = [Vars(inner=TWO.inner), Vars(aux=optax.sgd(0.15)), Vars(outer=TWO.outer)]
    alternating = sweep(*(descend(directions, opts) for opts in steps))
    one = solvers.amigo(q.problem, TWO, aux_rate=0.15, inner_steps=1, aux_steps=1)
    check_same(
        iterates(jump(one, q.start, [same_draw(b, one.draws) for b in draws])),
        iterates(jump(alternating, q.start, [same_draw(b, 3) for b in draws])),
        tol=1e-14,
    )


@thinned(
    ("make", "truncation"),
    [(solvers.mrbo, neumann), (solvers.sustain, random_neumann)],
    (solvers.sustain, random_neumann),
)
def test_double_momentum_of_weight_one_is_the_plain_method(make, truncation):
    q = tiny()
    plain = sweep(descend(aid(q.problem, truncation(terms=2, rate=0.5, fresh=True)), TWO))
    weight_one = make(q.problem, TWO, rate=0.5, terms=2, eta=1.0)
    check_same(*(iterates(jump(s, q.start, stream(3)[:4])) for s in (weight_one, plain)), tol=1e-15)


@cache
def bent() -> Setting:
    """Strongly convex in z and quadratic in nothing: its second derivatives move with z and x."""
    problem = Problem(
        lambda z, x, a: jnp.log(jnp.cosh(a @ z)) + 0.3 * z @ z + jnp.sin(x[0]) * z[0] + x[1] ** 2 * z @ z,
        lambda z, x, b: jnp.cos(b @ z) + 0.5 * (x @ x) + (z**3).sum() / 6,
    )
    a, b, z, x = map(jnp.asarray, np.array([[2.0, -1.4], [0.4, -0.6], [0.3, -0.5], [0.4, 0.6]]))
    return Setting(problem, Levels(a, b), Vars(z, 0.0 * z, x), Vars())


def bent_batches(draws: int) -> Batch:
    repeated = jax.tree.map(lambda leaf: jnp.stack([leaf] * draws), bent().data)
    return Batch(*repeated, key=jax.random.split(jax.random.key(0), draws), full=bent().data)


@pytest.mark.more
def test_noiseless_momentum_follows_the_directions_whatever_its_weight():
    found = []
    for eta in (0.1, 0.7, 1.0):
        solver = solvers.mrbo(bent().problem, TWO, rate=0.3, terms=2, eta=eta)
        found.append(iterates(jump(solver, bent().start, [bent_batches(solver.draws)] * 6)))
    check_same(found[0], found[2], tol=1e-13)
    check_same(found[1], found[2], tol=1e-13)
    assert distance(found[0][0], found[0][-1]) > 1e-2


def test_vrbo_without_noise_is_gradient_descent_in_two_loops():
    """x along the truncated hypergradient, then z along d_z g at the new x; refreshes and corrections agree."""
    period, terms = 3, 2
    solver = solvers.vrbo(bent().problem, TWO, rate=0.3, period=period, inner_steps=2, terms=terms)
    found = iterates(jump(solver, bent().start, [bent_batches(solver.draws)] * 5))
    directions = aid(bent().problem, neumann(terms=terms, rate=0.3))
    batch = jax.tree.map(lambda leaf: leaf[None], Batch(*bent().data, key=jax.random.key(0)))

    @jax.jit
    def exact(vars):
        def along(vars):
            parts, _ = directions.terms(vars, batch, jnp.int32(0))
            return parts.inner.inner, parts.inner.outer + parts.outer.outer

        x = vars.outer - 0.1 * along(vars)[1]
        z = vars.inner
        for _ in range(2):
            z = z - 0.2 * along(Vars(z, None, x))[0]
        return vars._replace(inner=z, outer=x)

    vars = bent().start
    for moved in found:
        vars = exact(vars)
        check_same(moved, vars, tol=1e-13)


@thinned("tau", [0.2, 1.0], 0.2)
def test_stable_without_noise_holds_the_exact_matrices(tau):
    """Whatever its weight: v is -H^-1 d_z f, and z also goes along -H^-1 J' (x+ - x)."""
    solver = solvers.stable(bent().problem, TWO, strong_convexity=1e-3, tau=tau)
    states = jump(solver, bent().start, [bent_batches(1)] * 5)

    @jax.jit
    def exact(vars):
        (z, _, x), (a, b) = vars, bent().data
        g, f = lambda z, x: bent().problem.inner(z, x, a), lambda z, x: bent().problem.outer(z, x, b)
        H, J = jax.hessian(g)(z, x), jax.jacobian(jax.grad(g), argnums=1)(z, x).T
        fz, fx = jax.grad(f, argnums=(0, 1))(z, x)
        v = -jnp.linalg.solve(H, fz)
        new = x - 0.1 * (fx + J @ v)
        z = z - 0.2 * jax.grad(g)(z, x) - jnp.linalg.solve(H, J.T @ (new - x))
        return Vars(z, v, new), (H, J)

    vars = bent().start
    for state in states:
        vars, (H, J) = exact(vars)
        check_same(state.vars, vars, tol=1e-12)
        check_same((state.stages[0].hessian, state.stages[0].cross), (H, J), tol=1e-12)


def test_stable_raises_eigenvalues():
    """Far above all of them: v is then -d_z f over the bound."""
    q = small()
    (state,) = on_full(solvers.stable(q.problem, TWO, strong_convexity=50.0), q)
    fz, _ = references.outer_terms(means()[1], np.asarray(q.start.inner), np.asarray(q.start.outer))
    np.testing.assert_allclose(state.vars.aux, -fz / 50.0, rtol=1e-12)


@pytest.mark.more
def test_hoag_to_a_small_tolerance_is_gradient_descent_on_h():
    q = small()
    solver = solvers.hoag(q.problem, FAST, tolerance=1e-11, max_steps=400)
    states = on_full(solver, q, 4)
    x = q.start.outer
    for state in states:
        x = x - 0.3 * q.gradient(x)
        assert distance(state.vars.outer, x) < 1e-9
    assert int(states[-1].stages[0].status.code) == Result.SUCCESSFUL
    assert float(states[-1].stages[0].residual) <= 1e-11


# ---- unrolled ---------------------------------------------------------------------------------------------------------


def test_truncated_gradient_is_its_closed_form():
    """From z*(x), where the path stays: the last K of 60 steps leave (I - a H)^K, whose slope is log(1 - a mu)."""
    q, error = small(), []
    start = q.at(q.start.outer)
    z, v, x = map(np.asarray, start)
    for kept in (30, 50):
        solver = solvers.itd_bio(q.problem, FAST, inner_steps=60, truncate=kept)
        (state,) = on_full(solver, q, start=start)
        found = (x - np.asarray(state.vars.outer)) / 0.3
        np.testing.assert_allclose(found, hypergradient(z, truncated(z, x, kept, 1.0), x), rtol=1e-11, atol=1e-11)
        assert solver.cost.draw.hessian_vector == kept
        error.append(np.linalg.norm(found - hypergradient(z, v, x)))
    slope = np.log(error[1] / error[0]) / 20
    np.testing.assert_allclose(slope, np.log(1 - 0.2), rtol=1e-2)


def test_checkpoints_change_nothing():
    """Five steps: two blocks of two, and one over; each on a draw of its own."""
    found = []
    for checkpoint in ("none", "step", "sqrt"):
        solver = solvers.itd_bio(bent().problem, TWO, inner_steps=5, checkpoint=checkpoint, fresh=True)
        found.append(iterates(jump(solver, bent().start, [bent_batches(6)] * 3)))
    check_same(found[1], found[0], tol=1e-14)
    check_same(found[2], found[0], tol=1e-14)


def test_inner_optimiser_of_a_path_starts_anew():
    """Its momentum is not carried from sweep to sweep: two sweeps are one and one more."""
    opts = TWO._replace(inner=optax.sgd(0.1, momentum=0.9))
    for solver in (solvers.itd_bio(bent().problem, opts, inner_steps=3), solvers.ba(bent().problem, opts, inner_steps=3)):
        first, second = jump(solver, bent().start, [bent_batches(solver.draws)] * 2)
        (again,) = jump(solver, first.vars, [bent_batches(solver.draws)])
        check_same(again.vars, second.vars, tol=1e-14)


@pytest.mark.more
def test_mean_of_pzobo_is_the_unrolled_gradient():
    """The path is linear in x, so that only the sampling error is left: sqrt((d + 1) / directions), without a factor 1/d."""
    q, directions = small(), 40_000
    moves = []
    for make in (solvers.itd_bio, partial(solvers.pzobo, directions=directions, radius=0.5)):
        (state,) = on_full(make(q.problem, TWO, inner_steps=3), q)
        moves.append((np.asarray(q.start.outer) - np.asarray(state.vars.outer)) / 0.1)
        z = np.asarray(state.vars.inner)
    through_z = moves[0] - references.outer_terms(means()[1], z, np.asarray(q.start.outer))[1]
    error = np.linalg.norm(moves[1] - moves[0]) / np.linalg.norm(through_z)
    assert 0 < error < 3 * (4 / directions) ** 0.5


# ---- accelerated ------------------------------------------------------------------------------------------------------


def test_accbio_is_the_scheme_of_its_paper():
    """Cold starts, the hypergradient at the last of the z and not of the s, and the outer sequences w and x."""
    q, (g, f), steps = small(), means(), 80
    L, mu, outer_L, outer_mu = 1.0, 0.2, 3.0, 0.5
    constants = {"smoothness": L, "strong_convexity": mu, "outer_smoothness": outer_L, "outer_strong_convexity": outer_mu}
    solver = solvers.accbio(q.problem, **constants, inner_steps=steps, aux_steps=steps, warm=False)
    x = w = np.asarray(q.start.outer)
    root, k = (L / mu) ** 0.5, (outer_L / outer_mu) ** 0.5
    for state in on_full(solver, q, 5, start=q.start._replace(inner=jnp.full(5, 9.0), aux=jnp.full(5, -9.0))):
        z = s = np.zeros(5)
        for _ in range(steps):
            new = s - (g["A"] @ s + g["C"].T @ x + g["b"]) / L
            s, z = 2 * root / (root + 1) * new - (root - 1) / (root + 1) * z, new
        v = references.heavy_ball(g["A"], references.outer_terms(f, z, x)[0], 0 * z, steps, L, mu)
        new = x - hypergradient(z, v, x) / outer_L
        x, w = (1 + (k - 1) / (k + 1)) * new - (k - 1) / (k + 1) * w, new
        np.testing.assert_allclose(state.vars.outer, x, rtol=1e-8, atol=1e-8)
        np.testing.assert_allclose(state.vars.inner, z, rtol=1e-8, atol=1e-8)


def steps_to(history: Any, gap: float) -> int:
    error = np.asarray(history["suboptimality"])
    reached = error <= gap * error[0]
    assert reached.any()
    return int(history["step"][np.flatnonzero(reached)[0]])


@pytest.mark.more
@pytest.mark.parametrize("make", [solvers.accbio, solvers.accbio_bg])
def test_acceleration_is_worth_the_root_of_the_condition_number(make):
    """To a gap of 1e-6: about sqrt(kappa) log against kappa / 2 log; the three sequences take steps half as long."""
    q = dense_spectrum(20, outer_strong_convexity=0.04, inner_strong_convexity=0.5, dtype=jnp.float64)
    outer_L, outer_mu = 4.04, 0.04
    constants = {"smoothness": 1.0, "strong_convexity": 0.5, "outer_smoothness": outer_L, "outer_strong_convexity": outer_mu}
    fast = make(q.problem, **constants, inner_steps=10, aux_steps=10)
    ball = heavy_ball(steps=10, smoothness=1.0, strong_convexity=0.5)
    opts = Vars(inner=optax.sgd(1.0), outer=optax.sgd(1 / outer_L))
    slow = solvers.aid_bio(q.problem, opts, inner_steps=10, linear_solver=ball)
    quick, plain = (steps_to(run_on_full(s, q, n, n // 100)[1], 1e-6) for s, n in ((fast, 200), (slow, 1000)))
    kappa = outer_L / outer_mu
    assert plain > 2 * kappa
    assert kappa**0.5 / 4 < plain / quick < kappa**0.5


def test_default_loops_of_accbio_are_long_enough():
    """ceil(sqrt(L / mu) log(1 / accuracy)) steps of either loop."""
    constants = CONSTANTS | {"smoothness": 4.0, "strong_convexity": 1.0}
    assert tuple(solvers.accbio(small().problem, **constants, accuracy=1e-3).cost.draw) == (14.0, 15.0, 1.0, 2.0)


# ---- counts -----------------------------------------------------------------------------------------------------------


def calls(solver: Solver, state: Any) -> tuple[float, ...]:
    return tuple(float(c) for c in spent(solver, state))


def test_ba_counts_its_growing_loops():
    """ceil((t + 1)^1/4) inner steps; on a scalar z one step of conjugate gradients and one check."""
    q = tiny()
    solver = solvers.ba(q.problem, TWO)
    state = on_full(solver, q, 20)[-1]
    inner = sum(int(np.ceil((t + 1) ** 0.25 - 1e-9)) for t in range(20))
    assert calls(solver, state) == (inner, 40, 20, 40)
    assert solver.cost.draw.inner_gradient == float("inf")


def test_hoag_counts_what_its_tolerance_takes():
    """At the solution a gradient and a residual a sweep are enough to know; away from it what the loops do."""
    q = tiny()
    solver = solvers.hoag(q.problem, TWO, tolerance=1e-8, max_steps=50)
    assert calls(solver, on_full(solver, q, 5, start=q.solution)[-1]) == (5, 5, 5, 10)
    away = calls(solver, on_full(solver, q, 1)[-1])
    assert 10 < away[0] <= solver.cost.draw.inner_gradient == 51
    assert away[1] == 3, "a residual, a step and a check"


def test_random_lengths_are_counted():
    q, terms = tiny(), 2
    solver = build("bsa", q.problem)
    batches = stream(solver.draws)
    state = jump(solver, q.start, batches)[-1]
    assert calls(solver, state) == (40, sum(lengths(batches, 2, terms)), 20, 40)


def test_stable_counts_its_dense_matrices():
    q = small()
    solver = build("stable", q.problem)
    assert calls(solver, on_full(solver, q, 2)[-1]) == (2, 2 * 2 * 5, 2 * 2 * 5, 2)


def test_what_is_declared_is_what_is_counted_elsewhere():
    q, solver = tiny(), build("aid_fp", tiny().problem)
    assert calls(solver, on_full(solver, q, 3)[-1]) == tuple(3 * c for c in solver.cost.draw)


# ---- codes ------------------------------------------------------------------------------------------------------------


def result_of(solver: Solver, data: Levels | None = None, steps: int = 4) -> Any:
    """The carry of a run on `tiny`; the data are traced, so that nothing of them is checked before."""
    go = partial(run, solver, tiny_sampler(), tiny().start, key=jax.random.key(3), steps=steps)
    carry, _ = jax.jit(lambda d: go(data=d))(tiny().data if data is None else data)
    assert all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(carry.finite))
    return carry


def concave() -> Levels:
    (a, b), outer = tiny().data
    return Levels((-0.1 * a, b), outer)


def test_indefinite_inner_hessians_are_reported():
    for solver in (solvers.aid_bio(tiny().problem, TWO, inner_steps=1), build("ba", tiny().problem)):
        assert int(result_of(solver, concave()).result) == Result.NEGATIVE_CURVATURE


@thinned("name", ["stocbio", "bsa", "mrbo", "vrbo"], "bsa", "vrbo")
def test_rates_above_the_curvature_are_reported(name):
    """The sum grows with its terms, while all variables stay finite; of composite oracles the code comes up, too."""
    loops = {} if name == "mrbo" else {"inner_steps": 1}
    carry = result_of(getattr(solvers, name)(tiny().problem, TWO, rate=5.0, terms=3, **loops), steps=2)
    assert int(carry.result) == Result.DIVERGED
    assert distance(carry.finite, carry.state.vars) == 0


def test_a_code_is_kept_when_things_get_better():
    """It is the worst so far: the rate is too large in the first sweep only."""
    solver = solvers.stocbio(tiny().problem, TWO, rate=lambda t: jnp.where(t == 0, 5.0, 0.5), inner_steps=1, terms=3)
    assert int(result_of(solver).result) == Result.DIVERGED


def test_inner_problems_that_are_not_solved_are_reported():
    solver = solvers.hoag(tiny().problem, TWO, tolerance=1e-6, max_steps=2)
    assert int(result_of(solver).result) == Result.INNER_NOT_CONVERGED


def test_inner_loops_that_blow_up_keep_the_last_finite_iterate():
    wild = TWO._replace(inner=optax.sgd(1e200))
    solver = solvers.hoag(tiny().problem, wild, max_steps=20)
    carry = result_of(solver, steps=1)
    assert int(carry.result) == Result.DIVERGED
    assert bool(jnp.isfinite(carry.state.vars.inner))


def test_wrong_constants_of_accbio_are_reported():
    constants = CONSTANTS | {"smoothness": 0.01, "strong_convexity": 0.005}
    solver = solvers.accbio(tiny().problem, **constants, inner_steps=2, aux_steps=10)
    assert int(result_of(solver, steps=2).result) >= Result.DIVERGED
    assert distance(result_of(guard(solver), steps=40).finite, tiny().start) > 0


# ---- where biased solvers stop ----------------------------------------------------------------------------------------

BIASED = {
    "stocbio": partial(solvers.stocbio, rate=1.0, inner_steps=5, terms=7),
    "mrbo": partial(solvers.mrbo, rate=1.0, terms=7),
    "vrbo": partial(solvers.vrbo, rate=1.0, inner_steps=2, terms=7),
    "itd_bio": partial(solvers.itd_bio, inner_steps=8),
}


@thinned("name", BIASED, "vrbo")
def test_truncation_moves_the_point_where_a_solver_stops(name):
    """On full batches it is where the hypergradient with the truncated v is 0, and grad h is not; eight summands each."""
    q, g = small(), means()[0]
    carry, history = run_on_full(BIASED[name](q.problem, FAST), q, 300)

    def at(x):
        z = -np.linalg.solve(g["A"], g["C"].T @ x + g["b"])
        return hypergradient(z, truncated(z, x, 8, 1.0), x)

    origin = at(np.zeros(3))
    jacobian = np.stack([at(e) - origin for e in np.eye(3)], axis=1)
    np.testing.assert_allclose(carry.state.vars.outer, -np.linalg.solve(jacobian, origin), atol=1e-9)
    assert history["gradient_norm"][-1] > 1e-3 * history["gradient_norm"][0]
    assert int(carry.result) == Result.SUCCESSFUL


# ---- step sizes -------------------------------------------------------------------------------------------------------

#: name -> the exponents of z (and of ``vars.aux``, where the solver steps it) and x.
EXPONENTS = {
    "f2sa": (4 / 7, 5 / 7),
    "ttsa": (2 / 5, 3 / 5),
    "bsa": (1 / 2, 1 / 2),
    "stable": (1 / 2, 1 / 2),
    "mrbo": (1 / 3, 1 / 3),
    "sustain": (1 / 3, 1 / 3),
    "stocbio": (0, 0),
    "vrbo": (0, 0),
    "aid_bio": (0, 0),
    "itd_bio": (0, 0),
}


@pytest.mark.parametrize("name", EXPONENTS)
def test_default_steps_are_those_of_the_papers(name):
    aux = 0.3 if DECAYS[name].aux else None
    opts = solvers.default_opts(getattr(solvers, name), 0.2, aux, 0.1)
    assert (opts.aux is None) == (aux is None)
    one: Callable[..., Any] = jnp.float64
    inner, outer = EXPONENTS[name]
    for opt, rate, exponent in zip(opts, (0.2, aux, 0.1), (inner, inner, outer), strict=True):
        if opt is None or rate is None:
            continue
        state = opt.init(one(0.0))
        with jax.numpy_dtype_promotion("standard"):
            for t in range(3):
                step, state = opt.update(one(1.0), state)
                np.testing.assert_allclose(step, -rate * (t + 1) ** -exponent, rtol=1e-6)
