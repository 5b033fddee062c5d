"""What is charged, and to whom: the filter over everything that a data set has released."""

from __future__ import annotations

import json
import logging
import os
from collections import Counter
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedlora.errors import BudgetExceeded, ConfigError, LedgerRefused
from fedlora.privacy import filter
from fedlora.privacy.calibration import epsilon_of
from fedlora.privacy.datasets import REGISTER, Dataset, declare
from fedlora.privacy.filter import Bounds, Budget, first_order, renyi_epsilon
from fedlora.privacy.ledger import Ledger, read_ledgers
from tests.privacy.ledgers import DATASET, WIDE, made, release


def test_the_same_bits_are_charged_once_and_real_entropy_every_time(tmp_path: Path) -> None:
    same = release(1, determined_by="these bits")
    assert made(tmp_path, same, same).releases == 1
    assert made(tmp_path, same).releases == 1
    assert made(tmp_path, release(1, determined_by="other bits")).releases == 2
    assert made(tmp_path, same).releases == 2
    assert made(tmp_path, release(1)).releases == 3
    assert made(tmp_path, release(1)).releases == 4
    for elsewhere in ({"run_key": "other"}, {"server_round": 2}, {"partition_id": 1}):
        before = read_ledgers(tmp_path)[0].standing.releases
        other = release(**{"server_round": 1, "determined_by": "these bits", **elsewhere})
        assert made(tmp_path, other).releases == before + 1
    lines = [json.loads(line) for line in read_ledgers(tmp_path)[0].path.read_text().splitlines()]
    assert [(e["attempt"], e["seeded"]) for e in lines if e["kind"] == "reserve"][:4] == [
        (0, True), (1, True), (2, False), (3, False),
    ]  # fmt: skip


def test_a_release_is_on_disk_before_reserve_returns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made(tmp_path, release(1))
    ledger, flushed = Ledger(tmp_path, DATASET), []
    flush = os.fsync
    monkeypatch.setattr(os, "fsync", lambda handle: (flushed.append(os.fstat(handle).st_size), flush(handle)))
    ledger.reserve(release(2), WIDE)
    assert flushed == [ledger.path.stat().st_size]


def test_a_release_that_came_to_nothing_counts_and_is_seen(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path, DATASET)
    ledger.reserve(release(1), WIDE)
    ledger.reserve(release(1), WIDE)
    ledger.released(release(1))
    standing = read_ledgers(tmp_path)[0].standing
    assert (standing.releases, standing.unfinished, standing.steps) == (2, 1, 6)


def test_changed_content_keeps_what_was_spent_and_warns(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    made(tmp_path, release(1), release(2))
    assert not caplog.records
    changed = Dataset(source="sentences", partitioning="dealt", part="partition-0", fingerprint="other texts")
    for server_round, releases in ((3, 3), (4, 4)):
        standing = Ledger(tmp_path, changed).reserve(release(server_round), WIDE)
        assert (standing.releases, standing.content_changes) == (releases, 1)
    assert [r.levelno for r in caplog.records] == [logging.WARNING]
    assert "what was spent on it stays spent" in caplog.text


# --- whose it is -----------------------------------------------------------------------------------------


def test_a_new_name_or_another_partitioning_gives_no_fresh_budget(tmp_path: Path) -> None:
    made(tmp_path, release())
    with pytest.raises(LedgerRefused, match=r"dealt to clients as dealt there, now as anew.*two ledgers"):
        Ledger(tmp_path, Dataset(source="sentences", partitioning="anew")).check()
    renamed = Ledger(tmp_path, Dataset(source="renamed", partitioning="dealt"))
    with pytest.raises(LedgerRefused, match=r"'sentences', not of 'renamed'.*fedlora privacy new-dataset"):
        renamed.reserve(release(), WIDE)
    declare(tmp_path, "renamed", "these are other sentences")
    assert renamed.reserve(release(), WIDE).releases == 1
    said = [json.loads(line) for line in (tmp_path / REGISTER).read_text().splitlines()]
    assert said[3]["reason"] == "these are other sentences"
    with pytest.raises(LedgerRefused, match="as dealt there, now as one part"):
        Ledger(tmp_path, Dataset(source="renamed")).check()
    for again in (("renamed", "again"), ("sentences", "again"), ("other", " "), ("two\nlines", "why")):
        with pytest.raises(ConfigError):
            declare(tmp_path, *again)


def test_a_damaged_register_is_refused(tmp_path: Path) -> None:
    made(tmp_path / "a", release())
    register = tmp_path / "a" / REGISTER
    register.write_bytes(register.read_bytes().replace(b"first use", b"first abuse"))
    os.rename(tmp_path / "a", tmp_path / "b")
    with pytest.raises(LedgerRefused, match=r"datasets\.jsonl: line 3 is damaged"):
        Ledger(tmp_path / "b", DATASET).check()


# --- the filter ------------------------------------------------------------------------------------------


def test_the_budget_holds_over_rounds_strategies_and_runs(tmp_path: Path) -> None:
    budget, taken = Budget(target_epsilon=3.0, target_delta=1e-5, accountant="rdp"), 0
    asked = [release(n, run_key=f"strategy-{n % 3}", steps=10) for n in range(100)]
    while epsilon_of(((1.0, 0.05, taken + 10),), 1e-5, "rdp") <= 3.0:
        taken = made(tmp_path, asked.pop(), budget=budget).steps
    assert taken > 20
    with pytest.raises(BudgetExceeded, match=rf"target-epsilon = 3.0: {taken + 10} steps would spend 3\.\d+"):
        Ledger(tmp_path, DATASET).reserve(asked.pop(), budget)
    assert read_ledgers(tmp_path)[0].standing.steps == taken, "what was declined is not charged"


SETTINGS = [(0.8, 0.01), (1.0, 0.05), (4.0, 1.0)]


@settings(max_examples=8, deadline=None)
@given(asked=st.lists(st.tuples(st.sampled_from(SETTINGS), st.integers(1, 60)), min_size=1, max_size=8))
def test_no_choice_of_noise_and_rate_overspends(
    asked: list[tuple[tuple[float, float], int]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    ledger, taken = Ledger(tmp_path_factory.mktemp("filter"), DATASET), Counter[tuple[float, float]]()
    budget = Budget(target_epsilon=2.0, target_delta=1e-5, accountant="rdp")
    for number, ((noise, rate), steps) in enumerate(asked):
        one = release(number, noise_multiplier=noise, sample_rate=rate, steps=steps)
        with suppress(BudgetExceeded):
            ledger.reserve(one, budget)
            taken[noise, rate] += steps
    history = tuple((*setting, steps) for setting, steps in taken.items())
    (account,) = read_ledgers(ledger.directory)
    assert account.standing.steps == taken.total()
    assert epsilon_of(history, 1e-5, "rdp") <= account.standing.epsilon + 1e-9 <= 2.0 + 1e-9


def test_several_settings_are_decided_at_the_order_of_the_first_release(tmp_path: Path) -> None:
    prv = Budget(target_epsilon=8.0, target_delta=1e-5, accountant="prv")
    one, other = release(1, steps=40), release(2, noise_multiplier=0.9, steps=40)
    alone = made(tmp_path, one, budget=prv)
    assert alone.accountant == "prv"
    assert alone.epsilon == pytest.approx(epsilon_of(((1.0, 0.05, 40),), 1e-5, "prv"), rel=1e-7)
    both = made(tmp_path, other, budget=Budget(target_epsilon=20.0, target_delta=1e-5, accountant="prv"))
    history = ((1.0, 0.05, 40), (0.9, 0.05, 40))
    assert both.accountant == "rdp"
    assert both.epsilon == renyi_epsilon(history, 1e-5, first_order(1.0, 0.05, prv))
    assert both.epsilon >= epsilon_of(history, 1e-5, "rdp") >= epsilon_of(history, 1e-5, "prv")


def test_the_order_of_one_setting_is_the_one_that_the_accountant_finds() -> None:
    budget = Budget(target_epsilon=4.0, target_delta=1e-5, accountant="rdp")
    order = first_order(1.0, 0.05, budget)
    fit = [n for n in range(1, 4000) if renyi_epsilon(((1.0, 0.05, n),), 1e-5, order) <= 4.0]
    assert fit == list(range(1, len(fit) + 1))
    assert epsilon_of(((1.0, 0.05, len(fit)),), 1e-5, "rdp") == pytest.approx(4.0, abs=0.05)
    assert epsilon_of(((1.0, 0.05, len(fit) + 1),), 1e-5, "rdp") > 4.0


def test_a_planned_run_asks_the_accountant_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    def epsilon(noise: float, rate: float, steps: int, budget: Budget) -> float:
        asked.append(steps)
        return 0.1 * steps

    monkeypatch.setattr(filter, "_epsilon", epsilon)
    budget = Budget(target_epsilon=5.05, target_delta=1e-5, accountant="rdp")
    bounds: Bounds = {}

    def fits(steps: int) -> bool:
        return filter.fits(((1.0, 0.05, steps),), budget, 5.0, bounds, planned_steps=40)

    assert all(fits(steps) for steps in range(1, 41))
    assert asked == [40]
    assert fits(50)
    assert not fits(51)
    assert not fits(60)
    assert all(fits(steps) for steps in range(1, 51))
    assert asked == [40, 50, 51]
