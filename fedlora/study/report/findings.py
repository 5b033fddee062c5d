"""The answer of a study in a few sentences: what is told apart, what is worth its cost, what to doubt."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from fedlora.study.analyse.comparisons import Comparison, undecidable
from fedlora.study.analyse.contests import WORTHWHILE, Contest, contests
from fedlora.study.analyse.summary import CONTROL, Row
from fedlora.study.report.format import DASH, interval, listed, shown, signed, significant, size
from fedlora.tasks.metrics import ACCURACY, Metric

MOST_NAMED = 4
"""Names in one sentence; more are counted."""
GAINS = {"enough": "at least {} for", "open": "open for", "too little": "less than {} for"}
"""What an adapter adds to the control."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Findings:
    """Sentences for the first screen.

    Attributes:
        headline: the most accurate run, or that there is none.
        lines: what holds in each contest.
        caveats: what the numbers cannot carry.
    """

    headline: str
    lines: tuple[str, ...]
    caveats: tuple[str, ...]


def find(rows: Sequence[Row], looks: Sequence[int] = ()) -> Findings:
    """The findings of a study that was looked at before with so many seeds."""
    found = contests(rows)
    leaders = [_leader(contest) for contest in found]
    if len(found) > 1:
        leaders = [f"{_title(c)}: {leader}" for c, leader in zip(found, leaders, strict=True)]
    if len([c for c in found if c.rows[0].config.privacy.mode == "none"]) > 1:
        told = sum(len(contest.tied) == 1 < len(contest.rows) for contest in found)
        leaders.insert(
            0, f"A run is told apart as the {_superlative(rows)} in {told} of {len(found)} settings."
        )
    headline, *lines = leaders or ["Only references were run."]
    return Findings(
        headline=headline,
        lines=(*lines, *(_gains(c, len(found) > 1) for c in found if c.control), *_below(rows)),
        caveats=tuple(_caveats(rows, found, looks)),
    )


def _leader(contest: Contest) -> str:
    """Headline: the most accurate, if anybody is told apart."""
    first, tied, others = contest.rows[0], contest.tied, len(contest.rows) - len(contest.tied)
    metric, bounds = first.metric, interval(first.score, first.metric)
    score = f"{shown(first.score.value, metric)} {'of' if metric is ACCURACY else 'on'} {first.units:,} "
    score += f"test {first.unit}s{f', 95% interval {bounds}' if bounds else ''}"
    if len(contest.rows) == 1:
        return f"{first.name}: {'' if metric is ACCURACY else f'{metric.title} '}{score}."
    if len(tied) == 1:
        return f"{first.name} {metric.won}: {score}."
    if contest.undecided:
        return f"Nothing is told apart: {_named(tied)}."
    behind = f"; {others} {'is' if others == 1 else 'are'} behind" if others else ""
    return f"No run {metric.won} for certain: {_named(tied)} are not told apart{behind}."


def _gains(contest: Contest, several: bool) -> str:
    """The adapters by what they add to a head alone."""
    assert contest.control
    groups = {
        word: [row for row in contest.rows if contest.gain(row) == gain] for gain, word in GAINS.items()
    }
    worth = worthwhile(contest.control)
    said = [f"{word.format(worth)} {_named(group)}" for word, group in groups.items() if group]
    if not said:
        return ""
    beside = "against" if contest.control.metric.lower else "over"
    where = f"{_title(contest)}, {beside}" if several else beside.capitalize()
    return f"{where} {_named([contest.control])}, the head alone: {'; '.join(said)}."


def _below(rows: Sequence[Row]) -> list[str]:
    """The runs that training has brought nothing."""
    below: dict[tuple[str, float], list[Row]] = {}
    for row in rows:
        if row.metric.cost(row.score.value) >= row.metric.cost(row.reference[1]):
            below.setdefault(row.reference, []).append(row)
    return [
        f"Not past {name} ({shown(value, group[0].metric)}): {_named(group)}."
        for (name, value), group in below.items()
    ]


def worthwhile(row: Row) -> str:
    """What an adapter is to add: points, or less of an error."""
    points = f"{100 * WORTHWHILE:g} points"
    if not row.metric.lower:
        return points if row.metric.share else f"{WORTHWHILE:g}"
    return f"{size(WORTHWHILE * row.scale, row.metric)} less"


def _superlative(rows: Sequence[Row]) -> str:
    return rows[0].metric.won.removeprefix("is the ").removeprefix("has the ")


def _title(contest: Contest) -> str:
    """The setting and the privacy that the runs of a contest share."""
    row = contest.rows[0]
    if row.config.privacy.mode == "none":
        return row.setting or "Without privacy"
    spent = "an unknown epsilon" if row.epsilon is None else f"epsilon {row.epsilon:.2f}"
    claim = row.config.privacy
    privacy = f"{claim.granularity}-level {spent}, delta {significant(claim.target_delta)}"
    return f"{row.setting}, {privacy}" if row.setting else privacy.capitalize()


def _named(rows: Sequence[Row]) -> str:
    names = [f"{row.name} ({shown(row.score.value, row.metric)})" for row in rows[:MOST_NAMED]]
    more = len(rows) - MOST_NAMED
    return listed([*names, *([f"{more} more"] if more > 0 else [])])


def _caveats(rows: Sequence[Row], found: Sequence[Contest], looks: Sequence[int]) -> list[str]:
    seeds = sorted({len(row.seeds) for row in rows})
    metric = rows[0].metric
    caveats = [
        "One seed: intervals are those of the test set; how far another seed would move a run is unknown."
    ]
    if seeds != [1]:
        number = " or ".join(map(str, seeds))
        caveats = [f"{number} seeds: means with 95% Student t intervals over the seeds, on one test set."]
    if metric is not ACCURACY:
        caveats.append(_judged(rows[0]))
    if looks:
        before = listed([*map(str, looks)])
        caveats.append(
            f"Looked at before its last seed, with {before}: intervals and p-values do not know it."
        )
    if any(len(contest.rows) > 1 for contest in found):
        pairs = found[0].family
        together = f"; those of all {pairs} pairs hold together (Bonferroni)" if pairs > 1 else ""
        apart = "Two runs are told apart where the interval of their difference leaves out 0"
        caveats.append(f"{apart}{together}, on this test set.")
    if found and not any(contest.control for contest in found) and rows[0].unit == "example":
        caveats.append(
            f"{CONTROL} was not run, so this study cannot tell what the adapters add to a trained head."
        )
    hidden = list(dict.fromkeys(row.config.privacy.granularity for row in rows if row.private))
    if hidden:
        caveats.append(
            f"Epsilons are {listed([f'{what}-level' for what in hidden])}, per client: what a client sends "
            f"hides whether any single one of its {listed([f'{what}s' for what in hidden])} was used, not "
            "that the client took part."
        )
    if any(row.kind == "variant" for row in rows):
        caveats.append("Variants may change more than the strategy; their own keys are listed below.")
    return caveats


def _judged(row: Row) -> str:
    """By what runs are judged that is no accuracy, and how its intervals are made."""
    metric = row.metric
    said = f"Runs are judged by {metric.title}, of which {'less' if metric.lower else 'more'} is better"
    if metric.spread:
        said += f"; a point is a hundredth of the spread of the test targets, {shown(row.scale, metric)}"
    if row.score.low is None:
        return f"{said}. With one seed it has no interval here, so that nothing is told apart."
    made = " With one seed its interval is that of other test examples, by resampling them."
    return f"{said}.{made if len(row.seeds) == 1 else ''}"


# --- declared comparisons ----------------------------------------------------------------------------


def claims_header(metric: Metric) -> tuple[str, ...]:
    """Headings of `claim`."""
    difference = "Difference in points" if metric is ACCURACY else f"Difference in {metric.title}"
    return (
        "Claim", "Seeds", difference, "Ahead on", "Exact p", "Holm p", "Alike, Holm p", "Could detect",
        "Verdict",
    )  # fmt: skip


def claim(comparison: Comparison) -> tuple[str, ...]:
    """The values under `claims_header`."""
    found, seeds, metric = comparison, len(comparison.differences), comparison.metric
    bounds = interval(found.mean, metric, difference=True)
    return (
        name_of(found),
        str(seeds),
        signed(found.mean.value, metric) + (f" ({bounds})" if bounds else ""),
        f"{found.wins} of {seeds}",
        _probability(found.p_value),
        _probability(found.p_holm),
        _probability(found.p_alike_holm),
        "nothing" if found.detectable is None else size(found.detectable, metric),
        found.verdict,
    )


def claims(comparisons: Sequence[Comparison]) -> str:
    """Sentences on the declared comparisons; empty if there are none."""
    if not comparisons:
        return ""
    hopeless = undecidable(min(len(c.differences) for c in comparisons), len(comparisons))
    decided = [c for c in comparisons if c.verdict != "undecided"]
    counts = Counter(c.verdict for c in decided)
    said = f"Declared comparisons: {len(comparisons)}, decided: {len(decided) or 'none'}"
    if hopeless and not decided:
        return f"{said}; {hopeless}."
    if len(decided) > MOST_NAMED:
        return f"{said} ({listed([f'{n} {verdict}' for verdict, n in counts.items()])})."
    named = [f"{name_of(c)}: {c.verdict}, {_in_words(c)}" for c in decided]
    own = [name_of(c) for c in comparisons if c.by_client]
    how = f" {listed(own)}: client by client, on each one's own test examples." if own else ""
    return f"{said}{' (' + '; '.join(named) + ')' if named else ''}.{how}"


def _in_words(comparison: Comparison) -> str:
    metric, difference = comparison.metric, signed(comparison.mean.value, comparison.metric)
    if metric is ACCURACY:
        return f"{difference} points"
    return f"{metric.title} {difference}{' points' if metric.share else ''}"


def name_of(comparison: Comparison) -> str:
    """The two methods, and the setting where there are several."""
    where = f" ({comparison.setting})" if comparison.setting else ""
    return f"{comparison.method} against {comparison.baseline}{where}"


def _probability(p_value: float | None) -> str:
    if p_value is None:
        return DASH
    return "< 0.001" if p_value < 0.001 else f"{p_value:.3f}"
