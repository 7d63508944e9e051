"""Broken parts on purpose: the checks that the suites run must fail on each of them."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from bilevel_jax import Levels, Vars, descend, implicit, samplers, solvers, sweep
from bilevel_jax.estimators import saga
from bilevel_jax.linear_solve import richardson
from bilevel_jax.samplers import Plan
from bilevel_jax.types import Batch, Oracle, Terms
from bilevel_jax.value_oracles import moreau
from tests import references
from tests.checks import (
    check_blocks,
    check_formulas,
    check_golden,
    check_mean_over_blocks,
    check_passes,
    check_same,
    check_solution,
    decay,
)
from tests.tables import C_LOW, GAMMA, MU, POWER, RATE, SOLVERS, STEPS, ragged, small, small_stream

OPTS = Vars(*(decay(step, library=True) for step in STEPS))


def changed(change: Any) -> Oracle:
    """The oracle of implicit differentiation with its terms changed by ``change(terms, vars, batch)``."""
    good = implicit(small().problem)
    return good._replace(terms=lambda vars, batch, step: change(good.terms(vars, batch, step), vars, batch))


def with_outer(terms: Terms, **parts: Any) -> Terms:
    return terms._replace(outer=terms.outer._replace(**parts))


def flipped_right_hand_side() -> Oracle:
    """d2_zz g v - d_z f: the sign of v that half of the public code has, without the other half."""
    return changed(lambda terms, vars, batch: with_outer(terms, aux=-terms.outer.aux))


def flipped_cross() -> Oracle:
    return changed(lambda terms, vars, batch: terms._replace(inner=terms.inner._replace(outer=-terms.inner.outer)))


def stale(fields: tuple[str, ...] = ("inner", "aux", "outer")) -> Oracle:
    """Directions taken at the x of the start; of all variables, or of some."""
    good, x = implicit(small().problem), small().start.outer

    def terms(vars: Vars, batch: Batch, step: Any) -> Terms:
        now, old = good.terms(vars, batch, step), good.terms(vars._replace(outer=x), batch, step)
        return Terms(*(n._replace(**{f: getattr(o, f) for f in fields}) for n, o in zip(now, old, strict=True)))

    return good._replace(terms=terms)


@pytest.mark.parametrize(
    "oracle", [flipped_right_hand_side, flipped_cross, stale, lambda: stale(("outer",)), lambda: stale(("aux",))]
)
def test_broken_oracles_are_caught(oracle):
    """By the closed form and by the formulas."""
    with pytest.raises(AssertionError):
        check_solution(oracle(), small())
    with pytest.raises(AssertionError):
        check_formulas(oracle(), small())


def test_broken_oracles_are_caught_by_golden_trajectories():
    with pytest.raises(AssertionError):
        golden(solvers.soba(small().problem, OPTS, oracle=lambda problem: stale(("outer",))), "soba")


def test_unweighted_blocks_are_caught():
    """Blocks of unequal size that count alike: the fault that stalls public SABA."""
    good = implicit(small().problem)
    unweighted = good._replace(terms=lambda vars, batch, step: good.terms(vars, batch._replace(weight=None), step))
    check_mean_over_blocks(good, ragged(), small(), (3, 4))
    with pytest.raises(AssertionError):
        check_mean_over_blocks(unweighted, ragged(), small(), (3, 4))


def golden(solver: Any, name: str, reference: Any = None) -> None:
    batches = small_stream(solver.draws)
    check_golden(jax.jit(solver.update), solver.init(small().start, batches[0]), batches, name, small(), reference)


def test_wrong_compositions_are_caught():
    """SOBA is not SABA, SAGA needs its mean, and FSLA its order."""
    q = small()
    with pytest.raises(AssertionError):
        golden(solvers.soba(q.problem, OPTS), "saba")

    good = saga()

    def forgetful(oracle: Any, vars: Vars, batch: Batch, count: Any, state: Any) -> Any:
        way, after = good.update(oracle, vars, batch, count, state)
        return way, after._replace(mean=state.mean)

    with pytest.raises(AssertionError):
        golden(sweep(descend(implicit(q.problem), OPTS, estimator=good._replace(update=forgetful))), "saba")

    directions = implicit(q.problem)
    jacobi = sweep(
        descend(directions, OPTS._replace(aux=None, outer=None)),
        descend(directions, OPTS._replace(inner=None)),
        descend(directions, Vars(inner=optax.sgd(0.0))),
    )
    with pytest.raises(AssertionError):
        golden(jacobi, "fsla")


#: What public code does, or nearly did: name -> how its row is made otherwise, or how its reference is.
CHANGED = {
    "vrbo that takes all differences at the new x": ("vrbo", None, partial(references.vrbo, across_x=False)),
    "a Neumann sum without its last summand": ("stocbio", None, partial(references.stocbio, summands=2)),
    "a fixed point from 0": (
        "aid_fp",
        partial(solvers.aid_bio, linear_solver=richardson(steps=2, rate=RATE), warm=False),
        None,
    ),
    "a sum for a product": ("sustain", partial(solvers.mrbo, rate=RATE, terms=2), None),
    "a path cut short": ("itd_bio", partial(solvers.itd_bio, truncate=1, fresh=True), None),
    "another weight of new matrices": ("stable", partial(solvers.stable, strong_convexity=MU, tau=0.5), None),
}


@pytest.mark.parametrize("what", CHANGED)
def test_changed_solvers_are_caught(what):
    name, make, reference = CHANGED[what]
    few = {} if name in ("sustain", "stable") else {"inner_steps": 2}
    solver = SOLVERS[name](small().problem, OPTS) if make is None else make(small().problem, OPTS._replace(aux=None), **few)
    with pytest.raises(AssertionError):
        golden(solver, name, reference)


def broken_meha(change: Any) -> Any:
    """The three stages of MEHA on an oracle whose terms are changed by ``change(terms, c)``."""
    c = lambda k: C_LOW * (k.astype(jnp.float64) + 1) ** POWER
    good = moreau(small().problem, c, gamma=GAMMA)
    bad = good._replace(terms=lambda vars, batch, step: change(good.terms(vars, batch, step), c(step)))
    stages = (Vars(aux=OPTS.aux), Vars(outer=OPTS.outer), Vars(inner=OPTS.inner))
    return sweep(*(descend(bad, opts) for opts in stages), aux=lambda z: z)


def flipped_difference(terms: Terms, c: Any) -> Terms:
    """d_x g(theta) - d_x g(z)."""
    return terms._replace(inner=terms.inner._replace(outer=-terms.inner.outer))


def multiplied_f(terms: Terms, c: Any) -> Terms:
    """c f in place of f / c: the fault of the public code."""
    return terms._replace(outer=jax.tree.map(lambda leaf: c**2 * leaf, terms.outer))


def test_broken_moreau_envelopes_are_caught():
    golden(broken_meha(lambda terms, c: terms), "meha")
    for change in (flipped_difference, multiplied_f):
        with pytest.raises(AssertionError):
            golden(broken_meha(change), "meha")


#: name of a row -> its reference with a fault of the kind that public code has, or that is easily made.
FIRST_ORDER_FAULTS = {
    "theta, then z, then x": ("meha", partial(references.meha, order="theta z x")),
    "the mildest of a path": ("iaptt", partial(references.iaptt, pick=np.argmin)),
    "the last of a path": ("iaptt", partial(references.iaptt, pick=lambda values: len(values) - 1)),
}


@pytest.mark.parametrize("what", FIRST_ORDER_FAULTS)
def test_changed_first_order_references_are_caught(what):
    name, reference = FIRST_ORDER_FAULTS[what]
    with pytest.raises(AssertionError):
        golden(SOLVERS[name](small().problem, OPTS), name, reference)


def swap(levels: Levels) -> Levels:
    return Levels(levels.outer, levels.inner)


@pytest.mark.parametrize("good", [samplers.uniform, samplers.epochs])
def test_swapped_samplers_are_caught(good):
    """(i, j) swapped in the plan, or in the slots alone: that puts the rows of a table in the wrong places."""
    sampler = good(4, outer_batch_size=4)
    check_blocks(sampler, (4, 4), (10, 11))
    swapped = sampler._replace(gather=lambda data, plan: sampler.gather(data, plan._replace(block=swap(plan.block))))
    with pytest.raises(AssertionError):
        check_blocks(swapped, (4, 4), (10, 11))

    def slots_only(data: Levels, plan: Plan) -> Batch:
        batch = sampler.gather(data, plan)
        return batch._replace(slot=swap(batch.slot or Levels()))

    with pytest.raises(AssertionError):
        check_blocks(sampler._replace(gather=slots_only), (4, 4), (10, 11))


def test_unmasked_padding_is_caught():
    sampler = samplers.uniform(4, outer_batch_size=4)

    def unmasked(data: Levels, plan: Plan) -> Batch:
        return sampler.gather(data, plan)._replace(weight=None)

    with pytest.raises(AssertionError):
        check_blocks(sampler._replace(gather=unmasked), (4, 4), (10, 11))


def off_by_one(plan: Plan, counts: tuple[int, int]) -> Plan:
    """Epochs whose counter runs to the number of blocks inclusive, and clamps: the last block comes twice a pass."""
    t = np.arange(len(plan.key))
    return plan._replace(block=Levels(*(np.minimum(t % (n + 1), n - 1) for n in counts)))


def test_samplers_that_miss_a_block_are_caught():
    data, key = Levels(jnp.arange(10.0), jnp.arange(11.0)), jax.random.key(3)
    good, uniform = (
        jax.jit(lambda make=make: make(4, outer_batch_size=3).plan(data, key, 0, 24))()
        for make in (samplers.epochs, samplers.uniform)
    )
    check_passes(good, (3, 4))
    repeated = good._replace(block=Levels(*(np.tile(np.arange(n), 24 // n) for n in (3, 4))))
    for bad in (off_by_one(good, (3, 4)), uniform, repeated):
        with pytest.raises(AssertionError):
            check_passes(bad, (3, 4))


def test_comparison_sees_values_dtypes_and_structures():
    one = {"a": jnp.ones(2), "k": jax.random.key(0)}
    check_same(one, dict(one))
    for other in (
        {**one, "a": jnp.ones(2, jnp.float32)},
        {**one, "a": jnp.zeros(2)},
        {**one, "k": jax.random.key(1)},
        {"a": 1},
    ):
        with pytest.raises(AssertionError):
            check_same(one, other)
