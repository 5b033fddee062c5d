"""``fedlora federation``: what it prints, and requests that are refused in one line with exit code 2."""

from __future__ import annotations

import json
import os
from pathlib import Path

import psutil
import pytest
from typer.testing import CliRunner

from fedlora.cli import cli
from fedlora.deployment.operator.create import create
from fedlora.deployment.operator.layout import open_layout
from fedlora.deployment.operator.running import control_port, is_ready, supervisor

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _no_cache(cache: Path) -> None:
    """All of it in the tests' own cache."""


def run(*arguments: object) -> tuple[int, str]:
    result = CliRunner().invoke(cli, ["federation", *map(str, arguments)])
    return result.exit_code, " ".join(result.output.split())


def test_init_says_what_goes_where(tmp_path: Path) -> None:
    code, said = run("init", tmp_path / "new", "--nodes", 2, "--host", "fl.example.org")
    assert code == 0
    assert "2 nodes, server fl.example.org:8000" in said


@pytest.mark.parametrize("command", ["up", "down", "status", "register"])
def test_what_is_no_federation_is_refused(command: str, tmp_path: Path) -> None:
    code, said = run(command, tmp_path)
    assert code == 2
    assert said.startswith(f"error: {tmp_path}: no federation there")


def test_a_run_on_what_is_no_federation_is_refused(tmp_path: Path) -> None:
    config = str(ROOT / "experiments" / "tiny.toml")
    result = CliRunner().invoke(
        cli, ["run", config, "--federation", str(tmp_path), "--out", str(tmp_path / "o")]
    )
    assert result.exit_code == 2
    assert "no federation there" in result.output


def test_a_run_on_a_federation_that_is_not_up_fails_in_one_line(tmp_path: Path) -> None:
    create(tmp_path / "f", 1, port=1)
    config, out = str(ROOT / "experiments" / "tiny.toml"), str(tmp_path / "o")
    result = CliRunner().invoke(cli, ["run", config, "--federation", str(tmp_path / "f"), "--out", out])
    assert result.exit_code == 1
    lines = [line for line in result.output.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1


def test_down_without_up_is_refused(tmp_path: Path) -> None:
    create(tmp_path / "f", 1)
    code, said = run("down", tmp_path / "f")
    assert (code, said) == (2, f"error: {tmp_path / 'f'}: is not up on this machine")


def test_a_supervisor_that_died_is_not_taken_for_a_stranger_with_its_number(tmp_path: Path) -> None:
    layout = create(tmp_path / "f", 1, port=8123)
    up = {
        "pid": os.getpid(),
        "created": psutil.Process().create_time(),
        "ready": True,
        "ports": {"superlink": 9},
    }
    layout.up_file.write_text(json.dumps(up))
    assert supervisor(layout) == psutil.Process()
    assert (is_ready(layout), control_port(layout)) == (True, 9)
    layout.up_file.write_text(json.dumps({**up, "created": up["created"] - 60}))
    assert supervisor(layout) is None
    assert (is_ready(layout), control_port(layout)) == (False, 8124)


def test_check_reports_rows_columns_and_labels(tmp_path: Path) -> None:
    rows = [{"text": f"t {i}", "label": ["a", "b", "b"][i % 3], "ward": 7} for i in range(9)]
    data = tmp_path / "own.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    create(tmp_path / "f", 1, data=[str(data)])
    node = tmp_path / "f" / "nodes" / "node-0"
    code, said = run("check", node)
    assert code == 0
    assert "9 examples" in said
    assert "columns: text, label, ward" in said
    assert "labels: a (3), b (6)" in said
    (node / "node.toml").write_text((node / "node.toml").read_text().replace('"label"', '"diagnosis"'))
    code, said = run("check", node)
    assert code == 2
    assert "label-column = 'diagnosis': no such column" in said


def test_the_directory_can_be_moved(tmp_path: Path) -> None:
    create(tmp_path / "f", 1)
    (tmp_path / "f").rename(tmp_path / "g")
    assert open_layout(tmp_path / "g").server == tmp_path / "g" / "server"
