"""A node whose updates are rubbish: refused, counted, attributed to it; the others are unharmed."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from fedlora.errors import RunFailed
from tests.faults.deployed import Up, adapter, federation, misbehaving, run

pytestmark = [pytest.mark.deployed, pytest.mark.timeout(1200)]

FAULTS = {2: "nan", 3: "far", 4: "shape", 5: "rank", 6: "replay", 7: "blob"}
REASONS = {
    2: "holds a NaN",
    3: "moved by",
    4: "has shape",
    5: "has shape",
    6: "answers round 1 of run",
    7: "cannot be decoded",
}


@pytest.fixture(scope="module")
def up(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Up]:
    with federation(tmp_path_factory.mktemp("faults"), sabotage=True) as found:
        yield found


def test_every_kind_of_rubbish_is_refused_and_attributed(up: Up, tmp_path: Path) -> None:
    with misbehaving(up, {1: {1: "keep", **FAULTS}}):
        records = run(up, tmp_path / "run", num_server_rounds=8, **{"strategy.max-update-norm": 50.0})
    for record in records:
        number = record["round"]
        if number in FAULTS:
            assert record["participants"] == [0, 2], record
            assert REASONS[number] in record["refused"]["1"]
            assert "\n" not in record["refused"]["1"]
        else:
            assert record["participants"] == [0, 1, 2], record
            assert record["refused"] == {}


def test_too_few_sound_updates_end_the_run_and_the_checkpoint_goes_on(up: Up, tmp_path: Path) -> None:
    undisturbed, disturbed = tmp_path / "undisturbed", tmp_path / "disturbed"
    run(up, undisturbed, num_server_rounds=3)
    too_few = pytest.raises(RunFailed, match=r"round 3: 1 valid updates, min-train-nodes = 2 .*holds a NaN")
    with misbehaving(up, {0: {3: "nan"}, 2: {3: "nan"}}), too_few:
        run(up, disturbed, num_server_rounds=3)
    assert not (disturbed / "adapter").exists()
    run(up, disturbed, num_server_rounds=3, resume=True)
    assert adapter(disturbed) == adapter(undisturbed)


def test_a_slow_node_is_not_waited_for_and_takes_part_again(up: Up, tmp_path: Path) -> None:
    with misbehaving(up, {0: {2: "slow-110"}}):
        records = run(up, tmp_path / "run", num_server_rounds=4, round_timeout=90)
    assert records[1]["participants"] == [1, 2]
    assert "no reply" in records[1]["refused"]["0"]
    assert records[-1]["participants"] == [0, 1, 2]
    late = [record["late"] for record in records if "late" in record]
    assert late == [{"0": "its reply to round 2 came after that had ended"}]


def test_rounds_of_a_buffer_go_on_without_a_slow_node_and_use_what_it_brings(up: Up, tmp_path: Path) -> None:
    keys = {"devices.buffer-size": 2, "devices.in-flight": 3, "num_server_rounds": 30}
    with misbehaving(up, {0: {1: "slow-20"}}):
        records = run(up, tmp_path / "run", **keys)
    first = next(record["round"] for record in records if 0 in record["participants"])
    assert first > 1
    assert records[first - 1]["staleness"]["0"] == first - 1
    assert all(record["participants"] == [1, 2] for record in records[: first - 1])
    assert [record["refused"] for record in records] == [{}] * len(records)
    assert sum(0 in record["participants"] for record in records) > 1, "it is asked again"
