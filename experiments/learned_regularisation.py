"""Learned regularisation of a text classifier: 20 Newsgroups, one l2 weight a word (figure of the stocBiO paper).

``python -m experiments.learned_regularisation --out results/newsgroups``

Inner problem: softmax regression on half of the training messages, each weight z_wc penalised by exp(x_w) / (2 words classes).
Outer problem: the loss on the other half.  Measured: loss and error on the test messages.

The rows are cut into blocks when they are loaded, because a transposed sparse product needs the transpose of its block: a
"sample" of the data is a block of rows, and the loss of a block is its share of the mean over all rows.
"""

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pandas as pd
import tyro

from bilevel_jax import Levels, Problem, Solver, Vars, descend, implicit, linear_solve, samplers, solvers, sweep
from bilevel_jax.types import Array
from experiments import data, figures, sparse
from experiments.data.newsgroups import Newsgroups
from experiments.race import Entrant, Options, prepare, race, report

Name = Literal["stocbio", "amigo", "soba", "aid_fp", "aid_cg", "hoag", "itd_bio", "fixed_x"]
#: Those that take a block at a time; the others take all rows.
STOCHASTIC = ("stocbio", "amigo", "soba", "fixed_x")
figures.STYLES |= {"fixed_x": ("#000000", "--")}


@dataclasses.dataclass(frozen=True)
class Config(Options):
    """One l2 weight a word on 20 Newsgroups, at the settings of the stocBiO paper's code."""

    vocabulary: int | None = None
    """how many words to keep, those of most messages (default: all 130,107)"""
    solvers: tuple[Name, ...] = ("stocbio", "aid_fp", "aid_cg", "hoag", "itd_bio", "fixed_x")
    """which solvers to compare; fixed_x takes the inner steps alone, and leaves x at 0"""
    batch_sizes: tuple[int, ...] = (1000,)
    """rows of a block, for stocbio, amigo, soba and fixed_x, which run once for each"""
    seconds: float = 25.0
    """how long each runs, compilation and metrics excluded"""
    evaluations: int = 12
    """how often to measure"""
    inner_rate: float = 100.0
    """step size of z"""
    outer_rate: float = 100.0
    """step size of x (of soba: that over --steps)"""
    outer: Literal["sgd", "adam"] = "sgd"
    """optimiser of x"""
    steps: int = 10
    """steps on z and terms, or steps, for v in an update"""
    eta: float = 0.5
    """rate of the Neumann sums of stocbio and hoag"""
    aux_rate: float = 5.0
    """step size of v of amigo and soba"""
    seed: int = 1
    """of the order in which blocks are drawn"""

    def __post_init__(self) -> None:
        for name in ("seconds", "evaluations", "inner_rate", "outer_rate", "steps", "eta", "aux_rate", "vocabulary"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise SystemExit(f"--{name.replace('_', '-')}: got {value}, expected a positive number")
        for name in ("solvers", "batch_sizes"):
            if not getattr(self, name):
                raise SystemExit(f"--{name.replace('_', '-')}: got none, expected at least one")
        if min(self.batch_sizes) < 1:
            raise SystemExit(f"--batch-sizes: got {self.batch_sizes}, expected positive numbers of rows")


def cut(rows: Any, labels: np.ndarray, batch_size: int | None) -> tuple[np.ndarray, np.ndarray, sparse.Matrix]:
    """(labels, weights, rows) in blocks ``[blocks, batch_size]``, all rows in one by default.

    The weights of a block's rows are such that the mean over the blocks is the mean over the rows; padding weighs nothing.
    """
    n = len(labels)
    size = batch_size or n
    blocks = -(-n // size)
    padded = [
        np.pad(leaf, (0, blocks * size - n)).reshape(blocks, size) for leaf in (labels, np.full(n, blocks / n, rows.dtype))
    ]
    return padded[0], padded[1], sparse.blocks(rows, size)


def blocks(text: Newsgroups, batch_size: int | None) -> Levels:
    """The training and the validation rows in blocks, on the device."""
    parts = (text.train_x, text.train_y), (text.validation_x, text.validation_y)
    return jax.tree.map(jnp.asarray, Levels(*(cut(*part, batch_size) for part in parts)))


def logits(z: Array, batch: tuple[Array, Array, sparse.Matrix]) -> Array:
    """``[blocks, rows, classes]``."""
    labels, _, rows = batch
    return sparse.product(rows, z, labels.shape[1])


def fit(z: Array, batch: tuple[Array, Array, sparse.Matrix]) -> Array:
    """The cross-entropy of every block."""
    labels, weights, _ = batch
    return (weights * optax.softmax_cross_entropy_with_integer_labels(logits(z, batch), labels)).sum(1)


def penalty(z: Array, x: Array) -> Array:
    """``mean_wc exp(x_w) z_wc^2 / 2``; the sum over classes is a matrix product because that runs on all cores."""
    return 0.5 / z.size * jnp.vdot(jnp.exp(x), z**2 @ jnp.ones(z.shape[1], z.dtype))


#: z [words, classes]; x [words]; data as `cut` makes them.
problem = Problem(inner=lambda z, x, batch: fit(z, batch) + penalty(z, x), outer=lambda z, x, batch: fit(z, batch))


def build(name: Name, config: Config) -> Solver:
    """The solver of a name, at the settings given.

    aid_fp starts v at 0 in every update, as in the paper's code: from the last v it diverges, because a rate of 100 is above
    2 / L, which falls to 95 after five updates.  hoag is what that code calls so: the Neumann sum of stocBiO on all rows.  soba
    takes one step where the others take ``steps``, and so moves x by as much less.
    """
    steps, rate = config.steps, config.inner_rate
    opts = Vars(
        inner=optax.sgd(rate),
        outer=getattr(optax, config.outer)(config.outer_rate / (steps if name == "soba" else 1)),
    )
    match name:
        case "stocbio" | "hoag":
            return solvers.stocbio(problem, opts, inner_steps=steps, terms=steps, rate=config.eta)
        case "amigo":
            return solvers.amigo(problem, opts, inner_steps=steps, aux_steps=steps, aux_rate=config.aux_rate)
        case "soba":
            return solvers.soba(problem, opts._replace(aux=optax.sgd(config.aux_rate)))
        case "aid_fp":
            fixed_point = linear_solve.richardson(steps=steps, rate=rate)
            return solvers.aid_bio(problem, opts, inner_steps=steps, linear_solver=fixed_point, warm=False)
        case "aid_cg":
            return solvers.aid_bio(problem, opts, inner_steps=steps, linear_solver=linear_solve.cg(max_steps=steps))
        case "itd_bio":
            return solvers.itd_bio(problem, opts, inner_steps=steps)
        case "fixed_x":
            return sweep(descend(implicit(problem), opts._replace(outer=None), steps=steps))


def main(config: Config) -> pd.DataFrame:
    """Run the comparison."""
    prepare(config)
    text = data.twenty_newsgroups(config.vocabulary)
    words, classes = text.train_x.shape[1], text.classes
    sizes: dict[str, tuple[Name, int | None]] = {}
    for name in config.solvers:
        for size in config.batch_sizes if name in STOCHASTIC else (None,):
            sizes[name if size is None or len(config.batch_sizes) == 1 else f"{name} {size}"] = name, size
    levels = {size: blocks(text, size) for size in {None, *(size for _, size in sizes.values())}}
    entrants = {
        label: Entrant(
            build(name, config),
            samplers.uniform(1),
            levels[size],
            Levels(*(part[0].shape[1] for part in levels[size])),
            config.steps if name == "soba" else 1,
        )
        for label, (name, size) in sizes.items()
    }
    for k, label in enumerate(entrants):
        figures.STYLES.setdefault(label, (f"C{k}", "-"))
    test = jax.tree.map(jnp.asarray, cut(text.test_x, text.test_y, None))

    @jax.jit
    def measured(z: Array, x: Array, levels: Levels, test: Any) -> dict[str, Array]:
        fine = jnp.isfinite(z).all() & jnp.isfinite(x).all()
        row = {
            "test_loss": fit(z, test).mean(),
            "test_error": (logits(z, test).argmax(2) != test[0]).mean(),
            "validation_loss": problem.outer(z, x, levels.outer).mean(),
            "inner_loss": problem.inner(z, x, levels.inner).mean(),
            "x_largest": jnp.abs(x).max(),
        }
        return jax.tree.map(lambda value: jnp.where(fine, value, jnp.nan), row)

    rows = race(
        entrants,
        Vars(jnp.zeros((words, classes)), None, jnp.zeros(words)),
        lambda vars: measured(vars.inner, vars.outer, levels[None], test),
        evaluations=config.evaluations,
        seconds=config.seconds,
        seed=config.seed,
    )
    title = f"learned regularisation. {text.note}"
    report(config, rows, {"test_loss": "test loss", "test_error": "test error"}, title, data_note=text.note)
    return rows


if __name__ == "__main__":
    main(tyro.cli(Config))
