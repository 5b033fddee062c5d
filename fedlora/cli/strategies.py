"""``fedlora strategies``: the facts of all rules."""

from __future__ import annotations

import json
import sys
from typing import Annotated, Any

import typer
from rich.table import Table

from fedlora.cli.console import one_line_errors, out

COLUMNS = ("name", "exact", "any_kind", "mixed_ranks", "updates_base", "client_dp", "up", "down", "paper")
"""Facts that ``fedlora strategies`` shows in columns; ``--json`` has all of them."""


@one_line_errors
def strategies(
    as_json: Annotated[bool, typer.Option("--json", help="Print the facts as JSON.")] = False,
) -> None:
    """What each strategy trains, ships and guarantees.

    Example: fedlora strategies --json
    """
    from strategies.registry import deviations, fact_rows

    rows = fact_rows()
    if as_json:
        sys.stdout.write(json.dumps(rows, indent=2) + "\n")
        return
    table = Table(box=None, header_style="bold", pad_edge=False)
    for column in COLUMNS:
        table.add_column(column.replace("_", " "), no_wrap=column != "paper")
    for row in rows:
        table.add_row(*(_cell(row[column]) for column in COLUMNS))
    out.print(table)
    out.print(
        "\nexact: of lora; of another lora.method a run measures it where any kind is taken (docs/peft.md)"
    )
    out.print("\n[bold]Where they differ from their papers or the authors' code[/bold]")
    for name, text in deviations().items():
        out.print(f"{name}: {text}", highlight=False, markup=False)


def _cell(value: Any) -> str:
    return ("yes" if value else "no") if isinstance(value, bool) else str(value)
