"""A server that has clients of one round start unlike, in values or settings, learns nothing of any one."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import ConfigRecord, Message, RecordDict

from clients.handler import handle
from clients.secure_steps import _starts, acting
from fedlora import wire
from fedlora.config import RunConfig, to_flat
from fedlora.core.base_patches import digest
from fedlora.core.state import State
from fedlora.errors import ConfigError, RunFailed, SecureRefused
from fedlora.secure.participant import Terms
from fedlora.secure.step import SECURE, START, STARTS, Step
from fedlora.server.directory import RunDirectory
from fedlora.server.federated_run import FederatedRun
from tests.federation.secured import ENGINE, phase
from tests.federation.signed_nodes import config_of
from tests.federation.test_secure_signed import Nodes, Sent, arrives, carried_out
from tests.secure.rounds import Round, drawn

VICTIM = 2


def unsigned(home: Path, path: Path, sent: Sent = arrives, **keys: Any) -> FederatedRun:
    """A run in which nobody signs, so that it goes to its end whatever the sum is."""
    run = FederatedRun(ENGINE.session(config_of(num_server_rounds=1, **keys), path), RunDirectory(path))
    run.run(Nodes(home, run, sent, 0))
    return run


def begun(content: RecordDict, config: RunConfig, partition: int) -> bytes:
    """The digest that a client makes of its order, which an active server makes as well."""
    instruction = wire.decode_instruction(content)
    adapters, head = wire.complete_adapters(instruction, {})
    values = digest(wire.to_peft(adapters, head))
    asked = Step(content[SECURE])
    return wire.start_digest(values, instruction.config, acting(config, partition), asked)


def zeroed(content: RecordDict) -> None:
    """Factors of zero, which no step moves."""
    sent = wire.from_record(content["arrays"])
    content["arrays"] = wire.to_record(
        {n: torch.zeros_like(t) if "lora" in n else t for n, t in sent.items()}
    )


def heavy(content: RecordDict) -> None:
    """The largest weight so large that no change is left of those who write their rows by it."""
    content[SECURE]["max-weight"] = 2**28


def moved(after: State, before: State) -> torch.Tensor:
    """By how much the factors moved, in one row."""
    pairs = [(after.adapters[n].tensors(), a.tensors()) for n, a in before.adapters.items()]
    return torch.cat([(then[x] - t).reshape(-1).double() for then, first in pairs for x, t in first.items()])


def cosine(a: torch.Tensor, b: torch.Tensor) -> float:
    return float(torch.nn.functional.cosine_similarity(a, b, dim=0))


@pytest.mark.parametrize("unlike", [zeroed, heavy])
def test_masks_of_clients_that_start_unlike_do_not_cancel(
    unlike: Callable[[RecordDict], None], home: Path, cache: Path, tmp_path: Path
) -> None:
    """All but one client are sent what leaves them where they are, and told the digest that belongs to it."""
    config = config_of(num_server_rounds=1, **{"strategy.name": "fedavg"})

    def unlike_for_others(partition: int, message: Message) -> bool:
        if phase(message) == "train" and partition != VICTIM:
            message.content[SECURE] = ConfigRecord(dict(message.content[SECURE]))
            unlike(message.content)
            message.content[SECURE][START] = begun(message.content, config, partition)
        return True

    def alone(partition: int, message: Message) -> bool:
        return phase(message) != "train" or partition == VICTIM

    keys = {"strategy.name": "fedavg"}
    plain = unsigned(home, tmp_path / "plain", alone, **keys, **{"secure.mode": "none"})
    before = FederatedRun(ENGINE.session(config, tmp_path / "new"), RunDirectory(tmp_path / "new")).state
    update = moved(plain.state, before)
    assert float(update.norm()) > 0
    attacked = unsigned(home, tmp_path / "attacked", unlike_for_others, **keys)
    assert abs(cosine(moved(attacked.state, before), update)) < 0.2


def test_nodes_that_sign_do_not_unmask_for_clients_that_start_unlike(
    home: Path, cache: Path, tmp_path: Path
) -> None:
    """Their signatures are over unlike starts, so that no two of them agree."""
    config = config_of(num_server_rounds=1)

    def unlike_for_others(partition: int, message: Message) -> bool:
        if phase(message) == "train" and partition != VICTIM:
            message.content[SECURE] = ConfigRecord(dict(message.content[SECURE]))
            zeroed(message.content)
            message.content[SECURE][START] = begun(message.content, config, partition)
        return True

    with pytest.raises(RunFailed, match=r"shares of partition 0's secret are left"):
        carried_out(home, tmp_path / "run", unlike_for_others, num_server_rounds=1)


# --- what a client refuses -------------------------------------------------------------------------------


def rated(content: RecordDict) -> None:
    content["config"]["scaling"] = 1e-6


def resting(content: RecordDict) -> None:
    content["config"]["modules"] = "[]"


@pytest.mark.parametrize("unlike", [zeroed, heavy, rated, resting, None])
def test_a_client_whose_start_is_another_than_it_is_told_declines_before_it_trains(
    unlike: Callable[[RecordDict], None] | None, home: Path, cache: Path, tmp_path: Path
) -> None:
    """In one line; None: its configuration is another."""
    said: dict[str, RecordDict] = {}
    stores = {"partition-id": 1, "state-dir": str(tmp_path / "node")}

    def spoiling(partition: int, message: Message) -> bool:
        if (phase(message), partition) != ("train", 1):
            return True
        message.content[SECURE] = ConfigRecord(dict(message.content[SECURE]))
        flat = to_flat(config_of(num_server_rounds=1))
        if unlike is None:
            flat["train.learning-rate"] = 1e-9
        else:
            unlike(message.content)
        said["reply"] = handle("train", message.content, flat, stores, ENGINE.runtimes, RecordDict())
        return False

    run = unsigned(home, tmp_path / "run", spoiling)
    assert run.directory.rounds()[0]["participants"] == [0, 2, 3, 4]
    reply = said["reply"]["config"]
    assert reply["status"] == wire.DECLINED
    assert "is not what the round's clients agree on" in str(reply["reason"])
    assert "\n" not in str(reply["reason"])
    assert wire.MASKED not in said["reply"]


def test_unlike_starts_are_taken_only_where_the_configuration_has_them_and_the_own_one_is_right() -> None:
    one, other = b"1" * 32, b"2" * 32
    alike, mixed = config_of(), config_of(**{"lora.ranks": "1,2"})
    asked = {"sharers": [0, 1], START: one}
    assert _starts(Step(asked), alike, 0) == {0: one, 1: one}
    told = Step({**asked, STARTS: [one, other]})
    assert _starts(told, mixed, 0) == {0: one, 1: other}
    for config, partition, why in (
        (alike, 0, "clients start unlike, in a run in which all are asked the same"),
        (mixed, 1, "what the others are told of this client's start"),
    ):
        with pytest.raises(SecureRefused, match=why):
            _starts(told, config, partition)


@pytest.mark.parametrize(("alike", "enough"), [([0, 1], True), ([0], False)])
def test_a_sum_has_enough_clients_that_start_alike(alike: list[int], enough: bool) -> None:
    """Where they are counted, of those that shared and of those that are in the sum."""
    terms, why = Terms(min_clients=2, share=0.51, bits=32), "1 clients in the sum start as this one does"
    done = Round(terms=terms, values=drawn(5, 3))
    done.run()
    member, sealed = done.before[0], done.collector.sealed_for(0)
    if enough:
        after, _ = member.mask(range(5), sealed, drawn(1, 3)[0], terms, b"", alike)
        assert after.confirm([0, 1, 2], terms).survivors == (0, 1, 2)
        with pytest.raises(SecureRefused, match=why):
            after.confirm([0, 2, 3], terms)
    else:
        with pytest.raises(SecureRefused, match=why):
            member.mask(range(5), sealed, drawn(1, 3)[0], terms, b"", alike)


def test_where_nodes_sign_a_group_is_as_many_as_a_sum_may_be_of(
    home: Path, cache: Path, tmp_path: Path
) -> None:
    groups = '[{"partitions": "0,1", "learning-rate": 0.01}]'
    with pytest.raises(ConfigError, match=r"client-groups: 2 clients are asked for something else .* = 3$"):
        carried_out(home, tmp_path / "few", client_groups=groups, num_server_rounds=1)
    keys = {"client_groups": groups, "num_server_rounds": 1, "secure.min-clients": 2}
    run, _ = carried_out(home, tmp_path / "enough", **keys)
    assert run.directory.rounds()[0]["participants"] == [0, 1, 2, 3, 4]
    free = unsigned(home, tmp_path / "unsigned", client_groups=groups)
    assert math.isfinite(free.directory.rounds()[0]["train_loss"])
