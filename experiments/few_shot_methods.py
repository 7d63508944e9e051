"""The meta-learning methods of `experiments.few_shot`: their settings, and how each is built and tested."""

from collections.abc import Callable
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from bilevel_jax import BilevelState, Levels, Problem, Solver, Vars, solvers
from bilevel_jax.hypergrad import path
from bilevel_jax.samplers import Plan, Sampler
from bilevel_jax.tasks import merge, select
from bilevel_jax.types import Array, Batch, PyTree
from experiments.networks import Model

Name = Literal["maml", "anil", "imaml", "fomaml", "reptile", "meha", "itd_bio", "fo_itd_bio"]
Dataset = Literal["digits", "omniglot", "sinusoid", "mini_imagenet", "fc100"]
AXIS = "cores"  # the tasks of a batch are shared among devices along it


class Rates(NamedTuple):
    """Of one method."""

    inner: float  # step size of the inner steps, or of z and theta
    steps: int  # inner steps; of meha: updates on the same batch of tasks
    outer: float  # of Adam
    test_steps: int = 0  # inner steps at test time, 0: as many as in training
    updates: int | None = None  # if not those of the setting


class Setting(NamedTuple):
    """Of one data set."""

    ways: int
    shots: int
    queries: int  # of each class, in training
    tasks: int  # of a batch
    updates: int
    rates: dict[str, Rates]
    features: int = 32
    pool: bool = False  # pooling in place of strides
    cosine: bool = True  # Adam's step size decays to 0
    multiplier: tuple[float, float] = (1.0, 0.1)  # c_low and p of meha
    gamma: float = 1000.0  # of meha
    strength: float = 0.5  # of imaml


SMALL = {
    "maml": Rates(0.4, 1, 3e-3, 3),
    "anil": Rates(0.4, 5, 3e-3),
    "imaml": Rates(0.1, 10, 3e-3),
    "fomaml": Rates(0.1, 5, 3e-3),
    "reptile": Rates(0.1, 5, 3e-3),
    "meha": Rates(0.4, 10, 3e-3),
    "itd_bio": Rates(0.4, 5, 3e-3),
    "fo_itd_bio": Rates(0.4, 5, 3e-3),
}

SETTINGS: dict[str, dict[str, Setting]] = {
    "laptop": {
        "digits": Setting(5, 1, 5, 16, 600, SMALL),
        "omniglot": Setting(5, 1, 5, 16, 2400, SMALL),
        "sinusoid": Setting(1, 10, 10, 25, 2000, {
            "maml": Rates(0.01, 5, 1e-3, 10),
            "anil": Rates(0.01, 5, 1e-3, 10),
            "imaml": Rates(0.01, 10, 1e-3),
            "fomaml": Rates(0.01, 5, 1e-3, 10),
            "reptile": Rates(0.01, 10, 1e-3),
            "meha": Rates(0.01, 10, 1e-3),
        }),
    },
    # The code beside the thesis: 5-way 5-shot, half of twice as many images adapts.  Its MAML divides the mean loss by the
    # number of support images, 25, once more: the inner steps here are its own divided by that.
    "thesis": {
        "mini_imagenet": Setting(5, 5, 5, 32, 2000, {
            "maml": Rates(0.01 / 25, 5, 3e-3, updates=1200),
            "anil": Rates(0.05, 10, 2e-3),
            "itd_bio": Rates(0.05, 10, 2e-3),
            "fo_itd_bio": Rates(0.05, 10, 2e-3, updates=3000),
        }, 32, pool=True, cosine=False),
        "fc100": Setting(5, 5, 5, 32, 1500, {
            "maml": Rates(0.5 / 25, 3, 1e-3, updates=1200),
            "anil": Rates(0.1, 20, 1e-3, updates=1000),
            "itd_bio": Rates(0.1, 20, 1e-3),
            "fo_itd_bio": Rates(0.1, 20, 1e-3),
        }, 64, pool=True, cosine=False),
    },
    # 10-way 1-shot; z is tested by ten steps from zero.
    "meha": {
        "omniglot": Setting(10, 1, 15, 16, 2000, {
            "meha": Rates(0.1, 10, 1e-2, 10),
            "maml": Rates(0.4, 1, 1e-3, 3),
            "anil": Rates(0.1, 10, 1e-2, 10),
        }, 64, pool=True, cosine=False, multiplier=(5.0, 0.1)),
    },
}  # fmt: skip


class Method(NamedTuple):
    """A solver, where it starts, how many draws in a row are of the same tasks, and how a task is met at test time."""

    solver: Solver
    start: Vars
    hold: int
    adapt: Callable[[Vars, PyTree], PyTree]  # variables and support data to the parameters of the whole network


def head(path: str) -> bool:
    """What ANIL adapts."""
    return "'head'" in path


def body(path: str) -> bool:
    """The rest."""
    return not head(path)


def build(
    name: Name,
    loss: Callable[[PyTree, PyTree], Array],
    model: Model,
    setting: Setting,
    *,
    loop: str = "auto",
    shared: int = 1,
    inner_steps: int | None = None,
) -> Method:
    """The method of a name.

    Args:
        name: of it.
        loss: of one task, ``(params, data) -> scalar``.
        model: where the parameters start.
        setting: its numbers.
        loop: over the tasks: see `bilevel_jax.tasks.over_tasks`.
        shared: devices that share the tasks, along the axis ``AXIS`` of an enclosing ``shard_map``.
        inner_steps: in place of the setting's, at test time too.
    """
    if name not in setting.rates:
        raise ValueError(f"name: got {name!r}, expected one with rates in the setting: {', '.join(setting.rates)}")
    rates = setting.rates[name]
    if inner_steps is not None:
        rates = rates._replace(steps=inner_steps, test_steps=0)
    updates, steps = rates.updates or setting.updates, rates.steps
    decay = optax.cosine_decay_schedule(rates.outer, updates) if setting.cosine else rates.outer
    outer = optax.adam(decay)
    if shared > 1:
        outer = optax.chain(optax.stateless(lambda way, _: lax.pmean(way, AXIS)), outer)
    inner = optax.sgd(rates.inner)
    opts, params = Vars(inner=inner, outer=outer), model.params
    problem = Problem(lambda z, x, data: loss(z, data), lambda z, x, data: loss(z, data))
    ahead = path(inner, rates.test_steps or steps, truncate=0)

    def follow(z: PyTree, x: PyTree, support: PyTree, pull: float = 0.0) -> PyTree:
        def value(z: PyTree) -> Array:
            away = jax.tree.map(lambda a, b: ((a - b) ** 2).sum(), z, x) if pull else ()
            return loss(merge(z, x), support) + pull / 2 * sum(jax.tree.leaves(away))

        return merge(ahead(lambda z, x, k: jax.grad(value)(z), z, x), x)

    match name:
        case "maml" | "fomaml" | "reptile":
            make = {"maml": solvers.maml, "fomaml": solvers.fomaml, "reptile": solvers.reptile}[name]
            solver = make(problem, opts, inner_steps=steps, loop=loop)
            return Method(solver, Vars(outer=params), 1, lambda vars, data: follow(vars.outer, vars.outer, data))
        case "imaml":
            solver = solvers.imaml(problem, opts, strength=setting.strength, inner_steps=steps, loop=loop)
            strength = setting.strength
            return Method(solver, Vars(outer=params), 1, lambda vars, data: follow(vars.outer, vars.outer, data, strength))
        case "anil":
            solver = solvers.anil(problem, opts, adapted=head, inner_steps=steps, loop=loop)
            return Method(solver, Vars(outer=params), 1, lambda vars, data: follow(select(vars.outer, head), vars.outer, data))
        case "itd_bio" | "fo_itd_bio":
            solver = solvers.anil(
                problem, opts, adapted=head, inner_steps=steps, learn_start=False, first_order=name == "fo_itd_bio", loop=loop
            )
            start = Vars(aux=select(params, head), outer=params)
            return Method(solver, start, 1, lambda vars, data: follow(vars.aux, vars.outer, data))
        case "meha":
            stacked = setting.tasks // shared
            z = jax.tree.map(lambda leaf: jnp.zeros((stacked, *leaf.shape), leaf.dtype), select(params, head))
            first = Vars(inner=z, aux=z, outer=select(params, body))
            c_low, p = setting.multiplier
            opts = Vars(inner=inner, aux=inner, outer=outer)
            solver = solvers.meha(heads(loss), opts, gamma=setting.gamma, c_low=c_low, p=p)
            zero = jax.tree.map(lambda leaf: leaf[0], z)
            return Method(
                restarted(solver, z, steps), first, steps * solver.draws, lambda vars, data: follow(zero, vars.outer, data)
            )


def heads(loss: Callable[[PyTree, PyTree], Array]) -> Problem:
    """Hyper-representation: x the body that all tasks share, z their heads, stacked; both losses are sums over the tasks."""

    def total(z: PyTree, x: PyTree, data: PyTree) -> Array:
        return jax.vmap(lambda one, task: loss(merge(one, x), task))(z, data).sum()

    return Problem(total, total)


def restarted(solver: Solver, z: PyTree, every: int) -> Solver:
    """The solver with z and aux started at ``z`` again every so many updates, when the tasks are new ones."""

    def update(state: BilevelState, batches: Batch) -> BilevelState:
        def fresh(tree: PyTree) -> PyTree:
            return jax.tree.map(lambda old, new: jnp.where(state.step % every == 0, new, old), tree, z)

        vars = state.vars
        return solver.update(state._replace(vars=Vars(fresh(vars.inner), fresh(vars.aux), vars.outer)), batches)

    return solver._replace(update=update)


def held(sampler: Sampler, draws: int) -> Sampler:
    """The sampler with every draw repeated so many times in a row."""

    def plan(data: Levels, key: Array, start: Array | int, count: int) -> Plan:
        first = start // draws
        distinct = sampler.plan(data, key, first, count // draws + 2)
        index = (start + jnp.arange(count, dtype=jnp.int32)) // draws - first
        return jax.tree.map(lambda leaf: leaf[index], distinct)

    return sampler._replace(plan=plan) if draws > 1 else sampler


def apart(sampler: Sampler) -> Sampler:
    """The sampler with draws of its own on every device along ``AXIS``."""

    def gather(data: Levels, plan: Plan) -> Batch:
        return sampler.gather(data, plan._replace(key=jax.random.fold_in(plan.key, lax.axis_index(AXIS))))

    return sampler._replace(gather=gather)
