"""Search step sizes: every seed, step size, ratio and schedule of a solver is a lane of one compiled program.

``python -m experiments.grid --dataset ijcnn1 --solvers soba saba --steps 262144 --out results/grid``
``python -m experiments.hyperparameter_selection --dataset ijcnn1 --solvers soba saba --settings results/grid/settings.json``

Lanes run in chunks that fit into ``--memory-gb`` by the program's own account of its memory; on a CPU, a program on each core.
Rows are written chunk by chunk, and ``--resume`` goes on after the last one.  Into ``--out``:

*grid.csv*, one row a lane: solver, settings, seed, the metrics at the end, ``diverged`` (what is chosen by is not finite, or
above where it started), and the result code of the run.  An empty ``decay`` is the schedule of the solver's paper.

*settings.json*, the settings chosen for each solver, the rule that chose them, and the task that they are for.  The rule: of
the settings of which no seed diverges, the one of the least median over the seeds.  The seeds are none that comparisons use.
"""

import dataclasses
import itertools
import json
import math
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
import tyro
from tqdm import tqdm

from bilevel_jax import Result, Vars, begin, checks, resume
from bilevel_jax.types import Array, Levels
from experiments import data_cleaning, hyperparameter_selection
from experiments.harness import Options, Task, build
from experiments.methods import LOOPED, METHODS, Name, Rates
from experiments.seeds import cores, side_by_side
from experiments.speed.timing import peak_bytes, size_bytes
from experiments.store import Store

#: The first seed: comparisons use 1, 2, ...
FIRST_SEED = 1001
#: Updates whose random choices are in memory at once, at most.
STRETCH = 4096
#: Lanes of a program on a CPU by default: 32 take longer than twice 16 (see `experiments.seeds`).
NARROW = 16
#: Metrics of which less is better.
METRICS = ("suboptimality", "gradient_norm", "inner_distance", "validation_loss", "test_loss", "test_error")
AXES = ("step_size", "outer_ratio", "decay")
EXPERIMENTS = {"hyperparameter_selection": hyperparameter_selection, "data_cleaning": data_cleaning}


@dataclasses.dataclass(frozen=True)
class Config:
    """A grid of step sizes; by default that of the paper."""

    experiment: Literal["hyperparameter_selection", "data_cleaning"] = "hyperparameter_selection"
    """whose problem"""
    dataset: str | None = None
    """one of that experiment's (default: the bundled one)"""
    corruption: float = 0.5
    """share of the training labels that are wrong (data_cleaning)"""
    setting: Literal["soba", "thesis", "meha"] = "soba"
    """whose losses, and lengths of inner loops (data_cleaning)"""
    solvers: tuple[Name, ...] = ("saba",)
    """which solvers to search for"""
    seeds: int = 4
    """runs of each setting, which differ in their samples"""
    steps: int = 2**15
    """updates of each run"""
    batch_size: int = 64
    """rows of a block, of either level"""
    step_sizes: tuple[float, ...] = tuple(2.0**k for k in range(-5, 4))
    """of z and v"""
    outer_ratios: tuple[float, ...] = (0.01, 0.0316, 0.1, 0.316, 1.0, 3.16, 10.0)
    """step size of z over that of x"""
    decays: tuple[float, ...] = ()
    """exponents e of step sizes that fall like (t + 1)^-e after t updates, 0 for constant ones, which are all that solvers with
    several steps on z an update take (default: those of the solver's paper)"""
    metric: str | None = None
    """which one to choose by (default: suboptimality, or validation_loss: what the outer problem is about)"""
    memory_gb: float = 2.0
    """what the programs, with their data, may take"""
    lanes: int | None = None
    """most lanes of a program (default: 16 on a CPU, where wider ones are slower; elsewhere what fits)"""
    out: Path = Path("results/grid")
    """folder to write to"""
    resume: bool = False
    """go on with an interrupted search in the same folder"""
    overwrite: bool = False
    """delete what the folder holds"""

    def __post_init__(self) -> None:
        for name in ("lanes", "steps"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise SystemExit(f"--{name}: got {getattr(self, name)}, expected at least 1")
        for name in ("step_sizes", "outer_ratios", "solvers"):
            if not getattr(self, name):
                raise SystemExit(f"--{name.replace('_', '-')}: got none, expected at least one")
        for name in ("step_sizes", "outer_ratios"):
            if not all(0 < value < math.inf for value in getattr(self, name)):
                raise SystemExit(f"--{name.replace('_', '-')}: got {getattr(self, name)}, expected positive numbers")
        if not all(0 <= value < math.inf for value in self.decays):
            raise SystemExit(f"--decays: got {self.decays}, expected numbers of at least 0")
        looped = sorted(LOOPED.intersection(self.solvers))
        if any(self.decays) and looped:
            raise SystemExit(
                f"--decays: got {self.decays} for {looped}, expected 0, or solvers that step z once an update: in loops the "
                "schedule of z would not count updates"
            )
        if not self.memory_gb > 0:
            raise SystemExit(f"--memory-gb: got {self.memory_gb}, expected a positive number")
        if self.metric not in (None, *METRICS):
            raise SystemExit(f"--metric: got {self.metric!r}, expected one of {METRICS}")


class Lanes(NamedTuple):
    """Settings and seeds, leaves ``[lanes]``; decay None: that of the paper."""

    step_size: Array
    outer_ratio: Array
    decay: Array | None
    seed: Array  # int32


def experiment(config: Config) -> Any:
    """The config of the experiment searched for, with any step sizes: they are replaced."""
    module = EXPERIMENTS[config.experiment]
    known = get_args({field.name: field.type for field in dataclasses.fields(module.Config)}["dataset"])
    if config.dataset not in (None, *known):
        raise SystemExit(f"--dataset: got {config.dataset!r}, expected one of {known}")
    given: dict[str, Any] = {"dataset": config.dataset or known[0], "solvers": config.solvers, "batch_size": config.batch_size}
    if module is data_cleaning:
        given |= {"corruption": config.corruption, "setting": config.setting}
    return module.Config(**given, seeds=config.seeds, steps=config.steps, step_size=1.0, outer_ratio=1.0)


def make_task(config: Any) -> Task:
    """The task of the config of an experiment."""
    if isinstance(config, data_cleaning.Config):
        return data_cleaning.task(config, data_cleaning.load(config))
    return hyperparameter_selection.task(config)


def points(config: Config, name: str) -> pd.DataFrame:
    """All lanes of a solver, seeds of a setting side by side.  A method without randomness has one seed."""
    seeds = range(FIRST_SEED, FIRST_SEED + (config.seeds if METHODS[name].random else 1))
    found = itertools.product(config.step_sizes, config.outer_ratios, config.decays or (math.nan,), seeds)
    return pd.DataFrame(found, columns=[*AXES, "seed"]).rename_axis("lane").reset_index()


def program(task: Task, name: str, base: Rates, config: Config) -> Callable[[Lanes, Levels], tuple[Vars, Array]]:
    """``(lanes, data) -> (variables at the end, result codes)``.

    Lanes that flip coins of their own run one after the other: under vmap both sides of each coin would be computed.
    """

    stretches = [n for n in range(64, min(STRETCH, config.steps) + 1) if config.steps % n == 0]
    stretch = max(stretches, default=config.steps)

    def one(lane: Lanes, data: Levels) -> tuple[Vars, Array]:
        rates = base._replace(step_size=lane.step_size, outer_ratio=lane.outer_ratio, decay=lane.decay)  # type: ignore[arg-type]
        solver, sampler = build(task, name, rates, config.batch_size)
        carry = begin(solver, sampler, task.start, data, jax.random.key(lane.seed))
        carry, _ = resume(solver, sampler, carry, data, steps=config.steps, every=stretch)
        return carry.state.vars._replace(aux=None), carry.result

    if METHODS[name].coin:
        return lambda lanes, data: jax.lax.map(lambda lane: one(lane, data), lanes)
    return jax.vmap(one, in_axes=(0, None))


def fit(function: Callable[..., Any], lanes: Lanes, data: Levels, widest: int, limit: float, copies: int) -> tuple[Any, int]:
    """The compiled program of as many lanes, at most ``widest``, as fit into the limit (bytes) when ``copies`` run at once.

    By the memory analysis of the program itself; where a device does not give one, it is as wide as it may be.

    Raises:
        SystemExit: if one lane does not fit.
    """
    shared = size_bytes(data)
    while True:
        part = jax.tree.map(partial(jax.eval_shape, lambda leaf, n=widest: leaf[:n]), lanes)
        executable = jax.jit(function).lower(part, data).compile()
        own = copies * (peak_bytes(executable) - shared)
        if not shared + own > limit:
            return executable, widest
        if widest == 1:
            least = f"{(shared + own) / 1e9:.3g}, for {copies} programs of one lane"
            raise SystemExit(f"--memory-gb: got {limit / 1e9:g}, expected at least {least}")
        widest = max(1, min(widest - 1, int(widest * (limit - shared) / own)))


def search(config: Config, task: Task, base: dict[str, Rates], metric: str) -> pd.DataFrame:
    """Run all lanes that grid.csv does not hold yet, and write it chunk by chunk."""
    start = task.measure(jax.tree.map(lambda leaf: leaf[None], task.start))
    if metric not in start:
        raise SystemExit(f"--metric: got {metric!r}, expected one of {[name for name in start if name in METRICS]}")
    for part in task.data:
        checks.finite("data", part)
    path = config.out / "grid.csv"
    known: Any = pd.read_csv(path) if path.exists() else pd.DataFrame({"solver": [], "lane": []})
    with tqdm(total=sum(len(points(config, name)) for name in config.solvers), unit="lane", file=sys.stderr) as bar:
        for name in config.solvers:
            bar.set_description(name)
            table: Any = points(config, name)
            todo = table[~table["lane"].isin(known["lane"][known["solver"] == name])]
            bar.update(len(table) - len(todo))
            if todo.empty:
                continue
            a, r, e = (jnp.asarray(table[axis], jnp.float32) for axis in AXES)
            lanes = Lanes(a, r, e if config.decays else None, jnp.asarray(table["seed"], jnp.int32))
            copies = min(cores(), len(table))
            most = config.lanes or (NARROW if jax.default_backend() == "cpu" else len(table))
            widest = min(most, -(-len(table) // copies))
            call, width = fit(program(task, name, base[name], config), lanes, task.data, widest, 1e9 * config.memory_gb, copies)
            bar.set_description(f"{name}, {copies} x {width} lanes")
            for first in range(0, len(todo), copies * width):
                rows = todo.iloc[first : first + copies * width]
                ends = run(call, lanes, rows["lane"].to_numpy(), copies, width, task.data)
                found = judged(rows.assign(solver=name), task, *ends, metric, float(start[metric][0]))
                known = pd.concat([known, found]) if len(known) else found
                known.to_csv(path.with_suffix(".part"), index=False)
                path.with_suffix(".part").replace(path)
                bar.update(len(rows))
    return known


def run(call: Any, lanes: Lanes, chosen: np.ndarray, copies: int, width: int, data: Levels) -> tuple[Vars, Array]:
    """The ends of a chunk of lanes; the last one is repeated where a chunk is not full."""
    chosen = np.pad(chosen, (0, copies * width - len(chosen)), mode="edge")
    parts = [jax.tree.map(lambda leaf, own=own: leaf[own], lanes) for own in np.split(chosen, copies)]
    return jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *side_by_side(lambda part: call(part, data), parts))


def judged(rows: Any, task: Task, vars: Vars, codes: Array, metric: str, start: float) -> pd.DataFrame:
    """The rows of a chunk with what was measured."""
    ends = pd.DataFrame({key: np.asarray(value)[: len(rows)] for key, value in task.measure(vars).items()}, index=rows.index)
    found = rows[["solver", "lane", *AXES, "seed"]].join(ends)
    diverged = ~(found[metric] <= start)  # so is NaN
    return found.assign(diverged=diverged, result=[Result(int(code)).name for code in codes[: len(rows)]])


def choose(table: pd.DataFrame, metric: str) -> Any:
    """The best setting of each solver of which a setting has no seed that diverges, with the median of its metric."""
    settings: Any = table.groupby(["solver", *AXES], sort=False, dropna=False)
    ends = settings.agg(metric=(metric, "median"), diverged=("diverged", "any")).reset_index()
    fine: Any = ends[~ends["diverged"]]
    return fine.loc[fine.groupby("solver", sort=False)["metric"].idxmin()].drop(columns="diverged").set_index("solver")


def at_edges(best: Any, config: Config) -> list[str]:
    """The axes at whose end a choice lies (below a decay of 0 there is nothing): a wider grid may hold a better one."""
    ends = {axis: getattr(config, f"{axis}s") for axis in AXES}
    ends = {axis: (min(values), max(values)) for axis, values in ends.items() if len(values) > 1}
    return [axis for axis, (low, high) in ends.items() if best[axis] == high or 0 < best[axis] == low]


def conclude(config: Config, table: pd.DataFrame, metric: str, key: dict[str, Any]) -> None:
    """Choose, say what was chosen, and write it."""
    best, names = choose(table, metric), {"metric": metric}
    settings: dict[str, dict[str, Any]] = {}
    for name, row in best.iterrows():
        chosen: dict[str, Any] = {axis: None if np.isnan(row[axis]) else float(row[axis]) for axis in AXES}
        settings[name] = chosen | {"median": float(row["metric"]), "at_the_edge": at_edges(row, config)}
    rule = f"least median over the seeds of {metric} after {config.steps} updates, of the settings of which no seed diverges"
    none = [name for name in config.solvers if name not in settings]
    known = {"rule": rule, "task": key, "settings": settings, "none_without_divergence": none}
    (config.out / "settings.json").write_text(json.dumps(known, indent=2) + "\n")
    print(f"{rule}:\n{best.rename(columns=names).to_string(float_format='{:.4g}'.format)}")
    for name in config.solvers:
        if name in none:
            print(f"{name}: none, in every setting a seed diverges")
        elif edges := ", ".join(settings[name]["at_the_edge"]):
            print(f"{name}: at the edge of the grid in {edges}: a wider one may hold a better one")
    print(f"rows: {config.out / 'grid.csv'}\nsettings: {config.out / 'settings.json'}")


def main(config: Config) -> pd.DataFrame:
    """Run the search, write the choice, and return the rows."""
    own, module = experiment(config), EXPERIMENTS[config.experiment]
    options = Options(config.seeds, config.batch_size, out=config.out, resume=config.resume, overwrite=config.overwrite)
    base = module.rates(own)
    metric = config.metric or ("suboptimality" if module is hyperparameter_selection else "validation_loss")
    loops = {name: {k: v for k, v in rates._asdict().items() if k not in AXES} for name, rates in base.items()}
    record = {**dataclasses.asdict(config), "loops": loops}
    Store.check(options, record)
    task = make_task(own)
    Store.open(options, record, task.extra)
    try:
        table = search(config, task, base, metric)
    except KeyboardInterrupt:
        print(f"\ninterrupted: what was computed is in {config.out}; go on with --resume", file=sys.stderr)
        raise SystemExit(130) from None
    conclude(config, table, metric, module.key(own))
    return table


if __name__ == "__main__":
    main(tyro.cli(Config))
