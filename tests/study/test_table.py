"""The table of a study: means and intervals as the report has them, in the forms that people paste."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from rich.console import Console

from fedlora.cli.runs import methods_table
from fedlora.errors import ConfigError
from fedlora.study.analyse.intervals import of_examples, over_seeds
from fedlora.study.analyse.summary import summarise
from fedlora.study.analyse.table import StudyTable
from fedlora.study.report.tables import write_tables
from tests.study.made_up import result


def run(method: str, seed: int, accuracy: float, **more: Any) -> dict[str, Any]:
    return {
        "method": method, "setting": "", "kind": "strategy", "seed": seed, "accuracy": accuracy,
        "examples": 200, "bytes_up": 1_000_000, "bytes_down": 2_000_000, "epsilon": None, **more,
    }  # fmt: skip


def table(directory: Path, *runs: dict[str, Any]) -> StudyTable:
    pq.write_table(pa.Table.from_pylist(list(runs)), directory / "results.parquet")
    return StudyTable.read(directory)


def test_means_and_intervals_are_those_of_the_report(tmp_path: Path) -> None:
    values = [0.70, 0.74, 0.72]
    found = table(tmp_path, *(run("flora", seed, a) for seed, a in enumerate(values)), run("fedavg", 0, 0.65))
    flora, fedavg = found.rows
    assert (flora.seeds, fedavg.seeds) == (3, 1)
    assert flora.score == over_seeds(values)
    assert fedavg.score == of_examples(0.65, 200)
    assert (flora.megabytes_up, flora.megabytes_down, flora.epsilon) == (1.0, 2.0, None)


def test_a_language_models_interval_is_over_tokens_and_a_reference_sends_nothing(tmp_path: Path) -> None:
    tokens = {"tokens": 20_000, "perplexity": 9.0}
    runs = [
        result("flora", accuracy=0.4, outcome=tokens),
        result("centralised", "reference", accuracy=0.5, outcome=tokens),
    ]
    write_tables(tmp_path, runs, ())
    flora, centralised = StudyTable.read(tmp_path).rows
    told, reference = summarise(runs)
    assert (flora.score, centralised.score) == (told.score, reference.score)
    assert flora.megabytes_up == (told.bytes_up or 0) / 1e6
    assert (
        (centralised.megabytes_up, centralised.megabytes_down) == (None, None) == (reference.bytes_up, None)
    )


def test_clients_of_one_seed_count_once(tmp_path: Path) -> None:
    clients = [run("local-only", seed, accuracy) for seed in (1, 2) for accuracy in (0.5, 0.7 + seed / 10)]
    (row,) = table(tmp_path, *clients).rows
    assert row.seeds == 2
    wanted = over_seeds([(0.5 + 0.8) / 2, (0.5 + 0.9) / 2])
    assert row.score.value == pytest.approx(wanted.value)
    assert (row.score.low, row.score.high) == pytest.approx((wanted.low, wanted.high))


def test_markdown_and_latex_say_the_same(tmp_path: Path) -> None:
    found = table(tmp_path, run("a_b", 0, 0.5), run("fedavg", 0, 0.625, setting="eps-1", epsilon=0.997))
    markdown = [line.strip("| ").split(" | ") for line in found.markdown().splitlines()]
    assert markdown[0] == [
        "method",
        "setting",
        "seeds",
        "accuracy (%)",
        "95 % interval",
        "MB up",
        "MB down",
        "epsilon",
    ]
    assert markdown[2][:4] == ["a_b", "-", "1", "50.0"]
    assert markdown[3][:4] + markdown[3][-1:] == ["fedavg", "eps-1", "1", "62.5", "1.00"]
    latex = found.latex()
    assert latex.startswith("\\begin{tabular}{lrrrrrrr}\n\\toprule\n")
    assert r"a\_b & -- & 1 & 50.0" in latex
    assert r"accuracy (\%)" in latex
    assert str(found) == found.markdown()


def test_a_data_frame_keeps_shares(tmp_path: Path) -> None:
    frame = table(tmp_path, run("fedavg", 0, 0.625)).frame()
    assert list(frame["accuracy"]) == [0.625]
    assert list(frame["seeds"]) == [1]


def test_a_study_without_results_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no results yet"):
        StudyTable.read(tmp_path)


def test_compare_ends_with_the_methods_the_most_accurate_first(tmp_path: Path) -> None:
    found = table(tmp_path, run("worse", 0, 0.5), run("better[1]", 0, 0.75))
    screen = io.StringIO()
    Console(file=screen, width=120).print(methods_table(found))
    lines = screen.getvalue().splitlines()
    assert [line.split()[0] for line in lines] == ["method", "better[1]", "worse"]
    assert "75.0" in lines[1]
