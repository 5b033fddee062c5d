"""``fedlora init`` and ``example``: a configuration to begin with, of one's own data or a packaged one."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedlora.cli.console import one_line_errors, out
from fedlora.core.files import check_place, user_path
from fedlora.errors import ConfigError, unknown_name

if TYPE_CHECKING:
    from fedlora.data.outline import Outline

FILE = "run.toml"
MODELS = {
    "classification": "minilm",
    "regression": "minilm",
    "multi-label-classification": "minilm",
    "causal-lm": "smollm2",
    "instruction": "smollm2",
    "dpo": "smollm2",
    "image-classification": "vit",
}
"""Tasks, and what is proposed for each."""
MOST_TEST = 300
"""Test examples that are proposed at most: each run of a study is measured on all of them."""
TEMPLATE = """\
# Written by fedlora init. All keys, with what each takes: docs/keys.md.
# Small, so that a first study takes less than three minutes on two cores: it shows how a study reads, and
# decides nothing. For a paper raise num-server-rounds until the curves are flat, lower learning-rate or tune
# it, test on all that is held out, and declare study.comparisons with ten seeds (docs/tutorial.md).
task = {task}
num-server-rounds = 3
fraction-train = 1.0            # share of the clients that trains in a round
seed = 0

[model]
name = {model}                  # built in, a directory, or a Hugging Face id

[data]
name = {data}
# test = "test.csv"             # else a fifth is held out (test-fraction)
{held_out}{columns}max-length = {length}                # tokens; what is longer is cut
evaluate-examples = 50          # of the test set after each round; after the last round all
{clients}
[lora]
rank = 8
alpha = 16.0
# ranks = "4,8,16"              # mixed ranks, client by client; see: fedlora strategies

[strategy]
name = "fedavg"                 # see: fedlora strategies

[train]
local-steps = 6                 # in a round, at each client
batch-size = 8
learning-rate = {rate}

# [privacy]
# mode = "example"              # DP-SGD at each client; first: fedlora privacy plan --help
# target-epsilon = 8.0
# target-delta = 1e-5
"""
STUDY = """
[study]                         # what fedlora compare runs
strategies = {strategies}
seeds = "1,2,3"
"""


@one_line_errors
def init(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help=f"Where {FILE} is written.")],
    data: Annotated[
        str, typer.Option(help="A csv, tsv, jsonl or parquet file, a directory, or a hub id.")
    ] = "",
    task: Annotated[str, typer.Option(help=f"{', '.join(MODELS)}; else what the columns are for.")] = "",
    model: Annotated[str, typer.Option(help="Built in, a directory or a hub id; else a small one.")] = "",
    text_column: Annotated[str, typer.Option(help="Column with the text; else the likeliest.")] = "",
    label_column: Annotated[str, typer.Option(help="Column with the label; else the likeliest.")] = "",
    clients: Annotated[
        str, typer.Option(help="A column whose values are the clients, or how many to deal the rows to.")
    ] = "4",
    max_length: Annotated[int, typer.Option(help="Longest sequence in tokens.")] = 64,
) -> None:
    """Write a commented configuration for your own data, and show the data as clients will hold it.

    What is not given is asked for on a terminal.

    Example: fedlora init mine --data reviews.csv --label-column stars
    """
    check_place("DIR", directory)
    path = directory / FILE
    if path.exists():
        raise ConfigError(f"{path}: is there already, name another directory")
    data = data or _asked("data", "the file, directory or hub id of the examples")
    from fedlora.data.outline import outline

    place = user_path(data)
    found = outline(str(place.absolute()) if place.exists() else data)
    task = task or _asked("task", f"one of {', '.join(MODELS)}", found.task)
    if task not in MODELS:
        raise unknown_name("--task", task, MODELS)
    model = model or _asked("model", "built in, a directory or a hub id", MODELS[task])
    text = _filled(found, task, model, text_column, label_column, clients, max_length)
    lines = _shown(text)
    directory.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    out.print(f"columns   {', '.join(found.columns)}", highlight=False, markup=False)
    for heading, line in lines:
        out.print(f"{heading:10}{line}", highlight=False, markup=False)
    shown = shlex.quote(str(path))
    out.print(f"{path}: edit it, then fedlora run {shown} --dry-run, and without --dry-run", markup=False)


@one_line_errors
def example(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Which; all names if left out.")] = "",
) -> None:
    """Print a packaged configuration, to be run as it is or changed.

    Example: fedlora example demo > demo.toml
    """
    from fedlora.core.code import examples

    known = examples()
    if not name:
        for each, file in known.items():
            about = file.read_text().partition("\n")[0].removeprefix("# ")
            out.print(f"{each:16}{about}", highlight=False, markup=False)
        return
    if name not in known:
        raise unknown_name("example", name, list(known))
    sys.stdout.write(known[name].read_text())


def _asked(option: str, what: str, proposed: str = "") -> str:
    """An answer of the person at the terminal; elsewhere what is proposed.

    Raises:
        ConfigError: nobody to ask, and nothing proposed.
    """
    if not sys.stdin.isatty():
        if proposed:
            return proposed
        raise ConfigError(f"--{option} is missing: {what}")
    answer: str = typer.prompt(f"{option} ({what})", default=proposed or None, err=True)
    return answer


def _filled(
    found: Outline, task: str, model: str, text: str, label: str, clients: str, max_length: int
) -> str:
    """The configuration's text.

    Raises:
        ConfigError: a column that is not there, or that cannot be told.
    """
    columns = ""
    labelled = "classification" in task or task == "regression"
    if task == "causal-lm" or (labelled and task != "image-classification"):
        columns += _column("text-column", "--text-column", text or found.text, found)
    if labelled:
        columns += _column("label-column", "--label-column", label or found.label, found)
    if task == "image-classification":
        columns += f"image-column = {_quoted(found.image or 'image')}\n"
    if clients.isdigit():
        dealt = (
            'partitioner = "iid"             # or dirichlet (skewed labels), natural (by a column), ...\n'
            f"num-partitions = {clients}\n"
        )
    else:
        dealt = 'partitioner = "natural"\n' + _column("partition-by", "--clients", clients, found)
    study = "" if task == "regression" else STUDY  # which compares accuracies
    return (TEMPLATE + study).format(
        task=_quoted(task), model=_quoted(model), data=_quoted(found.name), columns=columns, clients=dealt,
        held_out=_held_out(found.rows), length=max_length, rate="3e-3" if labelled else "1e-3",
        strategies=_quoted("fedavg,flora,head-only" if labelled else "fedavg,flora"),
    )  # fmt: skip


def _held_out(rows: int) -> str:
    """The line that holds out fewer test examples than the usual fifth, where that is many.

    >>> _held_out(1500), _held_out(10_000).strip()
    ('', 'test-fraction = 0.03            # of 10,000 rows; more make intervals narrower')
    """
    if rows * 0.2 <= MOST_TEST:
        return ""
    return f"test-fraction = {MOST_TEST / rows:<16.2g}# of {rows:,} rows; more make intervals narrower\n"


def _column(key: str, option: str, name: str, found: Outline) -> str:
    from fedlora.data.values import columns_named

    if not name:
        raise ConfigError(f"{option}: cannot be told from the columns {', '.join(found.columns)}, name it")
    for each in columns_named(name, found.columns):
        if found.columns and each not in found.columns:
            more = ", and a number of clients" if option == "--clients" else ""
            raise unknown_name(option, each, found.columns, more)
    return f"{key} = {_quoted(name)}\n"


def _shown(text: str) -> list[tuple[str, str]]:
    """The data of a configuration, dealt to its clients and cut as it says."""
    import tomllib

    from fedlora.config import flatten, from_flat
    from fedlora.prepared.cache import open_prepared, prepare
    from fedlora.server.preview import data_lines

    config = from_flat(flatten(tomllib.loads(text)))
    prepared = open_prepared(prepare(config))
    return data_lines(config, prepared, prepared.clients)


def _quoted(value: str) -> str:
    """A TOML string."""
    import json

    return json.dumps(value, ensure_ascii=False)
