"""Process of a node that has imported what a message's process needs, and forks one for each message.

Flower starts a new process for every message, and its imports take longer than most of what is done there.
A node that runs its own fedlora (`fedlora.pinned_client_app`) has this process do it once. What is forked for
a message is what Flower would have started, and ends as that would; nothing of one message is there for
the next, as none is carried out in this process.

It listens on a Unix socket of mode 0600 in the node's directory and on nothing else, and ends when Flower's
process that starts the messages' does, or when the code on the disk is no longer what it has imported.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import socket
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil

from fedlora.core.code import code_root, top_packages
from fedlora.deployment.node.fork_client import SOCKET, TAKEN
from fedlora.deployment.node.processes import is_running
from fedlora.deployment.node.sockets import is_own_user, listening
from fedlora.pinned_client_app.message import carry_out, preload

OTHER_CODE = b"other code"
"""What is answered where the code has changed, before this process ends."""
ASKED = {"arguments", "environment", "directory"}
"""What a request holds."""
LOOK_SECONDS = 1.0
"""How often it looks whether its owner is still there."""
END_SECONDS = 3.0
"""How long a process has to end when it is told to."""
LARGEST_REQUEST = 2**20
Stamp = frozenset[tuple[str, int, int]]


def serve(home: Path, owner: psutil.Process) -> None:
    """Fork until the owner is gone, another process listens in this one's place, or the code has changed.

    Args:
        home: the node's directory.
        owner: the process with which this one ends.
    """
    preload()
    code, path = stamp(), home / SOCKET
    with listening(path) as listener:
        listener.settimeout(LOOK_SECONDS)
        own = path.stat().st_ino
        while is_running(owner) and inode(path) == own:
            try:
                connection, _ = listener.accept()
            except TimeoutError:
                multiprocessing.active_children()  # reaps those that have ended
                continue
            with connection:
                if is_own_user(connection) and not _taken(connection, listener, code):
                    break
        if inode(path) == own:
            path.unlink()
    _end(owner)


def _end(owner: psutil.Process) -> None:
    """Wait for the messages that are being carried out; without the owner nobody waits for their answers.

    Their own process would try for ever to reach a node that is gone.
    """
    while (left := multiprocessing.active_children()) and is_running(owner):
        time.sleep(LOOK_SECONDS)
    for end in (multiprocessing.Process.terminate, multiprocessing.Process.kill):
        for process in left:
            end(process)
        for process in left:
            process.join(END_SECONDS)


def inode(path: Path) -> int:
    """The number of a file; 0 where there is none."""
    return path.stat().st_ino if path.exists() else 0


def stamp() -> Stamp:
    """The files of the code with their times and sizes; another one where any was changed."""
    files = [file for package in top_packages() for file in (code_root() / package).rglob("*.py")]
    return frozenset((str(file), file.stat().st_mtime_ns, file.stat().st_size) for file in files)


def _taken(connection: socket.socket, listener: socket.socket, code: Stamp) -> bool:
    """Fork for one request; False if the code has changed."""
    connection.settimeout(LOOK_SECONDS)
    streams: list[int] = []
    try:
        body, streams, _, _ = socket.recv_fds(connection, LARGEST_REQUEST, 2)
        if not body:
            return True  # who only looks whether somebody listens says nothing
        while len(body) < LARGEST_REQUEST and (more := connection.recv(LARGEST_REQUEST - len(body))):
            body += more
        request = json.loads(body)
        if len(streams) != 2 or not isinstance(request, dict) or request.keys() != ASKED:
            raise ValueError("it asks for something else")
        if stamp() != code:
            connection.sendall(OTHER_CODE)
            return False
        context = multiprocessing.get_context("fork")
        context.Process(target=_carry_out, args=(request, streams, listener)).start()
        connection.sendall(TAKEN)
    except (OSError, ValueError, TypeError) as error:
        print(f"a request was dropped: {type(error).__name__}", file=sys.stderr, flush=True)
    finally:
        for stream in streams:
            os.close(stream)
    return True


def _carry_out(request: Mapping[str, Any], streams: list[int], listener: socket.socket) -> None:
    """In the forked process: what the started one would do."""
    listener.close()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for stream, own in zip(streams, (1, 2), strict=True):
        os.dup2(stream, own)
        os.close(stream)
    os.environ.clear()
    os.environ.update(request["environment"])
    os.chdir(request["directory"])
    sys.argv[1:] = request["arguments"]
    carry_out()


if __name__ == "__main__":
    serve(Path(sys.argv[1]), psutil.Process(int(sys.argv[2])))
