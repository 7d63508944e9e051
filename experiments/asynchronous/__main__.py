"""Asynchronous distributed bilevel optimization against time: the figures of the ADBO paper, on a virtual clock.

``python -m experiments.asynchronous --dataset mnist --out results/asynchronous_mnist``

ADBO, which awaits some of its workers, beside SDBO, which awaits all of them, FedNest, D-SOBA on a ring, and SABA on one
machine with all the data.  Every run is made with all workers alike, and with some of them slower.  ``--engine ray`` takes real
processes and real seconds; ``--task toy`` has a closed form to compare with; ``--task scaling`` counts what 1,000 workers cost.

Writes config.json, history.csv (a row a period of 50 iterations), ratios.csv, summary.json, figure.png and figure.pdf.

Reference: Jiao, Yang, Wu, Song, Jian, "Asynchronous distributed bilevel optimization", ICLR 2023, arXiv 2212.10048.
"""

import dataclasses
import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
import pandas as pd
import tyro
from tqdm import tqdm

import bilevel_jax
from bilevel_jax.distributed import simulate
from experiments.asynchronous import methods, problems, report, scaling, toy
from experiments.asynchronous.methods import Method
from experiments.asynchronous.problems import Case, Dataset, Draw, Faster, RatesOf, Scale, Size


@dataclasses.dataclass(frozen=True)
class Config:
    """ADBO and its neighbours against time."""

    task: Literal["cleaning", "regularisation", "toy", "scaling"] = "cleaning"
    """what is learned: weights of noisily labelled rows, weights of features, a quadratic; or, learning nothing, what many
    workers cost"""
    dataset: Dataset | None = None
    """cleaning: digits (bundled; default), mnist, fashion_mnist; regularisation: ijcnn1 (default), covtype (16 % sample)"""
    engine: Literal["simulator", "ray"] = "simulator"
    """a virtual clock, or real processes (ADBO and SDBO only; needs the extra `cluster`)"""
    scale: Scale = "small"
    """how much data, for how long: seconds, minutes, or the published sizes"""
    workers: int | None = None
    """N (default: that of the data set and scale; 18 for MNIST)"""
    active: int | None = None
    """answers that ADBO awaits (default: half of the workers)"""
    staleness: int = 15
    """largest age of an answer, in iterations"""
    stragglers: int | None = None
    """slower workers in the second of two settings (default: a sixth of all, at least one); 0: only the first"""
    slowdown: float = 4.0
    """how many times slower they are"""
    delay: float = 0.03
    """median seconds of the delay of an answer, which is log-normal with sigma 1"""
    compute: float = 0.001
    """seconds of computing an answer"""
    steps: int | None = None
    """iterations of the master, a multiple of 50 (default: that of the data set and scale)"""
    methods: tuple[Method, ...] = ("adbo", "sdbo", "fednest", "d_soba", "saba")
    """which methods to compare"""
    rates: RatesOf = "tuned"
    """step sizes of ADBO and SDBO: inner ones tuned like those of the others, all as published, or (cleaning) ones with which
    the weights of rows move, which they hardly do otherwise"""
    tune: bool = False
    """first search step sizes on seed 0, which is in no figure, instead of taking known ones"""
    seeds: int = 3
    """runs of each method, which differ in delays, wrong labels and starts"""
    out: Path = Path("results/asynchronous")
    """folder to write to"""
    overwrite: bool = False
    """delete what the folder holds"""

    def __post_init__(self) -> None:
        for name in ("workers", "active", "steps", "seeds", "staleness"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise SystemExit(f"--{name}: got {value}, expected at least 1")
        for name in ("slowdown", "delay", "compute"):
            if not getattr(self, name) > 0:
                raise SystemExit(f"--{name}: got {getattr(self, name)}, expected a positive number")
        if not self.methods:
            raise SystemExit("--methods: got none, expected at least one")
        if self.task in problems.TASKS.values():
            self._check()

    def _check(self) -> None:
        if problems.TASKS[self.data] != self.task:
            known = [name for name, task in problems.TASKS.items() if task == self.task]
            raise SystemExit(f"--dataset: got {self.data} with --task {self.task}, expected one of {', '.join(known)}")
        size, slow = self.size, self.slow
        if size.active > size.workers:
            raise SystemExit(f"--active: got {size.active}, expected at most --workers = {size.workers}")
        if not 0 <= slow <= size.workers:
            raise SystemExit(f"--stragglers: got {slow}, expected at most --workers = {size.workers}, and at least 0")
        period = problems.PUBLISHED[problems.TASKS[self.data]].cut_period
        if size.steps % period:
            raise SystemExit(f"--steps: got {size.steps}, expected a multiple of {period}, the iterations between two cuts")
        if self.rates == "cleaning" and self.task != "cleaning":
            raise SystemExit(f"--rates: got cleaning with --task {self.task}, expected tuned or published")
        if self.tune and self.rates != "tuned":
            raise SystemExit(f"--tune: got --rates {self.rates} with it, expected tuned")
        if self.engine == "ray" and not set(self.methods) & {"adbo", "sdbo"}:
            raise SystemExit("--methods: got neither adbo nor sdbo, expected one of them with --engine ray")

    @property
    def data(self) -> Dataset:
        """The data set."""
        return self.dataset or ("digits" if self.task == "cleaning" else "ijcnn1")

    @property
    def size(self) -> Size:
        """Workers, rows and steps."""
        size = problems.SIZES[self.data][self.scale]
        workers = self.workers or size.workers
        active = self.active or (size.active if workers == size.workers else max(1, workers // 2))
        return size._replace(workers=workers, active=active, steps=self.steps or size.steps)

    @property
    def slow(self) -> int:
        """Stragglers of the second setting."""
        return max(1, self.size.workers // 6) if self.stragglers is None else self.stragglers

    def machines(self, slow: int) -> simulate.Cluster:
        """The machines of a setting."""
        slowdown = simulate.stragglers(self.size.workers, slow, self.slowdown)
        return simulate.Cluster(simulate.log_normal(self.delay), compute=self.compute, slowdown=slowdown)

    @property
    def settings(self) -> list[int]:
        """Numbers of stragglers of the settings."""
        return [0, self.slow] if self.slow else [0]


def prepare(config: Config) -> None:
    """Refuse a folder that holds a run already, before anything is computed."""
    known = config.out / "config.json"
    if known.exists() and not config.overwrite:
        raise SystemExit(f"--out: {config.out} holds a run already: give another folder, or --overwrite")
    if config.overwrite and config.out.exists():
        if any(config.out.iterdir()) and not known.exists():
            raise SystemExit(f"--overwrite: got {config.out}, which holds no config.json of an earlier run: delete it yourself")
        shutil.rmtree(config.out)
    config.out.mkdir(parents=True, exist_ok=True)
    versions = {m.__name__: m.__version__ for m in (bilevel_jax, jax, np, pd)}
    settings = dataclasses.asdict(config)
    if config.task in problems.TASKS.values():
        settings |= {"used": config.size._asdict()}
    record = {"settings": settings, "versions": versions, "device": str(jax.devices()[0])}
    known.write_text(json.dumps(record, indent=2, default=str) + "\n")


def rows(config: Config, case: Case, best: dict[Method, methods.Rate]) -> Iterator[pd.DataFrame]:
    """The rows of every run, as soon as it is done: one setting of one method and seed (synchronous ones: all settings)."""
    plain: list[Method] = [name for name in config.methods if name not in ("adbo", "sdbo")]
    made = {name: methods.baseline(case, name) for name in plain}
    programs = {name: methods.compiled(made[name]) for name in plain}
    master = methods.master(case)
    for seed in range(1, config.seeds + 1):
        draw = problems.draw(case, seed)
        for name in config.methods:
            if name in plain:
                once = methods.trace(case, name, made[name], programs[name], best[name], draw, seed)
                parts = [(slow, methods.timed(case, name, once, config.machines(slow), seed)) for slow in config.settings]
            else:
                parts = simulated(config, case, name, draw, seed, master)
            yield pd.concat([part.assign(method=name, stragglers=slow, seed=seed) for slow, part in parts])


def simulated(config: Config, case: Case, name: Method, draw: Draw, seed: int, master: Any) -> list[tuple[int, pd.DataFrame]]:
    """The rows of ADBO or SDBO in every setting.  SDBO does the same at other times, so that it runs once."""
    method, parts, history = case.method(draw.start), [], None
    for slow in config.settings:
        plan = simulate.schedule(
            config.machines(slow),
            method,
            steps=case.size.steps,
            quorum=case.size.active if name == "adbo" else case.size.workers,
            max_staleness=config.staleness,
            seed=seed,
        )
        if name == "adbo" or history is None:
            history = master(draw, plan, jax.random.key(seed))
        parts.append((slow, methods.distributed(method, plan, history)))
    return parts


def tuned(config: Config, case: Case) -> dict[str, Any]:
    """The best step sizes of the grids on seed 0; writes grid.csv."""
    draw, tables, found = problems.draw(case, 0), [], {}
    for name in config.methods:
        if name == "sdbo":  # has those of ADBO
            continue
        table = methods.search(case, name, draw, config.machines(0), config.staleness)
        tables.append(table)
        pd.concat(tables).to_csv(config.out / "grid.csv", index=False)
        best = table.loc[table["loss"].idxmin()]
        kind = Faster if name == "adbo" else methods.Rate
        found[name] = kind(*(float(best[field]) for field in kind._fields))
        print(f"{name}: {found[name]}, of losses {table['loss'].min():.4g} to {table['loss'].max():.4g}")
    return found


COLUMNS = ["method", "stragglers", "seed", "step", "seconds", "bytes_up", "bytes_down", "loss", "accuracy", "outer_moved"]
MORE = ["recall", "inner_gap", "cuts", "made", "refused", "inner_apart", "outer_apart", "result"]


def compare(config: Config) -> None:
    """Run the methods on a problem, and write everything."""
    case = problems.case(config.data, config.size, config.rates)
    best: dict[Any, Any] = dict(methods.BEST[config.data])
    if config.tune:
        best |= tuned(config, case)
        case = case._replace(faster=best.get("adbo", case.faster))
    used = {name: best[name]._asdict() for name in config.methods if name in best and name != "adbo"}
    used["adbo"] = {**case.settings._asdict(), "faster": case.faster._asdict()}
    title = (
        f"{config.task}, {case.note}\nADBO awaits {config.size.active} of {config.size.workers} workers, largest age "
        f"{config.staleness}; {clock_note(config)}; ADBO's step sizes: {config.rates}"
    )
    if config.engine == "ray":
        from experiments.asynchronous import engine  # ray is an extra

        runs, total = engine.rows(config, case), len(config.settings) * config.seeds * 2
    else:
        runs, total = rows(config, case, best), len(config.methods) * config.seeds
    parts: list[pd.DataFrame] = []
    try:
        for part in tqdm(runs, total=total, unit="run", file=sys.stderr):
            parts.append(part.reindex(columns=COLUMNS + MORE))
            pd.concat(parts).to_csv(config.out / "history.csv", index=False)
    finally:
        if parts:
            finish(config, pd.concat(parts), title, used)


def clock_note(config: Config) -> str:
    """How the seconds came about."""
    slow = f"; stragglers {config.slowdown:g} times slower" if config.slow else ""
    delays = f"log-normal delays of median {1000 * config.delay:g} ms, sigma 1{slow}"
    if config.engine == "ray":
        return f"real processes and seconds on one machine, with {delays}, slept"
    return f"times are simulated: {delays}; {1000 * config.compute:g} ms of computing"


def finish(config: Config, history: pd.DataFrame, title: str, step_sizes: dict[str, Any]) -> None:
    """The figure, the ratios and the claims, printed and written."""
    clock = "real" if config.engine == "ray" else "virtual"
    report.draw(history, title, config.out / "figure", clock)
    table = report.ratios(history)
    table.to_csv(config.out / "ratios.csv", index=False)
    claims = report.claims(table, simulated=config.engine == "simulator")
    medians = table.groupby(["rival", "stragglers"]).median(numeric_only=True).drop(columns="seed") if len(table) else table
    ends = report.last(history, ["method", "stragglers", "seed"]).drop(columns="seed")
    ends = ends.groupby(["method", "stragglers"], sort=False).median()
    summary = {"title": title, "claims": claims, "step_sizes": step_sizes, "ratios": medians.reset_index().to_dict("records")}
    (config.out / "summary.json").write_text(json.dumps(summary, indent=2, default=float) + "\n")
    print(ends.dropna(axis=1, how="all").to_string(float_format="{:.4g}".format))
    print(f"\nseconds to {report.SHARE:.0%} of the lower of two best accuracies, over those of ADBO (medians over the seeds):")
    print(medians.to_string(float_format="{:.4g}".format))
    for claim in claims:
        print(f"{claim['claim']}: {claim['measured']:.3g}: {'holds' if claim['holds'] else 'DOES NOT HOLD'}")
    print(f"figure: {config.out / 'figure.png'}\nrows: {config.out / 'history.csv'}")


def main(config: Config) -> None:
    """Run the command."""
    prepare(config)
    if config.task == "toy":
        toy.main(config.out, config.seeds)
    elif config.task == "scaling":
        scaling.main(config.out)
    else:
        compare(config)


if __name__ == "__main__":
    main(tyro.cli(Config))
