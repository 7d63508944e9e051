"""`implicit_root` and `implicit_fixed_point`: every structure, every mode, every way to give the arguments."""

import enum
import functools
import inspect
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bilevel_jax import implicit_diff, implicit_fixed_point, implicit_root
from bilevel_jax.linear_solve import cg

# ---- structures -------------------------------------------------------------------------------------------------------


class Structure(NamedTuple):
    """An optimality on trees: z has one leaf per entry of ``solution``, the parameters one per entry of ``params``.

    Row i of the optimality depends on the parameters in ``reach[i]`` only.
    """

    solution: tuple  # (shape, dtype) of each leaf
    params: tuple
    reach: tuple  # sets of indices of parameters, one per leaf of z
    moving: tuple  # indices of the parameters that are differentiated
    symmetric: bool
    none: bool  # whether None stands among the leaves of z and of the parameters
    seed: int


SHAPES = ((), (2,), (1, 2), (3,))
DTYPES = (np.float64, np.float64, np.float32)


@st.composite
def structures(draw: Any) -> Structure:
    leaf = st.tuples(st.sampled_from(SHAPES), st.sampled_from(DTYPES))
    solution, params = draw(st.lists(leaf, min_size=1, max_size=3)), draw(st.lists(leaf, min_size=1, max_size=3))
    every = st.sampled_from(range(len(params)))
    reach = [frozenset(draw(st.sets(every))) for _ in solution]
    moving = sorted(draw(st.sets(every, min_size=1)))
    return Structure(
        tuple(solution),
        tuple(params),
        tuple(reach),
        tuple(moving),
        draw(st.booleans()),
        draw(st.booleans()),
        draw(st.integers(0, 9)),
    )


def flat(tree: Any) -> Any:
    return jnp.concatenate([leaf.ravel().astype(jnp.float64) for leaf in jax.tree.leaves(tree)])


class Case:
    """The functions of a structure: the optimality on trees, a solver, and what does not change in between."""

    def __init__(self, s: Structure):
        rng = np.random.default_rng(s.seed)
        self.s = s
        sizes = [int(np.prod(shape)) for shape, _ in s.solution]
        n = sum(sizes)
        M = rng.normal(size=(n, n)) / n
        self.M = M @ M.T + np.eye(n) if s.symmetric else M + 2 * np.eye(n)
        self.N = [[rng.normal(size=(size, int(np.prod(shape)))) for shape, _ in s.params] for size in sizes]
        self.init = self.wrap([jnp.zeros(shape, dtype) for shape, dtype in s.solution])
        self.leaves = [jnp.asarray(rng.normal(size=shape), dtype) for shape, dtype in s.params]
        self.form = jax.tree.structure(self.init)
        #: Parameters that have no derivative, in every call: ints, bools, a key, and static values.
        self.count, self.mask, self.key = jnp.int32(2), jnp.array([True, False]), jax.random.key(0)

    def wrap(self, leaves: list) -> Any:
        tree = {"a": leaves[0], "rest": leaves[1:]}
        return tree | {"none": None} if self.s.none else tree

    def params(self, moving: list) -> Any:
        leaves = list(self.leaves)
        for index, value in zip(self.s.moving, moving, strict=True):
            leaves[index] = value
        return (leaves, None) if self.s.none else (leaves,)

    def optimality(self, z: Any, p: Any, count: Any, mask: Any, key: Any, power: str) -> Any:
        """``M z + 0.1 z^3 + N sin p``, in blocks; ``power`` says with a string that it is a cube."""
        assert power == "cube"
        del key
        leaves, u = p[0], flat(z)
        rows = self.M @ u + 0.1 * u**3
        scale = count.astype(jnp.float64) * jnp.where(mask, 0.5, 2.0)[0]
        found, start = [], 0
        for i, leaf in enumerate(jax.tree.leaves(z)):
            row = rows[start : start + leaf.size]
            for j in self.s.reach[i]:
                row = row + scale * self.N[i][j] @ jnp.sin(leaves[j].ravel().astype(jnp.float64))
            found.append(row.reshape(leaf.shape).astype(leaf.dtype))
            start += leaf.size
        return self.form.unflatten(found)

    def newton(self, z: Any, p: Any, steps: int) -> Any:
        """In float64, whatever the dtypes: differentiable, and exact to second order after a few steps at the solution."""
        rest = (self.count, self.mask, self.key, "cube")
        wide = jax.tree.map(lambda leaf: leaf.astype(jnp.float64), z)
        shape = lambda u: self.form.unflatten(
            [part.reshape(leaf.shape) for part, leaf in zip(split_like(u, jax.tree.leaves(z)), jax.tree.leaves(z), strict=True)]
        )
        F = lambda u: flat(self.optimality(shape(u), p, *rest))
        u = flat(wide)
        for _ in range(steps):
            u = u - jnp.linalg.solve(jax.jacfwd(F)(u), F(u))
        return shape(u)

    def solve(self, init: Any, p: Any, count: Any, mask: Any, key: Any, power: str) -> Any:
        del count, mask, key, power
        found = self.newton(init, p, 8)
        return jax.tree.map(lambda u, like: u.astype(like.dtype), found, init)


def split_like(u: Any, like: list) -> list:
    ends = np.cumsum([leaf.size for leaf in like])
    return [u[end - leaf.size : end] for end, leaf in zip(ends, like, strict=True)]


def modes(solution: Any, moving: list, along: list) -> dict[str, Any]:
    """Every derivative of a function from the moving parameters to a tree; of second order those of a number."""

    def number(moving: list) -> Any:
        return jnp.sum(jnp.cos(flat(solution(moving))))

    def pushed(f: Any) -> Any:
        return lambda m: jax.jvp(f, (m,), (along,))[1]

    def pulled(m: list) -> Any:
        return sum(jnp.vdot(a.astype(float), d.astype(float)) for a, d in zip(jax.grad(number)(m), along, strict=True))

    two = jax.tree.map(lambda leaf: jnp.stack([leaf, 0.5 * leaf]), moving)
    vector = lambda m: flat(solution(m))
    return {
        "jacrev": jax.jacrev(vector)(moving),
        "jacfwd": jax.jacfwd(vector)(moving),
        "forward over reverse": pushed(jax.grad(number))(moving),
        "reverse over reverse": jax.grad(pulled)(moving),
        "reverse over forward": jax.grad(pushed(number))(moving),
        "forward over forward": pushed(pushed(number))(moving),
        "hessian": jax.hessian(number)(moving),
        "mapped": jax.vmap(jax.grad(number))(two),
        "checkpointed": jax.grad(jax.checkpoint(number))(moving),
    }


def check_structure(s: Structure) -> None:
    case = Case(s)
    root = implicit_root(case.optimality, positive_definite=s.symmetric)(case.solve)
    rest = (case.count, case.mask, case.key, "cube")
    moving = [case.leaves[i] for i in s.moving]
    along = jax.tree.map(lambda leaf: jnp.full_like(leaf, 0.3), moving)

    def reference(moving: list) -> Any:
        p = case.params(moving)
        return case.newton(jax.lax.stop_gradient(case.newton(case.init, p, 8)), p, 3)

    @jax.jit
    def both(moving: list) -> Any:
        return [modes(f, moving, along) for f in (lambda m: root(case.init, case.params(m), *rest), reference)]

    single = any(dtype == np.float32 for _, dtype in s.solution + s.params)
    close = partial(np.testing.assert_allclose, rtol=2e-3 if single else 1e-9, atol=1e-4 if single else 1e-10)
    with jax.numpy_dtype_promotion("standard"):  # jax.jacfwd of several dtypes asks for it
        ours, expected = both(moving)
        eager = jax.grad(lambda m: jnp.sum(jnp.cos(flat(root(case.init, case.params(m), *rest)))))(moving)
    for mode in ours:
        jax.tree.map(partial(close, err_msg=mode), ours[mode], expected[mode])
    jax.tree.map(close, eager, expected["checkpointed"])


F64 = np.float64
#: A ridge with an intercept that is not penalised; nothing reached by what moves; a leaf that nothing reaches.
INTERCEPT = Structure((((3,), F64), ((), F64)), (((), F64), ((2,), F64)), (frozenset({0}), frozenset()), (0,), True, True, 0)
UNREACHED = Structure((((2,), F64),), (((), F64), ((2,), F64)), (frozenset({0}),), (1,), False, False, 1)
MIXED = Structure(
    (((), F64), ((2,), np.float32)), (((1, 2), F64), ((), np.float32)), (frozenset({1}), frozenset()), (0, 1), False, True, 2
)


@pytest.mark.parametrize("s", [INTERCEPT, *(pytest.param(s, marks=pytest.mark.more) for s in (UNREACHED, MIXED))])
def test_structures_whose_leaves_do_not_depend_on_what_moves(s):
    check_structure(s)


@pytest.mark.more
@settings(max_examples=6)
@given(structures())
def test_derivatives_on_any_structure(s):
    """Against the differentiated Newton steps of the dense system in float64."""
    check_structure(s)


@pytest.mark.slow
@settings(max_examples=60, derandomize=False)
@given(structures())
def test_derivatives_on_many_structures(s):
    check_structure(s)


def test_constrained_problems():
    """The conditions of Karush, Kuhn and Tucker, with constraints that do not depend on what is differentiated."""
    Q, B = np.diag([1.0, 2.0, 3.0]), np.ones((1, 3))
    K = np.block([[Q, B.T], [B, np.zeros((1, 1))]])
    optimality = lambda s, t: (Q @ s[0] - t + B.T @ s[1], B @ s[0] - 1.0)

    @implicit_root(optimality)
    def solve(init, t):
        s = jnp.linalg.solve(K, jnp.concatenate([t, jnp.ones(1)]))
        return s[:3], s[3:]

    point = lambda t: solve((jnp.zeros(3), jnp.zeros(1)), t)
    ours = jax.jit(lambda t: [jacobian(point)(t) for jacobian in (jax.jacrev, jax.jacfwd)])(jnp.ones(3))
    for primal, dual in ours:
        np.testing.assert_allclose(np.vstack([primal, dual]), np.linalg.inv(K)[:, :3], atol=1e-12)


# ---- arguments --------------------------------------------------------------------------------------------------------


class Kind(enum.Enum):
    PLAIN = 0
    DOUBLED = 1


def root_of(z: Any, a: Any, b: Any) -> Any:
    """The solution is a / b."""
    return b * z - a


def start_first(init, a, b):
    return a / b + 0 * init


def other_order(init, b, a):
    return a / b + 0 * init


def without_init(a, b):
    return a / b


def without_init_in_other_order(b, a):
    return a / b


def with_names(init, **params):
    return params["a"] / params["b"] + 0 * init


def with_rest(init, *params):
    return params[0] / params[1] + 0 * init


def named_only(init, *, a, b):
    return a / b + 0 * init


def with_option(init, a, b, steps=3):
    return a / b + 0 * init * steps


def with_named_option(init, a, *, b, steps=3):
    return a / b + 0 * init * steps


def with_other_names(start, first, second):
    return first / second + 0 * start


def one_fixed(init, a, b=2.0):
    return a / b + 0 * init


START, A, B = np.float64(0.5), np.float64(3.0), np.float64(2.0)
#: A solver, and the arguments of a call that solves 2 z = 3.
CALLS = [
    (start_first, (START, A, B), {}),
    (start_first, (START, A), {"b": B}),
    (start_first, (START,), {"b": B, "a": A}),
    (start_first, (), {"b": B, "init": START, "a": A}),
    (other_order, (START, B, A), {}),
    (other_order, (START,), {"a": A, "b": B}),
    (without_init, (A, B), {}),
    (without_init, (A,), {"b": B}),
    (without_init, (), {"b": B, "a": A}),
    (without_init_in_other_order, (B, A), {}),
    (with_names, (START,), {"b": B, "a": A}),
    (with_names, (), {"b": B, "init": START, "a": A}),
    (with_rest, (START, A, B), {}),
    (with_rest, (START, A), {"b": B}),
    (with_rest, (), {"b": B, "init": START, "a": A}),
    (named_only, (START,), {"b": B, "a": A}),
    (with_option, (START, A, B), {}),
    (with_option, (START, A, B, 5), {}),
    (with_option, (START, A), {"steps": 4, "b": B}),
    (with_named_option, (START, A), {"steps": 4, "b": B}),
    (with_other_names, (START, A, B), {}),
    (with_other_names, (START,), {"second": B, "first": A}),
    (one_fixed, (START, A), {}),
]


@pytest.mark.parametrize(("solve", "args", "kwargs"), CALLS)
def test_arguments_by_position_and_by_name(solve, args, kwargs):
    """The values, and the derivatives in a and b, whichever way they are given."""
    root = implicit_root(root_of)(solve)
    step = implicit_fixed_point(lambda z, a, b: z - 0.1 * root_of(z, a, b))(solve)
    assert inspect.signature(root) == inspect.signature(solve)

    def shifted(shifts):
        shift = lambda value: value + (shifts[0] if value is A else shifts[1] if value is B else 0)
        args_, kwargs_ = [shift(v) for v in args], {k: shift(v) for k, v in kwargs.items()}
        return jnp.stack([decorated(*args_, **kwargs_) for decorated in (root, step)])

    value, slopes = jax.jit(lambda s: (shifted(s), jax.jacrev(shifted)(s)))(jnp.zeros(2))
    np.testing.assert_allclose(value, 1.5)
    expected = [0.5, -0.75 if any(v is B for v in (*args, *kwargs.values())) else 0.0]
    np.testing.assert_allclose(slopes, [expected] * 2, atol=1e-12)


def unrolled(init, a, steps=20, fast=True):
    """Its options decide what is traced."""
    for _ in range(steps if fast else 0):
        init = init - (init**3 + init - a) / (3 * init**2 + 1)
    return init


def cubic(z, a):
    return z**3 + z - a


#: An optimality, a solver and the arguments of a call, whose solution is 1, with the derivative 1/4 in the number 2.
DEFAULTS = [
    (cubic, unrolled, (1.0, 2.0), {}),
    (cubic, unrolled, (1.0, 2.0, 15), {}),
    (cubic, unrolled, (1.0, 2.0), {"steps": 15}),
    (lambda z, other: cubic(z, other), unrolled, (1.0, 2.0, 15), {}),
    (lambda z, other: cubic(z, other), unrolled, (1.0, 2.0), {"steps": 15}),
    (lambda z, other, c=1.0: z**3 + c * z - other, lambda start, a: unrolled(start, a), (1.0, 2.0), {}),
    (lambda z, other: cubic(z, other), lambda a, steps=20: unrolled(1.0, a, steps), (2.0,), {}),
    (cubic, lambda a, start=1.0: unrolled(start, a), (2.0,), {}),
    (lambda z, a, /: cubic(z, a), unrolled, (1.0, 2.0), {}),
    (lambda z, **named: cubic(z, named["a"]), unrolled, (1.0, 2.0), {}),
]


@pytest.mark.parametrize(("optimality", "solve", "args", "kwargs"), DEFAULTS)
def test_options_of_the_solver_and_of_the_optimality(optimality, solve, args, kwargs):
    """Those that are not given are not traced; those that the other one lacks do not reach it."""
    root = implicit_root(optimality)(solve)
    call = lambda t: root(*(t if v == 2.0 else v for v in args[:2]), *args[2:], **kwargs)
    value, slope = jax.jit(jax.value_and_grad(call))(2.0)
    np.testing.assert_allclose((value, slope), (1.0, 0.25), atol=1e-9)


def test_parameters_that_are_not_differentiated_are_constants():
    """So that they may be numbers of which no derivative exists."""
    optimality = lambda z, t, tolerance: cg(max_steps=9, rtol=tolerance).solve(lambda u: 2 * u, z - t)[0]
    root = implicit_root(optimality)(lambda init, t, tolerance: t)
    np.testing.assert_allclose(jax.grad(lambda t: root(t, t, 1e-9).sum())(jnp.ones(2)), 1.0)


def test_arguments_that_do_not_fit_are_refused():
    """Before anything is computed, and with a name."""
    root = implicit_root(root_of)(start_first)
    for call, message in (
        (lambda: root(START, A), "missing a required argument: 'b'"),
        (lambda: root(START, A, B, B), "too many positional arguments"),
        (lambda: root(START, A, c=B), "unexpected keyword|missing a required"),
        (lambda: implicit_root(lambda z, a: z - a)(start_first)(START, A, B), "optimality: too many positional arguments"),
        (lambda: implicit_root(root_of)(lambda init, a: a)(START, A), "optimality: missing a required argument"),
        (lambda: root(START, A, np.array(["text"])), "b: got an array of dtype <U4, expected an array of numbers"),
        (lambda: root(START, A, {"c": [B, bytearray(2)]}), r"b\['c'\]\[1\]: got bytearray, expected an array"),
    ):
        with pytest.raises(TypeError, match=message):
            call()


def test_static_parameters():
    """Strings, functions and enums: by value, without a derivative, compiled once a value."""
    traces = []

    def optimality(z, a, kind, function):
        traces.append(1)
        return z - function(a) * (2.0 if kind is Kind.DOUBLED else 1.0)

    root = implicit_root(optimality)(lambda init, a, kind, function: function(a) * (2.0 if kind is Kind.DOUBLED else 1.0))
    slope = jax.grad(root, argnums=1)
    assert float(slope(START, A, Kind.PLAIN, jnp.sin)) == pytest.approx(np.cos(3))
    count = len(traces)
    assert float(slope(START, A + 1, Kind.PLAIN, jnp.sin)) == pytest.approx(np.cos(4))
    assert len(traces) == count
    assert float(slope(START, A, kind=Kind.DOUBLED, function=jnp.cos)) == pytest.approx(-2 * np.sin(3))
    assert float(jax.jit(jax.hessian(root, argnums=1), static_argnums=(2, 3))(START, A, Kind.PLAIN, jnp.sin)) == pytest.approx(
        -np.sin(3)
    )


def test_rules_as_functions_take_static_and_integer_parameters():
    optimality = lambda z, a, count, kind: z - a * count.astype(float) * (2.0 if kind == "doubled" else 1.0)
    params, z = (A, jnp.int32(3), "doubled"), np.float64(18.0)
    (slope, of_count, of_kind), _ = implicit_diff.root_vjp(optimality, z, params, jnp.ones(()))
    along, _ = implicit_diff.root_jvp(optimality, z, params, (jnp.ones(()), 0, None))
    assert float(slope) == float(along) == 6.0
    assert of_count.dtype == jax.dtypes.float0
    assert of_kind is None


# ---- the tests of jaxopt, restated ------------------------------------------------------------------------------------

#: Its names on ours.
custom_root, custom_fixed_point = implicit_root, implicit_fixed_point
their_vjp = lambda optimality_fun, sol, args, cotangent: implicit_diff.root_vjp(optimality_fun, sol, args, cotangent)[0]
their_jvp = lambda optimality_fun, sol, args, tangents: implicit_diff.root_jvp(optimality_fun, sol, args, tangents)[0]


def objective(params, lam, X, y):
    return 0.5 * jnp.mean((X @ params - y) ** 2) + 0.5 * lam * jnp.sum(params**2)


def by_position(init_params, lam, X, y):
    del init_params
    return jnp.linalg.solve(X.T @ X + lam * len(y) * jnp.eye(X.shape[1]), X.T @ y)


def by_name(init_params, **named):
    return by_position(init_params, named["lam"], named["X"], named["y"])


def with_aux(init_params, lam, X, y):
    return by_position(init_params, lam, X, y), None


LAM = 5.0
ROWS = {"X": np.random.default_rng(0).normal(size=(10, 3)), "y": np.random.default_rng(1).normal(size=10)}
DECORATED = {
    "custom_root": (lambda: custom_root(jax.grad(objective))(by_position), ("lam", "X", "y")),
    "has_aux": (lambda: custom_root(jax.grad(objective), has_aux=True)(with_aux), ("lam", "X", "y")),
    "custom_fixed_point": (
        lambda: custom_fixed_point(lambda params, lam, X, y: params - jax.grad(objective)(params, lam, X, y))(by_position),
        ("lam", "X", "y"),
    ),
    "custom_fixed_point with a copied signature": (
        lambda: custom_fixed_point(
            functools.wraps(objective)(lambda params, *args: params - jax.grad(objective)(params, *args))
        )(by_position),
        ("lam", "X", "y"),
    ),
    "names": (lambda: custom_root(jax.grad(objective))(by_name), ("lam", "X", "y")),
    "names in another order": (lambda: custom_root(jax.grad(objective))(by_name), ("X", "lam", "y")),
}


def ridge_slope() -> Any:
    return jax.jit(jax.jacfwd(by_position, argnums=1))(None, LAM, **ROWS)


@pytest.mark.parametrize("name", DECORATED)
def test_decorators_of_jaxopt(name):
    """A start of None, a Python float that is differentiated, arrays by name, eagerly and compiled."""
    make, order = DECORATED[name]
    solve = make()

    def call(lam):
        values = {"lam": lam, **ROWS}
        return solve(None, **{key: values[key] for key in order})

    first = (lambda out: out[0]) if name == "has_aux" else (lambda out: out)
    np.testing.assert_allclose(first(call(LAM)), by_position(None, LAM, **ROWS), rtol=1e-12)
    np.testing.assert_allclose(first(jax.jit(call)(LAM)), by_position(None, LAM, **ROWS), rtol=1e-12)
    np.testing.assert_allclose(first(jax.jacrev(call)(LAM)), ridge_slope(), rtol=1e-9)
    if not name.startswith("names"):
        np.testing.assert_allclose(first(jax.jacrev(solve, argnums=1)(None, LAM, **ROWS)), ridge_slope(), rtol=1e-9)


def test_rules_of_jaxopt():
    args, solution = (LAM, ROWS["X"], ROWS["y"]), by_position(None, LAM, **ROWS)
    pull = lambda g: their_vjp(optimality_fun=jax.grad(objective), sol=solution, args=args, cotangent=g)[0]
    tangents = (1.0, np.zeros((10, 3)), np.zeros(10))
    pushed = their_jvp(optimality_fun=jax.grad(objective), sol=solution, args=args, tangents=tangents)
    np.testing.assert_allclose(jax.jit(jax.vmap(pull))(jnp.eye(3)), ridge_slope(), rtol=1e-9)
    np.testing.assert_allclose(pushed, ridge_slope(), rtol=1e-9)


def test_integer_and_boolean_parameters_have_no_derivative():
    @implicit_root(lambda z, a, k, m: z - a * k.astype(float) * jnp.where(m, 1.0, 0.0), solver=cg(max_steps=3))
    def solve(init, a, k, m):
        return a * k.astype(float) * jnp.where(m, 1.0, 0.0)

    k, m = jnp.array([1, 2]), jnp.array([True, False])
    slope = jax.jacrev(solve, argnums=1)(jnp.zeros(2), jnp.ones(2), k, m)
    np.testing.assert_array_equal(slope, np.diag([1.0, 0.0]))
    of_k = jax.grad(lambda k: solve(jnp.zeros(2), jnp.ones(2), k, m).sum(), allow_int=True)(k)
    assert of_k.dtype == jax.dtypes.float0
