from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from experiments.benchmarks.engine_cells import COHORT, LOOP, ONE, REFERENCE, STOCK, Regime
from experiments.benchmarks.engine_chart import draw
from experiments.benchmarks.engine_figures import STEADY, WHOLE, Figures, Target, targets
from experiments.benchmarks.engine_table import table


def run(way: str, steady: float, turn: int = 1, *, regime: Regime = REFERENCE, **more: Any) -> dict[str, Any]:
    return {
        "regime": dataclasses.asdict(regime),
        "way": way,
        "turn": turn,
        "rounds": 10,
        "cohort_size": 4,
        "first_round_seconds": 11.0,
        "round_seconds": [steady] * 9,
        "steady_seconds": steady,
        "whole_seconds": 10 * steady,
        "peak_memory_bytes": 1_500_000_000,
        "adapter": "abc",
        "logits": [[0.0, 1.0]],
        "hardware": {"cpu": "A CPU", "cores": 2, "python": "3.11", "torch": "2.13"},
        "conditions": {"packages": {"torch": "2.13"}, "device": "cpu", "actors": 2},
    } | more


def test_ratios_are_taken_turn_by_turn() -> None:
    """The machine was four times slower in turn 2, for both; in turn 3 only for one of them."""
    stock = [run(STOCK, steady, turn) for steady, turn in ((6, 1), (24, 2), (100, 3))]
    ours = [run(COHORT, steady, turn) for steady, turn in ((10, 3), (12, 2), (3, 1))]
    figures = Figures([*stock, *ours])
    assert figures.ratio(STEADY, (REFERENCE, STOCK), (REFERENCE, COHORT)) == 2.0


def test_whole_runs_of_different_length_are_not_compared() -> None:
    figures = Figures([run(STOCK, 6, rounds=10), run(COHORT, 3, rounds=2)])
    assert figures.ratio(WHOLE, (REFERENCE, STOCK), (REFERENCE, COHORT)) is None
    assert figures.ratio(STEADY, (REFERENCE, STOCK), (REFERENCE, COHORT)) == 2.0


@pytest.mark.parametrize(
    ("value", "least", "verdict"),
    [
        (1.8, True, "yes"),
        (1.79, True, "no"),
        (1.8, False, "yes"),
        (1.81, False, "no"),
        (None, True, "not measured"),
    ],
)
def test_a_target_is_reached_or_not_or_not_measured(value: float | None, least: bool, verdict: str) -> None:
    assert Target(text="", value=value, bound=1.8, least=least).verdict == verdict


def test_targets_without_runs_are_not_measured() -> None:
    assert {target.verdict for target in targets(Figures([]))} == {"not measured"}


def test_the_table_says_how_far_an_adapter_is_from_the_loops() -> None:
    other = {"adapter": "def", "logits": [[0.0, 1.002]]}
    text = table(Figures([run(LOOP, 6), run(ONE, 4), run(COHORT, 3, **other)]))
    assert _row(text, "one by one")[-1] == "="
    assert _row(text, "cohorts of 4")[-1] == "2.0e-03"
    assert "| logits, cohorts and the loop | <= 0.001 | 0.002 | no |" in text


def test_the_table_counts_clients_a_minute() -> None:
    text = table(Figures([run(COHORT, 2), run(COHORT, 4, 2)]))
    assert _row(text, "cohorts of 4")[2:4] == ["10", "3.00 (2.00 to 4.00)"]
    assert _row(text, "cohorts of 4")[6] == "320"


def test_the_chart_names_the_machine_and_the_ways() -> None:
    drawn = draw(Figures([run(STOCK, 6), run(COHORT, 3)]))
    assert "A CPU, 2 cores" in drawn
    assert "stock Flower app" in drawn
    assert "fedlora, cohorts" in drawn


def test_nothing_measured_is_no_error() -> None:
    assert "Nothing measured" in table(Figures([]))
    assert draw(Figures([])).rstrip().endswith("</svg>")


def _row(text: str, way: str) -> list[str]:
    line = next(line for line in text.splitlines() if line.startswith("| ") and f"fedlora, {way} |" in line)
    return [cell.strip() for cell in line.strip("|").split("|")]
