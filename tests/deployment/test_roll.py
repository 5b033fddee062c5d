"""Which node is which partition is decided by keys: a stranger takes no part, a liar is refused and named."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.supercore.primitives.asymmetric import public_key_to_bytes

from fedlora.deployment.operator.keys import fingerprint
from fedlora.deployment.operator.layout import NodeKeys
from fedlora.errors import RunFailed
from strategies import FedAvg
from strategies.flower import FactorStrategy
from strategies.nodes import NodeDirectory
from tests.federation.fake_grid import FakeGrid, ToyClient
from tests.federation.small import initial_arrays

SECRETS = [ec.derive_private_key(k + 1, ec.SECP384R1()) for k in range(4)]
KEYS = [public_key_to_bytes(secret.public_key()) for secret in SECRETS]


@dataclass
class Info:
    node_id: int
    public_key: bytes


class KeyedGrid(FakeGrid):
    """Nodes with a key each, that claim a partition of their own choice when they are asked."""

    def __init__(self, root: Path, claims: dict[int, int]) -> None:
        self.claims = claims
        self.toy = ToyClient(root)
        super().__init__(range(len(claims)), self.answer, tells_partitions=False)

    def get_nodes(self) -> list[Info]:
        return [Info(node, KEYS[number]) for node, number in self.nodes.items()]

    def answer(self, message: Message, number: int) -> Message | None:
        if message.metadata.message_type == "query":
            claimed = ConfigRecord({"partition-id": self.claims[number]})
            return Message(RecordDict({"config": claimed}), reply_to=message)
        return self.toy(message, number)


def strategy(on_roll: int, **options: int) -> FactorStrategy:
    roll = {fingerprint(KEYS[k]): k for k in range(on_roll)}
    keys = NodeKeys(lambda: roll)
    return FedAvg(scaling=2.0, node_directory=NodeDirectory(keys), **options)


def test_honest_nodes_take_part_as_the_partitions_of_their_keys(tmp_path: Path) -> None:
    grid, fed = KeyedGrid(tmp_path, {0: 0, 1: 1, 2: 2}), strategy(3)
    fed.start(grid, initial_arrays(), num_rounds=1)
    assert fed.report.participants == [0, 1, 2]
    assert fed.report.refused == {}


def test_a_node_that_claims_another_partition_is_refused_and_named(tmp_path: Path) -> None:
    grid, fed = KeyedGrid(tmp_path, {0: 0, 1: 2, 2: 2}), strategy(3)
    fed.start(grid, initial_arrays(), num_rounds=2)
    assert fed.report.participants == [0, 2]
    assert fed.report.refused == {1: "its node claims partition 2, but its key stands for 1"}


def test_a_key_that_is_not_on_the_roll_is_not_even_asked(tmp_path: Path) -> None:
    grid, fed = KeyedGrid(tmp_path, {0: 0, 1: 1, 2: 2}), strategy(2)
    fed.start(grid, initial_arrays(), num_rounds=1)
    assert fed.report.participants == [0, 1]
    stranger = next(node for node, number in grid.nodes.items() if number == 2)
    assert stranger not in {message.metadata.dst_node_id for message in grid.sent}


def test_strangers_do_not_count_towards_the_nodes_that_a_run_waits_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("strategies.flower.CONNECT_TIMEOUT", 0.0)
    grid, fed = KeyedGrid(tmp_path, {0: 0, 1: 1, 2: 2}), strategy(2, min_available_nodes=3)
    with pytest.raises(RunFailed, match="only 2 connected"):
        fed.start(grid, initial_arrays(), num_rounds=1)
