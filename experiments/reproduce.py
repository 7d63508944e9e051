"""Make the figures again: run the laptop command of each (or the one reported), and write a page over them.

``python -m experiments.reproduce --out results/figures``
``python -m experiments.reproduce --only ijcnn1 rates --reported``

Into ``--out``, for a figure NAME: its folder of results, *NAME.log* (what its command printed) and *NAME.json* (its command,
its seconds, and whether it is finished); *times.csv*; *index.html*, the page.

The same call again does what is missing.  A command that was interrupted goes on where it was saved if it has ``--resume``, and
starts again otherwise, as does one that has outlived a killed call of this program.  One that fails does not stop the others:
the names are printed at the end, and the exit code is 1.
"""

import contextlib
import dataclasses
import fcntl
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
import tyro
from tqdm import tqdm

from experiments.catalogue import FIGURES, Figure, parse
from experiments.gallery.page import Shown, page

#: Seconds between two looks at what is running, and those that an interrupted command has to save its state.
LOOK, PATIENCE = 0.2, 60.0


@dataclasses.dataclass(frozen=True)
class Config:
    """Make the figures again."""

    only: tuple[str, ...] = ()
    """names of figures (default: all): those of the pictures in experiments/gallery"""
    reported: bool = False
    """run the commands as they were reported, which takes hours, instead of those for a laptop"""
    jobs: int = 2
    """commands that run at a time; most keep one core busy"""
    out: Path | None = None
    """folder to write to, and to go on in (default: results/figures; with --reported results/reported)"""

    def __post_init__(self) -> None:
        if self.jobs < 1:
            raise SystemExit(f"--jobs: got {self.jobs}, expected at least 1")


class Work(NamedTuple):
    """A command to run, and what it leaves in ``out``."""

    name: str
    command: str
    out: Path

    @property
    def folder(self) -> Path:
        """Of its results."""
        return self.out / self.name

    @property
    def log(self) -> Path:
        """What it prints."""
        return self.out / f"{self.name}.log"

    @property
    def record(self) -> Path:
        """Its command, and how long it took."""
        return self.out / f"{self.name}.json"

    def known(self) -> dict[str, Any]:
        """The record; empty before the first run."""
        return json.loads(self.record.read_text()) if self.record.exists() else {}

    def note(self, *, seconds: float, finished: bool) -> None:
        """Write the record, whole or not at all."""
        part = self.record.with_suffix(".part")
        part.write_text(json.dumps({"command": self.command, "seconds": round(seconds, 1), "finished": finished}) + "\n")
        part.replace(self.record)

    def finished(self) -> bool:
        """Whether this command is done, and its results are there."""
        known = self.known()
        return self.folder.exists() and known.get("command") == self.command and known.get("finished") is True


class RefusedError(Exception):
    """What lies in the folder must not be touched."""


class Running(NamedTuple):
    """A command at work."""

    work: Work
    process: subprocess.Popen[bytes]
    since: float  # on the clock of `time.monotonic`: its start, earlier sessions included

    @property
    def seconds(self) -> float:
        """So far."""
        return time.monotonic() - self.since


def start(work: Work) -> Running:
    """Start a command, or take up what is left of it.

    The log is locked, and the command holds the lock for as long as it lives, also if this program is killed: two never write
    into one folder.  It runs in a session of its own, so that an interruption reaches it once, from here.
    """
    known = work.known()
    if work.folder.exists() and known.get("command") != work.command:
        raise RefusedError(f"{work.folder} holds something else: delete it, or give another --out")
    with work.log.open("ab") as log:
        try:
            fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RefusedError(f"{work.folder} is being written to by a command that still runs") from None
        if work.finished():
            raise RefusedError(f"{work.folder} has been finished by another call in the meantime")
        line, before = [*shlex.split(work.command), "--out", str(work.folder)], 0.0
        if work.folder.exists() and any(work.folder.rglob("config.json")) and hasattr(parse(work.command), "resume"):
            line, before = [*line, "--resume"], known["seconds"]
        else:
            shutil.rmtree(work.folder, ignore_errors=True)
            log.truncate(0)
        work.note(seconds=before, finished=False)
        process = subprocess.Popen(
            [sys.executable, "-m", *line],
            stdout=log,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )
    return Running(work, process, time.monotonic() - before)


def stop(running: Sequence[Running]) -> None:
    """Interrupt commands, and wait until they have saved what they have."""
    for one in running:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(one.process.pid, signal.SIGINT)
    deadline = time.monotonic() + PATIENCE
    for one in running:
        try:
            one.process.wait(max(0.0, deadline - time.monotonic()))
        except (subprocess.TimeoutExpired, KeyboardInterrupt):  # a second Ctrl-C: now
            deadline = 0.0
            with contextlib.suppress(ProcessLookupError):
                os.killpg(one.process.pid, signal.SIGKILL)
            one.process.wait()
        one.work.note(seconds=one.seconds, finished=one.process.returncode == 0)


def run(works: Sequence[Work], jobs: int) -> dict[str, str]:
    """Run what is not finished, so many at a time, in this order; why, of those that failed.

    Raises:
        KeyboardInterrupt: after the commands that were running have been stopped.
    """
    waiting, running, failed = [work for work in works if not work.finished()], [], {}
    every = 1.0 if sys.stderr.isatty() else 30.0  # seconds between two lines of progress
    with tqdm(
        total=len(works), initial=len(works) - len(waiting), unit="figure", file=sys.stderr, mininterval=every, miniters=0
    ) as bar:
        try:
            while waiting or running:
                while waiting and len(running) < jobs:
                    work = waiting.pop(0)
                    try:
                        running.append(start(work))
                    except RefusedError as error:
                        failed[work.name] = str(error)
                        bar.write(f"{work.name}: refused", file=sys.stderr)
                        bar.update()
                time.sleep(LOOK)
                for one in [one for one in running if one.process.poll() is not None]:
                    running.remove(one)
                    code, name = one.process.returncode, one.work.name
                    one.work.note(seconds=one.seconds, finished=code == 0)
                    if code:
                        failed[name] = f"exit code {code}; {one.work.log} ends with\n{tail(one.work.log)}"
                    bar.write(f"{name}: {'failed after' if code else 'done in'} {one.seconds:.0f} s", file=sys.stderr)
                    bar.update()
                bar.set_postfix_str(", ".join(f"{one.work.name} {one.seconds:.0f} s" for one in running), refresh=False)
                bar.update(0)
        except BaseException:  # an interruption, a full disk: nothing goes on unseen
            stop(running)
            raise
    return failed


def tail(log: Path, lines: int = 5) -> str:
    """The last lines of a log, indented; of a progress bar, which overwrites itself, the last state."""
    text = [line.rstrip().rpartition("\r")[2] for line in log.read_text(errors="replace").split("\n") if line.strip()]
    return "\n".join(f"  {line}" for line in text[-lines:])


def reproduced(out: Path, figures: Sequence[Figure] = FIGURES) -> str:
    """The page over what a folder holds of the figures."""
    shown = []
    for figure in figures:
        known = Work(figure.name, "", out).known()
        if known and figure.drawn:
            picture = f"{figure.name}/figure.png"
            address = picture if known["finished"] and (out / picture).exists() else None
            shown.append(Shown(figure, known["command"], address, out / figure.name))
    return page(shown, "Each picture was made by the command named beside it, on this machine.")


def reproduce(figures: Sequence[Figure], config: Config) -> None:
    """Run the commands of the figures, and write the times and the page."""
    names = [figure.name for figure in figures]
    if unknown := [name for name in config.only if name not in names]:
        raise SystemExit(f"--only: got {' '.join(unknown)}, expected some of {' '.join(names)}")
    chosen = [figure for figure in figures if figure.name in config.only or not config.only]
    if config.only and not config.reported and (none := [figure.name for figure in chosen if not figure.laptop]):
        raise SystemExit(f"--only: got {' '.join(none)}, which run with --reported only")
    out = config.out or Path("results") / ("reported" if config.reported else "figures")
    out.mkdir(parents=True, exist_ok=True)
    longest = sorted(chosen, key=lambda figure: figure.minutes if config.reported else figure.seconds, reverse=True)
    works = [Work(figure.name, figure.command if config.reported else figure.laptop, out) for figure in longest]
    works = [work for work in works if work.command]
    try:
        failed = run(works, config.jobs)
    except KeyboardInterrupt:
        print("\ninterrupted: the same command goes on from here", file=sys.stderr)
        raise SystemExit(130) from None
    records = {name: known for name in names if (known := Work(name, "", out).known())}
    pd.DataFrame.from_dict(records, orient="index").rename_axis("name").to_csv(out / "times.csv")
    (out / "index.html").write_text(reproduced(out, figures))
    print(f"times: {out / 'times.csv'}\npage: {out / 'index.html'}")
    if failed:
        print(f"\n{len(failed)} of {len(works)} failed:", file=sys.stderr)
        for name, why in failed.items():
            print(f"{name}: {why}", file=sys.stderr)
        raise SystemExit(1)


def main(config: Config) -> None:
    """Make the figures of the catalogue."""
    reproduce(FIGURES, config)


def listen() -> None:
    """Take SIGTERM and SIGHUP like Ctrl-C, and Ctrl-C also where it is ignored, as behind an "&" of a script."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:  # which nohup asks for
            signal.signal(number, signal.default_int_handler)


if __name__ == "__main__":
    listen()
    main(tyro.cli(Config))
