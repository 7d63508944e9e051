"""What comes in: arrays are converted as `jax.numpy.asarray` does, anything else is refused by name and type."""

import types
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.sparse
from hypothesis import given, settings
from hypothesis import strategies as st

from bilevel_jax import (
    Batch,
    Levels,
    Problem,
    Vars,
    begin,
    checks,
    hypergrad,
    hypergradient,
    resume,
    run,
    run_long,
    samplers,
    solvers,
    stream,
)
from bilevel_jax.distributed import adbo, fednest, gossip, ring, simulate
from bilevel_jax.linear_solve import cg
from bilevel_jax.loop import several
from bilevel_jax.moreau import envelope, residual
from bilevel_jax.parallel import data_mesh, deal, place
from bilevel_jax.readers import from_arrays
from tests.tables import thinned

LONG = 10_000


def first(tree: Any) -> Any:
    return jax.tree.leaves(tree)[0]


#: z and x that are fine.
GOOD = (np.linspace(0.1, 0.9, 2), np.linspace(0.1, 0.9, 3))


def of_any(z: Any, x: Any, data: Any) -> Any:
    """Of every leaf of the variables, with one value a sample."""
    size = sum((leaf**2).sum() for leaf in jax.tree.leaves((z, x)))
    return (first(z).sum() * first(x).sum() - first(data).reshape(len(first(data)), -1).sum(1)) ** 2 + size


PROBLEM = Problem(of_any, of_any)
OPTS = Vars(*map(optax.sgd, (0.1, 0.1, 0.1)))
SOLVER = solvers.soba(PROBLEM, OPTS)
KEY = jax.random.key(0)


def good(*shape: int) -> np.ndarray:
    return np.linspace(0.1, 0.9, int(np.prod(shape))).reshape(shape)


def start(**changes: Any) -> Vars:
    return Vars(good(2), good(2), good(3))._replace(**changes)


def data(**changes: Any) -> Levels:
    return Levels(good(6, 2), good(4, 2))._replace(**changes)


def stacked(**changes: Any) -> Batch:
    return Batch(good(1, 3, 2), good(1, 3, 2))._replace(**changes)


def single(**changes: Any) -> Batch:
    return Batch(good(6, 2), good(4, 2))._replace(**changes)


def go(vars: Vars | None = None, rows: Levels | None = None) -> Any:
    return run(SOLVER, samplers.uniform(2), vars or start(), rows or data(), KEY, steps=2)[0].state.vars


@cache
def begun(wide: bool) -> tuple[Any, Any]:
    """A carry and a state, in float64 or float32, which `resume` and ``update`` go on from."""
    assert jax.enable_x64.value == wide
    return begin(SOLVER, samplers.uniform(2), start(), data(), KEY), SOLVER.init(start(), stacked())


def again(rows: Levels) -> Any:
    carry, _ = begun(jax.enable_x64.value)
    return resume(SOLVER, samplers.uniform(2), carry, rows, steps=2)[0].state.vars


def streamed(vars: Vars | None = None, batch: Batch | None = None) -> Any:
    return next(stream(SOLVER, vars or start(), [batch or stacked()]))[0].vars


def updated(**changes: Any) -> Any:
    _, state = begun(jax.enable_x64.value)
    return SOLVER.update(state, stacked(**changes)).vars


def at(z: Any = GOOD[0], x: Any = GOOD[1], batch: Batch | None = None, guess: Any = None) -> Any:
    value, gradient, stats = hypergradient(PROBLEM, hypergrad.implicit(cg(max_steps=2)))(z, x, batch or single(), guess)
    return value, gradient, stats.aux


def enveloped(z: Any = GOOD[0], x: Any = GOOD[1], batch: Batch | None = None, function: Any = envelope, **more: Any) -> Any:
    return function(PROBLEM, z, x, batch or single(), gamma=0.1, rate=0.01, max_steps=2, **more)


def agents(vars: Vars) -> Any:
    batch = Batch(good(1, 3, 2, 2), good(1, 3, 2, 2))
    solver = gossip(SOLVER, ring(3))
    return solver.update(solver.init(vars, batch), batch).vars


def clients(vars: Vars) -> Any:
    solver = fednest(
        PROBLEM, inner_rate=0.1, outer_rate=0.1, neumann_rate=0.1, local_steps=1, neumann_terms=2, random_terms=False
    )
    batch = jax.tree.map(lambda leaf: jnp.asarray(np.stack([leaf] * solver.draws)), Batch(good(3, 2, 2), good(3, 2, 2)))
    return solver.update(solver.init(vars._replace(aux=None), batch), batch).vars


def method(vars: Vars) -> Any:
    return adbo.adbo(PROBLEM, vars, adbo.Rates(*(0.1,) * 6), n_workers=2).init()


def simulated(rows: Levels) -> Any:
    machines = method_of_two()
    plan = simulate.schedule(
        simulate.Cluster(simulate.log_normal(0.03)), machines, steps=machines.cut_period, quorum=2, max_staleness=2
    )
    return simulate.simulate(machines, samplers.full(), plan, rows, KEY)[0].consensus_outer


def method_of_two() -> Any:
    return adbo.adbo(PROBLEM, start(), adbo.Rates(*(0.1,) * 6), n_workers=2, cut_period=2)


def read(rows: Levels) -> Any:
    return next(from_arrays(samplers.uniform(2), rows, KEY, draws=1)).inner


def hours(folder: Any, vars: Vars | None = None, rows: Levels | None = None) -> Any:
    return run_long(
        SOLVER, samplers.uniform(2), vars or start(), rows or data(), KEY, folder=folder, steps=2, every=1, save_every=2
    )


Call = Callable[[Any], Any]

#: Where variables enter: the name in the message -> a call with what is given there.
VARIABLES: dict[tuple[str, str], Call] = {
    **{("run", f"vars.{n}"): lambda v, n=n: go(start(**{n: v})) for n in Vars._fields},
    **{
        ("several", f"vars.{n}"): lambda v, n=n: several(SOLVER, 2).init(start(**{n: v}), stacked()) for n in ("inner", "outer")
    },
    **{("stream", f"start.{n}"): lambda v, n=n: streamed(start(**{n: v})) for n in Vars._fields},
    **{("gossip", f"vars.{n}"): lambda v, n=n: agents(start(**{n: v})) for n in Vars._fields},
    **{("fednest", f"vars.{n}"): lambda v, n=n: clients(start(**{n: v})) for n in ("inner", "outer")},
    **{("adbo", f"start.{n}"): lambda v, n=n: method(start(**{n: v})) for n in ("inner", "outer")},
    ("hypergradient", "z"): lambda v: at(z=v),
    ("hypergradient", "x"): lambda v: at(x=v),
    ("hypergradient", "guess"): lambda v: at(guess=v),
    ("envelope", "z"): lambda v: enveloped(z=v),
    ("envelope", "x"): lambda v: enveloped(x=v),
    ("residual", "x"): lambda v: enveloped(x=v, function=residual, multiplier=1.0),
    ("cg", "rhs"): lambda v: cg(max_steps=2).solve(lambda u: u, v),
}
#: Where data enter.
DATA: dict[tuple[str, str], Call] = {
    **{("run", f"data.{n}"): lambda v, n=n: go(rows=data(**{n: v})) for n in Levels._fields},
    **{("resume", f"data.{n}"): lambda v, n=n: again(data(**{n: v})) for n in Levels._fields},
    **{("stream", f"batches.{n}"): lambda v, n=n: streamed(batch=stacked(**{n: v})) for n in Levels._fields},
    **{("several", f"batches.{n}"): lambda v, n=n: several(SOLVER, 1).init(start(), stacked(**{n: v})) for n in Levels._fields},
    **{("update", f"batches.{n}"): lambda v, n=n: updated(**{n: v}) for n in Levels._fields},
    **{("hypergradient", f"batch.{n}"): lambda v, n=n: at(batch=single(**{n: v})) for n in Levels._fields},
    ("uniform", "data.inner"): lambda v: samplers.uniform(2).batches(data(inner=v), KEY, 0, 1),
    ("epochs", "data.outer"): lambda v: samplers.epochs(2).batches(data(outer=v), KEY, 0, 1),
    ("full", "data.inner"): lambda v: samplers.full().batches(data(inner=v), KEY, 0, 1),
    ("episodes", "data.inner"): lambda v: samplers.episodes(2, ways=2, shots=1, queries=1).batches(Levels(v), KEY, 0, 1),
    ("from_stream", "batches[0]"): lambda v: next(samplers.from_stream([single(inner=v)], draws=1)).inner,
    ("from_arrays", "data.inner"): lambda v: read(data(inner=v)),
    ("envelope", "batch.inner"): lambda v: enveloped(batch=single(inner=v)).value,
    ("place", "tree"): lambda v: place(v, data_mesh(1)),
    ("deal", "data.inner"): lambda v: deal(data(inner=v), 2, batch_size=2),
    ("simulate", "data.outer"): lambda v: simulated(Levels(good(2, 3, 2), v)),
}
PLACES = VARIABLES | DATA


def foreign(module: str, name: str) -> Any:
    """An object of another package, with the attributes of an array and text without end."""
    fields = {"__module__": module, "shape": (6, 2), "dtype": "float32", "ndim": 2, "__repr__": lambda self: "1.0, " * LONG}
    return type(name, (), fields)()


def masked() -> Any:
    return np.ma.array(np.ones(6), mask=[True] + [False] * 5)


#: What is not an array -> how it is called, and what the message advises.
STRANGE: dict[str, tuple[Callable[[], Any], str, str]] = {
    "data frame": (lambda: foreign("pandas", "DataFrame"), "a pandas DataFrame", ".to_numpy()"),
    "series": (lambda: foreign("pandas.core.series", "Series"), "a pandas Series", ".to_numpy()"),
    "torch": (lambda: foreign("torch", "Tensor"), "a torch Tensor", ".numpy()"),
    "sparse matrix": (lambda: scipy.sparse.csr_matrix(np.eye(6)), "a scipy csr_matrix", ".toarray()"),
    "sparse array": (lambda: scipy.sparse.coo_array(np.eye(6)), "a scipy coo_array", ".toarray()"),
    "list of floats": (lambda: [0.5] * LONG, "list", "jnp.asarray"),
    "list of lists": (lambda: [[1.0, 2.0]] * LONG, "list", "jnp.asarray"),
    "ragged lists": (lambda: [[1.0, 2.0], [3.0]], "list", "jnp.asarray"),
    "tuple of floats": (lambda: (0.5,) * LONG, "tuple", "jnp.asarray"),
    "list of text": (lambda: ["a" * LONG] * 3, "list", "jnp.asarray"),
    "text": (lambda: "a" * LONG, "str", "outside of the pytree"),
    "float": (lambda: 0.5, "float", "jnp.asarray"),
    "int": (lambda: 10**300, "int", "jnp.asarray"),
    "bool": (lambda: True, "bool", "jnp.asarray"),
    "objects": (lambda: np.array([{"a": "b" * LONG}] * 6), "ndarray of dtype object", "numbers"),
    "array of text": (lambda: np.array(["a", "b"]), "ndarray of dtype <U1", "numbers"),
    "dates": (lambda: np.array(["2020-01-01"], "M8[D]"), "ndarray of dtype datetime64[D]", "numbers"),
    "records": (lambda: np.zeros(6, [("a", float)]), "ndarray of dtype [('a', '<f8')]", "numbers"),
    "masked": (masked, "MaskedArray", ".filled("),
    "generator": (lambda: (i for i in range(3)), "generator", "outside of the pytree"),
    "function": (lambda: good, "function", "outside of the pytree"),
    "type": (lambda: np.float32, "type", "outside of the pytree"),
    "module": (lambda: types, "module", "outside of the pytree"),
}
#: Where in a pytree it stands, and its path there.
CONTAINERS: dict[str, tuple[Callable[[Any], Any], str]] = {
    "bare": (lambda leaf: leaf, ""),
    "dict": (lambda leaf: {"a": good(6, 2), "x": leaf}, "['x']"),
    "tuple": (lambda leaf: (good(6, 2), leaf), "[1]"),
    "nested": (lambda leaf: {"m": [good(6, 2), {"x": leaf}]}, "['m'][1]['x']"),
}


#: Where a Python number is a scalar among the data: functions of one point, which do not count samples.
NUMBERS = {place for place in DATA if place[1].startswith("batch.")}


def check_refusal(place: tuple[str, str], kind: str, container: str) -> None:
    (make, named, advice), (wrap, path) = STRANGE[kind], CONTAINERS[container]
    if place in NUMBERS and kind in ("float", "int", "bool"):
        return
    with pytest.raises(TypeError) as info:
        PLACES[place](wrap(make()))
    message = str(info.value)
    assert message.startswith(f"{place[1]}{path}: got {named}, expected an array: "), message
    assert advice in message
    assert len(message) < 400


@pytest.mark.parametrize("place", PLACES, ids=" ".join)
@given(case=st.tuples(st.sampled_from(list(STRANGE)), st.sampled_from(list(CONTAINERS))))
@settings(max_examples=30)
def test_what_is_not_an_array_is_refused(place, case):
    check_refusal(place, *case)


@pytest.mark.parametrize("kind", STRANGE)
def test_every_kind_is_refused_while_a_program_is_traced(kind):
    """As a variable and as data, in every container, and inside jit."""
    for container in CONTAINERS:
        for name in ("vars.outer", "data.inner"):
            jax.eval_shape(lambda name=name, container=container: check_refusal(("run", name), kind, container))


def test_a_later_batch_of_a_stream_is_refused_by_name():
    """The first one is looked at in ``init``; the compiled update takes the others, and refuses what it cannot."""
    for kind in ("sparse matrix", "text", "objects", "data frame"):
        made, (_, named, _) = stream(SOLVER, start(), [stacked(), stacked(outer=STRANGE[kind][0]())]), STRANGE[kind]
        next(made)
        with pytest.raises(TypeError) as info:
            next(made)
        assert str(info.value).startswith(f"batches.outer: got {named}, expected an array: ")


def test_a_real_data_frame_is_refused():
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame(np.ones((LONG, 2)))
    for value, named in ((frame, "a pandas DataFrame"), (frame[0], "a pandas Series")):
        for call in (lambda value=value: go(rows=data(inner=value)), lambda value=value: go(start(outer={"w": value}))):
            with pytest.raises(TypeError, match=rf": got {named}, expected an array: use .to_numpy\(\)$"):
                call()


def test_long_runs_refuse_before_they_make_a_folder(tmp_path):
    for changes, name in (({"vars": start(outer=[1.0])}, "vars.outer"), ({"rows": data(outer="text")}, "data.outer")):
        with pytest.raises(TypeError, match=f"^{name}: got "):
            hours(tmp_path / "run", **changes)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("place", VARIABLES, ids=" ".join)
def test_variables_are_floating(place):
    name = place[1].replace("start", "vars") if place[0] == "stream" else place[1]
    for leaf, says in (
        (np.arange(3), r"int64\[3\]"),
        (np.ones(3, bool), r"bool\[3\]"),
        (np.ones(3, complex), r"complex128\[3\]"),
    ):
        with pytest.raises(TypeError, match=rf"^{name}\['n'\]: got {says}, expected a floating-point array: .*(astype|parts)"):
            PLACES[place]({"m": good(3), "n": leaf})
    if place[1] not in ("guess", "vars.aux", "start.aux"):  # where None is what stands for no start
        for empty in (None, (), {"a": None}):
            with pytest.raises(TypeError, match=rf"^{name}: got .*, expected a pytree of floating-point arrays"):
                PLACES[place](empty)


@pytest.mark.parametrize(
    "place", [place for place in DATA if place[1].startswith("data") and place[0] not in ("simulate", "episodes")], ids=" ".join
)
def test_data_are_there(place):
    for empty in (None, (), {"a": None}):
        with pytest.raises(ValueError, match=rf"^{place[1]}: got .*, expected a pytree of arrays with samples"):
            PLACES[place](empty)


#: Places -> a value of the right shape there.
SHAPES = {"z": (2,), "guess": (2,), "rhs": (2,), "inner": (2,), "aux": (2,), "outer": (3,), "x": (3,)}
ROWS = {
    "run": (6, 2), "resume": (6, 2), "hypergradient": (6, 2), "stream": (1, 3, 2), "update": (1, 3, 2), "several": (1, 3, 2),
    "episodes": (3, 4, 2),
    "simulate": (2, 3, 2),
}  # fmt: skip


#: One place of every function by default: what it does with the others is the same.
FIRST = {name: (name, argument) for name, argument in reversed(PLACES)}


@thinned("place", PLACES, *FIRST.values(), ids=" ".join)
def test_float64_is_converted_as_asarray_does(place):
    """The same numbers come out as of what `jax.numpy.asarray` makes of it, and none of them in float64."""
    shape = SHAPES[place[1].split(".")[-1]] if place in VARIABLES else ROWS.get(place[0], (6, 2))
    with jax.enable_x64(False):
        narrow = jnp.asarray(good(*shape))
        assert narrow.dtype == jnp.float32
        found, wanted = PLACES[place](good(*shape)), PLACES[place](narrow)
    if place[0] != "deal":  # stays on the host, as it was
        assert jax.tree.map(jnp.result_type, found) == jax.tree.map(jnp.result_type, wanted)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        if not jnp.issubdtype(jnp.result_type(b), jax.dtypes.prng_key):
            np.testing.assert_array_equal(np.asarray(a, np.float32), np.asarray(b, np.float32))


def test_a_number_is_a_scalar_among_the_data_of_one_point():
    problem = Problem(*[lambda z, x, number: (z - number * x).sum() ** 2] * 2)
    both = [hypergradient(problem, hypergrad.t1_t2())(*[good(2)] * 2, Batch(n, n)) for n in (0.5, np.float64(0.5))]
    jax.tree.map(np.testing.assert_array_equal, *both)


def test_float64_stays_where_it_is_enabled():
    assert {leaf.dtype for leaf in jax.tree.leaves(jax.eval_shape(go))} == {np.dtype(np.float64)}


class Boxed:
    """What says of itself how to become an array."""

    def __jax_array__(self) -> jax.Array:
        return jnp.asarray(good(3))


def test_arrays_of_every_make_pass():
    for leaf in (good(3), jnp.ones(3), np.ones(3, jnp.bfloat16), np.float64(1.0), jnp.ones(()), Boxed()):
        checks.arrays("leaf", {"leaf": leaf})
        assert isinstance(checks.floating("leaf", leaf), jax.Array)
    for leaf in (jax.ShapeDtypeStruct((3,), jnp.float32), np.bool_(True), np.arange(3), jax.random.key(0)):
        checks.arrays("leaf", [leaf, None, (leaf,)])


def test_a_shape_alone_is_no_variable():
    with pytest.raises(TypeError, match=r"^vars.outer: got ShapeDtypeStruct, expected an array with values"):
        go(start(outer=jax.ShapeDtypeStruct((3,), jnp.float64)))


def test_a_flax_state_with_random_numbers_gets_advice():
    nnx = pytest.importorskip("flax.nnx")

    class Model(nnx.Module):
        def __init__(self, rngs: Any):
            self.drop, self.layer = nnx.Dropout(0.5, rngs=rngs), nnx.Linear(2, 3, param_dtype=jnp.float64, rngs=rngs)

    with jax.numpy_dtype_promotion("standard"):
        model = Model(nnx.Rngs(0))
    for state in (nnx.state(model), nnx.split(model)[1], model):
        with pytest.raises(TypeError, match=r"^vars.outer\S+: got .*nnx.split\(model, nnx.Param, \.\.\.\)$") as info:
            go(start(outer=state))
        assert len(str(info.value)) < 400
    _, params, _ = nnx.split(model, nnx.Param, ...)
    assert jax.eval_shape(lambda: go(start(outer=params))).outer["layer"]["kernel"].get_value().shape == (2, 3)


def test_a_loss_of_a_scalar_or_of_one_value_a_sample_stays():
    """Either is accepted at either level, and both are the same loss."""
    means = [lambda z, x, d: of_any(z, x, d).mean(), of_any]
    kinds = [Problem(inner, outer) for inner in means for outer in means]
    batch = jax.tree.map(jnp.asarray, single())
    found = jax.jit(lambda: [hypergradient(problem, hypergrad.t1_t2())(good(2), good(3), batch)[:2] for problem in kinds])()
    for other in found[1:]:
        jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-12), found[0], other)


def test_messages_stay_short_for_long_values():
    """Of whatever a parameter is given in place of a number, a name or an optimiser."""
    for value in ([0.5] * LONG, np.ones(LONG), "a" * LONG, {f"k{i}": i for i in range(LONG)}, foreign("pandas", "DataFrame")):
        calls = [
            lambda value=value: samplers.uniform(value),
            lambda value=value: samplers.uniform(2, remainder=value),
            lambda value=value: solvers.ma_soba(PROBLEM, OPTS, theta=value),
            lambda value=value: solvers.f2ba(PROBLEM, OPTS, multiplier=value),
            lambda value=value: solvers.default_opts(value, 0.1, 0.1, 0.1),
            lambda value=value: solvers.soba(PROBLEM, value),
            lambda value=value: solvers.aid_bio(PROBLEM, Vars(OPTS.inner, None, OPTS.outer), linear_solver=value),
            lambda value=value: run(SOLVER, samplers.full(), start(), data(), value, steps=1),
            lambda value=value: run(SOLVER, samplers.full(), value, data(), KEY, steps=1),
            lambda value=value: run(SOLVER, samplers.full(), start(), value, KEY, steps=1),
            lambda value=value: run(SOLVER, samplers.full(), start(), data(), KEY, steps=1, metrics=lambda v, d: [value]),
            lambda value=value: hypergradient(PROBLEM, value),
            lambda value=value: at(batch=value),
        ]
        for number, call in enumerate(calls):
            with pytest.raises((TypeError, ValueError)) as info:
                call()
            assert len(str(info.value)) < 400, (number, str(info.value)[:500])
