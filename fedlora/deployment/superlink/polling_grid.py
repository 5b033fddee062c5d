"""A Grid that asks for replies more often than Flower's own, which sleeps three seconds between questions."""

from __future__ import annotations

import time
from collections.abc import Iterable

from flwr.app import Message, RecordDict
from flwr.serverapp import Grid
from flwr.supercore.run import Run

POLL_SECONDS = 0.25


class PollingGrid(Grid):
    """Flower's Grid with another `send_and_receive`.

    Args:
        grid: whose messages are pushed and pulled.
        seconds: between two questions for replies.
    """

    def __init__(self, grid: Grid, seconds: float = POLL_SECONDS) -> None:
        self._grid = grid
        self._seconds = seconds
        self._overdue: set[str] = set()

    def set_run(self, run: Run) -> None:
        """As the Grid behind it."""
        self._grid.set_run(run)

    @property
    def run(self) -> Run:
        """As the Grid behind it."""
        return self._grid.run

    def create_message(
        self,
        content: RecordDict,
        message_type: str,
        dst_node_id: int,
        group_id: str,
        ttl: float | None = None,
    ) -> Message:
        """A new message to a node."""
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> Iterable[int]:
        """As the Grid behind it."""
        return self._grid.get_node_ids()

    def get_nodes(self) -> Iterable[object]:  # type: ignore[override]  # Flower exports no name for it
        """As the Grid behind it: each node's id, public key and state."""
        return self._grid.get_nodes()

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """As the Grid behind it."""
        return self._grid.push_messages(messages)

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """As the Grid behind it."""
        return self._grid.pull_messages(message_ids)

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        """Send all messages and wait for the replies, at most ``timeout`` seconds.

        Messages that could not be sent are left out: their nodes count as silent.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        waiting = {identifier for identifier in self._grid.push_messages(list(messages)) if identifier}
        replies: list[Message] = []
        while waiting:
            found = list(self._grid.pull_messages(waiting))
            replies += found
            waiting -= {message.metadata.reply_to_message_id for message in found}
            if not waiting or (deadline is not None and time.monotonic() >= deadline):
                break
            time.sleep(self._seconds)
        self._overdue |= waiting
        return replies

    def late(self) -> list[Message]:
        """Replies that have come since to messages of which `send_and_receive` gave up; each once."""
        replies = list(self._grid.pull_messages(self._overdue)) if self._overdue else []
        self._overdue -= {message.metadata.reply_to_message_id for message in replies}
        return replies
