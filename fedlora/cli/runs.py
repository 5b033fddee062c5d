"""``fedlora run``, ``compare`` and ``evaluate``."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fedlora.cli.console import ended_by_sigterm, marked, one_line_errors, out, percent, table_of
from fedlora.errors import ConfigError

if TYPE_CHECKING:
    from rich.table import Table

    from fedlora.config import RunConfig
    from fedlora.study.analyse.table import StudyTable
    from fedlora.study.library import RunResult

ConfigFile = Annotated[Path, typer.Argument(metavar="CONFIG.toml", help="The run's configuration.")]
Overrides = Annotated[
    list[str],
    typer.Option("--set", metavar="KEY=VALUE", help="Override a key, for instance lora.rank=4. Repeatable."),
]


@one_line_errors
def run(
    config: ConfigFile,
    set_: Overrides = [],  # noqa: B006
    out_dir: Annotated[Path | None, typer.Option("--out", help="Directory for the results.")] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on after the last checkpoint in --out.")
    ] = False,
    federation: Annotated[
        Path | None,
        typer.Option(
            "--federation", metavar="DIR", help="Run on this deployed federation, not in simulation."
        ),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what would be done and what it takes, and do nothing.")
    ] = False,
    max_rank: Annotated[
        int | None,
        typer.Option("--max-rank", metavar="R", min=1, help="Cut the adapter to this rank."),
    ] = None,
) -> None:
    """Run one federation, in simulation or deployed.

    Example: fedlora run demo.toml --out runs/demo
    (fedlora example demo > demo.toml writes such a file)
    """
    from fedlora.config import parse_overrides, read_config
    from fedlora.study import library

    cut = {} if max_rank is None else {"max-rank": max_rank}
    settings = read_config(config, parse_overrides(set_) | cut)
    if dry_run:
        _preview(settings, deployed=federation is not None)
        return
    path = out_dir or Path(settings.output_dir or f"runs/{config.stem}")
    finished = resume and _finished(path, settings.num_server_rounds)
    with ended_by_sigterm():
        done = library.run(settings, path, resume=resume, federation=federation)
    result = done.record
    if finished:
        out.print(f"{path} was finished: all {settings.num_server_rounds} rounds are done, none was added")
    out.print(marked(result["strategy"], f": {_measured(result)} on {result['examples']} examples"))
    for name, found in result.get("evaluation_sets", {}).items():
        out.print(f"on {name}: {_measured(found)}, {found['examples']} examples")
    if result.get("before"):
        out.print(f"before training: {_measured(result['before'])}")
    _print(_totals(done))
    if result.get("stopped_early"):
        patience = settings.early_stopping_patience
        out.print(f"ended after round {result['rounds']}: {patience} evaluations without a better one")
    if "best_round" in result:
        out.print(f"model of round {result['best_round']}, the best on {result['best_on']} examples")
    out.print(f"results in {path}, adapter in {path / 'adapter'}")
    if settings.max_rank and "adapter" in result:
        written = result["adapter"]
        lost = f"{100 * written['energy_lost']:.3g} % of the update's energy lost"
        out.print(f"adapter of rank {written['rank']}: {lost}; {written['vllm']}")


def _totals(done: RunResult) -> list[tuple[str, str]]:
    """What all rounds took together, simulated or deployed: a heading and a sentence for each."""
    result = done.record
    refused = [(r["round"], partition, why) for r in done.records for partition, why in r["refused"].items()]
    lines = [
        ("rounds", f"{result['rounds']} in {timedelta(seconds=round(result['seconds']))}"),
        ("traffic", f"{result['bytes_up'] / 1e6:.3g} MB up, {result['bytes_down'] / 1e6:.3g} MB down"),
    ]
    if result["epsilon"] is not None:
        lines.append(("privacy", f"epsilon {result['epsilon']:.4g} of the client that spent most"))
    if refused:
        number, partition, why = refused[-1]
        last = f"the last of partition {partition} in round {number}: {why}"
        lines.append(("refused", f"{len(refused)} updates, {last}"))
    return lines


def _preview(settings: RunConfig, *, deployed: bool) -> None:
    """Print what a run would do; of a deployment without its clients, which hold their own data."""
    from dataclasses import replace

    from fedlora.server.expected import expected
    from fedlora.server.preview import preview

    found = preview(settings)
    lines = replace(found, partitions=None).lines() if deployed else [*found.lines(), *expected(found)]
    _print(lines)


def _finished(path: Path, rounds: int) -> bool:
    """Whether a run directory has its result and all of these rounds."""
    from fedlora.server.results import read_rounds

    return (path / "result.json").exists() and len(read_rounds(path)) >= rounds


@one_line_errors
def compare(
    config: ConfigFile,
    set_: Overrides = [],  # noqa: B006
    out_dir: Annotated[
        Path | None, typer.Option("--out", help="Directory for all runs and report.html.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Keep finished runs and go on.")] = False,
    retry_failed: Annotated[
        bool, typer.Option("--retry-failed", help="With --resume: also try again what failed.")
    ] = False,
    share: Annotated[
        list[Path],
        typer.Option(
            "--share",
            metavar="DIR",
            help="Also take finished runs from this study.",
        ),
    ] = [],  # noqa: B006
    parallel: Annotated[
        int, typer.Option("--parallel", metavar="N", min=1, help="Runs at a time; they divide the actors.")
    ] = 1,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what would run and what it takes, and run nothing.")
    ] = False,
) -> None:
    """Run every strategy, reference and variant of the file's study table and write report.html.

    Example: fedlora compare demo.toml --out runs/demo
    (fedlora example demo > demo.toml writes such a file)
    """
    from fedlora.config import parse_overrides, read_config
    from fedlora.study import library

    path, overrides = out_dir or Path(f"runs/{config.stem}"), parse_overrides(set_)
    manner: dict[str, Any] = {
        "resume": resume, "retry_failed": retry_failed, "share": share, "parallel": parallel,
    }  # fmt: skip
    if dry_run:
        _outlook(read_config(config, overrides), path, manner)
        return
    with ended_by_sigterm():
        study = library.compare(config, path, overrides=overrides, **manner)
    out.print(methods_table(study.table()))
    out.print(f"report: {study.report}")


def _outlook(settings: RunConfig, path: Path, manner: dict[str, Any]) -> None:
    """Print what a study would run."""
    from fedlora.study.execute.outlook import HEADER, outlook

    found = outlook(settings, path, **manner)
    _print(found.lines)
    out.print(table_of(HEADER, [group.cells() for group in found.groups], left=["method"]))
    _print(found.ending)


def _print(lines: Sequence[tuple[str, str]]) -> None:
    """A heading and a sentence in each line."""
    for heading, text in lines:
        out.print(f"{heading:10}{text}")


def methods_table(found: StudyTable) -> Table:
    """The methods with their means and intervals, the most accurate first."""
    return table_of(*found.ranked().cells(), left=["method"])


@one_line_errors
def evaluate(
    adapter: Annotated[Path, typer.Argument(help="Directory of an adapter that fedlora wrote.")],
    data: Annotated[
        str, typer.Argument(help="A built-in dataset, a jsonl/csv/parquet file, or a hub id.")
    ] = "",
    text_column: Annotated[str, typer.Option(help="Column with the text.")] = "text",
    label_column: Annotated[str, typer.Option(help="Column with the label.")] = "label",
    lm_eval: Annotated[
        str, typer.Option("--lm-eval", help="In place of DATA: tasks of lm-eval or yaml files, comma list.")
    ] = "",
    limit: Annotated[int, typer.Option(help="With --lm-eval: examples of each task; 0 is all.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Accuracy and loss of an adapter on the test examples of a dataset (all rows of a file).

    Example: fedlora evaluate runs/demo/flora/adapter sentiment
    """
    if bool(data) == bool(lm_eval):
        raise ConfigError("fedlora evaluate: name a dataset after the adapter, or tasks by --lm-eval")
    if lm_eval:
        _by_harness(adapter, lm_eval, limit, as_json)
        return
    from fedlora.study import library

    result = library.evaluate(adapter, data, text_column=text_column, label_column=label_column)
    if as_json:
        sys.stdout.write(json.dumps(result) + "\n")
        return
    out.print(f"{_measured(result)}, loss {result['loss']:.4f}, {result['examples']} examples")
    for domain, accuracy in result["accuracy_by_domain"].items():
        out.print(f"  {domain:12} {percent(accuracy)}")


def _by_harness(adapter: Path, tasks: str, limit: int, as_json: bool) -> None:
    from fedlora.evaluation.lm_eval import evaluate_by_harness

    result = evaluate_by_harness(adapter, tasks, limit=limit)
    if as_json:
        sys.stdout.write(json.dumps(result) + "\n")
        return
    for task, metrics in result.items():
        out.print(f"{task}: {', '.join(f'{name} {value:.4f}' for name, value in metrics.items())}")


def _measured(result: dict[str, Any]) -> str:
    """The figures of an evaluation for people."""
    if result.get("rmse") is not None:
        return f"RMSE {result['rmse']:.4g}, R2 {result['r2']:.3f}"
    if result.get("f1_micro") is not None:
        scores = f"F1 {result['f1_micro']:.3f} (micro), {result['f1_macro']:.3f} (macro)"
        return f"{scores}, accuracy of decisions {percent(result['accuracy'])}"
    if result.get("perplexity") is None:
        return f"accuracy {percent(result['accuracy'])}"
    return f"perplexity {result['perplexity']:.2f}, next-token accuracy {percent(result['accuracy'])}"
