"""``fedlora federation add``, ``revoke``, ``rotate``, ``certify``: a federation's keys and certificate."""

from __future__ import annotations

from typing import Annotated

import typer

from fedlora.cli.console import err, one_line_errors
from fedlora.cli.federation import Directory

Node = Annotated[str, typer.Argument(metavar="NODE", help="Its name in server/federation.toml.")]
NEXT_ROUND = "a run that is on takes it so at its next round"
PEERS = "for secure.mode = 'sums' copy the new peers.toml to every node"


@one_line_errors
def add(
    directory: Directory,
    data: Annotated[str, typer.Option("--data", metavar="PATH", help="Its own examples.")] = "",
) -> None:
    """Write the directory of one more node and put its key on the roll.

    Example: fedlora federation add hospitals
    """
    from fedlora.deployment.operator.layout import open_layout
    from fedlora.deployment.operator.membership import add as add_node

    name = add_node(open_layout(directory), data)
    _say(f"{name}: copy nodes/{name} to its machine, then fedlora federation register {directory}")
    _say(PEERS)


@one_line_errors
def revoke(directory: Directory, node: Node) -> None:
    """Take a node off the roll: its key, stolen or not, takes no part any more.

    Example: fedlora federation revoke hospitals node-1
    """
    from fedlora.deployment.operator.layout import open_layout
    from fedlora.deployment.operator.membership import revoke as revoke_node

    revoke_node(open_layout(directory), node)
    _say(f"{node}: its key is off the roll, {NEXT_ROUND}")
    _say(PEERS)


@one_line_errors
def rotate(directory: Directory, node: Node) -> None:
    """Give a node another key; the one before takes no part any more.

    Example: fedlora federation rotate hospitals node-1
    """
    from fedlora.deployment.operator.layout import open_layout
    from fedlora.deployment.operator.membership import rotate as rotate_key

    key = rotate_key(open_layout(directory), node)
    _say(f"{node}: its old key is off the roll, {NEXT_ROUND}")
    _say(f"put {key} in the place of its key, then fedlora federation register {directory}")
    _say(PEERS)


@one_line_errors
def certify(
    directory: Directory,
    host: Annotated[
        list[str],
        typer.Option("--host", metavar="NAME", help="Name or address of the server; as before if absent."),
    ] = [],  # noqa: B006
) -> None:
    """Make another server certificate, before the one that is there expires; nodes need nothing new.

    Example: fedlora federation certify hospitals
    """
    from fedlora.deployment.operator.layout import open_layout
    from fedlora.deployment.operator.membership import certify as certify_server

    file = certify_server(open_layout(directory), host)
    _say(f"{file}, with its key beside it: take both to the server and start SuperLink and gate again")


def _say(line: str) -> None:
    err.print(line)
