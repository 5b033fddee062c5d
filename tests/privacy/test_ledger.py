"""The ledger's laws: what was acknowledged stays counted, what is damaged is refused, the budget holds."""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import random
import signal
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from fedlora.errors import BudgetExceeded, ConfigError, LedgerRefused
from fedlora.privacy import chain, entries, filter
from fedlora.privacy.calibration import epsilon_of
from fedlora.privacy.chain import Chain
from fedlora.privacy.datasets import REGISTER, Dataset, declare
from fedlora.privacy.entries import Release, Standing
from fedlora.privacy.filter import Budget, first_order, renyi_epsilon
from fedlora.privacy.ledger import Ledger, read_ledgers

DATASET = Dataset(source="sentences", partitioning="dealt", part="partition-0", fingerprint="as it was")
BUDGET = Budget(target_epsilon=8.0, target_delta=1e-5, accountant="rdp")
WIDE = Budget(target_epsilon=1e6, target_delta=1e-5, accountant="rdp")
FORK = multiprocessing.get_context("fork")


def release(server_round: int = 1, **changes: Any) -> Release:
    given = {
        "run_key": "run", "server_round": server_round, "partition_id": 0, "noise_multiplier": 1.0,
        "sample_rate": 0.05, "steps": 3, **changes,
    }  # fmt: skip
    return Release(**given)


def made(directory: Path, *releases: Release, budget: Budget = WIDE) -> Standing:
    """The standing after these releases."""
    ledger = Ledger(directory, DATASET)
    for one in releases:
        standing = ledger.reserve(one, budget)
        ledger.released(one)
    return standing


@pytest.fixture
def unflushed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda handle: None)


# --- crashes ---------------------------------------------------------------------------------------------


def test_no_prefix_that_survives_a_crash_counts_less_than_was_acknowledged(
    tmp_path: Path, unflushed: None, caplog: pytest.LogCaptureFixture
) -> None:
    ledger = Ledger(tmp_path / "whole", DATASET)
    acknowledged: list[int] = []
    for number in (1, 2):
        ledger.reserve(release(number), WIDE)
        acknowledged.append(ledger.path.stat().st_size)
    data = ledger.path.read_bytes()
    header = data.index(b"\n") + 1
    after = Ledger(tmp_path / "cut", DATASET)
    after.check()
    for length in range(len(data) + 1):
        after.path.write_bytes(data[:length])
        cut, sure = Ledger(after.directory, DATASET), sum(size <= length for size in acknowledged)
        if length < header:
            assert sure == 0
            with pytest.raises(LedgerRefused, match="first line is damaged"):
                cut.reserve(release(3), WIDE)
            continue
        standing = read_ledgers(after.directory)[0].standing
        assert sure <= standing.releases <= sure + 1
        assert after.path.stat().st_size == length, "reading repairs nothing"
        again = cut.reserve(release(3), WIDE)
        assert again.releases == standing.releases + 1
        assert again.steps == 3 * again.releases
        assert read_ledgers(after.directory)[0].standing.releases == again.releases
    assert "cut short are dropped" in caplog.text


def _acknowledge_for_ever(directory: Path, told: Any) -> None:
    ledger = Ledger(directory, DATASET)
    for number in range(1, 10**6):
        ledger.reserve(release(number), WIDE)
        os.write(told, b"x")
        ledger.released(release(number))


@pytest.mark.parametrize("seed", range(4))
def test_kill_9_loses_nothing_that_was_acknowledged(seed: int, tmp_path: Path) -> None:
    first_order(1.0, 0.05, WIDE)  # so that the child need not import the accountant
    read, write = os.pipe()
    child = FORK.Process(target=_acknowledge_for_ever, args=(tmp_path, write))
    child.start()
    acknowledged = len(os.read(read, 1))
    time.sleep(random.Random(seed).uniform(0.0, 0.08))
    os.kill(child.pid, signal.SIGKILL)  # type: ignore[arg-type]
    child.join()
    os.close(write)
    while more := os.read(read, 65536):
        acknowledged += len(more)
    os.close(read)
    found = made(tmp_path, release(10**6)).releases - 1
    assert acknowledged <= found <= acknowledged + 1


def test_two_processes_at_once_are_both_counted(tmp_path: Path) -> None:
    first_order(1.0, 0.05, WIDE)
    runs = [
        FORK.Process(target=made, args=(tmp_path, *(release(n, run_key=key) for n in range(15))))
        for key in ("one", "two")
    ]
    for run in runs:
        run.start()
    for run in runs:
        run.join()
    assert [run.exitcode for run in runs] == [0, 0]
    standing = read_ledgers(tmp_path)[0].standing
    assert (standing.releases, standing.steps, standing.unfinished) == (30, 90, 0)


def test_a_ledger_that_stays_locked_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made(tmp_path, release())
    monkeypatch.setattr(chain, "LOCK_SECONDS", 0.05)
    holder, waiting = Ledger(tmp_path, DATASET), Ledger(tmp_path, DATASET)
    with (
        holder._chain.locked(),
        pytest.raises(LedgerRefused, match=r"another process has held it for 0\.05 s"),
    ):
        waiting.reserve(release(2), WIDE)


# --- damage ----------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(place=st.floats(0, 1, exclude_max=True), byte=st.integers(0, 255))
def test_any_changed_byte_is_refused_where_the_head_is_known(place: float, byte: int, tmp_path: Path) -> None:
    directory = tmp_path / "ledger"
    if not directory.exists():
        made(directory, release(1), release(2))
    whole, path = Ledger(directory, DATASET).reserve(release(9, determined_by="x"), WIDE), None
    path = read_ledgers(directory)[0].path
    data = path.read_bytes()
    index = int(place * len(data))
    changed = data[:index] + bytes([byte]) + data[index + 1 :]
    path.write_bytes(changed)
    try:
        if changed == data:
            Ledger(directory, DATASET).check(whole.head)
        else:
            with pytest.raises(LedgerRefused):
                Ledger(directory, DATASET).check(whole.head)
    finally:
        path.write_bytes(data)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(line=st.integers(0, 3), kind=st.sampled_from(["drop", "double", "change", "rubbish"]))
def test_a_damaged_line_that_is_not_the_last_is_refused(line: int, kind: str, tmp_path: Path) -> None:
    directory = tmp_path / "ledger"
    if not directory.exists():
        made(directory, release(1), release(2))
    path = read_ledgers(directory)[0].path
    data = path.read_bytes()
    lines = data.splitlines(keepends=True)
    lines[line : line + 1] = {
        "drop": [],
        "double": [lines[line]] * 2,
        "change": [lines[line].replace(b'"time"', b'"Time"')],
        "rubbish": [b"[[\xff\x00\n"],
    }[kind]
    path.write_bytes(b"".join(lines))
    try:
        with pytest.raises(LedgerRefused) as refused:
            Ledger(directory, DATASET).reserve(release(3), WIDE)
        assert "\n" not in str(refused.value)
        with pytest.raises(LedgerRefused):
            read_ledgers(directory)
    finally:
        path.write_bytes(data)


@pytest.mark.parametrize(
    "content",
    [b"", b"{}\n", b"rubbish\n", b'{"kind": "open", "schema": 99, "previous": ""}\n', b"\x00" * 99],
)
def test_a_foreign_file_is_refused(content: bytes, tmp_path: Path) -> None:
    ledger = Ledger(tmp_path, DATASET)
    ledger.check()
    ledger.path.write_bytes(content)
    with pytest.raises(LedgerRefused, match=r"damaged|not one of a privacy ledger"):
        ledger.reserve(release(), WIDE)
    assert ledger.path.read_bytes() == content


@pytest.mark.parametrize(
    "wrong", [{"steps": -5}, {"steps": 0}, {"noise_multiplier": 1e400}, {"sample_rate": 0.0}, {"run": 7}]
)
def test_a_chained_line_that_makes_no_sense_is_refused(wrong: dict[str, Any], tmp_path: Path) -> None:
    made(tmp_path, release())
    ledger = Ledger(tmp_path, DATASET)
    with ledger._chain.locked():
        ledger._chain.append({**entries.reserve_entry(release(2), WIDE, 0), **wrong})
    with pytest.raises(LedgerRefused, match="line 4 is not one of a privacy ledger"):
        Ledger(tmp_path, DATASET).reserve(release(3), WIDE)


def test_another_data_sets_ledger_under_its_name_is_refused(tmp_path: Path) -> None:
    made(tmp_path, release())
    other = Ledger(tmp_path, Dataset(source="sentences", partitioning="dealt", part="partition-1"))
    os.rename(read_ledgers(tmp_path)[0].path, other.path)
    with pytest.raises(LedgerRefused, match="is the ledger of sentences/dealt/partition-0, not of"):
        other.reserve(release(), WIDE)


def test_a_ledger_that_was_set_back_is_refused(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path, DATASET)
    first = ledger.reserve(release(1), WIDE)
    before = ledger.path.read_bytes()
    second = ledger.reserve(release(2), WIDE)
    Ledger(tmp_path, DATASET).check(first.head)
    Ledger(tmp_path, DATASET).check(second.head)
    ledger.path.write_bytes(before)
    Ledger(tmp_path, DATASET).check(first.head)
    with pytest.raises(LedgerRefused, match=f"was set back.*{second.head[:12]}"):
        Ledger(tmp_path, DATASET).reserve(release(3), WIDE, known_head=second.head)
    with pytest.raises(LedgerRefused, match="lost or changed entries while it was in use"):
        ledger.reserve(release(3), WIDE)
    ledger.path.unlink()
    for one in (ledger, Ledger(tmp_path, DATASET)):
        with pytest.raises(LedgerRefused, match=r"set back|lost or changed"):
            one.check(second.head)


def test_the_head_is_of_a_line_that_a_power_cut_cannot_take(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path, DATASET)
    ledger.reserve(release(1, determined_by="a"), WIDE)
    flushed = ledger.path.read_bytes()
    ledger.released(release(1))
    head = ledger.reserve(release(1, determined_by="a"), WIDE).head
    ledger.path.write_bytes(flushed)
    Ledger(tmp_path, DATASET).check(head)


def test_a_place_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(LedgerRefused, match=r"datasets\.jsonl: Not a directory"):
        Ledger(tmp_path / "file" / "ledger", DATASET).reserve(release(), WIDE)


def test_times_of_day_play_no_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    moments = iter(["2031-01-01T00:00:00", "1970-01-01T00:00:00", "not a time", ""] * 3)
    monkeypatch.setattr(entries, "now", lambda: next(moments))
    standing = made(tmp_path, release(1), release(2), release(3))
    assert (standing.releases, standing.unfinished) == (3, 1)
    assert Ledger(tmp_path, DATASET).reserve(release(4), WIDE).releases == 4


# --- what is charged -------------------------------------------------------------------------------------


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
        taken = Ledger(tmp_path, DATASET).reserve(asked.pop(), budget).steps
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
    one, other = release(1, steps=40), release(2, noise_multiplier=1.3, steps=40)
    alone = made(tmp_path, one, budget=prv)
    assert alone.accountant == "prv"
    assert alone.epsilon == epsilon_of(((1.0, 0.05, 40),), 1e-5, "prv")
    both = made(tmp_path, other, budget=Budget(target_epsilon=20.0, target_delta=1e-5, accountant="prv"))
    history = ((1.0, 0.05, 40), (1.3, 0.05, 40))
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
    budget = Budget(target_epsilon=5.05, target_delta=1.5e-5, accountant="rdp")

    def fits(steps: int) -> bool:
        return filter.fits(((1.0, 0.05, steps),), budget, 5.0, planned_steps=40)

    assert all(fits(steps) for steps in range(1, 41))
    assert asked == [40]
    assert fits(50)
    assert not fits(51)
    assert not fits(60)
    assert all(fits(steps) for steps in range(1, 51))
    assert asked == [40, 50, 51]


# --- the owner's commands --------------------------------------------------------------------------------


@pytest.fixture
def fedlora() -> Callable[..., Any]:
    from fedlora.cli import cli

    return lambda *arguments: CliRunner().invoke(cli, ["privacy", *map(str, arguments)])


def test_the_owner_reads_what_is_spent(tmp_path: Path, fedlora: Callable[..., Any]) -> None:
    made(tmp_path / "run" / "clients" / "ledger", release(1), release(2), budget=BUDGET)
    done = fedlora("spent", tmp_path / "run", "--json")
    assert done.exit_code == 0
    (row,) = json.loads(done.stdout)
    epsilon = epsilon_of(((1.0, 0.05, 6),), 1e-5, "rdp")
    assert row["epsilon"] == epsilon
    assert row["left"] == 8.0 - epsilon
    assert (row["releases"], row["steps"], row["dataset"]) == (2, 6, DATASET.identity)
    assert DATASET.identity in fedlora("spent", tmp_path / "run").stdout


def test_a_run_that_names_a_ledger_elsewhere_leads_to_it(tmp_path: Path, fedlora: Callable[..., Any]) -> None:
    made(tmp_path / "ledger", release(1))
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.toml").write_text(f'[privacy]\nledger = "{tmp_path / "ledger"}"\n')
    assert len(json.loads(fedlora("spent", tmp_path / "run", "--json").stdout)) == 1


def test_the_owner_declares_a_data_set(tmp_path: Path, fedlora: Callable[..., Any]) -> None:
    made(tmp_path, release())
    done = fedlora("new-dataset", "--ledger", tmp_path, "--id", "other", "--reason", "collected since")
    assert done.exit_code == 0
    assert Ledger(tmp_path, Dataset(source="other")).reserve(release(), WIDE).releases == 1


def test_wrong_requests_are_one_line_with_exit_code_2(tmp_path: Path, fedlora: Callable[..., Any]) -> None:
    made(tmp_path / "ledger", release())
    path = read_ledgers(tmp_path / "ledger")[0].path
    path.write_bytes(b"x" + path.read_bytes())
    for arguments, words in (
        (("spent", tmp_path / "nowhere"), "no privacy ledger"),
        (("spent", tmp_path), "line 1 is damaged"),
        (("new-dataset", "--ledger", tmp_path / "ledger", "--id", "x", "--reason", ""), "--reason"),
        (("new-dataset", "--ledger", tmp_path / "ledger", "--id", "sentences", "--reason", "x"), "already"),
    ):
        done = fedlora(*arguments)
        assert done.exit_code == 2
        assert words in done.stderr
        assert len(done.stderr.splitlines()) == 1


def test_a_chain_is_read_by_any_number_of_readers(tmp_path: Path) -> None:
    writer, reader = Chain(tmp_path / "chain"), Chain(tmp_path / "chain")
    for number in range(3):
        with writer.locked():
            writer.append({"number": number})
        assert reader.refresh() == b""
        assert [entry["number"] for entry in reader.entries] == list(range(number + 1))
        assert reader.hashes == writer.hashes
