"""``make bench-gpu`` with tiny models on the CPU: it measures and survives, whatever a device is."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from experiments.benchmarks import gpu
from experiments.benchmarks.gpu_ways import ALONE, WAYS


def run(monkeypatch: pytest.MonkeyPatch, out: Path, *flags: str) -> list[dict[str, Any]]:
    tiny = ["--models", "tiny-bert,tiny-llama", "--cohorts", "1,2", "--batch-size", "2", "--tokens", "4"]
    where = ["--turns", "1", "--device", "cpu", "--precisions", "float32", "--out", str(out)]
    monkeypatch.setattr(sys, "argv", ["gpu", *tiny, *where, *flags])
    gpu.main()
    rows: list[dict[str, Any]] = json.loads(out.with_suffix(".json").read_text())["rows"]
    return rows


@pytest.fixture(autouse=True)
def one_second_each(monkeypatch: pytest.MonkeyPatch) -> None:
    """Work takes as many seconds as it has steps, on however busy a machine."""
    seconds = iter(range(1, 10_000))
    monkeypatch.setattr(gpu, "timed", lambda work, device: (work(), float(next(seconds)))[1])


def test_all_ways_are_measured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    rows = run(monkeypatch, tmp_path / "made" / "gpu")
    assert len(rows) == 2 * len(WAYS) + 2 * (len(WAYS) - len(ALONE))
    assert [row["why"] for row in rows] == [""] * len(rows)
    for row in rows:  # the second training takes a second longer, and two steps more
        assert row["tokens_per_second"] == pytest.approx(row["cohort"] * 2 * 4 * 2)
        assert row["of_frozen"] == pytest.approx(1.0)
    table = (tmp_path / "made" / "gpu.md").read_text()
    assert table.count("| tiny-llama |") == len(rows) // 2


def test_what_does_not_fit_is_a_line_and_the_rest_goes_on(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def full(*_: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setitem(WAYS, "bare loop", full)
    rows = run(monkeypatch, tmp_path / "gpu", "--cohorts", "1", "--models", "tiny-bert")
    assert [row["why"] for row in rows] == ["", "out of memory", "", "", "", ""]


def test_nothing_is_begun_when_the_seconds_are_used_up(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    rows = run(monkeypatch, tmp_path / "gpu", "--seconds", "1e-9")
    assert {row["why"] for row in rows} == {"left out: the 1e-09 seconds are used up"}


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        (["--models", "minilm,none"], "--models none: accepted are tiny-bert"),
        (["--precisions", "int8"], "--precisions int8: accepted are float32, bfloat16"),
        (["--cohorts", "4,0"], "--cohorts 0: must be sizes >= 1"),
        (["--tokens", "1"], "--tokens >= 2"),
        (["--device", "tpu"], "engine.device = 'tpu': not available here"),
    ],
)
def test_bad_flags_are_one_line(
    flags: list[str], line: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Any
) -> None:
    with pytest.raises(SystemExit):
        run(monkeypatch, tmp_path / "gpu", *flags)
    assert line in capsys.readouterr().err.splitlines()[-1]
