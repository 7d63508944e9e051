"""FedNest: clients of a server that solve the inner problem, the linear system and the outer step together.

Client i holds losses g_i and f_i; together they solve::

    min_x  1/N sum_i f_i(z*(x), x)       z*(x) = argmin_z  1/N sum_i g_i(z, x)

An update has three parts, and z, v and x between them are the server's.  *FedInn*, ``inner_rounds`` times: the clients send
their gradients, and then take steps along their own gradients, corrected by the mean of all (SVRG)::

    q = mean_i d_z g_i(z, x)        z_i <- z_i - inner_rate (d_z g_i(z_i, x) - d_z g_i(z, x) + q)        z <- mean_i z_i

*FedIHGP*: v is a Neumann series in the mean of the clients' Hessians, a round for every product.  *FedOut*: the hypergradient,
and steps along it that are corrected in its direct part::

    h = mean_i (d_x f_i(z, x) + d2_xz g_i v)
    x_i <- x_i - outer_rate (d_x f_i(z, x_i) - d_x f_i(z, x) + h)        x <- mean_i x_i

Reference: Tarzanagh, Li, Thrampoulidis, Oymak, "FedNest: federated bilevel, minimax, and compositional optimization", ICML
2022, arXiv 2205.02215.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bilevel_jax import checks
from bilevel_jax.control_flow import scan
from bilevel_jax.linear_solve import LinearSolver, neumann, random_neumann
from bilevel_jax.optimisers import value_at
from bilevel_jax.oracles import mean_loss
from bilevel_jax.samplers import Draws, take_draw
from bilevel_jax.stages import solve_aux
from bilevel_jax.sweep import sweep
from bilevel_jax.trees import narrow, scaled, widen, widest
from bilevel_jax.types import Array, Batch, Calls, Cost, Levels, Loss, Problem, PyTree, Schedule, Solver, Stage, Vars


def fednest(
    problem: Problem,
    *,
    inner_rate: Schedule,
    outer_rate: Schedule,
    neumann_rate: Schedule,
    inner_rounds: int = 1,
    local_steps: int = 5,
    neumann_terms: int = 10,
    random_terms: bool = True,
    corrected: bool = True,
    fresh: bool = True,
) -> Solver:
    """FedNest, with all clients in every round: z by `inner_rounds` of corrected local steps, v by a Neumann series, then x.

    With one client, or one local step, this is a double loop on the mean of the clients' losses; with more of them the
    correction keeps the fixed point of the mean, whatever the clients' data.

    Args:
        problem: inner and outer loss, of one client.
        inner_rate, outer_rate: of a local step, numbers or schedules of the update.  A client takes ``local_steps`` of them.
        neumann_rate: of the series, at most 1/L, a number or a schedule of the update.
        inner_rounds: T, rounds of FedInn.
        local_steps: tau, steps of a client in a round, in z and in x.
        neumann_terms: N, summands of the series.
        random_terms: whether one summand at random, times N, stands for their sum (from ``batch.key``), as in the paper.
        corrected: whether the local steps in z are.  False is FedNest-SGD, whose z drifts where the clients differ.
        fresh: whether every local step and every product takes a draw of its own, or each of the three parts a single one.

    Returns:
        A solver for `bilevel_jax.run`.  Its variables are the server's; leaves of its batches are ``[draws, N, ...]``: data
        with a leading axis of clients, by `bilevel_jax.distributed.per_agent` of a sampler, or `bilevel_jax.samplers.full`.
        Its codes are those of the Neumann series.

    Raises:
        TypeError, ValueError: for anything but a ``Problem``, and numbers out of range; (in ``init``) for data without a common
            axis of clients.

    Cost of an update, of every client: ``2 tau - 1`` inner gradients a round of FedInn (tau if not corrected), ``(N - 1) / 2``
    Hessian-vector products on average (N - 1 if not random), one cross product, ``2 tau`` outer gradient pairs; what is sent
    for it, see `rounds` and `sent_bytes`.

    Reference: Tarzanagh, Li, Thrampoulidis, Oymak, ICML 2022, arXiv 2205.02215.

    Example:
        >>> from bilevel_jax import run, samplers
        >>> problem = Problem(lambda z, x, a: ((z - x - a) ** 2).sum(-1), lambda z, x, b: ((z - b) ** 2).sum(-1))
        >>> data = Levels(inner=jnp.arange(4.0).reshape(4, 1, 1), outer=jnp.zeros((4, 1, 1)))  # four clients, one row each
        >>> solver = fednest(problem, inner_rate=0.1, outer_rate=0.01, neumann_rate=0.4)
        >>> carry, _ = run(solver, samplers.full(), Vars(jnp.zeros(1), None, jnp.zeros(1)), data, jax.random.key(0), steps=300)
        >>> bool(jnp.allclose(carry.state.vars.outer, -1.5, atol=1e-3))  # -mean a
        True
    """
    if not isinstance(problem, Problem):
        raise TypeError(f"problem: got {type(problem).__name__}, expected Problem(inner=..., outer=...)")
    counts = {"inner_rounds": inner_rounds, "local_steps": local_steps, "neumann_terms": neumann_terms}
    for name, value in counts.items():
        checks.positive_int(name, value)
    for name, rate in (("inner_rate", inner_rate), ("outer_rate", outer_rate), ("neumann_rate", neumann_rate)):
        checks.positive(name, rate, schedule=True)
    g, f = _of_client(problem.inner, "problem.inner"), _of_client(problem.outer, "problem.outer")
    mean_problem = Problem(_one_a_client(g), _one_a_client(f))

    def series(rate: Any) -> LinearSolver:
        # (I - rate H)^p d_z f, p < N: the solver that sums p = 0, ..., N - 1 counts its factors, N - 1.  What is sent, in which
        # order, agrees with the public code of the authors, which takes the sum; the range of the random p is recalled.
        if random_terms or neumann_terms == 1:
            return _with_one_key(random_neumann(terms=neumann_terms, rate=rate, fresh=fresh))
        return neumann(terms=neumann_terms - 1, rate=rate, fresh=fresh)

    linear = (lambda step: series(value_at(neumann_rate, step))) if callable(neumann_rate) else series(neumann_rate)
    return sweep(
        _by_clients(fed_inn(g, inner_rate, rounds=inner_rounds, steps=local_steps, corrected=corrected, fresh=fresh)),
        _by_clients(solve_aux(mean_problem, linear, warm=False)),
        _by_clients(fed_out(g, f, outer_rate, steps=local_steps, fresh=fresh)),
    )


#: The data of one client, and the weights of their rows (None where all count alike).
Share = tuple[PyTree, Array | None]
#: ``(z, x, share) -> scalar``.
ClientLoss = Callable[[PyTree, PyTree, Share], Array]


def fed_inn(g: ClientLoss, rate: Schedule, *, rounds: int, steps: int, corrected: bool, fresh: bool) -> Stage:
    """FedInn, ``rounds`` times, on shares of the clients: a stage of ``rounds * steps`` draws, or of one if not ``fresh``."""
    at_one = jax.vmap(jax.grad(g), in_axes=(None, None, 0))  # of all clients at one z
    at_own = jax.vmap(jax.grad(g), in_axes=(0, None, 0))  # of every client at its own

    def update(state: tuple, vars: Vars, batches: Batch, step: Array) -> tuple[Vars, tuple]:
        eta, x = value_at(rate, step), vars.outer

        def turn(z: PyTree, t: Array) -> tuple[PyTree, None]:
            def shares(k: Array | int) -> Share:
                return take_draw(batches, t * steps + k if fresh else 0).inner

            def own(here: PyTree, k: Array) -> PyTree:
                return at_own(here, x, shares(k))

            def same(k: Array | int) -> PyTree:
                return at_one(z, x, shares(k))

            return _local_steps(z, eta, same(0), own, same if corrected else None, steps), None

        z, _ = scan(turn, vars.inner, jnp.arange(rounds, dtype=jnp.int32))
        return vars._replace(inner=z), state

    gradients = rounds * (2 * steps - 1 if corrected else steps)
    return Stage(_look(update), update, rounds * steps if fresh else 1, Cost(draw=Calls(float(gradients))), lazy=True)


def fed_out(g: ClientLoss, f: ClientLoss, rate: Schedule, *, steps: int, fresh: bool) -> Stage:
    """FedOut, given z and v, on shares of the clients: a stage of ``steps`` draws, or of one if not ``fresh``."""
    direct = jax.grad(f, argnums=1)
    at_one = jax.vmap(direct, in_axes=(None, None, 0))
    at_own = jax.vmap(direct, in_axes=(None, 0, 0))

    def update(state: tuple, vars: Vars, batches: Batch, step: Array) -> tuple[Vars, tuple]:
        z, v, x = vars

        def hypergradient(inner: Share, outer: Share) -> PyTree:
            _, pullback = jax.vjp(lambda x: jax.grad(g)(z, x, inner), x)
            return jax.tree.map(jnp.add, direct(z, x, outer), pullback(v)[0])

        def shares(k: Array) -> Share:
            return take_draw(batches, k if fresh else 0).outer

        # The correction is of d_x f_i alone, with v and the cross product those of x: so it is in the algorithm of the paper,
        # and what the public code of the authors sets out to do.
        def own(here: PyTree, k: Array) -> PyTree:
            return at_own(z, here, shares(k))

        def same(k: Array) -> PyTree:
            return at_one(z, x, shares(k))

        draw = take_draw(batches, 0)
        slopes = jax.vmap(hypergradient)(draw.inner, draw.outer)
        return vars._replace(outer=_local_steps(x, value_at(rate, step), slopes, own, same, steps)), state

    calls = Calls(cross=1.0, outer_gradient=2.0 * steps - 1)
    return Stage(_look(update), update, steps if fresh else 1, Cost(draw=calls), lazy=True)


def rounds(*, inner_rounds: int, products: Any, corrected: bool = True) -> Any:
    """Rounds of an update, each a message of the server to every client and an answer of every client: ``2 T + N' + 3``.

    Two a round of FedInn (one if not corrected), one for ``d_z f``, one a Hessian-vector product, one for the hypergradient
    and one for the local steps in x.

    Args:
        inner_rounds: T.
        products: N', Hessian-vector products of the update: ``neumann_terms - 1`` where terms are not random, otherwise
            uniform on 0, ..., ``neumann_terms - 1``, and counted in the state (see `bilevel_jax.spent`).
        corrected: of `fednest`.

    Example:
        >>> rounds(inner_rounds=5, products=9)
        22
    """
    return (2 if corrected else 1) * inner_rounds + products + 3


def sent_bytes(vars: Vars, clients: int, *, inner_rounds: int, products: Any, corrected: bool = True) -> Any:
    """Bytes of an update, to and from the clients: each ``4 T + 2 N' + 3`` vectors like z (2 T, if not corrected) and 4 like x.

    Args:
        vars: the server's variables, or their shapes.
        clients: their number.
        inner_rounds, products, corrected: as for `rounds`.

    Example:
        >>> sent_bytes(Vars(jnp.zeros(7), None, jnp.zeros(2)), 3, inner_rounds=1, products=1) == 3 * (9 * 7 + 4 * 2) * 4
        True
    """
    z, x = (sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(part)) for part in (vars.inner, vars.outer))
    # FedInn: to the clients z, and q if corrected, and the same back, in every round; x once.  FedIHGP: z, and d_z f back; a
    # vector there and back for every product.  FedOut: v, and the hypergradient back; their mean, and x_i back.
    inner = (4 if corrected else 2) * inner_rounds + 2 * products + 3
    return clients * (inner * z + 4 * x)


def _of_client(loss: Loss, name: str) -> ClientLoss:
    mean = mean_loss(loss, name)
    return lambda z, x, share: mean(z, x, *share)


def _one_a_client(loss: ClientLoss) -> Loss:
    """One value a client, the mean of which is the loss of all of them."""

    def values(z: PyTree, x: PyTree, shares: Share) -> Array:
        clients = jax.tree.leaves(shares)[0].shape[0]
        # The derivative in what the clients share is a sum over them, in its dtype: a narrow leaf is cast from a wide copy.
        axes = jax.tree.map(lambda leaf: None if leaf.dtype == widest(leaf) else 0, (z, x))
        wide = jax.tree.map(lambda leaf: jnp.broadcast_to(widen(leaf), (clients, *leaf.shape)), (z, x))
        z, x = jax.tree.map(lambda leaf, copy: leaf if leaf.dtype == copy.dtype else copy.astype(leaf.dtype), (z, x), wide)
        return jax.vmap(loss, in_axes=(*axes, 0))(z, x, shares)

    return values


def _by_clients(stage: Stage) -> Stage:
    """A stage on shares, ``(data, weights)``, from one on shares of clients."""

    def init(vars: Vars, batches: Batch) -> Any:
        return stage.init(vars, _shares(batches))

    def update(state: Any, vars: Vars, batches: Batch, step: Array) -> tuple[Vars, Any]:
        return stage.update(state, vars, _shares(batches), step)

    return stage._replace(init=init, update=update)


def _shares(batches: Any) -> Any:
    """Batches whose data are shares: the weights go with the data, as each client has its own."""
    if isinstance(batches, Draws):
        return Draws(batches.data, batches.plan, lambda data, plan: _shares(batches.gather(data, plan)))
    weight = batches.weight or Levels()
    for name in Levels._fields:
        if getattr(batches, name) is None:
            raise ValueError(f"batches.{name}: got None, expected the data of all clients, leaves [draws, clients, ...]")
    return Batch(inner=(batches.inner, weight.inner), outer=(batches.outer, weight.outer), key=batches.key)


def _look(update: Callable[..., tuple]) -> Callable[[Vars, Batch], tuple]:
    """An ``init`` that refuses data without a common axis of clients, bad losses and bad variables before compilation."""

    def init(vars: Vars, batches: Batch) -> tuple:
        found = {}
        for name in Levels._fields:
            for path, leaf in jax.tree_util.tree_leaves_with_path(getattr(batches, name)[0]):
                found[checks.path_name(f"batches.{name}", path)] = np.shape(leaf)[1:2]
        if len(set(found.values())) != 1 or () in found.values():
            raise ValueError(
                f"batches: got leaves whose second axes are {found}, expected one number of clients, data [draws, clients, ...]"
            )
        jax.eval_shape(update, (), vars, batches, jnp.zeros((), jnp.int32))
        return ()

    return init


def _with_one_key(solver: LinearSolver) -> LinearSolver:
    """The number of products is one for all: the server draws it, from the first key where each client has its own."""

    def solve(matvec: Any, rhs: PyTree, guess: PyTree = None, key: Any = None) -> Any:
        return solver.solve(matvec, rhs, guess, key if key is None or key.ndim == 0 else key[0])

    return solver._replace(solve=solve)


def _local_steps(
    start: PyTree,
    rate: Any,
    slopes: PyTree,
    own: Callable[[PyTree, Array], PyTree],
    same: Callable[[Array], PyTree] | None,
    steps: int,
) -> PyTree:
    """The mean of the clients after ``steps`` of their own.

    Args:
        start, rate: where all of them start, and the step size.
        slopes: of every client at ``start``, leaves ``[clients, ...]``, for the first step.
        own, same: slopes on sample k, k = 1, ..., steps - 1, where each client is, and at ``start``: with them every step is
            along ``own - same + mean of slopes``.  Without ``same`` every client follows its own.
    """
    # At the start own and same cancel, whatever the sample, so that the first step takes no gradients but those given.
    wide = widen(slopes)
    lead = wide if same is None else jax.tree.map(lambda s: jnp.broadcast_to(s.mean(0), s.shape), wide)

    def move(here: PyTree, way: PyTree) -> PyTree:
        return jax.tree.map(jnp.subtract, here, scaled(rate, way))

    def body(here: PyTree, k: Array) -> tuple[PyTree, None]:
        way = widen(own(narrow(here, slopes), k))
        return move(here, way if same is None else jax.tree.map(lambda a, b, c: a - b + c, way, widen(same(k)), lead)), None

    here = move(jax.tree.map(lambda a, b: jnp.broadcast_to(a, b.shape), widen(start), lead), lead)
    here, _ = scan(body, here, jnp.arange(1, steps, dtype=jnp.int32))
    return narrow(jax.tree.map(lambda leaf: leaf.mean(0), here), start)
