"""The published table of accountings says what it should where the answer is known."""

from __future__ import annotations

from experiments.released_accounting import rows


def test_with_every_client_in_every_round_the_ledger_and_the_first_code_agree() -> None:
    for _, target, ledger, first, second in rows()[:3]:
        assert ledger == first
        assert ledger.endswith(f"{float(target):.2f} to {float(target):.2f}")
        assert float(second.split(",")[0]) < float(ledger.split(",")[0])  # its batches are a little fewer


def test_with_half_of_them_both_codes_spend_more_than_they_say() -> None:
    for _, target, *accountings in rows()[3:]:
        ledger, first, second = (float(cell.rpartition(" ")[2]) for cell in accountings)
        assert ledger == float(target) < second < first
