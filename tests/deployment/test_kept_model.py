"""The process that keeps the model: the same answer, one process for all messages, no door but its socket."""

from __future__ import annotations

import os
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from clients.handler import TRAIN, handle
from clients.node_settings import node_settings
from fedlora import wire
from fedlora.config import to_flat
from fedlora.deployment.node import model_client as asking
from fedlora.deployment.node.ipc import receive_frame, send_frame
from fedlora.deployment.node.model_client import FAILED, SOCKET, ask, start
from fedlora.errors import RunFailed
from tests.conftest import tiny_config
from tests.deployment.test_limits import order

pytestmark = pytest.mark.slow


@pytest.fixture
def owner(monkeypatch: pytest.MonkeyPatch) -> Iterator[subprocess.Popen[bytes]]:
    """The process with which the kept model ends, in the place of a SuperNode's."""
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    monkeypatch.setattr(os, "getppid", lambda: process.pid)
    yield process
    process.kill()
    process.wait()


def server_of(home: Path) -> psutil.Process:
    found = [p for p in psutil.process_iter(["cmdline"]) if str(home) in (p.info["cmdline"] or [])]
    assert len(found) == 1
    return found[0]


def node(home: Path) -> dict[str, Any]:
    return {"partition-id": 0, "state-dir": str(home), "keep-model": True}


def test_one_process_answers_all_messages_with_the_same_bits_and_ends_with_its_owner(
    owner: subprocess.Popen[bytes], tmp_path: Path, cache: Path
) -> None:
    home = tmp_path / ("a directory whose path is too long for the address of a Unix socket" * 2) / "state"
    config = tiny_config()
    settings, flat, content = node_settings(node(home)), to_flat(config), order(config, 1)
    first = ask(TRAIN, content, flat, node(home), settings)
    server = server_of(home)
    second = ask(TRAIN, content, flat, node(home), settings)
    plain = handle(TRAIN, content, flat, {**node(tmp_path / "plain"), "keep-model": False})
    assert first is not None
    assert second is not None
    assert server_of(home).pid == server.pid
    here, there, again = (wire.decode_reply(r).arrays for r in (plain, first, second))
    assert all(torch.equal(here[name], there[name]) for name in here)
    assert all(torch.equal(here[name], again[name]) for name in here)

    mode = (home / SOCKET).stat().st_mode
    assert stat.S_ISSOCK(mode)
    assert stat.S_IMODE(mode) == 0o600
    assert stat.S_IMODE(home.stat().st_mode) == 0o700
    assert server.net_connections("inet") == []

    with pytest.raises(RunFailed, match="UpdateRefused"):
        ask(TRAIN, wire.encode_reply(wire.Reply(status=wire.OK)), flat, node(home), settings)
    assert server.is_running(), "a message that cannot be carried out ends nothing"

    with socket.socket(socket.AF_UNIX) as connection, asking.reachable(home / SOCKET) as path:
        connection.connect(path)
        connection.sendall(b"\xff" * 64)
    with socket.socket(socket.AF_UNIX) as connection, asking.reachable(home / SOCKET) as path:
        connection.connect(path)
        send_frame(connection, {"code": "elsewhere"}, content)
        assert receive_frame(connection) == ({"status": asking.OTHER_CODE}, {})
    server.wait(10)
    start(home)
    fresh = server_of(home)
    assert fresh.pid != server.pid
    owner.kill()
    owner.wait()
    fresh.wait(15)
    assert not (home / SOCKET).exists()


def test_without_it_the_client_app_is_told_so_and_the_reason_is_said_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[tuple[object, ...]] = []
    monkeypatch.setattr(asking, "log", lambda *arguments: said.append(arguments))
    monkeypatch.setattr(asking.sys, "executable", "/bin/false")
    settings = node_settings(node(tmp_path))
    began = time.monotonic()
    for _ in range(2):
        assert ask(TRAIN, wire.encode_reply(wire.Reply(status=wire.OK)), {}, node(tmp_path), settings) is None
    assert len(said) == 1
    assert (tmp_path / FAILED).exists()
    assert time.monotonic() - began < 10
