"""A small run of ADBO over real processes, for `test_ray`; as a program, a master to be killed: ``FOLDER STEPS``."""

import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from bilevel_jax import Levels, Problem, Vars, samplers
from bilevel_jax.distributed import adbo, cluster, ray_transport

WORKERS = 3


def toy():
    """A method, its loader, and the objective at the consensus variables.  Made here, so that they are pickled by value."""
    random = np.random.default_rng(3)
    shift, target = random.normal(size=(2, WORKERS, 2))

    def load(worker):
        return Levels(shift[worker], target[worker])

    def objective(vars):
        return {"loss": ((vars.inner[None] - target) ** 2).sum() / 2}

    problem = Problem(
        lambda z, x, b: ((z - x - b) ** 2).sum() / 2, lambda z, x, a: ((z - a) ** 2).sum() / 2 + 0.0 * (x**2).sum()
    )
    rates = adbo.Rates(0.02, 0.02, 0.02, 0.02, 0.1, 0.05, 0.3, 0.1, 0.3)
    start = Vars(inner=jnp.zeros(2), outer=jnp.zeros(2))
    known = {"cut_period": 20, "max_cuts": 32, "estimate_rounds": 2, "cut_damping": 0.4, "consensus_damping": 0.002}
    return adbo.adbo(problem, start, rates, n_workers=WORKERS, **known), load, objective


def main(folder: Path, steps: int) -> None:
    jax.config.update("jax_enable_x64", True)
    method, load, objective = toy()
    delay = lambda worker, n: 0.01
    with ray_transport.RayWorkers(method, samplers.full(), load, jax.random.key(0), delay=delay) as workers:
        report = lambda row: print(row["step"], row["loss"], flush=True)
        known = {"quorum": 2, "max_staleness": 8, "checkpoint": folder, "every": 20}
        cluster.train(method, workers, steps=steps, **known, metrics=objective, on_row=report)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
