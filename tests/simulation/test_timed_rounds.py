"""Rounds in simulated time: timelines by hand, who is waited for, and the bits of a round that waits."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Message

import strategies
from fedlora.config import DeviceProfile, DevicesConfig, from_flat
from fedlora.errors import ConfigError, NotApplicable, RunFailed
from fedlora.server.callbacks import Tell
from fedlora.server.directory import RunDirectory
from fedlora.server.federated_run import FederatedRun
from fedlora.simulation.arrivals import Arrivals, wait_for
from fedlora.simulation.devices import ClientTask, Devices
from fedlora.simulation.in_process import InProcessEngine
from fedlora.simulation.timed_grid import TimedGrid
from strategies.flower import FactorStrategy
from tests.federation.fake_grid import Client, FakeGrid, ToyClient
from tests.federation.small import RULES_AND_CODECS, bits, initial_arrays, watched

FIVE = [
    ClientTask(p, down, train, up)
    for p, (down, train, up) in enumerate([(1, 2, 3), (2, 8, 2), (1, 1, 1), (4, 30, 6), (0, 4, 1)])
]
"""In 6, 12, 3, 40 and 5 seconds."""


def timed(inner: FakeGrid, devices: Devices, **options: Any) -> TimedGrid:
    config = options.pop("config", DevicesConfig(profiles="equal"))
    named = {"timeout": 100.0, "seed": 0, "tokens": lambda p: 10.0, "bytes_up": lambda p: 0} | options
    return TimedGrid(
        inner=inner, devices=devices, config=config, fraction=named.pop("fraction", 1.0),
        trains_anyway=named.pop("trains_anyway", lambda task: False), **named,
    )  # fmt: skip


def speeds(*tokens_per_second: float) -> Devices:
    return Devices.listed([DeviceProfile(tokens_per_second=speed) for speed in tokens_per_second])


# --- who is waited for ----------------------------------------------------------------------------------


def test_a_round_that_waits_for_all_ends_with_the_last() -> None:
    found = wait_for(FIVE, deadline=100, wanted=5)
    assert found == Arrivals(40, {2: 3, 4: 5, 0: 6, 1: 12, 3: 40}, {})
    assert list(found.taken) == [2, 4, 0, 1, 3]


def test_a_deadline_leaves_out_who_is_late_and_ends_the_round() -> None:
    found = wait_for(FIVE, deadline=12, wanted=5)
    assert (found.seconds, list(found.taken)) == (12, [2, 4, 0, 1])
    assert found.lost == {3: "late: it takes 40 s, the deadline is 12 s"}


def test_the_first_that_answer_are_enough() -> None:
    found = wait_for(FIVE, deadline=100, wanted=2)
    assert (found.seconds, found.taken) == (5, {2: 3, 4: 5})
    assert found.lost[0] == "not waited for: 2 others were faster than its 6 s"


def test_who_has_vanished_costs_the_deadline_unless_enough_others_answer() -> None:
    tasks = [*FIVE[:3], ClientTask(3, 1, 1, 1, vanishes=2.0)]
    assert wait_for(tasks, deadline=60, wanted=4) == Arrivals(
        60, {2: 3, 0: 6, 1: 12}, {3: "vanished after 2 s"}
    )
    assert wait_for(tasks, deadline=60, wanted=3).seconds == 12


# --- whole rounds ---------------------------------------------------------------------------------------


def federate(client: Client, grid_of: Callable[[FakeGrid], Any], rounds: int = 3, **options: Any) -> Any:
    strategy = FactorStrategy(
        strategies.make_rule("fedavg"), scaling=2.0, seed=3, fraction_evaluate=0.0, **options
    )
    reports = watched(strategy)
    grid = grid_of(FakeGrid(range(5), client))
    strategy.start(grid, initial_arrays(), num_rounds=rounds)
    return strategy, reports, grid


def test_where_everybody_is_waited_for_the_bits_are_those_without_simulated_time(tmp_path: Path) -> None:
    plain, _, _ = federate(ToyClient(tmp_path / "a"), lambda inner: inner)
    waited, _, grid = federate(
        ToyClient(tmp_path / "b"), lambda inner: timed(inner, speeds(1, 5, 0.2, 7, 2), timeout=1e6)
    )
    assert bits(plain) == bits(waited)
    assert grid.seconds == 3 * 10 / 0.2
    assert list(grid.arrivals) == [3, 1, 4, 0, 2]


def test_who_is_late_is_named_and_does_not_train(tmp_path: Path) -> None:
    trained: Counter[int] = Counter()

    def client(message: Message, partition: int) -> Message | None:
        trained[partition] += 1
        return ToyClient(tmp_path)(message, partition)

    _, reports, grid = federate(
        client,
        lambda inner: timed(
            inner, speeds(1, 5, 0.2, 7, 2), config=DevicesConfig(profiles="equal", deadline=20)
        ),
    )
    assert [report.participants for report in reports] == [[0, 1, 3, 4]] * 3
    assert reports[0].refused == {2: "late: it takes 50 s, the deadline is 20 s"}
    assert grid.seconds == 60
    assert trained == Counter({0: 3, 1: 3, 3: 3, 4: 3})


def test_whose_work_counts_though_it_is_lost_trains_all_the_same(tmp_path: Path) -> None:
    toy, trained = ToyClient(tmp_path), Counter[int]()

    def client(message: Message, partition: int) -> Message | None:
        trained[partition] += 1
        return toy(message, partition)

    config = DevicesConfig(profiles="equal", deadline=20)
    _, reports, _ = federate(
        client,
        lambda inner: timed(
            inner, speeds(1, 5, 0.2, 7, 2), config=config, trains_anyway=lambda task: task.trains
        ),
        rounds=1,
    )
    assert reports[0].participants == [0, 1, 3, 4]
    assert trained[2] == 1


@pytest.mark.parametrize(
    ("vanishes", "begins", "trains"),
    [(None, True, True), (0.5, False, False), (1.5, True, False), (3.5, True, True)],
    ids=["never", "before training", "during it", "after it"],
)
def test_who_vanishes_has_trained_as_far_as_it_came(
    vanishes: float | None, begins: bool, trains: bool
) -> None:
    task = ClientTask(0, down=1, train=2, up=1, vanishes=vanishes)
    assert (task.begins, task.trains) == (begins, trains)


def test_who_vanishes_before_it_has_trained_does_not_train_anyway(tmp_path: Path) -> None:
    toy, trained = ToyClient(tmp_path), list[int]()

    def client(message: Message, partition: int) -> Message | None:
        trained.append(partition)
        return toy(message, partition)

    devices = Devices.listed([DeviceProfile(tokens_per_second=1, failure=0.999)] * 5)
    devices = replace(devices, kinds=[*devices.kinds[:4], DeviceProfile(tokens_per_second=1)])
    _, reports, _ = federate(
        client,
        lambda inner: timed(inner, devices, trains_anyway=lambda task: task.trains),
        rounds=1,
    )
    assert len(reports[0].refused) == 4
    assert trained == [4], "they have no uploads to vanish in"


def test_of_those_asked_the_first_are_taken(tmp_path: Path) -> None:
    config = DevicesConfig(profiles="equal", over_selection=1.25)
    _, reports, grid = federate(
        ToyClient(tmp_path),
        lambda inner: timed(inner, speeds(1, 5, 0.2, 7, 2), config=config, fraction=0.8),
        fraction_train=1.0,
    )
    assert [report.participants for report in reports] == [[0, 1, 3, 4]] * 3
    assert grid.seconds == 30


def test_how_many_must_be_there_is_not_how_many_are_waited_for(tmp_path: Path) -> None:
    config = DevicesConfig(profiles="equal", over_selection=1.25)
    _, reports, grid = federate(
        ToyClient(tmp_path),
        lambda inner: timed(inner, speeds(1, 5, 0.2, 7, 2), config=config, fraction=0.8, least=5),
        fraction_train=1.0,
    )
    assert [report.participants for report in reports] == [[0, 1, 3, 4]] * 3
    assert grid.seconds == 30


def test_while_too_few_are_there_time_passes(tmp_path: Path) -> None:
    devices = Devices.listed([DeviceProfile(tokens_per_second=10, availability=0.3)] * 5)
    _, reports, grid = federate(ToyClient(tmp_path), lambda inner: timed(inner, devices, least=4), rounds=2)
    waited = []
    for server_round in (1, 2):
        for attempt in range(1000):
            there = devices.present(np.arange(5), server_round, attempt, 0).tolist()
            if len(there) >= 4:
                break
        waited.append((attempt, there))
    assert [report.participants for report in reports] == [there for _, there in waited]
    assert grid.seconds == sum(60 * attempt + 1 for attempt, _ in waited)
    with pytest.raises(RunFailed, match="fewer than 6 clients are there in 17 simulated hours"):
        federate(ToyClient(tmp_path / "b"), lambda inner: timed(inner, devices, least=6), rounds=1)


@pytest.mark.parametrize(("name", "upload"), RULES_AND_CODECS)
def test_the_bytes_of_a_reply_are_known_before_it_comes(name: str, upload: str, tmp_path: Path) -> None:
    toy, expected, rule = ToyClient(tmp_path), Counter[int](), strategies.make_rule(name)
    try:
        strategy = FactorStrategy(rule, scaling=2.0, seed=3, fraction_evaluate=0.0, upload=upload)
    except NotApplicable:
        return

    def client(message: Message, partition: int) -> Message | None:
        expected[0] += strategy.transport.expected_bytes(message.metadata.dst_node_id)
        return toy(message, partition)

    reports = watched(strategy)
    strategy.start(FakeGrid(range(3), client), initial_arrays(), num_rounds=2)
    sent = sum(report.bytes_up for report in reports)
    assert sent == expected[0] or (upload == "segments" and 0 <= expected[0] - sent <= 0.3 * sent)


# --- memory -----------------------------------------------------------------------------------------------

SMALL = {
    "model.name": "tiny", "data.name": "synthetic", "data.partitioner": "iid", "data.num-partitions": 4,
    "strategy.name": "flora", "engine.name": "in-process", "train.local-steps": 1, "num-server-rounds": 1,
    "lora.rank": 8,
}  # fmt: skip


def test_a_device_that_cannot_hold_its_rank_is_told_before_it_trains(tmp_path: Path) -> None:
    """What one run of an engine leaves in the model does not count in the next."""
    engine = InProcessEngine()

    def ask(path: Path, memory: dict[str, float], **keys: Any) -> list[dict[str, Any]]:
        kinds = {name: {"memory-gb": gigabytes} for name, gigabytes in memory.items()}
        groups = [
            {"partitions": "0-1", "device": "small", "rank": 1},
            {"partitions": "2-3", "device": "large"},
        ]
        given = {"devices.profiles": json.dumps(kinds), "client-groups": json.dumps(groups)}
        session = engine.session(from_flat(SMALL | given | keys), path)
        FederatedRun(
            session, RunDirectory(path), [Tell(lambda record: None, lambda _, why: told.append(why))]
        ).run()
        return [json.loads(line) for line in (path / "rounds.jsonl").read_text().splitlines()]

    told: list[Any] = []
    base = engine.runtime(from_flat(SMALL)).model.base_bytes()
    with pytest.raises(ConfigError, match="devices: only 0 clients can take part"):
        ask(tmp_path / "none", {"small": base / 1e9, "large": base / 1e9})
    assert not told
    numbers = {rank: 16 * _trained(engine, rank) for rank in (1, 8)}
    enough = {"small": (base + numbers[1]) / 1e9, "large": (base + numbers[8]) / 1e9}
    for path in (tmp_path / "first", tmp_path / "after larger ones"):
        (record,) = ask(path, enough)
        assert record["participants"] == [0, 1, 2, 3]
    (record,) = ask(tmp_path / "less", enough | {"large": enough["large"] - 1e-9})
    assert record["participants"] == [0, 1]
    assert set(told[-1]) == {2, 3}
    assert record["left_out"]["2"].startswith("its device has ")
    few = {"devices.buffer-size": 2, "devices.in-flight": 3}
    with pytest.raises(ConfigError, match=r"devices\.in-flight = 3: only 2 clients can take part, of the "):
        ask(tmp_path / "few", enough | {"large": enough["large"] - 1e-9}, **few)


def _trained(engine: InProcessEngine, rank: int) -> int:
    """Numbers of A, B and head by the shapes of the layers alone."""
    model = engine.runtime(from_flat(SMALL)).model
    layers = sum(rank * (spec.out_features + spec.in_features) for spec in model.modules.values())
    return layers + sum(tensor.numel() for tensor in model.initial_head.values())
