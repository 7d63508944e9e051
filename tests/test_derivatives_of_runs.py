"""Derivatives through whole runs: reverse mode for every solver but two, forward mode for all."""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from bilevel_jax import Vars, run, solvers
from bilevel_jax.linear_solve import richardson
from bilevel_jax.types import Array
from tests.tables import CONSTANTS, RATE, SOLVERS, STEPS, build, tiny, tiny_sampler, tiny_start

#: Solvers whose inner steps are those of a `jax.lax.while_loop`.
FORWARD_ONLY = {"ba", "hoag"}
#: Deterministic linear solvers are differentiated as if they were exact: where two steps are not, many stand for them.
EXACT = {
    "aid_fp": partial(solvers.aid_bio, inner_steps=2, linear_solver=richardson(steps=100, rate=RATE)),
    "accbio": lambda problem, opts: solvers.accbio(problem, **CONSTANTS, inner_steps=2, aux_steps=100),
    "accbio_bg": lambda problem, opts: solvers.accbio_bg(problem, **CONSTANTS, inner_steps=2, aux_steps=100),
}


def ending(name: str) -> Callable[[Array], Array]:
    """The x that a run of two updates ends at, as a function of a factor of all starts."""
    problem, data, _, _ = tiny()
    exact = EXACT.get(name)
    opts = Vars(inner=optax.sgd(STEPS.inner), outer=optax.sgd(STEPS.outer))
    solver = build(name, problem) if exact is None else exact(problem, opts)

    def go(factor: Array) -> Array:
        start = jax.tree.map(lambda leaf: factor * leaf, tiny_start(name))
        carry, _ = run(solver, tiny_sampler(), start, data, jax.random.key(1), steps=2)
        return carry.state.vars.outer

    return go


def some(few: set[str]) -> list:
    return [pytest.param(name, marks=[] if name in few else [pytest.mark.more]) for name in SOLVERS]


@pytest.mark.parametrize("name", some({"ba", "hoag", "saba", "stocbio", "itd_bio", "meha"}))
def test_both_modes_trace(name):
    """Without compilation: JAX refuses a while loop in reverse mode while it traces."""
    go, one = ending(name), jnp.float64(1.0)
    assert jax.eval_shape(jax.jacfwd(go), one).shape == ()
    if name in FORWARD_ONLY:
        with pytest.raises(ValueError, match="Reverse-mode differentiation does not work"):
            jax.eval_shape(jax.grad(go), one)
    else:
        assert jax.eval_shape(jax.grad(go), one).shape == ()


@pytest.mark.parametrize("name", some({"ba"}))
def test_derivatives_are_those_of_central_differences(name):
    go, one, step = jax.jit(ending(name)), jnp.float64(1.0), 1e-5
    expected = (go(one + step) - go(one - step)) / (2 * step)
    modes = [jax.jacfwd] if name in FORWARD_ONLY else [jax.jacfwd, jax.grad]
    for mode in modes:
        np.testing.assert_allclose(jax.jit(mode(go))(one), expected, rtol=1e-6, atol=1e-8)
    assert abs(float(expected)) > 1e-2
