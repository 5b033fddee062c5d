"""The ledger's laws: what was acknowledged stays counted, what is damaged is refused, the budget holds."""

from __future__ import annotations

import os
import random
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fedlora.errors import LedgerRefused
from fedlora.privacy import chain, datasets, entries
from fedlora.privacy.chain import Chain
from fedlora.privacy.datasets import Dataset
from fedlora.privacy.filter import first_order
from fedlora.privacy.ledger import Ledger, read_ledgers
from tests.privacy.ledgers import DATASET, FORK, WIDE, made, release


def test_no_prefix_that_survives_a_crash_counts_less_than_was_acknowledged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
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
    heads = tmp_path / "cut.heads"
    for length in range(len(data) + 1):
        after.path.write_bytes(data[:length])
        shutil.rmtree(heads, ignore_errors=True)  # of the round before, which a crash cannot take back
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


def test_equal_ledgers_of_equal_content_have_different_heads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(entries, "now", lambda: "2026-01-01T00:00:00+00:00")
    heads = {Ledger(tmp_path / name, DATASET).reserve(release(1), WIDE).head for name in "ab"}
    assert len(heads) == 2, "a head that follows from the content lets its guesses be tried"


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
    "wrong",
    [
        {"steps": -5},
        {"steps": 0},
        {"noise_multiplier": 1e400},
        {"sample_rate": 0.0},
        {"run": 7},
        {"neighboring_relation": "swap"},
        {"charged_as": [2.0, 0.05]},
        {"charged_as": "rdp"},
    ],
)
def test_a_chained_line_that_makes_no_sense_is_refused(wrong: dict[str, Any], tmp_path: Path) -> None:
    made(tmp_path, release())
    ledger = Ledger(tmp_path, DATASET)
    with ledger._chain.locked():
        ledger._chain.append({**entries.reserve_entry(release(2), WIDE, 0, release(2).setting), **wrong})
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
    for known in (first.head, ""):
        with pytest.raises(LedgerRefused, match=rf"was set back.*{second.head[:12]}.*\.heads/"):
            Ledger(tmp_path, DATASET).check(known)
    with pytest.raises(LedgerRefused, match=f"was set back.*{second.head[:12]}"):
        Ledger(tmp_path, DATASET).reserve(release(3), WIDE, known_head=second.head)
    with pytest.raises(LedgerRefused, match="lost or changed entries while it was in use"):
        ledger.reserve(release(3), WIDE)
    ledger.path.unlink()
    for one in (ledger, Ledger(tmp_path, DATASET)):
        with pytest.raises(LedgerRefused, match=r"set back|lost or changed"):
            one.check(second.head)
    with pytest.raises(LedgerRefused, match="was set back"):
        Ledger(tmp_path, DATASET).reserve(release(1, run_key="a new run"), WIDE)
    (tmp_path / datasets.REGISTER).unlink()
    with pytest.raises(LedgerRefused, match=r"datasets\.jsonl: is missing"):
        ledger.reserve(release(3), WIDE)
    shutil.rmtree(tmp_path.with_name(f"{tmp_path.name}.heads"))
    with pytest.raises(LedgerRefused, match="was set back"):
        ledger.reserve(release(3), WIDE, known_head=second.head)


def test_its_owner_is_not_shown_what_a_ledger_that_was_set_back_or_lost_says(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger", DATASET)
    ledger.reserve(release(1), WIDE)
    before = ledger.path.read_bytes()
    ledger.reserve(release(2), WIDE)
    (tmp_path / "ledger.heads" / "of-a-crash.new").write_text("0" * 64)
    assert [account.standing.releases for account in read_ledgers(ledger.directory)] == [2]
    ledger.path.write_bytes(before)
    with pytest.raises(LedgerRefused, match=r"was set back: .*\.heads/.* has its hash"):
        read_ledgers(ledger.directory)
    ledger.path.unlink()
    with pytest.raises(LedgerRefused, match=f"{ledger.path.name}: there is no such file"):
        read_ledgers(ledger.directory)


@pytest.mark.parametrize("whole", [False, True])
def test_other_data_gets_no_budget_where_the_register_is_lost(whole: bool, tmp_path: Path) -> None:
    """Alone, or with the directory, of which the heads are left."""
    directory = tmp_path / "ledger"
    made(directory, release(1))
    shutil.rmtree(directory) if whole else (directory / datasets.REGISTER).unlink()
    with pytest.raises(LedgerRefused, match=r"datasets\.jsonl: is missing, which says of what sentences-"):
        made(directory, release(1), dataset=Dataset(source="other"))


def test_a_directory_that_was_deleted_with_its_heads_begins_anew(tmp_path: Path) -> None:
    """In one process, as where a notebook runs a deleted ``out`` again; ledgers may be held meanwhile."""
    directory = tmp_path / "ledger"
    parts = [Dataset(source="sentences", partitioning="dealt", part=f"partition-{n}") for n in (1, 2)]
    held = [Ledger(directory, part) for part in parts]
    for again in range(2):
        assert [ledger.reserve(release(1), WIDE).releases for ledger in held] == [1, 1]
        assert made(directory, release(1)).releases == 1
        assert datasets.declared_in(directory) == ["sentences"]
        if not again:
            shutil.rmtree(directory)
            shutil.rmtree(tmp_path / "ledger.heads")


def test_a_held_ledger_asks_a_register_that_was_deleted_again(tmp_path: Path) -> None:
    held = Ledger(tmp_path, DATASET)
    held.check()
    (tmp_path / datasets.REGISTER).unlink()
    held.reserve(release(1), WIDE)
    assert datasets.declared_in(tmp_path) == ["sentences"]
    (tmp_path / datasets.REGISTER).unlink()
    with pytest.raises(LedgerRefused, match=r"datasets\.jsonl: is missing, which says of what sentences-"):
        held.reserve(release(2), WIDE)


@pytest.mark.parametrize("spoiled", ["", "\0" * 64, "half a hea", None])
def test_a_head_that_a_power_cut_spoiled_refuses_nothing_and_is_said(
    spoiled: str | None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    made(tmp_path, release(1))
    (kept,) = tmp_path.with_name(f"{tmp_path.name}.heads").iterdir()
    kept.unlink() if spoiled is None else kept.write_text(spoiled)
    assert made(tmp_path, release(2)).releases == 2
    (said,) = caplog.messages
    assert said.startswith(f"{kept}: is not there, or damaged, which would tell if")
    assert made(tmp_path, release(3)).releases == 3
    assert len(caplog.messages) == 1


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


def test_a_chain_is_read_by_any_number_of_readers(tmp_path: Path) -> None:
    writer, reader = Chain(tmp_path / "chain"), Chain(tmp_path / "chain")
    for number in range(3):
        with writer.locked():
            writer.append({"number": number})
        assert reader.refresh() == b""
        assert [entry["number"] for entry in reader.entries] == list(range(number + 1))
        assert reader.hashes == writer.hashes
