"""Tasks to test meta-learning on: quadratics with closed forms, and a small network that is smooth but not quadratic."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import optax

from bilevel_jax import Batch, Problem, Vars

DIM, TASKS = 6, 4


def fit(z, x, data):
    """``(z - c)' A (z - c) / 2``."""
    del x
    return 0.5 * (z - data["c"]) @ data["A"] @ (z - data["c"])


QUADRATIC = Problem(fit, fit)
POINT = np.random.default_rng(1).normal(size=DIM)


@cache
def quadratics():
    """A [tasks, dim, dim] with eigenvalues from 0.2 to 1, c [tasks, dim]."""
    rng = np.random.default_rng(0)
    bases = np.linalg.qr(rng.normal(size=(TASKS, DIM, DIM)))[0]
    values = rng.uniform(0.2, 1, size=(TASKS, DIM))
    A = np.einsum("tij,tj,tkj->tik", bases, values, bases)
    return {"A": jnp.asarray((A + A.transpose(0, 2, 1)) / 2), "c": jnp.asarray(rng.normal(size=(TASKS, DIM)))}


def drawn(inner, outer=None):
    """One draw of these tasks, stacked as a solver takes it."""
    outer = inner if outer is None else outer
    return Batch(*jax.tree.map(lambda leaf: leaf[None], (inner, outer)))


def opts(inner=0.1, outer=1.0):
    return Vars(inner=optax.sgd(inner), outer=optax.sgd(outer))


def direction(solver, vars, batch):
    """What x moves along, if its optimiser is sgd(1); ``vars`` may be x."""
    vars = vars if isinstance(vars, Vars) else Vars(outer=vars)
    new = jax.jit(solver.update)(solver.init(vars, batch), batch)
    return jax.tree.map(jnp.subtract, vars.outer, new.vars.outer)


HEAD, ROWS = 3, 7


def features(params, data):
    rows, labels = data
    return jnp.tanh(rows @ params["body"]) @ params["head"], labels


def network_loss(z, x, data):
    """A smooth loss that is not quadratic in body or head."""
    del x
    out, labels = features(z, data)
    return optax.sigmoid_binary_cross_entropy(out, labels) + 0.05 * (z["head"] ** 2).sum()


NETWORK = Problem(network_loss, network_loss)


@cache
def network():
    rng = np.random.default_rng(2)
    params = {"body": jnp.asarray(rng.normal(size=(5, HEAD))), "head": jnp.asarray(rng.normal(size=HEAD))}
    support, query = (
        (jnp.asarray(rng.normal(size=(TASKS, ROWS, 5))), jnp.asarray(rng.integers(0, 2, (TASKS, ROWS)), jnp.float64))
        for _ in range(2)
    )
    return params, support, query


def of_head(path):
    return "head" in path


def mean_over_tasks(one):
    """Of a function of the data of one task."""
    _, support, query = network()
    found = [one(*task((support, query), i)) for i in range(TASKS)]
    return jax.tree.map(lambda *leaves: sum(leaves) / TASKS, *found)


def task(data, index):
    """The data of one task."""
    return jax.tree.map(lambda leaf: leaf[index], data)
