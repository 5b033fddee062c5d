"""Layers at rest cost no bytes in either direction, and clients hold the bits that the server means."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from flwr.app import ArrayRecord, Message

from fedlora import wire
from fedlora.core.base_patches import digest
from fedlora.core.directions import Directions
from fedlora.core.factors import LoraFactors
from fedlora.core.state import ClientSpec, State
from strategies.allocation import Allocation, SizedRanks, make_allocation
from strategies.flower import FactorStrategy
from strategies.registry import RULES, make_rule
from strategies.report import RoundReport
from tests.federation.fake_grid import FakeGrid, ToyClient
from tests.federation.small import watched

BLOCKS, RANK, OUT, IN, HEAD, CLIENTS = 4, 3, 5, 7, 12, 2
A, B = 4 * RANK * IN, 4 * RANK * OUT
ROUNDS = 6


def arrays() -> ArrayRecord:
    g = torch.Generator().manual_seed(0)
    adapters = {
        f"h.{block}.q": LoraFactors(torch.randn(RANK, IN, generator=g), torch.zeros(OUT, RANK), 2.0)
        for block in range(BLOCKS)
    }
    return wire.to_record(wire.to_peft(adapters, {"classifier.weight": torch.zeros(2, 6)}))


class Watching(ToyClient):
    """Compares what it starts from with what the server broadcast; ``forgets`` names rounds before which."""

    def __init__(self, root: Path, forgets: tuple[int, ...] = ()) -> None:
        super().__init__(root)
        self.forgets = set(forgets)
        self.strategy: FactorStrategy | None = None
        self.compared = 0

    def __call__(self, message: Message, partition: int) -> Message | None:
        server_round = int(message.content["config"]["server-round"])
        if server_round in self.forgets and partition == 0:
            self.forgets.discard(server_round)
            shutil.rmtree(self.root / "0", ignore_errors=True)
        reply = super().__call__(message, partition)
        assert reply is not None
        assert self.strategy is not None
        if wire.decode_reply(reply.content, trained=False).status == wire.OK:
            (sent,) = (r for r in self.strategy.transport.requests if r.partition_id == partition)
            for module, factors in self.starts[partition].items():
                expected = sent.broadcast.adapters[module].tensors()
                assert all(torch.equal(t, expected[x]) for x, t in factors.tensors().items()), module
                self.compared += 1
        return reply


def run(
    name: str,
    path: Path,
    layers: int = 1,
    forgets: tuple[int, ...] = (),
    allocation: Allocation | None = None,
    **options: str,
) -> tuple[FactorStrategy, list[RoundReport], list[set[str]]]:
    """The strategy, its reports, and the modules that each round trained."""
    allocation = allocation or make_allocation("random-layers", {"layers": layers})
    rule = make_rule(name, allocation=allocation)
    strategy = FactorStrategy(rule, scaling=2.0, seed=3, fraction_evaluate=0.0, **options)
    client = Watching(path, forgets)
    client.strategy = strategy
    reports, grid = watched(strategy), FakeGrid(range(CLIENTS), client)
    strategy.start(grid, arrays(), num_rounds=ROUNDS)
    assert [report.refused for report in reports] == [{}] * ROUNDS
    assert client.compared == ROUNDS * CLIENTS * BLOCKS
    trained = {
        int(m.content["config"]["server-round"]): str(m.content["config"]["modules"]) for m in grid.sent
    }
    return strategy, reports, [set(json.loads(trained[t + 1])) for t in range(ROUNDS)]


@pytest.mark.parametrize("name", [n for n in RULES if not make_rule(n).needs_all_layers])
def test_under_every_rule_only_trained_layers_go_up(name: str, tmp_path: Path) -> None:
    strategy, reports, _ = run(name, tmp_path)
    sizes = {"A": A, "B": B, "R": 4 * RANK**2}
    up = [sum(sizes[x] for x in strategy.rule.shipped(t)) + 4 * HEAD for t in range(1, ROUNDS + 1)]
    assert [report.bytes_up for report in reports] == [CLIENTS * bytes_up for bytes_up in up]


@pytest.mark.parametrize("layers", [1, 2])
def test_down_goes_what_the_round_before_trained(layers: int, tmp_path: Path) -> None:
    """A layer that was at rest is held by every client, whether it is trained next or not."""
    _, reports, trained = run("fedavg", tmp_path, layers)
    assert len({frozenset(modules) for modules in trained}) > 1
    down = [BLOCKS * (A + B)] + [layers * (A + B)] * (ROUNDS - 1)
    assert [report.bytes_down for report in reports] == [CLIENTS * (d + 4 * HEAD) for d in down]


def test_a_frozen_factor_of_any_layer_travels_once(tmp_path: Path) -> None:
    _, reports, _ = run("ffa", tmp_path)
    down = [BLOCKS * (A + B)] + [B] * (ROUNDS - 1)
    assert [report.bytes_down for report in reports] == [CLIENTS * (d + 4 * HEAD) for d in down]


def test_the_factor_that_rests_in_a_trained_layer_does_not_travel_again(tmp_path: Path) -> None:
    _, reports, _ = run("rolora", tmp_path)
    down = [BLOCKS * (A + B)] + [B, A] * (ROUNDS // 2)
    assert [r.bytes_down for r in reports] == [CLIENTS * (d + 4 * HEAD) for d in down[:ROUNDS]]


def test_patches_hold_the_trained_layers_alone(tmp_path: Path) -> None:
    for name in ("flora", "fedex"):
        strategy, _, trained = run(name, tmp_path / name)
        assert strategy.state is not None
        assert [set(patch.products) for patch in strategy.state.base] == trained


def test_a_client_that_lost_its_store_is_served_in_the_same_round(tmp_path: Path) -> None:
    _, plain, _ = run("fedavg", tmp_path / "plain")
    _, reports, _ = run("fedavg", tmp_path / "lost", forgets=(4,))
    assert reports[3].bytes_down > plain[3].bytes_down
    assert [r.bytes_down for r in reports[4:]] == [r.bytes_down for r in plain[4:]]


def test_half_precision_and_codecs_go_with_it(tmp_path: Path) -> None:
    _, whole, _ = run("fedavg", tmp_path / "whole")
    _, half, _ = run("fedavg", tmp_path / "half", wire_dtype="float16", upload="int8")
    assert [2 * r.bytes_down for r in half] == [r.bytes_down for r in whole]
    assert all(h.bytes_up < 0.4 * w.bytes_up for h, w in zip(half, whole, strict=True))


class Fixed(SizedRanks):
    """Directions of a table, by the round."""

    table: ClassVar[tuple[dict[str, tuple[int, ...]], ...]] = (
        {"h.0.q": (0,), "h.1.q": (1, 2), "h.2.q": ()},
        {"h.0.q": (0,), "h.1.q": (1, 2), "h.2.q": ()},
        {"h.0.q": (2,), "h.1.q": (1, 2), "h.2.q": ()},
    )

    def directions(self, state: State) -> Directions:
        return self.table[state.round % 3]


DIRECTIONS_UP = 1 + 2 + RANK
"""Of the table, in each round: one layer of the four has all of its own."""


@pytest.mark.parametrize(
    "name", ["fedavg", "ffa", "rolora", "fedex", "flexlora", "fedmomentum", "zero-padding"]
)
def test_only_directions_that_train_go_up(name: str, tmp_path: Path) -> None:
    strategy, reports, trained = run(name, tmp_path, allocation=Fixed())
    assert trained == [{"h.0.q", "h.1.q", "h.3.q"}] * ROUNDS
    a_row, b_column = 4 * IN, 4 * OUT
    sizes = {"A": a_row, "B": b_column}
    up = [
        DIRECTIONS_UP * sum(sizes[x] for x in strategy.rule.shipped(t)) + 4 * HEAD
        for t in range(1, ROUNDS + 1)
    ]
    assert [report.bytes_up for report in reports] == [CLIENTS * bytes_up for bytes_up in up]


def test_directions_at_rest_go_down_once_for_each_choice(tmp_path: Path) -> None:
    """The second round has the same choice, so that what trained goes down; the third another."""
    _, reports, _ = run("fedavg", tmp_path, allocation=Fixed())
    one = 4 * (IN + OUT)
    down = [BLOCKS * RANK * one, DIRECTIONS_UP * one, (DIRECTIONS_UP + 2) * one]
    down += [(DIRECTIONS_UP + 2) * one, DIRECTIONS_UP * one, (DIRECTIONS_UP + 2) * one]
    assert [report.bytes_down for report in reports] == [CLIENTS * (d + 4 * HEAD) for d in down]


def test_a_client_that_lost_directions_is_served_in_the_same_round(tmp_path: Path) -> None:
    _, plain, _ = run("fedavg", tmp_path / "plain", allocation=Fixed())
    _, reports, _ = run("fedavg", tmp_path / "lost", forgets=(5,), allocation=Fixed())
    assert reports[4].bytes_down > plain[4].bytes_down
    assert [r.bytes_down for r in reports[5:]] == [r.bytes_down for r in plain[5:]]


def test_a_client_that_trains_all_directions_is_refused(tmp_path: Path) -> None:
    """As one that knows nothing of them would send."""
    strategy = FactorStrategy(
        make_rule("fedavg", allocation=Fixed()), scaling=2.0, seed=3, fraction_evaluate=0.0
    )

    def whole(message: Message, partition: int) -> Message:
        reply = ToyClient(tmp_path)(message, partition)
        assert reply is not None
        if partition:
            arrays = wire.from_record(reply.content["arrays"])
            key = "base_model.model.h.0.q.lora_A.weight"
            reply.content["arrays"] = wire.to_record({**arrays, key: torch.ones(RANK, IN)})
        return reply

    reports = watched(strategy)
    strategy.start(FakeGrid(range(CLIENTS), whole), arrays(), num_rounds=1)
    assert list(reports[0].refused) == [1]
    assert "h.0.q: lora_A has shape (3, 7), expected (1, 7)" in reports[0].refused[1]


@pytest.mark.parametrize(("number", "frozen"), [(0, "A"), (1, "B")])
def test_parts_of_layers_have_digests_of_their_own_under_rolora(number: int, frozen: str) -> None:
    """What is frozen, what trains and what rests are told apart, where all B are zero, too."""
    rule = make_rule("rolora", allocation=Fixed())
    adapters = wire.from_peft(wire.from_record(arrays())).lora(2.0)
    state = State(round=number, adapters=adapters, head={}, seed=3)
    given = rule.broadcast(state, ClientSpec(partition_id=0, rank=RANK, scaling=2.0))
    parts = wire.layer_parts(given)
    assert len({digest(tensors) for tensors, _ in parts}) == len(parts)
    names = [name for tensors, _ in parts for name in tensors]
    assert sorted(names) == sorted(wire.to_peft(given.adapters, {}))
    rest = [{*tensors} for tensors, rests in parts if rests and any("h.0.q" in name for name in tensors)]
    key = "base_model.model.h.0.q.lora_{}.weight".format
    assert rest == [{key(frozen)}, {key("A0"), key("B0")}]
