"""The owner reads and declares: ``fedlora privacy spent`` and ``new-dataset``."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from fedlora.privacy.calibration import epsilon_of
from fedlora.privacy.datasets import Dataset
from fedlora.privacy.ledger import Ledger, read_ledgers
from tests.privacy.ledgers import BUDGET, DATASET, WIDE, made, release


@pytest.fixture
def fedlora() -> Callable[..., Any]:
    from fedlora.cli import cli

    return lambda *arguments: CliRunner().invoke(cli, ["privacy", *map(str, arguments)])


def test_the_owner_reads_what_is_spent(tmp_path: Path, fedlora: Callable[..., Any]) -> None:
    made(tmp_path / "run" / "clients" / "ledger", release(1), release(2), budget=BUDGET)
    done = fedlora("spent", tmp_path / "run", "--json")
    assert done.exit_code == 0
    (row,) = json.loads(done.stdout)
    epsilon = epsilon_of(((1.0, 0.05, 6),), 1e-5, "rdp")
    assert row["epsilon"] == epsilon
    assert row["left"] == 8.0 - epsilon
    assert (row["releases"], row["steps"], row["dataset"]) == (2, 6, DATASET.identity)
    shown = fedlora("spent", tmp_path / "run").stdout
    assert f"{DATASET.identity}: at 1% false alarms an attacker finds at most" in shown


def test_a_run_that_names_a_ledger_elsewhere_leads_to_it(tmp_path: Path, fedlora: Callable[..., Any]) -> None:
    made(tmp_path / "ledger", release(1))
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.toml").write_text(f'[privacy]\nledger = "{tmp_path / "ledger"}"\n')
    assert len(json.loads(fedlora("spent", tmp_path / "run", "--json").stdout)) == 1


def test_a_data_set_that_spent_nothing_is_listed(tmp_path: Path, fedlora: Callable[..., Any]) -> None:
    made(tmp_path, release())
    fedlora("new-dataset", "--ledger", tmp_path, "--id", "other", "--reason", "collected since")
    rows = {row["dataset"]: row for row in json.loads(fedlora("spent", tmp_path, "--json").stdout)}
    assert sorted(rows) == sorted(["other", DATASET.identity])
    assert (rows["other"]["epsilon"], rows["other"]["releases"]) == (0.0, 0)


def test_a_federation_shows_what_each_owner_allows(tmp_path: Path, fedlora: Callable[..., Any]) -> None:
    (tmp_path / "server" / "flwr").mkdir(parents=True)
    (tmp_path / "server" / "flwr" / "config.toml").write_text('[superlink]\ndefault = "fedlora"\n')
    for k, limit in enumerate((2.0, 0.0)):
        node = tmp_path / "nodes" / f"node-{k}"
        node.mkdir(parents=True)
        (node / "node.toml").write_text(
            f'partition-id = {k}\ndata = "/srv/ward-{k}.csv"\n'
            f'dataset-id = "ward-{k}"\nmax-epsilon = {limit}\n'
        )
    made(
        tmp_path / "nodes" / "node-0" / "state" / "ledger",
        release(),
        budget=BUDGET,
        dataset=Dataset(source="ward-0"),
    )
    rows = {row["dataset"]: row for row in json.loads(fedlora("spent", tmp_path, "--json").stdout)}
    first, second = rows["ward-0"], rows["ward-1"]
    assert (first["max_epsilon"], first["max_delta"], first["target_epsilon"]) == (2.0, 1e-5, 8.0)
    assert first["left"] == 2.0 - first["epsilon"] > 0
    assert (first["data"], second["data"]) == ("/srv/ward-0.csv", "/srv/ward-1.csv")
    assert (second["epsilon"], second["max_epsilon"], second["left"]) == (0.0, None, None)
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "result.json").write_text(
        json.dumps({"claim": {"epsilon": first["epsilon"], "epsilon_of_model": 0.5}})
    )
    again = json.loads(fedlora("spent", tmp_path, "--json").stdout)
    assert {row["dataset"]: row["epsilon_of_model"] for row in again} == {"ward-0": 0.5, "ward-1": None}
    printed = fedlora("spent", tmp_path / "nodes" / "node-1").stdout
    assert "ward-1" in printed
    assert "/srv/ward-1.csv" in printed


def test_the_owner_declares_a_data_set(tmp_path: Path, fedlora: Callable[..., Any]) -> None:
    made(tmp_path, release())
    done = fedlora("new-dataset", "--ledger", tmp_path, "--id", "other", "--reason", "collected since")
    assert done.exit_code == 0
    assert Ledger(tmp_path, Dataset(source="other")).reserve(release(), WIDE).releases == 1


def test_wrong_requests_are_one_line_with_exit_code_2(tmp_path: Path, fedlora: Callable[..., Any]) -> None:
    made(tmp_path / "ledger", release())
    path = read_ledgers(tmp_path / "ledger")[0].path
    path.write_bytes(b"x" + path.read_bytes())
    for arguments, words in (
        (("spent", tmp_path / "nowhere"), "no privacy ledger"),
        (("spent", tmp_path), "line 1 is damaged"),
        (("new-dataset", "--ledger", tmp_path / "ledger", "--id", "x", "--reason", ""), "--reason"),
        (("new-dataset", "--ledger", tmp_path / "ledger", "--id", "sentences", "--reason", "x"), "already"),
    ):
        done = fedlora(*arguments)
        assert done.exit_code == 2
        assert words in done.stderr
        assert len(done.stderr.splitlines()) == 1
