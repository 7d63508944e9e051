"""Oracles: which direction.  ``terms(vars, batch, step) -> Terms``; no state, no step sizes, no sampling."""

from collections.abc import Callable

import jax
import jax.extend.core
import jax.numpy as jnp
import numpy as np

from bilevel_jax import checks
from bilevel_jax.types import Array, Batch, Calls, Levels, Loss, Oracle, Problem, PyTree, Terms, Vars


def mean_loss(loss: Loss, name: str) -> Callable[[PyTree, PyTree, PyTree, Array | None], Array]:
    """``(z, x, data, weight) -> scalar`` from a loss that returns a scalar or one value a sample.

    Without weights the samples are averaged.  With weights (float ``[rows]``) they are summed with them: the sampler puts
    blocks/n on the rows of a block and 0 on the padding of a ragged one, so that the mean over the blocks is the mean over
    the samples, exactly.

    Raises:
        ValueError: if the loss returns neither a scalar nor a vector, or a scalar where weights are given.
    """

    def scalar(z, x, data, weight):
        value = loss(z, x, data)
        if isinstance(value, tuple | list | dict) or not hasattr(value, "dtype"):
            raise TypeError(f"{name}: got a loss of type {type(value).__name__}, expected a scalar or one value a sample")
        shape = np.shape(value)
        if not jnp.issubdtype(jnp.result_type(value), jnp.floating):
            raise TypeError(f"{name}: got a loss of dtype {jnp.result_type(value)}, expected a floating-point one")
        if weight is None:
            if len(shape) > 1:
                raise ValueError(f"{name}: got a loss of shape {shape}, expected a scalar or one value a sample")
            leading = {np.shape(leaf)[:1] for leaf in jax.tree.leaves(data)}
            if shape and len(leading) == 1 and leading != {shape}:
                raise ValueError(
                    f"{name}: got a loss of shape {shape}, expected a scalar or {leading.pop()}, one value a sample"
                )
            return value if not shape else value.mean()
        if not shape:
            raise ValueError(
                f"{name}: got a scalar loss, expected one value a sample, because the batch size does not divide the "
                "number of samples and the last block must be masked; return the values before averaging, or sample "
                "with remainder='drop' (the problem solved is then that of the rows that are kept)"
            )
        if shape != np.shape(weight):
            raise ValueError(f"{name}: got a loss of shape {shape}, expected {np.shape(weight)}, one value a sample")
        return jnp.vdot(weight.astype(value.dtype), value)

    return scalar


def implicit(problem: Problem, *, mode: str = "reverse") -> Oracle:
    """The three directions of implicit differentiation, from one linearisation of ``d_z g``.

    ``Dz = d_z g``, ``Dv = d2_zz g v + d_z f``, ``Dx = d2_xz g v + d_x f``, with ``v = vars.aux``.

    Args:
        problem: the two losses.
        mode: ``"reverse"`` pulls v back through ``(z, x) -> d_z g``; ``"forward"`` pushes ``(v, 0)`` through
            ``z -> (d_z g, d_x g)``.  The values agree to rounding; which one is faster depends on the loss and the backend.

    Returns:
        An oracle.  The directions of v and x are absent when ``batch.outer`` or ``vars.aux`` is None, so that a stage that
        moves z alone asks neither for outer data nor for v.

    Raises:
        ValueError: for another mode, or (when traced) for a loss that is neither a scalar nor one value a sample.

    Cost: one inner gradient, one Hessian-vector product, one cross product and one outer gradient pair a call.

    Reference: Dagréou, Ablin, Vaiter, Moreau, "A framework for bilevel optimization that enables stochastic and global
    variance reduction algorithms", 2022, arXiv 2201.13409, equation (2.2) and its directions.

    Example:
        >>> import jax.numpy as jnp
        >>> problem = Problem(inner=lambda z, x, a: 0.5 * ((z - a * x) ** 2).sum(), outer=lambda z, x, b: ((z - b) ** 2).sum())
        >>> vars = Vars(inner=jnp.ones(2), aux=jnp.zeros(2), outer=jnp.ones(2))
        >>> terms = implicit(problem).terms(vars, Batch(inner=jnp.ones(2), outer=jnp.zeros(2)), jnp.int32(0))
        >>> [float(d.sum()) for d in (terms.inner.inner, terms.outer.aux)]
        [0.0, 4.0]
    """
    if not isinstance(problem, Problem):
        raise TypeError(f"problem: got {type(problem).__name__}, expected Problem(inner=..., outer=...)")
    if mode not in ("reverse", "forward"):
        raise ValueError(f"mode: got {mode!r}, expected 'reverse' or 'forward'")
    g, f = mean_loss(problem.inner, "problem.inner"), mean_loss(problem.outer, "problem.outer")

    def terms(vars: Vars, batch: Batch, step: Array) -> Terms:
        del step
        z, v, x = vars
        weight = batch.weight or Levels()

        def gradients(z, x):
            return jax.grad(g, argnums=(0, 1))(z, x, batch.inner, weight.inner)

        if v is None or batch.outer is None:
            return Terms(inner=Vars(inner=gradients(z, x)[0]))
        checks.same_shapes("vars.aux", v, z, "vars.inner")
        if mode == "reverse":
            dz, pullback = jax.vjp(lambda z, x: gradients(z, x)[0], z, x)
            hv, cross = pullback(v)
        else:
            (dz, _), (hv, cross) = jax.jvp(lambda z: gradients(z, x), (z,), (v,))
        fz, fx = jax.grad(f, argnums=(0, 1))(z, x, batch.outer, weight.outer)
        if not _depends(lambda x: f(z, x, batch.outer, weight.outer), x):
            fx = None  # a term that is zero by structure: no estimator should keep a table of it
        return Terms(inner=Vars(dz, hv, cross), outer=Vars(None, fz, fx))

    def calls(moved: Vars) -> Calls:
        return Calls(
            inner_gradient=float(bool(moved.inner)),
            hessian_vector=float(bool(moved.aux)),
            cross=float(bool(moved.outer)),
            outer_gradient=float(bool(moved.aux or moved.outer)),
        )

    return Oracle(terms, calls)


def _depends(function: Callable[[PyTree], Array], argument: PyTree) -> bool:
    """Whether the value of a function can depend on its argument, by following its jaxpr (True when in doubt)."""
    jaxpr = jax.make_jaxpr(function)(argument).jaxpr
    reached = set(jaxpr.invars)
    for eqn in jaxpr.eqns:
        if any(not isinstance(v, jax.extend.core.Literal) and v in reached for v in eqn.invars):
            reached.update(eqn.outvars)
    return any(not isinstance(v, jax.extend.core.Literal) and v in reached for v in jaxpr.outvars)
