"""The README is short; the pages say what the code does: tables are made from it, links lead somewhere."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path
from typing import get_args, get_type_hints

import pytest
from typer.testing import CliRunner

from clients.privacy import MECHANISMS
from experiments.readme import PAGES, STUB, main, with_tables
from fedlora.cli import cli
from fedlora.config import PrivacyConfig
from strategies.named import stub
from strategies.registry import deviations, markdown_table
from tests.docs_commands import PAGES as PAGES_SHOWN

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
MOST_WORDS = 900
PICTURE_BYTES = 80_000


def test_pages_say_what_the_registry_and_the_results_say() -> None:
    for page, names in PAGES.items():
        text = (ROOT / page).read_text()
        assert with_tables(text, names) == text, "regenerate it: python -m experiments.readme"
    assert STUB.read_text() == stub(), "regenerate it: python -m experiments.readme"


def test_a_table_that_drifted_is_rewritten_and_nothing_else(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "docs", tmp_path / "docs")
    page = tmp_path / "docs" / "strategies.md"
    before = page.read_text()
    page.write_text(before.replace("| `flora` | FLoRA | yes |", "| `flora` | FLoRA | no |"))
    assert page.read_text() != before
    main(tmp_path)
    assert page.read_text() == before
    assert (tmp_path / "strategies" / "__init__.pyi").read_text() == STUB.read_text()


def test_a_page_without_its_marks_is_refused() -> None:
    with pytest.raises(SystemExit, match="strategies"):
        with_tables("no marks", PAGES["docs/strategies.md"])


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


def test_the_readme_is_short_and_its_picture_small() -> None:
    assert len(README.split()) < MOST_WORDS
    assert (ROOT / "docs" / "report.png").stat().st_size < PICTURE_BYTES


@pytest.mark.parametrize("page", PAGES_SHOWN, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_leads_to_a_file_and_a_heading(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", without_code(page.read_text())):
        file, _, anchor = target.partition("#")
        if not target.startswith("http"):
            found = page.parent / file if file else page
            assert found.exists(), target
            assert not anchor or anchor in anchors(found.read_text()), target


def without_code(text: str) -> str:
    return re.sub(r"^```.*?^```|``.+?``|`[^`\n]+`", "", text, flags=re.S | re.M)


def anchors(text: str) -> set[str]:
    titles = re.findall(r"^#+ (.+)$", re.sub(r"^```.*?^```", "", text, flags=re.S | re.M), re.M)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


def test_the_two_commands_are_targets_of_the_makefile() -> None:
    for target in ("demo", "test"):
        subprocess.run(["make", "--dry-run", target], cwd=ROOT, check=True, capture_output=True)


def test_every_file_named_in_a_command_exists() -> None:
    for path in re.findall(r"experiments/[\w.-]+\.toml", README):
        assert (ROOT / path).exists(), path


def test_where_a_new_one_goes_is_there() -> None:
    """Each file and folder of the table is there, and each name is in a file of its row."""
    table = (ROOT / "CONTRIBUTING.md").read_text().partition("## Where a new one goes\n")[2]
    rows = [line for line in table.splitlines() if line.startswith("|")][2:]
    assert len(rows) == 6
    for row in rows:
        words = re.findall(r"`([^`]+)`", row)
        paths = [ROOT / word for word in words if "/" in word]
        assert [path for path in paths if not path.exists()] == []
        files = [file for path in paths for file in ([path] if path.is_file() else path.glob("*.py"))]
        texts = " ".join(file.read_text() for file in files)
        assert [w for w in words if "/" not in w and w.rpartition(".")[2] not in texts] == []


def test_the_modes_of_a_configuration_are_the_mechanisms_that_there_are() -> None:
    assert set(get_args(get_type_hints(PrivacyConfig)["mode"])) == set(MECHANISMS)
