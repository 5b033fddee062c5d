"""A ledger that was set back is noticed in deployment too: the server sends each node its last head."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from uuid import uuid4

import pytest
from flwr.app import Message

from clients import ledger_ref, owner
from clients.handler import TRAIN, handle
from fedlora import wire
from fedlora.config import RunConfig, to_flat
from fedlora.errors import RunFailed
from fedlora.simulation.local_grid import LocalGrid
from fedlora.wire.arrays import is_packed
from tests.conftest import tiny_config
from tests.in_process import RUNTIMES, federated

NODES = range(3)


class Nodes(LocalGrid):
    """Nodes of a deployment, in this process; the ledgers of partition 0 can be set back before a round."""

    def __init__(self, config: RunConfig, state_dir: Path, set_back_before: int = 0) -> None:
        super().__init__(NODES)
        self.config, self.state_dir, self.set_back_before = config, state_dir, set_back_before
        self.heads: list[dict[int, str]] = []
        self.packed: set[bool] = set()

    def ledger(self, partition: int) -> Path:
        (path,) = (self.state_dir / str(partition) / "ledger").glob("*partition-*.jsonl")
        return path

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        replies = []
        self.heads.append({})
        for message in messages:
            message.metadata.__dict__["_message_id"] = str(uuid4())
            partition = self.partition_ids[message.metadata.dst_node_id]
            order = wire.decode_instruction(message.content)
            self.heads[-1][partition] = order.config.get("ledger-head", "")
            if partition == 0 and order.server_round == self.set_back_before:
                lines = self.ledger(0).read_bytes().splitlines(keepends=True)
                self.ledger(0).write_bytes(b"".join(lines[:-2]))
                ledger_ref._ledger.cache_clear()  # the node's next message has a process of its own
            node_config = {"partition-id": partition, "state-dir": str(self.state_dir / str(partition))}
            answer = handle(TRAIN, message.content, to_flat(self.config), node_config, RUNTIMES)
            records = (message.content.array_records[wire.ARRAYS], answer.array_records[wire.ARRAYS])
            self.packed |= {is_packed(record) for record in records}
            replies.append(Message(answer, reply_to=message))
        return replies


@pytest.fixture(autouse=True)
def no_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(owner, "REFUSAL_SECONDS", 0.01)


def run(tmp_path: Path, set_back_before: int = 0, **overrides: object) -> Nodes:
    keys = {"privacy.mode": "example", "privacy.target-epsilon": 3.0, "privacy.accountant": "rdp"}
    config = tiny_config(**keys, **overrides)
    grid = Nodes(config, tmp_path / "nodes", set_back_before)
    federated(config, tmp_path / "run", resume=True, nodes=NODES).run(grid)
    return grid


def test_each_node_is_told_its_own_last_head(tmp_path: Path, cache: Path) -> None:
    heads = run(tmp_path).heads
    assert set(heads[0].values()) == {""}
    assert all(len(set(told.values())) == len(NODES) and "" not in told.values() for told in heads[1:])


def test_between_server_and_nodes_all_tensors_travel_as_one_array(tmp_path: Path, cache: Path) -> None:
    assert run(tmp_path).packed == {True}


def test_a_ledger_that_was_set_back_is_not_written_on(
    tmp_path: Path, cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Not in this run, and not when the server begins again; the node's own log says why."""
    for set_back_before in (2, 0):
        with pytest.raises(RunFailed, match="partition 0: the node declines; its own log says why"):
            run(tmp_path, set_back_before, **{"min-train-nodes": 3})
        assert "was set back: an entry that it had" in caplog.text
        caplog.clear()
