"""Search the cells of a convolution network on CIFAR-10, and compare them with random cells of as many parameters.

``python -m experiments.architecture_search --out results/cells``

Three methods search: DARTS of first order, DARTS one step ahead, MEHA.  The cells that each has found are trained from scratch,
and so is a random cell of nearly as many parameters for each.  The tiny setting is for two CPU cores; ``--setting full``, which
is that of the DARTS paper, for a GPU.
"""

import dataclasses
import json
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Literal, NamedTuple

import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pandas as pd
import tyro
from tqdm import tqdm

import bilevel_jax
from bilevel_jax import Carry, Levels, Result, Solver, Vars, begin, resume, samplers, spent
from bilevel_jax.types import Array
from experiments import data
from experiments.architecture_search import genotype, search
from experiments.architecture_search.evaluation import Training, test_accuracy
from experiments.architecture_search.network import QUICK, Cells, Network, Shape, parameters
from experiments.architecture_search.operations import ALL, Name
from experiments.architecture_search.record import Record
from experiments.architecture_search.search import Method, Part, Rates
from experiments.store import Store

#: Seconds between two saves of a running search.
SAVE_EVERY = 300.0


class Setting(NamedTuple):
    """Networks, lengths and rates."""

    shape: Shape  # of the supernet
    operations: tuple[Name, ...]
    epochs: int  # of the search: passes over the half of g
    batch_size: int
    rates: Rates
    evaluated: Shape  # of the networks of discrete cells
    training: Training
    evaluations: int = 6  # of a search
    measured: int = 1024  # images of each part, for the accuracy of the supernet


SETTINGS = {
    "tiny": Setting(
        shape=Shape(cells=3, nodes=2, channels=8, size=16, stride=2),
        operations=("none", "skip", "max_3x3", "sep_3x3", "dil_3x3"),
        epochs=4,
        batch_size=64,
        rates=Rates(inner=0.1, floor=1e-3, outer=0.02),  # x moves 60 times less often than in the paper
        evaluated=Shape(cells=3, nodes=2, channels=8, size=16, stride=2),
        training=Training(epochs=6, batch_size=64, rate=0.1),
    ),
    "full": Setting(
        shape=Shape(cells=8, nodes=4, channels=16, size=32, stride=1, form="conv"),
        operations=ALL,
        epochs=50,
        batch_size=64,
        rates=Rates(inner=0.025, floor=1e-3, outer=3e-4),
        evaluated=Shape(cells=20, nodes=4, channels=36, size=32, stride=1, form="conv"),
        training=Training(epochs=600, batch_size=96, rate=0.025),
        evaluations=50,
    ),
}


@dataclasses.dataclass(frozen=True)
class Config:
    """Search for cells of a convolution network."""

    setting: Literal["tiny", "full"] = "tiny"
    """sizes and lengths: for two CPU cores, or those of the DARTS paper"""
    images: Literal["subset", "all"] = "subset"
    """10,000 training images of CIFAR-10, or all (downloaded)"""
    methods: tuple[Method, ...] = ("darts_first", "darts_second", "meha")
    """which methods to compare"""
    seeds: int = 1
    """runs of each method, which differ in split, start and samples"""
    epochs: int | None = None
    """passes of a search over its half of the training images (default: that of the setting)"""
    training_epochs: int | None = None
    """passes of the training of discrete cells (default: that of the setting)"""
    out: Path = Path("results")
    """folder to write to"""
    resume: bool = False
    """go on with an interrupted run in the same folder"""
    overwrite: bool = False
    """delete what the folder holds"""

    def __post_init__(self) -> None:
        for name in ("seeds", "epochs", "training_epochs"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise SystemExit(f"--{name.replace('_', '-')}: got {value}, expected at least 1")
        if not self.methods:
            raise SystemExit("--methods: got none, expected at least one")
        if self.resume and self.overwrite:
            raise SystemExit("--resume and --overwrite: got both, expected at most one")

    @property
    def chosen(self) -> Setting:
        """The setting, with what was given instead."""
        setting = SETTINGS[self.setting]
        training = setting.training._replace(epochs=self.training_epochs or setting.training.epochs)
        return setting._replace(epochs=self.epochs or setting.epochs, training=training)


def prepare(config: Config) -> None:
    """Make the folder, or refuse it, and write config.json."""
    known = config.out / "config.json"
    apart = ("out", "resume", "overwrite")
    settings = json.loads(json.dumps({k: v for k, v in dataclasses.asdict(config).items() if k not in apart}))
    settings["details"] = json.loads(json.dumps(config.chosen))
    if config.resume:
        if not known.exists() or json.loads(known.read_text())["settings"] != settings:
            raise SystemExit(f"--resume: got {config.out}, expected the folder of an interrupted run of the same settings")
        return
    if known.exists() and not config.overwrite:
        raise SystemExit(f"--out: {config.out} holds a run already: give another folder, --resume or --overwrite")
    if known.exists():
        shutil.rmtree(config.out)
    config.out.mkdir(parents=True, exist_ok=True)
    versions = {m.__name__: m.__version__ for m in (bilevel_jax, flax, jax, np, optax, pd)}
    device = jax.devices()[0]
    record = {"settings": settings, "versions": versions, "device": f"{device.platform}: {device.device_kind}"}
    known.write_text(json.dumps(record, indent=2) + "\n")


def load(config: Config) -> tuple[data.Images, Part, Part]:
    """The images as published, and as training and test arrays: [n, size, size, 3], standardised a channel, and labels."""
    images, size = data.cifar10(full=config.images == "all"), config.chosen.shape.size

    def smaller(part: np.ndarray) -> np.ndarray:  # means of blocks of pixels
        block = part.shape[1] // size
        return (part.reshape(len(part), size, block, size, block, 3).mean((2, 4)) / 255).astype(np.float32)

    train, test = smaller(images.train_x), smaller(images.test_x)
    mean, spread = train.mean((0, 1, 2)), train.std((0, 1, 2))
    train, test = (jnp.asarray((part - mean) / spread) for part in (train, test))
    return images, (train, jnp.asarray(images.train_y)), (test, jnp.asarray(images.test_y))


class Search(NamedTuple):
    """The compiled programs of a method, which serve all seeds."""

    solver: Solver
    start: Callable[[Array, Levels], Carry]
    advance: Callable[[Carry, Levels], Carry]  # by ``every`` updates
    every: int
    measured: Callable[[Vars, dict[str, Part]], dict[str, Array]]


def compiled(method: Method, setting: Setting, levels: Levels) -> Search:
    """Compile the programs of a method, off the clock."""
    network, rates = search.supernet(setting.shape, setting.operations), setting.rates
    every = max(1, setting.epochs * (len(levels.inner[1]) // setting.batch_size) // setting.evaluations)
    solver = search.build(method, search.bilevel(network, rates.inner_decay), rates, every * setting.evaluations)
    sampler = samplers.epochs(setting.batch_size, remainder="drop")

    def start(key: Array, levels: Levels) -> Carry:  # z and x start at the same point in all methods
        vars = search.start(network, setting.operations, jax.random.fold_in(key, 1))
        return begin(solver, sampler, vars, levels, jax.random.fold_in(key, 2))

    key = jax.random.key(0)
    advance = jax.jit(lambda c, d: resume(solver, sampler, c, d, steps=every)[0], donate_argnums=0)
    program = advance.lower(jax.eval_shape(start, key, levels), levels).compile()
    measured = jax.jit(lambda vars, parts: search.measure(network, vars, parts))
    return Search(solver, jax.jit(start, compiler_options=QUICK), program, every, measured)


def find(run: Search, method: Method, seed: int, config: Config, record: Record, train: Part, test: Part) -> Cells:
    """Search, and write what happens; the cells found."""
    setting, levels = config.chosen, search.halves(*train, jax.random.fold_in(jax.random.key(seed), 0))
    rows = {"training": levels.inner, "validation": levels.outer, "test": test}
    parts = {name: search.batched(part, setting.batch_size, setting.measured) for name, part in rows.items()}

    def write(carry: Carry, seconds: float) -> None:
        calls = sum(map(float, spent(run.solver, carry.state)))
        row = {"solver": method, "seed": seed, "step": int(carry.state.step), "oracle_calls": calls, "seconds": seconds}
        found = jax.device_get(run.measured(Vars(inner=carry.state.vars.inner, outer=carry.state.vars.outer), parts))
        record.add("history", row | {name: float(value) for name, value in found.items()})

    store, name, steps = Store(config.out), f"{method}-{seed}", run.every * setting.evaluations
    carry, done = store.restore(name, run.start(jax.random.key(seed), levels))
    clock = record.forget(method, seed, done if done else -1)
    if not done:
        write(carry, clock)
    saved = time.monotonic()
    with tqdm(total=steps, initial=done, desc=f"{method}, seed {seed}", unit="update", file=sys.stderr) as bar:
        while done < steps:
            tick = time.perf_counter()
            carry = jax.block_until_ready(run.advance(carry, levels))
            clock += time.perf_counter() - tick
            done += run.every
            write(carry, clock)
            bar.update(run.every)
            if done < steps and time.monotonic() - saved > SAVE_EVERY:
                store.save(name, carry)
                saved = time.monotonic()
    if carry.result != Result.SUCCESSFUL:
        code = Result(int(carry.result))
        raise SystemExit(f"{name}: the search ended with {code.name}: {code.message}")
    shutil.rmtree(config.out / "checkpoints" / name, ignore_errors=True)
    return genotype.discrete(jax.device_get(carry.state.vars.outer), setting.operations)


def evaluate(seed: int, config: Config, record: Record, train: Part, test: Part) -> None:
    """Train the cells that the methods have found, and a random cell of the size of each."""
    setting, known = config.chosen, record.cells()
    found = [known[f"{method}/{seed}"] for method in config.methods]

    def network(cells: Cells) -> Network:
        return Network(setting.evaluated, cells, affine=True)

    budgets = [parameters(network(cells)) for cells in found]
    drawn = genotype.of_size(budgets, np.random.default_rng(seed), setting.evaluated, setting.operations)
    batches = search.batched(test, 250, len(test[1]))
    for method, *pair in zip(config.methods, found, drawn, strict=True):
        for kind, cells in zip(("searched", "random"), pair, strict=True):
            if record.evaluated(method, seed, kind):
                continue
            key = jax.random.fold_in(jax.random.key(seed), 3)
            accuracy = test_accuracy(network(cells), setting.training, train, batches, key)
            row = {"solver": method, "seed": seed, "kind": kind, "parameters": parameters(network(cells))}
            record.add("evaluation", row | {"accuracy": accuracy, "cells": json.dumps(genotype.as_json(cells))})


def main(config: Config) -> pd.DataFrame:
    """Run the searches and the comparison with random cells."""
    prepare(config)
    record, setting = Record(config.out), config.chosen
    images, train, test = load(config)
    note = f"{images.note}, {setting.shape.size} x {setting.shape.size} pixels"
    seeds = range(1, config.seeds + 1)
    try:
        for method in config.methods:
            missing = [seed for seed in seeds if f"{method}/{seed}" not in record.cells()]
            run = compiled(method, setting, search.halves(*train, jax.random.key(0))) if missing else None
            for seed in missing:
                assert run is not None
                record.keep(f"{method}/{seed}", find(run, method, seed, config, record, train, test))
        for seed in seeds:
            evaluate(seed, config, record, train, test)
    except KeyboardInterrupt:
        print(f"\ninterrupted: what was computed is in {config.out}; go on with --resume", file=sys.stderr)
        raise SystemExit(130) from None
    band = f"\nmean and range of {config.seeds} seeds" if config.seeds > 1 else ""
    record.draw(f"architecture search, {config.setting} setting, {note}{band}")
    print(record.summary().to_string(float_format="{:.4f}".format))
    print(f"cells: {config.out / 'cells.json'}\nfigure: {config.out / 'figure.png'}")
    return record.table("evaluation")


if __name__ == "__main__":
    main(tyro.cli(Config))
