"""One ledger adds up releases for like examples alone: what cut them from rows is kept and compared."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fedlora.errors import LedgerRefused
from fedlora.privacy.cut import ROWS, Cut, read_cut
from fedlora.privacy.datasets import REGISTER
from fedlora.privacy.ledger import Ledger, read_ledgers
from fedlora.privacy.spending import EvaluationRelease
from fedlora.privacy.types import NeighboringRelation
from tests.privacy.ledgers import DATASET, WIDE, made, release

BLOCKS = Cut(task="causal-lm", max_length=256, tokenizer="ab12")
TALKS = Cut(task="instruction", tokenizer="ab12")
UNLIKE: list[tuple[Cut, Cut, str]] = [
    (BLOCKS, replace(BLOCKS, max_length=8), r"data\.max-length = 8: .* by data\.max-length = 256"),
    (BLOCKS, replace(BLOCKS, tokenizer="cd"), r"model\.name, tokenizer = 'cd': .* tokenizer = 'ab12'"),
    (BLOCKS, TALKS, r"task = 'instruction': .* by task = 'causal-lm'"),
    (BLOCKS, ROWS, r"a task whose examples are rows: .* by task = 'causal-lm'"),
    (ROWS, BLOCKS, r"task = 'causal-lm': .* by a task whose examples are rows"),
]


def evaluation(cut: Cut | None) -> EvaluationRelease:
    return EvaluationRelease(
        run_key="run", server_round=1, partition_id=0, epsilon=0.5, cut=cut,
        neighboring_relation=NeighboringRelation.ZERO_OUT_ONE,
    )  # fmt: skip


@pytest.mark.parametrize("cut", [BLOCKS, TALKS, ROWS])
def test_a_cut_is_read_as_it_was_written(cut: Cut) -> None:
    assert read_cut(json.loads(json.dumps(cut.record()))) == cut
    assert [read_cut(wrong) for wrong in (None, "causal-lm", {"max_length": "8"}, {"task": 1})] == [None] * 4


@pytest.mark.parametrize(("first", "then", "words"), UNLIKE)
def test_examples_that_are_cut_otherwise_do_not_add_up(
    first: Cut, then: Cut, words: str, tmp_path: Path
) -> None:
    before = made(tmp_path, release(1, cut=first), release(2, cut=first))
    ledger = Ledger(tmp_path, DATASET)
    ledger.check(cut=first)
    for refused in (
        lambda: ledger.reserve(release(3, cut=then), WIDE),
        lambda: ledger.reserve_evaluation(evaluation(then)),
        lambda: ledger.check(cut=then),
    ):
        with pytest.raises(LedgerRefused, match=rf"{words}; .* does not add up with another") as told:
            refused()
        assert "\n" not in str(told.value)
    (account,) = read_ledgers(tmp_path)
    assert account.standing.epsilon == before.epsilon, "what is refused is not charged"


def test_an_evaluation_says_what_cut_its_examples(tmp_path: Path) -> None:
    Ledger(tmp_path, DATASET).reserve_evaluation(evaluation(BLOCKS))
    with pytest.raises(LedgerRefused, match=r"data\.max-length = 8"):
        Ledger(tmp_path, DATASET).reserve(release(1, cut=replace(BLOCKS, max_length=8)), WIDE)


def test_entries_that_do_not_say_add_up_with_the_first_that_do(tmp_path: Path) -> None:
    """They are of an earlier version, or for a column's values; nobody knows that they differ."""
    made(tmp_path, release(1), release(2))
    assert made(tmp_path, release(3, cut=BLOCKS)).releases == 3
    with pytest.raises(LedgerRefused, match=r"data\.max-length = 8"):
        made(tmp_path, release(4, cut=replace(BLOCKS, max_length=8)))
    assert made(tmp_path, release(4)).releases == 4
    lines = [json.loads(line) for line in read_ledgers(tmp_path)[0].path.read_text().splitlines()]
    assert ["cut" in line for line in lines if line["kind"] == "reserve"] == [False, False, True, False]


@pytest.mark.parametrize("known", [BLOCKS, None])
@pytest.mark.parametrize("wrong", ["causal-lm", {"max_length": "8"}, None, ROWS.record()])
def test_a_chained_line_with_another_cut_is_refused(wrong: Any, known: Cut | None, tmp_path: Path) -> None:
    made(tmp_path, release(1, cut=known))
    ledger = Ledger(tmp_path, DATASET)
    with ledger._chain.locked():
        ledger._chain.append({**ledger._chain.entries[1], "cut": wrong, "round": 2})
    if known is None and wrong == ROWS.record():
        assert made(tmp_path, release(3)).releases == 3
        return
    with pytest.raises(LedgerRefused, match="line 4 is not one of a privacy ledger"):
        made(tmp_path, release(3))


# --- dealt after they were cut ---------------------------------------------------------------------------


@pytest.mark.parametrize(("first", "then", "words"), UNLIKE)
def test_examples_that_were_dealt_after_another_cut_are_refused(
    first: Cut, then: Cut, words: str, tmp_path: Path
) -> None:
    made(tmp_path, release(1), dataset=replace(DATASET, cut=first))
    register = (tmp_path / REGISTER).read_text()
    dealt = words.replace(" by ", " dealt to clients by ")
    with pytest.raises(LedgerRefused, match=rf"^{dealt}, and what is in an example .* two ledgers") as told:
        Ledger(tmp_path, replace(DATASET, part="partition-1", cut=then)).check()
    assert "\n" not in str(told.value)
    made(tmp_path, release(2), dataset=replace(DATASET, part="partition-1", cut=first))
    assert (tmp_path / REGISTER).read_text() == register


def test_a_register_that_does_not_say_holds_to_the_first_that_does(tmp_path: Path) -> None:
    made(tmp_path, release(1))
    cut = replace(DATASET, cut=BLOCKS)
    assert made(tmp_path, release(2), dataset=cut).releases == 2, "the ledger that was there goes on"
    assert made(tmp_path, release(3), dataset=cut).releases == 3
    said = [json.loads(line) for line in (tmp_path / REGISTER).read_text().splitlines()]
    assert [line.get("cut") for line in said if line["kind"] == "partitioning"] == [None, BLOCKS.record()]
    with pytest.raises(LedgerRefused, match=r"data\.max-length = 8"):
        Ledger(tmp_path, replace(DATASET, cut=replace(BLOCKS, max_length=8))).check()
    with pytest.raises(LedgerRefused, match="is dealt to clients as dealt there, now as anew"):
        Ledger(tmp_path, replace(cut, partitioning="anew")).check()


def test_a_register_with_a_spoilt_cut_is_refused(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path, DATASET)
    ledger.check()
    register = ledger._chain.__class__(tmp_path / REGISTER)
    with register.locked():
        register.append({**register.entries[-1], "cut": "blocks"})
    with pytest.raises(LedgerRefused, match=r"datasets\.jsonl: line 4 is not one of a register"):
        Ledger(tmp_path, DATASET).check()
