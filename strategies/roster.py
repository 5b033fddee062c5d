"""Who is connected: the mapping between Flower's random node ids and stable partition ids.

A Grid that knows its partitions says so (``grid.partition_ids``). Elsewhere nodes not yet known are
asked by a ``query`` message, again every round, because nodes join, leave and return. A node whose
ClientApp has no answer (an app that is not fedlora's) is numbered by its place among the sorted node ids.
Where a roll says which node stands for which partition, a node that claims another one takes no part.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from logging import WARNING

from flwr.app import Message, MessageType, RecordDict
from flwr.common.logger import log
from flwr.serverapp import Grid

from fedlora.errors import RunFailed

POLL_SECONDS = 0.5
QUERY_TIMEOUT = 120.0


Roll = Callable[[Grid], Mapping[int, int | None]]
"""The partition that each connected node stands for, whatever it says; None where it stands for none."""


class Roster:
    """Node ids by partition id, as far as they are known.

    Args:
        roll: which node stands for which partition; None takes the nodes' word.

    Attributes:
        refused: partition id -> why the node that stands for it takes no part; as of the last `refresh`.
    """

    def __init__(self, roll: Roll | None = None) -> None:
        self._partition_of: dict[int, int] = {}
        self._roll = roll
        self._stands_for: Mapping[int, int | None] = {}
        self._strangers: set[int] = set()
        self.refused: dict[int, str] = {}

    def refresh(self, grid: Grid, minimum: int, timeout: float) -> dict[int, int]:
        """Node id by partition id of everybody connected, once at least ``minimum`` are.

        Raises:
            RunFailed: fewer connected within ``timeout`` seconds, or two nodes claim one partition.
        """
        known = getattr(grid, "partition_ids", None)
        nodes = _wait_for(lambda: self._connected(grid), minimum, timeout)
        if known is not None:
            self._partition_of = dict(known)
        else:
            self._ask(grid, [node for node in nodes if node not in self._partition_of])
        present: dict[int, int] = {}
        self.refused = {}
        for node in nodes:
            partition = self._partition_of.get(node)
            if partition is None or self._lies(node, partition):
                continue
            if partition in present:
                raise RunFailed(
                    f"two connected nodes claim partition {partition}: give each its own partition-id"
                )
            present[partition] = node
        return present

    def _connected(self, grid: Grid) -> list[int]:
        """The connected nodes, sorted; those that are not on the roll are named once and left out."""
        if self._roll is None:
            return sorted(grid.get_node_ids())
        self._stands_for = self._roll(grid)
        strangers = {node for node, partition in self._stands_for.items() if partition is None}
        for node in sorted(strangers - self._strangers):
            log(WARNING, "node %s takes no part: its key is not on the roll", node)
        self._strangers |= strangers
        return sorted(self._stands_for.keys() - strangers)

    def _lies(self, node: int, claimed: int) -> bool:
        """Whether a node claims another partition than it stands for; noted in `refused`."""
        partition = claimed if self._roll is None else self._stands_for[node]
        if partition is None or partition == claimed:
            return False
        self.refused[partition] = f"its node claims partition {claimed}, but its key stands for {partition}"
        return True

    def _ask(self, grid: Grid, unknown: list[int]) -> None:
        if not unknown:
            return
        questions = [Message(RecordDict(), node, MessageType.QUERY) for node in unknown]
        for reply in grid.send_and_receive(questions, timeout=QUERY_TIMEOUT):
            if reply.has_content() and "config" in reply.content.config_records:
                answer = reply.content.config_records["config"].get("partition-id")
                if isinstance(answer, int):
                    self._partition_of[reply.metadata.src_node_id] = answer
        silent = sorted(node for node in unknown if node not in self._partition_of)
        if silent and not self._partition_of and self._roll is None:
            log(
                WARNING,
                "%s nodes do not say their partition: numbered by node id, not reproducible",
                len(silent),
            )
            self._partition_of = {node: index for index, node in enumerate(silent)}


def _wait_for(connected: Callable[[], list[int]], minimum: int, timeout: float) -> list[int]:
    deadline = time.monotonic() + timeout
    while True:
        found = connected()
        if len(found) >= minimum:
            return found
        if time.monotonic() > deadline:
            raise RunFailed(
                f"min-available-nodes = {minimum}: only {len(found)} connected after {timeout:.0f} s"
            )
        time.sleep(POLL_SECONDS)
