"""``fedlora federation init``: everything that a federation needs before its first start."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import tomli_w

from fedlora.core.files import check_place, new_directory, write_atomic
from fedlora.deployment.operator.keys import write_authority, write_node_key, write_server
from fedlora.deployment.operator.layout import SERVER_FILE, Layout, open_layout
from fedlora.deployment.operator.scripts import RESTART_SECONDS, filled, flower_config, node_toml, unit
from fedlora.errors import ConfigError
from fedlora.secure.peers import PEERS_FILE, peers_toml

FOLDER, SCRIPT = 0o700, 0o755
_HOST = re.compile(r"[0-9A-Za-z]([0-9A-Za-z.:-]*[0-9A-Za-z])?")


def create(
    path: Path, nodes: int, hosts: Sequence[str] = (), *, port: int = 8000, data: Sequence[str] = ()
) -> Layout:
    """Write a federation's directory; see `fedlora.deployment.operator.layout` for what is in it.

    Args:
        path: the directory; must not exist or be empty.
        nodes: how many nodes, with partitions 0 to ``nodes - 1``.
        hosts: names and addresses of the server; nodes use the first. Empty means this machine only.
        port: the port that nodes reach.
        data: each node's own examples, one path a node; empty leaves that to the owners.

    Raises:
        ConfigError: the directory holds something, or a value is not accepted.
    """
    _refuse(path, nodes, hosts, port, data)
    host = hosts[0] if hosts else "127.0.0.1"
    with new_directory(path.absolute()) as draft:
        draft.chmod(FOLDER)
        (draft / "ca").mkdir(mode=FOLDER)
        authority = draft / "ca" / "ca.crt", draft / "ca" / "ca.key"
        write_authority(*authority, name="fedlora federation")
        _write_server(draft, path.absolute(), authority, hosts, port)
        entries = [
            write_node(draft, partition, host, port, data[partition] if data else "")
            for partition in range(nodes)
        ]
        table = {"host": host, "port": port, "control-port": port + 1, "nodes": entries}
        write_atomic(draft / "server" / SERVER_FILE, tomli_w.dumps(table))
        write_peers(open_layout(draft))
    return open_layout(path)


def _refuse(path: Path, nodes: int, hosts: Sequence[str], port: int, data: Sequence[str]) -> None:
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise ConfigError(f"{path}: is there and not empty, name a new directory")
    check_place("DIR", path)
    if nodes < 1:
        raise ConfigError(f"--nodes {nodes}: must be >= 1")
    if not 1 <= port <= 65534:
        raise ConfigError(f"--port {port}: must be 1 to 65534, the next one is the SuperLink's own")
    for host in hosts:
        if not _HOST.fullmatch(host):
            raise ConfigError(f"--host {host!r}: must be a DNS name or an IP address")
    if data and len(data) != nodes:
        raise ConfigError(f"--data is given {len(data)} times for {nodes} nodes: once for each, or never")
    for file in data:
        if not Path(file).exists():
            raise ConfigError(f"--data {file}: there is no such file or directory")


def _write_server(
    draft: Path, final: Path, authority: tuple[Path, Path], hosts: Sequence[str], port: int
) -> None:
    server = draft / "server"
    for folder in (server, server / "keys", server / "flwr"):
        folder.mkdir(mode=FOLDER)
    (server / "ca.crt").write_bytes(authority[0].read_bytes())
    write_server(server / "server.crt", server / "server.key", authority, hosts)
    _write_script(server / "superlink.sh", filled("superlink.sh", control_port=port + 1))
    _write_script(server / "gate.sh", filled("gate.sh", port=port, control_port=port + 1))
    superlink = unit("SuperLink of a fedlora federation", "server", "superlink.sh", 5)
    (server / "fedlora-superlink.service").write_text(superlink)
    gate = unit("Gate of a fedlora federation", "server", "gate.sh", 5)
    (server / "fedlora-gate.service").write_text(gate)
    (server / "flwr" / "config.toml").write_text(flower_config(final / "server" / "ca.crt", port + 1))


def write_node(draft: Path, partition: int, host: str, port: int, data: str) -> dict[str, str | int]:
    """Make a node's directory, and its public key at the server; returns its entry of the roll."""
    address = f"{_bracketed(host)}:{port}"
    name = f"node-{partition}"
    node = draft / "nodes" / name
    node.parent.mkdir(mode=FOLDER, exist_ok=True)
    node.mkdir(mode=FOLDER)
    public = draft / "server" / "keys" / f"{name}.pub"
    mark = write_node_key(node / "key", public)
    (node / "key.pub").write_bytes(public.read_bytes())
    (node / "ca.crt").write_bytes((draft / "ca" / "ca.crt").read_bytes())
    own = str(Path(data).absolute()) if data else ""
    (node / "node.toml").write_text(node_toml(partition, own, Path(data).stem if data else ""))
    _write_script(node / "start.sh", filled("start.sh", address=address))
    (node / "bin").mkdir(mode=FOLDER)
    _write_script(node / "bin" / "flwr-clientapp", filled("flwr-clientapp.sh"))
    text = unit(f"Node {partition} of a fedlora federation", name, "start.sh", RESTART_SECONDS)
    (node / "fedlora-supernode.service").write_text(text)
    return {"name": name, "partition-id": partition, "fingerprint": mark}


def write_peers(layout: Layout) -> None:
    """All public keys to every node whose directory is here, for secure sums."""
    text = peers_toml((node.partition_id, layout.public_key(node).read_bytes()) for node in layout.nodes)
    for node in layout.nodes:
        if layout.node(node).is_dir():
            (layout.node(node) / PEERS_FILE).write_text(text)


def _write_script(path: Path, text: str) -> None:
    path.write_text(text)
    path.chmod(SCRIPT)


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else host
