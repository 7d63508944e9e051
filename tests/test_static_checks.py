"""What `init` sees in the losses before anything runs: what they depend on, what they broadcast, and swapped arguments."""

import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from bilevel_jax import Batch, Levels, Problem, Vars, nonsmooth, run, samplers, solvers, sweep, unroll
from bilevel_jax.inspection import depends, uses
from bilevel_jax.oracles import losses
from bilevel_jax.projections import proximal_sgd
from tests.tables import build, every_kind, tiny, tiny_sampler, tiny_start

#: Rows whose z, or y, moves along f, too.
ALONG_F = {"meha", "f2sa_p", "bome", "bvfim", "bvfsm", "sl_bamm", "bda"}

INNER, OUTER = tiny().problem


def begin(name: str, problem: Problem) -> Any:
    solver = build(name, problem)
    batches = jax.eval_shape(lambda: tiny_sampler().batches(tiny().data, jax.random.key(0), 0, solver.draws))
    state = jax.eval_shape(lambda vars: solver.init(vars, batches), tiny_start(name))
    return solver, state, batches


def said(call: Callable[[], Any]) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call()
    return [str(warning.message) for warning in caught]


@every_kind
def test_losses_without_x_are_refused(name):
    problem = Problem(lambda z, x, s: INNER(z, 1.0, s), lambda z, x, s: OUTER(z, 1.0, s))
    with pytest.raises(
        ValueError, match=r"(^problem: got losses that do not depend on x|^truncate: got 0.*does not depend on x)"
    ):
        begin(name, problem)


@every_kind
def test_an_outer_loss_of_neither_variable_is_refused(name):
    with pytest.raises(ValueError, match=r"(^problem.outer: got a loss that depends on neither z nor x|^truncate: got 0)"):
        begin(name, Problem(INNER, lambda z, x, s: s**2))


@every_kind
def test_an_outer_loss_without_z_is_warned_of_once(name):
    """In ``init``, however many stages there are, and not when the update is traced, again and again."""
    problem = Problem(INNER, lambda z, x, s: (x - s) ** 2)
    made = []
    messages = said(lambda: made.append(begin(name, problem)))
    assert [text.split(",")[0] for text in messages] == ["problem.outer: got a loss that does not depend on z"]
    (solver, state, batches), *_ = made
    for _ in range(2):
        jax.eval_shape(lambda state, batches: solver.update(state, batches), state, batches)  # warnings are errors here


@every_kind
def test_an_inner_loss_without_z(name):
    """Refused where z moves along its gradient alone."""
    problem = Problem(lambda z, x, s: (x - s[0]) ** 2, OUTER)
    says = "problem.inner: got a loss that does not depend on z"
    if name in ALONG_F:
        assert [text.split(",")[0] for text in said(lambda: begin(name, problem))] == [says]
    else:
        with pytest.raises(ValueError, match=f"(?m)^{says}.*: z would never move$"):
            begin(name, problem)


@every_kind
def test_swapped_arguments_are_noted(name):
    """On z of two entries and x of three, where the shapes show it."""
    problem = Problem(
        lambda x, z, a: ((z[None] - a) ** 2).sum(1) + x.sum() * z.sum(), lambda z, x, b: ((z[None] - b) ** 2).sum(1) + x.sum()
    )
    solver = build(name, problem)
    rows = Levels(jnp.ones((4, 2)), jnp.ones((4, 2)))
    with pytest.raises((TypeError, ValueError)) as info:
        jax.eval_shape(
            lambda: solver.init(
                Vars(jnp.ones(2), None, jnp.ones(3)), samplers.full().batches(rows, jax.random.key(0), 0, solver.draws)
            )
        )
    notes = [note for note in info.value.__notes__ if "can be evaluated at" in note]
    assert notes == [
        "problem.inner can be evaluated at (x, z, data): are its arguments, the variables or data swapped?",
    ]


Z, X, DATA, OTHER = np.ones(2), np.ones(3), np.ones((5, 2)), np.ones((5, 4))  # float64, as the tests are


def of(z: Any, x: Any, data: Any) -> Any:
    return ((z[None] - data) ** 2).sum(1) + (x * jnp.arange(3.0)).sum()


#: A loss that cannot be evaluated as it is -> where it can be, as the note says.
SWAPPED: dict[str, tuple[Any, str | None]] = {
    "x first": (lambda x, z, data: of(z, x, data), "(x, z, data)"),
    "data first": (lambda data, z, x: of(z, x, data), "(data, z, x)"),
    "data second": (lambda z, data, x: of(z, x, data), "(z, data, x)"),
    "all turned": (lambda data, x, z: of(z, x, data), "(data, x, z)"),
    "turned the other way": (lambda x, data, z: of(z, x, data), "(x, data, z)"),
    "data of the other level": (
        lambda z, x, data: ((data @ jnp.ones(4)) * z.sum()) ** 2 + x.sum(),
        "(z, x, data) with the data of the outer level",
    ),
    "wrong in every order": (lambda z, x, data: data @ jnp.ones(7), None),
    "values of another length": (lambda z, x, data: z * x.sum() * data.sum(), None),
}


@pytest.mark.parametrize("name", SWAPPED)
@pytest.mark.parametrize("traced", [False, True])
def test_notes_say_where_a_loss_can_be_evaluated(name, traced):
    loss, way = SWAPPED[name]
    g, _ = losses(Problem(loss, of))
    slope = jax.jit(jax.grad(g)) if traced else jax.grad(g)
    with pytest.raises((TypeError, ValueError)) as info:
        slope(Z, X, Batch(inner=DATA, outer=OTHER))
    found = [note for note in info.value.__notes__ if "can be evaluated at" in note]
    assert found == (
        [] if way is None else [f"problem.inner can be evaluated at {way}: are its arguments, the variables or data swapped?"]
    )


def test_no_note_where_shapes_do_not_show_it():
    """A scalar loss that lacks only its values a sample is no swapped one, and neither is one that fails for another reason."""
    g, _ = losses(Problem(lambda z, x, data: (z * x).sum() ** 2, of))
    with pytest.raises(ValueError, match="got a scalar loss") as info:
        g(Z, Z, Batch(inner=DATA, weight=Levels(jnp.ones(5) / 5)))
    assert not any("can be evaluated at" in note for note in getattr(info.value, "__notes__", ()))


# ---- variables of shape (1,) ------------------------------------------------------------------------------------------

ONE, ROWS = {"b": np.full(1, 0.5), "w": np.ones(3)}, np.ones((8, 3))

#: A loss of z = {"b": (1,), "w": (3,)} on 8 rows of 3 -> whether b is broadcast against them.
STRETCHED: dict[str, tuple[Callable[[Any, Any], Any], bool]] = {
    "a bias": (lambda z, a: (a @ z["w"] + z["b"]) ** 2, True),
    "a difference": (lambda z, a: (z["b"] - a[:, 0]) ** 2, True),
    "a scale": (lambda z, a: jnp.exp(z["b"]) * a[:, 0] + z["w"].sum(), True),
    "a choice": (lambda z, a: jnp.where(a[:, 0] > 0, z["b"], a[:, 1]), True),
    "in a jitted part": (lambda z, a: jax.jit(lambda b: b * a[:, 0])(z["b"]), True),
    "in a checkpoint": (lambda z, a: jax.checkpoint(lambda b: b * a[:, 0])(z["b"]), True),
    "broadcast_to": (lambda z, a: jnp.broadcast_to(z["b"], (len(a),)) * a[:, 0], True),
    "an entry": (lambda z, a: z["b"][0] * a[:, 0], False),
    "a sum": (lambda z, a: z["b"].sum() * a[:, 0], False),
    "a reshape": (lambda z, a: z["b"].reshape(()) * a[:, 0], False),
    "a product of matrices": (lambda z, a: a[:, :1] @ z["b"], False),
    "a feature": (lambda z, a: ((z["b"][None] - a[:, :1]) ** 2).sum(1), False),
    "one row at a time": (lambda z, a: jax.vmap(lambda row: ((z["b"] - row[0]) ** 2).sum())(a), False),
    "along features": (lambda z, a: (a * (z["b"] * z["w"])[None]).sum(1), False),
    "as many as there are rows, by chance": (lambda z, a: (jnp.ones(8) * z["b"]).sum() * a[:, 0], False),
    "a part of a longer one": (lambda z, a: jnp.concatenate([z["b"], jnp.ones(7)]).sum() * a[:, 0], False),
    "only on so many rows": (lambda z, a: z["b"] * a[:, 0] * jnp.ones(8), False),
}


@pytest.mark.parametrize("level", ["inner", "outer"])
@pytest.mark.parametrize("name", STRETCHED)
def test_a_variable_that_is_broadcast_against_samples(name, level):
    loss, stretched = STRETCHED[name]
    fine = lambda z, x, a: ((z["w"][None] - a) ** 2).sum(1) + x.sum() * z["b"].sum()
    tried = lambda z, x, a: loss(z, a) + x.sum() * z["w"].sum()
    problem = Problem(**{"inner": fine, "outer": fine} | {level: tried})
    solver = solvers.soba(problem, Vars(*[optax.sgd(0.1)] * 3))
    messages = said(
        lambda: jax.eval_shape(
            lambda: run(solver, samplers.full(), Vars(ONE, None, X), Levels(ROWS, ROWS), jax.random.key(0), steps=1)
        )
    )
    expected = (
        f"vars.inner['b']: got the shape (1,), which problem.{level} broadcasts against its 8 samples, expected the shape () "
        "for one number that all samples share"
    )
    assert messages == [expected] * stretched


def test_one_sample_is_no_broadcast():
    problem = Problem(*[lambda z, x, a: (z - a) ** 2 + x] * 2)
    solver = solvers.soba(problem, Vars(*[optax.sgd(0.1)] * 3))
    for rows in (jnp.ones(1), None):
        batch = Batch(jnp.ones((1, 1)) if rows is None else rows[None], jnp.ones((1, 1)))
        assert said(lambda batch=batch: solver.init(Vars(jnp.ones(1), None, jnp.ones(1)), batch)) == []


# ---- what counts as dependence ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit, jax.checkpoint, lambda f: jax.jit(jax.checkpoint(jax.jit(f)))])
def test_dependence_is_seen_through_compiled_parts(wrap):
    loss = wrap(lambda z, x, a: ((z["u"] * a) ** 2).sum())
    assert uses(loss, {"u": jnp.ones(2), "w": None}, jnp.ones(3), jnp.ones(2)) == [True, False, True]
    assert depends(jax.vmap(loss), {"u": jnp.ones((4, 2)), "w": None}, jnp.ones((4, 3)), jnp.ones((4, 2)))


def test_what_is_unused_in_a_jitted_loss_is_reported():
    problem = Problem(INNER, jax.jit(lambda z, x, s: (x - s) ** 2))
    assert [m.split(",")[0] for m in said(lambda: begin("soba", problem))] == [
        "problem.outer: got a loss that does not depend on z"
    ]


def test_x_may_enter_by_a_start():
    """As in meta-learning: x is where the path begins, and stands in neither loss."""
    problem = Problem(lambda z, x, s: INNER(z, 1.0, s), lambda z, x, s: (z - s) ** 2)
    solver = sweep(unroll(problem, Vars(inner=optax.sgd(0.1), outer=optax.sgd(0.1)), 2, start=lambda vars: vars.outer))
    assert said(lambda: run(solver, samplers.full(), tiny().start, tiny().data, jax.random.key(0), steps=1)) == []


def weighted_l1() -> nonsmooth.Nonsmooth:
    return nonsmooth.l1(weights=lambda x: jnp.exp(x))


@pytest.mark.parametrize("name", ["itd_bio", "meha"])
def test_x_may_enter_by_a_nonsmooth_term(name):
    """Its weight is the hyperparameter; the smooth losses do not see it."""
    problem, term = Problem(lambda z, x, s: INNER(z, 1.0, s), lambda z, x, s: (z - s) ** 2), weighted_l1()
    step = proximal_sgd(0.1, term)
    made = {
        "itd_bio": lambda: solvers.itd_bio(problem, Vars(inner=step, outer=optax.sgd(0.1)), inner_steps=2),
        "meha": lambda: solvers.meha(problem, Vars(step, step, optax.sgd(0.1)), gamma=1.0, nonsmooth=term),
    }
    start = tiny().start._replace(aux=None)
    assert (
        said(lambda: jax.eval_shape(lambda: run(made[name](), samplers.full(), start, tiny().data, jax.random.key(0), steps=1)))
        == []
    )


@every_kind
def test_healthy_losses_say_nothing(name):
    begin(name, tiny().problem)  # warnings are errors here
    begin(name, Problem(INNER, lambda z, x, s: (z - s) ** 2) if name != "fo_itd_bio" else tiny().problem)  # x by the inner one


@pytest.mark.parametrize("name", ["saba", "itd_bio", "meha"])
def test_checks_leave_nothing_in_the_program(name, monkeypatch):
    """`init` makes the same program with the checks of the losses as without them."""
    solver, _, batches = begin(name, tiny().problem)
    checked = str(jax.make_jaxpr(solver.init)(tiny_start(name), batches))
    monkeypatch.setattr("bilevel_jax.oracles.check_uses", lambda *given: None)
    monkeypatch.setattr("bilevel_jax.oracles.warn_stretched", lambda *given: None)
    monkeypatch.setattr("bilevel_jax.oracles.uses", lambda *given: [False] * 3)
    assert str(jax.make_jaxpr(solver.init)(tiny_start(name), batches)) == checked
