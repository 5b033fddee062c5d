"""The site builds without a warning, has all pages, commands and names, and fetches nothing."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from html import unescape
from pathlib import Path

import click
import pytest
from typer.main import get_command

import fedlora
from fedlora.cli import cli

pytest.importorskip("material", reason="needs pip install '.[docs]'")
pytest.importorskip("mkdocstrings", reason="needs pip install '.[docs]'")
ROOT = Path(__file__).parent.parent
FETCHED = re.compile(r"<(?:script|img|iframe|link)\b[^>]*?\b(?:src|href)=[\"']?((?:https?:)?//[^\"' >]+)")


def build(out: Path, root: Path = ROOT) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(out)]
    return subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=300, check=False)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("site")
    done = build(out)
    assert done.returncode == 0, done.stdout + done.stderr
    return out


def leaves(command: click.Command, name: str) -> Iterator[str]:
    inner = getattr(command, "commands", {})
    if not inner:
        yield name
    for below, one in inner.items():
        yield from leaves(one, f"{name} {below}")


def test_every_page_of_docs_is_there(site: Path) -> None:
    for page in (ROOT / "docs").rglob("*.md"):
        assert (site / page.relative_to(ROOT / "docs").with_suffix(".html")).is_file(), page.name


def test_nothing_is_fetched_from_elsewhere(site: Path) -> None:
    for page in site.rglob("*.html"):
        assert [url for url in FETCHED.findall(page.read_text()) if "canonical" not in url] == [], page
    assert "fonts.googleapis" not in "".join(p.read_text() for p in site.rglob("*.css"))


def test_all_commands_and_public_names_are_there(site: Path) -> None:
    shown = unescape(re.sub("<[^>]+>", "", (site / "cli.html").read_text()))
    for command in leaves(get_command(cli), "fedlora"):
        assert command in shown, command
    page = (site / "api.html").read_text()
    for name in fedlora._HOMES:
        assert f'id="fedlora.{name}"' in page, name


@pytest.mark.slow
@pytest.mark.parametrize(
    ("wrong", "told"),
    [("[a](gone.md)", "gone.md"), ("[a](keys.md#gone)", "keys.md#gone"), ("[a](../gone.py)", "gone.py")],
)
def test_a_link_that_leads_nowhere_stops_the_build(wrong: str, told: str, tmp_path: Path) -> None:
    for name in ("docs", "experiments", "fedlora", "strategies", "clients"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("mkdocs.yml", "README.md", "CONTRIBUTING.md", "CHANGELOG.md", "CITATION.cff"):
        shutil.copyfile(ROOT / name, tmp_path / name)
    with (tmp_path / "docs" / "time.md").open("a") as page:
        page.write(f"\n{wrong}\n")
    done = build(tmp_path / "out", tmp_path)
    assert done.returncode != 0
    assert told in done.stdout + done.stderr
