"""The README says what the code does: its tables are made from it, its links lead somewhere."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

from strategies.table import markdown_table

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def test_the_strategy_table_is_the_facts() -> None:
    assert markdown_table() in README, "regenerate it: python -m strategies.table"


def test_every_link_leads_to_a_file() -> None:
    for target in re.findall(r"\]\(([^)]+)\)", README):
        if not target.startswith("http"):
            assert (ROOT / target).exists(), target


def test_the_two_commands_are_targets_of_the_makefile() -> None:
    for target in ("demo", "test"):
        subprocess.run(["make", "--dry-run", target], cwd=ROOT, check=True, capture_output=True)


def test_every_file_named_in_a_command_exists() -> None:
    for path in re.findall(r"experiments/[\w.-]+\.toml", README):
        assert (ROOT / path).exists(), path
