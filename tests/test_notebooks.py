"""The notebooks run from top to bottom, as a user runs them, and what is committed of them is whole, small and of no machine.

Each runs in a kernel of its own, in short mode (`BILEVEL_JAX_SHORT`, which its settings cell reads); in full where it is marked
slow.  Kernels talk through sockets in a folder, not through ports.
"""

import re
import tempfile
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from traitlets.config import Config

from experiments import data

FOLDER = Path(__file__).parent.parent / "notebooks"
NAMES = ("quickstart", "own_solver", "hyperparameter_selection", "few_shot", "asynchronous", "accelerator")
#: Of a committed notebook, in bytes.
LARGEST = 300_000
#: What a line of output must not have: a folder of somebody's machine, or a warning.
FOREIGN = re.compile(r"(?<![\w.:/])/(?:home|Users|root|tmp|work|usr|opt|var|mnt)/|[A-Z]:\\|\w*Warning\b|Traceback")
#: Numbers that a run prints, of which the last one is to be below (-1) or above (1) the first.
SHOWN = {
    "quickstart": (r"([\d.]+) at the (?:start|end)", -1),  # loss on rows held out
    "own_solver": (r"\|x - x\*\| = ([\d.e+-]+)", -1),  # of SOBA, and of falling damping with SAGA
    "hyperparameter_selection": (r"(?:gap|->) ([\d.e+-]+)", -1),  # of SOBA at the start, and of SRBA at the end
    "few_shot": (r"accuracy ([\d.]+)", 1),
    "asynchronous": (r"[as]dbo +\d+ +([\d.]+)", 1),  # seconds of ADBO without stragglers, and of SDBO with
    "accelerator": (r"(?:lowest weight:|by chance) ([\d.]+)", -1),  # share of wrong labels
}


def read(name):
    return nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)


def code(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def texts(cell):
    """The text of the outputs of a cell, errors too."""
    for output in cell.outputs:
        yield from (output.get("text", ""), *output.get("traceback", ()), output.get("data", {}).get("text/plain", ""))


def execute(name, monkeypatch, short):
    """The notebook, run in its folder by a kernel, which is another process than that of the strict settings."""
    if short:
        monkeypatch.setenv("BILEVEL_JAX_SHORT", "1")  # XLA_FLAGS of conftest.py, for less effort of compilation, are left
    else:
        for variable in ("BILEVEL_JAX_SHORT", "XLA_FLAGS"):
            monkeypatch.delenv(variable, raising=False)
    monkeypatch.delenv("MPLBACKEND", raising=False)  # the kernel draws into the notebook
    notebook = read(name)
    with tempfile.TemporaryDirectory() as sockets:
        settings = Config({"KernelManager": {"transport": "ipc", "ip": str(Path(sockets) / "kernel")}})
        client = NotebookClient(
            notebook,
            config=settings,
            kernel_name="python3",
            timeout=300 if short else 3600,
            coalesce_streams=True,
            resources={"metadata": {"path": str(FOLDER)}},
        )
        client.execute()
    return notebook


def shown(name, cells):
    """Whether the numbers that are printed move as they should."""
    pattern, way = SHOWN[name]
    numbers = [float(found) for cell in cells for text in texts(cell) for found in re.findall(pattern, text)]
    return len(numbers) > 1 and way * (numbers[-1] - numbers[0]) > 0


def kinds(cell):
    """What a cell put out: kinds of MIME data, and names of streams."""
    return {kind for output in cell.outputs for kind in output.get("data", {output.get("name", output.output_type): None})}


@pytest.mark.filterwarnings("default")  # of the client; the kernel is another process
@pytest.mark.parametrize("short", [pytest.param(True, id="short"), pytest.param(False, id="full", marks=pytest.mark.slow)])
@pytest.mark.more
@pytest.mark.parametrize("name", NAMES)
def test_runs(name, short, monkeypatch):
    """Without an error and a warning, and every cell puts out what the committed one does."""
    if name == "few_shot" and not short:  # the others have bundled data to fall back on
        try:
            data.omniglot()
        except data.DataFileError as error:
            pytest.skip(str(error).split("\n")[0])
    committed, run = code(read(name)), code(execute(name, monkeypatch, short))
    for before, after in zip(committed, run, strict=True):
        assert kinds(before) == kinds(after), after.source
        assert not FOREIGN.search("\n".join(texts(after))), after.source
    if not (short and name == "few_shot"):  # seven digits teach little about the other three
        assert shown(name, run)


@pytest.mark.parametrize("name", NAMES)
def test_committed_outputs(name):
    """Every cell that prints or plots has its output, in order, without errors, warnings, folders of a machine, widgets."""
    path, notebook = FOLDER / f"{name}.ipynb", read(name)
    nbformat.validate(notebook)
    assert path.stat().st_size <= LARGEST
    assert set(notebook.metadata) == {"kernelspec", "language_info"}
    assert notebook.metadata.kernelspec.name == "python3"
    cells = code(notebook)
    assert shown(name, cells)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    for cell in cells:
        found = kinds(cell)
        assert found <= {"stdout", "text/plain", "image/png"}, cell.source
        assert ("plt.show()" in cell.source) == ("image/png" in found), cell.source
        assert "print(" not in cell.source or "stdout" in found, cell.source
        assert not FOREIGN.search("\n".join((cell.source, *texts(cell)))), cell.source


@pytest.mark.parametrize("name", NAMES)
def test_says_what_it_is(name):
    """The first cell says what comes of it and how long it takes, and a settings cell reads the short mode."""
    first = read(name).cells[0]
    assert first.cell_type == "markdown"
    assert "At the end you will have" in first.source
    assert "minute" in first.source
    assert any('SHORT = "BILEVEL_JAX_SHORT" in os.environ' in cell.source for cell in code(read(name)))


def test_all_are_tested():
    assert sorted(path.stem for path in FOLDER.glob("*.ipynb")) == sorted(NAMES)
