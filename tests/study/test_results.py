"""Reading finished runs back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fedlora.config import RunConfig, from_flat
from fedlora.errors import ConfigError, RunFailed
from fedlora.server.directory import RunDirectory
from fedlora.study.analyse.results import load_results
from fedlora.study.plan.cells import Cell
from tests.study.made_up import result


def cell_of(config: RunConfig) -> Cell:
    return Cell(
        label="flora", kind="strategy", seed=0, config=config, group="flora", method="flora", setting=""
    )


@pytest.fixture
def cell() -> Cell:
    config = from_flat({"strategy.name": "flora", "num-server-rounds": 2})
    return cell_of(config)


@pytest.fixture
def root(cell: Cell, tmp_path: Path) -> Path:
    """A study's directory in which the cell is finished."""
    made_up = result("flora", num_rounds=2)
    directory = RunDirectory(tmp_path / "flora")
    directory.open(cell.config)
    for record in made_up.rounds:
        directory.append_round(record)
    directory.write_result(made_up.result)
    return tmp_path


def test_a_finished_cell_comes_back_as_it_was_written(cell: Cell, root: Path) -> None:
    (found,) = load_results([cell], root)
    made_up = result("flora", num_rounds=2)
    assert (found.label, found.group, found.config) == ("flora", "flora", cell.config)
    assert (found.rounds, found.result) == (made_up.rounds, made_up.result)
    assert found.provenance["packages"]["torch"]


def test_engine_and_output_directory_may_differ(cell: Cell, root: Path) -> None:
    config = from_flat(
        {"strategy.name": "flora", "num-server-rounds": 2, "engine.num-actors": 7, "output-dir": "x"}
    )
    other = cell_of(config)
    assert load_results([other], root)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"lora.rank": 4}, "lora.rank = 4: the run in .* has 8"),
        ({"num-server-rounds": 3}, "num-server-rounds = 3"),
    ],
)
def test_a_run_with_other_settings_is_not_reported(keys: dict[str, Any], message: str, root: Path) -> None:
    config = from_flat({"strategy.name": "flora", "num-server-rounds": 2, **keys})
    with pytest.raises(ConfigError, match=message):
        load_results([cell_of(config)], root)


def _drop_accuracy(path: Path) -> None:
    record = json.loads(path.read_text())
    record = {key: value for key, value in record.items() if "sha256" not in key}  # older
    path.write_text(json.dumps({**record, "accuracy": None}))


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        ("result.json", Path.unlink, "the run is not finished"),
        ("result.json", lambda path: path.write_text("{"), "is damaged, it is no JSON"),
        ("result.json", lambda path: path.write_text("[]"), "is damaged, it is no JSON object"),
        ("result.json", lambda path: path.write_text(path.read_text().replace("0.8", "0.9")), "is damaged"),
        ("result.json", _drop_accuracy, "accuracy is missing"),
        ("rounds.jsonl", lambda path: path.write_text(path.read_text()[:-9]), "is not what result.json"),
        ("rounds.jsonl", lambda path: path.write_text(path.read_text().replace("0.", "0.1")), "is not what"),
    ],
)
def test_what_cannot_be_read_is_said_in_one_line(
    name: str, damage: Any, message: str, cell: Cell, root: Path
) -> None:
    damage(root / "flora" / name)
    with pytest.raises((ConfigError, RunFailed), match=message) as caught:
        load_results([cell], root)
    assert "\n" not in str(caught.value)
