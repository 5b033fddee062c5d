"""``fedlora node log``: what left a machine that holds data, for its owner."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedlora.cli.console import one_line_errors, out, table_of
from fedlora.errors import ConfigError

if TYPE_CHECKING:
    from clients.journal import Sent

COLUMNS = ("time", "node", "run", "round", "asked to", "answer", "bytes", "epsilon", "numbers, or why not")


@one_line_errors
def log(
    directory: Annotated[
        Path, typer.Argument(metavar="DIR", help="A node's directory, or a federation's on one machine.")
    ],
    declined: Annotated[bool, typer.Option("--declined", help="Only what was declined.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON list.")] = False,
) -> None:
    """What left a node: when, for which run, how many bytes, which numbers; and what it declined and why.

    Example: fedlora node log /opt/fedlora/node-0
    """
    from clients.journal import read_journal
    from clients.node_settings import NODE_FILE, read_node, state_of

    nodes = sorted(file.parent for file in directory.rglob(NODE_FILE))
    if not nodes:
        raise ConfigError(f"{directory}: there is no {NODE_FILE} in it")
    sent = [(node, entry) for node in nodes for entry in read_journal(state_of(node, read_node(node)))]
    sent = sorted(sent, key=lambda pair: pair[1].time)
    if declined:
        sent = [pair for pair in sent if pair[1].status == "declined"]
    if as_json:
        rows = [{"node": str(node), **asdict(entry)} for node, entry in sent]
        sys.stdout.write(json.dumps(rows, indent=2) + "\n")
        return
    cells = [_cells(node, entry) for node, entry in sent]
    out.print(
        table_of(COLUMNS, cells, left=[name for name in COLUMNS if name != "bytes"], folded=COLUMNS[-1])
    )
    total = sum(entry.bytes for _, entry in sent)
    out.print(f"{len(sent)} replies, {total:,} bytes of tensors; the network adds its own")


def _cells(node: Path, entry: Sent) -> list[str]:
    said = ", ".join(f"{name} {value:g}" for name, value in entry.metrics.items())
    return [
        entry.time, node.resolve().name, f"{entry.strategy} {entry.run[:12]}", str(entry.round), entry.asked,
        entry.status, f"{entry.bytes:,}", "-" if entry.epsilon is None else f"{entry.epsilon:.4g}",
        entry.reason if entry.status == "declined" else said or "-",
    ]  # fmt: skip
