"""The problems of the ADBO paper's experiments, shared out to workers, with the settings of its public code.

*Cleaning*, n = one weight a training row, m = pixels x classes::

    g_i = mean_j sigmoid(x_j) CE_j(z) + 1e-3 |z|^2        f_i = mean CE(z) on the clean half

*Regularisation*, n = one weight a feature, m = features x classes::

    g_i = mean CE(z) + 1/2 mean_jc (exp(x_j) z_jc^2)      f_i = mean CE(z) on the other half

Not ported from the public code: psi_j itself in the place of exp(x_j), of which half are negative at the start, so that g_i has
no minimum; training pixels over 256 and test pixels over 255; equal label noise on workers with equal shards; consensus
multipliers that start at psi.
"""

import itertools
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from bilevel_jax import Levels, Problem, Vars
from bilevel_jax.distributed.adbo import Adbo, Rates, adbo
from bilevel_jax.types import Array
from experiments.data.shards import Shards, shards
from experiments.data_cleaning import weighted

Dataset = Literal["digits", "mnist", "fashion_mnist", "ijcnn1", "covtype"]
Task = Literal["cleaning", "regularisation"]
Scale = Literal["smoke", "small", "full"]
RatesOf = Literal["tuned", "published", "cleaning"]

TASKS: dict[Dataset, Task] = {
    "digits": "cleaning",
    "mnist": "cleaning",
    "fashion_mnist": "cleaning",
    "ijcnn1": "regularisation",
    "covtype": "regularisation",
}
CORRUPTION = 0.1


class Size(NamedTuple):
    """How much of a data set, on how many machines, for how long."""

    workers: int
    active: int
    rows: int | None  # of a half shard; None: all there are
    steps: int


SIZES: dict[Dataset, dict[Scale, Size]] = {
    "digits": {"smoke": Size(4, 2, 100, 500), "small": Size(4, 2, None, 2000), "full": Size(4, 2, None, 10_000)},
    "mnist": {"smoke": Size(6, 3, 100, 500), "small": Size(18, 9, 333, 2000), "full": Size(18, 9, None, 10_000)},
    "ijcnn1": {"smoke": Size(6, 3, 250, 1500), "small": Size(24, 12, 500, 5000), "full": Size(24, 12, None, 15_000)},
    "covtype": {"smoke": Size(6, 3, 250, 1500), "small": Size(18, 9, 500, 5000), "full": Size(18, 9, None, 15_000)},
}
SIZES["fashion_mnist"] = SIZES["mnist"]


class Faster(NamedTuple):
    """How many times larger than published the steps of the inner variables are."""

    worker: Any = 1.0
    estimate: Any = 1.0
    master: Any = 1.0


class Settings(NamedTuple):
    """Of ADBO."""

    rates: Rates  # as published
    cut_damping: float
    consensus_damping: float
    penalty: float
    max_cuts: int  # more than were ever live; the history says if one was refused
    cut_period: int = 50
    scale: float = 1.0  # the weights of rows are sigmoid(scale x), which multiplies their steps by its square
    wide: bool = True  # whether z starts at random


#: Those of the public code.  For Covertype none are known: those of IJCNN1.
PUBLISHED: dict[Task, Settings] = {
    "cleaning": Settings(Rates(1e-3, 0.02, 1e-3, 0.02, 0.1, 1e-3), 0.04, 2e-3, 1.0, 16),
    "regularisation": Settings(Rates(0.01, 0.005, 0.01, 0.005, 0.1, 0.01), 0.005, 0.01, 5.0, 64),
}
#: The lowest mean outer loss at the end of seed 0, which is in no figure, on `FASTER` (``--tune``); outer steps as published.
TUNED: dict[Dataset, Faster] = {
    "digits": Faster(10.0, 3.0, 10.0),
    "mnist": Faster(3.0, 1.0, 1.0),
    "fashion_mnist": Faster(3.0, 1.0, 1.0),
    "ijcnn1": Faster(10.0, 3.0, 10.0),
    "covtype": Faster(10.0, 3.0, 1.0),
}
FASTER = tuple(itertools.starmap(Faster, itertools.product((1.0, 3.0, 10.0), (1.0, 3.0), (1.0, 10.0))))


class Draw(NamedTuple):
    """What differs from seed to seed: leaves of arrays, so that one compiled program serves all seeds."""

    data: Levels  # leaves [N, r, ...]
    start: Vars  # of the consensus variables, and of methods without workers' own
    workers: Vars  # leaves [N, ...], where each worker of ADBO starts
    test: tuple[Array, Array]
    corrupted: Array  # bool [N r]


class Case(NamedTuple):
    """A problem, and the sizes of everything."""

    task: Task
    dataset: Dataset
    note: str
    problem: Problem
    settings: Settings
    size: Size  # as run; ``rows`` is a number
    faster: Faster

    def method(self, start: Vars, faster: Faster | None = None) -> Adbo:
        """ADBO from this start."""
        s, a = self.settings, faster or self.faster
        inner: Any = s.rates.inner
        consensus: Any = s.rates.consensus_inner
        rates = s.rates._replace(
            inner=a.worker * inner,
            consensus_inner=a.master * consensus,
            estimate_inner=a.estimate * inner,
            estimate_consensus=a.estimate * consensus,
            estimate_multiplier=a.estimate * inner,
        )
        return adbo(
            self.problem,
            start,
            rates,
            n_workers=self.size.workers,
            max_cuts=s.max_cuts,
            cut_period=s.cut_period,
            cut_tolerance=0.1 * inner**2,  # the gap scales with the square of that rate
            penalty=s.penalty,
            cut_damping=s.cut_damping,
            consensus_damping=s.consensus_damping,
        )


def _fit(z: Array, rows: Array, labels: Array) -> Array:
    return optax.softmax_cross_entropy_with_integer_labels(rows @ z, labels)


def regularised() -> Problem:
    """x [features], the logarithm of the weights; data (rows, labels)."""

    def inner(z: Array, x: Array, batch: tuple[Array, Array]) -> Array:
        return _fit(z, *batch) + 0.5 * jnp.mean(jnp.exp(x)[:, None] * z**2)

    return Problem(inner=inner, outer=lambda z, x, batch: _fit(z, *batch))


def cleaning(scale: float) -> Problem:
    """x [training rows of all workers]; inner data (rows, labels, index of the row in x), outer data (rows, labels)."""
    plain = weighted(1e-3)
    return Problem(inner=lambda z, x, batch: plain.inner(z, scale * x, batch), outer=plain.outer)


def case(dataset: Dataset, size: Size, rates: RatesOf = "tuned") -> Case:
    """The problem on a data set; reads the data once, to know how much there is.

    ``rates``: of ADBO: larger inner steps than published, published ones, or, for cleaning, such that weights move at all:
    their steps are a million times larger, their consensus is damped, and z starts at 0.
    """
    task, parts, settings = TASKS[dataset], load(dataset, size, 0), PUBLISHED[TASKS[dataset]]
    if rates == "cleaning":
        settings = settings._replace(scale=1000.0, consensus_damping=10.0, wide=False)
    problem = cleaning(settings.scale) if task == "cleaning" else regularised()
    size = size._replace(rows=parts.train_y.shape[1])
    return Case(task, dataset, parts.note, problem, settings, size, TUNED[dataset] if rates == "tuned" else Faster())


def load(dataset: Dataset, size: Size, seed: int) -> Shards:
    """The shards of a seed."""
    corruption = CORRUPTION if TASKS[dataset] == "cleaning" else 0.0
    return shards(dataset, size.workers, size.rows, corruption=corruption, seed=seed)


def levels(parts: Shards) -> Levels:
    """The data of all workers, leaves ``[N, r, ...]``."""
    inner: tuple[Any, ...] = (parts.train_x, parts.train_y)
    if TASKS[parts.name] == "cleaning":  # type: ignore[index]
        inner = (*inner, np.arange(parts.train_y.size, dtype=np.int32).reshape(parts.train_y.shape))
    return Levels(inner, (parts.validation_x, parts.validation_y))


def draw(case: Case, seed: int) -> Draw:
    """Corrupted labels and starts of a seed.

    Cleaning: x = 0, and every worker and the master start at Kaiming-normal weights of their own (fan out), as published.
    Regularisation: everyone starts at the same weights (fan in) and the same x, normal.
    """
    parts, N = load(case.dataset, case.size, seed), case.size.workers
    p, classes = parts.train_x.shape[-1], parts.classes

    def normal(number: int, shape: tuple[int, ...], deviation: float) -> np.ndarray:
        return (np.random.default_rng([seed, number]).normal(size=shape) * deviation).astype(np.float32)

    if case.task == "cleaning":
        wide = np.sqrt(2 / classes) if case.settings.wide else 0.0
        z, *zs = (normal(i, (p, classes), wide) for i in range(N + 1))
        x = np.zeros(parts.train_y.size, np.float32)
        workers = Vars(np.stack(zs), None, None)
    else:
        z, x = normal(0, (p, classes), np.sqrt(2 / p)), normal(1, (p,), 1.0)
        workers = Vars(None, None, None)
    made: Any = (levels(parts), Vars(z, None, x), workers, (parts.test_x, parts.test_y), parts.corrupted.ravel())
    return Draw(*jax.tree.map(jnp.asarray, made))


def measure(vars: Vars, draw: Draw) -> dict[str, Array]:
    """Test loss and accuracy of the inner variable; how far x has moved; and which share of the corrupted rows is among the
    rows of lowest weight, as many as are corrupted (cleaning)."""
    rows, labels = draw.test
    logits, x = rows @ vars.inner, vars.outer
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
    found = {
        "loss": loss,
        # argmax of NaN is class 0: a run that diverged has no accuracy
        "accuracy": jnp.where(jnp.isfinite(loss), (logits.argmax(1) == labels).mean(), jnp.nan),
        "outer_moved": jnp.abs(x - draw.start.outer).max(),
    }
    if draw.corrupted.size == x.size:
        rank = jnp.argsort(jnp.argsort(x))
        wrong = draw.corrupted.sum()
        found["recall"] = (draw.corrupted & (rank < wrong)).sum() / wrong
    return found
