"""Any optimiser of optax on any variable: it works, or it is refused by name before compilation."""

import itertools
import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest
from jax import lax

from bilevel_jax import Batch, Levels, Problem, Result, Vars, hypergrad, hypergradient, run, samplers, solvers, tasks
from bilevel_jax.estimators import saga, storm
from bilevel_jax.linear_solve import neumann
from bilevel_jax.nonsmooth import l1
from bilevel_jax.optimisers import begin, initial, moved
from bilevel_jax.oracles import aid, finite_difference, implicit
from bilevel_jax.projections import proximal_sgd
from bilevel_jax.stages import solve_inner, unroll
from bilevel_jax.sweep import descend, sweep
from bilevel_jax.value_oracles import penalty
from tests import optimiser_table as table
from tests.tables import thinned, tiny

#: One of each kind; the others run with the marker ``more``.
KINDS = {
    *("sgd", "adam", "MultiSteps", "masked", "lookahead", "monitor", "polyak_sgd", "scale_by_backtracking_linesearch"),
    *("contrib.muon", "contrib.sam", "contrib.schedule_free_sgd", "contrib.dpsgd"),
}
SGD = optax.sgd(0.1)


def names(*kinds):
    return thinned("name", table.public(), *kinds)


def squares(tree, weight=1.0):
    return sum(0.5 * weight * (leaf**2).sum() for leaf in jax.tree.leaves(tree))


def away(z, x):
    return jax.tree.map(lambda a, b: a - b / 2, z, x)


#: z* = x / 2, on trees that are like one another.
TREES = Problem(
    inner=lambda z, x, rows: squares(away(z, x), rows.mean().astype(jnp.float32).astype(jax.tree.leaves(z)[0].dtype)),
    outer=lambda z, x, rows: squares(jax.tree.map(lambda a: a - 1, z)) + squares(x, 0.1),
)


def rows(draws):
    """As many draws as a solver asks for."""
    ones = jnp.ones((draws, 2))
    return Batch(inner=ones, outer=ones, key=jax.random.split(jax.random.key(0), draws))


def trees(name, dtype=jnp.float64):
    z = table.point(name, dtype)
    return Vars(z, jax.tree.map(lambda leaf: 0.3 * leaf, z), jax.tree.map(lambda leaf: leaf - 0.4, z))


def twice(solver, start):
    """Two updates in a scan, whose carry must keep its types."""
    batches = rows(solver.draws)
    state = solver.init(start, batches)
    return partial(lax.scan, lambda state, _: (solver.update(state, batches), None), length=2), state


# ---- the table --------------------------------------------------------------------------------------------------------


def test_the_page_has_all_that_optax_has():
    """A release of optax with another transformation shows here: run ``python -m tests.optimiser_table``."""
    found = re.findall(r"^\| `optax\.([\w.]+)` .*$", table.PAGE.read_text(), re.MULTILINE)
    assert sorted(found) == sorted(table.public())
    assert {table.row(name) for name in KINDS} <= set(table.PAGE.read_text().splitlines())


@pytest.mark.more
def test_the_page_is_what_is_generated():
    assert table.PAGE.read_text() == table.page(), "run python -m tests.optimiser_table, and look at what changes"


def test_the_table_names_what_exists():
    given = {*table.ARGUMENTS, *table.NOTES, *table.UNDIFFERENTIABLE_AT_0, *table.UNDIFFERENTIABLE, *KINDS}
    assert given <= set(table.public())
    assert {name.removeprefix("contrib.") for name in table.OTHERS} <= {*vars(optax), *vars(optax.contrib)}
    assert len(table.public()) > 120


@names(*KINDS)
def test_single_loop(name):
    """z, v and x of SOBA: two updates that compile once and stay finite, or a refusal that names the variable."""
    verdict, opt = table.verdict(name), table.make(name)
    refused = Vars(verdict.known, verdict.unknown, verdict.unknown)
    for variable, reason in zip(Vars._fields, refused, strict=True):
        solver = solvers.soba(TREES, Vars(SGD, SGD, SGD)._replace(**{variable: opt}))
        if reason:
            with pytest.raises(ValueError, match=f"^opts.{variable}: got an optimiser of vars.{variable} that ") as error:
                solver.init(trees(name), rows(1))
            assert reason in str(error.value)
    step, state = twice(solvers.soba(TREES, Vars(*(SGD if reason else opt for reason in refused))), trees(name))
    end, _ = jax.jit(step)(state)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(end.vars))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@names(*KINDS)
def test_narrow_variables(name, dtype):
    """While 64 bits are enabled: the variables and the state keep their dtypes, so that a scan accepts them."""
    verdict, opt = table.verdict(name), table.make(name)
    if name == "contrib.scale_by_galore" and dtype == "bfloat16":
        pytest.skip("optax takes a singular value decomposition, which has no bfloat16")
    opts = Vars(*(SGD if reason else opt for reason in (verdict.known, verdict.unknown, verdict.unknown)))
    step, state = twice(solvers.soba(TREES, opts), trees(name, dtype))
    end, _ = jax.eval_shape(step, state)
    for old, new in zip(jax.tree.leaves(state), jax.tree.leaves(end), strict=True):
        assert (new.shape, new.dtype) == (old.shape, old.dtype)


def along_a_path(name, opt, *, dead):
    """The derivative of a path whose direction is x times constants, some of them 0 if ``dead``."""
    z = table.point(name, jnp.float32)
    way = jax.tree.map(lambda leaf: leaf.at[(0,) * leaf.ndim].set(0.0), z) if dead else z
    follow = hypergrad.path(opt, 3)

    def end(x):
        gradient = lambda z, x, k: jax.tree.map(lambda w: w * x, way)
        loss = lambda z, x, k: sum(jnp.vdot(w * x, leaf) for w, leaf in zip(*map(jax.tree.leaves, (way, z)), strict=True))
        return sum(leaf.sum() for leaf in jax.tree.leaves(follow(gradient, z, x, loss=loss)))

    return jax.jit(jax.grad(end))(jnp.float32(1.3))


@names("sgd", "adam", "lookahead", "polyak_sgd", "scale_by_zoom_linesearch")
def test_unrolled(name):
    """Differentiated paths: finite, or NaN as the table says, or refused."""
    if table.verdict(name).unrolled:
        with pytest.raises(ValueError, match=r"^opt: got an optimiser of vars.inner that "):
            along_a_path(name, table.make(name), dead=True)
        return
    fine = name not in table.UNDIFFERENTIABLE_AT_0 | table.UNDIFFERENTIABLE
    assert np.isfinite(along_a_path(name, table.make(name), dead=True)) == fine
    if not fine:
        assert np.isfinite(along_a_path(name, table.make(name), dead=False)) == (name not in table.UNDIFFERENTIABLE)
    if name in table.UNDIFFERENTIABLE_AT_0 and table.root_of(name):
        assert np.isfinite(along_a_path(name, table.make(name, **{table.root_of(name): 1e-8}), dead=True))


# ---- steps that need the loss -----------------------------------------------------------------------------------------

CURVED = Problem(  # a badly conditioned inner problem, z* = x
    inner=lambda z, x, rows: 0.5 * ((z - x)[None] ** 2 * rows).sum(-1) + 0.1 * ((z - x) ** 4).sum(),
    outer=lambda z, x, rows: 0.5 * ((z[None] - rows) ** 2).sum(-1),
)
FULL = Batch(inner=np.array([[[1.0, 10.0, 100.0]]]), outer=np.array([[[1.0, 2.0, 3.0]]]))
AT = Vars(np.zeros(3), np.zeros(3), np.array([1.0, -2.0, 3.0]))


def height(vars):
    return float(CURVED.inner(vars.inner, vars.outer, FULL.inner[0])[0])


def test_lbfgs_solves_the_inner_problem_in_few_steps():
    solver = sweep(solve_inner(CURVED, optax.lbfgs(), max_steps=40, tolerance=1e-8))
    state = jax.jit(solver.update)(solver.init(AT, FULL), FULL)
    assert state.stages[0].residual <= 1e-8
    assert jnp.allclose(state.vars.inner, AT.outer, atol=1e-7)
    slow = sweep(solve_inner(CURVED, optax.sgd(0.005), max_steps=40))
    assert height(slow.update(slow.init(AT, FULL), FULL).vars) > 0.1


def test_lbfgs_within_a_solver():
    data = Levels(inner=FULL.inner[0], outer=FULL.outer[0])
    solver = solvers.aid_bio(CURVED, Vars(inner=optax.lbfgs(), outer=optax.sgd(0.5)), inner_steps=6)
    go = jax.jit(lambda key: run(solver, samplers.full(), AT._replace(aux=None), data, key, steps=40)[0])
    carry = go(jax.random.key(0))
    assert int(carry.result) == Result.SUCCESSFUL
    assert jnp.allclose(carry.state.vars.outer, data.outer[0], atol=1e-4)


SEARCHES = {
    "backtracking": optax.chain(optax.sgd(1.0), optax.scale_by_backtracking_linesearch(20)),
    "zoom": optax.chain(optax.scale(-1.0), optax.scale_by_zoom_linesearch(20)),
    "lbfgs": optax.lbfgs(),
    "polyak": optax.polyak_sgd(),
}
ORACLES = {
    "implicit": implicit(CURVED),
    "finite_difference": finite_difference(CURVED),
    "aid": aid(CURVED, neumann(terms=2, rate=0.01)),
}


def test_oracles_say_what_their_loss_is():
    """So that they take what needs it, alone and in a chain."""
    for oracle in ORACLES.values():
        for search in SEARCHES.values():
            solver = sweep(descend(oracle, Vars(inner=search)))
            solver.init(AT, jax.tree.map(lambda leaf, n=solver.draws: jnp.repeat(leaf, n, 0), FULL))


@pytest.mark.parametrize("search", ["backtracking", "zoom", "lbfgs"])
def test_line_searches_decrease_the_loss(search):
    """Several steps an update, on one draw."""
    solver = sweep(descend(implicit(CURVED), Vars(inner=SEARCHES[search]), steps=2, fresh=False))
    update, state, heights = jax.jit(solver.update), solver.init(AT, FULL), [height(AT)]
    for _ in range(4):
        state = update(state, FULL)
        heights.append(height(state.vars))
    assert all(after < before for before, after in itertools.pairwise(heights))


@pytest.mark.parametrize("oracle", ORACLES)
def test_the_loss_of_an_oracle_has_its_direction(oracle):
    oracle = ORACLES[oracle]
    assert oracle.inner_loss is not None
    batch = jax.tree.map(lambda leaf: jnp.repeat(leaf, oracle.draws, 0) if oracle.draws else leaf[0], FULL)
    terms = oracle.terms(AT, batch, jnp.int32(0))
    terms = terms if oracle.draws is None else terms[0]
    slope = jax.grad(lambda z, loss=oracle.inner_loss: loss(AT._replace(inner=z), batch, jnp.int32(0)))(AT.inner)
    np.testing.assert_allclose(terms.inner.inner, slope, rtol=1e-12)


def test_polyak_steps_are_those_of_the_formula():
    """And their derivative that of a loop written by hand."""
    method = hypergrad.iterative(optax.polyak_sgd(max_learning_rate=0.05), 4)
    one = Batch(inner=FULL.inner[0], outer=FULL.outer[0])
    g = lambda z, x: CURVED.inner(z, x, one.inner)[0]

    def end(x):
        z = AT.inner
        for _ in range(4):
            value, slope = jax.value_and_grad(g)(z, x)
            z = z - jnp.minimum(value / (slope**2).sum(), 0.05) * slope
        return CURVED.outer(z, x, one.outer)[0]

    value, gradient, stats = jax.jit(hypergradient(CURVED, method))(AT.inner, AT.outer, one)
    expected, slope = jax.jit(jax.value_and_grad(end))(AT.outer)
    assert value == pytest.approx(float(expected), rel=1e-12)
    np.testing.assert_allclose(gradient, slope, rtol=1e-10)
    assert int(stats.code) == Result.SUCCESSFUL
    unrolled = sweep(unroll(CURVED, Vars(inner=optax.polyak_sgd(0.05), outer=optax.sgd(1.0)), 4, fresh=False))
    after = jax.jit(unrolled.update)(unrolled.init(AT, FULL), FULL)
    np.testing.assert_allclose(AT.outer - after.vars.outer, slope, rtol=1e-10)


def test_opaque_sharpness_aware_steps():
    """``grad_fn`` is that of the loss: z+ = z - a grad(z + r grad)."""
    opt = optax.contrib.sam(optax.sgd(0.01), optax.sgd(0.001), opaque_mode=True)
    solver = sweep(solve_inner(CURVED, opt, max_steps=1))
    slope = jax.grad(lambda z: CURVED.inner(z, AT.outer, FULL.inner[0])[0])
    state = solver.update(solver.init(AT, FULL), FULL)
    np.testing.assert_allclose(state.vars.inner, AT.inner - 0.01 * slope(AT.inner + 0.001 * slope(AT.inner)), rtol=1e-12)


def test_the_loss_is_not_evaluated_for_others():
    """The program is that of an oracle that does not say what its loss is."""

    def program(oracle):
        solver = sweep(descend(oracle, Vars(optax.adam(0.1), optax.adam(0.1), optax.adam(0.1)), steps=2))
        batches = jax.tree.map(lambda leaf: jnp.repeat(leaf, 2, 0), FULL)
        return str(jax.make_jaxpr(solver.update)(solver.init(AT, batches), batches))

    assert program(implicit(CURVED)) == program(implicit(CURVED)._replace(inner_loss=None))


# ---- refusals ---------------------------------------------------------------------------------------------------------

VALUE = "needs the value of a loss, expected one that needs only a direction, because the direction of {} here"
POLYAK, LOOKAHEAD = optax.polyak_sgd(), optax.lookahead(SGD, 3, 0.5)


REFUSED = {
    "estimator": (lambda: sweep(wrong_estimator(storm(0.5))), "opts.inner", VALUE.format("inner")),
    "table": (lambda: sweep(wrong_estimator(saga())), "opts.inner", VALUE.format("inner")),
    "oracle": (lambda: sweep(descend(penalty(tiny().problem, 2.0), Vars(inner=POLYAK))), "opts.inner", VALUE.format("inner")),
    "descend v": (lambda: sweep(descend(implicit(tiny().problem), Vars(aux=POLYAK))), "opts.aux", VALUE.format("aux")),
    "descend x": (lambda: sweep(descend(implicit(tiny().problem), Vars(outer=POLYAK))), "opts.outer", VALUE.format("outer")),
    "unroll x": (lambda: sweep(unroll(tiny().problem, Vars(inner=SGD, outer=POLYAK), 2)), "opts.outer", VALUE.format("outer")),
    "unroll aux": (
        lambda: sweep(unroll(tiny().problem, Vars(SGD, POLYAK, SGD), 2, start=lambda vars: vars.aux)),
        "opts.aux",
        VALUE.format("aux"),
    ),
    "unroll z": (
        lambda: sweep(unroll(tiny().problem, Vars(inner=optax.lbfgs(), outer=SGD), 2)),
        "opts.inner",
        "has no derivative in reverse mode",
    ),
    "solve_inner": (lambda: sweep(solve_inner(tiny().problem, LOOKAHEAD, max_steps=2)), "opt", "moves optax.LookaheadParams"),
    "chain": (
        lambda: sweep(descend(implicit(tiny().problem), Vars(outer=optax.chain(optax.clip(1.0), LOOKAHEAD)))),
        "opts.outer",
        "moves optax.LookaheadParams",
    ),
    "over_tasks": (lambda: sweep(over_tasks(SGD, POLYAK)), "opt", VALUE.format("outer")),
    "through_steps": (lambda: sweep(over_tasks(optax.lbfgs(), SGD)), "opt", "has no derivative in reverse mode"),
    "first order": (lambda: sweep(over_tasks(POLYAK, SGD, first_order=True)), "opt", VALUE.format("inner")),
    "vrbo": (lambda: solvers.vrbo(tiny().problem, Vars(POLYAK, None, SGD), rate=0.1), "opts.inner", VALUE.format("inner")),
    "stable": (
        lambda: solvers.stable(tiny().problem, Vars(SGD, None, POLYAK), strong_convexity=0.1),
        "opts.outer",
        VALUE.format("outer"),
    ),
}


def wrong_estimator(estimator):
    return descend(implicit(tiny().problem), Vars(inner=POLYAK), estimator=estimator)


def over_tasks(inner, outer, **options):
    return tasks.over_tasks(tasks.through_steps(tiny().problem, inner, 2, start=lambda vars: vars.outer, **options), outer)


@pytest.mark.parametrize("case", REFUSED)
def test_refused_in_init(case):
    make, name, text = REFUSED[case]
    solver = make()
    draws = samplers.full().batches(tiny().data, jax.random.key(0), 0, solver.draws)
    with pytest.raises(ValueError, match=rf"^{name}: got an optimiser of vars\.\w+ that {text}"):
        solver.init(tiny().start, draws)


def test_refused_in_a_method():
    """Where there is no ``init``: while it is traced."""
    method = hypergrad.iterative(optax.lbfgs(), 3)
    with pytest.raises(ValueError, match=r"^opt: got an optimiser of vars.inner that has no derivative in reverse mode"):
        jax.eval_shape(hypergradient(CURVED, method), AT.inner, AT.outer, jax.tree.map(lambda leaf: leaf[0], FULL))
    undifferentiated = hypergrad.zeroth_order(optax.lbfgs(), 3)  # searches the lines, as nothing is differentiated
    at = jax.tree.map(lambda leaf: leaf[0], FULL)
    jax.eval_shape(hypergradient(CURVED, undifferentiated), AT.inner, AT.outer, at, None, jax.random.key(0))
    stages = [
        tasks.over_tasks(tasks.displacement(tiny().problem, optax.lbfgs(), 2), SGD),
        tasks.over_tasks(tasks.proximal(tiny().problem, optax.lbfgs(), 2, strength=1.0), SGD),
        unroll(tiny().problem, Vars(inner=optax.lbfgs(), outer=SGD), 2, jacobian=hypergrad.gaussian(1, 0.1)),
    ]
    for solver in map(sweep, stages):
        solver.init(tiny().start, samplers.full().batches(tiny().data, jax.random.key(0), 0, solver.draws))


def custom(start, following, along):
    def update(updates, state, params):
        return along(updates), following(state)

    return optax.GradientTransformation(lambda params: start, update)


@pytest.mark.parametrize(
    ("opt", "text"),
    [
        (custom((), lambda s: (), optax.tree.norm), "the updates differ from the variable"),
        (custom((), lambda s: (), lambda u: jax.tree.map(lambda leaf: leaf[:1], u)), "the updates differ from the variable"),
        (custom((), lambda s: {"a": 1.0}, lambda u: u), "the new state differs from the old one"),
        (custom(jnp.zeros(2), lambda s: s[:1], lambda u: u), "the new state differs from the old one"),
        (custom(jnp.zeros(2), lambda s: s, lambda u: {}["missing"]), "KeyError: 'missing'"),
        (optax.masked(SGD, {"other": True}), "cannot do a step"),
    ],
)
def test_what_changes_shapes_is_refused(opt, text):
    message = rf"^opts.outer: got an optimiser of vars.outer that .*{text}.*, expected an optax"
    with pytest.raises(ValueError, match=message) as error:
        begin("opts.outer", "outer", opt, jnp.ones(3), None, loss=False, backward=False)
    assert error.value.__cause__ is not None


def test_states_keep_their_dtypes():
    """Also of transformations that change them: a scan would not accept the new state."""
    opt = custom((jnp.zeros((), jnp.float32), 1.0), lambda s: (s[0].astype(jnp.float64) + 1, s[1] * 2), lambda u: u)
    z = jnp.ones(3, jnp.bfloat16)
    state = begin("opt", "inner", opt, z, None, loss=False, backward=True)
    assert not any(leaf.weak_type for leaf in state)
    new, after = moved(opt, z, state, z, None)
    assert new.dtype == jnp.bfloat16
    assert [leaf.dtype for leaf in after] == [leaf.dtype for leaf in state]
    assert [float(leaf) for leaf in after] == [1.0, 2.0]


# ---- extra arguments --------------------------------------------------------------------------------------------------


def test_extra_arguments_go_where_they_are_accepted():
    z, x = jnp.array([1.0, 0.25]), jnp.array([1.0, 1.0])
    weighted = proximal_sgd(0.5, l1(lambda x: x))  # which needs x
    expected = moved(weighted, jnp.zeros(2), initial(weighted, z), z, x)[0]
    assert expected.tolist() == [0.5, 0.0]
    for opt in (optax.MultiSteps(weighted, 1), optax.chain(optax.clip(1.0), weighted)):
        assert moved(opt, jnp.zeros(2), initial(opt, z), z, x)[0].tolist() == expected.tolist()
    clear = optax.contrib.sam(SGD, optax.sgd(0.01))  # which refuses any that it does not know
    for opt in (clear, optax.chain(clear, optax.clip(1.0))):
        first = moved(opt, z, initial(opt, z), z, x)[0]
        np.testing.assert_allclose(first, 1.01 * z, rtol=1e-12)


def test_an_object_that_is_no_tuple():
    """`optax.MultiSteps` has the two methods, and works as a link of the library's own chains."""
    opts = Vars(SGD, SGD, optax.MultiSteps(SGD, 2))
    step, state = twice(solvers.ma_soba(TREES, opts, theta=0.5), trees("sgd"))
    jax.eval_shape(step, state)


# ---- the root of adam -------------------------------------------------------------------------------------------------


def test_adam_on_a_network_with_a_dead_unit():
    """The gradient of a relu unit that is never active is exactly 0."""
    key = jax.random.key(0)
    data = Levels(*(jax.random.normal(k, (6, 3)) for k in jax.random.split(key)))

    def output(z, rows):
        return jax.nn.relu(rows @ z["w"] + z["b"][None]) @ z["out"]

    problem = Problem(
        inner=lambda z, x, rows: 0.5 * (output(z, rows) - rows.sum(-1)) ** 2 * jnp.exp(x),
        outer=lambda z, x, rows: 0.5 * (output(z, rows) - rows.sum(-1)) ** 2,
    )
    weights = jax.random.normal(key, (3, 4))
    z = {"w": weights, "b": jnp.array([0.0, 0.0, 0.0, -100.0]), "out": jnp.ones(4)}  # the last unit is dead
    start, found = Vars(z, None, jnp.zeros(())), {}
    for eps_root in (0.0, 1e-8):
        opts = Vars(inner=optax.adam(0.01, eps_root=eps_root), outer=optax.sgd(0.1))
        solver = solvers.itd_bio(problem, opts, inner_steps=3)
        found[eps_root], _ = run(solver, samplers.full(), start, data, key, steps=3)
    assert int(found[0.0].result) == Result.NONFINITE
    assert "eps_root" in Result.NONFINITE.message
    assert int(found[1e-8].result) == Result.SUCCESSFUL
    assert found[1e-8].state.vars.outer != 0.0
