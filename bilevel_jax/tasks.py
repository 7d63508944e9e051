"""Many tasks under one outer variable: every task adapts by itself, and x moves along the mean of their gradients.

A draw holds a batch of tasks: the leaves of ``batch.inner`` (support) and ``batch.outer`` (query) have a leading axis of tasks.
The losses are those of one task.  How the tasks are looped over is a switch, because it is worth a factor of ten (see
`over_tasks`), and changes nothing else.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from bilevel_jax import checks
from bilevel_jax.control_flow import scan
from bilevel_jax.hypergrad import bind, path
from bilevel_jax.hypergrad import implicit as by_linear_solve
from bilevel_jax.linear_solve import LinearSolver, cg
from bilevel_jax.optimisers import begin, moved
from bilevel_jax.oracles import DrawLoss, losses
from bilevel_jax.results import Status
from bilevel_jax.samplers import take_draw
from bilevel_jax.trees import narrow, widen
from bilevel_jax.types import Array, Batch, Calls, Cost, Problem, PyTree, Stage, Vars

#: Whether the leaf at a path of a parameter pytree (its key string, as ``['head']['kernel']``) is adapted.
Predicate = Callable[[str], bool]


class Adapted(NamedTuple):
    """What a task has to say: its adapted z, the derivative in x of its query loss, and a result code."""

    inner: PyTree
    gradient: PyTree  # like x
    code: Array  # int32 []


class Adaptation(NamedTuple):
    """``at(vars, draw) -> Adapted`` of one task, and its oracle calls."""

    at: Callable[[Vars, Batch], Adapted]
    calls: Calls


def through_steps(
    problem: Problem,
    opt: optax.GradientTransformation,
    steps: int,
    *,
    start: Callable[[Vars], PyTree],
    first_order: bool = False,
    scale: Callable[[PyTree, PyTree], PyTree] | None = None,
    checkpoint: str = "step",
) -> Adaptation:
    """``steps`` inner steps on the support data, and the derivative of the query loss through them: MAML, ANIL, ITD-BiO.

    Args:
        problem: the losses of one task.  Dropout and other randomness come in as keys among the data; batch statistics
            are those of the batch (train mode, no running averages), or leaves of x that the loss reads.
        opt: inner optimiser, started anew for every task.  Give adam and its relatives an ``eps_root`` above 0, as
            ``optax.adam(rate, eps_root=1e-8)``: without it the derivative is NaN where an entry of a gradient is 0.
        steps: inner steps N.
        start: where z starts, a function of the variables: ``vars.outer`` for MAML, a part of it for ANIL.
        first_order: whether the inner gradients count as constants: the derivative of z_N in its start is then the identity
            (for sgd), and x has no influence on the path but through the start, and through ``scale``.
        scale: ``(gradient, x) -> direction`` of the inner steps, for rates that are learned as a part of x.
        checkpoint: what the backward pass recomputes: see `bilevel_jax.hypergrad.iterative`.

    Raises:
        TypeError, ValueError: for counts out of range, and anything but a ``Problem`` and an optimiser.

    Cost of a task: N inner gradients, N Hessian-vector and N cross products (none if first order), one outer gradient pair.
    """
    g, f = _of_one_task(problem)
    checks.transformation("opt", opt)
    follow = path(opt, steps, checkpoint=checkpoint)

    def at(vars: Vars, draw: Batch) -> Adapted:
        def slope(z: PyTree, x: PyTree, k: Array) -> PyTree:
            del k
            way = jax.grad(g)(z, x, draw)
            way = lax.stop_gradient(way) if first_order else way
            return way if scale is None else scale(way, x)

        def loss(z: PyTree, x: PyTree, k: Array) -> Array:
            del k
            return g(z, x, draw)

        def outcome(x: PyTree) -> tuple[Array, PyTree]:
            z = follow(slope, start(vars._replace(outer=x)), x, loss=loss if scale is None and not first_order else None)
            return f(z, x, draw), z

        gradient, z = jax.grad(outcome, has_aux=True)(vars.outer)
        return Adapted(z, gradient, jnp.zeros((), jnp.int32))

    second = 0.0 if first_order else float(steps)
    return Adaptation(at, Calls(float(steps), second, second, 1.0))


def proximal(
    problem: Problem,
    opt: optax.GradientTransformation,
    steps: int,
    *,
    strength: float,
    solver: LinearSolver | None = None,
) -> Adaptation:
    """iMAML: steps on ``g + strength |z - x|^2 / 2`` from x, then ``(I + H / strength)^-1 d_z f`` by a linear solver.

    Exact only where the inner problem is solved: take enough steps.

    Args:
        problem: the losses of one task, z like x.
        opt, steps: inner optimiser and steps.
        strength: of the pull towards x, above the weak convexity of g.
        solver: by default five steps of conjugate gradients.

    Raises:
        TypeError, ValueError: for numbers out of range, and anything but a ``Problem`` and an optimiser.

    Cost of a task: N + 1 inner gradients, the applications of the solver and one more Hessian-vector products, one cross
    product, one outer gradient pair.

    Reference: Rajeswaran, Finn, Kakade, Levine, "Meta-learning with implicit gradients", NeurIPS 2019, arXiv 1909.04630.
    """
    _of_one_task(problem)
    checks.transformation("opt", opt)
    checks.positive("strength", strength)
    follow = path(opt, steps, backward=False)
    solver = cg(max_steps=5) if solver is None else solver

    def inner(z: PyTree, x: PyTree, data: PyTree) -> Array:
        loss = problem.inner(z, x, data)
        squares = jax.tree.map(lambda a, b: ((a - b) ** 2).sum().astype(loss.dtype), z, x)
        return loss + strength / 2 * sum(jax.tree.leaves(squares))

    pulled = Problem(inner, problem.outer)
    gradient = by_linear_solve(solver)

    def at(vars: Vars, draw: Batch) -> Adapted:
        loss, x = bind(pulled, draw), vars.outer
        z = follow(lambda z, x, k: jax.grad(loss.g)(z, x), x, x, loss=lambda z, x, k: loss.g(z, x))
        _, way, stats = gradient(loss, z, x, None, draw.key)
        return Adapted(z, way, stats.code)

    return Adaptation(at, Calls(float(steps) + 1, solver.applications + 1, 1.0, 1.0))


def displacement(problem: Problem, opt: optax.GradientTransformation, steps: int) -> Adaptation:
    """Reptile: ``x - z_N`` in place of a gradient; the query data must be there, as for all, but are not used.

    Args:
        problem: the losses of one task, z like x.
        opt, steps: inner optimiser and steps.

    Raises:
        TypeError, ValueError: for counts out of range, and anything but a ``Problem`` and an optimiser.

    Cost of a task: N inner gradients.

    Reference: Nichol, Achiam, Schulman, "On first-order meta-learning algorithms", 2018, arXiv 1803.02999.
    """
    g, _ = _of_one_task(problem)
    checks.transformation("opt", opt)
    follow = path(opt, steps, backward=False)

    def at(vars: Vars, draw: Batch) -> Adapted:
        x = vars.outer
        z = follow(lambda z, x, k: jax.grad(g)(z, x, draw), x, x, loss=lambda z, x, k: g(z, x, draw))
        return Adapted(z, jax.tree.map(jnp.subtract, x, z), jnp.zeros((), jnp.int32))

    return Adaptation(at, Calls(inner_gradient=float(steps)))


# ---- parts of a parameter pytree --------------------------------------------------------------------------------------


def select(params: PyTree, adapted: Predicate) -> PyTree:
    """The leaves at whose path the predicate holds, None in place of the others.

    Raises:
        ValueError: if it holds for none of them, or for all.

    Example:
        >>> select({"body": jnp.ones(2), "head": jnp.zeros(1)}, lambda path: "head" in path)["body"] is None
        True
    """
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)]
    held = [path for path in paths if adapted(path)]
    if len(held) in (0, len(paths)):
        what = "none" if not held else "all"
        raise ValueError(f"adapted: got a predicate that holds for {what} of the leaves, expected some of {', '.join(paths)}")
    return jax.tree_util.tree_map_with_path(lambda path, leaf: leaf if adapted(jax.tree_util.keystr(path)) else None, params)


def merge(part: PyTree, whole: PyTree) -> PyTree:
    """``whole`` with the leaves of ``part``, where that is not None: the way back from `select`."""
    return jax.tree.map(lambda a, b: b if a is None else a, part, whole, is_leaf=lambda leaf: leaf is None)


# ---- the loop ---------------------------------------------------------------------------------------------------------

LOOPS = ("auto", "vmap", "map", "scan", "unrolled")


class TasksState(NamedTuple):
    """What `over_tasks` keeps."""

    opt: PyTree  # optax state of x
    status: Status  # the worst code of all tasks so far


def over_tasks(adaptation: Adaptation, opt: optax.GradientTransformation, *, loop: str = "auto") -> Stage:
    """Step x along the mean over the tasks of a draw of their gradients.

    Args:
        adaptation: `through_steps`, `proximal`, `displacement`, or your own.
        opt: optimiser of x.
        loop: how the tasks are looped over; all give the same step up to rounding.  ``"vmap"`` is for accelerators: one program
            on all tasks at once.  On a CPU it makes grouped convolutions of those with different weights, ten times slower;
            ``"scan"`` takes the tasks one after the other, gradient inside the loop, and holds one of them in
            memory.  ``"map"`` is a scan that stacks what the tasks say before it is averaged; ``"unrolled"`` writes the tasks
            out, and compiles for as long.  ``"auto"`` is scan on a CPU, vmap elsewhere.

    Returns:
        A stage of one draw.  ``vars.inner`` becomes the adapted z of the last task of the draw.

    Raises:
        TypeError, ValueError: for anything but an ``Adaptation`` and an optimiser, another loop, and (in ``init``) for draws
            without one common number of tasks.

    Cost: that of the adaptation for every task of a draw.  It is declared for one draw, as those of all stages: a draw is a
    batch of tasks.
    """
    if not isinstance(adaptation, Adaptation):
        raise TypeError(f"adaptation: got {type(adaptation).__name__}, expected an Adaptation")
    checks.transformation("opt", opt)
    if loop not in LOOPS:
        raise ValueError(f"loop: got {checks.shown(loop)}, expected one of {', '.join(LOOPS)}")

    def every(vars: Vars, draw: Batch) -> Adapted:
        """The last z, the mean gradient, and the worst code."""
        count = _tasks(draw)
        keys = None if draw.key is None else jax.random.split(draw.key, count)
        tasks = Batch(inner=draw.inner, outer=draw.outer, key=keys)
        kind = ("scan" if jax.default_backend() == "cpu" else "vmap") if loop == "auto" else loop

        def one(task: Batch) -> Adapted:
            return adaptation.at(vars, task)

        if kind == "scan":
            shape = jax.eval_shape(one, take_draw(tasks, 0))
            blank = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shape)
            blank = blank._replace(gradient=widen(blank.gradient))

            def body(held: Adapted, task: Batch) -> tuple[Adapted, None]:
                new = one(task)
                summed = jax.tree.map(jnp.add, held.gradient, widen(new.gradient))
                return Adapted(new.inner, summed, jnp.maximum(held.code, new.code)), None

            held, _ = scan(body, blank, tasks)
            mean = jax.tree.map(lambda leaf: leaf / count, held.gradient)
            return held._replace(gradient=narrow(mean, shape.gradient))
        if kind == "unrolled":
            found = [one(take_draw(tasks, i)) for i in range(count)]
            stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *found)
        else:
            stacked = jax.vmap(one)(tasks) if kind == "vmap" else lax.map(one, tasks)
        last = jax.tree.map(lambda leaf: leaf[-1], stacked.inner)
        return Adapted(last, jax.tree.map(lambda leaf: leaf.mean(0), stacked.gradient), stacked.code.max())

    def init(vars: Vars, batches: Batch) -> TasksState:
        if batches.outer is None:
            raise ValueError("batch.outer: got None, expected the query data of the tasks")
        if jax.tree.leaves(batches.weight):
            raise ValueError("batch.weight: got row weights, expected None: every task counts the same")
        adapted = jax.eval_shape(lambda b: every(vars, take_draw(b, 0)), batches).inner
        checks.same_shapes("vars.inner", vars.inner, adapted, "the adapted z")
        opt_state = begin("opt", "outer", opt, vars.outer, vars.outer, loss=False, backward=False)
        return TasksState(opt_state, Status(jnp.zeros((), jnp.int32)))

    def update(state: TasksState, vars: Vars, batches: Batch, step: Array) -> tuple[Vars, TasksState]:
        del step
        found = every(vars, take_draw(batches, 0))
        x, opt_state = moved(opt, found.gradient, state.opt, vars.outer, vars.outer)
        code = jnp.maximum(state.status.code, found.code)
        return Vars(found.inner, vars.aux, x), TasksState(opt_state, Status(code))

    return Stage(init, update, 1, Cost(draw=adaptation.calls), lazy=True)


def _of_one_task(problem: Problem) -> tuple[DrawLoss, DrawLoss]:
    """The losses; refuses those of `bilevel_jax.parallel`, that average over devices: the inner steps of a task are its own."""
    axis = getattr(problem.inner, "axis", None) if isinstance(problem, Problem) else None
    if axis is not None:
        raise ValueError(
            f"problem: got losses that average over the devices of the axis {axis!r}, expected those of one task: lay the "
            "tasks over the devices with bilevel_jax.parallel.place"
        )
    return losses(problem)


def _tasks(draw: Batch) -> int:
    """The number of tasks of a draw."""
    count = checks.rows("batch.inner", draw.inner)
    if checks.rows("batch.outer", draw.outer) != count:
        raise ValueError(
            f"batch.outer: got {checks.rows('batch.outer', draw.outer)} tasks, expected {count}, as in batch.inner"
        )
    return count
