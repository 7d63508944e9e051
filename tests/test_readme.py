"""The README's code blocks run, in their order, as a newcomer would paste them; and its commands exist."""

import re
from pathlib import Path

import pytest

README = Path(__file__).parent.parent / "README.md"


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README.read_text(), re.DOTALL)


@pytest.fixture
def newcomer(monkeypatch):
    """JAX as it comes: none of the strict settings of this suite but for the effort of compilation."""
    import jax

    with jax.enable_x64(False), jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


def test_python_blocks_run_in_order(newcomer):
    found = blocks("python")
    assert len(found) >= 3
    namespace: dict = {}
    for block in found:
        exec(compile(block, str(README), "exec"), namespace)
    assert int(namespace["carry"].state.step) == 1000  # of the last block that has one


def test_own_solver_is_at_most_ten_lines():
    definition = re.search(r"def my_solver.*?\n\n\n", blocks("python")[1], re.DOTALL)
    assert definition
    assert len(definition.group().strip().splitlines()) <= 10


def test_make_targets_exist():
    makefile = (README.parent / "Makefile").read_text()
    for target in re.findall(r"^make (\w+)", "\n".join(blocks("sh")), re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


def test_modules_of_the_commands_exist():
    modules = re.findall(r"python -m (experiments\.\w+)", README.read_text())
    assert modules
    for module in modules:
        path = README.parent / module.replace(".", "/")
        assert path.with_suffix(".py").exists() or (path / "__main__.py").exists(), module


def test_every_solver_is_in_the_table():
    import bilevel_jax.solvers as solvers

    text = README.read_text()
    for name in set(solvers.__all__) - {"default_opts"}:
        assert f"`{name}`" in text
