"""``fedlora privacy spent`` and ``new-dataset``: a ledger, read and kept by its owner."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from fedlora.cli.console import one_line_errors, out

if TYPE_CHECKING:
    from fedlora.privacy.ledger import Account
    from fedlora.privacy.trade_off import TradeOff

COLUMNS = (
    "data set",
    "epsilon",
    "evaluations",
    "delta",
    "neighbours",
    "by",
    "budget",
    "left",
    "releases",
    "unfinished",
    "steps",
    "changes",
)
TEXTS = ("data set", "neighbours", "by")


@one_line_errors
def spent(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="A run, a study, or a ledger directory.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON list.")] = False,
) -> None:
    """What every data set under DIR has spent, by the ledgers alone.

    Example: fedlora privacy spent runs/demo
    """
    from fedlora.privacy.ledger import read_ledgers

    accounts = [account for place in _places(directory) for account in read_ledgers(place)]
    rows, curves = [*map(_row, accounts)], [*map(_curve, accounts)]
    if as_json:
        for row, curve in zip(rows, curves, strict=True):
            row["attacker"] = curve and curve.record()
        sys.stdout.write(json.dumps(rows, indent=2) + "\n")
        return
    table = Table(box=None, header_style="bold", pad_edge=False)
    for column in COLUMNS:
        table.add_column(column, no_wrap=True, justify="left" if column in TEXTS else "right")
    for row in rows:
        table.add_row(*map(_cell, list(row.values())[1:]))
    out.print(table)
    for row, curve in zip(rows, curves, strict=True):
        if curve:
            said = f"{row['dataset']}: {curve.said()}, by {curve.found_by}"
            out.print(said, markup=False, highlight=False)
    out.print("epsilon is of everything on a ledger; unfinished releases count, 'changes' are of the content")


@one_line_errors
def new_dataset(
    ledger: Annotated[Path, typer.Option(metavar="DIR", help="The ledger directory.")],
    id_: Annotated[
        str, typer.Option("--id", metavar="NAME", help="The new data set, as its owner calls it.")
    ],
    reason: Annotated[str, typer.Option(metavar="TEXT", help="Why these are other examples.")],
) -> None:
    """Declare that data is not what a ledger keeps account of already, so that it has a budget of its own.

    The declaration is logged with your name and the reason. Runs use it by privacy.dataset-id = NAME.

    Example: fedlora privacy new-dataset --ledger ledger --id reviews-2026 --reason "collected this year"
    """
    from fedlora.privacy.datasets import declare

    declare(ledger, id_, reason)
    out.print(
        f"{ledger}: {id_} is a data set of its own; use it by privacy.dataset-id = {id_!r}", markup=False
    )


def _places(directory: Path) -> list[Path]:
    """The ledger directories in a directory, and those that the runs in it name.

    Raises:
        ConfigError: there is none.
    """
    from fedlora.config import read_config
    from fedlora.errors import ConfigError
    from fedlora.privacy.datasets import REGISTER

    inside = {register.parent.resolve() for register in directory.rglob(REGISTER)}
    named = {read_config(config).privacy.ledger for config in directory.rglob("config.toml")} - {""}
    elsewhere = {Path(path).expanduser().resolve() for path in named}
    places = inside | {path for path in elsewhere if (path / REGISTER).exists()}
    if not places:
        raise ConfigError(f"{directory}: there is no privacy ledger in it")
    return sorted(places)


def _row(account: Account) -> dict[str, Any]:
    standing = account.standing
    budget, training = standing.budget, standing.epsilon - standing.on_evaluations
    return {
        "ledger": str(account.path),
        "dataset": account.identity,
        "epsilon": standing.epsilon,
        "on_evaluations": standing.on_evaluations,
        "delta": standing.delta or None,
        "neighboring_relation": standing.neighboring_relation if standing.releases else None,
        "accountant": standing.accountant or None,
        "target_epsilon": None if budget is None else budget.target_epsilon,
        "left": None if budget is None else max(0.0, budget.target_epsilon - training),
        "releases": standing.releases,
        "unfinished": standing.unfinished,
        "steps": standing.steps,
        "content_changes": standing.content_changes,
    }


def _curve(account: Account) -> TradeOff | None:
    """What all that is on a ledger lets an attacker find at most; None where there is nothing."""
    from fedlora.privacy.trade_off import trade_off

    standing = account.standing
    if not standing.epsilon:
        return None
    return trade_off(standing.history, standing.epsilon, standing.delta, standing.on_evaluations)


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
