"""Directory of connected nodes: Flower's random node ids and stable partition ids.

A Grid that knows its partitions says so (``grid.partition_ids``). Elsewhere nodes not yet known are
asked by a ``query`` message, again every round, because nodes join, leave and return. A node whose
ClientApp has no answer (an app that is not fedlora's) gets the next number that nobody has had, in the order
of node ids: it keeps it for as long as it keeps its node id, and a node that comes back under another id is a
new client. So does a second node that claims a partition which another connected node holds. Where the
partitions are a closed list (``closed``, or a roll), numbers are not given away: a node without an answer
takes no part, unless no node has one, and of two nodes with one partition the first one keeps it.
A node whose libraries cannot work with those here (`fedlora.core.code.compared`) takes no part, and is asked
again in every round; of smaller differences a line in the log tells.
Where a roll says which node stands for which partition, a node that claims another one takes no part.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from logging import WARNING

from flwr.app import Message, MessageType, RecordDict
from flwr.common.logger import log
from flwr.serverapp import Grid

from fedlora.core.code import compared, versions
from fedlora.errors import RunFailed

POLL_SECONDS = 0.5
QUERY_TIMEOUT = 120.0
CONNECT_TIMEOUT = 600.0
"""Seconds to wait for the nodes that a run wants."""


PartitionOf = Callable[[Grid], Mapping[int, int | None]]
"""The partition that each connected node stands for, whatever it says; None where it stands for none."""


class NodeDirectory:
    """Node ids by partition id, as far as they are known.

    Args:
        roll: which node stands for which partition; None takes the nodes' word.
        closed: the partitions are a fixed list, of which no number is given to a node that claims none.

    Attributes:
        refused: partition id -> why the node that stands for it takes no part; as of the last `refresh`.
    """

    def __init__(self, roll: PartitionOf | None = None, *, closed: bool = False) -> None:
        self._partition_of: dict[int, int] = {}
        self._numbered: set[int] = set()
        self._roll = roll
        self._closed = closed or roll is not None
        self._stands_for: Mapping[int, int | None] = {}
        self._strangers: set[int] = set()
        self._unlike: dict[int, tuple[int, str]] = {}
        self.refused: dict[int, str] = {}

    def refresh(self, grid: Grid, minimum: int, timeout: float) -> dict[int, int]:
        """Node id by partition id of everybody connected, once at least ``minimum`` are.

        Raises:
            RunFailed: fewer connected within ``timeout`` seconds, or, where the partitions are a closed
                list, two nodes that were not known before claim one of them.
        """
        known = getattr(grid, "partition_ids", None)
        nodes = _wait_for(lambda: self._connected(grid), minimum, timeout)
        earlier = set(self._partition_of)
        if known is not None:
            self._partition_of = dict(known)
        else:
            unknown = [node for node in nodes if node not in self._partition_of]
            self._partition_of |= self._ask(grid, unknown)
            known_now = self._partition_of.keys() | self._unlike.keys()
            self._number([node for node in unknown if node not in known_now])
        self.refused = dict(self._unlike.values())
        present: dict[int, int] = {}
        for node in sorted(nodes, key=lambda node: (node not in earlier, node not in self._numbered, node)):
            partition = self._partition_of.get(node)
            if partition is None or self._lies(node, partition):
                continue
            if partition in present:
                partition = self._second(node, partition, first=present[partition], earlier=earlier)
            if partition is not None:
                present[partition] = node
        return dict(sorted(present.items()))

    def _ask(self, grid: Grid, nodes: list[int]) -> dict[int, int]:
        """The partitions that nodes say they hold; those without an answer, or in `_unlike`, are left out.

        A node stays in `_unlike` until it says otherwise: one that does not answer is not another one.
        """
        found, before = dict[int, int](), self._unlike
        self._unlike = {node: before[node] for node in nodes if node in before}
        if not nodes:
            return found
        questions = [Message(RecordDict(), node, MessageType.QUERY) for node in nodes]
        for reply in grid.send_and_receive(questions, timeout=QUERY_TIMEOUT):
            node = reply.metadata.src_node_id
            for config in () if reply.has_error() else reply.content.config_records.values():
                partition, told = config.get("partition-id"), config.get("versions", [])
                if type(partition) is not int or partition < 0:
                    continue
                cannot, can = compared(map(str, told) if isinstance(told, list) else (), versions())
                if cannot:
                    self._unlike[node] = (partition, f"its node has {'; '.join(cannot)}")
                else:
                    found[node] = partition
                    self._unlike.pop(node, None)
                if (cannot or can) and node not in before:
                    verdict = "takes no part" if cannot else "takes part"
                    what = "; ".join([*cannot, *can])
                    log(WARNING, "partition %s %s: its node has %s", partition, verdict, what)
        return found

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

    def _number(self, silent: list[int]) -> None:
        """Numbers for nodes that do not say their partition, where none of a closed list is given away."""
        if not silent or self._roll is not None:
            return
        if self._closed and self._partition_of.keys() - self._numbered:
            return
        log(
            WARNING, "%s nodes do not say their partition: numbered by node id, not reproducible", len(silent)
        )
        for node in sorted(silent):
            self._give_number(node)

    def _give_number(self, node: int) -> int:
        self._numbered.add(node)
        self._partition_of[node] = max(self._partition_of.values(), default=-1) + 1
        return self._partition_of[node]

    def _second(self, node: int, partition: int, *, first: int, earlier: set[int]) -> int | None:
        """The number of a node whose partition is another's, or None where it takes no part."""
        if not self._closed:
            self._partition_of.pop(node)
            number = self._give_number(node)
            log(WARNING, "two nodes claim partition %s: one takes part as %s", partition, number)
            return number
        if first in earlier:
            self._partition_of.pop(node)  # asked again: the other one may have left by then
            log(WARNING, "node %s takes no part: partition %s is another connected node's", node, partition)
            return None
        raise RunFailed(f"two connected nodes claim partition {partition}: give each its own partition-id")


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
