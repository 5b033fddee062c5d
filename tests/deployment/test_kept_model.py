"""The process that keeps the model: the same answer, one process for all messages, no door but its socket."""

from __future__ import annotations

import json
import os
import socket
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict

from clients.handler import TRAIN, handle
from clients.node_settings import node_settings
from fedlora import wire
from fedlora.config import to_flat
from fedlora.deployment.node import model_client as asking
from fedlora.deployment.node.model_client import FAILED, SOCKET, ask, from_bytes, start, to_bytes
from fedlora.errors import RunFailed
from tests.conftest import tiny_config
from tests.deployment.test_limits import order
from tests.in_process import RUNTIMES

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


def exchanged(home: Path, about: bytes, body: bytes) -> tuple[bytes, bytes]:
    with asking._connect(home) as connection:
        connection.send_bytes(about)
        connection.send_bytes(body)
        return connection.recv_bytes(), connection.recv_bytes()


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
    plain = handle(TRAIN, content, flat, {**node(tmp_path / "plain"), "keep-model": False}, RUNTIMES)
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

    about = {"kind": TRAIN, "code": asking.code_path(), "run-config": flat, "node-config": node(home)}
    with asking._connect(home) as connection:
        connection.send_bytes(json.dumps(about).encode())
        os.write(connection.fileno(), (2**20).to_bytes(4, "big") + b"half a message")
    with asking._connect(home) as connection:
        os.write(connection.fileno(), (2**31 - 1).to_bytes(4, "big") + b"a head of absurd length")
        with pytest.raises((EOFError, ConnectionResetError)):
            connection.recv_bytes()
    for nonsense in (b"", b"[]", b"{}", b"\xff" * 64):
        with pytest.raises((EOFError, ConnectionResetError, BrokenPipeError)):
            exchanged(home, nonsense, to_bytes(content))
    assert exchanged(home, json.dumps(about).encode(), b"\xff" * 64)[0] == asking.ERROR.encode()
    assert server.is_running(), "nor does one that cannot be read"

    elsewhere = json.dumps({**about, "code": "elsewhere"}).encode()
    assert exchanged(home, elsewhere, to_bytes(content)) == (asking.OTHER_CODE.encode(), b"")
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
    monkeypatch.setattr(sys, "executable", "/bin/false")
    settings = node_settings(node(tmp_path))
    began = time.monotonic()
    for _ in range(2):
        assert ask(TRAIN, wire.encode_reply(wire.Reply(status=wire.OK)), {}, node(tmp_path), settings) is None
    assert len(said) == 1
    assert (tmp_path / FAILED).exists()
    assert time.monotonic() - began < 10


def test_records_arrive_as_they_were() -> None:
    content = RecordDict(
        {
            "arrays": ArrayRecord(
                {
                    "a": Array(np.arange(6, dtype=np.float32).reshape(2, 3)),
                    "b": Array(np.zeros((0, 4), dtype=np.float16)),
                }
            ),
            "metrics": MetricRecord({"loss": 0.5, "n": 3, "many": [1.0, 2.0]}),
            "config": ConfigRecord({"s": "x", "flag": True, "blob": b"\x00\xff", "blobs": [b"a", b""]}),
        }
    )
    received = from_bytes(to_bytes(content))
    assert received == content
    types = {key: type(value) for key, value in content["config"].items()}
    assert {key: type(value) for key, value in received["config"].items()} == types


def test_where_it_dies_over_a_message_the_client_app_does_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(asking, "log", lambda *_: None)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / SOCKET))
        listener.listen()

        def die_over_the_second() -> None:
            for _ in range(2):  # the first only looks whether somebody listens
                listener.accept()[0].close()

        server = threading.Thread(target=die_over_the_second)
        server.start()
        content = wire.encode_reply(wire.Reply(status=wire.OK))
        assert ask(TRAIN, content, {}, node(tmp_path), node_settings(node(tmp_path))) is None
        server.join()
    assert (tmp_path / FAILED).exists()
