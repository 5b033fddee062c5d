"""Process of a node that keeps the base model between messages; see `fedlora.deployment.node.model_client`.

It listens on a Unix socket of mode 0600 in the node's directory and on nothing else, serves one message after
the other, and ends when the process that started the first ClientApp does.
"""

from __future__ import annotations

import os
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import psutil
from flwr.app import RecordDict

from fedlora.deployment.node.ipc import receive_frame, send_frame
from fedlora.deployment.node.model_client import DONE, ERROR, OTHER_CODE, SOCKET, code_path, reachable
from fedlora.errors import UpdateRefused, named_line

WATCH_SECONDS = 1.0
Handle = Callable[[str, RecordDict, Mapping[str, Any], Mapping[str, Any]], RecordDict]
"""`clients.handler.handle`."""


def serve(home: Path, owner: int) -> None:
    """Serve messages until the owner is gone or a message comes from other code.

    Args:
        home: the node's directory.
        owner: the process with which this one ends.
    """
    with _listening(home / SOCKET) as listener:
        threading.Thread(target=_end_with, args=(owner, home / SOCKET), daemon=True).start()
        from clients.handler import handle

        while True:
            connection, _ = listener.accept()
            with connection:
                if _is_own_user(connection) and not _answer(connection, handle):
                    (home / SOCKET).unlink(missing_ok=True)
                    return


def _answer(connection: socket.socket, handle: Handle) -> bool:
    """Answer one message; False if it comes from other code."""
    try:
        frame = receive_frame(connection)
        if frame is None:
            return True
        about, content = frame
        if about["code"] != code_path():
            send_frame(connection, {"status": OTHER_CODE}, RecordDict())
            return False
        said, reply = _carry_out(about, content, handle)
        send_frame(connection, said, reply)
    except (OSError, KeyError, UpdateRefused) as error:
        print(f"a message was dropped: {error}", file=sys.stderr, flush=True)
    return True


def _carry_out(
    about: dict[str, Any], content: RecordDict, handle: Handle
) -> tuple[dict[str, str], RecordDict]:
    try:
        return {"status": DONE}, handle(about["kind"], content, about["run-config"], about["node-config"])
    except Exception as error:
        import traceback

        traceback.print_exc()
        return {"status": ERROR, "reason": named_line(error)}, RecordDict()


def _listening(path: Path) -> socket.socket:
    """A socket that only this user can open, put in the place of one that a dead process left."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.parent.chmod(0o700)
    draft = path.with_suffix(f".{os.getpid()}")
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    mask = os.umask(0o177)
    try:
        with reachable(draft) as short:
            listener.bind(short)
    finally:
        os.umask(mask)
    listener.listen()
    draft.rename(path)
    return listener


def _is_own_user(connection: socket.socket) -> bool:
    """Whether the other side is of this user, where the system says so (Linux)."""
    option = getattr(socket, "SO_PEERCRED", None)
    if option is None:
        return True
    credentials = connection.getsockopt(socket.SOL_SOCKET, option, struct.calcsize("3i"))
    return int(struct.unpack("3i", credentials)[1]) == os.getuid()


def _end_with(owner: int, path: Path) -> None:
    try:
        process = psutil.Process(owner)
        while process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
            time.sleep(WATCH_SECONDS)
    except psutil.NoSuchProcess:
        pass
    path.unlink(missing_ok=True)
    os._exit(0)


if __name__ == "__main__":
    serve(Path(sys.argv[1]), int(sys.argv[2]))
