"""Statements of the paper on SOBA and SABA that no figure shows, checked on the shipped quadratic in float64.

``python -m experiments.claims.checks --out results/claims_checks``

Writes config.json and claims.csv (measured against theory, with a verdict computed from the numbers).
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pandas as pd
import tyro

from bilevel_jax import Batch, Solver, Vars, begin, descend, implicit, run, samplers, solvers, sweep
from bilevel_jax.estimators import plain, saga, total
from bilevel_jax.testing import Quadratic, quadratic
from experiments.lower_bounds import claim, record, write

#: Step sizes of z, v and x.
STEPS = Vars(0.2, 0.2, 0.1)
Make = Callable[[Quadratic, Vars], Solver]


@dataclasses.dataclass(frozen=True)
class Config:
    """Identities and closed forms of SOBA and SABA, and what variance reduction of one variable comes to."""

    steps: int = 2000
    """updates of each run, on batches of 5 of 32 samples"""
    out: Path = Path("results/claims_checks")
    """folder to write to"""


def problem() -> Quadratic:
    """32 samples of noisy matrices, z and v of 5 numbers, x of 3."""
    sizes = {"inner_dim": 5, "outer_dim": 3, "inner_samples": 32, "outer_samples": 32}
    return quadratic(jax.random.key(0), **sizes, noise=0.1, dtype=jnp.float64)


def reduced(*names: str) -> Make:
    """SOBA with SAGA on some of the variables; those with SAGA and those without are stepped one group after the other."""

    def make(q: Quadratic, opts: Vars) -> Solver:
        parts = [
            Vars(*(o if (f in names) == chosen else None for f, o in zip(Vars._fields, opts, strict=True)))
            for chosen in (True, False)
        ]
        stages = [(part, saga() if i == 0 else plain()) for i, part in enumerate(parts) if any(o is not None for o in part)]
        return sweep(*(descend(implicit(q.problem), part, estimator=estimator) for part, estimator in stages))

    return make


def errors(q: Quadratic, make: Make, steps: int, sizes: Vars = STEPS) -> tuple[Any, Any]:
    """The last state and the norms of the hypergradient over that at the start, at 40 evaluations."""
    sampler, opts = samplers.uniform(5), Vars(*map(optax.sgd, sizes))
    solver, how = make(q, opts), {"steps": steps, "every": max(1, steps // 40), "metrics": q.metrics}
    carry, history = jax.jit(lambda key: run(solver, sampler, q.start, q.data, key, **how))(jax.random.key(1))
    return carry.state, np.asarray(history["gradient_norm"] / history["gradient_norm"][0])


def directions(q: Quadratic, point: Vars, batch: Batch) -> Vars:
    """SOBA's, from one batch."""
    terms: Any = implicit(q.problem).terms(point, batch, jnp.int32(0))
    return total(terms)


def largest(tree: Any) -> float:
    """The largest entry."""
    return max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(tree))


def at_the_solution(q: Quadratic) -> list[dict[str, Any]]:
    """Proposition 2.1, one direction: where z = z*(x) and v = v*(x), two directions vanish and the third is grad h."""
    x = q.start.outer
    found = directions(q, q.at(x), Batch(q.data.inner, q.data.outer, jax.random.key(0)))
    return [
        claim("directions of z and v at z*(x), v*(x), largest entry", "=", 0, largest((found.inner, found.aux)), 1e-12),
        claim("direction of x there less grad h(x), largest entry", "=", 0, largest(found.outer - q.gradient(x)), 1e-12),
    ]


def unbiased(q: Quadratic) -> dict[str, Any]:
    """The mean over all pairs of samples of SOBA's directions, at a point that is nothing special."""
    point = Vars(*(leaf + 0.3 * jnp.arange(1, leaf.size + 1, dtype=leaf.dtype) for leaf in q.start))
    key, samples = jax.random.key(0), jnp.arange(32)

    def one(i: Any, j: Any) -> Vars:
        inner, outer = (jax.tree.map(lambda leaf, k=k: leaf[k][None], part) for k, part in zip((i, j), q.data, strict=True))
        return directions(q, point, Batch(inner, outer, key))

    every = jax.jit(jax.vmap(jax.vmap(one, (None, 0)), (0, None)))(samples, samples)
    full = directions(q, point, Batch(q.data.inner, q.data.outer, key))
    gaps = jax.tree.map(lambda each, exact: each.mean((0, 1)) - exact, every, full)
    return claim("mean over all pairs of samples less the full directions, largest entry", "=", 0, largest(gaps), 1e-12)


def memory(q: Quadratic) -> dict[str, Any]:
    """Numbers in the tables of SABA with one row a sample, over n p + (n + m)(p + d)."""
    carry = begin(
        solvers.saba(q.problem, Vars(*map(optax.sgd, STEPS))), samplers.uniform(1), q.start, q.data, jax.random.key(0)
    )
    table = carry.state.stages[0].estimator.table
    held = sum(leaf.size for leaf in jax.tree.leaves(table))
    n, m, p, d = 32, 32, q.start.inner.size, q.start.outer.size
    return claim("SABA: numbers in its tables over n p + (n + m)(p + d)", "=", 1, held / (n * p + (n + m) * (p + d)), 0)


def inner_alone(q: Quadratic, steps: int) -> dict[str, Any]:
    """SABA with a step of 0 on x against SAGA on the inner problem, the same samples."""
    both, _ = errors(q, reduced("inner", "aux", "outer"), steps, STEPS._replace(outer=0.0))
    alone, _ = errors(
        q, lambda q, opts: sweep(descend(implicit(q.problem), Vars(inner=opts.inner), estimator=saga())), steps, STEPS
    )
    gap = largest(both.vars.inner - alone.vars.inner)
    return claim("SABA with x at rest less SAGA on the inner problem, z, largest entry", "=", 0, gap, 1e-12)


def partial_reduction(q: Quadratic, steps: int) -> list[dict[str, Any]]:
    """Constant steps: who reaches the solution, and who stalls (mean of the last ten evaluations)."""
    who = {"z, v and x (SABA)": ("inner", "aux", "outer"), "z alone": ("inner",), "x alone": ("outer",), "nothing (SOBA)": ()}
    rows = []
    for words, names in who.items():
        reached = float(errors(q, reduced(*names), steps)[1][-10:].mean())
        bound = ("<=", 1e-9) if len(names) == 3 else (">=", 1e-3)
        rows.append(claim(f"variance reduced on {words}: error reached", *bound, reached, 0))
    return rows


def main(config: Config) -> None:
    """Measure, print and write."""
    if config.steps < 40:
        raise SystemExit(f"--steps: got {config.steps}, expected at least 40, the number of evaluations")
    with jax.enable_x64(True):
        record(config, config.out)
        q = problem()
        rows = [*at_the_solution(q), unbiased(q), memory(q), inner_alone(q, min(config.steps, 100))]
        write(config.out, claims=pd.DataFrame([*rows, *partial_reduction(q, config.steps)]))


if __name__ == "__main__":
    main(tyro.cli(Config))
