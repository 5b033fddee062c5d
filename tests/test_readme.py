"""The README says what the code does: its tables are made from it, its links lead somewhere."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
from typer.testing import CliRunner

from experiments.readme import PAGES, STUB, main, with_tables
from fedlora.cli import cli
from strategies.named import stub
from strategies.registry import deviations, markdown_table

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def test_pages_say_what_the_registry_and_the_results_say() -> None:
    for page, names in PAGES.items():
        text = (ROOT / page).read_text()
        assert with_tables(text, names) == text, "regenerate it: python -m experiments.readme"
    assert STUB.read_text() == stub(), "regenerate it: python -m experiments.readme"


def test_a_table_that_drifted_is_rewritten_and_nothing_else(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "docs", tmp_path / "docs")
    (tmp_path / "README.md").write_text(
        README.replace("| `flora` | FLoRA | yes |", "| `flora` | FLoRA | no |")
    )
    assert (tmp_path / "README.md").read_text() != README
    main(tmp_path)
    assert (tmp_path / "README.md").read_text() == README
    assert (tmp_path / "strategies" / "__init__.pyi").read_text() == STUB.read_text()


def test_a_page_without_its_marks_is_refused() -> None:
    with pytest.raises(SystemExit, match="strategies"):
        with_tables("no marks", PAGES["README.md"])


def test_the_command_shows_the_same_facts_as_the_table() -> None:
    shown = CliRunner().invoke(cli, ["strategies"]).stdout
    for line in markdown_table().splitlines()[2:]:
        name, _, exact, kind, mixed, moves, up, down, _ = (
            cell.strip(" `") for cell in line.strip("|").split("|")
        )
        (row,) = [row for row in shown.splitlines() if row.split()[:1] == [name]]
        assert row.split()[1:5] == [exact, kind, mixed, moves]
        assert up in row
        assert down in row


def test_what_differs_from_the_papers_is_shown_and_documented() -> None:
    shown = CliRunner().invoke(cli, ["strategies"]).stdout.splitlines()
    assert {"fedrot", "hetlora", "fed-sb", "fedsa", "fedsvd", "florist", "fedmomentum"} <= set(deviations())
    for name, text in deviations().items():
        assert f"{name}: {text}" in shown


def test_every_link_leads_to_a_file() -> None:
    for target in re.findall(r"\]\(([^)]+)\)", README):
        file, _, anchor = target.partition("#")
        if not target.startswith("http"):
            assert (ROOT / file).exists(), target
            titles = re.findall(r"(?m)^#+ (.+)$", (ROOT / file).read_text()) if anchor else []
            assert not anchor or anchor in [title.lower().replace(" ", "-") for title in titles], target


def test_the_two_commands_are_targets_of_the_makefile() -> None:
    for target in ("demo", "test"):
        subprocess.run(["make", "--dry-run", target], cwd=ROOT, check=True, capture_output=True)


def test_every_file_named_in_a_command_exists() -> None:
    for path in re.findall(r"experiments/[\w.-]+\.toml", README):
        assert (ROOT / path).exists(), path
