"""What many workers cost, on paper and on the virtual clock.

The formulas count what `bilevel_jax.distributed.simulate.traffic` counts.  Nothing is learned here: a schedule alone says who
answers when.
"""

import json
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
import pandas as pd
from tqdm import tqdm

from bilevel_jax import Problem, Vars
from bilevel_jax.distributed import simulate
from bilevel_jax.distributed.adbo import Adbo, Rates, adbo

#: Bytes of a number.
SIZE = 4


class Sent(NamedTuple):
    """Messages, and numbers in them, to and from the master."""

    messages_up: int
    messages_down: int
    up: int
    down: int


def iteration(answers: int, *, n: int, m: int, max_cuts: int) -> Sent:
    """An iteration with so many answers (ADBO: at least S; SDBO: N): outer_i and inner_i up, multipliers down."""
    return Sent(answers, answers, answers * (n + m), answers * (n + max_cuts))


def cut(workers: int, *, n: int, m: int, max_cuts: int, rounds: int, added: bool = True) -> Sent:
    """A cut: ``rounds`` rounds of the estimate, as many back through it, and the new cut to everyone."""
    up = workers * rounds * (2 * m + n)
    down = workers * (n + 3 * rounds * m + max_cuts + m * added)
    return Sent(2 * rounds * workers, (2 * rounds + 1) * workers, up, down)


def master_numbers(workers: int, *, n: int, m: int, max_cuts: int) -> int:
    """Numbers of the cuts that the master keeps, and reads in every iteration."""
    return max_cuts * (workers * m + n + m)


class Shape(NamedTuple):
    """Sizes of a problem."""

    n: int
    m: int
    max_cuts: int


SHAPES = {"cleaning of MNIST": Shape(60_000, 7840, 32), "IJCNN1": Shape(22, 44, 32)}
WORKERS = (18, 100, 1000)
STEPS, PERIOD = 100, 50


def method(workers: int, shape: Shape) -> Adbo:
    """ADBO of these sizes, on losses that do not matter."""
    nothing = Problem(lambda z, x, batch: jnp.zeros(()), lambda z, x, batch: jnp.zeros(()))
    start = Vars(jnp.zeros(shape.m), None, jnp.zeros(shape.n))
    return adbo(nothing, start, Rates(*(0.1,) * 6), n_workers=workers, max_cuts=shape.max_cuts, cut_period=PERIOD)


def measure(workers: int, quorum: int, staleness: int, slow: int) -> list[dict[str, Any]]:
    """A schedule: seconds, and the bytes and the memory of every shape, a row each."""
    machines = simulate.Cluster(simulate.log_normal(0.03), compute=0.001, slowdown=simulate.stragglers(workers, slow, 4.0))
    made = {name: method(workers, shape) for name, shape in SHAPES.items()}
    tick = time.perf_counter()
    first = next(iter(made.values()))  # times do not depend on sizes
    plan = simulate.schedule(machines, first, steps=STEPS, quorum=quorum, max_staleness=staleness)
    host, total = time.perf_counter() - tick, float(plan.period_seconds[-1])
    in_cuts = float((plan.period_seconds - plan.seconds[PERIOD - 1 :: PERIOD]).sum())
    rows = []
    for name, shape in SHAPES.items():
        sent = simulate.traffic(made[name], plan, np.arange(1 + STEPS // PERIOD))
        rows.append(
            {
                "problem": name,
                "workers": workers,
                "quorum": quorum,
                "staleness": staleness,
                "stragglers": slow,
                "iteration_ms": 1000 * total / STEPS,
                "between_cuts_ms": 1000 * (total - in_cuts) / STEPS,
                "share_in_cuts": in_cuts / total,
                "answers_an_iteration": float(plan.active.sum(1).mean()),
                "MB_up_a_second": SIZE * sent.up[-1] / total / 1e6,
                "MB_down_a_second": SIZE * sent.down[-1] / total / 1e6,
                "GB_of_cuts": SIZE * master_numbers(workers, **shape._asdict()) / 1e9,
                "host_ms_an_iteration": 1000 * host / STEPS,
            }
        )
    return rows


def main(out: Path) -> pd.DataFrame:
    """A table over workers, quorums, ages and stragglers: scaling.csv, and on paper: scaling.json."""
    cases = [
        (N, quorum, staleness, slow)
        for N in WORKERS
        for quorum, staleness in ((N // 2, 15), (N // 2, 100), (N, 15))
        for slow in (0, N // 6)
    ]
    rows = []
    for N, quorum, staleness, slow in tqdm(cases, unit="schedule", file=sys.stderr):
        rows += measure(N, quorum, staleness, slow)
    table = pd.DataFrame(rows)
    table.to_csv(out / "scaling.csv", index=False)
    paper = {
        f"{name}, N = {N}": {
            "iteration of N / 2 answers": iteration(N // 2, **shape._asdict())._asdict(),
            "cut": cut(N, rounds=1, **shape._asdict())._asdict(),
        }
        for name, shape in SHAPES.items()
        for N in WORKERS
    }
    (out / "scaling.json").write_text(json.dumps(paper, indent=2) + "\n")
    print(table.to_string(index=False, float_format="{:.3g}".format))
    print(f"rows: {out / 'scaling.csv'}")
    return table
