"""The reference pages have an entry for everything that is public.  `make docs` builds the site, warnings as errors."""

import ast
import importlib
import importlib.util
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = sorted((ROOT / "docs" / "reference").glob("*.md"))
ENTRIES = [name for page in PAGES for name in re.findall(r"^::: (\S+)$", page.read_text(), re.MULTILINE)]
#: Modules that only serve others, as reference/index.md says; what of them is public is an entry all the same.
SERVANTS = {
    "bilevel_jax.arguments",
    "bilevel_jax.control_flow",
    "bilevel_jax.inspection",
    "bilevel_jax.linear_contract",
    "bilevel_jax.lineax_bridge",
    "bilevel_jax.neumann_series",
    "bilevel_jax.distributed.clock",
    "bilevel_jax.distributed.cuts",
    "bilevel_jax.distributed.host",
    "bilevel_jax.distributed.programs",
    "bilevel_jax.distributed.rates",
    "bilevel_jax.distributed.store",
    "bilevel_jax.distributed.worker",
}


def found(path):
    """The object that a dotted path of a page means; modules before names, since `bilevel_jax.sweep` is both."""
    module, _, name = path.rpartition(".")
    try:
        return importlib.import_module(path)
    except ModuleNotFoundError:
        return getattr(importlib.import_module(module), name)


def modules():
    """The dotted paths of the files of the library, those of solvers left to `bilevel_jax.solvers`."""
    for path in sorted((ROOT / "bilevel_jax").rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        if parts != ("bilevel_jax", "__init__") and (parts[1] != "solvers" or parts[-1] == "__init__"):
            yield ".".join(part for part in parts if part != "__init__"), path


def test_entries_exist_and_are_given_once():
    assert len(ENTRIES) == len(set(ENTRIES)) > 200
    for entry in ENTRIES:
        assert found(entry) is not None, entry


def test_every_module_is_there_or_serves_others():
    assert {name for name, _ in modules()} == {entry for entry in ENTRIES if entry in dict(modules())} | SERVANTS


def test_the_first_page_names_those_that_serve_others():
    _, left = (ROOT / "docs" / "reference" / "index.md").read_text().split("Not covered here: ")
    assert {name for name in re.findall(r"`(bilevel_jax\.[\w.]+)`", left) if name not in ENTRIES} == SERVANTS


def public(module, path):
    """The names of ``__all__``, and those whose docstring has an example."""
    yield from getattr(importlib.import_module(module), "__all__", [])
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and "Example:" in (ast.get_docstring(node) or ""):
            yield node.name


def test_every_public_name_is_there():
    there = {id(found(entry)) for entry in ENTRIES}
    files = {"bilevel_jax": ROOT / "bilevel_jax" / "__init__.py", **dict(modules())}
    missing = {
        f"{module}.{name}"
        for module, path in files.items()
        for name in public(module, path)
        if id(getattr(importlib.import_module(module), name)) not in there
    }
    assert missing == set()


def test_pages_are_linked_from_the_first():
    index = (ROOT / "docs" / "reference" / "index.md").read_text()
    for page in PAGES:
        assert page.name == "index.md" or f"({page.name})" in index
    for name in importlib.import_module("bilevel_jax").__all__:
        assert f"`{name}`" in index or f"`bilevel_jax.{name}`" in index, name


def test_docstrings_become_markdown():
    """What a reader of the site relies on: a row an argument, examples as code, names as links, z* as it is."""
    griffe = pytest.importorskip("griffe")
    spec = importlib.util.spec_from_file_location("docstrings", ROOT / "docs" / "docstrings.py")
    extension = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(extension)
    library = griffe.load("bilevel_jax", search_paths=[ROOT], extensions=griffe.load_extensions(extension.HouseStyle))

    def sections(path):
        return {section.kind.value: section.value for section in library[path].docstring.parse("google")}

    auto = sections("linear_solve.auto")
    assert [row.name for row in auto["parameters"]] == ["positive_definite", "dense_below", "max_steps", "rtol", "damping"]
    assert 'identifier="bilevel_jax.linear_solve.dense"' in auto["text"]
    assert auto["examples"][0][1].startswith(">>> ")
    assert "at z\\*(x) only" in sections("hypergrad.implicit")["parameters"][1].description
    fields = {row.name: row.description for row in sections("types.Vars")["attributes"]}
    assert fields["inner"] == "z"
