"""The solvers of the comparisons, by name: how each is built from its rates and the numbers of blocks."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax.numpy as jnp
import optax

from bilevel_jax import Levels, Problem, Solver, Vars, default_opts, linear_solve, solvers

#: Rows of the batches that oracle calls are counted on, whatever the batches of a solver.
UNIT = 64

Name = Literal[
    "soba",
    "ma_soba",
    "saba",
    "srba",
    "spaba",
    "storm_soba",
    "fsla",
    "aid_cg",
    "aid_fp",
    "hoag",
    "itd_bio",
    "itd_truncated",
    "bsa",
    "ttsa",
    "stocbio",
    "amigo",
    "mrbo",
    "sustain",
    "vrbo",
    "pzobo",
    "meha",
    "bome",
    "pbgd",
    "f2sa",
    "f2ba",
    "f2sa_p",
]


class Rates(NamedTuple):
    """The settings of a solver: step sizes, lengths of its loops, and how much of it to run."""

    step_size: float  # of z and v
    outer_ratio: float  # step size of z over that of x
    inner_steps: int = 10  # on z, in an update of a double-loop solver
    terms: int = 10  # steps, factors or applications of its linear solver
    linear_rate: float | None = None  # step size of its linear solver; by default that of z
    batch_size: int | None = None  # rows of a block; by default that of the comparison
    updates: int | None = None  # by default those of the comparison
    adam: bool = False  # whether x moves by Adam, at the same rate
    multiplier: float = 10.0  # of a penalty; of MEHA, at its start
    gamma: float = 10.0  # of MEHA's envelope
    decay: float | None = None  # e of step sizes that fall like (t + 1)^-e; by default those of the solver's paper

    def opts(self, solver: Callable[..., Solver]) -> Vars:
        """The schedules of the solver's paper, from these numbers."""
        return self._moved(default_opts(solver, self.step_size, self.step_size, self.step_size / self.outer_ratio))

    def two(self, solver: Callable[..., Solver]) -> Vars:
        """The same, for a solver that does not step v."""
        return self._moved(default_opts(solver, inner=self.step_size, outer=self.step_size / self.outer_ratio))

    def _moved(self, opts: Vars) -> Vars:
        rates = Vars(self.step_size, self.step_size, self.step_size / self.outer_ratio)
        if self.decay is not None:
            rates = Vars(*(_falling(rate, self.decay) for rate in rates))
            opts = Vars(*(opt and optax.sgd(rate) for opt, rate in zip(opts, rates, strict=True)))
        return opts._replace(outer=optax.adam(rates.outer)) if self.adam else opts

    @property
    def rate(self) -> float:
        """Of the linear solver."""
        return self.step_size if self.linear_rate is None else self.linear_rate


def _falling(rate: float, decay: float) -> optax.Schedule:
    return lambda t: rate * jnp.asarray(t + 1, jnp.float32) ** -decay


class Method(NamedTuple):
    """``build(problem, rates, blocks) -> Solver``."""

    build: Callable[[Problem, Rates, Levels], Solver]
    coin: bool = False  # whether its lanes branch differently under vmap
    full: bool = False  # whether every draw is all the data
    random: bool = True  # whether seeds differ; if not, one is all


def _plainly(make: Callable[..., Solver]) -> Method:
    return Method(lambda problem, rates, blocks: make(problem, rates.opts(make)))


def _looped(make: Callable[..., Solver], own: Callable[[Rates, Levels], dict[str, Any]], **flags: bool) -> Method:
    """A double-loop or unrolled solver, with its own arguments from the rates and the numbers of blocks."""
    return Method(lambda problem, rates, blocks: make(problem, rates.two(make), **own(rates, blocks)), **flags)


def _first_order(make: Callable[..., Solver], own: Callable[[Rates], dict[str, Any]]) -> Method:
    """A solver of that family that steps z, its second inner iterate and x, on all the data."""
    return Method(lambda problem, rates, _: make(problem, rates.opts(make), **own(rates)), full=True, random=False)


METHODS: dict[str, Method] = {
    "soba": _plainly(solvers.soba),
    "ma_soba": _plainly(solvers.ma_soba),
    "saba": _plainly(solvers.saba),
    # A full pass every (n + m) / (2 batch) steps: period_frac = .5, the public benchmark's default, and its best on IJCNN1
    # (on covtype and MNIST its best are 8 and 512, that is, hardly any full pass; not followed here).
    "srba": Method(
        lambda problem, rates, blocks: solvers.srba(
            problem, rates.opts(solvers.srba), period=max(1, (blocks.inner + blocks.outer) // 2)
        )
    ),
    # The same number of full passes on average.
    "spaba": Method(
        lambda problem, rates, blocks: solvers.spaba(
            problem, rates.opts(solvers.spaba), probability=2 / (blocks.inner + blocks.outer)
        ),
        coin=True,
    ),
    "storm_soba": _plainly(solvers.storm_soba),
    # eta = 1 / sqrt(t + 1), the paper's schedule; the public benchmark scales it by the step size.
    "fsla": _plainly(solvers.fsla),
    "aid_cg": _looped(
        solvers.aid_bio,
        lambda r, _: {"inner_steps": r.inner_steps, "linear_solver": linear_solve.cg(max_steps=r.terms)},
        full=True,
        random=False,
    ),
    "aid_fp": _looped(
        solvers.aid_bio,
        lambda r, _: {
            "inner_steps": r.inner_steps,
            "linear_solver": linear_solve.richardson(steps=r.terms, rate=r.rate),
        },
        full=True,
        random=False,
    ),
    # At most as many steps on z, and on v, as the other double loops take on z.
    "hoag": _looped(solvers.hoag, lambda r, _: {"max_steps": r.inner_steps}, full=True, random=False),
    "itd_bio": _looped(solvers.itd_bio, lambda r, _: {"inner_steps": r.inner_steps}, full=True, random=False),
    # The "reverse" of the thesis' experiments: back-propagation through the last steps only.
    "itd_truncated": _looped(
        solvers.itd_bio, lambda r, _: {"inner_steps": r.inner_steps, "truncate": r.terms}, full=True, random=False
    ),
    "bsa": _looped(solvers.bsa, lambda r, _: {"inner_steps": r.inner_steps, "terms": r.terms, "rate": r.rate}, coin=True),
    "ttsa": _looped(solvers.ttsa, lambda r, _: {"terms": r.terms, "rate": r.rate}, coin=True),
    "stocbio": _looped(solvers.stocbio, lambda r, _: {"inner_steps": r.inner_steps, "terms": r.terms, "rate": r.rate}),
    "amigo": _looped(solvers.amigo, lambda r, _: {"inner_steps": r.inner_steps, "aux_steps": r.terms, "aux_rate": r.rate}),
    "mrbo": _looped(solvers.mrbo, lambda r, _: {"terms": r.terms, "rate": r.rate}),
    "sustain": _looped(solvers.sustain, lambda r, _: {"terms": r.terms, "rate": r.rate}, coin=True),
    # A refresh every 3 sweeps, as in the thesis' experiments, and a tenth of stocBiO's inner steps.
    "vrbo": _looped(
        solvers.vrbo, lambda r, _: {"inner_steps": math.ceil(r.inner_steps / 10), "terms": r.terms, "rate": r.rate}
    ),
    "pzobo": _looped(solvers.pzobo, lambda r, _: {"inner_steps": r.inner_steps, "radius": 0.01}, full=True),
    "meha": _first_order(solvers.meha, lambda r: {"gamma": r.gamma, "c_low": r.multiplier}),
    "bome": _first_order(solvers.bome, lambda r: {"inner_steps": r.inner_steps}),
    "pbgd": _first_order(solvers.pbgd, lambda r: {"multiplier": r.multiplier, "inner_steps": r.inner_steps}),
    # With the multiplier of its paper, 10 (k + 1)^1/7.
    "f2sa": Method(lambda problem, rates, _: solvers.f2sa(problem, rates.opts(solvers.f2sa), inner_steps=rates.inner_steps)),
    "f2ba": _first_order(solvers.f2ba, lambda r: {"multiplier": r.multiplier, "inner_steps": r.inner_steps}),
    "f2sa_p": _looped(
        solvers.f2sa_p,
        lambda r, _: {"multiplier": r.multiplier, "inner_steps": r.inner_steps},
        full=True,
        random=False,
    ),
}


#: Those that step z several times an update.  A schedule would count these steps for z, and updates for x; in deterministic
#: loops it starts anew in every update.
LOOPED = frozenset(
    {"aid_cg", "aid_fp", "hoag", "itd_bio", "itd_truncated", "bsa", "stocbio", "amigo"}
    | {"vrbo", "pzobo", "bome", "pbgd", "f2sa", "f2ba", "f2sa_p"}
)


def chosen(path: Path, task: dict[str, Any], names: tuple[str, ...]) -> dict[str, dict[str, Any]]:
    """The step sizes of each solver that `experiments.grid` chose, from its settings.json: entries of `Rates`.

    Raises:
        SystemExit: for a file that is not there, is none of the grid's, was made on another task (experiment, data set, batch
            size, ...), or lacks one of the solvers.
    """
    try:
        known = json.loads(path.read_text())
        made, settings = {**known["task"]}, {name: _checked(one) for name, one in known["settings"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        wrong = f"{type(error).__name__}: {error}"
        raise SystemExit(f"--settings: got {path} ({wrong}), expected a settings.json of experiments.grid") from None
    other = [f"{key}: {made.get(key)!r} there, {task[key]!r} here" for key in task if made.get(key) != task[key]]
    if other:
        raise SystemExit(f"--settings: got {path}, chosen on another task: {', '.join(other)}")
    missing = [name for name in names if name not in settings]
    if missing:
        raise SystemExit(
            f"--settings: got {path}, which holds nothing for {missing}, expected one of --solvers {list(settings)}"
        )
    return {name: settings[name] for name in names}


def provenance(path: Path | None) -> dict[str, Any]:
    """What to record of a file of settings: all of it."""
    return {} if path is None else {"chosen": json.loads(path.read_text())}


def _checked(one: dict[str, Any]) -> dict[str, Any]:
    """The entries that are `Rates`."""
    found = {key: one[key] for key in ("step_size", "outer_ratio", "decay")}
    for key, value in found.items():
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not (number and 0 < value < math.inf) and not (key == "decay" and (value is None or (number and value == 0))):
            raise ValueError(f"{key}: got {value!r}, expected a positive number")
    return found
