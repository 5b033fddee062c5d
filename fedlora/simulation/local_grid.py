"""Base of Grids whose clients are always there and whose replies are collected at once.

Alone here is Flower's private task identity touched: outside a Flower process a `Message` cannot be built
until the process says which run and node it speaks for, and Flower has no public way to say so (checked on
flwr 1.41 and 1.42; a test holds this module against the installed version).
"""

from __future__ import annotations

from collections.abc import Iterable

from flwr.app import Message, RecordDict
from flwr.serverapp import Grid
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

SERVER_NODE_ID = 1
CLIENT_FAILED = 1
"""Code of an error reply: the client raised."""


class LocalGrid(Grid):
    """One node for each partition; a subclass defines `send_and_receive`.

    Args:
        partitions: the partition ids that exist.
        run_id: Flower's run id.
    """

    def __init__(self, partitions: Iterable[int], run_id: int = 1) -> None:
        self.partition_ids = {SERVER_NODE_ID + 1 + p: p for p in sorted(partitions)}
        self._run_id = run_id
        speak_as_server(run_id)

    def set_run(self, run: Run) -> None:
        """Not needed here: the run is fixed at construction."""
        raise NotImplementedError("this Grid belongs to one run")

    @property
    def run(self) -> Run:
        """Run information."""
        return Run.create_empty(self._run_id)

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
        """All nodes; they are always there."""
        return list(self.partition_ids)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Refused: replies are only collected by `send_and_receive`."""
        raise NotImplementedError("use send_and_receive")

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Refused: replies are only collected by `send_and_receive`."""
        raise NotImplementedError("use send_and_receive")


def speak_as_server(run_id: int) -> None:
    """Let this process build messages as the ServerApp of a run."""
    TaskIdentity.task_id = 1
    TaskIdentity.run_id = run_id
    TaskIdentity.node_id = SERVER_NODE_ID
