"""Keys that are stolen, rotated or revoked, and nodes that join and leave while a run is on."""

from __future__ import annotations

import subprocess
import time
import tomllib
from collections.abc import Mapping
from datetime import datetime, tzinfo
from pathlib import Path
from typing import Self

import pytest
import tomli_w
from cryptography.hazmat.primitives import serialization
from cryptography.x509 import load_pem_x509_certificate
from flwr.app import Message
from typer.testing import CliRunner

from fedlora.cli import cli
from fedlora.deployment.operator.create import create
from fedlora.deployment.operator.keys import check_server, fingerprint
from fedlora.deployment.operator.layout import SERVER_FILE, Layout, NodeKeys, open_layout, peers_of, roll_of
from fedlora.errors import ConfigError
from strategies import FedAvg
from strategies.nodes import NodeDirectory
from tests.deployment.test_roll import KEYS, KeyedGrid
from tests.federation.small import initial_arrays


def run(*arguments: object) -> tuple[int, str]:
    result = CliRunner().invoke(cli, ["federation", *map(str, arguments)])
    return result.exit_code, " ".join(result.output.split())


@pytest.fixture
def net(tmp_path: Path) -> Layout:
    return create(tmp_path / "net", 2)


def roll(net: Layout) -> dict[str, int]:
    return roll_of(net.server / SERVER_FILE)


def of_key(file: Path) -> str:
    """The fingerprint of a private key, computed from the key itself."""
    secret = serialization.load_ssh_private_key(file.read_bytes(), password=None)
    form = serialization.PublicFormat.SubjectPublicKeyInfo
    return fingerprint(secret.public_key().public_bytes(serialization.Encoding.PEM, form))


def test_an_added_node_has_the_next_partition_and_all_that_the_first_ones_have(net: Layout) -> None:
    code, said = run("add", net.path)
    assert (code, "node-2: copy nodes/node-2 to its machine" in said) == (0, True)
    home, first = net.path / "nodes" / "node-2", net.path / "nodes" / "node-0"
    assert {f.name for f in home.iterdir()} == {f.name for f in first.iterdir()}
    assert tomllib.loads((home / "node.toml").read_text())["partition-id"] == 2
    assert roll(net)[of_key(home / "key")] == 2
    assert len({(net.path / "nodes" / f"node-{k}" / "peers.toml").read_text() for k in range(3)}) == 1
    assert peers_of(net.server / SERVER_FILE) is not None


def test_a_rotated_key_takes_the_place_of_the_one_before(net: Layout) -> None:
    old, new = net.path / "nodes" / "node-1" / "key", net.path / "nodes" / "node-1" / "key.new"
    stolen = of_key(old)
    code, said = run("rotate", net.path, "node-1")
    assert (code, f"put {new} in the place of its key" in said) == (0, True)
    assert new.stat().st_mode & 0o777 == 0o600
    assert (stolen in roll(net), roll(net)[of_key(new)]) == (False, 1)
    code, said = run("rotate", net.path, "node-1")
    assert (code, "is there from before" in said) == (2, True)
    assert roll(net)[of_key(new)] == 1


def test_a_revoked_key_is_off_the_roll_and_what_operators_wrote_stays(net: Layout) -> None:
    file = net.server / SERVER_FILE
    table = tomllib.loads(file.read_text())
    table["nodes"][0]["declared-examples"] = 500
    file.write_text(tomli_w.dumps(table))
    code, said = run("revoke", net.path, "node-1")
    assert (code, "its key is off the roll" in said) == (0, True)
    assert [(n.name, n.declared_examples) for n in open_layout(net.path).nodes] == [("node-0", 500)]
    assert (net.path / "nodes" / "node-1" / "key").exists()
    code, said = run("revoke", net.path, "node-1")
    assert (code, said.startswith("error: NODE = 'node-1'")) == (2, True)
    code, said = run("add", net.path)
    assert (code, "is there already, of a node that left" in said) == (2, True)


def test_a_run_that_is_on_drops_a_revoked_key_and_takes_the_one_that_came_for_it(tmp_path: Path) -> None:
    """Node 1's key is revoked in round 1; from round 2 on node 3 stands for its partition."""
    marks = [fingerprint(key) for key in KEYS]
    current = {marks[0]: 0, marks[1]: 1, marks[2]: 2}

    class Changing(KeyedGrid):
        def answer(self, message: Message, number: int) -> Message | None:
            if message.metadata.message_type == "train" and current.pop(marks[1], None) is not None:
                current[marks[3]] = 1
            return super().answer(message, number)

    fed = FedAvg(scaling=2.0, node_directory=NodeDirectory(NodeKeys(lambda: current)))
    grid = Changing(tmp_path, {0: 0, 1: 1, 2: 2, 3: 1})
    asked: list[set[int]] = []
    send = grid.send_and_receive

    def recorded(messages: list[Message], **keys: float) -> list[Message]:
        if any(m.metadata.message_type == "train" for m in messages):
            asked.append({grid.nodes[m.metadata.dst_node_id] for m in messages})
        return list(send(messages, **keys))

    grid.send_and_receive = recorded  # type: ignore[method-assign, assignment]
    fed.start(grid, initial_arrays(), num_rounds=2)
    assert fed.report.participants == [0, 1, 2]
    assert asked == [{0, 1, 2}, {0, 2, 3}]


def test_a_roll_that_cannot_be_read_is_the_one_before(tmp_path: Path) -> None:
    answers: list[Mapping[str, int] | None] = [{fingerprint(KEYS[0]): 0}, None]

    def read() -> Mapping[str, int]:
        found = answers.pop(0)
        if found is None:
            raise ConfigError("federation.toml: cannot be read")
        return found

    keys = NodeKeys(read)
    grid = KeyedGrid(tmp_path, {0: 0})
    assert list(keys(grid).values()) == [0]
    assert answers == []


def at(monkeypatch: pytest.MonkeyPatch, years: int) -> None:
    """Certificates are made, or looked at, so many years from now."""

    class Then(datetime):
        @classmethod
        def now(cls, tz: tzinfo | None = None) -> Self:
            return cls.fromtimestamp(time.time() + years * 365 * 86400, tz)

    monkeypatch.setattr("fedlora.deployment.operator.keys.datetime", Then)


def trusted(net: Layout) -> bool:
    """Whether OpenSSL takes the server's certificate, by the authority that nodes have."""
    paths = [str(net.path / "nodes" / "node-0" / "ca.crt"), str(net.server / "server.crt")]
    done = subprocess.run(["openssl", "verify", "-CAfile", *paths], capture_output=True, check=False)
    return done.returncode == 0


@pytest.mark.parametrize("years", [-20, 11])
def test_an_expired_certificate_and_a_wrong_clock_are_one_line_before_anything_starts(
    years: int, net: Layout, monkeypatch: pytest.MonkeyPatch
) -> None:
    at(monkeypatch, years)
    for command in (("up", net.path), ("gate", net.server)):
        code, said = run(*command)
        assert code == 2
        assert said.startswith(f"error: {net.server / 'ca.crt'}: is valid from ")
        assert "and this machine's clock says" in said
    assert not net.up_file.exists()


def test_a_foreign_certificate_is_refused_and_another_is_made(net: Layout, tmp_path: Path) -> None:
    other = create(tmp_path / "other", 1)
    for name in ("server.crt", "server.key"):
        (net.server / name).write_bytes((other.server / name).read_bytes())
    code, said = run("gate", net.server)
    assert (code, "server.crt: is not signed by" in said, trusted(net)) == (2, True, False)
    code, said = run("certify", net.path, "--host", "fl.example.org")
    assert (code, trusted(net)) == (0, True)
    check_server(net.server)
    names = load_pem_x509_certificate((net.server / "server.crt").read_bytes()).extensions
    assert "fl.example.org" in str(names)
    assert (net.server / "server.key").stat().st_mode & 0o777 == 0o600
    (net.path / "ca" / "ca.key").unlink()
    code, said = run("certify", net.path)
    assert (code, "ca.key: is missing, bring ca/" in said) == (2, True)
