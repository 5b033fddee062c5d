"""Hooks of the documentation site (``mkdocs.yml``): pages from outside of ``docs``, and from the code.

The README is the first page; texts of studies, notebooks and CONTRIBUTING are pages; commands and Python are
made from the program. A link to a file that is no page becomes its path, as there is no public address yet.
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files, InclusionLevel
from mkdocs.structure.pages import Page
from typer.cli import get_docs_for_click
from typer.main import get_command
from typer.models import Context

import fedlora
from experiments.marked import markdown
from fedlora.cli import cli

ROOT = Path(__file__).parents[1]
OUTSIDE = {
    "index.md": "README.md",
    "CONTRIBUTING.md": "CONTRIBUTING.md",
    "CHANGELOG.md": "CHANGELOG.md",
    "experiments/README.md": "experiments/README.md",
} | {f"experiments/published/{p.parent.name}/README.md": str(p.relative_to(ROOT))
     for p in (ROOT / "experiments" / "published").glob("*/README.md")}  # fmt: skip
"""Page of the site -> its file in the repository."""
IN_MEMORY = ("data.from_dataframe", "data.from_datasets")
LINK = re.compile(r"^```.*?^```|`[^`\n]+`|\[((?:`[^`]*`|[^\]`])+)\]\(([^)\s]+)\)", re.S | re.M)
MERMAID = re.compile(r"^```mermaid\n(.*?)^```", re.S | re.M)


def on_files(files: Files, config: Any) -> Files:
    """The pages of ``docs``, and those that are made here."""
    made = {page: (ROOT / source).read_text() for page, source in OUTSIDE.items()}
    made |= {f"notebooks/{n.stem}.md": notebook(n) for n in sorted((ROOT / "docs/notebooks").glob("*.ipynb"))}
    for page, text in {**made, "cli.md": commands(), "api.md": library()}.items():
        of_a_study = page.startswith("experiments/published")  # its list is the page above it
        level = InclusionLevel.NOT_IN_NAV if of_a_study else InclusionLevel.UNDEFINED
        files.append(File.generated(config, page, content=text, inclusion=level))
    return files


def on_page_markdown(text: str, page: Page, config: Any, files: Files) -> str:
    """A page whose links lead to pages of the site, or say which file they mean."""
    here = page.file.src_uri
    source = ROOT / OUTSIDE.get(here, f"docs/{here}")
    uris = {ROOT / "docs" / uri: uri for uri in files.src_uris} | {ROOT / s: p for p, s in OUTSIDE.items()}

    def changed(found: re.Match[str]) -> str:
        shown, link = found[1], found[2]
        if link is None or link.startswith(("http", "#")):
            return found[0]
        file, _, anchor = link.partition("#")
        target = Path(os.path.normpath(source.parent / file))
        if target in uris:
            path = os.path.relpath(uris[target], Path(here).parent)
            return f"[{shown}]({path}{'#' * bool(anchor)}{anchor})"
        if not target.exists():
            raise PluginError(f"{source.relative_to(ROOT)}: {link}: no such file")
        path = f"`{target.relative_to(ROOT)}`"
        return shown if shown.strip("`") in path else f"{shown} ({path})"

    return MERMAID.sub(lambda found: floors(found[1]), LINK.sub(changed, text) if "](" in text else text)


def commands() -> str:
    """All commands with their arguments and options, as their help says them."""
    command = get_command(cli)
    shown = get_docs_for_click(obj=command, ctx=Context(command, info_name="fedlora"), name="fedlora")
    return shown.replace("# `fedlora`", "# Commands\n\nAs `fedlora COMMAND --help` says them.", 1)


def library() -> str:
    """The public API, name by name."""
    parts = [f"::: fedlora.{name}" for name in [*sorted(fedlora._HOMES), *IN_MEMORY]]
    return "\n\n".join(["# Python", "What `import fedlora` offers; [how it is used](library.md).", *parts])


def notebook(path: Path) -> str:
    """A notebook as a page: its texts, and its cells of code."""
    cells = json.loads(path.read_text())["cells"]
    texts = [("".join(cell["source"]), cell["cell_type"]) for cell in cells]
    return "\n\n".join(text if kind == "markdown" else f"```python\n{text}\n```" for text, kind in texts)


def floors(picture: str) -> str:
    """The picture of the rooms as a table from the top floor down, which needs no program to draw it."""
    arrows = re.findall(r"^ +(\w+) --> (\w+)$", picture, re.M)
    rooms = re.findall(r"^ {4}(?!direction)(\w+)$", picture, re.M)
    return markdown(
        ["room", "imports"],
        ([f"`{room}`", ", ".join(f"`{b}`" for a, b in arrows if a == room)] for room in rooms),
    )
