from __future__ import annotations

import os
import sys
from pathlib import Path

import psutil
import pytest

from experiments.benchmarks import engine_cell
from experiments.benchmarks.engine_cell import Watched, record_of, watch

PROGRAM = """
import subprocess, sys, time
out = sys.argv[1]
left = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], start_new_session=True)
open(f"{out}/left", "w").write(str(left.pid))
for number in range(3):
    time.sleep(0.2)
    with open(f"{out}/rounds.jsonl", "a") as file:
        file.write("{}\\n")
print("done")
"""


def test_rounds_are_seen_as_they_end_and_nothing_is_left_running(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_cell, "CHILDREN_SECONDS", 0.05)
    out = tmp_path / "run"
    out.mkdir()
    seen = watch([sys.executable, "-c", PROGRAM, str(out)], dict(os.environ), out)
    assert len(seen.rounds) == 3
    assert 0.2 <= seen.rounds[0] < seen.rounds[1] < seen.rounds[2] <= seen.whole
    assert (tmp_path / "run.log").read_text() == "done\n"
    assert not psutil.pid_exists(int((out / "left").read_text()))


def test_a_steady_round_is_neither_the_first_nor_the_last() -> None:
    record = record_of(Watched([50.0, 53.0, 57.0, 60.0, 90.0], 95.0, 7))
    assert record["first_round_seconds"] == 50.0
    assert record["round_seconds"] == [3.0, 4.0, 3.0, 30.0]
    assert record["steady_seconds"] == 3.0
    assert record["whole_seconds"] == 95.0
    assert record_of(Watched([5.0, 7.0], 8.0, 7))["steady_seconds"] == 2.0
