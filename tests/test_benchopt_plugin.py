"""The plug-in for benchopt: exact blocks, the iterates of the library, and a run by benchopt itself as the README says."""

import os
import re
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import pandas as pd
import pytest

from bilevel_jax import run, samplers, solvers, testing

benchmark = pytest.importorskip("benchopt.benchmark", reason="benchopt is not installed")
from benchopt.utils.dynamic_modules import skip_import_ctx  # noqa: E402

PLUGIN = Path(__file__).parent.parent / "experiments" / "benchopt_plugin"
NAMES = {f"bilevel_jax {name}" for name in ("SOBA", "SABA", "SRBA", "MA-SOBA", "F2SA-p", "AID")}


@pytest.fixture(scope="module")
def own():
    """The benchmark of the folder, without traces in this process or in the folder."""
    before = set(sys.modules)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "dont_write_bytecode", True)
        yield benchmark.Benchmark(PLUGIN, seed=0)
    for name in set(sys.modules) - before:
        if name.startswith(("benchmark_utils", "benchopt_benchmarks")):
            del sys.modules[name]


@pytest.fixture(scope="module")
def objective(own):
    """Of a float64 quadratic with 13 inner and 8 outer samples: blocks of 4 are ragged at one level."""
    made = own.get_benchmark_objective().get_instance()
    made.set_data(testing.quadratic(jax.random.key(0), inner_samples=13, outer_samples=8, dtype=jnp.float64))
    return made


def solver_of(own, objective, name, **parameters):
    """A solver as benchopt makes it."""
    (cls,) = [cls for cls in own.get_solvers() if cls.name == f"bilevel_jax {name}"]
    made = cls.get_instance(**parameters)
    given = objective.get_objective()
    assert made.skip(**given) == (False, None)
    made.set_objective(**given)
    return made


def stretches(solver, count):
    """A run of so many calls of benchopt's callback."""
    calls = iter([True] * count + [False])
    solver.pre_run_hook(None)
    solver.run(lambda: next(calls))
    return solver.get_result()


@pytest.mark.more
@pytest.mark.parametrize("size", [4, 8, 13])
def test_blocks_average_to_the_whole(own, objective, size):
    from benchmark_utils.bilevel_jax_plugin import block_loss  # type: ignore[import-not-found]

    given, start = objective.get_objective(), objective.quadratic.start
    loss = block_loss(given["f_inner"], 13, size)
    at = partial(jax.value_and_grad(loss, argnums=(0, 1)), start.inner + 1, start.outer)
    count = samplers.blocks(13, size)
    each = [at(jnp.array([block])) for block in range(count)]
    mean = jax.tree.map(lambda *parts: sum(parts) / count, *each)
    exact = jax.value_and_grad(given["f_inner"], argnums=(0, 1))(start.inner + 1, start.outer, 0, batch_size=13)
    assert jax.tree.all(jax.tree.map(partial(jnp.allclose, rtol=1e-12, atol=1e-12), mean, exact))
    assert jax.tree.all(jax.tree.map(partial(jnp.allclose, rtol=1e-12, atol=1e-12), at(jnp.arange(count)), exact))


@pytest.mark.more
def test_saba_makes_the_iterates_of_the_library_and_compiles_once(own, objective):
    """Blocks as samples of the plug-in, or blocks of rows with a mask: the same draws, the same SABA."""
    rates = {"step_size": 0.1, "outer_ratio": 2.0, "batch_size": 4, "eval_freq": 10, "random_state": 3}
    solver = solver_of(own, objective, "SABA", **rates)
    solver.warm_up()
    found = stretches(solver, 3)
    q = objective.quadratic
    ours = solvers.saba(q.problem, solvers.default_opts(solvers.saba, 0.1, 0.1, 0.05))
    carry, _ = jax.jit(partial(run, ours, samplers.uniform(4), steps=30))(q.start, q.data, jax.random.key(3))
    assert jnp.allclose(found["outer_var"], carry.state.vars.outer, rtol=1e-12, atol=1e-12)
    assert jnp.allclose(found["inner_var"], carry.state.vars.inner, rtol=1e-12, atol=1e-12)
    assert jnp.abs(found["outer_var"] - q.start.outer).max() > 0.1
    again = stretches(solver, 3)  # from the start, and not from where the last run ended
    assert jnp.array_equal(again["outer_var"], found["outer_var"])
    assert solver._advance._cache_size() == 1


def test_results_survive_the_next_stretch(own, objective):
    """The carry is donated: a result that benchopt keeps must not be overwritten or deleted."""
    solver = solver_of(own, objective, "SOBA", batch_size=4, eval_freq=2)
    first = stretches(solver, 1)
    kept = jnp.copy(first["outer_var"])
    solver._carry = solver._advance(solver._carry)
    assert jnp.array_equal(first["outer_var"], kept)


def test_parameters_that_do_not_fit_are_refused(own, objective):
    given = objective.get_objective()
    classes = {cls.name: cls for cls in own.get_solvers()}
    large = classes["bilevel_jax SOBA"].get_instance(batch_size=9)
    assert large.skip(**given) == (True, "batch_size: got 9, expected at most 8, the samples there are")
    for wrong in ({"step_size": 0.0}, {"outer_ratio": -1.0}, {"batch_size": 0}, {"eval_freq": 0}):
        (name,) = wrong
        solver = classes["bilevel_jax SOBA"].get_instance(**{"batch_size": 4} | wrong)
        with pytest.raises(ValueError, match=f"^{name}: got"):
            solver.set_objective(**given)


def test_benchopt_can_read_the_files_without_importing_them(own):
    """So it does where bilevel_jax is not installed yet, to find out what to install."""
    with skip_import_ctx():
        classes = benchmark.Benchmark(PLUGIN, seed=0).get_solvers()
    assert {cls.name for cls in classes} == NAMES
    for cls in classes:
        assert cls.requirements == ["pip::bilevel-jax"]
        assert {"step_size", "outer_ratio", "eval_freq", "random_state"} <= set(cls.parameters)


def test_blocks_that_are_neither_one_nor_all_are_refused(own):
    from benchmark_utils.bilevel_jax_plugin import block_loss  # type: ignore[import-not-found]

    loss = block_loss(lambda z, x, start, batch_size: z, 13, 4)
    with pytest.raises(ValueError, match=r"^blocks: got 2, expected 1 or all 4$"):
        loss(jnp.zeros(()), None, jnp.arange(2))


@pytest.fixture(scope="module")
def follow(tmp_path_factory):
    """What the README says, from a folder with a copy of ours and, as `CLONE`, another benchmark with the same interface."""
    home = tmp_path_factory.mktemp("home")
    shutil.copytree(PLUGIN, home / "experiments" / PLUGIN.name, ignore=shutil.ignore_patterns("__*__", "outputs"))
    clone = home / "clone"
    for folder in ("solvers", "datasets", "benchmark_utils"):
        (clone / folder).mkdir(parents=True)
    (clone / "benchmark_utils" / "__init__.py").touch()
    for name in ("objective.py", "datasets/simulated.py"):
        shutil.copy(PLUGIN / name, clone / name)
    where = os.environ | {
        "CLONE": str(clone),
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(PLUGIN.parent.parent),
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",  # as in this process: most of the time is compilation
    }

    def call(*lines):
        script = "\n".join(["set -e", *lines])
        done = subprocess.run(["bash", "-c", script], cwd=home, env=where, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr

    def results(command, count):
        """Of a command of the README; of options that are given twice benchopt takes the last."""
        file = home / f"{count}.parquet"  # a name of its own, because benchopt does not overwrite
        call(f"{command} -n {count} -r 1 --no-plot --no-cache --output {file}")
        history = pd.read_parquet(file)
        history["name"] = history["solver_name"].str.split("[").str[0]
        assert (history.groupby("solver_name")["stop_val"].max() == count).all()
        return history

    return call, results


def readme(start):
    """Its lines that begin so."""
    return re.findall(rf"^{start} .*$", (PLUGIN / "README.md").read_text(), re.MULTILINE)


@pytest.mark.more
def test_the_readme_runs_in_another_benchmark(follow):
    call, results = follow
    assert len(readme("cp")) == len(readme("benchopt run")) == 2
    call(*readme("cp"))
    history = results(readme("benchopt run")[0], 2)
    solvers_there = [f"bilevel_jax {name}" for name in ("SABA", "SABA", "SRBA")]  # two step sizes of SABA
    assert sorted(history.groupby("solver_name")["name"].first()) == solvers_there
    assert history["objective_gradient_norm"].notna().all()


@pytest.mark.more
def test_the_readme_runs_in_our_benchmark(follow):
    _, results = follow
    history = results(readme("benchopt run")[1], 15)
    assert set(history["name"]) == NAMES
    first, last = (history[history["stop_val"] == count].set_index("name") for count in (0, 15))
    assert (first["objective_gradient_norm"] > 1).all()
    for name, limit in {"SABA": 1e-3, "SRBA": 1e-3, "AID": 1e-2}.items():  # those without noise
        assert last["objective_gradient_norm"][f"bilevel_jax {name}"] < limit, name
    for name, limit in {"SOBA": 0.2, "MA-SOBA": 0.5, "F2SA-p": 0.2}.items():  # gap to h*, 4.4 at the start
        assert last["objective_value"][f"bilevel_jax {name}"] < limit, name
