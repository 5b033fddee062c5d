"""``fedlora forget``: a finished run without one of its clients."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedlora.cli.console import ended_by_sigterm, one_line_errors, out, percent, table_of

if TYPE_CHECKING:
    from rich.table import Table

    from fedlora.audit.forget import Forgotten
    from fedlora.audit.membership import Measured


RunFolder = Annotated[Path, typer.Argument(metavar="RUN", help="Directory of a finished simulation.")]
Partition = Annotated[int, typer.Option("--partition", metavar="K", min=0, help="The client.")]


@one_line_errors
def forget(
    run: RunFolder,
    partition: Partition,
    out_dir: Annotated[Path, typer.Option("--out", help="Directory for the run without it.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Train a run's rounds anew without one client, and measure what both models show of its examples.

    Example: fedlora forget runs/demo --partition 2 --out runs/demo-without-2
    """
    from fedlora.audit.forget import forget as carry_out

    with ended_by_sigterm():
        found = carry_out(run, partition, out_dir)
    if as_json:
        sys.stdout.write(json.dumps(found.record()) + "\n")
        return
    out.print(_table(found))
    for line in lines(found):
        out.print(line)
    out.print(f"results in {out_dir}, adapter in {out_dir / 'adapter'}")


def _table(found: Forgotten) -> Table:
    header = ["model", "accuracy on its examples", "on test examples", "loss", "test loss", "AUC (95 %)"]
    rows = []
    for name, seen in (("with the client", found.before), ("without it", found.after)):
        accuracies, losses = (seen.accuracy, seen.test_accuracy), (seen.loss, seen.test_loss)
        rows.append([name, *map(percent, accuracies), *(f"{x:.3f}" for x in losses), interval(seen.auc)])
    return table_of(header, rows, left=["model"])


def interval(found: Measured) -> str:
    """A number and its interval in text."""
    return f"{found.value:.3f} ({found.low:.3f} to {found.high:.3f})"


def lines(found: Forgotten) -> list[str]:
    """What was done and what it shows, in sentences."""
    learned = found.influence.low > 0.5
    told = "the first model had learned from them, or from data like them" if learned else "no trace is shown"
    return [
        f"client {found.partition_id}, {found.examples} examples, took part in {len(found.rounds)} rounds; "
        "all rounds were trained anew without it, at the privacy that the others spend on a run",
        "its examples lose more by that than test examples with a probability of "
        f"{interval(found.influence)}: {told}",
    ]
