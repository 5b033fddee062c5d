"""Process of a node that keeps the base model between messages; see `fedlora.deployment.node.model_client`.

It listens on a Unix socket of mode 0600 in the node's directory and on nothing else, serves one message after
the other, and ends when the process that started the first ClientApp does.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import psutil
from flwr.app import RecordDict

from fedlora.deployment.node.model_client import (
    DONE,
    ERROR,
    OTHER_CODE,
    SOCKET,
    code_path,
    from_bytes,
    to_bytes,
)
from fedlora.deployment.node.processes import is_running
from fedlora.deployment.node.sockets import is_own_user, listening
from fedlora.errors import named_line

WATCH_SECONDS = 1.0
LARGEST_HEAD = 64 * 2**20
Handle = Callable[[str, RecordDict, Mapping[str, Any], Mapping[str, Any]], RecordDict]
"""`clients.handler.handle` with the model of this process."""


def serve(home: Path, owner: int) -> None:
    """Serve messages until the owner is gone or a message comes from other code.

    Args:
        home: the node's directory.
        owner: the process with which this one ends.
    """
    with listening(home / SOCKET) as listener:
        threading.Thread(target=_end_with, args=(owner, home / SOCKET), daemon=True).start()
        from clients.handler import handle
        from clients.runtime import RuntimeCache

        answer = partial(handle, runtimes=RuntimeCache())
        while True:
            accepted, _ = listener.accept()
            own = is_own_user(accepted)
            with Connection(accepted.detach()) as connection:
                if own and not _answer(connection, answer):
                    (home / SOCKET).unlink(missing_ok=True)
                    return


def _answer(connection: Connection, handle: Handle) -> bool:
    """Answer one message; False if it comes from other code."""
    try:
        about, body = json.loads(connection.recv_bytes(LARGEST_HEAD)), connection.recv_bytes()
        same_code = bool(about["code"] == code_path())
        said, reply = _carried_out(about, body, handle) if same_code else (OTHER_CODE, b"")
        connection.send_bytes(said.encode())
        connection.send_bytes(reply)
        return same_code
    except (EOFError, OSError, KeyError, TypeError, ValueError) as error:
        if not isinstance(error, EOFError):  # who only looks whether somebody listens says nothing
            print(f"a message was dropped: {named_line(error)}", file=sys.stderr, flush=True)
        return True


def _carried_out(about: Mapping[str, Any], body: bytes, handle: Handle) -> tuple[str, bytes]:
    """Outcome of a request, and the reply or the reason."""
    try:
        content = from_bytes(body)
        return DONE, to_bytes(handle(about["kind"], content, about["run-config"], about["node-config"]))
    except Exception as error:
        import traceback

        traceback.print_exc()
        return ERROR, named_line(error).encode()


def _end_with(owner: int, path: Path) -> None:
    with suppress(psutil.NoSuchProcess):
        process = psutil.Process(owner)
        while is_running(process):
            time.sleep(WATCH_SECONDS)
    path.unlink(missing_ok=True)
    os._exit(0)


if __name__ == "__main__":
    serve(Path(sys.argv[1]), int(sys.argv[2]))
