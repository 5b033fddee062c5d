"""``compose.yaml`` without Docker: what its services say is carried out on this machine, in their order."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from fedlora.deployment.operator.create import create
from fedlora.deployment.operator.loopback import free_ports
from fedlora.server.results import read_result
from tests.docs_commands import ROOT, Command, verify

SERVICES: dict[str, Any] = yaml.safe_load((ROOT / "compose.yaml").read_text())["services"]
NODES = [name for name in SERVICES if name.startswith("node-")]
BIN = Path(sys.executable).parent


def words(name: str) -> list[str]:
    return [str(word) for word in SERVICES[name]["command"]]


def fedlora_commands(name: str) -> list[list[str]]:
    """Those of fedlora in a service, also where a shell puts them together."""
    line = words(name)[2] if words(name)[:2] == ["sh", "-c"] else shlex.join(words(name))
    parts = [shlex.split(part) for part in line.replace("||", "&&").split("&&")]
    return [part for part in parts if part[0] == "fedlora"]


def test_its_commands_are_accepted_and_its_scripts_are_made(tmp_path: Path) -> None:
    (init,) = fedlora_commands("init")
    assert init[init.index("--nodes") + 1] == str(len(NODES)) == "3"
    for name in SERVICES:
        for command in fedlora_commands(name):
            verify(Command(f"compose.yaml: {name}", tuple(command)))
    create(tmp_path / "net", 3, ["superlink"])
    scripts = [words(name)[0] for name in SERVICES if words(name)[0].endswith(".sh")]
    assert len(scripts) == 2 + len(NODES)
    for script in scripts:
        assert os.access(tmp_path / Path(script).relative_to("/federation"), os.X_OK), script


def test_every_service_waits_for_one_that_is_there() -> None:
    for name, service in SERVICES.items():
        assert set(service.get("depends_on", {})) <= SERVICES.keys() - {name}
        network = service.get("network_mode", "none").removeprefix("service:")
        assert network in ("none", *SERVICES)


@contextmanager
def carried_out(name: str, home: Path, port: int) -> Iterator[subprocess.Popen[bytes]]:
    """The command of a service, with the volume in a directory and another port."""
    instead = {
        "/federation": str(home),
        "/tmp/run.toml": f"{home}/run.toml",
        "--host superlink": f"--host superlink --port {port}",
    }
    given = words(name)
    for before, after in instead.items():
        given = [word.replace(before, after) for word in given]
    settings = {
        "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
        "FEDLORA_SUPERLINK": f"127.0.0.1:{port}",
        "FEDLORA_NODE_PORT": str(free_ports(1)[0]),
        "FEDLORA_GATE_HOST": "127.0.0.1",
    }
    with (home / f"{name}.log").open("ab") as log:
        process = subprocess.Popen(given, env={**os.environ, **settings}, stdout=log, stderr=log)
    try:
        yield process
    finally:
        if process.poll() is None:
            for each in [*psutil.Process(process.pid).children(recursive=True), process]:
                each.kill()
        process.wait()


def finished(name: str, home: Path, port: int) -> None:
    with carried_out(name, home, port) as process:
        assert process.wait(300) == 0, (home / f"{name}.log").read_text()


def healthy(name: str, port: int) -> None:
    check = SERVICES[name]["healthcheck"]["test"]
    given = [sys.executable, *(word.replace("8001", str(port + 1)) for word in check[2:])]
    for _ in range(60):
        if subprocess.run(given, capture_output=True, check=False).returncode == 0:
            return
        time.sleep(1)
    raise AssertionError(f"{name} does not become healthy")


@pytest.mark.deployed
def test_what_its_services_say_ends_in_a_result(tmp_path: Path, cache: Path) -> None:
    port = free_ports(1)[0]
    finished("init", tmp_path, port)
    with carried_out("superlink", tmp_path, port):
        healthy("superlink", port)
        with carried_out("gate", tmp_path, port):
            finished("register", tmp_path, port)
            first, second, third = (carried_out(node, tmp_path, port) for node in NODES)
            with first, second, third:
                finished("run", tmp_path, port)
    assert read_result(tmp_path / "first")["rounds"] == 2
