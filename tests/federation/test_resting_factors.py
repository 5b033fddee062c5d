"""Factors that rested at a client do not travel again: RoLoRA's half of the traffic, faults included."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from flwr.app import ConfigRecord, Message, RecordDict

from clients.store import ClientStore, resolve
from fedlora import wire
from fedlora.core.base_patches import digest
from fedlora.errors import UpdateRefused
from strategies import FedAvg, FedSVD, FFALoRA, FLoRA, RoLoRA, encodings, transport
from strategies.flower import FactorStrategy
from strategies.report import RoundReport
from tests.federation.fake_grid import Client, FakeGrid, ToyClient
from tests.federation.small import watched
from tests.federation.test_strategy import MODULES, initial_arrays

RANK, HEAD = 3, 4 * 12
A, B = 4 * RANK * sum(i for _, i in MODULES.values()), 4 * RANK * sum(o for o, _ in MODULES.values())


def run(strategy: FactorStrategy, client: Client, rounds: int) -> tuple[FakeGrid, list[RoundReport]]:
    """The rounds of three clients."""
    reports = watched(strategy)
    grid = FakeGrid(range(3), client)
    strategy.start(grid, initial_arrays(RANK), num_rounds=rounds)
    return grid, reports


def down(grid: FakeGrid, partition: int) -> dict[int, list[int]]:
    """Bytes of factors in each message to a partition, by round."""
    found: dict[int, list[int]] = {}
    for message in grid.sent:
        if grid.nodes[message.metadata.dst_node_id] == partition:
            t = int(message.content["config"]["server-round"])
            found.setdefault(t, []).append(wire.payload_bytes(message.content) - HEAD)
    return found


class Watched:
    """A client that is away in some rounds, and whose starting adapters are compared with the server's."""

    def __init__(self, root: Path, strategy: FactorStrategy, away: set[tuple[int, int]]) -> None:
        self.toy, self.strategy, self.away = ToyClient(root), strategy, away
        self.checked = 0

    def __call__(self, message: Message, partition: int) -> Message | None:
        t = int(message.content["config"]["server-round"])
        if (t, partition) in self.away:
            return None
        reply = self.toy(message, partition)
        assert reply is not None
        if not transport.says_missing(reply):
            state = self.strategy.state
            assert state is not None
            for name, factors in self.toy.starts[partition].items():
                assert torch.equal(factors.A, state.adapters[name].A)
                assert torch.equal(factors.B, state.adapters[name].B)
            self.checked += 1
        return reply


def test_who_was_away_receives_what_it_lacks_in_the_same_round(tmp_path: Path) -> None:
    """Partition 1 is away in round 3, partition 2 in rounds 2 to 4."""
    strategy = RoLoRA(scaling=2.0, fraction_evaluate=0.0)
    client = Watched(tmp_path, strategy, {(3, 1), (2, 2), (3, 2), (4, 2)})
    grid, reports = run(strategy, client, 6)
    assert down(grid, 0) == {1: [A + B], 2: [B], 3: [A], 4: [B], 5: [A], 6: [B]}
    assert down(grid, 1) == {1: [A + B], 2: [B], 3: [A], 4: [A + B], 5: [A], 6: [B]}
    assert down(grid, 2) == {1: [A + B], 2: [B], 3: [A + B], 4: [A + B], 5: [A + B], 6: [B]}
    assert client.checked == 6 + 5 + 3
    assert [report.participants for report in reports][4:] == [[0, 1, 2]] * 2


@pytest.mark.parametrize("lost_in", [2, 3])
def test_a_client_that_lost_its_disk_is_served_in_the_same_round(tmp_path: Path, lost_in: int) -> None:
    strategy = RoLoRA(scaling=2.0, fraction_evaluate=0.0)
    watched, lost = Watched(tmp_path, strategy, set()), []

    def client(message: Message, partition: int) -> Message | None:
        if int(message.content["config"]["server-round"]) == lost_in and partition == 2 and not lost:
            lost.append(partition)
            shutil.rmtree(tmp_path / "2")
        return watched(message, partition)

    grid, reports = run(strategy, client, 4)
    assert lost == [2]
    trained = {2: B, 3: A, 4: B}
    assert down(grid, 2)[lost_in] == [trained[lost_in], A + B]
    assert down(grid, 2)[4] == [B]
    assert all(report.refused == {} for report in reports)
    assert watched.checked == 12


def test_a_damaged_part_is_sent_again(tmp_path: Path) -> None:
    strategy = RoLoRA(scaling=2.0, fraction_evaluate=0.0)
    watched = Watched(tmp_path, strategy, set())

    def client(message: Message, partition: int) -> Message | None:
        if int(message.content["config"]["server-round"]) == 3 and partition == 0:
            for part in (tmp_path / "0").rglob("*.safetensors"):
                part.write_bytes(part.read_bytes()[:-1] + b"?")
        return watched(message, partition)

    _, reports = run(strategy, client, 3)
    assert all(report.refused == {} for report in reports)
    assert watched.checked == 9


def test_an_evaluation_brings_what_the_next_round_rests_on(tmp_path: Path) -> None:
    """The orders to evaluate carry the new factor; the round after it then needs no factor at all."""
    strategy = RoLoRA(scaling=2.0, fraction_evaluate=None, clients_evaluate=lambda t: t == 2)
    grid, _ = run(strategy, Watched(tmp_path, strategy, set()), 4)
    assert down(grid, 0) == {1: [A + B], 2: [B, A], 3: [0], 4: [B]}


def test_what_was_acknowledged_survives_a_restart_of_the_server(tmp_path: Path) -> None:
    first, second = RoLoRA(scaling=2.0, fraction_evaluate=0.0), RoLoRA(scaling=2.0, fraction_evaluate=0.0)
    run(first, ToyClient(tmp_path), 2)
    second.restore(first.snapshot())
    grid, _ = run(second, Watched(tmp_path, second, set()), 4)
    assert down(grid, 0) == {3: [A], 4: [B]}


def test_who_acknowledges_nothing_receives_everything(tmp_path: Path) -> None:
    """Anybody's PEFT app answers with arrays and metrics alone."""
    toy = ToyClient(tmp_path)

    def client(message: Message, partition: int) -> Message | None:
        reply = toy(message, partition)
        assert reply is not None
        del reply.content["config"]
        return reply

    grid, reports = run(RoLoRA(scaling=2.0, fraction_evaluate=0.0), client, 3)
    assert down(grid, 0) == {t: [A + B] for t in (1, 2, 3)}
    assert all(report.refused == {} for report in reports)


@pytest.mark.parametrize(
    ("named", "hashed"),
    [(FedAvg, set()), (FLoRA, set()), (FFALoRA, {"A"}), (FedSVD, {"A", "B"}), (RoLoRA, {"A", "B"})],
    ids=["fedavg", "flora", "ffa", "fedsvd", "rolora"],
)
def test_moving_factors_are_hashed_only_for_who_holds_something_else(
    named: type[FactorStrategy], hashed: set[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And once for all clients: frozen A of FFA each round, never its B; FedSVD's old A might be its B."""
    seen: list[str] = []

    def counting(tensors: dict[str, torch.Tensor]) -> str:
        seen.extend({name.split("lora_")[1][0] for name in tensors})
        return digest(tensors)

    monkeypatch.setattr(encodings, "digest", counting)
    run(named(scaling=2.0, fraction_evaluate=0.0), ToyClient(tmp_path), 3)
    assert set(seen) == hashed
    assert all(seen.count(factor) <= 3 for factor in hashed)


def test_an_order_that_lies_about_a_moving_factor_is_refused(tmp_path: Path) -> None:
    tensors = wire.from_record(initial_arrays(RANK))
    settings = {
        "server-round": 1, "rank": RANK, "scaling": 2.0, "trained": "A", "uploaded": "A", "modules": "[]",
        "needs-frozen": "", "needs-moving": "0" * 64,
    }  # fmt: skip
    content = RecordDict({"arrays": wire.to_record(tensors), "config": ConfigRecord(settings)})
    with pytest.raises(UpdateRefused, match="does not have the content"):
        resolve(wire.decode_instruction(content), ClientStore(tmp_path))
