"""A node whose network breaks in the middle of a run and heals: its machine is a network namespace here."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fedlora.deployment.operator.layout import Layout
from tests.faults.deployed import NODES, Up, federation, run

pytestmark = [pytest.mark.deployed, pytest.mark.timeout(1200)]

NAMESPACE, OUTSIDE, INSIDE = f"fedlora-{os.getpid()}", f"fo{os.getpid()}", f"fi{os.getpid()}"
SERVER, NODE = "10.211.99.1", "10.211.99.2"


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)


@pytest.fixture(scope="module")
def namespace() -> Iterator[None]:
    """One more machine, joined to this one by a cable."""
    if os.geteuid() != 0 or shutil.which("ip") is None:
        pytest.skip("needs root and the command ip")
    try:
        ip("netns", "add", NAMESPACE)
    except subprocess.CalledProcessError as error:
        pytest.skip(f"no network namespace can be made here: {error.stderr.strip()}")
    try:
        ip("link", "add", OUTSIDE, "type", "veth", "peer", "name", INSIDE, "netns", NAMESPACE)
        ip("address", "add", f"{SERVER}/30", "dev", OUTSIDE)
        ip("link", "set", OUTSIDE, "up")
        ip("-n", NAMESPACE, "address", "add", f"{NODE}/30", "dev", INSIDE)
        ip("-n", NAMESPACE, "link", "set", INSIDE, "up")
        ip("-n", NAMESPACE, "link", "set", "lo", "up")
        yield
    finally:
        ip("netns", "delete", NAMESPACE)


def moved_out(layout: Layout) -> None:
    """Node 2 runs on the other machine, and the gate listens where that can reach it."""
    start = layout.path / "nodes" / "node-2" / "start.sh"
    text = start.read_text()
    here = text[text.index('"${FEDLORA_SUPERLINK') : text.index(" --root-certificates")]
    text = text.replace(here, f'"{SERVER}:${{FEDLORA_SUPERLINK##*:}}"')
    start.write_text(
        text.replace("exec flower-supernode", f"exec ip netns exec {NAMESPACE} flower-supernode")
    )
    gate = layout.server / "gate.sh"
    gate.write_text(gate.read_text().replace('"${FEDLORA_GATE_HOST:-0.0.0.0}"', "0.0.0.0"))


@pytest.fixture(scope="module")
def up(namespace: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Up]:
    home = tmp_path_factory.mktemp("partitioned")
    with federation(home, ("127.0.0.1", SERVER), moved_out) as found:
        yield found


def test_the_round_closes_without_it_and_it_takes_part_again(up: Up, tmp_path: Path) -> None:
    def after_round(record: dict[str, Any]) -> None:
        if record["round"] == 2:
            ip("link", "set", OUTSIDE, "down")
        if record["round"] == 3:
            ip("link", "set", OUTSIDE, "up")

    keys = {"strategy.name": "flora", "min-available-nodes": NODES}  # it is waited for after round 3
    records = run(up, tmp_path / "run", after_round, num_server_rounds=6, **keys)
    present = [2 in record["participants"] for record in records]
    assert present[:2] == [True, True]
    assert not present[2]
    back = present.index(True, 2)
    assert all(present[back:])
    for record in records:
        assert {0, 1} <= set(record["participants"])
    assert not any("node-2 ended" in line for line in up.told), "it never had to be started again"
