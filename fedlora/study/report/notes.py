"""What the report says about runs that are not there, and about how learning rates were found."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from fedlora.study.analyse.summary import Row
from fedlora.study.analyse.tuning import Tuned, Tuning
from fedlora.study.plan.absent import Absent
from fedlora.study.report import format

ABSENT = {"failed": "failed", "not applicable": "cannot exist (not applicable)"}
"""Why a run has no result, as a verb."""


def absence(absent: Sequence[Absent], finished: int) -> str:
    """How many runs have no result; empty if all have one."""
    counts: Counter[str] = Counter(missing.why for missing in absent)
    total = finished + len(absent)
    said = [f"{counts[why]} {verb}" for why, verb in ABSENT.items() if counts[why]]
    return f"Of {total} runs {format.listed(said)}; they are listed below." if said else ""


def absent_lines(absent: Sequence[Absent]) -> list[tuple[str, str, str]]:
    """Run, why it is not there, reason: what cannot exist once for all seeds, each failure by itself."""
    lines = [(a.group if a.why == "not applicable" else a.label, a.why, a.reason) for a in absent]
    return list(dict.fromkeys(lines))


def how_tuned(tuning: Tuning | None, rows: Sequence[Row]) -> str:
    """On what the rates were tuned, for the first screen; empty where they were given."""
    if tuning is None:
        return ""
    seeds = f"seed{'s' if len(tuning.seeds) > 1 else ''} {format.listed(list(map(str, tuning.seeds)))}"
    text = (
        f"Each learning rate was tuned on {seeds} and a validation part, "
        f"{100 * tuning.validation_fraction:g}% of the training examples, held apart from those trials; what "
        "is reported has other seeds and trains on all training examples."
    )
    return f"{text} Tuning is outside epsilon." if any(row.private for row in rows) else text


def tuned_header(tuning: Tuning | None) -> tuple[str, ...]:
    """The rates that were tried."""
    rates = sorted({rate for tuned in tuning.groups for rate in tuned.tried}) if tuning else []
    return ("Run", *(f"{rate:g}" for rate in rates), "Chosen")


def tuned_lines(tuning: Tuning | None) -> list[tuple[str, ...]]:
    """Validation accuracy of each group with each rate, and the rate that was chosen."""
    groups = tuning.groups if tuning else ()
    return [(tuned.group, *map(_tried, tuned.tried.values()), _chosen(tuned)) for tuned in groups]


def _tried(accuracy: float | None) -> str:
    return "failed" if accuracy is None else format.percent(accuracy)


def _chosen(tuned: Tuned) -> str:
    if tuned.rate is None:
        return "none"
    return f"{tuned.rate:g} (at the edge)" if tuned.at_the_edge else f"{tuned.rate:g}"
