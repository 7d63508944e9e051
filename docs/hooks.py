"""Hooks of mkdocs: the results of `experiments/` are pages of the site, and links work in a checkout and on the site alike.

Pages link by paths that work in a checkout.  Here those that lead out of `docs/` are made to lead to the page or file of the
site, or are written out as a path of the repository where the site does not have it.
"""

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, InclusionLevel

ROOT = Path(__file__).parent.parent
LINK = re.compile(r"(?P<text>!?\[[^\]]*\])\((?P<path>[^)#:\s]+)(?P<anchor>#[^)\s]*)?\)")


def on_files(files: Any, config: Any) -> Any:
    """What lies in the folder of experiments beside its programs."""
    paths = [*ROOT.glob("experiments/*.md"), *ROOT.glob("experiments/*/*.md"), *ROOT.glob("experiments/gallery/*.*")]
    for path in sorted(paths):
        if path.suffix in (".md", ".png", ".html"):
            name = path.relative_to(ROOT).as_posix()
            files.append(File.generated(config, name, abs_src_path=str(path), inclusion=InclusionLevel.NOT_IN_NAV))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Links of a checkout, as links of the site."""
    here = page.file.src_uri
    outside = here.startswith("experiments/")

    def link(found: re.Match) -> str:
        text, path, anchor = found["text"], found["path"], found["anchor"] or ""
        place = posixpath.normpath(posixpath.join("" if outside else "docs", posixpath.dirname(here), path))
        name = place.removeprefix("docs/")
        if files.get_file_from_path(name) is not None:
            return f"{text}({posixpath.relpath(name, posixpath.dirname(here) or '.')}{anchor})"
        if (ROOT / place).exists() and not place.startswith("docs/"):
            words = text.lstrip("!")[1:-1]
            return words if words.strip("`") == place else f"{words} (`{place}`)"
        return found[0]  # mkdocs says what is wrong with it

    parts = re.split(r"(^```.*?^```)", markdown, flags=re.DOTALL | re.MULTILINE)
    return "".join(part if part.startswith("```") else LINK.sub(link, part) for part in parts)
