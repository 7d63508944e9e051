"""Accelerated solvers for strongly convex h: all step sizes come from the constants of the problem."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.core import Tracer

from bilevel_jax import checks
from bilevel_jax.linear_solve import heavy_ball
from bilevel_jax.optimisers import in_float32
from bilevel_jax.oracles import implicit
from bilevel_jax.stages import assign, solve_aux
from bilevel_jax.sweep import descend, sweep
from bilevel_jax.types import Problem, PyTree, Solver, Stage, Vars


def accbio(
    problem: Problem,
    *,
    smoothness: float,
    strong_convexity: float,
    outer_smoothness: float,
    outer_strong_convexity: float,
    inner_steps: int | None = None,
    aux_steps: int | None = None,
    accuracy: float = 1e-6,
    warm: bool = True,
) -> Solver:
    """AccBiO: Nesterov's method on z, heavy ball on v, Nesterov's method on x; for strongly convex h.

    All step sizes come from the constants, so there is no ``opts``.  Convex h: add ``eps / (2 R) |x|^2`` to f, R ~ |x*|^2, and
    take ``outer_strong_convexity = eps / R``.

    Deviations: Nesterov's steps are optax's, whose variable is the extrapolated sequence: z and x of the state are s and x of
    the paper, and the hypergradient is taken at s^N instead of z^N, which is as close to z*(x).  ``warm`` starts z and v where
    they were; the paper starts both at 0.

    Args:
        problem: inner and outer loss; deterministic: `bilevel_jax.samplers.full`.
        smoothness, strong_convexity: L and mu of g in z; Python numbers, all four, because the steps are computed from them
            when the solver is made.
        outer_smoothness, outer_strong_convexity: L and mu of h.
        inner_steps, aux_steps: N and M, by default ceil(sqrt(L / mu) log(1 / accuracy)).
        accuracy: of the defaults, in (0, 1).
        warm: whether z and v start where they were, or at 0.

    Raises:
        TypeError, ValueError: for constants that are not 0 < mu <= L, and numbers out of range.

    Cost of an update: N inner gradients, M + 1 Hessian-vector products, one cross product, two outer gradient pairs.

    Reference: Ji, Liang, "Lower bounds and accelerated algorithms for bilevel optimization", JMLR 24(22), 2023, arXiv
    2102.03926.

    Example:
        >>> problem = Problem(lambda z, x, a: ((z - x) ** 2).sum(), lambda z, x, b: (z**2).sum())
        >>> solver = accbio(problem, smoothness=2.0, strong_convexity=2.0, outer_smoothness=2.0, outer_strong_convexity=2.0,
        ...                 inner_steps=5, aux_steps=4)
        >>> tuple(solver.cost.draw)
        (5.0, 5.0, 1.0, 2.0)
    """
    _constants("smoothness", smoothness, "strong_convexity", strong_convexity)
    _constants("outer_smoothness", outer_smoothness, "outer_strong_convexity", outer_strong_convexity)
    outer = _nesterov(outer_smoothness, outer_strong_convexity)
    loops = _accelerated_loops(problem, smoothness, strong_convexity, inner_steps, aux_steps, accuracy, warm)
    return sweep(*loops, descend(implicit(problem), Vars(outer=outer)))


def accbio_bg(
    problem: Problem,
    *,
    smoothness: float,
    strong_convexity: float,
    outer_smoothness: float,
    outer_strong_convexity: float,
    inner_steps: int | None = None,
    aux_steps: int | None = None,
    accuracy: float = 1e-6,
    warm: bool = True,
) -> Solver:
    """AccBiO-BG: `accbio` with three outer sequences, for outer losses with bounded gradients; z and v start where they were.

    At ``y = eta x + (1 - eta) w``: ``x+ = tau y + (1 - tau) x - beta G(y)``, ``w+ = y - alpha G(y)`` with alpha = 1 / (2 L),
    s = sqrt(alpha mu), eta = s / (s + 2), tau = s / 2, beta = sqrt(alpha / mu).  The outer variable of the state is y.

    Args, Raises, Cost: as for `accbio`.

    Reference: Ji, Liang, JMLR 24(22), 2023, arXiv 2102.03926, with the weights of strongly convex h.

    Example:
        >>> problem = Problem(lambda z, x, a: ((z - x) ** 2).sum(), lambda z, x, b: (z**2).sum())
        >>> accbio_bg(problem, smoothness=2.0, strong_convexity=2.0, outer_smoothness=2.0, outer_strong_convexity=2.0).draws
        3
    """
    _constants("smoothness", smoothness, "strong_convexity", strong_convexity)
    _constants("outer_smoothness", outer_smoothness, "outer_strong_convexity", outer_strong_convexity)
    loops = _accelerated_loops(problem, smoothness, strong_convexity, inner_steps, aux_steps, accuracy, warm)
    outer = in_float32(_three_sequences(outer_smoothness, outer_strong_convexity))
    return sweep(*loops, descend(implicit(problem), Vars(outer=outer)))


class ThreeSequencesState(NamedTuple):
    """What the outer steps of `accbio_bg` keep beside y, both shaped like it, in float32 at least."""

    x: PyTree
    w: PyTree


def _three_sequences(smoothness: float, strong_convexity: float) -> optax.GradientTransformation:
    """The outer steps of `accbio_bg`, whose parameter is y."""
    alpha = 1 / (2 * smoothness)
    s = math.sqrt(alpha * strong_convexity)
    eta, tau, beta = s / (s + 2), s / 2, math.sqrt(alpha / strong_convexity)

    def update(updates: PyTree, state: Any, params: Any = None) -> tuple[PyTree, Any]:
        x = jax.tree.map(lambda y, x, g: tau * y + (1 - tau) * x - beta * g, params, state.x, updates)
        w = jax.tree.map(lambda y, g: y - alpha * g, params, updates)
        return jax.tree.map(lambda x, w, y: eta * x + (1 - eta) * w - y, x, w, params), ThreeSequencesState(x, w)

    return optax.GradientTransformation(lambda params: ThreeSequencesState(params, params), update)


def _accelerated_loops(
    problem: Problem, L: float, mu: float, inner_steps: int | None, aux_steps: int | None, accuracy: float, warm: bool
) -> tuple[Stage, ...]:
    if not 0 < accuracy < 1:
        raise ValueError(f"accuracy: got {accuracy}, expected a number between 0 and 1")
    default = max(1, math.ceil(math.sqrt(L / mu) * math.log(1 / accuracy)))
    inner = _nesterov(L, mu)
    steps = default if inner_steps is None else checks.positive_int("inner_steps", inner_steps)
    aux_steps = default if aux_steps is None else checks.positive_int("aux_steps", aux_steps)
    ball = heavy_ball(steps=aux_steps, smoothness=L, strong_convexity=mu)
    cold = assign(lambda vars: vars._replace(inner=jax.tree.map(jnp.zeros_like, vars.inner)))
    return (
        *(() if warm else (cold,)),
        descend(implicit(problem), Vars(inner=inner), steps=steps, fresh=False, restart=True),
        solve_aux(problem, ball, warm=warm),
    )


def _nesterov(L: float, mu: float) -> optax.GradientTransformation:
    root = math.sqrt(L / mu)
    return in_float32(optax.sgd(1 / L, (root - 1) / (root + 1), nesterov=True))


def _constants(large: str, L: float, small: str, mu: float) -> None:
    for name, value in ((large, L), (small, mu)):
        if isinstance(value, bool | Tracer) or not hasattr(value, "__float__"):
            raise TypeError(f"{name}: got {checks.shown(value)} of type {type(value).__name__}, expected a Python number")
    if not (math.isfinite(L) and 0 < mu <= L):
        raise ValueError(f"{small}: got {mu} with {large} = {L}, expected 0 < {small} <= {large}")
