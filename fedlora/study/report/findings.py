"""The answer of a study in sentences: what is best, what is not worth its cost, what privacy costs."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from fedlora.study.analyse.summary import (
    CONTROL,
    SAME_EPSILON,
    WORTHWHILE,
    Row,
    beats,
    difference,
    resolution,
    told_apart,
)
from fedlora.study.report.format import SPACE, interval, listed, percent, points, signed, significant

THRESHOLD = f"{100 * WORTHWHILE:g} points"


@dataclass(frozen=True, slots=True, kw_only=True)
class Findings:
    """Sentences for the first screen.

    Attributes:
        headline: the best strategy without privacy and its accuracy.
        verdict: whether it beats the control.
        rivals: the strategies that this study cannot tell from the best; empty if there are none.
        failing: one sentence for each run that does not beat the control or the majority.
        scale: what the references reach; empty without references.
        private: one sentence for each private run, or for each budget where several runs share one.
        caveats: what the numbers cannot carry.
    """

    headline: Markup
    verdict: Markup
    rivals: Markup
    failing: tuple[Markup, ...]
    scale: Markup
    private: tuple[Markup, ...]
    caveats: tuple[Markup, ...]


@dataclass(frozen=True, slots=True)
class Contest:
    """The strategies without privacy under one setting; only they are compared with each other.

    Attributes:
        candidates: all but the control.
        control: trains the head alone; None if it was not run.
        best: the most accurate candidate; None if there is none.
    """

    candidates: tuple[Row, ...]
    control: Row | None
    best: Row | None


def find(rows: Sequence[Row]) -> Findings:
    """The findings of a study."""
    contests = _contests(rows)
    several = len(contests) > 1
    controls = {row.name: contest.control for contest in contests for row in contest.candidates}
    candidates = [row for contest in contests for row in contest.candidates]
    best = next((contest.best for contest in contests if contest.best is not None), rows[0])
    return Findings(
        headline=_joined(_headline(contest.best) for contest in contests),
        verdict=_joined(_verdict(contest, by_name=several) for contest in contests),
        rivals=_joined(_rivals(contest) for contest in contests),
        failing=tuple(s for row in rows if (s := _shortfall(row, controls.get(row.name)))),
        scale=_scale(rows),
        private=_privately(rows),
        caveats=tuple(_caveats(rows, candidates, best)),
    )


def _contests(rows: Sequence[Row]) -> list[Contest]:
    """One for each setting that has strategies without privacy; an empty one where there is none."""
    settings: dict[str, list[Row]] = {}
    for row in rows:
        if row.kind == "strategy" and not row.private:
            settings.setdefault(row.setting, []).append(row)
    return [_contest(found) for found in settings.values()] or [_contest([])]


def _contest(rows: Sequence[Row]) -> Contest:
    control = next((row for row in rows if row.strategy == CONTROL), None)
    candidates = tuple(row for row in rows if row is not control)
    return Contest(candidates, control, max(candidates, key=lambda r: r.accuracy.value, default=None))


def _joined(sentences: Iterable[Markup]) -> Markup:
    """One after the other; what is said of several settings in the same words is said once."""
    return Markup(" ").join(dict.fromkeys(filter(None, sentences)))


def _name(row: Row) -> Markup:
    return Markup("<strong>{}</strong>").format(row.name)


def _headline(best: Row | None) -> Markup:
    if best is None:
        return Markup("No LoRA strategy was run without differential privacy.")
    over = f", mean of {len(best.seeds)} seeds" if len(best.seeds) > 1 else ""
    return Markup(
        "{} is the most accurate strategy without differential privacy: "
        "{} of {} test {}s{} (95% interval {}){}."
    ).format(
        _name(best), percent(best.accuracy.value), f"{best.units:,}", best.unit, over,
        interval(best.accuracy),
        _perplexity(best),
    )  # fmt: skip


def _perplexity(row: Row) -> str:
    if row.perplexity is None:
        return ""
    before = (row.results[0].result.get("before") or {}).get("perplexity")
    said = f", perplexity {row.perplexity:.2f}"
    return said if before is None else f"{said}, before training {before:.2f}"


def _verdict(contest: Contest, *, by_name: bool) -> Markup:
    best, control = contest.best, contest.control
    if best is None:
        return Markup("")
    if control is None and best.unit == "token":
        return Markup("")
    if control is None:
        text = "{} was not run, so this study cannot tell what the adapters add to a trained head."
        return Markup(text).format(CONTROL)
    does = "beats {} ({}), which trains the head alone, by at least {}: {}."
    does_not = "does not beat {} ({}), which trains the head alone, by {}: {}."
    subject = _name(best) if by_name else Markup("It")
    said = Markup(does if beats(best, control) else does_not)
    gain = _gain(best, control)
    return subject + " " + said.format(control.name, percent(control.accuracy.value), THRESHOLD, gain)


def _rivals(contest: Contest) -> Markup:
    best = contest.best
    if best is None:
        return Markup("")
    close = [row for row in contest.candidates if row is not best and not told_apart(best, row)]
    names = listed([f"{row.name} ({percent(row.accuracy.value)})" for row in close])
    if not close:
        return Markup("")
    return Markup("This study does not tell {} apart from {}.").format(best.name, names)


def _gain(row: Row, control: Row) -> str:
    """The difference in words, with its interval over paired seeds where there is one."""
    found = difference(row, control)
    text = f"{signed(found.value)}{SPACE}points"
    if found.low is None or found.high is None:
        return text
    return f"{text} (95% interval {signed(found.low)} to {signed(found.high)}, paired over the seeds)"


def _shortfall(row: Row, control: Row | None) -> Markup | None:
    """What a run fails to beat; None if it beats what needs no training, and the control if there is one."""
    name, reference = row.reference
    reasons = []
    if row.accuracy.value <= reference:
        between = "of " if row.unit == "example" else "at "
        reasons.append(f"does not get past {name} {between}{percent(reference)}")
    if control is not None and not beats(row, control):
        value = percent(control.accuracy.value)
        reasons.append(f"does not beat {control.name} ({value}) by {THRESHOLD}: {_gain(row, control)}")
    if not reasons:
        return None
    return Markup("{} ({}) {}.").format(_name(row), percent(row.accuracy.value), " and ".join(reasons))


def _scale(rows: Sequence[Row]) -> Markup:
    words = {
        "local-only": "a client on its own reaches {} on average",
        "centralised": "one client with everybody\N{RIGHT SINGLE QUOTATION MARK}s data reaches {}",
    }
    parts = [
        words[r.method].format(percent(r.accuracy.value)) + (f" ({r.setting})" if r.setting else "")
        for r in rows
        if r.kind == "reference"
    ]
    return Markup("For scale: {}.").format(listed(parts)) if parts else Markup("")


# --- privacy -----------------------------------------------------------------------------------------


def _privately(rows: Sequence[Row]) -> tuple[Markup, ...]:
    private = [row for row in rows if row.private]
    budgets: dict[tuple[float, str], list[Row]] = {}
    for row in private:
        budgets.setdefault((row.config.privacy.target_epsilon, row.setting), []).append(row)
    calibrated = not any(row.config.privacy.noise_multiplier for row in private)
    if calibrated and len(budgets) > 1 and all(len(found) > 1 for found in budgets.values()):
        return tuple(_at_budget(budget, found) for (budget, _), found in sorted(budgets.items()))
    return tuple(_private(row, rows) for row in private)


def _at_budget(budget: float, rows: Sequence[Row]) -> Markup:
    """The most accurate adapter at one budget, beside the head alone."""
    control = next((r for r in rows if r.strategy == CONTROL), None)
    best = max((r for r in rows if r is not control), key=lambda r: r.accuracy.value)
    text = Markup("At epsilon {:g}, delta {}: {} is the most accurate adapter, {} ({}).").format(
        budget, significant(best.config.privacy.target_delta), _name(best),
        percent(best.accuracy.value), interval(best.accuracy),
    )  # fmt: skip
    if control is None:
        return text + Markup(" No private {} was run beside it.").format(CONTROL)
    return text + Markup(" Private {}: {}; the difference is {}.").format(
        CONTROL, percent(control.accuracy.value), _gain(best, control)
    )


def _private(row: Row, rows: Sequence[Row]) -> Markup:
    spent = "an unknown epsilon" if row.epsilon is None else f"epsilon {row.epsilon:.2f}"
    text = Markup("{}: {} ({}) at {}, delta {}.").format(
        _name(row), percent(row.accuracy.value), interval(row.accuracy), spent,
        significant(row.config.privacy.target_delta),
    )  # fmt: skip
    if row.strategy == CONTROL:
        return text
    alike = (r for r in rows if r.strategy == CONTROL and r.setting == row.setting)
    control = next((r for r in alike if _same_privacy(r, row)), None)
    if control is None:
        missing = " No private {} has the same epsilon, so the adapters cannot be judged."
        return text + Markup(missing).format(CONTROL)
    found = difference(row, control).value
    side = "above" if found > 0 else "below"
    return text + Markup(" Private {} at the same epsilon: {}; this run is {} {} it.").format(
        CONTROL, percent(control.accuracy.value), points(found), side
    )


def _same_privacy(row: Row, other: Row) -> bool:
    if row.epsilon is None or other.epsilon is None:
        return False
    ours, theirs = (
        (r.config.privacy.target_delta, r.config.privacy.neighboring_relation) for r in (row, other)
    )
    return ours == theirs and math.isclose(row.epsilon, other.epsilon, rel_tol=SAME_EPSILON)


# --- caveats -----------------------------------------------------------------------------------------


def _caveats(rows: Sequence[Row], candidates: Sequence[Row], best: Row) -> list[Markup]:
    seeds = len(best.seeds)
    caveats: list[str] = []
    if seeds == 1:
        least = math.ceil(1000 * resolution(best)) / 10
        caveats.append(
            f"One seed: differences under {least:.1f} points mean nothing. That much comes from the size "
            "of the test set alone; how far another seed would move a run is not known."
        )
    else:
        caveats.append(
            f"{seeds} seeds: accuracies are means with 95% Student t intervals over the seeds, which share "
            "the test set."
        )
    if len(candidates) > 1:
        caveats.append(
            f"The best of {len(candidates)} strategies was picked on the test set it is reported on, "
            "which flatters it a little."
        )
    if any(r.kind == "variant" for r in rows):
        caveats.append("Variants may change more than the strategy; their own keys are listed below.")
    return [Markup(text) for text in caveats]
