"""Accuracy against the privacy budget, one series for each method that was run at several budgets."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from fedlora.study.analyse.summary import Row
from fedlora.study.report.figure import Canvas, Chart, Numbers, Style
from fedlora.study.report.format import DASH, interval, listed, percent, significant

SPREAD = 0.5
"""The share of the room between two budgets in which the methods stand side by side."""

Frontier = dict[float, Row]
"""One method: budget (epsilon, infinite without privacy) -> its runs."""


def draw_privacy_utility(rows: Sequence[Row], styles: Mapping[str, Style]) -> Chart | None:
    """The chart, where some method has runs at two budgets or more."""
    frontiers = {m: f for m, f in _frontiers(rows).items() if len(f) > 1}
    if not frontiers:
        return None
    budgets = sorted({budget for frontier in frontiers.values() for budget in frontier})
    canvas = Canvas()
    for number, (method, frontier) in enumerate(frontiers.items()):
        offset = SPREAD * ((number + 0.5) / len(frontiers) - 0.5)
        _draw(
            canvas, method, frontier, [budgets.index(budget) + offset for budget in sorted(frontier)], styles
        )
    canvas.axes.set_xticks(range(len(budgets)), [_named(budget) for budget in budgets])
    canvas.axes.set_xlabel("epsilon of the whole run, for every example of every client")
    canvas.percent_axis("y")
    return Chart(
        name="privacy-utility",
        title="What privacy costs",
        note=f"Final accuracy on the whole test set at each budget, {_delta(frontiers)}. "
        "Bars are 95% intervals.",
        svg=canvas.finish("privacy-utility", "Accuracy over the privacy budget, one series for each method"),
        numbers=_numbers(frontiers, budgets),
    )


def _frontiers(rows: Sequence[Row]) -> dict[str, Frontier]:
    """Per method, its rows by budget; runs whose noise was given by hand have no budget."""
    found: dict[str, Frontier] = {}
    for row in rows:
        privacy = row.config.privacy
        if row.kind == "reference" or privacy.client_level or privacy.noise_multiplier:
            continue
        budget = privacy.target_epsilon if row.private else math.inf
        found.setdefault(row.method, {}).setdefault(budget, row)
    return found


def _draw(
    canvas: Canvas, method: str, frontier: Frontier, places: Sequence[float], styles: Mapping[str, Style]
) -> None:
    """The method's line, and each run's point with its interval under the run's own button."""
    runs = [frontier[budget] for budget in sorted(frontier)]
    canvas.link(places, [row.accuracy.value for row in runs], styles[runs[-1].name])
    for place, budget, row in zip(places, sorted(frontier), runs, strict=True):
        note = f"{method}, epsilon {_named(budget)}: {_shown(row)}"
        canvas.interval(place, row.accuracy, styles[row.name], note)


def _numbers(frontiers: Mapping[str, Frontier], budgets: Sequence[float]) -> Numbers:
    body = [
        (method, *(_shown(frontier[b]) if b in frontier else DASH for b in budgets))
        for method, frontier in frontiers.items()
    ]
    return Numbers(("method", *(f"epsilon {_named(budget)}" for budget in budgets)), tuple(body))


def _shown(row: Row) -> str:
    bounds = interval(row.accuracy)
    return f"{percent(row.accuracy.value)} ({bounds})" if bounds else percent(row.accuracy.value)


def _named(budget: float) -> str:
    return "\N{INFINITY}" if math.isinf(budget) else f"{budget:g}"


def _delta(frontiers: Mapping[str, Frontier]) -> str:
    deltas = {r.config.privacy.target_delta for f in frontiers.values() for r in f.values() if r.private}
    return f"delta {listed([significant(delta) for delta in sorted(deltas)])}"
