"""A federation's directory, and what it says about the federation.

ca/                    ca.crt and ca.key; the key is needed only to sign another server certificate
server/                all that the SuperLink's machine needs
    federation.toml    host, port, which key is which partition, declared examples; no secrets
    superlink.sh, gate.sh, *.service, server.crt, server.key, keys/, flwr/ (Flower's home)
nodes/node-K/          all that one data-holding machine needs: node.toml, key, start.sh, a systemd unit
up.json                while the federation runs on this machine: where, and its process
"""

from __future__ import annotations

import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from logging import WARNING
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedlora.errors import ConfigError
from fedlora.secure.peers import Peers, public_key

if TYPE_CHECKING:
    from flwr.serverapp import Grid

SERVER_FILE, KEYS = "federation.toml", "keys"
SERVER_KEYS = {
    "host": (str, "a name or an address"), "port": (int, "a whole number"),
    "control-port": (int, "a whole number"), "nodes": (list, "a list of tables"),
}  # fmt: skip
FAILURE = "failure.json"
"""In a run directory: why the ServerApp gave up, for ``fedlora run --federation``."""
LOG = "flower.log"
"""In a run directory: what Flower said of a run over a federation, which every such run leaves."""
OWN = "own"
"""In a run directory: a strategy of the operator's own, for the ServerApp."""
CONNECTION = "federation"
"""What Flower's configuration calls the SuperLink of this federation."""


@dataclass(frozen=True, slots=True)
class NodeEntry:
    """One node as the server knows it.

    Attributes:
        name: of its directory under ``nodes/`` and its file under ``server/keys/``.
        partition_id: the partition that its key stands for.
        fingerprint: of its public key.
        declared_examples: how many examples its owner declared to the operator; None where nobody did.
    """

    name: str
    partition_id: int
    fingerprint: str
    declared_examples: int | None = None


@dataclass(frozen=True, slots=True)
class Layout:
    """A federation's directory.

    Attributes:
        path: the directory.
        host: the name under which nodes reach the server.
        port: the gate's port, open to nodes.
        control_port: the SuperLink's own port, on the server's loopback only.
        nodes: in the order of their partitions.
    """

    path: Path
    host: str
    port: int
    control_port: int
    nodes: tuple[NodeEntry, ...]

    @property
    def server(self) -> Path:
        return self.path / "server"

    @property
    def flower_home(self) -> Path:
        return self.server / "flwr"

    @property
    def up_file(self) -> Path:
        return self.path / "up.json"

    def node(self, entry: NodeEntry) -> Path:
        """The directory of a node."""
        return self.path / "nodes" / entry.name

    def public_key(self, entry: NodeEntry) -> Path:
        """The public key of a node, at the server."""
        return self.server / KEYS / f"{entry.name}.pub"


def open_layout(path: Path) -> Layout:
    """A federation's directory as `create` wrote it.

    Raises:
        ConfigError: it is none.
    """
    file = path / "server" / SERVER_FILE
    if not file.is_file():
        raise ConfigError(f"{path}: no federation there (fedlora federation init {path} makes one)")
    table = read_server_file(file)
    return Layout(
        path=path.absolute(),
        host=table["host"],
        port=table["port"],
        control_port=table["control-port"],
        nodes=_nodes(file, table),
    )


def read_server_file(file: Path) -> Mapping[str, Any]:
    """The table in a ``federation.toml``.

    Raises:
        ConfigError: it cannot be read, or lacks a key.
    """
    try:
        table = tomllib.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(f"{file}: cannot be read ({error})") from None
    lacks = SERVER_KEYS.keys() - table.keys()
    if lacks:
        raise ConfigError(f"{file}: {min(lacks)} is missing")
    for key, (kind, accepted) in SERVER_KEYS.items():
        if type(table[key]) is not kind:
            raise ConfigError(f"{file}: {key} = {str(table[key])[:60]!r}: must be {accepted}")
    return table


def roll_of(file: Path) -> dict[str, int]:
    """Key fingerprint -> partition id, from a ``federation.toml``.

    Raises:
        ConfigError: it cannot be read, or names a key or a partition twice.
    """
    nodes = _nodes(file, read_server_file(file))
    return {node.fingerprint: node.partition_id for node in nodes}


def names_of(file: Path) -> dict[str, str]:
    """Key fingerprint -> name of its node, from a ``federation.toml``; none if it cannot be read just now."""
    try:
        return {node.fingerprint: node.name for node in _nodes(file, read_server_file(file))}
    except ConfigError:
        return {}


def declared_examples_of(file: Path) -> dict[int, int]:
    """Partition id -> how many examples the node's owner declared, from a ``federation.toml``.

    Raises:
        ConfigError: as `roll_of`.
    """
    nodes = _nodes(file, read_server_file(file))
    return {n.partition_id: n.declared_examples for n in nodes if n.declared_examples is not None}


def peers_of(file: Path) -> Peers:
    """The public keys of all nodes, which lie beside a ``federation.toml``.

    Raises:
        ConfigError: as `roll_of`, or one is not there.
    """
    keys = {}
    for node in _nodes(file, read_server_file(file)):
        place = file.parent / KEYS / f"{node.name}.pub"
        try:
            key = public_key(place.read_bytes())
        except OSError as error:
            raise ConfigError(f"{place}: cannot be read ({error.strerror})") from None
        if key is None:
            raise ConfigError(f"{place}: is no ECDSA key in OpenSSH's format")
        keys[node.partition_id] = key
    return Peers(keys)


class NodeKeys:
    """The partitions of keys, for `strategies.nodes.NodeDirectory`: a node is who its key says that it is.

    The SuperLink answers a SuperNode only if it signs with the key that it was registered with, and tells the
    ServerApp each node's public key. A key that is not on the roll takes no part, whatever it claims.

    Args:
        roll: gives key fingerprint -> partition id, see `roll_of`; asked again in every round, so that a key
            that is taken off it takes no part from then on. One that cannot be read is the one before.

    Raises:
        ConfigError: by the first roll.
    """

    def __init__(self, roll: Callable[[], Mapping[str, int]]) -> None:
        self._roll = roll
        self.partitions = dict(roll())

    def __call__(self, grid: Grid) -> dict[int, int | None]:
        """Node id -> the partition of its key, None for a key that is not on the roll."""
        from flwr.common.logger import log

        from fedlora.deployment.operator.keys import fingerprint

        try:
            self.partitions = dict(self._roll())
        except ConfigError as error:
            log(WARNING, "the roll of the last round stays: %s", error)
        nodes: list[Any] = list(grid.get_nodes())
        return {node.node_id: self.partitions.get(fingerprint(node.public_key)) for node in nodes}


def _nodes(file: Path, table: Mapping[str, Any]) -> tuple[NodeEntry, ...]:
    nodes = []
    for entry in table["nodes"]:
        name, partition, key = _named(entry)
        if type(name) is not str or type(partition) is not int or type(key) is not str or partition < 0:
            raise ConfigError(
                f"{file}: nodes = {repr(entry)[:200]}: needs name, partition-id and fingerprint"
            )
        declared = entry.get("declared-examples")
        if not (declared is None or (type(declared) is int and declared >= 1)):
            raise ConfigError(f"{file}: declared-examples = {declared!r}: must be a whole number >= 1")
        nodes.append(NodeEntry(name, partition, key, declared))
    for what in ("partition_id", "fingerprint", "name"):
        values = [getattr(node, what) for node in nodes]
        if len(set(values)) < len(values):
            raise ConfigError(f"{file}: two nodes have one {what.replace('_', '-')}")
    return tuple(sorted(nodes, key=lambda node: node.partition_id))


def _named(entry: Any) -> tuple[Any, Any, Any]:
    values = entry if isinstance(entry, dict) else {}
    return values.get("name"), values.get("partition-id"), values.get("fingerprint")
