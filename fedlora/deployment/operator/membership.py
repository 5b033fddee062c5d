"""Nodes that join a federation, leave it, or get another key.

The roll in ``server/federation.toml`` decides, also for a run that is on, see
`fedlora.deployment.operator.layout.NodeKeys`: a key that is not on it takes no part, whether or not the
SuperLink still knows it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import tomli_w

from fedlora.core.files import write_atomic
from fedlora.deployment.operator.create import write_node, write_peers
from fedlora.deployment.operator.keys import write_node_key, write_server
from fedlora.deployment.operator.layout import KEYS, SERVER_FILE, Layout, open_layout, read_server_file
from fedlora.errors import ConfigError, unknown_name

Entries = list[dict[str, Any]]


def add(layout: Layout, data: str = "") -> str:
    """A new node with the next partition, in ``nodes/``; returns its name.

    Raises:
        ConfigError: its directory is there already, or its data are not.
    """
    if data and not Path(data).exists():
        raise ConfigError(f"--data {data}: there is no such file or directory")
    partition = max((entry.partition_id for entry in layout.nodes), default=-1) + 1
    name = f"node-{partition}"
    home = layout.path / "nodes" / name
    if home.exists():
        raise ConfigError(f"{home}: is there already, of a node that left; move it away")
    fresh = write_node(layout.path, partition, layout.host, layout.port, data)
    _change(layout, lambda entries: [*entries, fresh])
    return name


def revoke(layout: Layout, name: str) -> None:
    """Take a node off the roll; its directory and its ledger stay where they are.

    Raises:
        ConfigError: there is no such node.
    """
    _known(layout, name)
    _change(layout, lambda entries: [entry for entry in entries if entry["name"] != name])
    (layout.server / KEYS / f"{name}.pub").unlink(missing_ok=True)


def rotate(layout: Layout, name: str) -> Path:
    """Another key for a node, with its partition; returns where the private key is, to be carried to it.

    Raises:
        ConfigError: there is no such node, or a key lies there that was not carried away.
    """
    _known(layout, name)
    home = layout.path / "nodes" / name
    fresh = home / "key.new"
    if fresh.exists():
        raise ConfigError(f"{fresh}: is there from before, carry it to the node or delete it")
    home.mkdir(parents=True, exist_ok=True)
    mark = write_node_key(fresh, layout.server / KEYS / f"{name}.pub")
    _change(layout, lambda entries: [
        {**entry, "fingerprint": mark} if entry["name"] == name else entry for entry in entries
    ])  # fmt: skip
    return fresh


def certify(layout: Layout, hosts: Sequence[str] = ()) -> Path:
    """Another server certificate by the federation's authority, which nodes go on trusting; returns its file.

    Raises:
        ConfigError: ``ca/`` is not here.
    """
    authority = layout.path / "ca" / "ca.crt", layout.path / "ca" / "ca.key"
    for file in authority:
        if not file.is_file():
            raise ConfigError(f"{file}: is missing, bring ca/ from where it is kept")
    fresh = layout.server / "server.crt.new", layout.server / "server.key.new"
    for file in fresh:
        file.unlink(missing_ok=True)
    write_server(*fresh, authority, hosts or [layout.host])
    for file in reversed(fresh):
        file.replace(file.with_suffix(""))
    return layout.server / "server.crt"


def _known(layout: Layout, name: str) -> None:
    names = [entry.name for entry in layout.nodes]
    if name not in names:
        raise unknown_name("NODE", name, names)


def _change(layout: Layout, change: Callable[[Entries], Entries]) -> None:
    """Write the roll anew, and the public keys to all nodes whose directories are here."""
    file = layout.server / SERVER_FILE
    table = dict(read_server_file(file))
    table["nodes"] = change(table["nodes"])
    write_atomic(file, tomli_w.dumps(table))
    write_peers(open_layout(layout.path))
