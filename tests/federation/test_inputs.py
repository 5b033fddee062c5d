"""What a configuration only names counts by its content."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from clients.runtime import ClientRuntime
from fedlora.config import RunConfig
from fedlora.errors import ConfigError
from fedlora.server.inputs import inputs_by_device, inputs_digest
from fedlora.server.results import read_rounds
from fedlora.simulation.simulate import simulate
from fedlora.study.execute.cell import Engine
from tests.conftest import tiny_config
from tests.in_process import client_runtime


def digest(**keys: Any) -> str | None:
    config = tiny_config(**keys)
    return inputs_digest(config, client_runtime(config))


def test_the_same_names_with_the_same_content_are_the_same(cache: Path) -> None:
    assert digest() == digest()
    assert digest(**{"train.local-steps": 9}) == digest(), "what is in the configuration is not said twice"


@pytest.mark.parametrize(
    "keys",
    [{"seed": 2}, {"data.max-length": 8}, {"engine.cohort-size": 4}, {"data.partition-by": "group"}],
    ids=str,
)
def test_head_examples_partitions_and_cohorts_count(keys: dict[str, Any], cache: Path) -> None:
    assert digest(**keys) != digest()


def test_one_weight_of_the_base_counts(cache: Path) -> None:
    config = tiny_config()
    runtime: ClientRuntime = client_runtime(config)
    before = inputs_digest(config, runtime)
    weight = next(p for n, p in runtime.model.module.named_parameters() if "query" in n)
    with torch.no_grad():
        weight.view(-1)[0] += 1
        assert inputs_digest(config, runtime) != before
        weight.view(-1)[0] -= 1


def test_a_file_counts_by_what_is_in_it(cache: Path, tmp_path: Path) -> None:
    found = []
    for number, word in enumerate(("good", "good", "bad")):
        file = tmp_path / str(number) / "texts.jsonl"
        file.parent.mkdir()
        rows = [{"text": f"{word} text number {i}", "label": i % 2} for i in range(40)]
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        own = {"data.name": str(file), "data.partitioner": "iid", "data.num-partitions": 2}
        found.append(digest(**own))
    assert found[0] == found[1] != found[2]


def rows(file: Path, number: int, labels: tuple[str, ...] = ("a", "b")) -> None:
    found = [{"text": f"word number {i}", "label": labels[i % len(labels)]} for i in range(number)]
    file.write_text("".join(json.dumps(row) + "\n" for row in found))


def contents(path: Path) -> dict[Path, bytes]:
    return {file: file.read_bytes() for file in path.rglob("*") if file.is_file()}


def on(file: Path, **keys: Any) -> RunConfig:
    own = {"data.name": str(file), "data.partitioner": "iid", "data.num-partitions": 2}
    named = {"engine.name": "in-process", "num-server-rounds": 2, "train.local-steps": 1}
    return tiny_config(**{**own, **named, **keys})


@pytest.mark.parametrize("labels", [("a", "b"), ("a", "b", "c")], ids=["rows", "labels"])
@pytest.mark.parametrize("rounds", [2, 3], ids=["finished", "goes on"])
def test_a_run_does_not_go_on_with_other_data(
    rounds: int, labels: tuple[str, ...], cache: Path, tmp_path: Path
) -> None:
    file, run = tmp_path / "r.jsonl", tmp_path / "run"
    rows(file, 60)
    simulate(on(file), run)
    done = contents(run)
    rows(file, 90, labels)
    with pytest.raises(ConfigError, match=r"r.jsonl', model.name = 'tiny': the rounds in .* made with other"):
        simulate(on(file, **{"num-server-rounds": rounds}), run, resume=True)
    assert contents(run) == done
    rows(file, 60)
    simulate(on(file, **{"num-server-rounds": rounds}), run, resume=True)
    assert len(read_rounds(run)) == rounds


@pytest.mark.parametrize("file", ["result.json", ""], ids=["finished", "stopped"])
def test_a_run_does_not_go_on_with_fewer_rounds_than_it_has_done(
    file: str, cache: Path, tmp_path: Path
) -> None:
    config, run = tiny_config(**{"engine.name": "in-process", "num-server-rounds": 2}), tmp_path / "run"
    simulate(config, run)
    if not file:
        (run / "result.json").unlink()
    done = contents(run)
    with pytest.raises(
        ConfigError, match=r"^num-server-rounds = 1: the run in .* has done 2; give 2 or more"
    ):
        simulate(replace(config, num_server_rounds=1), run, resume=True)
    assert contents(run) == done


def test_a_study_knows_what_its_runs_were_given(cache: Path, tmp_path: Path) -> None:
    file = tmp_path / "r.jsonl"
    rows(file, 60)
    config, home = on(file, **{"engine.cohort-size": 1}), tmp_path / "run"
    given = inputs_by_device(config, client_runtime(config))
    with Engine(config) as engine:
        assert all(engine.gives(config, home, inputs) for inputs in given.values())
        assert not engine.gives(config, home, "others")
        unknown = on(file, **{"engine.cohort-size": 1, "privacy.ledger": "/ledger"})
        assert engine.gives(unknown, home, "others")
    file.unlink()
    with Engine(config) as engine:
        assert engine.gives(config, home, "others"), "the run itself says what is missing"


def test_public_examples_count(cache: Path, tmp_path: Path) -> None:
    file = tmp_path / "public.jsonl"
    file.write_text("".join(json.dumps({"text": f"text {i}", "label": i % 2}) + "\n" for i in range(20)))
    assert digest(**{"data.public": str(file)}) != digest()


@pytest.mark.parametrize(
    "keys",
    [
        {"engine.address": "192.0.2.1:6379"},
        {"strategy.name": "mine:Rule"},
        {"privacy.ledger": "/ledger"},
    ],
    ids=str,
)
def test_what_is_not_known_here_is_not_guessed(keys: dict[str, Any], cache: Path) -> None:
    config = tiny_config()
    assert inputs_digest(tiny_config(**keys), client_runtime(config)) is None
