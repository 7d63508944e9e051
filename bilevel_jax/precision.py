"""Narrow arithmetic where it is cheap: losses in bfloat16, everything that is kept or summed over many rows in float32."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bilevel_jax import checks
from bilevel_jax.oracles import losses
from bilevel_jax.types import Array, Loss, Problem, PyTree

#: Rows whose derivatives are summed in bfloat16 before float32 takes over.
CHUNK = 128


def in_bfloat16(problem: Problem) -> Problem:
    """The same problem with both losses evaluated in bfloat16: z, x and the floating data are rounded to it on entry.

    Variables, directions, tables, moving averages and the scalars of linear solvers stay float32: the derivatives of a cast
    are cast back.  The mean over the samples is taken in float32.  So, beyond `CHUNK` rows, is the sum of their derivatives,
    which the loss's own backward pass would take in bfloat16: there the sum of n equal terms stops growing (with 100,000
    rows a gradient was wrong by 80 % on a CPU).  The chunks are taken side by side.

    bfloat16 has 8 bits: it rounds by up to ``2^-8 = 0.004``.  Relative errors in the norm, measured on a CPU, at a random point
    of the shipped quadratic and of a logistic regression with one weight a feature, 1,000 rows each; those of the
    hypergradient are of `bilevel_jax.linear_solve.cg` at the exact z*:

    | problem, condition of d2_zz g | Dz | Dv | Dx | hypergradient |
    |---|---|---|---|---|
    | quadratic, 5 | 0.001 | 0.002 | 0.001 | 0.003 |
    | quadratic, 100 | 0.001 | 0.002 | 0.001 | 0.003 |
    | logistic regression, 1.1 | 0.014 | 0.017 | 0.016 | 0.004 |
    | logistic regression, 5.6 | 0.002 | 0.010 | 0.016 | 0.012 |

    Conjugate gradients end with the code STAGNATION, at a residual of 0.2 to 3 % of the right-hand side: in bfloat16 the
    products are symmetric to rounding only.

    What it does not suit: oracles of differences (`bilevel_jax.oracles.finite_difference`, ``pzobo``, penalties with large
    multipliers), whose differences of near-equal numbers vanish in the rounding, and tolerances below about 1e-2.

    Args:
        problem: losses that return one value a sample, each of its own row (or a scalar where there are no data).

    Returns:
        A problem for float32 variables.  Its losses return one float32 value a sample.

    Cost: that of the losses, and memory of a float32 derivative like z and x for each `CHUNK` rows.  It is meant for devices
    that multiply bfloat16 faster than float32.  On a CPU it is slower and larger: the gradient of a softmax regression on
    8,192 rows of 512 features and 256 classes took 328 ms in place of 136, and 50 MB of temporaries in place of 17.

    Raises:
        TypeError, ValueError: for anything but a ``Problem``; (when traced) for variables that are not float32, for scalar
            losses, whose mean would be taken in bfloat16, and for data without a common leading axis.

    Example:
        >>> problem = in_bfloat16(Problem(lambda z, x, a: (z - a) ** 2, lambda z, x, b: (z - b) ** 2))
        >>> problem.inner(jnp.ones(()), jnp.ones(()), jnp.array([1.0, 1.001, 3.0]))
        Array([0., 0., 4.], dtype=float32)
    """
    losses(problem)
    return Problem(_narrow(problem.inner, "problem.inner"), _narrow(problem.outer, "problem.outer"))


def _narrow(loss: Loss, name: str) -> Loss:
    def rounded(z: PyTree, x: PyTree, data: PyTree) -> Array:
        value = loss(_cast(z), _cast(x), _cast(data))
        count = () if not jax.tree.leaves(data) else (checks.rows("data", data),)
        if np.shape(value) != count:
            raise ValueError(
                f"{name}: got a loss of shape {np.shape(value)}, expected {count}, one value a sample: the mean of the values "
                "is taken in float32"
            )
        return value.astype(jnp.float32)

    def wide(z: PyTree, x: PyTree, data: PyTree) -> Array:
        for path, leaf in jax.tree_util.tree_leaves_with_path((z, x)):
            if leaf.dtype != jnp.float32:
                raise TypeError(
                    f"{checks.path_name('(z, x)', path)}: got {checks.describe(leaf)}, expected float32: the losses are "
                    "evaluated in bfloat16, the variables are kept in float32"
                )
        count = checks.rows("data", data) if jax.tree.leaves(data) else 0
        if count <= CHUNK:
            return rounded(z, x, data)
        whole = count // CHUNK * CHUNK
        chunks = jax.tree.map(lambda leaf: leaf[:whole].reshape(-1, CHUNK, *leaf.shape[1:]), data)
        # a float32 copy of z and x for each chunk: the sum over the copies is that of their derivatives, of any order
        zs, xs = jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (count // CHUNK, *leaf.shape)), (z, x))
        values = jax.vmap(rounded)(zs, xs, chunks).reshape(-1)
        rest = jax.tree.map(lambda leaf: leaf[whole:], data)
        return values if whole == count else jnp.concatenate([values, rounded(z, x, rest)])

    return wide


def _cast(tree: PyTree) -> PyTree:
    def leaf(value: Any) -> Any:
        return value.astype(jnp.bfloat16) if jnp.issubdtype(value.dtype, jnp.floating) else value

    return jax.tree.map(leaf, tree)
