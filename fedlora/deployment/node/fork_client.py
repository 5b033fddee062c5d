"""A node's fork server as others see it: how it is started, and how a message's process is asked of it.

Only the standard library is imported, as this is what each message begins with.
"""

from __future__ import annotations

import json
import os
import socket
from pathlib import Path

from fedlora.deployment.node.sockets import connected

SOCKET, LOG, TAKEN = "fork.sock", "fork.log", b"taken"
OWNER = "FEDLORA_FORKS_FOR"
"""Names the process of Flower's that starts messages' processes, to those whose node may fork them."""
ANSWER_SECONDS = 10.0


def handed_over(home: Path, arguments: list[str]) -> bool:
    """Whether the fork server of a node has taken a message's process.

    Args:
        home: the node's directory.
        arguments: of ``flwr-clientapp``.
    """
    request = {"arguments": arguments, "environment": dict(os.environ), "directory": str(Path.cwd())}
    try:
        with connected(home / SOCKET) as connection:
            connection.settimeout(ANSWER_SECONDS)
            body = json.dumps(request).encode()
            sent = socket.send_fds(connection, [body], [1, 2])
            connection.sendall(body[sent:])
            connection.shutdown(socket.SHUT_WR)
            return connection.recv(len(TAKEN)) == TAKEN
    except OSError:
        return False


def start(home: Path) -> None:
    """Start the fork server of a node that has none, if its messages' processes may be forked.

    Args:
        home: the node's directory.

    Raises:
        OSError: it does not start.
    """
    owner = os.environ.get(OWNER, "")
    if not owner:
        return
    try:
        connected(home / SOCKET).close()
    except OSError:
        from fedlora.deployment.node.processes import launch

        launch("fedlora.pinned_client_app.fork_server", home, owner, LOG)
