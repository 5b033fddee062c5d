"""Whatever arrives is understood or refused in one line; nothing is ever unpickled."""

from __future__ import annotations

import copy
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from flwr.app import ConfigRecord, RecordDict

from clients.store import ClientStore, resolve
from fedlora import wire
from fedlora.core.base_patches import Patch, digest, summed
from fedlora.core.factors import LoraFactors, Product
from fedlora.core.seeding import stream
from fedlora.core.state import Broadcast, ClientUpdate
from fedlora.errors import UpdateRefused
from fedlora.simulation.local_grid import speak_as_server
from strategies.replies import validate_reply
from strategies.request import Payload, PendingRequest
from strategies.rules.fedavg import FedAvgRule
from strategies.transport import Transport
from tests.wire.mutations import TOUCHED, mutate, picked

REPLIES, ORDERS = 4_000, 2_000
"""Of each every second has its tensors in one array; of replies every second is written by a codec, and in
every second order layers rest."""
MODULES = {"encoder.q": (12, 8), "encoder.v": (6, 10)}
HEAD = {"classifier.weight": torch.zeros(2, 6)}


def broadcast() -> Broadcast:
    g = torch.Generator().manual_seed(0)
    adapters = {
        name: LoraFactors(torch.randn(3, i, generator=g), torch.randn(o, 3, generator=g), 2.0)
        for name, (o, i) in MODULES.items()
    }
    return Broadcast(adapters=adapters, head=HEAD, trained=frozenset("AB"), uploaded=frozenset("AB"),
                     modules=frozenset(MODULES))  # fmt: skip


def reply(*, packed: bool = False, coded: bool = False) -> RecordDict:
    arrays = wire.to_peft(broadcast().adapters, HEAD)
    spent = {"epsilon": 1.5, "delta": 1e-5, "ledger_head": "0" * 64}
    metrics = {"num-examples": 12.0, "train-loss": 0.5}
    return wire.encode_reply(
        wire.Reply(
            status=wire.OK, arrays=arrays, start=arrays, metrics=metrics, privacy=spent, holds=("0" * 64,)
        ),
        wire.decode_instruction(order()) if coded else None,
        packed=packed,
    )


TERMS = [Patch({"encoder.q": Product(torch.ones(12, 2), torch.full((2, 8), n))}) for n in (1.0, 2.0)]
OTHERS = [*(t.tensors() for t in TERMS), {"encoder.q.left": torch.ones(6), "encoder.q.right": torch.ones(6)}]


def order(*, packed: bool = False, resting: bool = False, folded: bool = False) -> RecordDict:
    g = torch.Generator().manual_seed(1)
    patch = Patch({"encoder.q": Product(torch.randn(12, 2, generator=g), torch.randn(2, 8, generator=g))})
    speak_as_server(1)
    transport = Transport("kaiming", packed=packed, upload="int8")
    transport.open((patch,))
    given = broadcast()
    if resting:
        given = replace(given, modules=frozenset({"encoder.q"}), resting=frozenset({"encoder.v"}))
    if folded:
        transport.acknowledged[0] = {term.digest() for term in TERMS}
        transport.open((summed(TERMS), patch))
    transport.add(0, 2, given)
    (message,) = transport.messages("train", {"server-round": 3, "run-key": "abc"})
    return message.content


def test_spoiled_replies_are_aggregated_or_refused_in_one_line() -> None:
    outcomes = spoiled_replies(REPLIES)
    assert TOUCHED == []
    assert set(outcomes) == {"refused", "accepted"}
    assert min(outcomes.values()) > REPLIES // 20, outcomes


def spoiled_replies(count: int, seed: int = 0) -> Counter[str]:
    """What came of so many: refused, accepted, or what is wrong."""
    rng, outcomes = stream(seed, "fuzz", "replies"), Counter[str]()
    originals = [reply(packed=p, coded=c) for p in (False, True) for c in (False, True)]
    for number in range(count):
        content = copy.deepcopy(originals[number % 4])
        how = mutate(content, rng)
        sent = broadcast()
        request = PendingRequest(0, 2, sent, Payload(sent, {}, {}, [], {}), wire.Needs(), upload="int8")
        assert wire.payload_bytes(content) >= 0
        try:
            request.reply = wire.decode_reply(content)
            update = validate_reply(request, FedAvgRule.facts, weighted_by_key="num-examples")
        except UpdateRefused as error:
            outcomes["refused" if is_one_line(error) else f"{how}: {error}"] += 1
            continue
        outcomes["accepted" if sound(update) else f"{how}: accepted, and is not sound"] += 1
    return outcomes


def is_one_line(error: UpdateRefused) -> bool:
    return bool(str(error)) and "\n" not in str(error)


def sound(update: ClientUpdate) -> bool:
    tensors = [*update.head.values(), *(t for f in update.adapters.values() for t in f.tensors().values())]
    return update.weight >= 0 and all(bool(torch.isfinite(t).all()) for t in tensors)


def test_spoiled_orders_are_opened_or_refused_and_write_nowhere_else(tmp_path: Path) -> None:
    outcomes = spoiled_orders(ORDERS, tmp_path)
    assert TOUCHED == []
    assert set(outcomes) == {"refused", "opened", wire.MISSING}
    assert min(outcomes["refused"], outcomes["opened"]) > ORDERS // 20, outcomes


def spoiled_orders(count: int, outside: Path, seed: int = 0) -> Counter[str]:
    """What came of so many: refused, opened, missing, or what is wrong.

    Raises:
        AssertionError: something was written beside the client's store.
    """
    rng, outcomes = stream(seed, "fuzz", "orders"), Counter[str]()
    originals = [order(packed=p, resting=r) for p in (False, True) for r in (False, True)]
    originals.append(order(folded=True))
    home = outside / "deep" / "home"
    for part in OTHERS:
        ClientStore(home / "abc").keep(digest(part), part)
    for number in range(count):
        content = copy.deepcopy(originals[number % 5])
        how = mutate(content, rng)
        if number % 25 == 4:  # a sum of whatever is here
            content.config_records.get("config", ConfigRecord())["base-sum-of"] = [
                digest(picked(OTHERS, rng)) for _ in range(3)
            ]
        try:
            decoded = wire.decode_instruction(content)
            opened = resolve(decoded, ClientStore(home / str(decoded.config.get("run-key", "run"))))
        except UpdateRefused as error:
            outcomes["refused" if is_one_line(error) else f"{how}: {error}"] += 1
            continue
        outcomes["opened" if not isinstance(opened, wire.Reply) else opened.status] += 1
    assert [path.name for path in outside.iterdir()] == ["deep"]
    assert [path.name for path in (outside / "deep").iterdir()] == ["home"]
    return outcomes


@pytest.mark.parametrize("run_key", ["../x", "/etc", "", "a/b", "a" * 65, ".."])
def test_a_run_key_is_no_way_out_of_the_state_directory(run_key: str) -> None:
    content = order()
    content.config_records["config"]["run-key"] = run_key
    with pytest.raises(UpdateRefused, match="run-key"):
        wire.decode_instruction(content)


def test_the_trap_is_one() -> None:
    import pickle

    from tests.wire.mutations import Trap

    pickle.loads(pickle.dumps(Trap()))
    assert TOUCHED == ["unpickled"]
    TOUCHED.clear()
