"""The published texts show what their kept cells say."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest

from experiments import tables
from experiments.publish import read
from experiments.released_accounting import rows
from experiments.tables import rewritten, texts

kept = cache(tables.kept)


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


def test_with_every_client_in_every_round_the_ledger_and_the_first_code_agree() -> None:
    for _, target, ledger, first, second in rows()[:3]:
        assert ledger == first
        assert ledger.endswith(f"{float(target):.2f} to {float(target):.2f}")
        assert float(second.split(",")[0]) < float(ledger.split(",")[0])  # its batches are a little fewer


def test_with_half_of_them_both_codes_spend_more_than_they_say() -> None:
    for _, target, *accountings in rows()[3:]:
        ledger, first, second = (float(cell.rpartition(" ")[2]) for cell in accountings)
        assert ledger == float(target) < second < first
