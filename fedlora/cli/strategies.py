"""``fedlora strategies``: the facts of all rules."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fedlora.cli.console import marked, one_line_errors, out, table_of

if TYPE_CHECKING:
    from strategies.rule import Rule

COLUMNS = ("name", "exact", "any_kind", "mixed_ranks", "updates_base", "client_dp", "up", "down", "paper")
"""Facts that ``fedlora strategies`` shows in columns; ``--json`` has all of them."""


@one_line_errors
def strategies(
    name: Annotated[
        str, typer.Argument(metavar="NAME", help="One of them, or module:Class; all if left out.")
    ] = "",
    as_json: Annotated[bool, typer.Option("--json", help="Print the facts as JSON.")] = False,
) -> None:
    """What each strategy trains, ships and guarantees; of one strategy also its options.

    Example: fedlora strategies lora-fair
    """
    from strategies.registry import deviations, fact_row, fact_rows, rule_type

    if name:
        rule = rule_type(name)
        _one(rule, fact_row(rule), as_json)
        return
    rows = fact_rows()
    if as_json:
        sys.stdout.write(json.dumps(rows, indent=2) + "\n")
        return
    header = [column.replace("_", " ") for column in COLUMNS]
    cells = [[_cell(row[column]) for column in COLUMNS] for row in rows]
    out.print(table_of(header, cells, left=header, folded="paper"))
    out.print(
        "\nexact: of lora; of another lora.method a run measures it where any kind is taken (docs/peft.md)"
    )
    out.print(marked("\nWhere they differ from their papers or the authors' code"))
    for name, text in deviations().items():
        out.print(f"{name}: {text}")


def _one(rule: type[Rule], row: dict[str, Any], as_json: bool) -> None:
    """All facts of a strategy, and its options with their defaults and what they do."""
    if as_json:
        sys.stdout.write(json.dumps(row, indent=2) + "\n")
        return
    options = row.pop("options")
    for fact, value in row.items():
        text = ", ".join(value) if isinstance(value, list | tuple) else _cell(value)
        if text:
            out.print(f"{fact.replace('_', ' '):20}{text}")
    out.print(
        marked("\nOptions", ", as strategy.options = '{\"NAME\": VALUE}'") if options else "\nNo options."
    )
    for option, default in options.items():
        out.print(f"{option:20}{default!r}")
    about = (sys.modules[rule.__module__].__doc__ or "").strip()
    out.print(f"\n{about}")


def _cell(value: Any) -> str:
    return ("yes" if value else "no") if isinstance(value, bool) else str(value)
