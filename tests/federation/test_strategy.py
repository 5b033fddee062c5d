"""The Flower strategy around the rules: rounds, faults, the base protocol, and what it refuses."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from flwr.app import ArrayRecord, Message, RecordDict
from flwr.serverapp.strategy import Strategy

import strategies
from fedlora import wire
from fedlora.core.factors import stack
from fedlora.core.state import ClientSpec
from fedlora.errors import ConfigError, RunFailed
from strategies import FedAvg, FLoRA
from strategies.flower import FactorStrategy
from tests.federation.fake_grid import FakeGrid, ToyClient
from tests.federation.small import MODULES, bits, initial_arrays, watched

NAMED = [named for named in vars(strategies).values() if isinstance(named, type)]


@pytest.mark.parametrize("named", NAMED)
def test_is_a_flower_strategy_and_returns_flowers_result(named: type[FactorStrategy], tmp_path: Path) -> None:
    strategy = named(scaling=2.0)
    assert isinstance(strategy, Strategy)
    grid = FakeGrid(range(3), ToyClient(tmp_path))
    result = strategy.start(grid, initial_arrays(), num_rounds=2)
    assert set(result.arrays) == set(initial_arrays())
    assert set(result.train_metrics_clientapp) == {1, 2}
    assert float(np.abs(result.arrays["base_model.model.classifier.weight"].numpy()).sum()) > 0


@pytest.mark.parametrize("named", NAMED)
def test_the_same_seed_gives_the_same_bits_whatever_the_node_ids_and_order(
    named: type[FactorStrategy], tmp_path: Path
) -> None:
    results = []
    for run, order in enumerate([range(6), reversed(range(6))]):
        strategy = named(scaling=2.0, fraction_train=0.5, seed=3)
        strategy.start(FakeGrid(order, ToyClient(tmp_path / str(run))), initial_arrays(), num_rounds=4)
        results.append(bits(strategy))
    assert results[0] == results[1]


@pytest.mark.parametrize("named", NAMED)
def test_bytes_follow_what_travels(named: type[FactorStrategy], tmp_path: Path) -> None:
    rank, clients = 3, 2
    numbers = {
        "A": sum(i for _, i in MODULES.values()) * rank,
        "B": sum(o for o, _ in MODULES.values()) * rank,
        "R": len(MODULES) * rank**2,
    }
    head = 12
    strategy = named(scaling=2.0, fraction_evaluate=0.0)
    reports = watched(strategy)
    strategy.start(FakeGrid(range(clients), ToyClient(tmp_path)), initial_arrays(rank), num_rounds=3)
    facts = strategy.rule.facts
    uploaded = [strategy.rule.shipped(t) for t in (1, 2, 3)]
    up = [4 * clients * (sum(numbers[f] for f in factors) + head) for factors in uploaded]
    assert [r.bytes_up for r in reports] == up
    both = 4 * (numbers["A"] + numbers["B"])
    stacked = 4 * clients * (numbers["A"] + numbers["B"])  # one patch: R = 2 r
    other_than_both = {
        "ffa": [both, 4 * numbers["B"], 4 * numbers["B"]],
        "fedsvd-renew": [both, both + both // 3, both + both // 3],  # one of three directions
        "head-only": [both, 0, 0],
        "local-only": [both, 0, 0],
        "flora": [0, stacked, stacked],
        "florist": [0, *(patch.nbytes for patch in strategy.state.base[:2])],
        "fedsa": [both, 4 * numbers["A"], 4 * numbers["A"]],
        "rolora": [both, 4 * numbers["B"], 4 * numbers["A"]],  # the other one rested at the client
        "lora-a2": [both, 4 * numbers["B"], 4 * numbers["A"]],
        "turns": [both, 4 * numbers["B"], 4 * numbers["A"]],
        "fedex": [both, stacked, stacked],  # the means, and a residual of rank R - r
        "fedmomentum": [both, stacked, stacked],
        "frlora": [both, both + stacked, both + stacked],  # the start again, and a residual of rank 2 r
        "galore": [both, 2 * both, 2 * both],  # what is frozen and what begins at zero, and a patch of rank r
        "fed-sb": [both + 4 * numbers["R"], 4 * numbers["R"], 4 * numbers["R"]],
    }
    down = other_than_both.get(facts.name, [both] * 3)
    assert [r.bytes_down for r in reports] == [clients * (d + 4 * head) for d in down]


class TestMovingBase:
    """FLoRA under partial participation: everybody ends on the same bits."""

    def test_a_client_that_sat_out_lost_a_reply_or_its_disk_trains_on_everybodys_base(
        self, tmp_path: Path
    ) -> None:
        import shutil

        toy = ToyClient(tmp_path)
        lost = {(2, 1)}

        def client(message: Message, partition: int) -> Message | None:
            server_round = int(message.content["config"]["server-round"])
            if server_round == 4 and partition == 2:
                shutil.rmtree(tmp_path / "2", ignore_errors=True)
            reply = toy(message, partition)
            return None if (server_round, partition) in lost else reply

        strategy = FLoRA(scaling=2.0, fraction_train=0.5, fraction_evaluate=0.0, seed=1)
        strategy.start(FakeGrid(range(4), client), initial_arrays(), num_rounds=6, timeout=5)
        last = FakeGrid(range(4), client)
        strategy.selection.fraction_train = 1.0
        assert strategy.state is not None
        expected = [patch.tensors() for patch in strategy.state.base]
        strategy.start(last, initial_arrays(), num_rounds=7)
        for partition in range(4):
            held = toy.bases[partition]
            assert len(held) == len(expected)
            for mine, theirs in zip(held, expected, strict=True):
                assert mine.keys() == theirs.keys()
                assert all(torch.equal(mine[k], theirs[k]) for k in mine)

    def test_a_client_that_lost_its_disk_is_served_in_the_same_round(self, tmp_path: Path) -> None:
        import shutil

        toy, lost = ToyClient(tmp_path), []

        def client(message: Message, partition: int) -> Message | None:
            if int(message.content["config"]["server-round"]) == 4 and partition == 2 and not lost:
                lost.append(partition)
                shutil.rmtree(tmp_path / "2")
            return toy(message, partition)

        strategy = FLoRA(scaling=2.0, fraction_evaluate=0.0)
        reports = watched(strategy)
        strategy.start(FakeGrid(range(3), client), initial_arrays(), num_rounds=4)
        assert lost == [2]
        assert reports[3].refused == {}
        assert reports[3].participants == [0, 1, 2]
        assert len(toy.bases[2]) == 3
        assert reports[3].bytes_down > reports[2].bytes_down

    def test_the_patch_is_the_weighted_sum_of_the_clients_products(self, tmp_path: Path) -> None:
        toy = ToyClient(tmp_path)
        ranks = {0: 2, 1: 4, 2: 1}
        strategy = FLoRA(
            scaling=1.0,
            fraction_evaluate=0.0,
            client_spec=lambda p: ClientSpec(partition_id=p, rank=ranks[p], scaling=1.0 / ranks[p]),
        )
        strategy.start(FakeGrid(range(3), toy), initial_arrays(4), num_rounds=1)
        assert strategy.state is not None
        order = wire.TrainInstruction(
            server_round=1,
            arrays={},
            parts={},
            needs=wire.Needs(),
            config={"trained": "A,B", "uploaded": "A,B"},
        )
        for name in MODULES:
            moved = {p: toy.moved(toy.starts[p][name], order, p, name) for p in ranks}
            expected = stack(((p + 1) / 6, moved[p]) for p in ranks).dense()
            assert torch.allclose(strategy.state.base[0].products[name].dense(), expected, atol=1e-6)

    def test_who_does_not_acknowledge_the_base_is_refused(self, tmp_path: Path) -> None:
        toy = ToyClient(tmp_path)

        def forgetful(message: Message, partition: int) -> Message | None:
            reply = toy(message, partition)
            if reply is not None and partition == 1:
                reply.content["config"].pop("holds", None)
            return reply

        strategy = FLoRA(scaling=2.0, fraction_evaluate=0.0)
        reports = watched(strategy)
        strategy.start(FakeGrid(range(3), forgetful), initial_arrays(), num_rounds=2)
        assert reports[0].refused == {}
        assert "does not acknowledge 1 base patches" in reports[1].refused[1]
        assert reports[1].participants == [0, 2]


def test_nodes_are_asked_for_their_partition_where_the_grid_does_not_know(tmp_path: Path) -> None:
    toy = ToyClient(tmp_path)

    def client(message: Message, partition: int) -> Message | None:
        if message.metadata.message_type == "query":
            from flwr.app import ConfigRecord

            return Message(
                RecordDict({"config": ConfigRecord({"partition-id": partition})}), reply_to=message
            )
        return toy(message, partition)

    asked, told = (
        FedAvg(scaling=2.0, fraction_train=0.5, seed=2),
        FedAvg(scaling=2.0, fraction_train=0.5, seed=2),
    )
    asked.start(FakeGrid(range(5), client, tells_partitions=False), initial_arrays(), num_rounds=3)
    told.start(FakeGrid(range(5), client), initial_arrays(), num_rounds=3)
    assert bits(asked) == bits(told)


def test_no_client_trains_more_often_than_it_may(tmp_path: Path) -> None:
    strategy = FedAvg(scaling=2.0, fraction_train=0.5, max_participations=2)
    grid = FakeGrid(range(4), ToyClient(tmp_path))
    with pytest.raises(RunFailed, match="0 clients may train"):
        strategy.start(grid, initial_arrays(), num_rounds=10)
    assert strategy.selection.participations == {0: 2, 1: 2, 2: 2, 3: 2}


def test_unequal_ranks_are_refused_by_a_rule_that_cannot_take_them(tmp_path: Path) -> None:
    spec = lambda p: ClientSpec(partition_id=p, rank=2 + p, scaling=1.0)  # noqa: E731
    from fedlora.errors import FactorShapeError

    with pytest.raises(FactorShapeError, match="fedavg needs equal ranks"):
        FedAvg(client_spec=spec).start(
            FakeGrid(range(2), ToyClient(tmp_path)), initial_arrays(), num_rounds=1
        )


@pytest.mark.parametrize("named", NAMED)
def test_unknown_options_are_named(named: type[FactorStrategy]) -> None:
    with pytest.raises(ConfigError, match="lamda"):
        named(lamda=0.1)


def test_arrays_that_are_no_adapter_are_refused(tmp_path: Path) -> None:
    arrays = ArrayRecord({"weight": torch.zeros(2, 2)})
    with pytest.raises(ConfigError, match="no pairs of lora_A and lora_B"):
        FedAvg().start(FakeGrid(range(2), ToyClient(tmp_path)), arrays, num_rounds=1)


def test_every_rule_has_a_public_class() -> None:
    assert [cls.rule_type for cls in NAMED] == list(strategies.RULES.values())
    assert all(cls.__module__ == "strategies" and cls.rule_type.__module__ in cls.__doc__ for cls in NAMED)


@pytest.mark.parametrize("name", ["head-only", "fedsa", "local-only"])
def test_rounds_that_aggregate_no_adapter_report_no_figures_of_it(name: str, tmp_path: Path) -> None:
    strategy = FactorStrategy(strategies.make_rule(name), scaling=2.0)
    reports = watched(strategy)
    strategy.start(FakeGrid(range(2), ToyClient(tmp_path)), initial_arrays(), num_rounds=1)
    assert reports[0].diagnostics is None
