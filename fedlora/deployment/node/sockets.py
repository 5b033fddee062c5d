"""Sockets of a node's own processes: files of mode 0600 that only its user can open."""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

LONGEST_PATH = 100


@contextmanager
def reachable(path: Path) -> Iterator[str]:
    """A spelling of a socket's path that is short enough for the system, while the block runs."""
    if len(os.fsencode(path)) <= LONGEST_PATH:
        yield str(path)
        return
    folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        yield f"/proc/self/fd/{folder}/{path.name}"
    finally:
        os.close(folder)


def connected(path: Path) -> socket.socket:
    """A connection to whoever listens.

    Raises:
        OSError: nobody does.
    """
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        with reachable(path) as short:
            connection.connect(short)
    except OSError:
        connection.close()
        raise
    return connection


def listening(path: Path) -> socket.socket:
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


def is_own_user(connection: socket.socket) -> bool:
    """Whether the other side is of this user, where the system says so (Linux)."""
    option = getattr(socket, "SO_PEERCRED", None)
    if option is None:
        return True
    credentials = connection.getsockopt(socket.SOL_SOCKET, option, struct.calcsize("3i"))
    return int(struct.unpack("3i", credentials)[1]) == os.getuid()
