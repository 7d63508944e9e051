"""The page: every figure with its commands and settings.  Plain HTML, links relative to its folder."""

import dataclasses
import json
import re
from collections.abc import Iterable
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

from experiments.catalogue import Figure, parse

#: Options that say where a run is written and how it is taken up, not what it is.
APART = ("out", "resume", "overwrite")

STYLE = """
body { max-width: 60rem; margin: 2rem auto; padding: 0 1rem; font: 1rem/1.5 system-ui, sans-serif; color: #222; }
nav ul { columns: 2; padding-left: 1.2rem; }
section { margin-top: 3rem; border-top: 1px solid #ccc; }
img { max-width: 100%; height: auto; }
pre { margin: 0; padding: .6rem .8rem; background: #f4f4f4; white-space: pre-wrap; overflow-wrap: anywhere; }
dt { margin-top: .8rem; } dd { margin: 0; }
table { border-collapse: collapse; font-size: .9rem; }
th, td { padding: .15rem .8rem .15rem 0; text-align: left; vertical-align: top; overflow-wrap: anywhere; }
th { font-weight: normal; white-space: nowrap; }
@media (max-width: 40rem) { nav ul { columns: 1; } }
""".strip()


class Shown(NamedTuple):
    """A figure on the page."""

    figure: Figure
    command: str  # that made the picture
    picture: str | None  # its address, relative to the page; None where there is none yet
    results: Path  # folder of its results, of which config.json has the settings; it need not exist


def page(shown: Iterable[Shown], introduction: str) -> str:
    """The page as text, the same for the same arguments and results."""
    entries = list(shown)
    links = "\n".join(f'<li><a href="#{entry.figure.name}">{escape(entry.figure.title)}</a></li>' for entry in entries)
    sections = "\n".join(map(section, entries))
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>bilevel_jax: figures</title>
<style>
{STYLE}
</style>
</head>
<body>
<h1>Figures of bilevel_jax</h1>
<p>{escape(introduction)}</p>
<nav><ul>
{links}
</ul></nav>
{sections}
</body>
</html>
"""


def section(entry: Shown) -> str:
    """One figure."""
    figure, command, address, results = entry
    if address is None:
        picture = "<p>Not drawn yet.</p>"
    else:
        picture = f'<a href="{escape(address)}"><img src="{escape(address)}" alt="{escape(figure.title)}" loading="lazy"></a>'
    paper = f"<p>Paper: {linked(escape(figure.paper))}</p>\n" if figure.paper else ""
    short = f"about {figure.seconds:g} seconds of processor time"
    kinds = {f"As reported, about {figure.minutes:g} minutes": figure.command, f"On a laptop, {short}": figure.laptop}
    if figure.command == figure.laptop:
        kinds = {f"As reported, and on a laptop, {short}": figure.command}
    if command not in kinds.values():  # the catalogue has changed since
        kinds["By then"] = command
    commands = "\n".join(
        f"<dt>{kind}{' (this picture)' if line == command else ''}</dt>"
        f"<dd><pre><code>python -m {escape(line)} --out results/{figure.name}</code></pre></dd>"
        for kind, line in kinds.items()
        if line
    )
    saved = any(results.rglob("config.json"))
    whose = "Settings, as the run has recorded them" if saved else "Settings, as the command has them"
    lines = "\n".join(f"<tr><th>{escape(name)}</th><td>{escape(value)}</td></tr>" for name, value in settings(command, results))
    return f"""<section id="{figure.name}">
<h2>{escape(figure.title)}</h2>
<p>{escape(figure.shows)}</p>
{paper}{picture}
<dl>
{commands}
</dl>
<details><summary>{whose}</summary>
<table>
{lines}
</table>
</details>
</section>"""


def linked(text: str) -> str:
    """Numbers of arXiv as links."""
    return re.sub(r"arXiv (\d{4}\.\d{4,5})", r'<a href="https://arxiv.org/abs/\1">arXiv \1</a>', text)


def settings(command: str, results: Path) -> list[tuple[str, str]]:
    """What a run was made with: of the first config.json in its results; without any, what its command says."""
    found = sorted(results.rglob("config.json"), key=lambda path: (len(path.parts), path))
    known: Any = json.loads(found[0].read_text()) if found else {"settings": dataclasses.asdict(parse(command))}
    versions = known.get("versions") or known.get("sessions", [{}])[-1].get("versions", {})
    rows = [(name, said(value)) for name, value in known["settings"].items() if name not in APART]
    return rows + [("versions", ", ".join(f"{name} {number}" for name, number in versions.items()))] * bool(versions)


def said(value: Any) -> str:
    """A setting in words."""
    if value is None:
        return "default"
    if isinstance(value, list | tuple):
        return ", ".join(map(said, value))
    if isinstance(value, dict):
        return "; ".join(f"{name}: {said(part)}" for name, part in value.items() if part is not None)
    return str(value)
