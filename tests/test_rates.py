"""Rates on the quadratic in float64: who reaches the solution with constant steps, how fast, and who does not."""

from functools import partial
from itertools import product

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from bilevel_jax import Vars, descend, implicit, run, samplers, solvers, sweep
from bilevel_jax.estimators import plain, saga
from bilevel_jax.linear_solve import neumann
from bilevel_jax.oracles import aid
from tests.tables import STEPS, small, thinned

REDUCED = {
    "saba": solvers.saba,
    "srba": partial(solvers.srba, period=6),
    "spaba": partial(solvers.spaba, probability=0.15),
}
NOISY = {
    "soba": solvers.soba,
    "ma_soba": partial(solvers.ma_soba, theta=0.2),
    "fsla": partial(solvers.fsla, eta=0.2),
}


def errors(make, batch_size, scales=(1.0,), steps=2000, every=50):
    """Hypergradient norms, relative to the first, [scales, 1 + steps / every]: one lane a scale of the step sizes."""
    q = small()

    def one(scale):
        opts = Vars(*(optax.sgd(scale * step) for step in STEPS))
        sampler, key = samplers.uniform(batch_size), jax.random.key(1)
        _, history = run(make(q.problem, opts), sampler, q.start, q.data, key, steps=steps, every=every, metrics=q.metrics)
        return history["gradient_norm"] / history["gradient_norm"][0]

    if len(scales) == 1:
        return np.asarray(jax.jit(one)(scales[0]))[None]
    return np.asarray(jax.jit(jax.vmap(one))(jnp.asarray(np.array(scales))))


@thinned(("name", "batch_size"), list(product(("saba", "srba", "spaba"), (5, 8))), ("saba", 5), ("srba", 5))
def test_variance_reduction_reaches_the_solution(name, batch_size):
    """Constant steps, batches that divide 32 samples and that do not; the log error falls on a line."""
    error = errors(REDUCED[name], batch_size)[0]
    assert error[-1] < 1e-10
    line = np.log10(error[error > 1e-11])
    assert len(line) > 10
    steps = 50.0 * np.arange(len(line))
    slope, level = np.polyfit(steps, line, 1)
    residual = line - (slope * steps + level)
    assert 1 - residual.var() / line.var() > 0.99
    assert -0.03 < slope < -0.005  # decades a step


@thinned("name", ["soba", "ma_soba", "fsla"], "soba")
def test_noise_leaves_a_plateau_that_falls_with_the_steps(name):
    """Constant steps: the norm stalls at about the root of the step sizes, far above the floor of SABA."""
    error = errors(NOISY[name], 5, scales=(1.0, 0.25), steps=6000, every=200)
    large, small_ = error[:, 15:].mean(axis=1)
    assert large < 0.5, "it should come near the solution"
    assert small_ > 1e-4, "it should stall"
    assert 1.4 < large / small_ < 4


@pytest.mark.more
@pytest.mark.parametrize("reduced", ["inner", "outer"])
def test_variance_reduction_of_one_variable_is_not_enough(reduced):
    """SAGA on z, or on x, alone stalls as SOBA does."""

    def make(problem, opts):
        stages = []
        for name, opt in zip(Vars._fields, opts, strict=True):
            estimator = saga() if name == reduced else plain()
            stages.append(descend(implicit(problem), Vars(**{name: opt}), estimator=estimator))
        return sweep(*stages)

    assert errors(make, 5, steps=1600)[0][-10:].mean() > 1e-3


@pytest.mark.more
def test_double_momentum_is_nearer_than_plain_steps_of_the_same_size():
    """Means over 32 seeds of |grad h|^2 after 3200 updates on single samples, whose noise is on the matrices, too.

    Plain steps K^-1/2, against those of the paper, ~ t^-1/3 with weights ~ t^-2/3, as long in the end.
    """
    q, steps, terms = small(), 3200, 5
    directions = aid(q.problem, neumann(terms=terms, rate=0.9, fresh=True))
    last = 0.6 * steps ** (-1 / 3)

    def falling(step):
        return optax.sgd(lambda t: step * (t + 2.0) ** (-1 / 3))

    plain = sweep(descend(directions, Vars(inner=optax.sgd(last), outer=optax.sgd(last / 2))))
    mrbo = solvers.mrbo(
        q.problem, Vars(inner=falling(0.6), outer=falling(0.3)), rate=0.9, terms=terms, eta=lambda t: 2 * (t + 2.0) ** (-2 / 3)
    )

    def error(solver):
        def one(key):
            go = partial(run, solver, samplers.uniform(1), q.start, q.data, steps=steps, every=steps // 16, metrics=q.metrics)
            return (go(key)[1]["gradient_norm"][-8:] ** 2).mean()

        keys = jax.random.split(jax.random.key(5), 32)
        return float(jax.jit(lambda keys: jax.lax.map(one, keys, batch_size=16))(keys).mean())

    assert error(mrbo) < 0.7 * error(plain)
