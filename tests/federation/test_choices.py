"""Clients choose directions, and a server holds them to it: whoever lies is one line, the others count."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import ConfigRecord, Message

import strategies
from fedlora import wire
from fedlora.core.directions import most_changed
from fedlora.core.factors import Tensors
from fedlora.core.state import ClientSpec, State
from fedlora.wire.changed import PLACE
from strategies.flower import FactorStrategy
from strategies.transport import Transport
from tests.federation.fake_grid import FakeGrid, ToyClient
from tests.federation.small import MODULES, initial_arrays, watched

RANK, OWN = 3, 1
BUDGET = OWN * len(MODULES)


class Chooses(ToyClient):
    """Sends its largest changes; in partitions that are named, what it likes."""

    def __init__(self, root: Path, lies: dict[int, str]) -> None:
        super().__init__(root)
        self.lies = lies

    def __call__(self, message: Message, partition: int) -> Message | None:
        reply = super().__call__(message, partition)
        assert reply is not None
        order, lie = wire.decode_instruction(message.content), self.lies.get(partition, "")
        assert order.choose == BUDGET
        said, codec = wire.decode_reply(reply.content), order.codec
        start = wire.to_peft(self.starts[partition], {"classifier.weight": torch.zeros(2, 6)}, order.uploaded)
        arrays = codec.decode(start, said.arrays)
        if lie == "none is a number":
            arrays = {name: t * torch.nan if ".lora_" in name else t for name, t in arrays.items()}
        if lie not in ("sends all", "another codec", "knows no choice"):
            moved = wire.from_peft(arrays).over(self.starts[partition])
            chosen = most_changed(self.starts[partition], moved, order.choose)
            arrays |= wire.to_peft(chosen, {}, order.uploaded)
        told = wire.encode_reply(replace(said, arrays=arrays, start=start), order)
        if lie == "another codec":
            told[wire.CONFIG]["upload"] = "int4"
        if lie == "knows no choice":
            told = wire.encode_reply(replace(said, arrays=arrays, answers="", holds=()))
            told[wire.CONFIG] = ConfigRecord({"status": wire.OK})
        if lie == "doubles":
            told[wire.ARRAYS] = wire.to_record(doubled(wire.from_record(told[wire.ARRAYS], coded=True)), None)
        return Message(told, reply_to=message)


def doubled(arrays: Tensors) -> Tensors:
    """One direction told of twice."""
    place = next(name for name, tensor in arrays.items() if name.endswith(PLACE) and len(tensor))
    name = place.removesuffix(PLACE)
    axis = 0 if "lora_A" in name else 1
    part = arrays[name].narrow(axis, 0, 1)
    return arrays | {name: torch.cat([part, part], dim=axis), place: arrays[place][:1].repeat(2)}


def run(path: Path, lies: dict[int, str], clients: int = 6, **options: Any) -> tuple[FactorStrategy, Any]:
    strategy = FactorStrategy(
        strategies.make_rule("lora-a2"), scaling=2.0, seed=3, fraction_evaluate=0.0,
        client_spec=lambda partition: ClientSpec(partition_id=partition, rank=OWN, scaling=2.0), **options,
    )  # fmt: skip
    reports = watched(strategy)
    strategy.start(FakeGrid(range(clients), Chooses(path, lies)), initial_arrays(RANK), num_rounds=2)
    return strategy, reports


LIES = {
    1: ("sends all", f"changes {RANK * len(MODULES)} directions, of which it was to choose {BUDGET}"),
    2: ("doubles", "its directions do not rise"),
    3: ("none is a number", "holds a NaN or an infinity"),
    4: ("another codec", "its arrays are written as 'int4', asked for was 'changed'"),
    5: ("knows no choice", "need fedlora's ClientApp"),
}


def test_each_lie_is_one_line_and_the_honest_one_counts(tmp_path: Path) -> None:
    strategy, reports = run(tmp_path / "all", {partition: lie for partition, (lie, _) in LIES.items()})
    for report in reports:
        assert report.participants == [0]
        assert report.refused.keys() == LIES.keys()
        for partition, (_, words) in LIES.items():
            assert words in report.refused[partition]
            assert "\n" not in report.refused[partition]
    honest, alone = run(tmp_path / "alone", {}, clients=1)
    assert alone[0].refused == {}
    assert strategy.state is not None
    assert honest.state is not None
    for name, adapter in honest.state.adapters.items():
        for factor, tensor in adapter.tensors().items():
            assert torch.equal(strategy.state.adapters[name].tensors()[factor], tensor)


@pytest.mark.parametrize("upload", ["int8", "float16"])
def test_other_codecs_may_be_named(upload: str, tmp_path: Path) -> None:
    """One that rounds what did not change is not held to a count that it does not keep."""
    _, reports = run(tmp_path, {}, clients=2, upload=upload)
    assert [report.refused for report in reports] == [{}, {}]


def test_what_a_budget_takes_at_most_is_known_before_it_is_sent() -> None:
    """Round 1: two columns of B, at most of the longer ones, a byte for each, and the head."""
    tensors = wire.from_peft(wire.from_record(initial_arrays(RANK)))
    state = State(round=0, adapters=tensors.lora(2.0), head=tensors.head, seed=3)
    spec = ClientSpec(partition_id=0, rank=OWN, scaling=2.0)
    transport = Transport("kaiming", upload="changed")
    transport.open(())
    transport.add(0, 7, strategies.make_rule("lora-a2").broadcast(state, spec))
    longest = max(o for o, _ in MODULES.values())
    assert transport.expected_bytes(7) == BUDGET * (4 * longest + 1) + 4 * 12
