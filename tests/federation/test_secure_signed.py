"""Nodes that sign: a server invents no client, replays none, and tells nobody a list of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from flwr.app import ConfigRecord, Message, RecordDict
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from clients.handler import handle
from clients.node_settings import node_settings
from clients.secure_steps import carry_out
from fedlora import client_app
from fedlora.config import RunConfig, from_flat, to_flat
from fedlora.deployment.operator.create import create
from fedlora.deployment.operator.layout import peers_of
from fedlora.errors import ConfigError, RunFailed
from fedlora.secure.participant import Participant
from fedlora.secure.peers import ALGORITHM, PUBLIC, SURVIVORS, Peers, read_identity, read_peers, to_sign
from fedlora.secure.step import MASKED, SECURE
from fedlora.server.directory import RunDirectory
from fedlora.server.federated_run import FederatedRun
from fedlora.simulation.in_process import InProcessEngine
from fedlora.simulation.local_grid import LocalGrid
from tests.federation.test_secure import KEYS, VALUES, distance, phase

ENGINE = InProcessEngine()
NODES = 5
Sent = Callable[[int, Message], bool]
"""A message on its way to a partition's node, changed in place; whether it arrives."""


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a federation, as `fedlora federation init` makes it."""
    return create(tmp_path_factory.mktemp("signed") / "f", NODES).path


def file_of(home: Path, partition: int) -> Path:
    return home / "nodes" / f"node-{partition}" / "peers.toml"


def known(home: Path) -> Peers:
    return peers_of(home / "server" / "federation.toml")


def config_of(**keys: Any) -> RunConfig:
    more = {k.replace("_", "-"): v for k, v in keys.items()}
    return from_flat({**KEYS, "engine.cohort-size": 1, "secure.threshold": 0.6, **more})


class Nodes(LocalGrid):
    """Nodes in this process that sign with their own keys."""

    def __init__(self, home: Path, run: FederatedRun, sent: Sent, signing: int) -> None:
        super().__init__(range(NODES))
        self.config, self.stores, self.sent = to_flat(run.config), str(run.session.stores), sent
        self.files = {p: str(file_of(home, p)) if p < signing else "" for p in range(NODES)}
        self.states = {p: RecordDict() for p in range(NODES)}
        self.phases: list[str] = []

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        replies = []
        for message in messages:
            partition = self.partition_ids[message.metadata.dst_node_id]
            message.metadata.__dict__["_message_id"] = f"{len(self.phases)}"
            self.phases.append(phase(message))
            node = {"partition-id": partition, "simulation": True, "state-dir": self.stores,
                    "secure-peers": self.files[partition]}  # fmt: skip
            if self.sent(partition, message):
                kind = message.metadata.message_type
                content = handle(
                    kind, message.content, self.config, node, ENGINE.runtimes, self.states[partition]
                )
                replies.append(Message(content, reply_to=message))
        return replies


def arrives(partition: int, message: Message) -> bool:
    return True


def carried_out(
    home: Path, path: Path, sent: Sent = arrives, *, signing: int = NODES, **keys: Any
) -> tuple[FederatedRun, Nodes]:
    session = ENGINE.session(config_of(**keys), path)
    session.peers = known(home)
    run = FederatedRun(session, RunDirectory(path))
    grid = Nodes(home, run, sent, signing)
    run.run(grid)
    return run, grid


def test_a_signed_run_has_one_exchange_more_and_the_same_bits(
    home: Path, cache: Path, tmp_path: Path
) -> None:
    run, grid = carried_out(home, tmp_path / "run")
    steps = ["advertise", "share", "train", "confirm", "unmask"]
    assert grid.phases == [step for step in steps * 2 for _ in range(NODES)]
    plain = FederatedRun(
        ENGINE.session(config_of(), tmp_path / "unsigned"), RunDirectory(tmp_path / "unsigned")
    )
    plain.run()
    assert distance(run.state, plain.state) == 0


@pytest.mark.parametrize("gone", [2, 3])
def test_clients_may_vanish_before_they_confirm(gone: int, home: Path, cache: Path, tmp_path: Path) -> None:
    """Three of five signatures are enough at 0.6; of two the others take nothing."""

    def vanishing(partition: int, message: Message) -> bool:
        return partition >= gone or phase(message) not in ("confirm", "unmask")

    if gone == 2:
        run, _ = carried_out(home, tmp_path / "run", vanishing)
        assert run.directory.rounds()[-1]["participants"] == list(range(NODES))
    else:
        with pytest.raises(RunFailed, match="0 shares of partition 0's secret are left, 3 needed"):
            carried_out(home, tmp_path / "run", vanishing)


def test_a_client_that_signs_nothing_or_wrongly_is_left_out(home: Path, cache: Path, tmp_path: Path) -> None:
    """And costs the others no round: the server sees it before they do."""
    run, _ = carried_out(home, tmp_path / "run", signing=4, num_server_rounds=1)
    line = run.directory.rounds()[0]
    assert line["participants"] == [0, 1, 2, 3]
    assert line["refused"] == {
        "4": "secure sums, advertise: it signs nothing: secure-peers in its node.toml is empty"
    }


def test_what_the_process_with_the_model_trained_leaves_under_masks(
    home: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The row comes to the process that has the secrets as it is, and leaves it masked, or not at all."""
    plain = handle
    clear: list[bytes] = []

    def in_two_processes(
        kind: str, content: RecordDict, config: Any, node: Any, runtimes: Any, state: RecordDict
    ) -> RecordDict:
        if kind != "train":
            return plain(kind, content, config, node, runtimes, state)
        reply = plain(kind, content, config, node, runtimes)
        clear.append(reply[MASKED][MASKED].numpy().tobytes())
        context: Any = SimpleNamespace(run_config=config, node_config=node, state=RecordDict())
        refused = client_app._masked(RecordDict(dict(reply)), content, context)
        assert MASKED not in refused
        assert "no keys for that round" in str(refused["config"]["reason"])
        context.state = state
        masked = client_app._masked(reply, content, context)
        assert clear[-1] != masked[MASKED][MASKED].numpy().tobytes()
        return masked

    whole, _ = carried_out(home, tmp_path / "one", num_server_rounds=1)
    monkeypatch.setitem(globals(), "handle", in_two_processes)
    parts, _ = carried_out(home, tmp_path / "two", num_server_rounds=1)
    assert len(clear) == NODES
    assert distance(parts.state, whole.state) == 0


# --- an active server -----------------------------------------------------------------------------------


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


# --- whatever a server sends ------------------------------------------------------------------------------


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


# --- files of an owner ----------------------------------------------------------------------------------


def test_a_node_whose_file_is_not_right_declines_and_tells_its_owner_why(
    home: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    lines = file_of(home, 0).read_text().splitlines()
    whole = {line.split(" = ")[0]: line for line in lines if " = " in line}
    key = (file_of(home, 0).parent / "key").read_bytes()
    (tmp_path / "key").write_bytes(key)
    for text, why in (
        ("", "names no node"),
        ("0 = 3", "0 = '3': must be a partition and its ECDSA key"),
        ("a" + whole["0"], "a0 = 'ecdsa"),
        (f"{whole['0']}\n1{whole['0'][1:]}", "1: another partition has the same key"),
        (f'0 = "ssh-ed25519 {"A" * 68}"', "must be a partition and its ECDSA key"),
        (f"{whole['0']}\n00{whole['1'][1:]}", "00 = 'ecdsa"),
        ("0 = ", "cannot be read"),
        (whole["1"], "partition 0 has another key there than this node"),
        (f"0{whole['1'][1:]}", "partition 0 has another key there than this node"),
    ):
        file = tmp_path / "peers.toml"
        file.write_text(text)
        with pytest.raises(ConfigError, match=why.replace("(", r"\(")) as caught:
            read_identity(file, 0)
        assert "\n" not in str(caught.value)
        assert str(file) in str(caught.value)
        caplog.clear()
        settings = node_settings({"partition-id": 0, "secure-peers": str(file)})
        asked = RecordDict({SECURE: ConfigRecord({"phase": "advertise", "session": "a"})})
        answer = carry_out(asked, config_of(), settings, RecordDict(), simulation=True)[SECURE]
        assert answer == ConfigRecord({"reason": "the node declines; its own log says why"})
        assert why in caplog.text
    with pytest.raises(ConfigError, match="there is no such file"):
        read_peers(tmp_path / "none.toml")
    (tmp_path / "peers.toml").write_text("\n".join(lines))
    (tmp_path / "key").write_bytes(key[:50])
    with pytest.raises(ConfigError, match="cannot be read as a private key"):
        read_identity(tmp_path / "peers.toml", 0)


def test_an_owner_says_how_many_holders_it_takes(home: Path) -> None:
    settings = node_settings({"partition-id": 0, "secure-threshold": 0.66})
    asked = RecordDict({SECURE: ConfigRecord({"phase": "advertise", "session": "a"})})
    answer = carry_out(asked, config_of(), settings, RecordDict(), simulation=True)[SECURE]
    assert answer["reason"] == "secure.threshold = 0.6: this node's owner has secure-threshold = 0.66"
    allowed = carry_out(
        asked, config_of(**{"secure.threshold": 0.66}), settings, RecordDict(), simulation=True
    )[SECURE]
    assert "keys" in allowed
