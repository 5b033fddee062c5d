"""Replies that are refused, counted, and harm nobody."""

from __future__ import annotations

from pathlib import Path

import pytest
from flwr.app import Message, RecordDict

from fedlora import wire
from fedlora.errors import RunFailed
from strategies import FedAvg, FedSVD
from tests.federation.fake_grid import FakeGrid, ToyClient
from tests.federation.small import bits, initial_arrays, watched


def spoiled(kind: str, reply: Message) -> RecordDict:
    """A reply made wrong in one way."""
    tensors = wire.from_record(reply.content["arrays"])
    key = "base_model.model.encoder.q.lora_B.weight"
    if kind == "nan":
        tensors[key][0, 0] = float("nan")
    elif kind == "shape":
        tensors[key] = tensors[key][:, :2]
    elif kind == "missing":
        del tensors[key]
    elif kind == "foreign":
        tensors["base_model.model.other.lora_B.weight"] = tensors[key]
    elif kind == "far":
        tensors[key] = tensors[key] + 1.0
    elif kind == "head":
        del tensors["base_model.model.classifier.weight"]
    reply.content["arrays"] = wire.to_record(tensors)
    if kind == "weight":
        reply.content["metrics"]["num-examples"] = -5
    if kind == "no arrays":
        del reply.content["arrays"]
    if kind == "blob":
        array = reply.content["arrays"][key]
        array.data = array.data[: len(array.data) // 2]
    return reply.content


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("nan", "encoder.q: lora_B holds a NaN"),
        ("shape", "encoder.q: lora_B has shape (12, 2), expected (12, 3)"),
        ("far", "moved by"),
        ("missing", "encoder.q: lora_B is missing"),
        ("foreign", "unknown module other"),
        ("head", "classifier.weight is missing"),
        ("weight", "'num-examples' = -5.0"),
        ("no arrays", "no record 'arrays'"),
        ("blob", "cannot be decoded"),
        ("raises", "boom"),
        ("silent", "no reply"),
    ],
)
def test_a_bad_reply_is_refused_counted_and_harms_nobody(kind: str, words: str, tmp_path: Path) -> None:
    toy = ToyClient(tmp_path)

    def client(message: Message, partition: int) -> Message | None:
        if partition == 1 and kind == "raises":
            raise RuntimeError("boom")
        reply = toy(message, partition)
        if partition == 1 and kind == "silent":
            return None
        if partition == 1 and reply is not None:
            return Message(spoiled(kind, reply), reply_to=message)
        return reply

    strategy = FedAvg(scaling=2.0, max_update_norm=5.0)
    without = FedAvg(scaling=2.0, partitions={0, 2})
    reports = watched(strategy)
    strategy.start(FakeGrid(range(3), client), initial_arrays(), num_rounds=1)
    assert words in reports[0].refused[1]
    assert "\n" not in reports[0].refused[1]
    without.start(FakeGrid(range(3), toy), initial_arrays(), num_rounds=1)
    assert bits(strategy) == bits(without)


def test_a_reply_of_another_round_is_refused(tmp_path: Path) -> None:
    toy, kept = ToyClient(tmp_path), []

    def client(message: Message, partition: int) -> Message | None:
        reply = toy(message, partition)
        if partition != 1 or reply is None:
            return reply
        kept.append(reply.content)
        return Message(kept[0], reply_to=message)

    strategy = FedAvg(scaling=2.0)
    reports = watched(strategy)
    strategy.start(FakeGrid(range(3), client), initial_arrays(), num_rounds=2)
    assert [report.refused for report in reports] == [
        {},
        {1: "answers round 1 of run -, not round 2 of run -"},
    ]


def test_too_few_valid_updates_fail_the_run_and_keep_the_state(tmp_path: Path) -> None:
    toy = ToyClient(tmp_path)

    def client(message: Message, partition: int) -> Message | None:
        return (
            None
            if int(message.content["config"]["server-round"]) == 2 and partition
            else toy(message, partition)
        )

    strategy = FedAvg(scaling=2.0, min_train_nodes=2)
    with pytest.raises(RunFailed, match="round 2: 1 valid updates, min-train-nodes = 2"):
        strategy.start(FakeGrid(range(3), client), initial_arrays(), num_rounds=3)
    assert strategy.state is not None
    assert strategy.state.round == 1


def test_a_frozen_factor_that_comes_back_changed_is_refused(tmp_path: Path) -> None:
    toy = ToyClient(tmp_path)

    def trains_both(message: Message, partition: int) -> Message | None:
        reply = toy(message, partition)
        assert reply is not None
        tensors = wire.from_record(reply.content["arrays"])
        for name, start in toy.starts[partition].items():
            tensors[wire.key_of(name, "A")] = start.A + 1.0
        reply.content["arrays"] = wire.to_record(tensors)
        return reply

    strategy = FedSVD(scaling=2.0)
    with pytest.raises(RunFailed, match="lora_A came back changed"):
        strategy.start(FakeGrid(range(2), trains_both), initial_arrays(), num_rounds=1)
