"""Nodes that die, lose their disk, or cannot be reached for a while; strangers who are not let in."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fedlora.deployment.operator.create import create
from fedlora.deployment.operator.layout import Layout
from fedlora.deployment.operator.loopback import free_ports
from fedlora.deployment.operator.operate import node_states
from fedlora.deployment.operator.scripts import flower_environment
from fedlora.secure.peers import PEERS_FILE
from tests.faults.deployed import NODES, Up, adapter, federation, run

pytestmark = [pytest.mark.deployed, pytest.mark.timeout(1500)]

KEYS: dict[str, Any] = {"strategy.name": "flora"}
"""Its clients hold a growing chain of base patches."""
STRANGER_SECONDS = 90.0
"""Until a stranger has given up, at the latest."""


@pytest.fixture(scope="module")
def up(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Up]:
    with federation(tmp_path_factory.mktemp("lost"), prepare=shadowed) as found:
        yield found


def shadowed(layout: Layout) -> None:
    """Let node 1 look for packages in a directory of its own first."""
    script = layout.path / "nodes" / "node-1" / "start.sh"
    path = f"export PYTHONPATH={shadow(layout)}:$PYTHONPATH\n"
    script.write_text(script.read_text().replace("export PATH=", f"{path}export PATH=", 1))
    assert path in script.read_text()


def shadow(layout: Layout) -> Path:
    return layout.path / "shadow"


def test_a_node_with_another_library_takes_no_part_until_it_has_the_servers(up: Up, tmp_path: Path) -> None:
    other = shadow(up.loopback.layout) / "peft-0.1.0.dist-info"
    other.mkdir(parents=True)
    (other / "METADATA").write_text("Metadata-Version: 2.1\nName: peft\nVersion: 0.1.0\n")

    def after_round(record: dict[str, Any]) -> None:
        if record["round"] == 1:
            shutil.rmtree(other)

    records = run(up, tmp_path / "run", after_round, num_server_rounds=4)
    assert records[0]["participants"] == [0, 2]
    assert records[0]["refused"]["1"].startswith("its node has peft 0.1.0, here ")
    assert records[-1]["participants"] == [0, 1, 2]
    assert records[-1]["refused"] == {}


def test_a_killed_node_that_lost_its_disk_comes_back_and_is_served_all_it_lacks(
    up: Up, tmp_path: Path
) -> None:
    def after_round(record: dict[str, Any]) -> None:
        if record["round"] == 3:
            up.kill("node-1")
            shutil.rmtree(up.state(1))

    keys = {**KEYS, "min-available-nodes": NODES}  # after the round in which it dies it is waited for
    records = run(up, tmp_path / "run", after_round, num_server_rounds=8, **keys)
    present = [1 in record["participants"] for record in records]
    assert all(present[:3])
    assert not all(present[3:5])
    back = present.index(True, present.index(False))
    assert all(present[back:])
    for record in records:
        assert {0, 2} <= set(record["participants"])
    down = [record["bytes_down"] for record in records]
    assert down[back] > 1.4 * down[-1], "the whole chain travelled to it, added up"
    assert any(line.startswith("node-1 ended") for line in up.told)


def test_a_disk_lost_between_rounds_changes_no_bit(up: Up, tmp_path: Path) -> None:
    def after_round(record: dict[str, Any]) -> None:
        if record["round"] == 2:
            for kept in up.state(0).iterdir():
                if kept.is_dir():
                    shutil.rmtree(kept)

    run(up, tmp_path / "undisturbed", num_server_rounds=4, min_train_nodes=3, **KEYS)
    records = run(up, tmp_path / "lost", after_round, num_server_rounds=4, min_train_nodes=3, **KEYS)
    assert all(record["participants"] == [0, 1, 2] for record in records)
    assert adapter(tmp_path / "lost") == adapter(tmp_path / "undisturbed")


@pytest.mark.parametrize(
    ("stranger", "reason"), [("key", "Failed to activate SuperNode"), ("ca", "CERTIFICATE_VERIFY_FAILED")]
)
def test_strangers_are_not_let_in(stranger: str, reason: str, up: Up, tmp_path: Path) -> None:
    """A node with a key that nobody registered; a node that trusts another CA than the server's."""
    other = create(tmp_path / "other", 1)
    ours = up.loopback.layout
    node = other.node(other.nodes[0])
    if stranger == "key":
        shutil.copy(ours.server / "ca.crt", node / "ca.crt")
    else:
        known = ours.node(ours.nodes[0])
        for file in ("key", PEERS_FILE):  # a key that its own peers.toml does not name ends it sooner
            shutil.copy(known / file, node / file)
    log, ports = tmp_path / "node.log", up.loopback.ports
    settings = {
        "FEDLORA_SUPERLINK": f"127.0.0.1:{ports['gate']}",
        "FEDLORA_NODE_PORT": str(free_ports(1)[0]),
    }
    with log.open("wb") as file:
        process = subprocess.Popen(
            [str(node / "start.sh")],
            stdout=file,
            stderr=file,
            env=flower_environment(node / "flwr", **settings),
        )
    try:
        assert process.wait(STRANGER_SECONDS) != 0
    finally:
        process.kill()
        process.wait()
    assert reason in log.read_text()
    assert node_states(ours) == {"online": NODES}
