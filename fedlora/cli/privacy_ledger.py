"""``fedlora privacy spent`` and ``new-dataset``: a ledger, read and kept by its owner."""

from __future__ import annotations

import json
import math
import sys
import tomllib
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fedlora.cli.console import one_line_errors, out, table_of

if TYPE_CHECKING:
    from clients.node_settings import NodeSettings
    from fedlora.privacy.ledger import Account
    from fedlora.privacy.trade_off import TradeOff

COLUMNS = {
    "data set": "dataset",
    "epsilon": "epsilon",
    "evaluations": "on_evaluations",
    "delta": "delta",
    "owner's limit": "max_epsilon",
    "run's target": "target_epsilon",
    "left": "left",
    "releases": "releases",
    "unfinished": "unfinished",
    "steps": "steps",
    "changes": "content_changes",
    "neighbours": "neighboring_relation",
    "by": "accountant",
    "of": "data",
}
"""Heading -> field of a row."""
LESS = {"epsilon_of_model": "the model alone", "epsilon_of_sums": "sums alone"}
"""Field of a run's claim -> who sees less than the server with colluding clients."""
RUNS_OWN = "(as a run names it)"
TEXTS = ("data set", "neighbours", "by", "of")
LEGEND = (
    "epsilon is of everything on a ledger; left is to the smaller of the owner's limit and the last run's "
    "target; unfinished releases count, 'changes' are of the content"
)


@one_line_errors
def spent(
    directory: Annotated[
        Path,
        typer.Argument(metavar="DIR", help="A run, a study, a node, a federation, or a ledger."),
    ],
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON list.")] = False,
) -> None:
    """What every data set under DIR has spent, by the ledgers alone, beside what its owner allows.

    Data sets that were declared and spent nothing are there, too.

    Example: fedlora privacy spent runs/demo
    """
    nodes = _nodes(directory)
    found = [pair for place in _places(directory, nodes) for pair in _rows(place, nodes.get(place))]
    rows = [row for row, _ in found]
    _state_less(directory, rows)
    curves = [None if account is None else _curve(account) for _, account in found]
    if as_json:
        for row, curve in zip(rows, curves, strict=True):
            row["attacker"] = curve and curve.record()
        sys.stdout.write(json.dumps(rows, indent=2) + "\n")
        return
    cells = [[_cell(row[field]) for field in COLUMNS.values()] for row in rows]
    out.print(table_of(list(COLUMNS), cells, left=TEXTS))
    for row, curve in zip(rows, curves, strict=True):
        if curve:
            said = f"{row['dataset']}: {curve.said()}, by {curve.found_by}"
            out.print(said)
        for key, who in LESS.items():
            if row[key] is not None:
                said = f"{row['dataset']}: its run states {row[key]:.4g} against who sees {who}"
                out.print(said)
    out.print(LEGEND)


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
    out.print(f"{ledger}: {id_} is a data set of its own; use it by privacy.dataset-id = {id_!r}")


def _nodes(directory: Path) -> dict[Path, NodeSettings]:
    """The ledger directory of each node in a directory -> what its owner set."""
    from clients.ledger_ref import LEDGER
    from clients.node_settings import NODE_FILE, read_node, state_of

    found = {}
    for file in sorted(directory.rglob(NODE_FILE)):
        settings = read_node(file.parent)
        found[(state_of(file.parent, settings) / LEDGER).resolve()] = settings
    return found


def _places(directory: Path, nodes: Collection[Path]) -> list[Path]:
    """The ledger directories in a directory, those of its nodes, and those that the runs in it name.

    Raises:
        ConfigError: there is none.
    """
    from fedlora.errors import ConfigError
    from fedlora.privacy.datasets import REGISTER

    inside = {register.parent.resolve() for register in directory.rglob(REGISTER)}
    named = {_ledger_in(config) for config in directory.rglob("config.toml")} - {""}
    elsewhere = {Path(path).expanduser().resolve() for path in named}
    places = {*inside, *nodes, *(path for path in elsewhere if (path / REGISTER).exists())}
    if not places:
        raise ConfigError(f"{directory}: there is no privacy ledger in it")
    return sorted(places)


def _ledger_in(config: Path) -> str:
    """``privacy.ledger`` of a configuration; empty in one of another program, as Flower's in a federation."""
    try:
        return str(tomllib.loads(config.read_text())["privacy"]["ledger"])
    except (OSError, ValueError, KeyError, TypeError):
        return ""


def _rows(place: Path, node: NodeSettings | None) -> Iterator[tuple[dict[str, Any], Account | None]]:
    """A row for each account of a ledger directory, and for each data set that has none yet."""
    from fedlora.privacy.datasets import declared_in
    from fedlora.privacy.ledger import read_ledgers

    accounts = read_ledgers(place)
    for account in accounts:
        yield _row(place, account.identity, node, account), account
    named = [node.dataset_id] if node is not None and node.dataset_id else []
    known = dict.fromkeys([*declared_in(place), *named])
    if node is not None and not known:
        known = {RUNS_OWN: None}
    for source in known:
        if not any(f"{account.identity}/".startswith(f"{source}/") for account in accounts):
            yield _row(place, source, node, None), None


def _row(place: Path, dataset: str, node: NodeSettings | None, account: Account | None) -> dict[str, Any]:
    standing = None if account is None else account.standing
    budget = None if standing is None else standing.budget
    owners = node.max_epsilon if node is not None and node.max_epsilon else None
    spent = 0.0 if standing is None else standing.epsilon
    target = None if budget is None else budget.target_epsilon
    on_evaluations = 0.0 if standing is None else standing.on_evaluations
    rest = [
        limit - cost
        for limit, cost in ((owners, spent), (target, spent - on_evaluations))
        if limit is not None
    ]
    whose = node is None or not dataset or not node.dataset_id or dataset == node.dataset_id
    return {
        "ledger": str(place if account is None else account.path),
        "dataset": dataset,
        "epsilon": spent,
        "on_evaluations": on_evaluations,
        **dict.fromkeys(LESS),
        "delta": standing.delta or None if standing else None,
        "neighboring_relation": standing.neighboring_relation if standing and standing.releases else None,
        "unit": None if account is None or account.unit is None else account.unit or "example",
        "accountant": standing.accountant or None if standing else None,
        "max_epsilon": owners,
        "max_delta": node.max_delta if node is not None and owners else None,
        "target_epsilon": target,
        "left": max(0.0, min(rest)) if rest else None,
        "releases": standing.releases if standing else 0,
        "unfinished": standing.unfinished if standing else 0,
        "steps": standing.steps if standing else 0,
        "content_changes": standing.content_changes if standing else 0,
        "partition": None if node is None else node.partition_id,
        "data": (node.data or None) if node is not None and whose else None,
    }


def _state_less(directory: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Put a run's smaller epsilons into the rows of its or its nodes' ledgers that spent what it claims."""
    for file in directory.rglob("result.json"):
        named = Path(_ledger_in(file.with_name("config.toml")) or file.parent).expanduser().resolve()
        try:
            claim = json.loads(file.read_text()).get("claim", {})
            spent, less = float(claim["epsilon"]), {key: claim[key] for key in LESS if key in claim}
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            continue
        for row in rows:
            own = row["partition"] is not None or Path(row["ledger"]).is_relative_to(named)
            if own and math.isclose(row["epsilon"], spent, rel_tol=1e-9):
                row |= less


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
