"""Data hyper-cleaning: figure 2b of the SOBA/SABA paper, and the experiment of the bilevel thesis.

``python -m experiments.data_cleaning --dataset mnist --corruption 0.5 --out results/mnist``
``python -m experiments.data_cleaning --dataset mnist --setting thesis --corruption 0.4 --out results/thesis``

Inner problem: a linear softmax classifier on training rows of which some labels are wrong, each row weighted by sigmoid(x_i).
Outer problem: the loss on clean validation rows.  Measured: the error on test rows, the validation loss, and the recall of
the corrupted labels (of the k rows with the smallest weights, k the number of corrupted labels, the share that is corrupted).
"""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro

from bilevel_jax import Levels, Problem, Vars
from bilevel_jax.types import Array
from experiments import data
from experiments.harness import Options, Task, compare
from experiments.methods import Name, Rates

#: Best (step size, outer ratio) of the paper's grids by corruption (figures of 2022; SRBA: public benchmark of 2024, at 0.5
#: only).  MA-SOBA takes SOBA's, SPABA SRBA's and STORM MRBO's.
BEST = {
    0.5: {"soba": (1.0, 1e-4), "saba": (0.1, 1e-4), "srba": (0.001, 1e-5), "fsla": (0.316, 1e-5), "storm_soba": (0.316, 1e-5)},
    0.7: {
        "soba": (0.316, 1e-4),
        "saba": (0.01, 3.16e-5),
        "srba": (0.001, 1e-5),
        "fsla": (0.316, 1e-5),
        "storm_soba": (0.316, 1e-5),
    },
    0.9: {
        "soba": (1.0, 3.16e-4),
        "saba": (0.1, 3.16e-4),
        "srba": (0.001, 1e-5),
        "fsla": (1.0, 1e-4),
        "storm_soba": (0.316, 1e-5),
    },
}
ALIKE = {"ma_soba": "soba", "spaba": "srba"}
#: Steps and evaluations on two cores in minutes.
LENGTH = {"digits": (2**13, 32), "mnist": (2**13, 32), "fashion_mnist": (2**13, 32)}
#: Weight of |z|^2 in the inner loss, without a factor 1/2, as in the papers' codes.
RIDGE = {"soba": 0.2, "thesis": 0.001}

#: The thesis' settings: 200 inner steps, 3 terms, batches of 1,000 (BSA and TTSA: 1; TTSA: one inner step), step size 0.1 of
#: z (0.01 for single rows).  Those of x are 1e4 to 1e5 times the thesis', with which nothing is cleaned (see the README).
#: Eta of the linear solvers is the step size of z, as the thesis' 0.5 is beyond the limit of stability.  Updates: about a
#: quarter of a minute of each solver on two cores.
THESIS = {
    "stocbio": Rates(0.1, 1e-5, 200, 3, batch_size=1000, updates=100),
    "amigo": Rates(0.1, 1e-5, 200, 3, batch_size=1000, updates=100),
    "vrbo": Rates(0.1, 1e-4, 200, 3, batch_size=1000, updates=100),
    "mrbo": Rates(0.1, 1e-4, 1, 3, batch_size=1000, updates=1000),
    "sustain": Rates(0.1, 1e-4, 1, 3, batch_size=1000, updates=1000),
    "bsa": Rates(0.01, 1e-5, 200, 3, batch_size=1, updates=2000),
    "ttsa": Rates(0.01, 1e-5, 1, 3, batch_size=1, updates=30_000),
    "soba": Rates(0.1, 1e-4, batch_size=1000, updates=2000),
    "saba": Rates(0.1, 1e-4, batch_size=1000, updates=2000),
    "aid_cg": Rates(0.1, 1e-5, 200, 3, updates=10),
    "aid_fp": Rates(0.1, 1e-5, 200, 3, updates=10),
    "hoag": Rates(0.1, 1e-5, 200, 3, updates=10),
    "itd_truncated": Rates(0.1, 1e-5, 200, 3, updates=10),
}


@dataclasses.dataclass(frozen=True)
class Config(Options):
    """Data hyper-cleaning with a linear softmax classifier."""

    dataset: Literal["digits", "mnist", "fashion_mnist"] = "digits"
    """digits is bundled; the others are downloaded, or found through BILEVEL_JAX_DATA"""
    corruption: float = 0.5
    """share of the training labels that are replaced: by a uniform class, which may be the right one, each with this
    probability (setting soba), or by a wrong one, of exactly this share (setting thesis)"""
    setting: Literal["soba", "thesis"] = "soba"
    """whose data, noise, losses, step sizes and metrics: those of the SOBA/SABA paper, or of the bilevel thesis"""
    solvers: tuple[Name, ...] | None = None
    """which solvers to compare (default: four single-loop ones, or all those of the thesis)"""


def _fit(z: Array, rows: Array, labels: Array) -> Array:
    return optax.softmax_cross_entropy_with_integer_labels(rows @ z, labels)


def weighted(ridge: float) -> Problem:
    """z [pixels, classes]; x [training rows]; inner data (rows, labels, index of the row in x), outer data (rows, labels)."""

    def inner(z: Array, x: Array, batch: tuple[Array, Array, Array]) -> Array:
        rows, labels, index = batch
        return jax.nn.sigmoid(x[index]) * _fit(z, rows, labels) + ridge * jnp.sum(z**2)

    return Problem(inner=inner, outer=lambda z, x, batch: _fit(z, *batch))


def names(config: Config) -> tuple[Name, ...]:
    """The solvers asked for, or those of the setting."""
    default = ("soba", "ma_soba", "saba", "srba") if config.setting == "soba" else tuple(THESIS)
    return config.solvers or default  # type: ignore[return-value]


def rates(config: Config) -> dict[str, Rates]:
    """The settings of each solver: the given step sizes, or the best ones for the nearest corruption of the paper."""
    if config.setting == "thesis":
        found = {name: THESIS.get(name, Rates(0.1, 1e-4, batch_size=1000)) for name in names(config)}
    else:
        best = BEST[min(BEST, key=lambda level: abs(level - config.corruption))]
        known = {name: ALIKE.get(name, name) for name in names(config)}
        unknown = [name for name, like in known.items() if like not in best]
        if unknown and not (config.step_size and config.outer_ratio):
            raise SystemExit(f"--solvers: got {unknown}, for which --step-size and --outer-ratio must be given in this setting")
        found = {name: Rates(*best.get(like, (0.0, 0.0))) for name, like in known.items()}
    return {
        name: r._replace(
            step_size=config.step_size or r.step_size,
            outer_ratio=config.outer_ratio or r.outer_ratio,
            updates=None if config.steps else r.updates,
        )
        for name, r in found.items()
    }


def task(config: Config) -> Task:
    """Load the data, corrupt the labels once, and say what to measure."""
    thesis = config.setting == "thesis"
    load = data.shifted if thesis else data.cleaning
    rows = load(config.dataset, corruption=config.corruption)
    problem = weighted(RIDGE[config.setting])
    n, wrong = len(rows.train_y), int(rows.corrupted.sum())
    levels = Levels((rows.train_x, rows.train_y, np.arange(n, dtype=np.int32)), (rows.validation_x, rows.validation_y))
    levels = jax.tree.map(jnp.asarray, levels)
    test_x, test_y, corrupted = map(jnp.asarray, (rows.test_x, rows.test_y, rows.corrupted))

    @jax.jit
    def measured(vars: Vars, levels: Levels, test_x: Array, test_y: Array, corrupted: Array) -> dict[str, Array]:
        def one(vars: Vars) -> dict[str, Array]:
            z, x = vars.inner, vars.outer
            fine = jnp.isfinite(z).all() & jnp.isfinite(x).all()
            lowest = jnp.argsort(x)[:wrong]
            row = {
                "test_loss": _fit(z, test_x, test_y).mean(),
                "test_error": ((test_x @ z).argmax(1) != test_y).mean(),
                "validation_loss": problem.outer(z, x, levels.outer).mean(),
                "recall": corrupted[lowest].mean() if wrong else jnp.ones(()),
            }
            return jax.tree.map(lambda value: jnp.where(fine, value, jnp.nan), row)

        return jax.lax.map(one, vars._replace(aux=None))

    shape = rows.train_x.shape[1], rows.classes
    # The thesis starts at torch's Kaiming-normal weights, of deviation sqrt(2 / classes) (fan_out).
    wide = np.random.default_rng(0).normal(size=shape) * np.sqrt(2 / rows.classes)
    return Task(
        name=f"data cleaning, {rows.name}, corruption {config.corruption:g}",
        note=rows.note,
        problem=problem,
        data=levels,
        start=Vars(jnp.asarray(wide if thesis else np.zeros(shape), jnp.float32), None, jnp.full(n, 0.0 if thesis else -2.0)),
        measure=lambda vars: jax.device_get(measured(vars, levels, test_x, test_y, corrupted)),
        labels=({"test_loss": "test loss"} if thesis else {})
        | {"test_error": "test error", "recall": "recall of corrupted labels"},
        log_work=True,
        extra={"data_note": rows.note, "corrupted": wrong},
    )


def main(config: Config) -> None:
    """Run the comparison."""
    steps, evaluations = LENGTH[config.dataset]
    steps, evaluations = (steps, evaluations) if config.setting == "soba" else (200, 10)
    settings = rates(config)
    config = dataclasses.replace(config, steps=config.steps or steps, evaluations=config.evaluations or evaluations)
    if not 0 <= config.corruption <= 1:
        raise SystemExit(f"--corruption: got {config.corruption}, expected a number in [0, 1]")
    compare(lambda: task(config), names(config), settings, config, {"experiment": "data_cleaning"})


if __name__ == "__main__":
    main(tyro.cli(Config))
