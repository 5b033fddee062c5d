"""A server that invents clients, replays them, or tells each node a list of its own: nobody answers it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from flwr.app import ConfigRecord, RecordDict
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from clients.node_settings import node_settings
from clients.secure_steps import carry_out
from fedlora.config import RunConfig
from fedlora.secure.participant import Participant
from fedlora.secure.peers import ALGORITHM, PUBLIC, SURVIVORS, read_identity, to_sign
from fedlora.secure.step import SECURE
from tests.federation.secured import VALUES
from tests.federation.signed_nodes import NODES, config_of, file_of


@dataclass
class Server:
    """An active server, and nodes that it plays with step by step."""

    home: Path
    config: RunConfig = field(default_factory=config_of)
    states: dict[int, RecordDict] = field(default_factory=lambda: {p: RecordDict() for p in range(NODES)})

    def ask(self, partition: int, **asked: Any) -> dict[str, Any]:
        settings = node_settings(
            {"partition-id": partition, "secure-peers": str(file_of(self.home, partition))}
        )
        content = RecordDict({SECURE: ConfigRecord(asked)})
        return dict(
            carry_out(content, self.config, settings, self.states[partition], simulation=True)[SECURE]
        )

    def keys(self, session: str, partitions: Iterable[int] = range(NODES)) -> dict[int, dict[str, Any]]:
        return {p: self.ask(p, phase="advertise", session=session) for p in partitions}

    def share(self, partition: int, session: str, told: dict[int, dict[str, Any]]) -> dict[str, Any]:
        keys, signatures = ([told[p][what] for p in sorted(told)] for what in ("keys", "signature"))
        return self.ask(
            partition,
            phase="share",
            session=session,
            partitions=sorted(told),
            keys=keys,
            signatures=signatures,
        )


def invented(home: Path, told: dict[int, dict[str, Any]]) -> tuple[dict[int, dict[str, Any]], str]:
    """A sixth client, with keys and a signature of the server's own."""
    own, member = ec.generate_private_key(ec.SECP384R1()), Participant.advertise("a", 5)
    signed = own.sign(to_sign(PUBLIC, "a", 5, member.public), ALGORITHM)
    return told | {5: {"keys": member.public, "signature": signed}}, "partition 5 is none of the registered"


def another(home: Path, told: dict[int, dict[str, Any]]) -> tuple[dict[int, dict[str, Any]], str]:
    """Keys of the server's own in the name of a registered node."""
    member = Participant.advertise("a", 3)
    return told | {3: {**told[3], "keys": member.public}}, "partition 3 says is not signed by its node's key"


def unsigned(home: Path, told: dict[int, dict[str, Any]]) -> tuple[dict[int, dict[str, Any]], str]:
    return told | {3: {**told[3], "signature": b""}}, "not signed by its node's key"


def in_its_place(home: Path, told: dict[int, dict[str, Any]]) -> tuple[dict[int, dict[str, Any]], str]:
    """One node's signed keys in the name of another."""
    return told | {3: told[4], 4: told[3]}, "not signed by its node's key"


def replayed(home: Path, told: dict[int, dict[str, Any]]) -> tuple[dict[int, dict[str, Any]], str]:
    """What nodes signed in an earlier round, whose secrets the server may have put together since."""
    earlier = Server(home).keys("round 1 of run x, b", [3])
    return told | earlier, "partition 3 says is not signed by its node's key"


def as_survivors(home: Path, told: dict[int, dict[str, Any]]) -> tuple[dict[int, dict[str, Any]], str]:
    """A signature of the same node over something else that it said."""
    secret = read_identity(file_of(home, 3), 3).secret
    signed = secret.sign(to_sign(SURVIVORS, "a", 3, told[3]["keys"]), ALGORITHM)
    return told | {3: {**told[3], "signature": signed}}, "not signed by its node's key"


@pytest.mark.parametrize("lie", [invented, another, unsigned, in_its_place, replayed, as_survivors])
def test_no_node_shares_with_clients_that_a_server_made_up(lie: Callable[..., Any], home: Path) -> None:
    server = Server(home)
    told, why = lie(home, server.keys("a"))
    assert why in server.share(0, "a", told)["reason"]
    assert "sealed" in server.share(0, "a", server.keys("a")), "what is not made up is taken"


def confirming(home: Path) -> tuple[Server, dict[int, Participant]]:
    """Five nodes that have uploaded, which is made up here: masks are what no signature is about."""
    server = Server(home)
    told = server.keys("a")
    for p in range(NODES):
        server.share(p, "a", told)
        record = server.states[p][SECURE]
        record["done"], record["sharers"] = "uploaded", list(range(NODES))
    return server, {p: Participant.of(server.states[p][SECURE]) for p in range(NODES)}


def test_a_server_that_tells_each_a_list_of_its_own_learns_nothing(home: Path) -> None:
    """Each leaves out others than the next: all lists are long enough, and no two are the same."""
    server, _ = confirming(home)
    signed = {
        p: server.ask(p, phase="confirm", session="a", survivors=sorted({*range(NODES)} - {(p + 1) % NODES}))
        for p in range(NODES)
    }
    told = {"signers": list(range(NODES)), "signatures": [signed[p]["signature"] for p in range(NODES)]}
    for p in range(NODES):
        assert (
            "is not signed by its node's key" in server.ask(p, phase="unmask", session="a", **told)["reason"]
        )
        alone = {"signers": [p], "signatures": [signed[p]["signature"]]}
        said = server.ask(p, phase="unmask", session="a", **alone)["reason"]
        assert said == "1 clients signed who is in the sum, the least is 3"
        assert server.ask(p, phase="confirm", session="a", survivors=list(range(NODES)))["reason"].startswith(
            "out of turn: this client has confirmed"
        ), "it signs no second list"


def test_no_node_unmasks_without_the_others_signatures(home: Path) -> None:
    server, _ = confirming(home)
    there = list(range(NODES))
    told = server.ask(0, phase="unmask", session="a", survivors=there)
    assert told["reason"] == "0 clients signed who is in the sum, the least is 3"
    signed = [server.ask(p, phase="confirm", session="a", survivors=there)["signature"] for p in there]
    twice = server.ask(
        0, phase="unmask", session="a", signers=[0, 0, 1], signatures=[*signed[:1] * 2, signed[1]]
    )
    assert twice["reason"] == "signers names a partition twice"
    told = server.ask(0, phase="unmask", session="a", signers=[0, 1, 2], signatures=signed[:3])
    assert told["own-of"] == [0], "of the others it was given none here"
    again = server.ask(0, phase="unmask", session="a", signers=there, signatures=signed)
    assert "no keys for that round" in again["reason"]


def test_nodes_that_were_told_unlike_thresholds_do_not_agree(home: Path) -> None:
    server, _ = confirming(home)
    there = list(range(NODES))
    signed = [server.ask(p, phase="confirm", session="a", survivors=there)["signature"] for p in there]
    server.config = config_of(**{"secure.threshold": 0.51})
    told = server.ask(0, phase="unmask", session="a", signers=there, signatures=signed)
    assert "partition 0 says is not signed" in told["reason"]


@pytest.fixture(scope="module")
def steps(home: Path) -> dict[str, tuple[RecordDict, dict[str, Any]]]:
    """Of each step, node 0's state before it and the right order."""
    server, there = Server(home), list(range(NODES))
    told = server.keys("a")
    advertised = RecordDict(dict(server.states[0]))
    keys, signatures = ([told[p][what] for p in there] for what in ("keys", "signature"))
    for p in there:
        server.share(p, "a", told)
        uploaded = server.states[p][SECURE]
        uploaded["done"], uploaded["sharers"] = "uploaded", there
    before = RecordDict(dict(server.states[0]))
    signed = [server.ask(p, phase="confirm", session="a", survivors=there)["signature"] for p in there]
    return {
        "advertise": (RecordDict(), {}),
        "share": (advertised, {"partitions": there, "keys": keys, "signatures": signatures}),
        "confirm": (before, {"survivors": there}),
        "unmask": (server.states[0], {"signers": there, "signatures": signed}),
    }


@given(data=st.data())
@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_spoiled_step_is_refused_in_one_line_and_costs_the_node_nothing(
    data: st.DataObject, home: Path, steps: dict[str, tuple[RecordDict, dict[str, Any]]]
) -> None:
    """Values of every kind, orders of other steps, at each step; after it the right order is taken."""
    settings_ = node_settings({"partition-id": 0, "secure-peers": str(file_of(home, 0))})
    at, other = data.draw(st.sampled_from(sorted(steps))), data.draw(st.sampled_from(sorted(steps)))
    asked = {"phase": other, "session": "a", **steps[other][1]}
    key = data.draw(st.sampled_from(sorted(asked)))
    match data.draw(st.sampled_from(["dropped", "changed", "shortened", "kept"])):
        case "dropped":
            asked.pop(key)
        case "changed":
            asked[key] = data.draw(VALUES)
        case "shortened":
            asked[key] = asked[key][1:]
    before = dict(steps[at][0])
    state = RecordDict(before)

    def told(asked: dict[str, Any]) -> ConfigRecord:
        return carry_out(
            RecordDict({SECURE: ConfigRecord(asked)}), config_of(), settings_, state, simulation=True
        )[SECURE]

    answer = told(asked)
    if "reason" not in answer:
        assert asked["phase"] in ("advertise", at), "nothing is answered out of turn"
        return
    assert "\n" not in str(answer["reason"])
    assert dict(state) == before
    assert "reason" not in told({"phase": at, "session": "a", **steps[at][1]})
