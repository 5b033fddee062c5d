"""Who is connected: the mapping between Flower's random node ids and stable partition ids.

A Grid that knows its partitions says so (``grid.partition_ids``). Elsewhere nodes not yet known are
asked by a ``query`` message, again every round, because nodes join, leave and return. A node whose
ClientApp has no answer (an app that is not fedlora's) is numbered by its place among the sorted node ids.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from logging import WARNING

from flwr.app import Message, MessageType, RecordDict
from flwr.common.logger import log
from flwr.serverapp import Grid

from fedlora.errors import RunFailed

POLL_SECONDS = 0.5
QUERY_TIMEOUT = 120.0


class Roster:
    """Node ids by partition id, as far as they are known."""

    def __init__(self) -> None:
        self._partition_of: dict[int, int] = {}

    def refresh(self, grid: Grid, minimum: int, timeout: float) -> dict[int, int]:
        """Node id by partition id of everybody connected, once at least ``minimum`` are.

        Raises:
            RunFailed: fewer connected within ``timeout`` seconds, or two nodes claim one partition.
        """
        known = getattr(grid, "partition_ids", None)
        nodes = _wait_for(grid, minimum, timeout)
        if known is not None:
            self._partition_of = dict(known)
        else:
            self._ask(grid, [node for node in nodes if node not in self._partition_of])
        present: dict[int, int] = {}
        for node in nodes:
            partition = self._partition_of.get(node)
            if partition is None:
                continue
            if partition in present:
                raise RunFailed(
                    f"two connected nodes claim partition {partition}: give each its own partition-id"
                )
            present[partition] = node
        return present

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
        if silent and not self._partition_of:
            log(
                WARNING,
                "%s nodes do not say their partition: numbered by node id, not reproducible",
                len(silent),
            )
            self._partition_of = {node: index for index, node in enumerate(silent)}


def _wait_for(grid: Grid, minimum: int, timeout: float) -> list[int]:
    deadline = time.monotonic() + timeout
    while True:
        nodes: Iterable[int] = sorted(grid.get_node_ids())
        found = list(nodes)
        if len(found) >= minimum:
            return found
        if time.monotonic() > deadline:
            raise RunFailed(
                f"min-available-nodes = {minimum}: only {len(found)} connected after {timeout:.0f} s"
            )
        time.sleep(POLL_SECONDS)
