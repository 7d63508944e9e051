"""The pages of docs/: their blocks run in their order, as a newcomer would paste them, and the table of methods is whole."""

import re
from pathlib import Path

import jax
import pytest

from bilevel_jax import solvers
from bilevel_jax.distributed import adbo, d_soba, fednest, gossip

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
#: docs/jaxopt.md runs in tests/test_migration.py; the pages of the reference are made of docstrings, which are doctests.
PAGES = sorted(path.name for path in DOCS.glob("*.md") if path.name != "jaxopt.md")


def blocks(page: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", (DOCS / page).read_text(), re.DOTALL | re.MULTILINE)


@pytest.fixture
def newcomer():
    """JAX as it comes: none of the strict settings of this suite."""
    with jax.enable_x64(False), jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


@pytest.mark.parametrize("page", [name for name in PAGES if blocks(name)])
def test_blocks_run_in_order(page, newcomer):
    namespace: dict = {"__name__": page}
    for block in blocks(page):
        exec(compile(block, str(DOCS / page), "exec"), namespace)


@pytest.mark.parametrize(
    "page", ["quickstart.md", "concepts.md", "own_solver.md", "implicit.md", "reliability.md", "numerics.md"]
)
def test_pages_assert_what_they_show(page):
    assert sum(block.count("assert ") for block in blocks(page)) >= 5


def test_every_block_has_a_language():
    """One without would neither run nor be seen to be missed."""
    for page in PAGES:
        fences = re.findall(r"^```(.*)$", (DOCS / page).read_text(), re.MULTILINE)
        assert all(fences[::2]), page
        assert not any(fences[1::2]), page


def test_every_solver_is_in_the_table_of_methods():
    text = (DOCS / "choosing.md").read_text()
    machines = {function.__name__ for function in (adbo.adbo, fednest, gossip, d_soba)}
    for name in {*solvers.__all__, *machines} - {"default_opts"}:
        row = re.findall(rf"^\| `{name}` \|.*$", text, re.MULTILINE)
        assert len(row) == 1, name
        assert len(row[0].strip("|").split("|")) == 6, name  # with what it assumes, calls, memory, rate, when


def test_links_lead_somewhere():
    """In a checkout, from any page; the site checks its own when it is built."""
    for path in DOCS.rglob("*.md"):
        for target in re.findall(r"\]\(([^)#:\s]+)(?:#[^)]*)?\)", path.read_text()):
            assert (path.parent / target).exists(), f"{path.name}: {target}"


def test_every_page_is_in_the_navigation():
    _, nav = (ROOT / "mkdocs.yml").read_text().split("\nnav:\n")
    assert set(re.findall(r"[\w/]+\.md", nav)) == {path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md")}
