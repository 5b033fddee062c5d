"""Nodes that sign: the same sums with one exchange more, and what their owners are told."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from flwr.app import ConfigRecord, Message, RecordDict

from clients.handler import handle
from clients.node_settings import node_settings
from clients.secure_steps import carry_out
from fedlora import client_app
from fedlora.config import to_flat
from fedlora.deployment.operator.layout import peers_of
from fedlora.errors import ConfigError, RunFailed
from fedlora.secure.peers import Peers, read_identity, read_peers
from fedlora.secure.step import MASKED, SECURE
from fedlora.server.directory import RunDirectory
from fedlora.server.federated_run import FederatedRun
from fedlora.simulation.in_process import InProcessEngine
from fedlora.simulation.local_grid import LocalGrid
from tests.federation.secured import distance, phase
from tests.federation.signed_nodes import NODES, config_of, file_of

ENGINE = InProcessEngine()
Sent = Callable[[int, Message], bool]
"""A message on its way to a partition's node, changed in place; whether it arrives."""


def known(home: Path) -> Peers:
    return peers_of(home / "server" / "federation.toml")


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
