"""Which node is which partition: by its key, never by what it says.

The SuperLink answers a request of a SuperNode only if it is signed by the key that the node was registered
with, and tells the ServerApp each node's public key. The roll, written by ``fedlora federation init``, says
which key stands for which partition. A key that is not on the roll takes no part, whatever it claims.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flwr.serverapp import Grid

from fedlora.deployment.operator.keys import fingerprint


class NodeKeys:
    """The partitions of keys, for `strategies.nodes.NodeDirectory`.

    Args:
        partitions: key fingerprint -> partition id.
    """

    def __init__(self, partitions: Mapping[str, int]) -> None:
        self.partitions = dict(partitions)

    def __call__(self, grid: Grid) -> dict[int, int | None]:
        """Node id -> the partition of its key, None for a key that is not on the roll."""
        nodes: list[Any] = list(grid.get_nodes())
        return {node.node_id: self.partitions.get(fingerprint(node.public_key)) for node in nodes}
