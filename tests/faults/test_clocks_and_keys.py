"""Nodes whose clocks are off, and two nodes with one key: what the operator reads, and what goes on."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

from clients.journal import read_journal
from fedlora.deployment.operator.layout import Layout
from fedlora.deployment.operator.loopback import free_ports
from fedlora.deployment.operator.operate import node_states
from fedlora.deployment.operator.scripts import flower_environment
from tests.faults.deployed import BACK_AFTER, NODES, Up, adapter, federation, run, wait_for_nodes

pytestmark = [pytest.mark.deployed, pytest.mark.timeout(900)]

KEYS: dict[str, Any] = {"strategy.name": "flora", "min_train_nodes": 2}
ROUNDS = 4


@pytest.fixture(scope="module")
def up(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Up]:
    with federation(tmp_path_factory.mktemp("clocks"), prepare=with_clocks) as found:
        yield found


@pytest.fixture(scope="module")
def undisturbed(up: Up, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("undisturbed") / "run"
    run(up, out, num_server_rounds=ROUNDS, **KEYS)
    return out


def with_clocks(layout: Layout) -> None:
    """Each node's processes have a clock of their own."""
    for entry in layout.nodes:
        set_clock(layout, entry.name, 0)
        script = layout.node(entry) / "start.sh"
        line = f"export FEDLORA_TEST_CLOCK={clock(layout, entry.name)}\n"
        script.write_text(script.read_text().replace("exec flower", f"{line}exec flower", 1))
        assert line in script.read_text()


def clock(layout: Layout, node: str) -> Path:
    return layout.path / f"{node}.clock"


def set_clock(layout: Layout, node: str, behind: float) -> None:
    """So many seconds behind the server's."""
    draft = clock(layout, node).with_suffix(".draft")
    draft.write_text(str(-behind))
    os.replace(draft, clock(layout, node))


def gate_says(layout: Layout) -> str:
    return (layout.server / "gate.log").read_text()


def test_a_clock_that_is_a_little_off_changes_nothing(up: Up, undisturbed: Path, tmp_path: Path) -> None:
    """Nearly five minutes behind, and some seconds ahead, within what Flower allows."""
    layout = up.loopback.layout
    set_clock(layout, "node-1", 295)
    set_clock(layout, "node-2", -3)
    try:
        records = run(up, tmp_path / "run", num_server_rounds=ROUNDS, **KEYS)
    finally:
        for name in ("node-1", "node-2"):
            set_clock(layout, name, 0)
    assert [(record["participants"], record["refused"]) for record in records] == [([0, 1, 2], {})] * ROUNDS
    assert adapter(tmp_path / "run") == adapter(undisturbed)
    assert not any("ended" in line for line in up.told), up.told


def test_a_clock_that_jumps_takes_its_node_out_until_it_is_set(up: Up, tmp_path: Path) -> None:
    layout = up.loopback.layout

    def after_round(record: dict[str, Any]) -> None:
        if record["round"] == 1:
            set_clock(layout, "node-1", 400)
        if "node-1 is refused, its clock is" in gate_says(layout):
            set_clock(layout, "node-1", 0)

    keys = {**KEYS, "min-available-nodes": NODES}
    records = run(up, tmp_path / "run", after_round, num_server_rounds=5, **keys)
    (said,) = [line for line in gate_says(layout).splitlines() if "node-1 is refused" in line]
    assert said.endswith(" s behind that of the server")
    assert 400 <= float(said.split("its clock is ")[1].split(" ")[0]) < 420
    present = [1 in record["participants"] for record in records]
    assert present[0]
    assert not all(present)
    assert present[-1], "it is waited for, and is back once its clock is right"
    assert all({0, 2} <= set(record["participants"]) for record in records)


@contextmanager
def twin(up: Up, home: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A second node with node 1's key on another machine: its directory, copied without what it keeps."""
    layout = up.loopback.layout
    node = layout.node(layout.nodes[1])
    shutil.copytree(node, home, ignore=shutil.ignore_patterns("state", "flwr", "*.log"))
    settings = {
        "FEDLORA_SUPERLINK": f"127.0.0.1:{up.loopback.ports['gate']}",
        "FEDLORA_NODE_PORT": str(free_ports(1)[0]),
    }
    with (home / "twin.log").open("wb") as log:
        process = subprocess.Popen(
            [str(home / "start.sh")],
            stdout=log,
            stderr=log,
            env=flower_environment(home / "flwr", **settings),
        )
    try:
        yield process
    finally:
        if process.poll() is None:
            for each in [*psutil.Process(process.pid).children(recursive=True), process]:
                each.terminate()
        process.wait()


def test_a_second_node_with_a_key_is_refused_while_the_first_is_there(
    up: Up, undisturbed: Path, tmp_path: Path
) -> None:
    with twin(up, tmp_path / "twin") as second:
        assert second.wait(60) != 0
    assert "Failed to activate SuperNode" in (tmp_path / "twin" / "twin.log").read_text()
    assert "node-1 is refused: another that is online has its key" in gate_says(up.loopback.layout)
    assert node_states(up.loopback.layout) == {"online": NODES}
    records = run(up, tmp_path / "run", num_server_rounds=ROUNDS, **KEYS)
    assert [record["participants"] for record in records] == [[0, 1, 2]] * ROUNDS
    assert adapter(tmp_path / "run") == adapter(undisturbed)


def send(what: signal.Signals, family: list[psutil.Process]) -> None:
    for process in family:
        with suppress(psutil.NoSuchProcess):  # a ClientApp lives as long as its message
            process.send_signal(what)


def test_of_two_nodes_that_got_in_with_one_key_each_order_is_carried_out_by_one_and_counted_once(
    up: Up, undisturbed: Path, tmp_path: Path
) -> None:
    """The first was away for as long as its lease; then both are there, and the SuperLink knows one."""
    wait_for_nodes(up)
    first = psutil.Process(up.loopback.processes["node-1"].pid)
    family = [first, *first.children(recursive=True)]
    send(signal.SIGSTOP, family)
    try:
        time.sleep(BACK_AFTER)
        with twin(up, tmp_path / "twin") as second:
            wait_for_nodes(up)
            send(signal.SIGCONT, family)
            records = run(up, tmp_path / "run", num_server_rounds=ROUNDS, **KEYS)
            assert second.poll() is None
    finally:
        send(signal.SIGCONT, family)
    assert first.is_running()
    assert [(record["participants"], record["refused"]) for record in records] == [([0, 1, 2], {})] * ROUNDS
    run_of = read_journal(up.state(0))[-1].run
    answered = [
        entry.round
        for home in (up.state(1), tmp_path / "twin" / "state")
        for entry in read_journal(home)
        if (entry.run, entry.asked, entry.status) == (run_of, "train", "ok")
    ]
    assert sorted(answered) == list(range(1, ROUNDS + 1))
    assert adapter(tmp_path / "run") == adapter(undisturbed)
