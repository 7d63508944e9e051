"""The table of figures, the program that makes them again, and the page that shows them."""

import csv
import dataclasses
import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import pytest

from experiments import data_cleaning
from experiments.catalogue import FIGURES, Figure, parse
from experiments.gallery import __main__ as gallery
from experiments.gallery.page import APART, Shown, page, settings
from experiments.reproduce import Config, Work, reproduce, reproduced

ROOT = Path(__file__).parent.parent
GALLERY = ROOT / "experiments" / "gallery"

#: An experiment that notes its runs, and sleeps, fails or draws as it is told.
FAKE = '''
import dataclasses, os, time
from pathlib import Path
import tyro

@dataclasses.dataclass(frozen=True)
class Config:
    """A fake."""

    text: str = "plain"
    """anything"""
    fail: bool = False
    """fail at the end"""
    out: Path = Path("results")
    """folder"""
    RESUME

def main(config):
    config.out.mkdir(parents=True, exist_ok=True)
    resumed = getattr(config, "resume", False)
    if (config.out / "config.json").exists() and not resumed:
        raise SystemExit("--out: holds a run already")
    (config.out / "config.json").write_text('{"settings": {"text": "from the run", "out": "/nowhere"}}')
    with (config.out / "runs").open("a") as file:
        file.write("resumed " if resumed else "new ")
    try:
        time.sleep(float(os.environ.get("FAKE_SECONDS", 0)))
    except KeyboardInterrupt:
        (config.out / "runs").open("a").write("interrupted ")
        raise SystemExit(130) from None
    if config.fail:
        raise SystemExit("--fail: as it was asked for")
    (config.out / "figure.png").write_bytes(b"a picture")

if __name__ == "__main__":
    main(tyro.cli(Config))
'''
RESUME = 'resume: bool = False\n    """go on"""'


@pytest.fixture
def fakes(tmp_path, monkeypatch):
    """Two modules, with and without --resume, which this process and its children find."""
    folder = tmp_path / "modules"
    folder.mkdir()
    (folder / "fake_new.py").write_text(FAKE.replace("RESUME", ""))
    (folder / "fake_on.py").write_text(FAKE.replace("RESUME", RESUME))
    monkeypatch.syspath_prepend(folder)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(folder), str(ROOT)]))
    yield
    for name in ("fake_new", "fake_on"):
        sys.modules.pop(name, None)


def figure(name, laptop, **changes):
    return Figure(name, f"<{name}> & co", "shows", "Someone, 2022, arXiv 2201.13409", "fake_new", laptop, 1.0, 2.0, **changes)


class Links(HTMLParser):
    """What a page refers to, its anchors, and its text."""

    def __init__(self, text):
        super().__init__()
        self.links, self.ids, self.text = [], [], ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.links += [value for name, value in attrs if name in ("href", "src")]
        self.ids += [value for name, value in attrs if name == "id"]

    def handle_data(self, data):
        self.text += data


def unresolved(text, folder):
    """The links of a page that lead nowhere."""
    found = Links(text)
    inner = [link for link in found.links if not link.startswith("https://arxiv.org/abs/")]
    return [
        link for link in inner if not (link[1:] in found.ids if link.startswith("#") else (folder / unquote(link)).is_file())
    ]


# ---- the table --------------------------------------------------------------------------------------------------------


def test_every_picture_is_in_the_table_and_the_reverse():
    names = [one.name for one in FIGURES]
    assert len(set(names)) == len(names)
    assert sorted(one.name for one in FIGURES if one.drawn) == sorted(path.stem for path in GALLERY.glob("*.png"))
    assert all(one.laptop for one in FIGURES if one.drawn)


@pytest.mark.parametrize("one", FIGURES, ids=lambda one: one.name)
def test_commands_parse(one):
    assert parse(one.command) is not None
    if one.laptop:
        assert type(parse(one.laptop)) is type(parse(one.command))


def test_saved_results_are_those_of_the_commands():
    compared = 0
    for one in FIGURES:
        path = ROOT / "experiments" / "saved" / one.name / "config.json"
        if path.exists():
            known = json.loads(path.read_text())["settings"]
            told = json.loads(json.dumps(dataclasses.asdict(parse(one.command)), default=str))
            told = {  # None: a default
                name: value for name, value in told.items() if value is not None and name in known and name not in APART
            }
            assert {name: known[name] for name in told} == told, one.name
            compared += len(told)
    assert compared


def test_a_shorter_thesis_keeps_the_proportions_of_its_solvers():
    whole, half = (data_cleaning.rates(data_cleaning.Config(setting="thesis", shorter=k)) for k in (1, 2))
    assert {name: rates.updates for name, rates in half.items()} == {n: (rates.updates or 0) // 2 for n, rates in whole.items()}
    for wrong in ({"shorter": 0, "setting": "thesis"}, {"shorter": 2}, {"shorter": 2, "setting": "meha", "steps": 10}):
        with pytest.raises(SystemExit, match=f"--shorter: got {wrong['shorter']}, expected 1, or"):
            data_cleaning.main(data_cleaning.Config(**wrong))


def test_a_renamed_option_is_noticed(capsys):
    with pytest.raises(SystemExit):
        parse("experiments.rates --no-such-option 3")
    assert "no-such-option" in capsys.readouterr().err
    with pytest.raises(ModuleNotFoundError, match="no_such_module"):
        parse("experiments.no_such_module")


# ---- making them again ------------------------------------------------------------------------------------------------


def runs(out, name):
    return (out / name / "runs").read_text().split()


def test_finished_ones_are_skipped_and_a_failure_stops_nothing(fakes, tmp_path, capsys):
    out = tmp_path / "out"
    table = [figure("bad", "fake_on --fail"), figure("good", "fake_new --text 'two words'"), figure("tables", "", drawn=False)]
    with pytest.raises(SystemExit) as ended:
        reproduce(table, Config(out=out, jobs=1))
    error = capsys.readouterr().err
    assert ended.value.code == 1
    assert "1 of 2 failed" in error
    assert "bad: exit code 1" in error
    assert "--fail: as it was asked for" in error
    assert runs(out, "good") == ["new"]
    times = list(csv.DictReader((out / "times.csv").read_text().splitlines()))
    assert {row["name"]: row["finished"] for row in times} == {"bad": "False", "good": "True"}
    assert times[1]["command"] == "fake_new --text 'two words'"
    assert unresolved((out / "index.html").read_text(), out) == []

    with pytest.raises(SystemExit):
        reproduce(table, Config(out=out, jobs=1))
    assert runs(out, "good") == ["new"]
    assert runs(out, "bad") == ["new", "resumed"]

    reproduce(table, Config(out=out, only=("good",)))  # nothing of it fails
    with pytest.raises(SystemExit, match="--only: got worst, expected some of bad good tables"):
        reproduce(table, Config(out=out, only=("worst",)))
    with pytest.raises(SystemExit, match="--only: got tables, which run with --reported only"):
        reproduce(table, Config(out=out, only=("tables",)))


def test_results_of_something_else_are_left_alone(fakes, tmp_path, capsys):
    out = tmp_path
    reproduce([figure("mine", "fake_new")], Config(out=out))
    (out / "yours").mkdir()
    (out / "yours" / "precious").write_text("kept")
    with (out / "busy.log").open("a") as log:  # as a command does that has outlived the program that started it
        fcntl.flock(log, fcntl.LOCK_EX)
        table = [figure("mine", "fake_new --text other"), figure("yours", "fake_new"), figure("busy", "fake_new")]
        with pytest.raises(SystemExit):
            reproduce(table, Config(out=out))
    error = capsys.readouterr().err
    assert "3 of 3 failed" in error
    assert f"mine: {out / 'mine'} holds something else: delete it, or give another --out" in error
    assert "busy: " in error
    assert "still runs" in error
    assert runs(out, "mine") == ["new"]
    assert (out / "yours" / "precious").exists()


def test_ctrl_c_is_passed_on_and_the_next_call_goes_on(fakes, tmp_path):
    table = [figure("on", "fake_on"), figure("again", "fake_new")]
    rows = [tuple(one) for one in table]
    program = (
        "from pathlib import Path; from experiments.catalogue import Figure\n"
        "from experiments.reproduce import Config, listen, reproduce\n"
        f"listen(); reproduce([Figure(*row) for row in {rows}], Config(out=Path({str(tmp_path)!r}), jobs=2))"
    )
    slow = os.environ | {"FAKE_SECONDS": "60"}
    process = subprocess.Popen([sys.executable, "-c", program], stderr=subprocess.PIPE, text=True, env=slow)
    until = time.monotonic() + 120
    while not all((tmp_path / name / "runs").exists() for name in ("on", "again")):
        assert time.monotonic() < until
        assert process.poll() is None
        time.sleep(0.1)
    time.sleep(0.3)  # until they sleep
    process.send_signal(signal.SIGINT)
    error = process.communicate(timeout=60)[1]
    assert process.returncode == 130, error
    assert "goes on from here" in error
    assert runs(tmp_path, "on") == ["new", "interrupted"]
    assert runs(tmp_path, "again") == ["new", "interrupted"]
    before = json.loads((tmp_path / "on.json").read_text())
    assert before["finished"] is False

    reproduce(table, Config(out=tmp_path))
    assert runs(tmp_path, "on") == ["new", "interrupted", "resumed"]
    assert runs(tmp_path, "again") == ["new"]  # from the beginning
    assert json.loads((tmp_path / "on.json").read_text())["seconds"] >= before["seconds"] > 0


# ---- the page ---------------------------------------------------------------------------------------------------------


def test_the_committed_page_is_that_of_the_table():
    text = gallery.reported()
    assert (GALLERY / "index.html").read_text() == text, "run python -m experiments.gallery, and commit the page"
    found = Links(text)
    for one in FIGURES:
        assert (one.name in found.ids) == one.drawn
        if one.drawn:
            assert f"python -m {one.command} --out results/{one.name}" in found.text
            assert f"python -m {one.laptop} --out results/{one.name}" in found.text
            assert one.shows in found.text
    assert unresolved(text, GALLERY) == []
    assert not [word for word in (str(ROOT), "/tmp", "/home", "/work") if word in text]


def test_settings_come_from_the_run_or_else_from_the_command(tmp_path):
    command = "experiments.hyperparameter_selection --dataset ijcnn1 --solvers soba saba --seeds 10"
    told = dict(settings(command, tmp_path))
    assert (told["dataset"], told["solvers"], told["seeds"], told["steps"]) == ("ijcnn1", "soba, saba", "10", "default")
    assert not {"out", "resume", "overwrite"} & set(told)
    session = {"versions": {"jax": "0.10.2"}}
    known = {"settings": {"seeds": 3, "rates": {"soba": {"step": 0.5, "steps": None}}, "out": "/x"}, "sessions": [session]}
    (tmp_path / "draw_1").mkdir()
    (tmp_path / "draw_1" / "config.json").write_text(json.dumps(known))
    assert settings(command, tmp_path) == [("seeds", "3"), ("rates", "soba: step: 0.5"), ("versions", "jax 0.10.2")]


def test_a_page_is_escaped_and_says_what_is_missing(fakes, tmp_path):
    one = figure("odd", "fake_new --text '<b>'")
    text = page([Shown(one, one.laptop, None, tmp_path)], "a < b")
    assert "<b>" not in text
    found = Links(text)
    assert "<odd> & co" in found.text
    assert "python -m fake_new --text '<b>' --out results/odd" in found.text
    assert "On a laptop, about 2 seconds of processor time (this picture)" in found.text
    assert "Not drawn yet." in found.text
    assert "https://arxiv.org/abs/2201.13409" in found.links
    missing = page([Shown(one, one.laptop, "odd.png", tmp_path)], "")
    assert unresolved(missing, tmp_path) == ["odd.png", "odd.png"]


def test_the_page_of_a_reproduction(fakes, tmp_path):
    reproduce([figure("done", "fake_new")], Config(out=tmp_path))
    Work("half", "fake_on", tmp_path).note(seconds=1.0, finished=False)
    table = [figure("done", "fake_new"), figure("half", "fake_on"), figure("never", "fake_new")]
    found = Links(reproduced(tmp_path, table))
    assert found.ids == ["done", "half"]
    assert "from the run" in found.text
    assert "/nowhere" not in found.text
    with pytest.raises(SystemExit, match=r"--figures: got .*, expected a folder"):
        gallery.main(gallery.Config(figures=tmp_path / "none"))
    gallery.main(gallery.Config(figures=tmp_path))
    assert (tmp_path / "index.html").exists()
