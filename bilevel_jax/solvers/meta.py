"""Algorithm-based bilevel optimization: z is what some steps on a task's support data make of x; many tasks share x.

The losses of the problem are those of one task, ``inner(z, x, support)`` and ``outer(z, x, query)``, where z is the whole
adapted model: a flax model enters as its parameters, in ``loss(params, data)``.  ``opts.inner`` adapts and ``opts.outer`` moves
x; ``vars.inner`` need not be given.  Draws hold batches of tasks (`bilevel_jax.samplers.episodes`).
"""

from functools import partial

from bilevel_jax import checks
from bilevel_jax.linear_solve import LinearSolver
from bilevel_jax.solvers.steps import two
from bilevel_jax.sweep import same, sweep
from bilevel_jax.tasks import Predicate, displacement, merge, over_tasks, proximal, select, through_steps
from bilevel_jax.types import Array, Problem, PyTree, Solver, Vars


def maml(
    problem: Problem,
    opts: Vars,
    *,
    inner_steps: int = 5,
    first_order: bool = False,
    loop: str = "auto",
    checkpoint: str = "step",
) -> Solver:
    """MAML: x is the start of N inner steps on every task, and moves along the exact derivative of the query loss.

    ``grad = (I - a H_0) ... (I - a H_{N-1}) d f(z_N)`` for gradient steps of size a: N Hessian-vector products, by
    back-propagation.

    Args:
        problem: the losses of one task.
        opts: optax transformations of z (paper: sgd, a ~ 1 / N) and of x; aux None.
        inner_steps: N.
        first_order: FOMAML: see `fomaml`.
        loop: over the tasks: see `bilevel_jax.tasks.over_tasks`.
        checkpoint: what the backward pass recomputes: see `bilevel_jax.hypergrad.iterative`.  Every step by default, for
            networks whose activations are large; on small ones ``"none"`` is up to a third faster, and needs no more memory.

    Raises:
        TypeError, ValueError: for optimisers that are missing or not wanted, and arguments out of range.

    Cost of an update, for every task: N inner gradients, N Hessian-vector and N cross products, one outer gradient pair.

    Reference: Finn, Abbeel, Levine, "Model-agnostic meta-learning for fast adaptation of deep networks", ICML 2017, arXiv
    1703.03400; Ji, Yang, Liang, "Theoretical convergence of multi-step model-agnostic meta-learning", JMLR 2022, arXiv
    2002.07836.

    Example:
        >>> import jax.numpy as jnp, optax
        >>> from bilevel_jax.types import Batch
        >>> loss = lambda z, x, c: 0.5 * ((z - c) ** 2).sum()  # one task: a point c
        >>> solver = maml(Problem(loss, loss), Vars(inner=optax.sgd(0.5), outer=optax.sgd(1.0)), inner_steps=1)
        >>> points = jnp.array([[[1.0], [3.0]]])  # [draws, tasks, dim]
        >>> state = solver.init(Vars(outer=jnp.zeros(1)), Batch(inner=points, outer=points))
        >>> solver.update(state, Batch(inner=points, outer=points)).vars.outer.tolist()  # (1 - 1/2)^2 mean(c)
        [0.5]
    """
    opts = two(opts)
    whole = through_steps(
        problem, opts.inner, inner_steps, start=lambda vars: vars.outer, first_order=first_order, checkpoint=checkpoint
    )
    return sweep(over_tasks(whole, opts.outer, loop=loop), inner=same)


def fomaml(problem: Problem, opts: Vars, *, inner_steps: int = 5, loop: str = "auto") -> Solver:
    """FOMAML: `maml` with its Hessians left out: x moves along ``d f(z_N)``, biased, however long it runs.

    Args, Raises: as `maml`.

    Cost of an update, for every task: N inner gradients and one outer gradient pair.

    Reference: Finn, Abbeel, Levine, ICML 2017, arXiv 1703.03400; on the bias Fallah, Mokhtari, Ozdaglar, "On the convergence
    theory of gradient-based model-agnostic meta-learning algorithms", AISTATS 2020, arXiv 1908.10400.

    Example:
        >>> import optax
        >>> loss = lambda z, x, c: ((z - c) ** 2).sum()
        >>> fomaml(Problem(loss, loss), Vars(inner=optax.sgd(0.1), outer=optax.sgd(0.1))).cost.draw.hessian_vector
        0.0
    """
    return maml(problem, opts, inner_steps=inner_steps, first_order=True, loop=loop)


def reptile(problem: Problem, opts: Vars, *, inner_steps: int = 5, loop: str = "auto") -> Solver:
    """Reptile: x moves towards the mean of what the tasks make of it, along ``x - z_N``.  The query data are not used.

    Args, Raises: as `maml`.

    Cost of an update, for every task: N inner gradients.

    Reference: Nichol, Achiam, Schulman, "On first-order meta-learning algorithms", 2018, arXiv 1803.02999.

    Example:
        >>> import optax
        >>> loss = lambda z, x, c: ((z - c) ** 2).sum()
        >>> reptile(Problem(loss, loss), Vars(inner=optax.sgd(0.1), outer=optax.sgd(0.1))).cost.draw.outer_gradient
        0.0
    """
    opts = two(opts)
    return sweep(over_tasks(displacement(problem, opts.inner, inner_steps), opts.outer, loop=loop), inner=same)


def anil(
    problem: Problem,
    opts: Vars,
    *,
    adapted: Predicate,
    inner_steps: int = 5,
    learn_start: bool = True,
    first_order: bool = False,
    loop: str = "auto",
    checkpoint: str = "step",
) -> Solver:
    """ANIL: only a part of the model adapts, such as its head; x, body and start of the head, moves along the exact derivative.

    Args:
        problem, opts, inner_steps, loop, checkpoint: as for `maml`; the losses are still those of the whole model.
        adapted: whether the leaf at a path of the parameters, such as ``"['head']['kernel']"``, is adapted.
        learn_start: False keeps the start of the adapted part where it is: ITD-BiO for a shared representation.
        first_order: leave the second derivatives out; with ``learn_start=False`` this is FO-ITD-BiO.

    Returns:
        A solver whose ``vars.inner`` and ``vars.aux`` have None for what is not adapted; ``aux`` holds the start that is kept.

    Raises:
        TypeError, ValueError: as `maml`; (in ``init``) for a predicate that holds for no leaf, or for all.

    Cost of an update: as `maml`, on fewer variables.

    Reference: Raghu, Raghu, Bengio, Vinyals, "Rapid learning or feature reuse?", ICLR 2020, arXiv 1909.09157; Ji, Lee, Liang,
    Poor, "Convergence of meta-learning with task-specific adaptation over partial parameters", NeurIPS 2020, arXiv 2006.09486.

    Example:
        >>> import optax
        >>> loss = lambda z, x, c: ((z["head"] * z["body"] - c) ** 2).sum()
        >>> opts = Vars(inner=optax.sgd(0.1), outer=optax.sgd(0.1))
        >>> anil(Problem(loss, loss), opts, adapted=lambda path: "head" in path).draws
        1
    """
    opts = two(opts)
    if not callable(adapted):
        raise TypeError(
            f"adapted: got {checks.shown(adapted)}, expected a function of the path of a leaf, as lambda path: 'head' in path"
        )

    def part(params: PyTree) -> PyTree:
        return select(params, adapted)

    def on_part(loss: object, z: PyTree, x: PyTree, data: PyTree) -> Array:
        return loss(merge(z, x), x, data)  # type: ignore[operator]

    partly = Problem(partial(on_part, problem.inner), partial(on_part, problem.outer))
    start = (lambda vars: part(vars.outer)) if learn_start else (lambda vars: vars.aux)
    adaptation = through_steps(partly, opts.inner, inner_steps, start=start, first_order=first_order, checkpoint=checkpoint)
    return sweep(over_tasks(adaptation, opts.outer, loop=loop), inner=part, aux=same)


def imaml(
    problem: Problem,
    opts: Vars,
    *,
    strength: float = 2.0,
    inner_steps: int = 16,
    linear_solver: LinearSolver | None = None,
    loop: str = "auto",
) -> Solver:
    """iMAML: z minimises ``g + strength |z - x|^2 / 2``, and x moves along the implicit gradient: no path to go back through.

    Args:
        problem, opts, loop: as for `maml`.
        strength: of the pull towards x.  Paper, Omniglot: 2.
        inner_steps: enough to solve the inner problem; paper, Omniglot: 16.
        linear_solver: by default five steps of conjugate gradients, as in the paper.

    Raises:
        TypeError, ValueError: as `maml`.

    Cost of an update, for every task: N + 1 inner gradients, the applications of the solver and one more Hessian-vector
    products, one cross product and one outer gradient pair.

    Reference: Rajeswaran, Finn, Kakade, Levine, "Meta-learning with implicit gradients", NeurIPS 2019, arXiv 1909.04630.

    Example:
        >>> import optax
        >>> loss = lambda z, x, c: ((z - c) ** 2).sum()
        >>> imaml(Problem(loss, loss), Vars(inner=optax.sgd(0.1), outer=optax.sgd(0.1))).cost.draw.inner_gradient
        17.0
    """
    opts = two(opts)
    if linear_solver is not None:
        checks.kind("linear_solver", linear_solver, LinearSolver, "a solver of bilevel_jax.linear_solve")
    pulled = proximal(problem, opts.inner, inner_steps, strength=strength, solver=linear_solver)
    return sweep(over_tasks(pulled, opts.outer, loop=loop), inner=same)
