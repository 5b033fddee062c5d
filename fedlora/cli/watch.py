"""``fedlora watch``: a page of what goes on in a directory, on this machine alone."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fedlora.cli.console import ended_by_sigterm, one_line_errors, out


@one_line_errors
def watch(
    directory: Annotated[
        Path, typer.Argument(metavar="DIR", help="Of a run, a study or a federation; there or still to come.")
    ],
    port: Annotated[int, typer.Option("--port", help="Port on 127.0.0.1; 0 takes a free one.")] = 0,
) -> None:
    """Show on a page how runs, nodes, refusals and budgets stand, until Ctrl-C; /metrics is for Prometheus.

    Example: fedlora watch runs/demo
    """
    from fedlora.watch.serve import Server

    try:
        with ended_by_sigterm(), Server(directory, port) as server:
            out.print(f"{server.address} shows {directory}; Ctrl-C stops it")
            server.serve_forever()
    except KeyboardInterrupt:
        out.print("stopped")
