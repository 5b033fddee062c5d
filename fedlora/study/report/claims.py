"""Comparisons in words: one line each for the table, and what holds in one sentence."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from markupsafe import Markup

from fedlora.study.analyse.comparisons import ENOUGH_SEEDS, Comparison
from fedlora.study.report.format import DASH, listed, points, signed

HEADER = (
    "Claim", "Seeds", "Difference in points", "Ahead on", "Exact p", "Holm p", "Could detect", "Verdict",
)  # fmt: skip
MOST_SAID = 3
"""Claims that are spelt out in one sentence; more are counted."""
VERDICTS = {
    "better": "better",
    "worse": "worse",
    "alike": "alike within one point",
    "undecided": "undecided",
}


def line(comparison: Comparison) -> tuple[str, ...]:
    """The values under `HEADER`."""
    found, seeds = comparison, len(comparison.differences)
    difference = signed(found.mean.value)
    if found.mean.low is not None and found.mean.high is not None:
        difference += f" ({signed(found.mean.low)} to {signed(found.mean.high)})"
    return (
        name_of(found),
        str(seeds),
        difference,
        f"{found.wins} of {seeds}",
        _probability(found.p_value),
        _probability(found.p_holm),
        DASH if found.detectable is None else points(found.detectable),
        found.verdict,
    )


def sentence(comparisons: Sequence[Comparison]) -> Markup:
    """What the declared comparisons come to; empty if there are none."""
    if not comparisons:
        return Markup("")
    few = min(len(c.differences) for c in comparisons)
    if few < ENOUGH_SEEDS:
        text = f"No claim is made: {few} paired seeds, a claim wants {ENOUGH_SEEDS}."
        return Markup("Of {} declared comparisons none is decided. {}").format(len(comparisons), text)
    decided = [c for c in comparisons if c.verdict != "undecided"]
    said = [f"{name_of(c, ' is ' + VERDICTS[c.verdict] + _than(c) + ' ')}{_by(c)}" for c in decided]
    if len(said) > MOST_SAID:
        counts: Counter[str] = Counter(c.verdict for c in decided)
        said = [f"{counts[verdict]} {word}" for verdict, word in VERDICTS.items() if counts[verdict]]
    start = f"Of {len(comparisons)} declared comparisons {len(decided) or 'none'} "
    start += "is decided" if len(decided) < 2 else "are decided"
    return Markup("{}{}").format(start, f": {listed(said)}." if said else ".")


def name_of(comparison: Comparison, between: str = " against ") -> str:
    """The two methods, and the setting where there are several."""
    where = f" ({comparison.setting})" if comparison.setting else ""
    return f"{comparison.method}{between}{comparison.baseline}{where}"


def _than(comparison: Comparison) -> str:
    return " to" if comparison.verdict == "alike" else " than"


def _by(comparison: Comparison) -> str:
    return "" if comparison.verdict == "alike" else f" by {points(comparison.mean.value)}"


def _probability(p_value: float | None) -> str:
    if p_value is None:
        return DASH
    return "< 0.001" if p_value < 0.001 else f"{p_value:.3f}"
