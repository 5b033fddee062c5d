"""``wire_dtype = "float16"``: half the bytes, and server and clients still hold the same bits."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from flwr.app import Message

import strategies
from fedlora import wire
from fedlora.core.state import ClientSpec
from strategies.flower import FactorStrategy
from strategies.precision import rounded_state
from tests.federation.fake_grid import FakeGrid, ToyClient
from tests.federation.small import initial_arrays, watched

MIXED = ("flexlora", "hetlora")
"""These give clients ranks of their own: what they start from is cut out of the state and rescaled."""
NAMES = ["fedavg", "ffa", "flora", "fedsvd", "flexlora", "fedex", "rolora", "hetlora", "fed-sb"]


class Half(ToyClient):
    """A client that answers in half precision."""

    def __call__(self, message: Message, partition: int) -> Message | None:
        reply = super().__call__(message, partition)
        assert reply is not None
        for name, record in reply.content.array_records.items():
            reply.content[name] = wire.to_record(wire.from_record(record), "float16")
        return reply


def spec(partition: int) -> ClientSpec:
    return ClientSpec(partition_id=partition, rank=3 - partition, scaling=1.3)


def run(name: str, dtype: str, toy: ToyClient) -> tuple[FactorStrategy, list[int], list[int]]:
    client_spec = spec if name in MIXED else None
    rule = strategies.make_rule(name)
    strategy = FactorStrategy(rule, scaling=2.0, wire_dtype=dtype, client_spec=client_spec)
    reports = watched(strategy)
    strategy.start(FakeGrid(range(3), toy), initial_arrays(), num_rounds=3)
    assert all(report.refused == {} for report in reports)
    return strategy, [r.bytes_up for r in reports], [r.bytes_down for r in reports]


@pytest.mark.parametrize("name", NAMES)
def test_half_the_bytes_and_the_same_start_everywhere(name: str, tmp_path: Path) -> None:
    half = Half(tmp_path / "half")
    small, *small_bytes = run(name, "float16", half)
    _, *whole_bytes = run(name, "float32", ToyClient(tmp_path / "whole"))
    assert [[2 * n for n in numbers] for numbers in small_bytes] == whole_bytes
    assert small.state is not None
    again = rounded_state(small.state, torch.float16)
    for module, factors in small.state.adapters.items():
        for letter, tensor in factors.tensors().items():
            assert torch.equal(again.adapters[module].tensors()[letter], tensor)
    for request in small.transport.requests:
        for module, factors in half.starts[request.partition_id].items():
            for letter, tensor in factors.tensors().items():
                assert torch.equal(request.broadcast.adapters[module].tensors()[letter], tensor)
    for patches in half.bases.values():
        sent = [patch.tensors() for patch in small.state.base[: len(patches)]]
        assert all(torch.equal(p[k], s[k]) for p, s in zip(patches, sent, strict=True) for k in p)


def test_an_update_beyond_half_precision_is_refused(tmp_path: Path) -> None:
    toy = Half(tmp_path)
    toy.moved = lambda f, *_: type(f)(f.A, f.B + 1e6, f.scaling)  # type: ignore[method-assign]
    strategy = FactorStrategy(strategies.make_rule("fedavg"), scaling=2.0, wire_dtype="float16")
    with pytest.raises(Exception, match="holds a NaN or an infinity"):
        strategy.start(FakeGrid(range(3), toy), initial_arrays(), num_rounds=1)
