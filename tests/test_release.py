"""What a release promises: an import without side effects, a wheel with the package only, and an sdist with everything."""

import ast
import json
import os
import re
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

import bilevel_jax

ROOT = Path(__file__).parent.parent
#: Tracked by git, but of no use without it.
ONLY_GIT = {".ci", ".gitignore", ".pre-commit-config.yaml"}

# No backend can be made of the platform "none", so that touching a device raises.
WATCHED_IMPORT = """
import importlib, json, os, pkgutil, sys
os.environ["JAX_PLATFORMS"] = "none"
import jax, optax

def packages():
    return {name.partition(".")[0] for name in sys.modules} - sys.stdlib_module_names

found = {"sockets": [], "failed": {}}
sys.addaudithook(lambda event, args: event.startswith("socket.") and found["sockets"].append(event))
flags, known = dict(jax.config.values), packages()
names = [sys.argv[1]]
for name in names:
    try:
        module = importlib.import_module(name)
    except Exception as error:
        found["failed"][name] = repr(error)
    else:
        names += [f"{name}.{child.name}" for child in pkgutil.iter_modules(getattr(module, "__path__", []))]
found |= {
    "modules": names,
    "flags": [name for name, value in jax.config.values.items() if value != flags.get(name)],
    "packages": sorted(packages() - known),
}
print(json.dumps(found))
"""

WORST = """
import jax
import socket
import extra
jax.config.update("jax_enable_x64", True)
try:
    socket.create_connection(("127.0.0.1", 9), timeout=1)
except OSError:
    pass
jax.devices()
"""


def watched_import(package, folder):
    """What importing a package with all its modules does, in a fresh process."""
    paths = os.environ | {"PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", WATCHED_IMPORT, package], cwd=folder, env=paths, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_import_touches_no_device_network_flag_or_extra():
    found = watched_import("bilevel_jax", ROOT)
    modules = found.pop("modules")
    assert found == {"sockets": [], "failed": {}, "flags": [], "packages": ["bilevel_jax"]}
    files = {path.relative_to(ROOT).with_suffix("").as_posix() for path in (ROOT / "bilevel_jax").rglob("*.py")}
    assert {name.replace(".", "/") for name in modules} == {file.removesuffix("/__init__") for file in files}


@pytest.mark.more
def test_imports_of_the_experiments_touch_no_device():
    """`experiments.speed` keeps to one core by what it does before jax starts, and others ask for several CPU devices."""
    found = watched_import("experiments", ROOT)
    assert {name: error for name, error in found["failed"].items() if "ModuleNotFoundError" not in error} == {}
    assert found["flags"] == []
    assert len(found["modules"]) > 60


def test_the_watch_sees_a_module_that_does_all_of_it(tmp_path):
    (tmp_path / "worst.py").write_text(WORST)
    (tmp_path / "extra.py").touch()
    found = watched_import("worst", tmp_path)
    assert "socket.connect" in found["sockets"]
    assert "none" in found["failed"]["worst"]  # the platform that jax.devices asked for
    assert found["flags"] == ["jax_enable_x64"]
    assert "extra" in found["packages"]


def core_imports():
    """The packages that the modules of the core import when they are imported; what a function imports, an extra may bring."""
    for path in (ROOT / "bilevel_jax").rglob("*.py"):
        waiting: list[ast.AST] = [ast.parse(path.read_text())]
        for node in waiting:
            if isinstance(node, ast.Import):
                yield from (name.name.partition(".")[0] for name in node.names)
            elif isinstance(node, ast.ImportFrom):
                yield (node.module or "bilevel_jax").partition(".")[0]
            elif not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                waiting += ast.iter_child_nodes(node)


def test_pure_dependencies():
    """The core depends on what it imports, and on nothing else; every extra of an extra is one."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    names = {re.split(r"[<>=\[]", entry)[0] for entry in project["dependencies"]}
    assert names == set(core_imports()) - sys.stdlib_module_names - {"bilevel_jax"}
    for entries in project["optional-dependencies"].values():
        for entry in entries:
            if nested := re.match(r"bilevel-jax\[(.*)\]", entry):
                assert set(nested.group(1).split(",")) <= set(project["optional-dependencies"])


@pytest.mark.parametrize(
    ("name", "pattern"), [("CHANGELOG.md", r"^## \[?(\d+\.\d+\.\d+)"), ("CITATION.cff", r"^version: \"?([\d.]+)")]
)
def test_versions_agree(name, pattern):
    found = re.search(pattern, (ROOT / name).read_text(), re.MULTILINE)
    assert found
    assert found.group(1) == bilevel_jax.__version__


@pytest.mark.slow
def test_wheel_and_sdist(tmp_path):
    """Needs a package index: builds both in a clean environment, the wheel from the sdist, and installs it without extras."""

    def python(*args, cwd=tmp_path):
        done = subprocess.run([tmp_path / "venv" / "bin" / "python", *args], cwd=cwd, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "venv"], check=True)
    python("-m", "pip", "install", "--quiet", "build")
    python("-m", "build", "--outdir", str(tmp_path), str(ROOT))
    stem = f"bilevel_jax-{bilevel_jax.__version__}"
    with tarfile.open(tmp_path / f"{stem}.tar.gz") as sdist:
        held = {name.partition("/")[2] for name in sdist.getnames()}
    assert {name for name in tracked if name.split("/")[0] not in ONLY_GIT} <= held
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        held = {name for name in archive.namelist() if not name.startswith(f"{stem}.dist-info/")}
    assert held == {name for name in tracked if name.startswith("bilevel_jax/")}
    assert "bilevel_jax/py.typed" in held
    assert wheel.stat().st_size < 1e6
    python("-m", "pip", "install", "--quiet", str(wheel))
    python("-m", "pip", "check")
    code = "import bilevel_jax, bilevel_jax.distributed.cluster as c; print(bilevel_jax.__file__)"
    assert str(tmp_path) in python("-c", code)
