"""Few-shot learning: what a network learns from many small tasks, measured on tasks of classes that it has never seen.

``python -m experiments.few_shot --dataset omniglot --ways 5 --shots 1 --solvers maml anil --out results/omniglot``

A task has some classes, and of each a few support images to adapt to and query images to be tested on.  The network is four
blocks of convolution, batch normalisation (statistics of the batch) and ReLU and a linear head (`experiments.networks`); on
sinusoids, two layers of 40.  x moves by Adam.  Measured: the mean over held-out tasks, always the same ones, of the accuracy
(sinusoids: the squared error) on 15 (10) queries of each class, and the half width of its 95 % interval.

On a CPU its cores are made devices of their own, which share the tasks of a batch (``--cores``).
"""

import contextlib
import dataclasses
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pandas as pd
import tyro
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec
from tqdm import tqdm

from bilevel_jax import Carry, Levels, Vars, begin, checks, resume, samplers, spent
from bilevel_jax.types import Array, PyTree
from experiments import data, figures, harness
from experiments.data.few_shot import SINUSOIDS
from experiments.few_shot_methods import AXIS, SETTINGS, Dataset, Method, Name, Setting, apart, build, held
from experiments.networks import MLP, ConvNet, Model, functional
from experiments.store import Options, Store

figures.STYLES |= {
    "maml": ("#0072B2", "-"),
    "anil": ("#D55E00", "-"),
    "imaml": ("#009E73", "-"),
    "fomaml": ("#56B4E9", "--"),
    "reptile": ("#CC79A7", "-."),
    "meha": ("#000000", "-"),
}


@dataclasses.dataclass(frozen=True)
class Config:
    """Few-shot learning by the solvers of algorithm-based bilevel optimization."""

    dataset: Dataset = "digits"
    """which tasks; mini_imagenet and fc100 read files of your own (experiments/data/few_shot.py)"""
    setting: Literal["laptop", "thesis", "meha"] = "laptop"
    """whose numbers: our small ones, those of the thesis' code (mini_imagenet, fc100), or of the MEHA paper (omniglot); the
    latter two want a GPU"""
    solvers: tuple[Name, ...] = ("maml", "anil")
    """which methods to compare"""
    ways: int | None = None
    """classes of a task (default: the setting's, 5)"""
    shots: int | None = None
    """support images of a class (default: the setting's, 1)"""
    tasks: int | None = None
    """tasks of a batch (default: the setting's)"""
    steps: int | None = None
    """updates of each method (default: the setting's)"""
    evaluations: int = 10
    """how often to measure"""
    test_tasks: int = 600
    """held-out tasks to measure on"""
    inner_steps: int | None = None
    """inner steps of all methods, in training and at test time (default: the setting's for each)"""
    loop: Literal["auto", "vmap", "map", "scan", "unrolled"] = "auto"
    """over the tasks"""
    cores: int | None = None
    """devices that share the tasks of a batch; a CPU is split into so many (default: 2, or 1 for an odd number of tasks)"""
    seed: int = 0
    """of the start, the tasks of training and the held-out tasks"""
    out: Path = Path("results")
    """folder to write to"""
    resume: bool = False
    """go on with an interrupted run in the same folder"""
    overwrite: bool = False
    """delete what the folder holds"""

    def __post_init__(self) -> None:
        for name in ("ways", "shots", "tasks", "steps", "evaluations", "test_tasks", "inner_steps", "cores"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise SystemExit(f"--{name.replace('_', '-')}: got {value}, expected at least 1")
        if not self.solvers:
            raise SystemExit("--solvers: got none, expected at least one")
        known = SETTINGS[self.setting]
        if self.dataset not in known:
            raise SystemExit(
                f"--setting: got {self.setting}, which has no numbers for {self.dataset}, but for {', '.join(known)}"
            )
        unknown = [name for name in self.solvers if name not in self.numbers.rates]
        if unknown:
            raise SystemExit(f"--solvers: got {', '.join(unknown)}, expected some of {', '.join(self.numbers.rates)} here")
        for name, value in (("tasks", self.numbers.tasks), ("test-tasks", self.test_tasks)):
            if value % self.devices:
                raise SystemExit(f"--{name}: got {value}, expected a multiple of --cores = {self.devices}")
        for name in self.solvers:
            every = self.evaluations * ((self.inner_steps or self.numbers.rates[name].steps) if name == "meha" else 1)
            if self.updates(name) % every:
                raise SystemExit(f"--steps: got {self.updates(name)} for {name}, expected a multiple of {every}")

    @property
    def numbers(self) -> Setting:
        """The setting's, with what was given instead."""
        given = {name: getattr(self, name) for name in ("ways", "shots", "tasks")}
        setting = SETTINGS[self.setting][self.dataset]
        if self.steps is not None:
            setting = setting._replace(
                updates=self.steps, rates={name: rates._replace(updates=None) for name, rates in setting.rates.items()}
            )
        return setting._replace(**{name: value for name, value in given.items() if value is not None})

    @property
    def devices(self) -> int:
        """That share the tasks."""
        return self.cores or 2 - self.numbers.tasks % 2

    def updates(self, name: str) -> int:
        """Of a method."""
        return self.numbers.rates[name].updates or self.numbers.updates


class World(NamedTuple):
    """What there is to learn: training and held-out data, samplers of both, the network, its loss, and what is measured."""

    train: Levels
    test: Levels
    sampler: samplers.Sampler  # of training, for one device
    single: samplers.Sampler  # of one held-out task
    model: Model
    loss: Callable[[PyTree, PyTree], Array]
    score: Callable[[PyTree, PyTree], Array]
    metric: str
    note: str


def world(config: Config) -> World:
    """That of the data set."""
    setting, rngs = config.numbers, nnx.Rngs(config.seed)
    tasks = setting.tasks // config.devices
    if config.dataset == "sinusoid":
        ranges = Levels(inner=jnp.asarray(SINUSOIDS))
        model = functional(MLP(1, 1, widths=(40, 40), rngs=rngs))

        def error(params: PyTree, pairs: PyTree) -> Array:
            return ((model.apply(params, pairs[0]) - pairs[1]) ** 2).mean()

        return World(
            ranges,
            ranges,
            data.sinusoids(tasks, shots=setting.shots, queries=setting.queries),
            data.sinusoids(1, shots=setting.shots, queries=10),
            model,
            error,
            error,
            "error",
            f"sinusoids, {setting.shots} shots",
        )
    load = {
        "digits": data.digits_by_class,
        "omniglot": data.omniglot,
        "mini_imagenet": data.mini_imagenet,
        "fc100": data.fc100,
    }
    images = load[config.dataset]()
    model = functional(ConvNet(images.train.shape[2:], setting.ways, features=setting.features, pool=setting.pool, rngs=rngs))

    def logits(params: PyTree, images: Array) -> Array:
        return model.apply(params, images.astype(jnp.float32) / 255)

    def loss(params: PyTree, pairs: PyTree) -> Array:
        return optax.softmax_cross_entropy_with_integer_labels(logits(params, pairs[0]), pairs[1]).mean()

    def accuracy(params: PyTree, pairs: PyTree) -> Array:
        found = logits(params, pairs[0])
        right = (found.argmax(-1) == pairs[1]).astype(jnp.float32).mean()
        return jnp.where(jnp.isfinite(found).all(), right, jnp.nan)  # the largest of NaN is the first: chance, and no failure

    sizes = {"ways": setting.ways, "shots": setting.shots}
    return World(
        Levels(inner=jnp.asarray(images.train)),
        Levels(inner=jnp.asarray(images.test)),
        samplers.episodes(tasks, **sizes, queries=setting.queries),
        samplers.episodes(1, **sizes, queries=15),
        model,
        loss,
        accuracy,
        "accuracy",
        f"{images.note}, {setting.ways}-way {setting.shots}-shot",
    )


def main(config: Config) -> pd.DataFrame:
    """Run the comparison."""
    mesh = devices(config.devices)
    options = Options(out=config.out, resume=config.resume, overwrite=config.overwrite)
    record = {**dataclasses.asdict(config), "numbers": repr(config.numbers)}
    Store.check(options, record)
    known = world(config)
    methods: dict[Name, Method] = {
        name: build(
            name,
            known.loss,
            known.model,
            config.numbers,
            loop=config.loop,
            shared=config.devices,
            inner_steps=config.inner_steps,
        )
        for name in config.solvers
    }
    for split in (known.train, known.test):  # refuses, say, more ways than classes before anything is written
        for sampler in (known.sampler, known.single):
            jax.eval_shape(lambda split, s=sampler: s.batches(split, jax.random.key(0), 0, 1), split)
    parameters = sum(leaf.size for leaf in jax.tree.leaves(known.model.params))
    store = Store.open(options, record, {"parameters": parameters, "note": known.note})
    try:
        with tqdm(total=len(methods) * config.evaluations, unit="evaluation", file=sys.stderr) as bar:
            for name, method in methods.items():
                bar.set_description(name)
                _run_one(config, known, name, method, store, mesh, bar)
    except KeyboardInterrupt:
        print(f"\ninterrupted: what was computed is in {config.out}; go on with --resume", file=sys.stderr)
        raise SystemExit(130) from None
    finally:
        draw(store.history(), known.metric, known.note, config.out / "figure")
    rows = store.history()
    print(rows.groupby("solver", sort=False).last().drop(columns="seed").to_string(float_format="{:.4g}".format))
    print(f"figure: {config.out / 'figure.png'}\nrows: {config.out / 'history.csv'}")
    return rows


def devices(cores: int) -> jax.sharding.Mesh:
    """So many devices in a row; a CPU is split, if JAX has not started yet."""
    with contextlib.suppress(RuntimeError):  # it has: those that there are must do
        jax.config.update("jax_num_cpu_devices", cores)
    if jax.device_count() < cores:
        raise SystemExit(f"--cores: got {cores}, expected at most {jax.device_count()}, the devices that JAX has started with")
    return jax.sharding.Mesh(np.array(jax.devices()[:cores]), (AXIS,))


def _run_one(
    config: Config, known: World, name: Name, method: Method, store: Store, mesh: jax.sharding.Mesh, bar: tqdm
) -> None:
    updates = config.updates(name)
    every = updates // config.evaluations
    if store.finished(name):
        bar.update(config.evaluations)
        return
    one, many = PartitionSpec(), PartitionSpec(AXIS)
    everywhere = NamedSharding(mesh, one)
    train, test = jax.device_put((known.train, known.test), everywhere)
    checks.finite("data", known.train)
    sampler = held(known.sampler, method.hold)
    own = apart(sampler) if config.devices > 1 else sampler

    def split(function: Any, specs: Any, out: Any) -> Any:
        return jax.jit(jax.shard_map(function, mesh=mesh, in_specs=specs, out_specs=out, check_vma=False))

    advance = split(lambda c, d: resume(method.solver, own, c, d, steps=every)[0], (one, one), one)
    scores = split(lambda vars, d, plan: _scores(known, method, vars, d, plan), (one, one, many), many)
    plan = known.single.plan(known.test, jax.random.key(config.seed + 1), 0, config.test_tasks)

    def measure(vars: Vars) -> dict[str, np.ndarray]:
        found = np.asarray(scores(vars, test, plan), np.float64)
        return {known.metric: found[None].mean(1), "interval": 1.96 * found[None].std(1) / np.sqrt(len(found))}

    carry = begin(method.solver, sampler, method.start, known.train, jax.random.key(config.seed))
    carry, done = store.restore(name, carry)
    carry = jax.device_put(carry, everywhere)
    clock = 0.0
    if done == 0:
        store.forget(name, -1)
        store.add(name, 0, np.zeros(1), 0.0, measure(carry.state.vars))
    else:
        clock = float(store.history().query("solver == @name")["seconds"].iloc[-1])
    compiled = advance.lower(carry, train).compile()
    bar.update(done // every)
    saved = time.monotonic()
    while done < updates:
        tick = time.perf_counter()
        carry = jax.block_until_ready(compiled(carry, train))
        clock += time.perf_counter() - tick
        done += every
        store.add(name, done, _calls(config, method, carry), clock, measure(carry.state.vars))
        bar.update(1)
        if done < updates and time.monotonic() - saved > harness.SAVE_EVERY:
            store.save(name, jax.device_put(carry, jax.devices()[0]))
            saved = time.monotonic()
    store.finish(name, np.asarray(carry.result)[None])


def _scores(known: World, method: Method, vars: Vars, split: Levels, plan: samplers.Plan) -> Array:
    """Of some held-out tasks, ``[tasks]``, gathered one after the other (a GPU takes fifty at once)."""

    def one(plan: samplers.Plan) -> Array:
        batch = known.single.gather(split, plan)
        support, query = (jax.tree.map(lambda leaf: leaf[0], part) for part in (batch.inner, batch.outer))
        return known.score(method.adapt(vars, support), query)

    return jax.lax.map(one, plan, batch_size=None if jax.default_backend() == "cpu" else 50)


def _calls(config: Config, method: Method, carry: Carry) -> np.ndarray:
    """Gradients, Hessian-vector and cross products of one task so far, ``[1]``."""
    return np.asarray(sum(jax.tree.leaves(spent(method.solver, carry.state))) * config.numbers.tasks, np.float64).reshape(1)


def draw(rows: pd.DataFrame, metric: str, note: str, path: Path) -> None:
    """The metric with its interval against meta-steps and seconds; writes ``path`` with the endings .png and .pdf."""
    if rows.empty:
        return
    figure, axes = figures.plt.subplots(1, 2, figsize=(9.5, 3.8), sharey=True, layout="constrained")
    for axis, (column, label) in zip(axes, (("step", "meta-steps"), ("seconds", "seconds, measuring excluded")), strict=True):
        for solver, part in rows.groupby("solver", sort=False):
            color, style = figures.STYLES.get(str(solver), (None, "-"))
            (line,) = axis.plot(part[column], part[metric], style, color=color, label=str(solver), linewidth=1.8)
            low, high = part[metric] - part["interval"], part[metric] + part["interval"]
            axis.fill_between(part[column], low, high, color=line.get_color(), alpha=0.2, linewidth=0)
        axis.set_xlabel(label)
        axis.grid(visible=True, alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel(f"{metric} on held-out tasks")
    if metric == "error":
        axes[0].set_yscale("log")
    axes[1].legend(frameon=False)
    figure.suptitle(f"{note}: mean over held-out tasks, 95 % interval", fontsize=10)
    for ending in ("png", "pdf"):
        figure.savefig(path.with_suffix(f".{ending}"), dpi=150)
    figures.plt.close(figure)


if __name__ == "__main__":
    main(tyro.cli(Config))
