"""``fedlora federation``: a deployment made, tried, looked at; and what its start scripts call."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedlora.cli.console import err, interrupt, marked, one_line_errors, out, table_of
from fedlora.core.code import need_extra

if TYPE_CHECKING:
    from clients.node_settings import NodeSettings

Directory = Annotated[Path, typer.Argument(metavar="DIR", help="The federation's directory.")]
Port = Annotated[int, typer.Option("--port", help="Port that nodes reach; 0 takes a free one.")]
LOOK_SECONDS = 0.5
NO_LIMIT = "none, what leaves is up to each run (max-epsilon in node.toml sets one)"


@one_line_errors
def init(
    directory: Directory,
    nodes: Annotated[int, typer.Option("--nodes", help="How many machines hold data.")],
    host: Annotated[
        list[str],
        typer.Option(
            "--host", metavar="NAME", help="Name or address of the server; nodes use the first. Repeatable."
        ),
    ] = [],  # noqa: B006
    port: Annotated[int, typer.Option("--port", help="Port that nodes reach.")] = 8000,
    data: Annotated[
        list[str],
        typer.Option("--data", metavar="PATH", help="A node's own examples; once for each node, or never."),
    ] = [],  # noqa: B006
) -> None:
    """Write certificates, keys, start scripts and systemd units for a federation.

    Example: fedlora federation init hospitals --nodes 3 --host fl.example.org
    """
    need_extra("deploy", "fedlora federation init")
    from fedlora.deployment.operator.create import create

    layout = create(directory, nodes, host, port=port, data=data)
    out.print(marked(str(directory), f": {nodes} nodes, server {layout.host}:{layout.port}"))
    out.print(
        "server/ goes to the server, each of nodes/ to its machine; keep ca/ apart. Private keys are 0600."
    )


@one_line_errors
def up(
    directory: Directory,
    port: Port = 0,
    detach: Annotated[bool, typer.Option("--detach", help="Return once all nodes are online.")] = False,
    detached: Annotated[bool, typer.Option("--detached", hidden=True)] = False,
) -> None:
    """Run a whole federation on this machine until Ctrl-C: SuperLink, gate and all nodes.

    Example: fedlora federation up hospitals
    """
    need_extra("deploy", "fedlora federation up")
    from fedlora.deployment.operator.layout import open_layout
    from fedlora.deployment.operator.loopback import Loopback

    layout = open_layout(directory)
    if detach:
        _detached(directory, port)
        return
    signal.signal(signal.SIGINT, interrupt)
    signal.signal(signal.SIGTERM, interrupt)
    try:
        with Loopback(layout, _say, port) as loopback:
            unlimited = [entry.name for entry in layout.nodes if not _limited(layout.node(entry))]
            if unlimited:
                _say(f"{', '.join(unlimited)}: limit: {NO_LIMIT}")
            stop = f"fedlora federation down {directory}" if detached else "Ctrl-C"
            _say(f"up: fedlora run CONFIG.toml --federation {directory}; {stop} stops everything")
            while True:
                loopback.supervise()
                time.sleep(LOOK_SECONDS)
    except KeyboardInterrupt:
        _say("stopped")


@one_line_errors
def down(directory: Directory) -> None:
    """Stop a federation that runs on this machine.

    Example: fedlora federation down hospitals
    """
    from fedlora.deployment.operator.layout import open_layout
    from fedlora.deployment.operator.loopback import bring_down

    bring_down(open_layout(directory))
    _say("stopped")


@one_line_errors
def status(directory: Directory) -> None:
    """Which nodes are online, by their keys; run it on the server's machine.

    Example: fedlora federation status hospitals
    """
    from fedlora.deployment.operator.layout import open_layout
    from fedlora.deployment.operator.operate import node_states
    from fedlora.deployment.operator.running import control_port

    layout = open_layout(directory)
    rows = [[entry.name, str(entry.partition_id), entry.fingerprint[:16]] for entry in layout.nodes]
    out.print(table_of(["node", "partition", "key"], rows, left=["node", "key"]))
    states = node_states(layout)
    told = ", ".join(f"{count} {state}" for state, count in sorted(states.items())) or "no node is registered"
    out.print(f"SuperLink on 127.0.0.1:{control_port(layout)}: {told}")


@one_line_errors
def register(directory: Directory) -> None:
    """Tell the SuperLink the keys of all nodes; once, on the server's machine, while it runs.

    Example: fedlora federation register hospitals
    """
    from fedlora.deployment.operator.layout import open_layout
    from fedlora.deployment.operator.operate import node_states
    from fedlora.deployment.operator.operate import register as register_all

    layout = open_layout(directory)
    register_all(layout)
    out.print(f"{sum(node_states(layout).values())} nodes are registered")


@one_line_errors
def check(
    directory: Annotated[Path, typer.Argument(metavar="NODE_DIR", help="A node's directory.")],
) -> None:
    """Check a node's settings and data; its start script does so first.

    Example: fedlora federation check hospitals/nodes/node-0
    """
    from clients.node_settings import own_of, read_node

    settings = read_node(directory)
    own = own_of(settings)
    limit = f"epsilon {settings.max_epsilon:g} at delta {settings.max_delta:g}"
    out.print(f"partition {settings.partition_id}, limit: {limit if settings.max_epsilon else NO_LIMIT}")
    out.print(f"secure sums: {_signed(directory, settings)}")
    if own is None:
        out.print("data: this partition of the run's dataset")
        return
    from fedlora.prepared.node_data import read_own  # imports tensors

    table = read_own(own)
    held = f", {len(table.test):,} held out" if table.test is not None else ""
    out.print(f"data: {own.path} as {own.dataset_id!r}, {len(table.train):,} examples{held}")
    label = f"label {own.label_column}" if own.label_column else "no label"
    content = (
        f"image {own.image_column}" if "image" in table.train.column_names else f"text {own.text_column}"
    )
    out.print(f"columns: {', '.join(table.columns)}; {content}, {label}")
    if own.label_column:
        counts = ", ".join(f"{name} ({count:,})" for name, count in table.labels.items())
        out.print(f"labels: {counts}")


@one_line_errors
def gate(
    directory: Annotated[Path, typer.Argument(metavar="SERVER_DIR", help="The server's directory.")],
    host: Annotated[str, typer.Option("--host", help="Address to listen on.")] = "0.0.0.0",
    port: Annotated[int, typer.Option("--port", help="Port that nodes reach.")] = 8000,
    control_port: Annotated[int, typer.Option("--control-port", help="The SuperLink's own port.")] = 8001,
) -> None:
    """Let SuperNodes through to the SuperLink, and nobody else; ``gate.sh`` calls it."""
    need_extra("deploy", "fedlora federation gate")
    from fedlora.deployment.operator.keys import check_server
    from fedlora.deployment.superlink.proxy import serve_gate

    check_server(directory)
    serve_gate(directory, host, port, control_port)


def _signed(directory: Path, settings: NodeSettings) -> str:
    """With whom a node takes part in secure sums."""
    from fedlora.secure.peers import read_identity

    if not settings.secure_peers:
        return "with whoever the server says (secure-peers in node.toml names those you know)"
    identity = read_identity(directory / settings.secure_peers, settings.partition_id)
    return f"with the {len(identity.peers.keys)} nodes in {settings.secure_peers}"


def _limited(node: Path) -> bool:
    from clients.node_settings import read_node

    return read_node(node).max_epsilon > 0


def _detached(directory: Path, port: int) -> None:
    """Start ``up`` as a process of its own and wait until it is ready.

    Raises:
        RunFailed: it ended before.
    """
    from fedlora.deployment.operator.layout import open_layout
    from fedlora.deployment.operator.running import is_ready, supervisor
    from fedlora.errors import ConfigError, RunFailed

    layout = open_layout(directory)
    if supervisor(layout) is not None:
        raise ConfigError(f"{directory}: is up already (fedlora federation down stops it)")
    log = layout.path / "up.log"
    arguments = ["federation", "up", str(directory), "--port", str(port), "--detached"]
    with log.open("w") as file:
        process = subprocess.Popen(
            [sys.executable, "-c", "from fedlora.cli import main; main()", *arguments],
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=file,
            start_new_session=True,
        )
    shown = 0
    while process.poll() is None and not is_ready(layout):
        shown = _show_from(log, shown)
        time.sleep(LOOK_SECONDS)
    _show_from(log, shown)
    if process.poll() is not None:
        raise RunFailed(f"the federation did not come up, see {log}")


def _show_from(log: Path, shown: int) -> int:
    text = log.read_text()
    for line in text[shown:].splitlines():
        _say(line)
    return len(text)


def _say(line: str) -> None:
    err.print(line)
