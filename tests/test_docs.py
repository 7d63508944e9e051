"""The pages of docs/: their blocks run in their order, as a newcomer would paste them, and the table of methods is whole."""

import importlib.util
import re
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from bilevel_jax import Batch, Problem, Vars, linear_solve, solvers, spent
from bilevel_jax.distributed import adbo, d_soba, fednest, gossip
from bilevel_jax.solvers.steps import DECAYS
from bilevel_jax.types import Cost
from tests.tables import thinned

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
#: docs/jaxopt.md runs in tests/test_migration.py; the pages of the reference are made of docstrings, which are doctests.
PAGES = sorted(path.name for path in DOCS.glob("*.md") if path.name != "jaxopt.md")


def blocks(page: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", (DOCS / page).read_text(), re.DOTALL | re.MULTILINE)


@pytest.fixture
def newcomer():
    """JAX as it comes: none of the strict settings of this suite but for the effort of compilation."""
    with jax.enable_x64(False), jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


@thinned("page", [name for name in PAGES if blocks(name)], "index.md", "quickstart.md")
def test_blocks_run_in_order(page, newcomer):
    namespace: dict = {"__name__": page}
    assert any("assert " in block for block in blocks(page))  # the blocks say what must come out
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


SIZES = {"D": 5, "N": 3, "Q": 4, "p": 3}
STEPS, NEUMANN = {"inner_steps": SIZES["D"]}, {"rate": 0.1, "terms": SIZES["Q"]}
CG = {**STEPS, "linear_solver": linear_solve.cg(max_steps=SIZES["N"])}
CONSTANTS = {"smoothness": 2.0, "strong_convexity": 1.0, "outer_smoothness": 2.0, "outer_strong_convexity": 1.0}
RATES = {"inner_rate": 0.1, "outer_rate": 0.1, "neumann_rate": 0.1}
#: One update in so many is a full pass, where there are any.
PERIOD = 4
#: What a solver is made with, so that its declared cost is that of the table at the sizes above, or at its own.
CASES: list[tuple[str, dict, dict]] = [
    *((name, {}, {}) for name in ("soba", "ma_soba", "saba", "storm_soba", "fsla", "sl_bamm")),
    ("srba", {"period": PERIOD}, {}),
    ("spaba", {"probability": 1 / PERIOD}, {}),
    *((name, NEUMANN, {}) for name in ("mrbo", "sustain", "ttsa")),
    *((name, NEUMANN | STEPS, {}) for name in ("bsa", "stocbio")),
    ("vrbo", {**NEUMANN, **STEPS, "period": PERIOD}, {}),
    *((name, {"radius": 1.0}, {}) for name in ("hjfbio", "fdehbo")),
    *((name, STEPS, {}) for name in ("itd_bio", "fo_itd_bio", "pzobo", "bda", "iaptt", "maml", "fomaml", "reptile")),
    *((name, STEPS, {}) for name in ("f2sa", "f2ba", "bome", "pbgd", "bvfim", "bvfsm")),
    ("meha", {"gamma": 1.0}, {}),
    *(("f2sa_p", {**STEPS, "order": order}, {"r": max(order, 2)}) for order in (1, 2, 4)),
    ("anil", {**STEPS, "adapted": lambda path: "head" in path}, {}),
    ("amigo", {**STEPS, "aux_steps": SIZES["N"], "aux_rate": 0.1}, {}),
    *((name, CG, {}) for name in ("aid_bio", "imaml")),
    *((name, {**CONSTANTS, **STEPS, "aux_steps": SIZES["N"]}, {}) for name in ("accbio", "accbio_bg")),
    *(
        ("fednest", {**RATES, "inner_rounds": t, "local_steps": tau, "neumann_terms": q}, {"T": t, "tau": tau, "Q": q})
        for t, tau, q in ((1, 1, 1), (1, 5, 10), (2, 3, 4))
    ),
    ("d_soba", {"mixing": np.eye(3)}, {}),
]
#: Rows without a case here, and why.
LEFT_OUT = {
    "stable": "declares no bound, because it learns p from the variables: the next test counts",
    "hoag": "loops end at a tolerance: it declares the most, and counts what it takes",
    "ba": "the number of inner steps grows with the updates: it declares no bound, and counts",
    "adbo": "is no `Solver` with a cost: its workers answer when they can",
    "gossip": "has the cost of the solver that it is given",
}


def cell(name: str) -> str:
    """The calls an update in the row of a method."""
    (row,) = re.findall(rf"^\| `{name}` \|.*$", (DOCS / "choosing.md").read_text(), re.MULTILINE)
    return row.split("|")[3].strip()


def value(calls: str, sizes: dict) -> float:
    """Of the formula that a cell begins with; two factors stand side by side, with a space or a parenthesis between."""
    formula = re.split(r", | at most", calls)[0]
    return eval(re.sub(r"(?<=[\w)]) (?=[\w(])|(?<=\))(?=\()", " * ", formula), dict(sizes))


def declared(name: str, options: dict) -> Cost:
    problem, sgd = Problem(lambda z, x, a: 0.0, lambda z, x, b: 0.0), optax.sgd(0.1)
    make = {"fednest": fednest, "d_soba": d_soba}.get(name) or getattr(solvers, name)
    if name in ("accbio", "accbio_bg", "fednest"):  # which have their step sizes from options
        return make(problem, **options).cost
    moves_aux = name == "d_soba" or (name in DECAYS and DECAYS[name].aux)
    return make(problem, Vars(sgd, sgd if moves_aux else None, sgd), **options).cost


@pytest.mark.parametrize(("name", "options", "sizes"), CASES, ids=[name for name, _, _ in CASES])
def test_calls_of_the_table_are_those_declared(name, options, sizes):
    calls, cost = cell(name), declared(name, options)
    passes = 1 / PERIOD if "full pass" in calls else 0
    draws = 1 - passes if ", or " in calls else 1  # a pass is instead of a draw, or beside it
    assert sum(cost.draw) == draws * value(calls, SIZES | sizes)
    assert cost.full.cross == passes


def test_calls_of_stable_are_those_counted():
    problem = Problem(lambda z, x, a: ((z - x - a) ** 2).sum(), lambda z, x, b: ((z - b) ** 2).sum())
    solver = solvers.stable(problem, Vars(optax.sgd(0.1), None, optax.sgd(0.1)), strong_convexity=1.0)
    start, batch = Vars(jnp.ones(SIZES["p"]), None, jnp.ones(SIZES["p"])), Batch(*jnp.ones((2, 1, SIZES["p"])))
    state = jax.jit(solver.update)(solver.init(start, batch), batch)
    assert sum(spent(solver, state)) == value(cell("stable"), SIZES)


def test_calls_of_every_row_are_looked_at():
    """But for those that cannot be, which are named with the reason."""
    _, tables = (DOCS / "choosing.md").read_text().split("\n## All solvers\n")
    rows = set(re.findall(r"^\| `(\w+)` \|", tables, re.MULTILINE))
    assert rows == {name for name, _, _ in CASES} | LEFT_OUT.keys()
    assert LEFT_OUT.keys().isdisjoint(name for name, _, _ in CASES)


def test_links_lead_somewhere():
    """In a checkout, from any page; the site checks its own when it is built."""
    for path in DOCS.rglob("*.md"):
        for target in re.findall(r"\]\(([^)#:\s]+)(?:#[^)]*)?\)", path.read_text()):
            assert (path.parent / target).exists(), f"{path.name}: {target}"


def test_every_page_is_in_the_navigation():
    _, nav = (ROOT / "mkdocs.yml").read_text().split("\nnav:\n")
    assert set(re.findall(r"[\w/]+\.md", nav)) == {path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md")}


def test_links_of_a_checkout_become_those_of_the_site():
    """To a page of the site; to a file that the site lacks, whose path is written out unless the words are it."""
    pytest.importorskip("mkdocs")
    spec = importlib.util.spec_from_file_location("hooks", DOCS / "hooks.py")
    assert spec is not None
    assert spec.loader is not None
    hooks = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(hooks)
    page = SimpleNamespace(file=SimpleNamespace(src_uri="reference/index.md"))
    files = SimpleNamespace(get_file_from_path=lambda name: name if name == "numerics.md" else None)
    for given, expected in {
        "[there](../numerics.md#top)": "[there](../numerics.md#top)",
        "[Licence!](../../LICENSE)": "Licence! (`LICENSE`)",
        "![a picture!](../../LICENSE)": "a picture! (`LICENSE`)",
        "[`LICENSE`](../../LICENSE)": "`LICENSE`",
        "[lost](lost.md)": "[lost](lost.md)",
        "```\n[code](../../LICENSE)\n```": "```\n[code](../../LICENSE)\n```",
    }.items():
        assert hooks.on_page_markdown(given, page, None, files) == expected
