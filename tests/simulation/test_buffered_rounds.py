"""Rounds that do not wait: a timeline by hand, and what late updates add up to."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Message

import strategies
from fedlora.config import DeviceProfile, DevicesConfig
from fedlora.core.factors import as_product
from fedlora.simulation.devices import Devices
from fedlora.simulation.timed_grid import TimedGrid
from strategies.buffered import BufferedStrategy
from strategies.flower import FactorStrategy
from strategies.late import FACTORS, PRODUCT
from strategies.replies import validate_reply
from tests.federation.fake_grid import FakeGrid, ToyClient
from tests.federation.small import MODULES, bits, initial_arrays, watched

LATE = [name for name, rule in strategies.RULES.items() if rule.facts.stale in (FACTORS, PRODUCT)]
every_late_rule = pytest.mark.parametrize("name", LATE)
SECONDS = (4.0, 6.0, 7.0, 10.0, 25.0)


def timed(client: Any, seconds: tuple[float, ...] = SECONDS, **device: Any) -> TimedGrid:
    return TimedGrid(
        inner=FakeGrid(range(len(seconds)), client),
        devices=Devices.listed([DeviceProfile(tokens_per_second=1.0, **device)] * len(seconds)),
        config=DevicesConfig(profiles="equal"),
        timeout=1000.0,
        seed=0,
        tokens=lambda p: seconds[p],
        bytes_up=lambda p: 0,
        trains_anyway=lambda task: False,
        fraction=1.0,
    )


def buffered(name: str, **options: Any) -> BufferedStrategy:
    given = {"scaling": 2.0, "seed": 3, "fraction_evaluate": 0.0, "in_flight": 5, "buffer_size": 2} | options
    return BufferedStrategy(strategies.make_rule(name), **given)


def test_a_timeline_of_five_clients_by_hand(tmp_path: Path) -> None:
    """Two updates fill the buffer, all five clients are at work.

    At 4 client 0 is done and, as nobody is free, its place stays empty; at 6 client 1 fills the buffer. Both
    start again from version 1 and are due at 10 and 12. At 7 client 2 is done; at 10 both 3 and 0 are, and 3
    started first. Then come 0 (10) and 1 (12).
    """
    strategy = buffered("fedavg")
    reports, grid = watched(strategy), timed(ToyClient(tmp_path))
    seen: list[tuple[float, dict[int, float], dict[int, int]]] = []
    arrays = strategy.open(initial_arrays())
    assert arrays is not None
    for _ in strategy.rounds(grid, last=3):
        seen.append((grid.seconds, grid.arrivals, grid.staleness))
    assert seen == [
        (6.0, {0: 4.0, 1: 6.0}, {0: 0, 1: 0}),
        (10.0, {2: 7.0, 3: 10.0}, {2: 1, 3: 1}),
        (12.0, {0: 10.0, 1: 12.0}, {0: 1, 1: 1}),
    ]
    assert [report.participants for report in reports] == [[0, 1], [2, 3], [0, 1]]


def test_a_place_that_is_free_is_taken_at_once(tmp_path: Path) -> None:
    """Two places: whoever is done is replaced by somebody else, from the version of that moment."""
    starts: list[tuple[int, int]] = []

    def client(message: Message, partition: int) -> Message | None:
        starts.append((int(message.metadata.group_id), partition))
        return ToyClient(tmp_path)(message, partition)

    strategy, grid = buffered("fedavg", in_flight=2, buffer_size=2), timed(client)
    strategy.start(grid, initial_arrays(), num_rounds=4)
    by_round = {n: [p for m, p in starts if m == n] for n in (1, 2, 3)}
    assert len(by_round[1]) == 3, "two at the beginning, one in place of the first that was done"
    assert all(len(by_round[n]) == 2 for n in (2, 3))


def test_in_the_last_round_nobody_trains_in_vain(tmp_path: Path) -> None:
    trained: list[int] = []

    def client(message: Message, partition: int) -> Message | None:
        trained.append(partition)
        return ToyClient(tmp_path)(message, partition)

    strategy = buffered("fedavg")
    strategy.start(timed(client), initial_arrays(), num_rounds=1)
    assert sorted(trained) == [0, 1]


@every_late_rule
def test_with_equal_devices_and_a_full_buffer_the_bits_are_those_of_rounds_that_wait(
    name: str, tmp_path: Path
) -> None:
    waits = FactorStrategy(strategies.make_rule(name), scaling=2.0, seed=3, fraction_evaluate=0.0)
    waits.start(FakeGrid(range(5), ToyClient(tmp_path / "a")), initial_arrays(), num_rounds=3)
    does_not = buffered(name, buffer_size=5)
    does_not.start(timed(ToyClient(tmp_path / "b"), (3.0,) * 5), initial_arrays(), num_rounds=3)
    assert bits(waits) == bits(does_not)


@pytest.mark.parametrize("name", ["fedavg", "flora"])
def test_the_order_of_computation_never_changes_the_result(name: str, tmp_path: Path) -> None:
    """One client after the other, or all together and the last first."""

    def grid(path: Path, shuffled: bool) -> TimedGrid:
        found = timed(ToyClient(path))
        send = found.inner.send_and_receive

        def alone(messages: Any, *, timeout: float | None = None) -> list[Message]:
            order = np.random.default_rng(1).permutation(len(messages))
            return [reply for i in order for reply in send([list(messages)[i]], timeout=timeout)]

        if shuffled:
            found.inner.send_and_receive = alone  # type: ignore[method-assign]
        return found

    results = []
    for shuffled in (False, True):
        strategy = buffered(name)
        strategy.start(grid(tmp_path / str(shuffled), shuffled), initial_arrays(), num_rounds=5)
        results.append(bits(strategy))
    assert results[0] == results[1]


@every_late_rule
@pytest.mark.parametrize("discount", [True, False])
def test_late_updates_add_up_to_what_the_paper_says(name: str, discount: bool, tmp_path: Path) -> None:
    """It is x + sum_k p_k s(tau_k) Delta_k of factors, or of products, from what clients were sent."""
    told: dict[tuple[int, int], Any] = {}
    started: dict[tuple[int, int], Any] = {}
    toy = ToyClient(tmp_path)
    strategy = buffered(name, discount=discount)

    def client(message: Message, partition: int) -> Message | None:
        return toy(message, partition)

    grid = timed(client)
    compute = grid.compute

    def watching(messages: Sequence[Message], *, lost: set[int], timeout: float) -> list[Message]:
        replies = compute(messages, lost=lost, timeout=timeout)
        assert strategy.state is not None
        strategy.transport.settle(replies)
        for request in strategy.transport.requests:
            if request.reply is None:  # nobody waits for it
                continue
            key = request.partition_id, strategy.state.round
            started[key] = request.broadcast
            told[key] = validate_reply(request, strategy.rule.facts, weighted_by_key="num-examples")
            request.reply = None
            request.bytes_up = 0
        return replies

    grid.compute = watching  # type: ignore[method-assign]
    strategy.open(initial_arrays())
    before = strategy.state
    assert before is not None
    late = 0
    for _ in strategy.rounds(grid, last=5):
        after = strategy.state
        assert after is not None
        who = {p: (p, before.round - tau) for p, tau in grid.staleness.items()}
        total = sum(told[key].weight for key in who.values())
        share = {
            p: told[key].weight / total * ((1 + grid.staleness[p]) ** -0.5 if discount else 1.0)
            for p, key in who.items()
        }
        late += sum(grid.staleness.values())
        for module, start in before.adapters.items():
            if strategy.rule.facts.stale == PRODUCT:
                asked = torch.zeros(MODULES[module])
                for p, key in who.items():
                    asked += share[p] * as_product(told[key].adapters[module]).dense()
                moved = after.product(module).dense() - before.product(module).dense()
                torch.testing.assert_close(moved, asked, atol=1e-5, rtol=1e-4)
                continue
            for letter in strategy.rule.facts.trained:
                asked = start.tensors()[letter].double()
                for p, key in who.items():
                    ends, begins = (d[key].adapters[module].tensors()[letter] for d in (told, started))
                    asked = asked + share[p] * (ends.double() - begins.double())
                end = after.adapters[module].tensors()[letter].double()
                torch.testing.assert_close(end, asked, atol=1e-6, rtol=1e-5)
        before = after
    assert late > 0


def test_an_update_that_is_too_old_is_dropped_and_named(tmp_path: Path) -> None:
    strategy = buffered("fedavg", max_staleness=1, buffer_size=2)
    reports = watched(strategy)
    strategy.start(timed(ToyClient(tmp_path), (4.0, 5.0, 4.5, 6.0, 14.0)), initial_arrays(), num_rounds=6)
    refused = {p: why for report in reports for p, why in report.refused.items()}
    assert refused.keys() == {4}
    assert refused[4].endswith("versions old, devices.max-staleness = 1")


def test_updates_that_are_too_old_take_no_place(tmp_path: Path) -> None:
    """With five at work and a buffer of one ordinary updates are four versions old."""
    strategy = buffered("fedavg", max_staleness=2, buffer_size=1)
    reports = watched(strategy)
    strategy.start(timed(ToyClient(tmp_path)), initial_arrays(), num_rounds=8)
    assert all(len(report.participants) == 1 for report in reports)
    assert any("versions old" in why for report in reports for why in report.refused.values())


def test_a_client_that_lost_a_part_is_served_in_the_same_round(tmp_path: Path) -> None:
    toy = ToyClient(tmp_path)

    def client(message: Message, partition: int) -> Message | None:
        if partition == 0 and int(message.metadata.group_id) == 2:
            shutil.rmtree(tmp_path / "0", ignore_errors=True)
        return toy(message, partition)

    strategy = buffered("flora")
    reports = watched(strategy)
    strategy.start(timed(client), initial_arrays(), num_rounds=4)
    assert [report.refused for report in reports] == [{}] * 4
    assert any(0 in report.participants for report in reports[2:])


def test_time_never_goes_back(tmp_path: Path) -> None:
    strategy, grid = (
        buffered("fedavg", buffer_size=1, in_flight=3),
        timed(ToyClient(tmp_path), availability=0.3),
    )
    grid.least = 3
    strategy.open(initial_arrays())
    times = [grid.seconds for _ in strategy.rounds(grid, last=8)]
    assert times == sorted(times)
    assert times[-1] > 60


def test_who_vanishes_is_given_up_and_replaced(tmp_path: Path) -> None:
    strategy = buffered("fedavg", in_flight=2, buffer_size=2)
    reports, grid = watched(strategy), timed(ToyClient(tmp_path), SECONDS * 8, failure=0.4)
    grid.config = DevicesConfig(profiles="equal", deadline=30.0)
    strategy.start(grid, initial_arrays(), num_rounds=8)
    gone = [why for report in reports for why in report.refused.values()]
    assert gone
    assert all(why.startswith("vanished after ") for why in gone)
    assert all(len(report.participants) == 2 for report in reports)


def test_updates_that_cannot_be_used_are_named_when_they_arrive(tmp_path: Path) -> None:
    toy = ToyClient(tmp_path)

    def client(message: Message, partition: int) -> Message | None:
        if partition == 3:
            raise RuntimeError("the disk is full")
        return toy(message, partition)

    strategy = buffered("flora")
    reports = watched(strategy)
    strategy.start(timed(client), initial_arrays(), num_rounds=3)
    assert [report.refused for report in reports] == [{}, {3: "RuntimeError: the disk is full"}, {}]
    assert [report.participants for report in reports] == [[0, 1], [0, 2], [0, 1]], "its place was filled"
