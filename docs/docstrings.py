"""An extension of griffe: docstrings, which are written to be read in a terminal, as Markdown for the site.

A name in single backticks becomes a link, a paragraph that begins with "Cost:" or "Reference:" a bold beginning, joint rows of
arguments ("rate, terms: ...") one row each, and the comments beside the fields of a tuple its table of attributes.
"""

import re
from collections.abc import Callable
from typing import Any

from griffe import AliasResolutionError, Class, Docstring, Extension, Module, NameResolutionError, Object

CODE = re.compile(r"(``.+?``|`[^`]+`)", re.DOTALL)
EMPHASIS = re.compile(r"(?<![\w)\\])\*\w[^*]*?\w\*(?!\w)")
JOINT = re.compile(r"^ {4}([a-z]\w*(?:, [a-z]\w*)+): (.*(?:\n {5,}.*)*)", re.MULTILINE)
HEAD = re.compile(r"^([A-Z]\w+(?:, [A-Z]\w+)*): (?=\S)", re.MULTILINE)


class HouseStyle(Extension):
    """Rewrites every docstring of a package once it has been loaded."""

    def on_package(self, *, pkg: Module, **kwargs: Any) -> None:
        """Comments first, since they become docstrings, too."""
        del kwargs
        _walk(pkg, _comments)
        _walk(pkg, _markdown)


def _walk(here: Object, do: Callable[[Object], None]) -> None:
    do(here)
    for member in here.members.values():
        if not member.is_alias:
            _walk(member, do)  # type: ignore[arg-type]


def _comments(here: Object) -> None:
    """What stands beside or above an attribute: its docstring if it is that of a module, else a row of the class."""
    rows = []
    for name, member in here.members.items():
        if member.is_alias or not member.is_attribute or name.startswith("_"):
            continue
        text = _comment(member)  # type: ignore[arg-type]
        if isinstance(here, Class) and not member.has_docstring:
            rows.append(f"    {name}: {text or _number(member)}")
        elif text and not member.has_docstring:
            member.docstring = Docstring(text, parent=member)  # type: ignore[arg-type]
    if rows and here.docstring:
        here.docstring.value += "\n\nAttributes:\n" + "\n".join(rows)


def _number(member: Any) -> str:
    """The number of a member of an enumeration."""
    return f"``{member.value}``" if str(member.value).isdigit() else ""


def _comment(attribute: Object) -> str:
    lines = attribute.lines_collection[attribute.filepath]  # type: ignore[index]
    at = (attribute.lineno or 1) - 1
    above = []
    while at > len(above) and (found := re.match(r"\s*#: ?(.*)", lines[at - 1 - len(above)])):
        above.insert(0, found[1])
    beside = re.search(r"  # (.*)$", lines[at])
    return " ".join(above) or (beside[1] if beside else "")


def _markdown(here: Object) -> None:
    if here.docstring is None:
        return
    parts: list[tuple[bool, list[str]]] = []  # runs of lines; whether they are code
    code = None  # indentation of what announced code
    for line in here.docstring.value.splitlines():
        depth = len(line) - len(line.lstrip())
        if code is not None and line.strip() and depth <= code:
            code = None
        inside = code is not None
        if not inside and (line == "Example:" or line.endswith("::")):
            code, line = depth, "Examples:" if line == "Example:" else line[:-1]
        if not parts or parts[-1][0] != inside:
            parts.append((inside, []))
        parts[-1][1].append(line)
    here.docstring.value = "\n".join("\n".join(lines) if code else _prose("\n".join(lines), here) for code, lines in parts)


def _prose(text: str, here: Object) -> str:
    text = JOINT.sub(lambda row: "\n".join(f"    {name}: {row[2]}" for name in row[1].split(", ")), HEAD.sub(r"**\1**: ", text))
    return "".join(_link(part, here) if n % 2 else _stars(part) for n, part in enumerate(CODE.split(text)))


def _stars(text: str) -> str:
    """z* is no beginning of italics."""
    parts, at = [], 0
    for found in EMPHASIS.finditer(text):
        parts += [re.sub(r"(?<=[\w)])\*(?!\*)", r"\\*", text[at : found.start()]), found[0]]
        at = found.end()
    return "".join(parts) + re.sub(r"(?<=[\w)])\*(?!\*)", r"\\*", text[at:])


def _link(code: str, here: Object) -> str:
    """A name of this package in single backticks, as a link where the reference has it."""
    name = code.strip("`")
    if code.startswith("``") or not re.fullmatch(r"[A-Za-z_][\w.]*", name):
        return code
    try:
        path = name if name.startswith("bilevel_jax.") else here.resolve(name)
    except (NameResolutionError, AliasResolutionError):
        return code
    if not path.startswith("bilevel_jax.") or "(" in path:
        return code
    return f'<autoref identifier="{path}" optional><code>{name}</code></autoref>'
