"""Orders carried out together: each client's reply is what its own message alone would have given."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import ConfigRecord, RecordDict

from clients import execute_cohort
from clients.execute import train_instruction
from clients.execute_cohort import Assignment, train_instructions
from clients.handler import handle_together
from clients.ledger_ref import ledger_directory
from clients.node import Node
from clients.training.batched import oom_retry
from clients.training.batched.cohort_size import cohort_size
from clients.training.batched.train import train_cohort
from fedlora import wire
from fedlora.config import RunConfig
from fedlora.config.files import to_flat
from fedlora.core.init_drawn import fresh_adapters
from fedlora.core.state import Broadcast
from fedlora.errors import RunFailed, UpdateRefused
from fedlora.privacy.ledger import read_ledgers
from tests.conftest import tiny_config
from tests.in_process import RUNTIMES, client_runtime

PRIVATE = {"privacy.mode": "example", "privacy.target-epsilon": 3.0, "privacy.accountant": "rdp"}
PARTITIONS = (2, 0, 3, 1)


def content(config: RunConfig, rank: int = 4, server_round: int = 1, **settings: Any) -> RecordDict:
    """An order as it arrives."""
    adapters = fresh_adapters(client_runtime(config).model.modules, rank, 2.0, 0)
    both = frozenset("AB")
    broadcast = Broadcast(
        adapters=adapters, trained=both, uploaded=both, modules=frozenset(adapters), head={}
    )
    plain = wire.instruction_config(broadcast, wire.Needs(), "kaiming")
    told = {"server-round": server_round, "run-key": "run", **plain, **settings}
    return RecordDict(
        {
            wire.ARRAYS: wire.to_record(wire.moving_tensors(broadcast)),
            wire.CONFIG: ConfigRecord({k: v for k, v in told.items() if v != []}),
        }
    )


def assignments(config: RunConfig, path: Path, **options: Any) -> list[Assignment]:
    return [
        Assignment(
            client_runtime(config),
            wire.decode_instruction(content(config, rank=2 + k % 2)),
            config,
            Node(partition_id=partition, state_dir=path, simulation=True, **options),
        )
        for k, partition in enumerate(PARTITIONS)
    ]


def alone(given: list[Assignment]) -> list[wire.Reply]:
    return [train_instruction(one.runtime, one.instruction, one.config, one.node) for one in given]


def assert_alike(found: wire.Reply, wanted: wire.Reply) -> None:
    assert isinstance(found, wire.Reply), found
    assert (found.status, found.holds, found.missing) == (wanted.status, wanted.holds, wanted.missing)
    assert found.arrays.keys() == wanted.arrays.keys()
    for name, tensor in wanted.arrays.items():
        torch.testing.assert_close(found.arrays[name], tensor, rtol=1e-3, atol=1e-4)
    assert found.metrics == pytest.approx(wanted.metrics, rel=1e-4)
    hidden = {"ledger_head"}  # of entries that name who trained together
    both = [
        None if r.privacy is None else {k: v for k, v in r.privacy.items() if k not in hidden}
        for r in (found, wanted)
    ]
    assert both[0] == both[1]


@pytest.mark.parametrize(
    "keys", [{}, PRIVATE, {"model.head": "local", "lora.dropout": 0.2}], ids=["plain", "private", "local"]
)
def test_each_reply_is_what_its_own_message_gives(keys: dict[str, Any], tmp_path: Path, cache: Path) -> None:
    groups = [{"partitions": "0", "local-steps": 5}, {"partitions": "1,3", "learning-rate": 0.05}]
    config = tiny_config(**keys, **{"client-groups": json.dumps(groups), "train.schedule": "linear"})
    wanted = alone(assignments(config, tmp_path / "alone"))
    found = train_instructions(assignments(config, tmp_path / "together"))
    for one, other in zip(found, wanted, strict=True):
        assert_alike(one, other)
    entries = [p.read_text() for p in (tmp_path / "together").glob("ledger/*-*.jsonl")]
    assert sum(text.count('"released"') for text in entries) == (4 if config.privacy.private else 0)
    own = [sorted(p.name for p in (tmp_path / w).rglob("own-*")) for w in ("alone", "together")]
    assert own[0] == own[1]


def test_whoever_fails_falls_out_alone(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An unknown partition, a missing part, other factors, values of the wrong shape."""
    config = tiny_config()
    given = assignments(config, tmp_path)
    trained: list[int] = []
    real = train_cohort
    monkeypatch.setattr(
        oom_retry, "train_cohort", lambda m, members, t: trained.append(len(members)) or real(m, members, t)
    )
    lost = wire.decode_instruction(content(config))
    given += [
        replace(given[0], node=replace(given[0].node, partition_id=77)),
        replace(given[0], instruction=replace(lost, needs=wire.Needs(base=("f" * 64,)))),
        replace(given[0], instruction=replace(lost, config={**lost.config, "trained": "B", "uploaded": "B"})),
        replace(given[0], instruction=replace(lost, arrays={n: t[..., :-1] for n, t in lost.arrays.items()})),
    ]
    wanted = alone(given[:4])
    found = train_instructions(given)
    for one, other in zip(found[:4], wanted, strict=True):
        assert_alike(one, other)
    assert str(found[4]) == "partition-id = 77: the data has partitions 0 to 3"
    assert isinstance(found[5], wire.Reply)
    assert found[5].missing == ("f" * 64,)
    assert isinstance(found[6], wire.Reply)
    assert {name.rpartition("lora_")[2][0] for name in found[6].arrays if "lora_" in name} == {"B"}
    assert isinstance(found[7], Exception)
    assert trained == [4]


def test_spent_budgets_decline_and_the_others_train(tmp_path: Path, cache: Path) -> None:
    config = tiny_config(**PRIVATE, **{"num-server-rounds": 1})
    spent = assignments(config, tmp_path)[0]
    assert train_instruction(spent.runtime, spent.instruction, spent.config, spent.node).status == wire.OK
    again = [
        replace(one, instruction=replace(one.instruction, server_round=2))
        for one in assignments(config, tmp_path)
    ]
    found = train_instructions(again)
    assert [reply.status for reply in found if isinstance(reply, wire.Reply)] == [wire.DECLINED] + [
        wire.OK
    ] * 3
    standings = [account.standing for account in read_ledgers(tmp_path / "ledger")]
    assert [standing.releases for standing in standings] == [1] * 4


def test_all_is_charged_before_anybody_trains_and_a_failed_test_charges_nothing(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_config(**PRIVATE)
    ledgers = ledger_directory(config, tmp_path, simulation=True)

    def refuses(*_: Any) -> None:
        raise RunFailed("cohort self-test: no")

    with monkeypatch.context() as patch:
        patch.setattr(execute_cohort, "check_cohort", refuses)
        found = train_instructions(assignments(config, tmp_path))
    assert [str(error) for error in found] == ["cohort self-test: no"] * 4
    assert not ledgers.exists() or [a.standing.releases for a in read_ledgers(ledgers)] in ([], [0] * 4)
    seen: list[int] = []
    real = train_cohort

    def counted(*arguments: Any) -> Any:
        seen.extend(a.standing.releases for a in read_ledgers(ledgers))
        return real(*arguments)

    monkeypatch.setattr(oom_retry, "train_cohort", counted)
    train_instructions(assignments(config, tmp_path))
    assert seen == [1] * 4


def test_one_by_one_too_a_failed_test_charges_nothing(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from clients import budget

    def refuses(*_: Any) -> None:
        raise RunFailed("privacy self-test: no")

    monkeypatch.setattr(budget, "self_check", refuses)
    config = tiny_config(**PRIVATE)
    one = assignments(config, tmp_path)[0]
    with pytest.raises(RunFailed):
        train_instruction(one.runtime, one.instruction, one.config, one.node)
    ledgers = ledger_directory(config, tmp_path, simulation=True)
    assert not ledgers.exists() or read_ledgers(ledgers) == []


def test_the_same_cohort_again_is_the_same_release_and_another_is_not(tmp_path: Path, cache: Path) -> None:
    """The last bits depend on who trains together, so the ledger must not take them for the same ones."""
    config = tiny_config(**PRIVATE, **{"num-server-rounds": 4})

    def releases(chosen: slice) -> list[int]:
        train_instructions(assignments(config, tmp_path)[chosen])
        return [account.standing.releases for account in read_ledgers(tmp_path / "ledger")]

    assert releases(slice(4)) == [1] * 4
    assert releases(slice(4)) == [1] * 4
    assert sorted(releases(slice(2))) == [1, 1, 2, 2]


@pytest.mark.parametrize(
    "error", [MemoryError(), RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory")]
)
def test_a_cohort_that_does_not_fit_is_halved_and_marked(
    error: Exception,
    tmp_path: Path,
    cache: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    oom_retry._say.cache_clear()
    config = tiny_config(**PRIVATE)
    wanted = alone(assignments(config, tmp_path / "alone"))
    tried: list[int] = []
    real = train_cohort

    def small(model: Any, members: Any, task: Any) -> Any:
        tried.append(len(members))
        if len(members) > 1:
            raise error
        return real(model, members, task)

    monkeypatch.setattr(oom_retry, "train_cohort", small)
    with caplog.at_level(logging.WARNING):
        found = [train_instructions(assignments(config, tmp_path / n)) for n in ("one", "two")]
    assert tried == [4, 2, 1, 1, 2, 1, 1] * 2
    assert (
        len([r for r in caplog.records if "they train in halves" in r.message and ": 4 " in r.message]) == 1
    )
    for replies in found:
        for one, other in zip(replies, wanted, strict=True):
            assert_alike(one, other)
            assert wire.decode_reply(wire.encode_reply(one)).cohort_halved
    assert not wire.decode_reply(wire.encode_reply(wanted[0])).cohort_halved
    assert [a.standing.releases for a in read_ledgers(tmp_path / "one" / "ledger")] == [1] * 4


def test_what_does_not_fit_alone_is_an_error(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: Any) -> None:
        raise MemoryError("full")

    monkeypatch.setattr(oom_retry, "train_cohort", never)
    found = train_instructions(assignments(tiny_config(), tmp_path))
    assert all(isinstance(error, MemoryError) for error in found)
    assert not oom_retry.out_of_memory(RuntimeError("shapes differ"))


def test_a_model_that_cannot_trains_one_by_one(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_config()
    wanted = alone(assignments(config, tmp_path / "alone"))
    monkeypatch.setattr(execute_cohort, "why_alone", lambda model: "the head is odd")
    found = train_instructions(assignments(config, tmp_path / "together"))
    for one, other in zip(found, wanted, strict=True):
        assert all(torch.equal(one.arrays[n], t) for n, t in other.arrays.items())


def test_messages_become_replies_or_lines(tmp_path: Path, cache: Path) -> None:
    config = tiny_config()
    node = {"state-dir": str(tmp_path), "simulation": True}
    nodes = [{**node, "partition-id": p} for p in (0, 9, 1)]
    found = handle_together([content(config) for _ in nodes], [to_flat(config)] * 3, nodes, RUNTIMES)
    assert found[1] == "ConfigError: partition-id = 9: the data has partitions 0 to 3"
    assert [wire.decode_reply(found[k]).status for k in (0, 2)] == [wire.OK] * 2
    with pytest.raises(UpdateRefused):
        wire.decode_instruction(RecordDict())
    broken = handle_together(
        [RecordDict(), content(config)], [to_flat(config)] * 2, [nodes[0], nodes[2]], RUNTIMES
    )
    assert isinstance(broken[0], str)
    assert broken[0].startswith("UpdateRefused: ")
    assert wire.decode_reply(broken[1]).status == wire.OK


@pytest.mark.parametrize("together", [False, True])
def test_a_node_tells_nobody_where_its_ledger_lies(
    together: bool, tmp_path: Path, cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Its own log says so; in a simulation, which has one owner, the reply says so too."""
    config = tiny_config(**PRIVATE)
    given = assignments(config, tmp_path)[:2]
    for one in given:
        assert train_instruction(one.runtime, one.instruction, one.config, one.node).status == wire.OK
    for path in (tmp_path / "ledger").glob("*partition*.jsonl"):
        path.write_text("{}\n")
    for simulation in (True, False):
        again = [
            replace(
                one,
                instruction=replace(one.instruction, server_round=2),
                node=replace(one.node, simulation=simulation),
            )
            for one in given
        ]
        with caplog.at_level(logging.WARNING):
            found = train_instructions(again) if together else alone(again)
        for reply in found:
            assert isinstance(reply, wire.Reply)
            assert reply.status == wire.DECLINED
            assert (str(tmp_path) in reply.reason) == simulation
    assert str(tmp_path) in caplog.text


@pytest.mark.parametrize(
    ("keys", "clients", "device", "size"),
    [
        ({"train.batch-size": 4, "data.max-length": 32}, 64, "cpu", 8),
        ({"train.batch-size": 4, "data.max-length": 32}, 16, "cpu", 4),
        ({"train.batch-size": 4, "data.max-length": 32}, 4, "cpu", 1),
        ({"train.batch-size": 16, "data.max-length": 64}, 64, "cpu", 1),
        ({"train.batch-size": 16, "data.max-length": 64}, 64, "cuda", 32),
        ({"train.batch-size": 1, "data.max-length": 8, "lora.rank": 4096}, 1000, "cpu", 2),
        ({"engine.cohort-size": 3}, 64, "cpu", 3),
        ({"engine.cohort-size": 1, "train.batch-size": 1}, 64, "cuda", 1),
    ],
)
def test_the_size_follows_from_model_batch_and_run(
    keys: dict[str, Any], clients: int, device: str, size: int
) -> None:
    from fedlora.core.state import ModuleSpec

    layers = {f"{k}.query": ModuleSpec(out_features=384, in_features=384) for k in range(4)}
    assert cohort_size(tiny_config(**keys), layers, 770, clients, device) == size
