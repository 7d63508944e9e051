"""Search the step sizes of one solver on one problem of hyperparameter selection: all points in one compiled run.

``python -m experiments.grid --dataset ijcnn1 --solver saba --steps 262144``

One seed; each point of the grid is a lane of a vmap over rates.  Prints, and writes to ``--out``, the final gap h(x) - h* over
that of the start; NaN where the run diverged.
"""

import dataclasses
from pathlib import Path
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
import tyro

from bilevel_jax import BilevelState, Carry, Levels, Solver, begin, resume, samplers
from bilevel_jax.types import Array
from experiments import hyperparameter_selection
from experiments.methods import METHODS, Name, Rates


@dataclasses.dataclass(frozen=True)
class Config:
    """Step sizes of the paper's grids by default."""

    dataset: Literal["breast_cancer", "ijcnn1", "covtype"] = "breast_cancer"
    solver: Name = "saba"
    steps: int = 2**15
    batch_size: int = 64
    step_sizes: tuple[float, ...] = tuple(2.0**k for k in range(-5, 4))
    outer_ratios: tuple[float, ...] = (0.01, 0.0316, 0.1, 0.316, 1.0, 3.16, 10.0)
    out: Path = Path("results/grid.csv")


def main(config: Config) -> pd.DataFrame:
    """Run the grid."""
    selection = hyperparameter_selection.Config(dataset=config.dataset)
    task = hyperparameter_selection.task(selection)
    sampler = samplers.uniform(config.batch_size)
    blocks = Levels(*(samplers.blocks(len(jax.tree.leaves(part)[0]), config.batch_size) for part in task.data))
    points = [(a, r) for a in config.step_sizes for r in config.outer_ratios]
    a, r = jnp.asarray(points, jnp.float32).T
    axes = Carry(BilevelState(None, 0, 0), 0, 0, 0)  # type: ignore[arg-type]

    def build(a: Array, r: Array) -> Solver:
        return METHODS[config.solver].build(task.problem, Rates(a, r), blocks)  # type: ignore[arg-type]

    @jax.jit
    def final(a: Array, r: Array, data: Levels) -> Carry:
        def one(a: Array, r: Array) -> Carry:
            carry = begin(build(a, r), sampler, task.start, data, jax.random.key(1))
            return resume(build(a, r), sampler, carry, data, steps=config.steps)[0]

        return jax.vmap(one, out_axes=axes)(a, r)

    end = final(a, r, task.data)
    first = task.measure(jax.tree.map(lambda leaf: leaf[None], task.start))["suboptimality"][0]
    gap = task.measure(end.state.vars)["suboptimality"] / first
    found = pd.DataFrame(points, columns=["step_size", "outer_ratio"]).assign(solver=config.solver, gap=gap)
    config.out.parent.mkdir(parents=True, exist_ok=True)
    found.to_csv(config.out, index=False)
    print(found.pivot_table("gap", "step_size", "outer_ratio", dropna=False).map(lambda g: f"{g:.2g}").to_string())
    print(f"best: {found.loc[found['gap'].idxmin()].to_dict() if np.isfinite(gap).any() else 'none converged'}")
    return found


if __name__ == "__main__":
    main(tyro.cli(Config))
