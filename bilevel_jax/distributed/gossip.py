"""Many agents without a master: every agent runs a solver on its own data, then neighbours average their variables.

Agent i holds losses g_i and f_i; together they solve::

    min_x  1/N sum_i f_i(z*(x), x)       z*(x) = argmin_z  1/N sum_i g_i(z, x)

`gossip` makes a decentralised method of any solver: write for one, `jax.vmap` makes many.  Variables, states and data have a
leading axis of agents, so that one program holds them all; who speaks to whom is a matrix W ``[N, N]``, whose entry (i, j) is
the weight that agent i gives to what agent j sends.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer

from bilevel_jax import checks
from bilevel_jax.oracles import implicit
from bilevel_jax.samplers import Plan, Sampler
from bilevel_jax.solvers.single_loop import MakeOracle, ma_soba
from bilevel_jax.trees import widest
from bilevel_jax.types import Array, Batch, BilevelState, Levels, Problem, PyTree, Schedule, Solver, Vars

#: Which axis of a state, and of a stacked batch, is that of the agents: the count of updates is one for all.
_STATE = BilevelState(step=None, vars=0, stages=0)  # type: ignore[arg-type]
_BATCH = Batch(inner=1, outer=1, key=1, slot=1, weight=1, full=0)  # type: ignore[arg-type]


def gossip(solver: Solver, mixing: Any, *, same_start: bool = True) -> Solver:
    """Adapt, then combine: an update of the solver by every agent on its own data, then ``u_i <- sum_j W_ij u_j``.

    z, v and x are mixed; what the solver keeps besides (momentum, tables, counts of schedules) stays with its agent.  Where
    the agents' data differ, constant steps end at a distance from the solution that shrinks with the steps and grows as the
    spectral gap of W closes; with W = 1/N, and optimisers that are linear in the directions, there is none.

    Args:
        solver: any solver, of one agent.
        mixing: W, float ``[N, N]``, with entries of at least 0 whose rows and columns sum to 1: `ring`, `complete`,
            `metropolis`, or your own.
        same_start: whether ``init`` takes the variables of one agent, where all of them start, or variables that have the
            axis of agents already.

    Returns:
        A solver for `bilevel_jax.run`, with data made for it by `per_agent`.  Leaves of its batches are ``[draws, N, ...]``
        (of ``full`` ``[N, ...]``, keys ``[draws, N]``), those of ``state.vars`` and ``state.stages`` ``[N, ...]``.

    Raises:
        TypeError, ValueError: for anything but a ``Solver``, and a matrix that is not doubly stochastic (of a traced one only
            the shape is checked); (in ``init`` and ``update``) for leaves without the axis of agents.

    Cost of an update: that of the solver, for every agent, and one message to each neighbour (see `messages`).  NaN of one
    agent reaches all of them in one update: `bilevel_jax.guard` the result, not the solver.

    Example:
        >>> import optax
        >>> from bilevel_jax import run, samplers, solvers
        >>> problem = Problem(lambda z, x, a: (z - x - a).T @ (z - x - a), lambda z, x, b: ((z - b) ** 2).sum())
        >>> soba = solvers.soba(problem, Vars(*map(optax.sgd, (0.2, 0.2, 0.05))))
        >>> data = Levels(inner=jnp.arange(4.0)[:, None], outer=jnp.arange(4.0)[::-1, None])  # four agents, one row each
        >>> carry, _ = run(gossip(soba, ring(4)), per_agent(samplers.full()), Vars(jnp.zeros(1), None, jnp.zeros(1)), data,
        ...                jax.random.key(0), steps=300)
        >>> carry.state.vars.outer.shape, bool(abs(carry.state.vars.outer.mean()) < 1e-3)  # mean b - mean a
        ((4, 1), True)
    """
    if not isinstance(solver, Solver):
        raise TypeError(f"solver: got {type(solver).__name__}, expected a Solver of bilevel_jax.solvers")
    mixing = _doubly_stochastic(mixing)
    agents = len(mixing)

    def check(batches: Batch) -> None:
        if not isinstance(batches, Batch):
            raise TypeError(f"batches: got {type(batches).__name__}, expected a Batch")
        checks.arrays("batches", batches)
        for path, leaf in jax.tree_util.tree_leaves_with_path(batches._replace(full=None)):
            if np.shape(leaf)[:2] != (solver.draws, agents):
                raise ValueError(
                    f"{checks.path_name('batches', path)}: got the shape {np.shape(leaf)}, expected leading axes "
                    f"({solver.draws}, {agents}), draws and agents, as those of run(..., per_agent(sampler), ...)"
                )
        checks.leading_axis("batches.full", batches.full, agents, "the number of agents")

    def init(vars: Vars, batches: Batch) -> BilevelState:
        check(batches)
        vars = checks.variables(vars)
        shapes = jax.tree.map(lambda axis, part: jax.tree.map(lambda leaf: _without(axis, leaf), part), _BATCH, batches)
        if same_start:
            vars = jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (agents, *np.shape(leaf))), vars)
        checks.leading_axis("vars", vars, agents, "the number of agents")
        return jax.vmap(lambda own: solver.init(own, shapes), out_axes=_STATE)(vars)

    def update(state: BilevelState, batches: Batch) -> BilevelState:
        check(batches)
        checks.leading_axis("state.vars", state.vars, agents, "the number of agents")
        state = jax.vmap(solver.update, in_axes=(_STATE, _BATCH), out_axes=_STATE)(state, batches)
        return state._replace(vars=mix(mixing, state.vars))

    return Solver(init, update, solver.draws, solver.cost)


def d_soba(
    problem: Problem,
    opts: Vars,
    mixing: Any,
    *,
    momentum: Schedule = 0.1,
    oracle: MakeOracle = implicit,
    same_start: bool = True,
) -> Solver:
    """D-SOBA-SO: `gossip` of MA-SOBA, ``u_i <- sum_j W_ij (u_j - step Du_j)`` for z, v and x; the momentum of x stays local.

    ``Dz`` and ``Dv`` are those of SOBA on the agent's sample; ``Dx`` is its moving average, ``d <- (1 - momentum) d +
    momentum Dx``.  With W = 1/N and optimisers that are linear in the directions this is MA-SOBA on the mean of the agents'
    samples, exactly.

    Args:
        problem: inner and outer loss, of one agent.
        opts: optax transformations of z, v and x.
        mixing, same_start: as for `gossip`.
        momentum, oracle: as ``theta`` and ``oracle`` of `bilevel_jax.solvers.ma_soba`.

    Returns, Raises: as `gossip`, and as `bilevel_jax.solvers.ma_soba`.

    Cost of an update: one inner gradient, one Hessian-vector product, one cross product and one outer gradient pair for every
    agent; ``2 dim z + dim x`` numbers along every edge, in both directions (see `messages`, `sent_bytes`).

    Reference: Kong, Zhu, Lu, Huang, Yuan, "Decentralized bilevel optimization: a perspective from transient iteration
    complexity", 2024, arXiv 2402.03167, Algorithm D-SOBA-SO.  Deviation, that of `bilevel_jax.solvers.ma_soba`: x moves along
    the new average, the paper's along the previous one.

    Example:
        >>> import optax
        >>> problem = Problem(lambda z, x, a: ((z - x - a) ** 2).sum(), lambda z, x, b: ((z - b) ** 2).sum())
        >>> solver = d_soba(problem, Vars(*map(optax.sgd, (0.2, 0.2, 0.05))), complete(3), momentum=0.2)
        >>> draw = Batch(inner=jnp.ones((1, 3, 1)), outer=jnp.zeros((1, 3, 1)))  # [draws, agents, ...]
        >>> state = solver.update(solver.init(Vars(jnp.zeros(1), None, jnp.zeros(1)), draw), draw)
        >>> state.vars.inner.tolist()
        [[0.4000000059604645], [0.4000000059604645], [0.4000000059604645]]
    """
    # Adapt, then combine, and the moving average not mixed: this is recalled, and not checked against the text of the paper.
    return gossip(ma_soba(problem, opts, theta=momentum, oracle=oracle), mixing, same_start=same_start)


def per_agent(sampler: Sampler) -> Sampler:
    """A sampler for data with a leading axis of agents, ``[N, rows, ...]``: every agent draws from its own rows, by itself.

    Args:
        sampler: of `bilevel_jax.samplers`, for the rows of one agent.

    Returns:
        A sampler whose batches have leaves ``[draws, N, ...]``, and keys ``[draws, N]``.

    Raises:
        TypeError, ValueError: (when data are given) as the sampler, and for leaves with different numbers of agents.

    Example:
        >>> from bilevel_jax.samplers import uniform
        >>> data = Levels(inner=jnp.zeros((3, 10)), outer=jnp.zeros((3, 6)))
        >>> batch = per_agent(uniform(2)).batches(data, jax.random.key(0), 0, draws=4)
        >>> batch.inner.shape, batch.key.shape
        ((4, 3, 2), (4, 3))
    """

    def plan(data: Levels, key: Array, start: Array | int, count: int) -> Plan:
        keys = jax.random.split(key, checks.rows("data", data))
        return jax.vmap(lambda own, key: sampler.plan(own, key, start, count), out_axes=1)(data, keys)

    return Sampler(plan, lambda data, plan: jax.vmap(sampler.gather)(data, plan), lambda data: jax.vmap(sampler.whole)(data))


def mix(mixing: Any, tree: PyTree) -> PyTree:
    """``u_i <- sum_j W_ij u_j`` on leaves ``[N, ...]``, in their own dtypes; the sums are formed in float32 at least.

    Example:
        >>> mix(np.array([[0.5, 0.5], [0.5, 0.5]]), jnp.array([1.0, 3.0])).tolist()
        [2.0, 2.0]
    """

    def one(leaf: Array) -> Array:
        wide = widest(leaf)
        weights = jnp.asarray(mixing, wide)
        return jnp.tensordot(weights, leaf.astype(wide), 1, precision=lax.Precision.HIGHEST).astype(leaf.dtype)

    return jax.tree.map(one, tree)


def metropolis(adjacency: Any) -> np.ndarray:
    """Metropolis weights of a graph: ``W_ij = 1 / (1 + max(degree_i, degree_j))`` along its edges, the rest on the diagonal.

    Args:
        adjacency: bool or 0 and 1, ``[N, N]``, symmetric; its diagonal is ignored.

    Returns:
        W, float64 ``[N, N]``, symmetric and doubly stochastic.

    Raises:
        TypeError, ValueError: for anything else, and a graph that is not connected.

    Reference: Xiao, Boyd, "Fast linear iterations for distributed averaging", Systems & Control Letters 2004.

    Example:
        >>> metropolis([[0, 1, 0], [1, 0, 1], [0, 1, 0]]).round(2).tolist()
        [[0.67, 0.33, 0.0], [0.33, 0.33, 0.33], [0.0, 0.33, 0.67]]
    """
    links = _square("adjacency", adjacency)
    if not np.isin(links, (0, 1)).all() or (links != links.T).any():
        raise ValueError("adjacency: got a matrix that is not symmetric with entries 0 and 1, expected that of a graph")
    links = np.where(np.eye(len(links), dtype=bool), 0.0, links)
    reached = np.eye(len(links)) + links
    for _ in range(len(links).bit_length()):  # paths of up to 2, 4, 8, ... edges
        reached = (reached @ reached > 0).astype(np.float64)
    if not reached.all():
        raise ValueError("adjacency: got a graph that is not connected, expected a path between any two agents")
    degree = links.sum(1)
    weights = links / (1 + np.maximum(degree[:, None], degree[None, :]))
    return weights + np.diag(1 - weights.sum(1))


def ring(agents: int) -> np.ndarray:
    """A third to itself and to either neighbour on a ring: float64 ``[agents, agents]``.  The gap falls as 1 / agents^2.

    Example:
        >>> ring(4).round(2).tolist()[0]
        [0.33, 0.33, 0.0, 0.33]
    """
    at = np.arange(checks.positive_int("agents", agents))
    return metropolis(np.isin((at[:, None] - at[None, :]) % agents, (1, agents - 1)))


def complete(agents: int) -> np.ndarray:
    """Everyone to everyone: 1 / agents everywhere, float64 ``[agents, agents]``.

    Example:
        >>> complete(2).tolist()
        [[0.5, 0.5], [0.5, 0.5]]
    """
    return np.full((checks.positive_int("agents", agents),) * 2, 1 / agents)


def spectral_gap(mixing: Any) -> float:
    """``1 - |W - 1/N|_2``: mixing multiplies the distance of the agents to their mean by 1 minus that, at most.

    Args:
        mixing: doubly stochastic, ``[N, N]``; where it is symmetric the norm is its second largest eigenvalue in size.

    Returns:
        A number between 0 (agents that nothing brings together) and 1 (the mean at once).

    Raises:
        TypeError, ValueError: for a matrix that is not doubly stochastic.

    Example:
        >>> round(spectral_gap(complete(4)), 6), round(spectral_gap(ring(4)), 6)
        (1.0, 0.666667)
    """
    mixing = np.asarray(_doubly_stochastic(mixing), np.float64)
    return float(1 - np.linalg.norm(mixing - 1 / len(mixing), 2))


def messages(mixing: Any) -> int:
    """Messages of an update: one along every edge in either direction, that is the entries of W off its diagonal.

    Example:
        >>> messages(ring(5)), messages(complete(5))
        (10, 20)
    """
    mixing = np.asarray(_doubly_stochastic(mixing))
    return int(np.count_nonzero(mixing) - np.count_nonzero(np.diag(mixing)))


def sent_bytes(mixing: Any, vars: Vars) -> int:
    """Bytes of an update: every message holds the variables of one agent, ``2 dim z + dim x`` numbers in implicit methods.

    Args:
        mixing: doubly stochastic, ``[N, N]``.
        vars: the ``state.vars`` of `gossip`, leaves ``[N, ...]``, or their shapes.

    Example:
        >>> sent_bytes(ring(5), Vars(jnp.zeros((5, 7)), jnp.zeros((5, 7)), jnp.zeros((5, 2)))) == 10 * (2 * 7 + 2) * 4
        True
    """
    checks.leading_axis("vars", vars, len(mixing), "the number of agents")
    return messages(mixing) * sum(leaf.size * leaf.dtype.itemsize // len(mixing) for leaf in jax.tree.leaves(vars))


def _without(axis: int, leaf: Any) -> jax.ShapeDtypeStruct:
    """The shape of one agent's part of a leaf."""
    shape = np.shape(leaf)
    return jax.ShapeDtypeStruct(shape[:axis] + shape[axis + 1 :], leaf.dtype)


def _square(name: str, matrix: Any) -> np.ndarray:
    matrix = np.asarray(matrix)
    if matrix.dtype != bool and not np.issubdtype(matrix.dtype, np.number):
        raise TypeError(f"{name}: got an array of dtype {matrix.dtype}, expected numbers")
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1] or not len(matrix):
        raise ValueError(f"{name}: got the shape {matrix.shape}, expected a square matrix, a row and a column an agent")
    return matrix.astype(np.float64)


def _doubly_stochastic(mixing: Any) -> Any:
    """The matrix, if it may mix; a traced one if it is square."""
    if isinstance(mixing, Tracer):
        if mixing.ndim != 2 or mixing.shape[0] != mixing.shape[1]:
            raise ValueError(f"mixing: got the shape {mixing.shape}, expected a square matrix, a row and a column an agent")
        return mixing
    mixing = _square("mixing", mixing)
    if not np.isfinite(mixing).all() or mixing.min() < 0:
        raise ValueError(f"mixing: got entries down to {mixing.min()}, expected finite weights of at least 0")
    for axis, lines in ((1, "rows"), (0, "columns")):
        off = np.abs(mixing.sum(axis) - 1).max()
        if not off <= 1e-5:
            raise ValueError(
                f"mixing: got {lines} whose sums are off 1 by up to {off:.3g}, expected a doubly stochastic matrix"
            )
    return mixing
