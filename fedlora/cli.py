"""The command line. Exit codes: 0 done, 1 the run failed, 2 the request was wrong."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer
from rich.console import Console
from rich.table import Table

from fedlora.errors import ConfigError, FedLoraError

cli = typer.Typer(
    name="fedlora",
    no_args_is_help=True,
    add_completion=False,
    help="Federated LoRA fine-tuning: simulate, deploy, and budget privacy with one Flower app.",
    pretty_exceptions_enable=False,
)
out = Console(soft_wrap=True, width=None if sys.stdout.isatty() else 160)
err = Console(stderr=True, soft_wrap=True)

COLUMNS = ("name", "exact", "mixed_ranks", "moves_base", "client_dp", "up", "down", "paper")
"""Facts that ``fedlora strategies`` shows; ``--json`` has all of them."""

Command = TypeVar("Command", bound=Callable[..., None])

ConfigFile = Annotated[Path, typer.Argument(metavar="CONFIG.toml", help="The run's configuration.")]
Overrides = Annotated[
    list[str],
    typer.Option("--set", metavar="KEY=VALUE", help="Override a key, for instance lora.rank=4. Repeatable."),
]


def main() -> None:
    """Entry point of the ``fedlora`` command."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # threads that wait leave the cores to the clients
    cli()


def one_line_errors(command: Command) -> Command:
    """Turn fedlora's errors into one line on standard error and the exit code that belongs to them."""

    @wraps(command)
    def guarded(*args: Any, **kwargs: Any) -> None:
        try:
            command(*args, **kwargs)
        except FedLoraError as error:
            err.print(f"[red]error:[/red] {' '.join(str(error).split())}", highlight=False)
            sys.exit(2 if isinstance(error, ConfigError) else 1)
        except KeyboardInterrupt:
            err.print("interrupted; what was written stays, go on with --resume")
            sys.exit(1)

    return guarded  # type: ignore[return-value]


@cli.command()
@one_line_errors
def run(
    config: ConfigFile,
    set_: Overrides = [],  # noqa: B006
    out_dir: Annotated[Path | None, typer.Option("--out", help="Directory for the results.")] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on after the last checkpoint in --out.")
    ] = False,
) -> None:
    """Run one federation in simulation.

    Example: fedlora run experiments/demo.toml --set strategy.name=flora --out runs/flora
    """
    from fedlora.engines.simulate import simulate
    from fedlora.runs import parse_overrides, read_config

    settings = read_config(config, parse_overrides(set_))
    path = out_dir or Path(settings.output_dir or f"runs/{config.stem}")
    result = simulate(settings, path, resume=resume)
    accuracy = _percent(result["accuracy"])
    out.print(f"[bold]{result['strategy']}[/bold]: accuracy {accuracy} on {result['examples']} examples")
    out.print(f"results in {path}, adapter in {path / 'adapter'}")


@cli.command()
@one_line_errors
def compare(
    config: ConfigFile,
    set_: Overrides = [],  # noqa: B006
    out_dir: Annotated[
        Path | None, typer.Option("--out", help="Directory for all runs and report.html.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Keep finished runs and go on.")] = False,
) -> None:
    """Run every strategy, reference and variant of a [study] table and write report.html.

    Example: fedlora compare experiments/demo.toml --out runs/demo
    """
    from fedlora.runs import parse_overrides, read_config
    from fedlora.study.runner import run_study

    settings = read_config(config, parse_overrides(set_))
    report = run_study(settings, out_dir or Path(f"runs/{config.stem}"), resume=resume)
    out.print(f"report: {report}")


@cli.command()
@one_line_errors
def evaluate(
    adapter: Annotated[Path, typer.Argument(help="Directory of an adapter that fedlora wrote.")],
    data: Annotated[str, typer.Argument(help="A built-in dataset, a jsonl/csv/parquet file, or a hub id.")],
    text_column: Annotated[str, typer.Option(help="Column with the text.")] = "text",
    label_column: Annotated[str, typer.Option(help="Column with the label.")] = "label",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Accuracy and loss of an adapter on the test examples of a dataset (all rows of a file).

    Example: fedlora evaluate runs/demo/flora/adapter sentiment
    """
    from fedlora.evaluate import evaluate_adapter

    result = evaluate_adapter(adapter, data, text_column=text_column, label_column=label_column)
    if as_json:
        sys.stdout.write(json.dumps(result) + "\n")
        return
    out.print(
        f"accuracy {_percent(result['accuracy'])}, loss {result['loss']:.4f}, {result['examples']} examples"
    )
    for domain, accuracy in result["accuracy_by_domain"].items():
        out.print(f"  {domain:12} {_percent(accuracy)}")


@cli.command()
@one_line_errors
def strategies(
    as_json: Annotated[bool, typer.Option("--json", help="Print the facts as JSON.")] = False,
) -> None:
    """What each strategy trains, ships and guarantees.

    Example: fedlora strategies --json
    """
    from strategies.facts import fact_rows

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


def _cell(value: Any) -> str:
    return ("yes" if value else "no") if isinstance(value, bool) else str(value)


def _percent(value: float | None) -> str:
    return "not measured" if value is None else f"{100 * value:.1f} %"
