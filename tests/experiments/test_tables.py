"""The published texts show what their kept cells say."""

from __future__ import annotations

from pathlib import Path

import pytest

from experiments.publish import read
from experiments.tables import kept, rewritten, texts


@pytest.mark.parametrize("page", texts(), ids=lambda page: page.parent.name)
def test_the_tables_are_up_to_date(page: Path) -> None:
    found, text = kept(page.parent.name), page.read_text()
    assert rewritten(text, found) == text, "run python -m experiments.tables"
    reported = [label for label in read(page.parent) if not label.startswith("tuning-")]
    assert sum(len(row.results) for row in found.rows) == len(reported)


def test_there_are_texts_with_tables() -> None:
    assert "privacy" in [page.parent.name for page in texts()]


def test_a_number_that_drifted_is_made_anew() -> None:
    page = next(page for page in texts() if page.parent.name == "privacy")
    text = page.read_text()
    drifted = text.replace("| better |", "| worse |")
    assert drifted != text
    assert rewritten(drifted, kept("privacy")) == text
