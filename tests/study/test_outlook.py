"""``fedlora compare --dry-run``: what a study would run, without a trace on the disk."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from fedlora.cli import cli
from fedlora.server.results import read_rounds

FILE = """
num-server-rounds = 1
model.name = "tiny"
data = { name = "synthetic", evaluate-examples = 60 }
train.local-steps = 2
lora = { rank = 4, ranks = "2,4" }
engine.name = "in-process"
study = { strategies = "fedavg,flora,flexlora", seeds = "1,2" }
"""


@pytest.fixture
def file(tmp_path: Path, cache: Path) -> Path:
    (tmp_path / "study.toml").write_text(FILE)
    return tmp_path / "study.toml"


def compare(file: Path, *options: object) -> Result:
    out = file.parent / "runs" / "mine"
    return CliRunner().invoke(cli, list(map(str, ["compare", file, "--out", out, *options])))


def said(done: Result) -> tuple[dict[str, str], dict[str, list[str]]]:
    """Lines by their headings, and rows of the table by their methods."""
    assert done.exit_code == 0, done.output
    lines = done.stdout.splitlines()
    start = next(n for n, line in enumerate(lines) if line.startswith("method"))
    rows = {line.split()[0]: line.split() for line in lines[start + 1 : -2]}
    return {line[:10].strip(): line[10:] for line in (*lines[:start], *lines[-2:])}, rows


def files(root: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() if path.is_file() else b"" for path in root.rglob("*")}


def test_it_says_what_a_study_then_does_and_writes_nothing(file: Path) -> None:
    before = files(file.parent)
    lines, rows = said(compare(file, "--dry-run"))
    assert files(file.parent) == before
    assert lines["study"] == "4 runs, seeds 1, 2, judged by accuracy"
    assert lines["left out"].startswith("fedavg, 2 runs: not applicable (lora.ranks: fedavg needs equal")
    assert lines["clients"].startswith("4, 4 in a round")
    assert {name: row[1:4] for name, row in rows.items()} == {
        "flora": ["2", "2", "4"], "flexlora": ["2", "2", "4"],
    }  # fmt: skip
    assert compare(file).exit_code == 0
    for method in rows:
        (record,) = read_rounds(file.parent / "runs" / "mine" / f"{method}-seed-1")
        assert rows[method][4:6] == [f"{record[key] / 1e6:.3g}" for key in ("bytes_up", "bytes_down")]


def test_records_of_an_earlier_version_are_counted_and_not_all_named(
    file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert compare(file).exit_code == 0
    for record in (file.parent / "runs" / "mine").glob("*/provenance.json"):
        kept = json.loads(record.read_text())
        del kept["sha256"]
        record.write_text(json.dumps(kept))
    caplog.clear()
    assert compare(file, "--resume", "--dry-run").exit_code == 0
    named, others = [line for line in caplog.messages if "sha256" in line]
    assert "seed-1/provenance.json: has no sha256" in named
    assert others == "3 other records have no sha256 either"


def test_what_is_finished_taken_or_failed_is_not_run_again(file: Path) -> None:
    assert compare(file, "--set", "study.seeds=1").exit_code == 0
    home = file.parent / "runs" / "mine"
    for method in ("flora", "flexlora"):
        (home / method).rename(home / f"{method}-seed-1")
    (home / "flora-seed-2").mkdir()
    (home / "flora-seed-2" / "failed.json").write_text('{"reason": "the lights went out"}')
    before = files(file.parent)
    lines, rows = said(compare(file, "--dry-run", "--resume"))
    assert lines["finished"].startswith("2 runs in ")
    assert lines["failed"] == "flora-seed-2: the lights went out; left alone without --retry-failed"
    assert (rows["flora"][1:3], rows["flexlora"][1:3]) == (["2", "0"], ["2", "1"])
    _, again = said(compare(file, "--dry-run", "--resume", "--retry-failed"))
    assert again["flora"][1:3] == ["2", "1"]
    other = CliRunner().invoke(cli, ["compare", str(file), "--out", str(file.parent / "runs/b"), "--dry-run"])
    assert said(other)[0]["taken"].endswith("mine: same configuration, same code")
    assert files(file.parent) == before


def test_epsilon_is_planned_and_trials_are_counted(file: Path) -> None:
    keys = {
        "lora.ranks": "", "privacy.mode": "example", "privacy.target-epsilon": 4, "study.tune-seeds": 9,
        "study.strategies": "ffa", "study.tune-learning-rates": "0.01,0.1", "data.validation-fraction": 0.1,
    }  # fmt: skip
    options = [word for key, value in keys.items() for word in ("--set", f"{key}={value}")]
    lines, rows = said(compare(file, "--dry-run", *options))
    assert lines["tuning"] == "2 trials first, for learning rates"
    assert [row[6] for row in rows.values()] == ["4"] * 3
    assert sum(int(row[2]) for row in rows.values()) == 4


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--set", "study.strategies=fedvag"], "did you mean fedavg?"),
        (["--share", "nowhere"], "--share nowhere: is no directory of a study"),
        (["--parallel", 999], "--parallel 999: each cell needs an actor of its own"),
        (["--set", "study.comparisons=flora:fedsa"], "fedsa"),
        ([], "is not empty (use --resume to go on, or another directory)"),
    ],
)
def test_it_refuses_what_the_study_would_refuse(options: list[object], words: str, file: Path) -> None:
    if not options:
        (file.parent / "runs" / "mine").mkdir(parents=True)
        (file.parent / "runs" / "mine" / "notes.txt").write_text("mine")
    before = files(file.parent)
    done = compare(file, "--dry-run", *options)
    assert (done.exit_code, len(done.stderr.strip().splitlines())) == (2, 1), done.output
    assert words in done.stderr
    assert files(file.parent) == before
