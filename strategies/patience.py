"""Patience with nodes that are connected and do not answer.

A node that hangs costs each round its deadline. After some rounds in a row it is set aside, and tried again
later. If it answers then, it takes part as before; if not, that cost a deadline more and it waits anew.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from logging import WARNING

from flwr.common.logger import log

from strategies.request import PendingRequest

PAUSE = 10
"""Rounds for which a node is set aside."""


class Patience:
    """How long nodes are waited for.

    Args:
        most: rounds in a row that a node may let pass without a reply; 0 waits for it in every round.
    """

    def __init__(self, most: int = 0) -> None:
        self.most = most
        self._missed: dict[int, int] = {}
        self._until: dict[int, int] = {}

    def without_hanging(
        self, present: Mapping[int, int], server_round: int, wanted: int
    ) -> tuple[dict[int, int], dict[int, str]]:
        """The nodes by partition that a round asks, and why the others are set aside.

        All are asked where too few would be left: waiting is better than ending the run.

        Args:
            present: node id by partition id of everybody connected.
            server_round: from 1.
            wanted: how many the round needs.
        """
        aside = {p: until for p, until in self._until.items() if p in present and server_round < until}
        left = {p: node for p, node in present.items() if p not in aside}
        if len(left) < wanted:
            return dict(present), {}
        return left, {p: f"set aside until round {u}: {self._why(p)}" for p, u in sorted(aside.items())}

    def note(self, server_round: int, silent: Mapping[int, bool]) -> None:
        """Count who let a round's deadline pass.

        Args:
            server_round: from 1.
            silent: of each partition that was asked, whether it did.
        """
        if not self.most:
            return
        for partition in sorted(silent):
            if not silent[partition]:
                self._missed.pop(partition, None)
                continue
            self._missed[partition] = self._missed.get(partition, 0) + 1
            if self._missed[partition] >= self.most:
                until = self._until[partition] = server_round + PAUSE + 1
                why = self._why(partition)
                log(WARNING, "partition %s is set aside until round %s: %s", partition, until, why)

    def answering(self, requests: Sequence[PendingRequest]) -> dict[int, int]:
        """Node by partition of who is asked once more in a round: one that hangs costs one deadline."""
        return {r.partition_id: r.node_id for r in requests if r.reply is not None or not self.most}

    def _why(self, partition: int) -> str:
        return f"no reply before the deadline in {self._missed[partition]} rounds that asked it"
