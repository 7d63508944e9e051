"""The pages of docs/: their blocks run in their order, as a newcomer would paste them, and the table of methods is whole."""

import re
from pathlib import Path

import jax
import optax
import pytest

from bilevel_jax import Problem, Vars, linear_solve, solvers
from bilevel_jax.distributed import adbo, d_soba, fednest, gossip
from bilevel_jax.solvers.steps import DECAYS

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


SIZES = {"D": 5, "N": 3, "Q": 4, "r": 2}
NEUMANN = {"rate": 0.1, "terms": SIZES["Q"]}
CONSTANTS = {"smoothness": 2.0, "strong_convexity": 1.0, "outer_smoothness": 2.0, "outer_strong_convexity": 1.0}
#: What a solver is made with, so that its declared cost is that of the table at these sizes.
OPTIONS: dict[str, dict] = {
    **{name: {} for name in ("soba", "ma_soba", "saba", "storm_soba", "fsla", "sl_bamm")},
    **dict.fromkeys(("mrbo", "sustain", "ttsa"), NEUMANN),
    **{name: {**NEUMANN, "inner_steps": SIZES["D"]} for name in ("bsa", "stocbio")},
    **{name: {"radius": 1.0} for name in ("hjfbio", "fdehbo")},
    **{name: {"inner_steps": SIZES["D"]} for name in ("itd_bio", "fo_itd_bio", "pzobo", "bda", "iaptt", "maml", "fomaml")},
    **{name: {"inner_steps": SIZES["D"]} for name in ("reptile", "f2sa", "f2ba", "bome", "pbgd", "bvfim", "bvfsm")},
    "meha": {"gamma": 1.0},
    "f2sa_p": {"inner_steps": SIZES["D"], "order": SIZES["r"]},
    "anil": {"inner_steps": SIZES["D"], "adapted": lambda path: "head" in path},
    "amigo": {"inner_steps": SIZES["D"], "aux_steps": SIZES["N"], "aux_rate": 0.1},
    "aid_bio": {"inner_steps": SIZES["D"], "linear_solver": linear_solve.cg(max_steps=SIZES["N"])},
    "imaml": {"inner_steps": SIZES["D"], "linear_solver": linear_solve.cg(max_steps=SIZES["N"])},
    "accbio": {**CONSTANTS, "inner_steps": SIZES["D"], "aux_steps": SIZES["N"]},
    "accbio_bg": {**CONSTANTS, "inner_steps": SIZES["D"], "aux_steps": SIZES["N"]},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_calls_of_the_table_are_those_declared(name):
    (row,) = re.findall(rf"^\| `{name}` \|.*$", (DOCS / "choosing.md").read_text(), re.MULTILINE)
    formula = re.split(r", | at most", row.split("|")[3])[0].strip()
    expected = eval(re.sub(r"(?<=[\w)]) (?=[\w(])", " * ", formula), dict(SIZES))
    problem, sgd, make = Problem(lambda z, x, a: 0.0, lambda z, x, b: 0.0), optax.sgd(0.1), getattr(solvers, name)
    if "smoothness" in OPTIONS[name]:
        solver = make(problem, **OPTIONS[name])
    else:
        moves_aux = DECAYS[name].aux if name in DECAYS else False
        solver = make(problem, Vars(sgd, sgd if moves_aux else None, sgd), **OPTIONS[name])
    assert sum(solver.cost.draw) == expected


def test_links_lead_somewhere():
    """In a checkout, from any page; the site checks its own when it is built."""
    for path in DOCS.rglob("*.md"):
        for target in re.findall(r"\]\(([^)#:\s]+)(?:#[^)]*)?\)", path.read_text()):
            assert (path.parent / target).exists(), f"{path.name}: {target}"


def test_every_page_is_in_the_navigation():
    _, nav = (ROOT / "mkdocs.yml").read_text().split("\nnav:\n")
    assert set(re.findall(r"[\w/]+\.md", nav)) == {path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md")}
