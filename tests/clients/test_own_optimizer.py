"""The optimiser of docs/optimizer.md, used and tested as the page says."""

from __future__ import annotations

import re
import sys
import tomllib
from pathlib import Path

import pytest

import fedlora
from clients.training.optimizers.registry import check_optimizer
from fedlora.config import flatten, from_flat
from fedlora.errors import ConfigError
from tests.clients.cohort import test_optimizers as laws
from tests.clients.cohort.samples import model
from tests.docs_commands import ROOT, blocks
from tests.nested import passed

PAGE = (ROOT / "docs" / "optimizer.md").read_text()
(CODE,) = blocks(PAGE, "python")
TABLES = [flatten(tomllib.loads(table)) for table in blocks(PAGE, "toml")]
(MINE,) = (table for table in TABLES if table.get("train.optimizer") == "scaled_gd:ScaledGD")
BOTH = [frozenset("AB")]


@pytest.fixture
def there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where somebody stands who has the page's file."""
    (tmp_path / "scaled_gd.py").write_text(CODE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "scaled_gd", raising=False)
    return tmp_path


@pytest.mark.slow
def test_the_example_is_short_and_obeys_the_laws(there: Path) -> None:
    """By the command of the page."""
    assert CODE.count("\n") < 40
    command = re.search(r"\$ (FEDLORA_OPTIMIZER=\S+) python -m pytest (.*)", PAGE)
    assert command
    name, _, optimizer = command[1].partition("=")
    found = passed(command[2].split(), {name: optimizer}, there)
    assert sum("scaled_gd:ScaledGD" in one for one in found) > 5


@pytest.mark.parametrize("law", ["as_if_alone", "as_if_alone_privately"])
def test_the_laws_hold_it_to_what_it_says_of_stacks(law: str, there: Path) -> None:
    """One that looks beyond its own client's numbers, which a stack has beside them."""
    (there / "beyond.py").write_text(CODE.replace("gradient / layer", "gradient / gradient.norm() / layer"))
    with pytest.raises(AssertionError):
        getattr(laws, f"test_every_client_comes_out_{law}")({"optimizer": "beyond:ScaledGD"}, model())


def test_what_the_page_configures_is_accepted(there: Path) -> None:
    assert len(TABLES) == 4
    for table in TABLES:
        check_optimizer(from_flat(table).train, trained=BOTH, head=True)
    table = {**MINE, "train.optimizer-options": '{"dumping": 1}'}
    with pytest.raises(ConfigError, match="dumping = 1: scaled_gd:ScaledGD accepts damping"):
        check_optimizer(from_flat(table).train, trained=BOTH, head=True)


def test_a_direction_that_is_missing_is_refused(there: Path) -> None:
    (there / "scaled_gd.py").write_text(CODE.replace("return moved", 'return {"A": moved["A"]}'))
    with pytest.raises(ConfigError, match=r"takes no step on layer.A .*KeyError: 'B'"):
        check_optimizer(from_flat(MINE).train, trained=BOTH, head=True)


@pytest.mark.slow
def test_client_processes_find_it_where_one_stands(there: Path) -> None:
    tiny = {
        "model.name": "tiny",
        "data.name": "synthetic",
        "data.evaluate-examples": 60,
        "num-server-rounds": 1,
        "train.local-steps": 1,
        "engine.num-actors": 1,
        "engine.num-cpus": 0.5,
    }
    result = fedlora.run({**tiny, **MINE}, there / "out")
    assert result.records[0]["round"] == 1
