"""Forgetting: the new model is that of a run which never had the client, and what the old one knew shows."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from typer.testing import CliRunner

import fedlora
from fedlora.audit.forget import Forgotten, forget
from fedlora.cli import cli
from fedlora.errors import ConfigError
from tests.conftest import tiny_config
from tests.strategies.federations import assert_same_bits

KEYS: dict[str, Any] = {
    "num-server-rounds": 4,
    "data.num-partitions": 4,
    "data.dirichlet-alpha": 0.05,  # some labels are nearly one client's own
    "train.local-steps": 20,
    "train.learning-rate": 0.02,
    "model.head": "train",
    "evaluate-every": 4,
}
GONE = 2


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> Path:
    path = tmp_path_factory.mktemp("forget")
    fedlora.run(tiny_config(**KEYS), path / "whole")
    return path


@pytest.fixture(scope="module")
def found(home: Path) -> Forgotten:
    return forget(home / "whole", GONE, home / "without")


def test_the_new_model_is_that_of_a_run_without_the_client(home: Path, found: Forgotten) -> None:
    fedlora.run(tiny_config(**KEYS, partitions="0,1,3"), home / "never")
    one, other = (
        load_file(home / run / "adapter" / "adapter_model.safetensors") for run in ("without", "never")
    )
    assert_same_bits(one, other)
    rounds = fedlora.load_run(home / "without").records
    assert [r["participants"] for r in rounds] == [[0, 1, 3]] * 4


def test_what_is_said_of_the_client_is_so(home: Path, found: Forgotten) -> None:
    assert found.rounds == [1, 2, 3, 4]
    assert found.partition_id == GONE
    done = fedlora.load_run(home / "whole").record
    assert found.before.test_accuracy == pytest.approx(done["accuracy"])
    assert found.before.test_loss == pytest.approx(done["loss"], rel=1e-4)


def test_what_the_model_had_learned_from_the_client_alone_is_gone(found: Forgotten) -> None:
    assert found.influence.low > 0.5
    assert found.after.accuracy < found.before.accuracy - 0.1
    assert found.after.auc.value < found.before.auc.value


@pytest.mark.parametrize(
    ("run", "partition", "line"),
    [
        ("nothing", 0, "no finished run, there is no result.json"),
        ("whole", 4, "--partition 4: took part in no round"),
        ("alone", 0, "--partition 0: nobody else takes part"),
        ("deployed", 0, "ran over a federation, whose data are at its nodes"),
    ],
)
def test_refusals(home: Path, run: str, partition: int, line: str) -> None:
    if run == "alone" and not (home / run).exists():
        fedlora.run(tiny_config(**{**KEYS, "num-server-rounds": 1, "partitions": "0"}), home / run)
    if run == "deployed":
        shutil.copytree(home / "whole", home / run)
        (home / run / "flower.log").touch()
    with pytest.raises(ConfigError, match=line):
        forget(home / run, partition, home / "refused")
    assert not (home / "refused").exists()


def test_on_the_command_line(home: Path) -> None:
    options = ["--partition", "1", "--out", str(home / "second")]
    told = CliRunner().invoke(cli, ["forget", str(home / "whole"), *options, "--json"])
    assert told.exit_code == 0, told.output
    record = json.loads(told.stdout.splitlines()[-1])
    assert (record["partition_id"], record["rounds"]) == (1, [1, 2, 3, 4])
