"""Neumann series, summed or cut at random: linear solvers for samples that change from product to product."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bilevel_jax import checks
from bilevel_jax.control_flow import cond
from bilevel_jax.linear_contract import (
    LinearSolver,
    Stats,
    VectorSystem,
    cast,
    from_vectors,
    norm,
    scan_while_finite,
    select,
    verdict,
)
from bilevel_jax.types import Array


def neumann(*, terms: int, rate: Any, fresh: bool = False, batches: tuple[int, ...] | None = None) -> LinearSolver:
    """Neumann sum (SHIA): ``u = rate sum_{q=0}^{terms} prod_{k<q} (I - rate A_k) b``, by nested products in one pass.

    For a fixed A, ``u = A^-1 (I - (I - rate A)^{terms+1}) b``: a bias of (1 - rate mu)^{terms+1} relative to the solution.

    Args:
        terms: number of factors; the sum has one summand more.
        rate: a positive number, at most 1/L; differentiable with ``fresh`` only.
        fresh: whether every application uses a new sample, by ``matvec(u, k)``.
        batches: with ``fresh``, how many samples are averaged in each factor, in the order of application: ``terms`` ints, by
            default ones.  ``A_0`` is the mean over the first ``batches[0]`` samples, and so on: see `nested_batches`.

    Returns:
        A solver, which ignores the guess, of ``sum(batches)`` draws if ``fresh``.  The residual is an estimate, the norm of
        the last summand over the rate: for a fixed A that is the residual of the sum without it.  Codes: SUCCESSFUL; DIVERGED
        (the last summand is larger than the first: rate too large; the sum as far as it was finite); NONFINITE.

    Cost: ``terms`` applications, or ``sum(batches)``.

    Reference: Ji, Yang, Liang, 2021, arXiv 2010.07962 (stocBiO).

    Example:
        >>> u, stats = neumann(terms=2, rate=0.5).solve(lambda u: u, jnp.ones(1))
        >>> u.tolist()  # 0.5 (1 + 1/2 + 1/4)
        [0.875]
    """
    checks.positive_int("terms", terms)
    rate = checks.number("rate", rate) if fresh else checks.constant("rate", checks.number("rate", rate))
    if batches is not None and not fresh:
        raise ValueError("batches: got them without fresh=True, expected None, because all samples are then the same")
    batches = (1,) * terms if batches is None else tuple(checks.positive_int("batches", count) for count in batches)
    if len(batches) != terms:
        raise ValueError(f"batches: got {len(batches)} of them, expected one a factor, {terms}")
    total = sum(batches)
    weights, ends = np.repeat([1 / count for count in batches], batches), np.isin(np.arange(1, total + 1), np.cumsum(batches))

    def iterate(system: VectorSystem, b: Array, guess: Array | None, eps: float, key: Any) -> tuple[Array, Stats]:
        del guess, key
        A, eta = system.A, cast(system.numbers[0], b)

        def factor(state: tuple, k: Array) -> tuple:
            r, s = state
            product = A(r, k)
            r = r - eta * product
            return product, (r, s + r)

        def sample(state: tuple, x: tuple) -> tuple:
            (r, s, product), (k, weight, end) = state, x
            product += weight * A(r, k)
            new = r - eta * product
            return product, select(end, (new, s + new, jnp.zeros_like(b)), (r, s, product))

        ks = jnp.arange(total, dtype=jnp.int32)
        if total == terms:
            (r, s), fine = scan_while_finite(factor, (b, b), ks)
        else:
            (r, s, _), fine = scan_while_finite(sample, (b, b, jnp.zeros_like(b)), (ks, cast(weights, b), jnp.asarray(ends)))
        return eta * s, Stats(verdict(norm(r), (1 + eps**0.5) * norm(b), fine), norm(r), jnp.int32(total))

    return from_vectors(iterate, total, symmetric=None if fresh else False, draws=total if fresh else 0, numbers=(rate,))


def nested_batches(terms: int, *, rate: float, strong_convexity: float, blocks: int = 1) -> tuple[int, ...]:
    """The decreasing batches of stocBiO for `neumann`: ``blocks terms (1 - rate mu)^q`` in factor q = 0, ..., terms - 1.

    The factor that is applied first gets the largest batch, because all the others multiply its error.

    Args:
        terms, rate: of the sum (Q and eta in the paper).
        strong_convexity: mu, with ``rate mu <= 1``.
        blocks: the batch size B of the paper, in draws.

    Returns:
        ``terms`` ints of at least 1, rounded up, so that the bound of the paper on the variance holds.

    Reference: Ji, Yang, Liang, 2021, arXiv 2010.07962, ``|B_{Q+1-j}| = B Q (1 - eta mu)^{j-1}``.

    Example:
        >>> nested_batches(4, rate=0.5, strong_convexity=1.0)
        (4, 2, 1, 1)
    """
    checks.positive_int("terms", terms)
    checks.positive_int("blocks", blocks)
    shrink = 1 - checks.number("rate", rate) * checks.number("strong_convexity", strong_convexity)
    if shrink < 0:
        raise ValueError(f"rate: got {rate}, expected at most 1 / strong_convexity = {1 / strong_convexity}")
    return tuple(max(1, int(np.ceil(blocks * terms * shrink**q - 1e-9))) for q in range(terms))


def random_neumann(*, terms: int, rate: Any, fresh: bool = False) -> LinearSolver:
    """Randomly truncated Neumann series (HIA): ``u = terms rate prod_{k<p} (I - rate A_k) b``, p uniform on 0..terms-1.

    One product, not a sum; over p its mean for a fixed A is ``A^-1 (I - (I - rate A)^terms) b``.

    Args:
        terms: number of values of p.
        rate, fresh: as for `neumann`, with ``draws = terms`` (the last of which is never used, as p < terms); the rate is
            differentiable.

    Returns:
        A solver that draws p from ``key``, which it cannot do without, and ignores the guess.  The residual is an estimate, the
        norm of the product.  Codes: SUCCESSFUL; DIVERGED (the product is larger than b); NONFINITE.

    Cost: p applications, (terms - 1) / 2 on average; under `jax.vmap` over keys terms - 1.

    Reference: Ghadimi, Wang, "Approximation methods for bilevel programming", 2018, arXiv 1802.02246, its estimate of the
    inverse Hessian.

    Example:
        >>> solver = random_neumann(terms=2, rate=0.5)
        >>> keys = jax.random.split(jax.random.key(0), 100)
        >>> us = jax.vmap(lambda key: solver.solve(lambda u: u, jnp.ones(1), key=key)[0])(keys)
        >>> sorted(set(us[:, 0].tolist()))
        [0.5, 1.0]
    """
    checks.positive_int("terms", terms)
    rate = checks.number("rate", rate)

    def iterate(system: VectorSystem, b: Array, guess: Array | None, eps: float, key: Any) -> tuple[Array, Stats]:
        del guess
        if key is None:
            raise ValueError("key: got None, expected a key, from which random_neumann draws the number of its factors")
        p = jax.random.randint(key, (), 0, terms, jnp.int32)
        A, eta = system.A, cast(rate, b)

        def factor(r: Array, k: Array) -> tuple[Array, Array]:
            r = cond(k < p, lambda: r - eta * A(r, k), lambda: r)
            return r, r

        r, fine = scan_while_finite(factor, b, jnp.arange(terms - 1, dtype=jnp.int32))
        return terms * eta * r, Stats(verdict(norm(r), (1 + eps**0.5) * norm(b), fine), norm(r), p)

    return from_vectors(iterate, (terms - 1) / 2, draws=terms if fresh else 0)
