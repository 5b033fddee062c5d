"""Late replies of real nodes: taken by rounds of a buffer, counted and attributed by rounds that wait."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from flwr.app import Error, Message

import strategies
from fedlora.config import from_flat
from fedlora.deployment.superlink.polling_grid import PollingGrid
from fedlora.errors import ConfigError, NotApplicable, RunFailed
from strategies.arriving import ArrivingStrategy
from strategies.flower import FactorStrategy
from tests.federation.fake_grid import Client, FakeGrid, ToyClient
from tests.federation.small import bits, initial_arrays, watched


class Mailbox(FakeGrid):
    """Nodes whose replies are there after so many questions for messages; None: never.

    Args:
        client: answers at once.
        delay: of a partition's reply to its message number n, from 0.
    """

    def __init__(self, client: Client, delay: Callable[[int, int], int | None], nodes: int = 3) -> None:
        super().__init__(range(nodes), client)
        self.delay = delay
        self.questions = 0
        self.answers: dict[str, tuple[int, Message]] = {}
        self.asked: list[int] = []

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        sent = []
        for message in messages:
            message.metadata.__dict__["_message_id"] = str(uuid4())
            sent.append(message.metadata.message_id)
            partition = self.nodes[message.metadata.dst_node_id]
            wait = self.delay(partition, self.asked.count(partition))
            self.asked.append(partition)
            reply = self.client(message, partition)
            if wait is not None and reply is not None:
                self.answers[sent[-1]] = self.questions + wait, reply
        return sent

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        self.questions += 1
        there = [m for m in message_ids if m in self.answers and self.answers[m][0] <= self.questions]
        return [self.answers.pop(m)[1] for m in there]


def arriving(name: str = "fedavg", **options: Any) -> ArrivingStrategy:
    given = {"scaling": 2.0, "seed": 3, "fraction_evaluate": 0.0, "in_flight": 3, "buffer_size": 2}
    return ArrivingStrategy(strategies.make_rule(name), poll_seconds=0.001, **(given | options))


def slow(partition: int, number: int) -> int:
    """Client 0 takes long, the others are there at the next question."""
    return 12 if partition == 0 else 1


@pytest.mark.parametrize("name", ["fedavg", "flora"])
def test_a_full_buffer_of_all_has_the_bits_of_rounds_that_wait(name: str, tmp_path: Path) -> None:
    waits = FactorStrategy(strategies.make_rule(name), scaling=2.0, seed=3, fraction_evaluate=0.0)
    waits.start(FakeGrid(range(3), ToyClient(tmp_path / "a")), initial_arrays(), num_rounds=3)
    takes = arriving(name, buffer_size=3)
    takes.start(Mailbox(ToyClient(tmp_path / "b"), lambda p, n: 3 - p), initial_arrays(), num_rounds=3)
    assert bits(waits) == bits(takes)


def test_rounds_go_on_without_a_slow_node_and_take_its_update_when_it_comes(tmp_path: Path) -> None:
    strategy = arriving()
    reports = watched(strategy)
    strategy.start(Mailbox(ToyClient(tmp_path), slow), initial_arrays(), num_rounds=9)
    late = [report for report in reports if 0 in report.participants]
    assert late
    assert late[0].staleness[0] == late[0].server_round - 1 > 1
    assert [r.participants for r in reports[: late[0].server_round - 1]] == [[1, 2]] * (
        late[0].server_round - 1
    )
    assert all(not report.refused for report in reports)


def test_an_update_counts_after_its_client_has_lost_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each question for messages is a second; a place is lost after five."""
    grid = Mailbox(ToyClient(tmp_path), slow)
    monkeypatch.setattr("strategies.arriving.time.monotonic", lambda: float(grid.questions))
    strategy = arriving()
    reports = watched(strategy)
    strategy.start(grid, initial_arrays(), num_rounds=14, timeout=5.0)
    refused = {p: why for report in reports for p, why in report.refused.items()}
    assert refused == {0: "no reply after 5 s; it counts when it comes"}
    late = [report for report in reports if report.late]
    assert late[0].late == {0: "its reply to round 1 came after 12 s"}
    assert any(0 in report.participants for report in reports)
    assert grid.asked.count(0) <= 2, "nobody is asked while something of it is on its way"


def test_who_has_lost_its_place_makes_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two of four nodes never answer; there are two places."""
    grid = Mailbox(ToyClient(tmp_path), lambda p, n: None if p < 2 else 1, nodes=4)
    monkeypatch.setattr("strategies.arriving.time.monotonic", lambda: float(grid.questions))
    strategy = arriving(buffer_size=1, in_flight=2)
    reports = watched(strategy)
    strategy.start(grid, initial_arrays(), num_rounds=25, timeout=5.0)
    assert {0, 1} <= {*grid.asked}
    assert {p for report in reports for p in report.participants} == {2, 3}
    assert {p for report in reports for p in report.refused} == {0, 1}


def test_more_updates_than_the_buffer_holds_wait_for_the_next_round(tmp_path: Path) -> None:
    strategy = arriving(buffer_size=1)
    reports = watched(strategy)
    strategy.start(Mailbox(ToyClient(tmp_path), lambda p, n: 1), initial_arrays(), num_rounds=3)
    assert sorted(p for report in reports for p in report.participants) == [0, 1, 2]
    assert [set(report.staleness.values()) for report in reports] == [{0}, {1}, {2}]


def test_in_the_last_round_no_more_are_asked_than_are_needed(tmp_path: Path) -> None:
    grid = Mailbox(ToyClient(tmp_path), lambda p, n: 1)
    arriving().start(grid, initial_arrays(), num_rounds=1)
    assert len(grid.asked) == 2


def test_a_node_that_has_gone_frees_its_client(tmp_path: Path) -> None:
    toy, gone = ToyClient(tmp_path), list[int]()

    def client(message: Message, partition: int) -> Message | None:
        if partition == 0 and not gone:
            gone.append(partition)
            return Message(Error(3, "Node unavailable"), reply_to=message)
        return toy(message, partition)

    strategy = arriving(buffer_size=3)
    reports = watched(strategy)
    strategy.start(Mailbox(client, lambda p, n: 1), initial_arrays(), num_rounds=2)
    assert reports[0].refused == {0: "Node unavailable"}
    assert [report.participants for report in reports] == [[0, 1, 2]] * 2


def test_where_nothing_comes_the_round_ends_by_its_timeout(tmp_path: Path) -> None:
    grid = Mailbox(ToyClient(tmp_path), lambda p, n: None)
    with pytest.raises(RunFailed, match="round 1: 0 valid updates in the buffer, min-train-nodes = 1"):
        arriving().start(grid, initial_arrays(), num_rounds=1, timeout=0.02)


def test_a_round_is_timed_from_its_first_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Asking the nodes who they are takes longer than the timeout."""
    grid, asking = Mailbox(ToyClient(tmp_path), lambda p, n: 3), [0.0]
    monkeypatch.setattr("strategies.arriving.time.monotonic", lambda: grid.questions + asking[0])
    strategy = arriving()
    present = strategy._present

    def slowly(grid: Any, wanted: int) -> dict[int, int]:
        asking[0] += 100.0
        return present(grid, wanted)

    monkeypatch.setattr(strategy, "_present", slowly)
    reports = watched(strategy)
    strategy.start(grid, initial_arrays(), num_rounds=1, timeout=5.0)
    assert len(reports[0].participants) == 2


def test_a_client_that_lost_a_part_is_served_before_its_update_is_taken(tmp_path: Path) -> None:
    toy = ToyClient(tmp_path)

    def client(message: Message, partition: int) -> Message | None:
        if partition == 1 and int(message.metadata.group_id) == 3 and not lost:
            lost.append(partition)
            for file in sorted((tmp_path / "1").rglob("*"), reverse=True):
                file.unlink() if file.is_file() else file.rmdir()
        return toy(message, partition)

    lost: list[int] = []
    strategy = arriving("flora", buffer_size=3)
    reports = watched(strategy)
    strategy.start(Mailbox(client, lambda p, n: 1), initial_arrays(), num_rounds=3)
    assert lost
    assert [report.participants for report in reports] == [[0, 1, 2]] * 3
    assert strategy.selection.participations == {0: 3, 1: 3, 2: 3}, "it was no new order"


def test_rounds_that_wait_count_a_late_reply_and_say_whose_it_is(tmp_path: Path) -> None:
    """Client 0 answers round 1 when round 2 has ended; what it sent is counted and not aggregated."""
    inner = Mailbox(ToyClient(tmp_path), lambda p, n: 40 if (p, n) == (0, 0) else 1)
    grid = PollingGrid(inner, seconds=0.005)
    grid.partition_ids = inner.nodes  # type: ignore[attr-defined]
    strategy = FactorStrategy(strategies.make_rule("fedavg"), scaling=2.0, seed=3, fraction_evaluate=0.0)
    reports = watched(strategy)
    strategy.start(grid, initial_arrays(), num_rounds=60, timeout=0.05)
    assert reports[0].participants == [1, 2]
    assert reports[0].refused == {0: "no reply before the deadline"}
    (late,) = [report for report in reports if report.late]
    assert late.server_round > 1
    assert late.late == {0: "its reply to round 1 came after that had ended"}
    usual = next(r for r in reports if len(r.participants) == 3 and not r.late)
    assert late.bytes_up == usual.bytes_up * 4 // 3, "the late reply is counted, too"


@pytest.mark.parametrize(
    ("name", "options", "error", "why"),
    [
        ("fedsvd", {}, NotApplicable, "fedsvd cannot take late updates"),
        ("fedavg", {"in_flight": 1}, ConfigError, "must be at most devices.in-flight = 1"),
    ],
)
def test_what_cannot_be_is_refused(name: str, options: dict[str, Any], error: type, why: str) -> None:
    with pytest.raises(error, match=why):
        arriving(name, **options)


def test_a_buffer_needs_no_profiles_where_time_is_real() -> None:
    assert from_flat({"devices.buffer-size": 2, "devices.in-flight": 3}).devices.buffer_size == 2
