"""At a node, in the short-lived process of a ClientApp: let the process that keeps the model do the work.

Flower starts a new process for every message. Importing torch, transformers and peft there and loading the
base model takes longer than a round of training a small adapter, so a process of the node's own keeps both
(`fedlora.deployment.node.model_server`), reached through a socket in the node's directory that only its user
can open. Where that does not work the ClientApp does the work itself, and says so once.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from logging import WARNING
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from flwr.app import RecordDict
from flwr.common.logger import log
from flwr.common.serde import recorddict_from_proto, recorddict_to_proto
from flwr.proto.recorddict_pb2 import RecordDict as ProtoRecordDict

from clients.node_settings import NodeSettings
from fedlora.core.code import code_root
from fedlora.deployment.node.processes import launch
from fedlora.deployment.node.sockets import connected
from fedlora.errors import RunFailed, named_line

SOCKET, LOG, FAILED = "model.sock", "model.log", "model.failed"
START_SECONDS = 60.0
DONE, ERROR, OTHER_CODE = "done", "error", "other code"
"""How an answer begins; after ``other code`` the process ends, to make room for one of this code."""


def code_path() -> str:
    """Directory of this code: another version of the app lies elsewhere."""
    return str(code_root())


def ask(
    kind: str,
    content: RecordDict,
    run_config: Mapping[str, Any],
    node_config: Mapping[str, Any],
    settings: NodeSettings,
) -> RecordDict | None:
    """The reply to a message by the process that keeps the model, or None where there is none.

    Raises:
        RunFailed: the message could not be carried out.
    """
    about = {"kind": kind, "code": code_path(), "run-config": run_config, "node-config": node_config}
    try:
        said, reply = _exchange(json.dumps(about).encode(), to_bytes(content), settings.home)
    except (OSError, EOFError) as error:
        _say_once(settings.home, named_line(error))
        return None
    (settings.home / FAILED).unlink(missing_ok=True)
    if said == ERROR:
        raise RunFailed(reply.decode())
    return from_bytes(reply)


def to_bytes(content: RecordDict) -> bytes:
    """Records as Flower sends them."""
    return bytes(recorddict_to_proto(content).SerializeToString())


def from_bytes(body: bytes) -> RecordDict:
    """Records that Flower could have sent.

    Raises:
        DecodeError: it is none of them.
    """
    return recorddict_from_proto(ProtoRecordDict.FromString(body))


def start(home: Path) -> None:
    """Start the process that keeps the model, if none listens; it is ready for messages when this returns.

    Raises:
        OSError: it does not start.
    """
    home.mkdir(parents=True, exist_ok=True)
    try:
        _connect(home).close()
    except OSError:
        _start(home)


def _exchange(about: bytes, body: bytes, home: Path) -> tuple[str, bytes]:
    for _ in range(3):
        start(home)
        with _connect(home) as connection:
            connection.send_bytes(about)
            connection.send_bytes(body)
            said, reply = connection.recv_bytes().decode(), connection.recv_bytes()
        if said != OTHER_CODE:
            return said, reply
    raise ConnectionError("the process that keeps the model has other code")


def _connect(home: Path) -> Connection:
    return Connection(connected(home / SOCKET).detach())


def _start(home: Path) -> None:
    search = os.pathsep.join(filter(None, (code_path(), os.environ.get("PYTHONPATH", ""))))
    # The process above a ClientApp lives as long as the SuperNode does.
    env = {**os.environ, "PYTHONPATH": search}
    process = launch("fedlora.deployment.node.model_server", home, os.getppid(), LOG, env)
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        try:
            _connect(home).close()
            return
        except OSError:
            time.sleep(0.05)
    raise ConnectionError(f"the process that keeps the model did not start, see {home / LOG}")


def _say_once(home: Path, reason: str) -> None:
    """One warning until it has worked again, though every message has its own process."""
    mark = home / FAILED
    if not mark.exists():
        log(WARNING, "The model is loaded anew for every message: %s", reason)
        mark.parent.mkdir(parents=True, exist_ok=True)
        mark.write_text(reason + "\n")
