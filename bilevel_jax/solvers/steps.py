"""Step sizes: the optimisers that a solver wants, and the schedules of the papers."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
import optax

from bilevel_jax import checks
from bilevel_jax.types import Solver, Vars


class Decay(NamedTuple):
    """Exponents e of the steps in a paper, rate / (t + 1)^e, and whether the solver moves v with a step."""

    inner: float
    outer: float
    aux: bool = True


#: By the name of the constructor.
DECAYS = {
    "soba": Decay(1 / 2, 1 / 2),
    "ma_soba": Decay(1 / 2, 1 / 2),
    "saba": Decay(0, 0),
    "srba": Decay(0, 0),
    "spaba": Decay(0, 0),
    "storm_soba": Decay(1 / 3, 1 / 3),
    "fsla": Decay(1 / 2, 1 / 2),
    "sl_bamm": Decay(0, 0),
    "meha": Decay(0, 0),
    "f2sa": Decay(4 / 7, 5 / 7),
    "f2ba": Decay(0, 0),
    "f2sa_p": Decay(0, 0, aux=False),
    "bome": Decay(0, 0),
    "pbgd": Decay(0, 0),
    "bvfim": Decay(0, 0),
    "bvfsm": Decay(0, 0),
    "hjfbio": Decay(0, 0),
    "fdehbo": Decay(1 / 3, 1 / 3),
    "iaptt": Decay(0, 0),
    "bda": Decay(0, 0, aux=False),
    "aid_bio": Decay(0, 0, aux=False),
    "ba": Decay(0, 0, aux=False),
    "hoag": Decay(0, 0, aux=False),
    "bsa": Decay(1 / 2, 1 / 2, aux=False),
    "ttsa": Decay(2 / 5, 3 / 5, aux=False),
    "stocbio": Decay(0, 0, aux=False),
    "amigo": Decay(0, 0, aux=False),
    "mrbo": Decay(1 / 3, 1 / 3, aux=False),
    "sustain": Decay(1 / 3, 1 / 3, aux=False),
    "vrbo": Decay(0, 0, aux=False),
    "stable": Decay(1 / 2, 1 / 2, aux=False),
    "itd_bio": Decay(0, 0, aux=False),
    "fo_itd_bio": Decay(0, 0, aux=False),
    "pzobo": Decay(0, 0, aux=False),
}


def default_opts(solver: Callable[..., Solver], inner: float, aux: float | None = None, outer: float | None = None) -> Vars:
    """The step-size schedules of a solver's paper, from the initial step sizes.

    Schedules count applications of the optimiser: where a solver does several inner steps a sweep, those of z are counted;
    deterministic double loops and unrolled solvers count anew in every sweep.

    Args:
        solver: a constructor of `bilevel_jax.solvers` that takes ``opts``.
        inner, aux, outer: step sizes of z, ``vars.aux`` and x at the first step; aux None for solvers that do not step it.

    Returns:
        ``Vars`` of `optax.sgd` with steps ~ t^-e: e = 0 for most, but 1/2 for SOBA, MA-SOBA, FSLA, BSA and STABLE, 1/3 for
        STORM, MRBO, SUSTAIN and FdeHBO, 2/5 (z) and 3/5 (x) for TTSA, 4/7 (z and y) and 5/7 (x)
        for F2SA.

    Raises:
        TypeError, ValueError: for what is not one of those constructors, step sizes that are missing or not wanted, and those
            that are not finite numbers of at least 0 (traced ones pass).

    Example:
        >>> from bilevel_jax.solvers import soba, ttsa
        >>> [opt is not None for opt in default_opts(soba, 0.1, 0.1, 0.01)]
        [True, True, True]
        >>> [opt is not None for opt in default_opts(ttsa, inner=0.1, outer=0.01)]
        [True, False, True]
    """
    if not callable(solver):
        example = f"bilevel_jax.solvers.{solver if isinstance(solver, str) and solver in DECAYS else 'saba'}"
        raise checks.wrong_kind("solver", solver, Callable, f"the function, as {example}")
    name = getattr(solver, "__name__", None)
    if name not in DECAYS:
        raise ValueError(f"solver: got {name or type(solver).__name__}, expected one of {list(DECAYS)}")
    decay = DECAYS[name]
    for field, variable, value in (("inner", "z", inner), ("outer", "x", outer)):
        if value is None:
            raise ValueError(f"{field}: got None, expected the step size of {variable}")
    if aux is None and decay.aux:
        raise ValueError(f"aux: got None, expected a step size, because {name} moves vars.aux")
    if aux is not None and not decay.aux:
        raise ValueError(f"aux: got {aux}, expected None, because {name} does not move vars.aux with an optimiser")

    for field, value in (("inner", inner), ("aux", aux), ("outer", outer)):
        if value is not None:
            checks.number(field, value, zero=True)

    def opt(rate: float, exponent: float) -> Any:
        return optax.sgd(rate if exponent == 0 else lambda t: rate * jnp.asarray(t + 1, jnp.float32) ** -exponent)

    return Vars(
        opt(inner, decay.inner),
        None if aux is None else opt(aux, decay.inner),
        opt(outer, decay.outer),  # type: ignore[arg-type]
    )


def three(opts: Vars) -> Vars:
    """Single-loop solvers move all three variables.

    Raises:
        TypeError, ValueError: for anything but ``Vars``, and for an optimiser that is missing.
    """
    if not isinstance(opts, Vars):
        raise TypeError(f"opts: got {type(opts).__name__}, expected Vars(inner=..., aux=..., outer=...)")
    for name, opt in zip(Vars._fields, opts, strict=True):
        if opt is None:
            raise ValueError(f"opts.{name}: got None, expected an optax transformation: the solver moves {name}")
    return opts


def two(opts: Vars) -> Vars:
    """Double-loop and unrolled solvers move z and x; v is solved for, or not there.

    Raises:
        TypeError, ValueError: for anything but ``Vars``, for an optimiser that is missing, and for one of v.
    """
    if not isinstance(opts, Vars):
        raise TypeError(f"opts: got {type(opts).__name__}, expected Vars(inner=..., outer=...)")
    for name in ("inner", "outer"):
        if getattr(opts, name) is None:
            raise ValueError(f"opts.{name}: got None, expected an optax transformation: the solver moves {name}")
    if opts.aux is not None:
        raise ValueError("opts.aux: got an optimiser, expected None, because the solver moves z and x only")
    return opts
