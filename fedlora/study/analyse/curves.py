"""The series behind the charts: one value a round, averaged over the seeds of a row."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import accumulate
from statistics import fmean
from typing import Any

from fedlora.study.analyse.results import CellResult
from fedlora.study.analyse.summary import Row, is_number

LOWEST_GAP = 1e-9
"""Where a gap of (almost) nothing is drawn on a logarithmic axis."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Curve:
    """One series, a point for each round; ``y`` is the mean over seeds, ``low`` and ``high`` the extremes."""

    row: Row
    rounds: list[int]
    x: list[float]
    y: list[float]
    low: list[float]
    high: list[float]


def per_round(row: Row, key: str) -> Curve | None:
    """A recorded value over the rounds in which every seed has it; None if there are none."""
    return _curve(row, lambda result: [record.get(key) for record in result.rounds])


def sent(row: Row) -> Curve | None:
    """Bytes up and down since the first round, in units of 1,000,000."""
    return _curve(row, lambda result: [b / 1e6 for b in accumulate(map(_bytes, result.rounds))])


def simulated(row: Row) -> Curve | None:
    """Simulated hours since the start; None where time was not simulated."""
    return _curve(row, lambda result: [_hours(record) for record in result.rounds])


def score_over(row: Row, progress: Curve | None) -> Curve | None:
    """The score over another series of the row, `sent` or `simulated`; None where either is missing."""
    score = per_round(row, row.metric.name)
    if score is None or progress is None:
        return None
    at = dict(zip(progress.rounds, progress.y, strict=True))
    return replace(score, x=[at[number] for number in score.rounds])


def gap(row: Row) -> Curve | None:
    """The aggregation gap a round, nothing below `LOWEST_GAP`."""
    curve = per_round(row, "gap")
    if curve is None:
        return None
    y, low, high = ([max(LOWEST_GAP, v) for v in values] for values in (curve.y, curve.low, curve.high))
    return replace(curve, y=y, low=low, high=high)


def _curve(row: Row, values_of: Callable[[CellResult], list[Any]]) -> Curve | None:
    runs = [
        {r["round"]: v for r, v in zip(result.rounds, values_of(result), strict=True) if is_number(v)}
        for result in row.results
    ]
    shared = sorted(set.intersection(*(set(run) for run in runs)))
    if not shared:
        return None
    columns = [[run[number] for run in runs] for number in shared]
    return Curve(
        row=row,
        rounds=shared,
        x=[float(number) for number in shared],
        y=[fmean(c) for c in columns],
        low=[min(c) for c in columns],
        high=[max(c) for c in columns],
    )


def _hours(record: dict[str, Any]) -> float | None:
    seconds = record.get("virtual_seconds")
    return None if seconds is None else float(seconds) / 3600


def _bytes(record: dict[str, Any]) -> int:
    return int(record["bytes_up"] + record["bytes_down"])
