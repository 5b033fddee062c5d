"""What the documentation tells people to type is accepted by this version, and the first steps are run."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest
from typer.testing import CliRunner

from clients.training.optimizers.registry import OPTIMIZERS
from fedlora.adapters import KINDS
from fedlora.cli import cli
from fedlora.config import RunConfig, from_flat, to_flat
from fedlora.errors import ConfigError
from fedlora.server.validate import check
from fedlora.wire.upload import CODECS
from strategies.allocation import ALLOCATIONS
from strategies.registry import RULES
from strategies.rule import INIT_A
from tests.docs_commands import (
    FOREIGN,
    PAGES,
    ROOT,
    Command,
    commands,
    keys_in_prose,
    tables,
    values_in_prose,
    verify,
)

SHOWN = commands()
RUN: tuple[tuple[str, dict[str, str]], ...] = (
    (
        "fedlora run demo.toml --set strategy.name=flora --set lora.ranks=4,8,16,8 --out runs/mine",
        {"demo.toml": "TINY"},
    ),
    ("fedlora evaluate runs/mine/adapter sentiment", {"sentiment": "synthetic"}),
    (".venv/bin/fedlora compare experiments/privacy.toml --out runs/privacy --resume",
     {"experiments/privacy.toml": "TINY"}),
    (
        "fedlora privacy plan --dataset-size 2000 --batch-size 16 --local-steps 10 --rounds 100 "
        "--fraction-train 0.5 --target-epsilon 8 --target-delta 1e-5",
        {},
    ),
)  # fmt: skip
"""Commands that are carried out one after the other in an empty directory, with what stands in for a word:
TINY is the smallest configuration of ``experiments``, without Ray, which `tests/e2e` starts by command."""


@pytest.mark.parametrize("command", SHOWN, ids=lambda c: f"{c.page}: {c.text[:60]}")
def test_every_command_is_accepted_as_it_stands(command: Command) -> None:
    verify(command)


@pytest.mark.parametrize(
    "line",
    [
        "fedlora runn experiments/demo.toml",
        "fedlora run experiments/demo.toml --sett lora.rank=4",
        "fedlora run experiments/demo.toml --set lora.rnak=4",
        "fedlora run experiments/demo.toml --set lora.rank=0",
        "fedlora run experiments/gone.toml",
        "fedlora compare",
        "fedlora privacy plan --epsilon 3",
        "make nothing-of-the-kind",
        "flwr run . --config experiments/demo.toml",
        "flwr run . --run-config experiments/gone.toml",
        "python -m experiments.gone",
        "python -m pytest tests/gone.py",
        "pip install fedlora",
        "pip install .[none]",
        "accelerate launch",
    ],
)
def test_what_does_not_exist_turns_red(line: str) -> None:
    with pytest.raises((AssertionError, ConfigError, subprocess.CalledProcessError)):
        verify(Command("made up", tuple(line.split())))


def test_programs_that_nobody_runs_are_still_in_the_pages() -> None:
    assert set(FOREIGN) <= {command.words[0] for command in SHOWN}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_key_in_backticks_exists(page: Path) -> None:
    known = to_flat(RunConfig())
    assert [key for key in keys_in_prose(page.read_text()) if key not in known] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_table_is_a_configuration(page: Path) -> None:
    for flat in tables(page.read_text()):
        from_flat(flat)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_value_in_backticks_is_one_that_its_key_takes(page: Path) -> None:
    for key, value in values_in_prose(page.read_text()):
        told = ""
        try:
            check(from_flat({key: value}))
        except ConfigError as error:  # it may need another key beside it
            told = str(error)
        assert not (told.startswith(f"{key} = ") and "accepted are" in told), told


def test_a_method_that_is_not_there_is_found() -> None:
    page = '| X | `strategy.name = "flora2"` | |'
    with pytest.raises(ConfigError, match="did you mean flora"):
        check(from_flat(dict(values_in_prose(page))))


METHODS = (ROOT / "docs" / "methods.md").read_text()


def test_every_name_that_stands_for_something_here_is_registered() -> None:
    """In the column *here* of the page on methods, also where a name stands without its key."""
    keys = {part for key in to_flat(RunConfig()) for part in (key, key.rpartition(".")[2])}
    known = {*RULES, *KINDS, *OPTIMIZERS, *ALLOCATIONS, *CODECS, *INIT_A, *keys}
    rows = re.findall(r"^\| [^|]+ \| ([^|]+) \|", METHODS, re.M)
    names = {name for cell in rows for name in re.findall(r'`"?([a-z][a-z0-9-]+)"?`', cell)}
    assert {"fedsvd-renew", "florist"} <= names
    assert names - known == set()


def test_the_first_steps_run(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config, empty = tmp_path / "tiny.toml", tmp_path / "empty"
    tiny = (ROOT / "experiments" / "tiny.toml").read_text()
    config.write_text(f'{tiny}\n[engine]\nname = "in-process"\n')
    empty.mkdir()
    monkeypatch.chdir(empty)
    shown = {command.text: command for command in SHOWN}
    for text, instead in RUN:
        assert text in shown, f"no page shows {text}"
        words = [instead.get(word, word).replace("TINY", str(config)) for word in shown[text].words]
        outcome = CliRunner().invoke(cli, words[1:])
        assert outcome.exit_code == 0, f"{text}: {outcome.output}"
    assert {path.name for path in (empty / "runs" / "privacy").iterdir()} >= {"report.html", "results.csv"}
    assert os.listdir(empty) == ["runs"]
