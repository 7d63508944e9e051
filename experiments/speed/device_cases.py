"""What `experiments.speed.devices` times: updates of solvers, what they cannot do without, and floors written by hand."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from bilevel_jax import Batch, BilevelState, Problem, Solver, Vars, begin, linear_solve, resume, samplers, solvers
from bilevel_jax.results import spent
from bilevel_jax.samplers import Sampler, blocks
from bilevel_jax.types import Array, Cost, PyTree
from experiments.speed import meta_cases
from experiments.speed.cases import lenient
from experiments.speed.shapes import SHAPES, Shape, Sizes
from experiments.speed.steps import SOLVERS, floor, tables_of
from experiments.speed.timing import Built, Program, build, size_bytes

INNER_STEPS, TERMS = 5, 5  # of AID-CG: D and N
GAMMA, MULTIPLIER = 1.0, 10.0  # of MEHA
#: Products with the rows of an inner and an outer batch that an update cannot do without: two (there and back) for a gradient,
#: and two more for a Hessian-vector product at the same point, from which the cross product comes, too.
PRODUCTS = {"soba": (4, 2), "saba": (4, 2), "srba": (8, 4), "aid_cg": (2 * INNER_STEPS + 2, 2), "meha": (5, 2)}
FLOORS = {"soba": "floor", "saba": "floor", "srba": "floor", "aid_cg": "floor of aid_cg", "meha": "floor of meha"}


class Size(NamedTuple):
    """The data of a case, and rows of a batch."""

    sizes: Sizes
    batch: int


class Work(NamedTuple):
    """Of one update."""

    flop: float
    bytes: float  # nan: not counted
    how: str
    xla_flop: float = float("nan")  # what XLA says of the compiled update, where it holds no loop


class Entry(NamedTuple):
    """A program to time.  ``work`` is asked for after it has run."""

    program: Program
    built: Built
    work: Callable[[Any], Work] | None = None  # of the carry at the end; None: a floor
    floor: str = ""


def linear(kind: str, size: Size, names: tuple[str, ...]) -> dict[str, Entry]:
    """The solvers on a linear model (``ijcnn1``: one output, bound by memory; ``cleaning``: classes, bound by products)."""
    shape = SHAPES[kind](size.sizes)
    counts = [blocks(rows, size.batch) for rows in (size.sizes.inner, size.sizes.outer)]
    shape = shape._replace(period=max(1, sum(counts) // 2))
    uniform, full, chunk = samplers.uniform(size.batch), samplers.full(), 4 * shape.period
    on_batches = [name for name in names if FLOORS.get(name) == "floor"]
    found = {"floor": looped(floor(shape.problem, shape.rates), uniform, shape, chunk)} if on_batches else {}
    for name in names:
        if name in on_batches:
            solver = SOLVERS[name](shape)
            found[name] = looped(solver, uniform, shape, chunk, partial(products, name, shape, size, solver), "floor")
        elif name in PRODUCTS:
            solver, by_hand = deterministic(name, shape)
            found[FLOORS[name]] = looped(by_hand, full, shape, 2)
            found[name] = looped(solver, full, shape, 2, partial(products, name, shape, size, solver), FLOORS[name])
    return found


def looped(
    solver: Solver, sampler: Sampler, shape: Shape, steps: int, work: Callable[[Any], Work] | None = None, floor: str = ""
) -> Entry:
    """Several updates as one scan, with a donated carry."""
    carry = begin(solver, sampler, shape.start, shape.data, jax.random.key(1))
    built = build(jax.jit(partial(resume, solver, sampler, steps=steps), donate_argnums=0), carry, shape.data)
    return Entry(Program(lambda carry: built.call(carry, shape.data)[0], carry, steps), built, work, floor)


def products(name: str, shape: Shape, size: Size, solver: Solver, carry: Any) -> Work:
    """By hand: `PRODUCTS`, each of which reads its rows once; and reading and writing of variables and of rows of tables."""
    own, classes = size.sizes, size.sizes.classes if shape.name == "cleaning" else 1
    whole = name in ("aid_cg", "meha")
    read = (own.inner, own.outer) if whole else (size.batch, size.batch)
    products = PRODUCTS[name]
    if name == "aid_cg":  # conjugate gradients may stop early: what was applied is counted in the state
        products = (products[0] + 2 * float(spent(solver, carry.state).hessian_vector) / int(carry.state.step), products[1])
    rows = sum(count * n for count, n in zip(products, read, strict=True))
    if name == "srba":  # one update in a period is a pass over all rows instead
        rows += (4 * own.inner + 2 * own.outer - rows) / shape.period
    slots = sum(leaf.nbytes / leaf.shape[0] for leaf in tables_of(carry.state))
    moved = 4 * rows * own.features + 2 * (slots + size_bytes(carry.state.vars))
    flop = 2 * rows * own.features * classes
    return Work(flop, moved, "by hand", xla_flop(solver, shape, size) if name in ("soba", "saba") else float("nan"))


def xla_flop(solver: Solver, shape: Shape, size: Size) -> float:
    """XLA's count for one update without a loop: of a loop, it counts the body once."""
    batch = samplers.uniform(size.batch).batches(shape.data, jax.random.key(0), 0, 1)._replace(full=None)
    state = solver.init(shape.start, batch)
    return counted(solver.update, state, batch)


def counted(function: Callable[..., Any], *args: Any) -> float:
    """Floating-point operations of a function, as XLA counts them; nan where a device does not say."""
    analysis = jax.jit(function).lower(*args).compile().cost_analysis()
    return float((analysis or {}).get("flops", float("nan")))


def deterministic(name: str, shape: Shape) -> tuple[Solver, Solver]:
    """AID-CG or MEHA on all the data, and the same by hand."""
    a, _, x = shape.rates
    if name == "meha":
        opts = Vars(*map(optax.sgd, shape.rates))
        made = solvers.meha(shape.problem, opts, gamma=GAMMA, c_low=MULTIPLIER, p=0.0)
        return made, by_hand(shape, meha_by_hand)
    opts = Vars(inner=optax.sgd(a), outer=optax.sgd(x))
    # No tolerance, so that both take all their steps.
    made = solvers.aid_bio(
        shape.problem, opts, inner_steps=INNER_STEPS, linear_solver=linear_solve.cg(max_steps=TERMS, rtol=0.0)
    )
    return made, by_hand(shape, aid_by_hand)


def by_hand(shape: Shape, step: Callable[[Any, Any, Vars, Vars], Vars]) -> Solver:
    """A solver from ``(g, f, vars, rates) -> vars``, without oracles, stages and optax."""

    def init(vars: Vars, batches: Batch) -> BilevelState:
        del batches
        vars = Vars(vars.inner, jnp.zeros_like(vars.inner), vars.outer)
        return BilevelState(jnp.zeros((), jnp.int32), jax.tree.map(jnp.copy, vars), ())

    def update(state: BilevelState, batches: Batch) -> BilevelState:
        draw = jax.tree.map(lambda leaf: leaf[0], batches._replace(full=None))

        def g(z: Array, x: Array) -> Array:
            return shape.problem.inner(z, x, draw.inner).mean()

        def f(z: Array, x: Array) -> Array:
            return shape.problem.outer(z, x, draw.outer).mean()

        return BilevelState(state.step + 1, step(g, f, state.vars, shape.rates), ())

    return Solver(init, update, 1, Cost())


def aid_by_hand(g: Any, f: Any, vars: Vars, rates: Vars) -> Vars:
    """Gradient steps on z, conjugate gradients on v, a step on x."""
    z, v, x = vars
    z = jax.lax.fori_loop(0, INNER_STEPS, lambda _, z: z - rates.inner * jax.grad(g)(z, x), z)
    hessian = jax.linearize(lambda z: jax.grad(g)(z, x), z)[1]
    fz, fx = jax.grad(f, argnums=(0, 1))(z, x)
    v = conjugate(hessian, -fz, v)
    cross = jax.grad(lambda x: jax.jvp(lambda z: g(z, x), (z,), (v,))[1])(x)
    return Vars(z, v, x - rates.outer * (cross + fx))


def conjugate(matvec: Callable[[Array], Array], rhs: Array, v: Array) -> Array:
    """Conjugate gradients, all the steps: at the solution, too, where they stand still."""
    tiny = jnp.finfo(rhs.dtype).tiny

    def step(_: Any, carry: tuple[Array, Array, Array, Array]) -> tuple[Array, Array, Array, Array]:
        v, residual, direction, norm = carry
        image = matvec(direction)
        length = norm / jnp.maximum(jnp.vdot(direction, image), tiny)
        residual = residual - length * image
        new = jnp.vdot(residual, residual)
        return v + length * direction, residual, residual + new / jnp.maximum(norm, tiny) * direction, new

    residual = rhs - matvec(v)
    return jax.lax.fori_loop(0, TERMS, step, (v, residual, residual, jnp.vdot(residual, residual)))[0]


def meha_by_hand(g: Any, f: Any, vars: Vars, rates: Vars) -> Vars:
    """Steps on theta, x and z."""
    z, theta, x = vars
    theta = theta - rates.aux * (jax.grad(g)(theta, x) + (theta - z) / GAMMA)
    x = x - rates.outer * jax.grad(lambda x: f(z, x) / MULTIPLIER + g(z, x) - g(theta, x))(x)
    dz = jax.grad(lambda z: f(z, x) / MULTIPLIER + g(z, x))(z)
    return Vars(z - rates.inner * (dz - (z - theta) / GAMMA), theta, x)


def maml(sizes: meta_cases.Sizes) -> dict[str, Entry]:
    """An update of MAML on two convolutions, all tasks at once on an accelerator, and by hand."""
    model = meta_cases.network("convolution", sizes)
    loss = meta_cases.loss_of(model)
    tasks = jax.tree.map(jnp.asarray, meta_cases.draw_tasks(sizes))
    batch = Batch(*jax.tree.map(lambda leaf: leaf[None], tasks))
    opts = Vars(inner=optax.sgd(meta_cases.RATE), outer=optax.sgd(1e-3))
    solver = solvers.maml(Problem(loss, loss), opts, inner_steps=sizes.steps)

    def path(params: PyTree, support: Any, query: Any) -> Array:
        z = params
        for _ in range(sizes.steps):
            z = jax.tree.map(lambda a, b: a - meta_cases.RATE * b, z, jax.grad(loss)(z, None, support))
        return loss(z, None, query)

    def by_hand(params: PyTree, batch: Batch) -> PyTree:
        tasks = jax.tree.map(lambda leaf: leaf[0], (batch.inner, batch.outer))
        slope = jax.grad(lambda params: jax.vmap(path, in_axes=(None, 0, 0))(params, *tasks).mean())(params)
        return jax.tree.map(lambda a, b: a - 1e-3 * b, params, slope)

    def work(carry: Any) -> Work:
        del carry
        one = [jax.tree.map(lambda leaf: leaf[0], level) for level in tasks]
        support, query = (counted(lambda z, data: lenient(jax.grad(loss))(z, None, data), model.params, data) for data in one)
        # a Hessian-vector product, there and back through a gradient, is two gradients
        flop = sizes.tasks * (3 * sizes.steps * support + query)
        return Work(flop, float("nan"), "XLA's, of gradients of a task")

    def entry(function: Any, carry: Any, work: Any = None, floor: str = "") -> Entry:
        built = build(jax.jit(lenient(function), donate_argnums=0), carry, batch)
        return Entry(Program(lambda carry: built.call(carry, batch), carry, 1), built, work, floor)

    return {
        "floor of maml": entry(by_hand, jax.tree.map(jnp.copy, model.params)),
        "maml": entry(solver.update, solver.init(Vars(outer=model.params), batch), work, "floor of maml"),
    }
