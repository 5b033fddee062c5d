"""Claims of one method against another, seed by seed, and whether this study carries them.

Both methods of a pair ran with the same seeds, so their differences are paired: a 95 % interval by Student's
t, the exact sign-flip test that they differ, and two one-sided t tests that they are alike (Schuirmann,
Journal of Pharmacokinetics and Biopharmaceutics 15, 1987). Both questions of all pairs that the study file
declares, under all its settings, are one family, corrected together (Holm, Scandinavian Journal of Statistics
6, 1979).
Where clients keep models of their own, a run's accuracy is that of the clients who measured it, on their own
test examples. Such a method is held against another client by client, each on the same examples: over the
clients that both have, each counting as one (`fedlora.study.analyse.gains`). Where no test examples are a
client's own, all clients measured on all of them, and scores are held against scores.
No pair differs both by nothing and by a point, so that one of its two null hypotheses at most is true: a step
counts pairs, not hypotheses (Shaffer, Journal of the American Statistical Association 81, 1986).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from statistics import fmean, stdev
from typing import Literal

from scipy.stats import t

from fedlora.config import name_list
from fedlora.errors import ConfigError
from fedlora.study.analyse.gains import by_clients, keeps_models, own_models
from fedlora.study.analyse.intervals import LEVEL, Estimate, over_seeds
from fedlora.study.analyse.sign_flip import detectable, least_p, sign_flip
from fedlora.study.analyse.summary import Row
from fedlora.tasks.metrics import ACCURACY, Metric

ENOUGH_SEEDS = 10
"""A claim wants at least so many paired seeds; with 5 the exact test cannot go below 0.06."""
ALIKE = 0.01
"""Two methods are alike where their true difference is certain to lie within one point, of 1 or of the spread
of the test targets (`fedlora.tasks.metrics.Metric.scale`)."""

Verdict = Literal["better", "worse", "alike", "undecided"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """One method against another under one setting.

    Attributes:
        method, baseline, setting: their names.
        differences: method minus baseline in score, one for each seed that both have.
        metric: of the scores.
        by_client: whether the scores are means over the clients that both have, see above.
        scale: what `ALIKE` is a share of.
        mean: of the differences, with its 95 % interval over seeds.
        p_value: of the exact sign-flip test, two-sided; None for fewer than two seeds.
        p_alike: of two one-sided t tests against a difference of `ALIKE` or more; None as before.
        p_holm: ``p_value`` corrected over the family.
        p_alike_holm: ``p_alike`` corrected over the family.
        detectable: the smallest true difference that so many seeds are sure to find in four of five studies,
            whatever the other comparisons come to; None where no difference would do.
    """

    method: str
    baseline: str
    setting: str
    differences: tuple[float, ...]
    mean: Estimate
    p_value: float | None = None
    p_alike: float | None = None
    p_holm: float | None = None
    p_alike_holm: float | None = None
    detectable: float | None = None
    metric: Metric = ACCURACY
    by_client: bool = False
    scale: float = 1.0

    @property
    def wins(self) -> int:
        """Seeds on which the method is ahead."""
        return sum(self.metric.cost(d) < 0 for d in self.differences)

    @property
    def verdict(self) -> Verdict:
        """Claim of a comparison."""
        if len(self.differences) < ENOUGH_SEEDS or self.p_holm is None or self.p_alike_holm is None:
            return "undecided"
        if self.p_holm <= LEVEL:
            return "better" if self.metric.cost(self.mean.value) < 0 else "worse"
        return "alike" if self.p_alike_holm <= LEVEL else "undecided"


def compare(rows: Sequence[Row], pairs: str, absent: Iterable[str] = ()) -> list[Comparison]:
    """The comparisons that a study declares, where both methods have results of the same seeds and clients.

    On test examples of their own clients' models have accuracies alone: by another metric they are compared
    with nothing.

    Args:
        rows: all runs.
        pairs: ``study.comparisons``, ``METHOD:BASELINE, ..``; ``*`` is every other strategy and variant.
        absent: methods of the study that may have no row.

    Raises:
        ConfigError: a name that the study does not have.
    """
    federated = [row for row in rows if row.kind != "reference"]
    settings = dict.fromkeys(row.setting for row in federated)
    asked = declared(pairs, dict.fromkeys([*(row.method for row in federated), *absent]))
    found = [
        _compared(mine, theirs)
        for setting in settings
        for method, baseline in asked
        if (mine := _row(rows, method, setting)) and (theirs := _row(rows, baseline, setting))
    ]
    return holm([comparison for comparison in found if comparison.differences])


def declared(pairs: str, methods: Iterable[str]) -> list[tuple[str, str]]:
    """The pairs of ``study.comparisons``, without repetitions.

    Raises:
        ConfigError: an entry that is no pair of known names.

    >>> declared("*:ffa, fedsvd:flora", ["flora", "ffa", "fedsvd"])
    [('flora', 'ffa'), ('fedsvd', 'ffa'), ('fedsvd', 'flora')]
    """
    known, found = list(methods), []
    for entry in name_list(pairs):
        method, _, baseline = (part.strip() for part in entry.partition(":"))
        names = [name for name in known if name != baseline] if method == "*" else [method]
        for name in (*names, baseline):
            if name not in known:
                raise ConfigError(
                    f"study.comparisons = {entry!r}: must be METHOD:BASELINE out of {', '.join(known)}"
                )
        found += [(name, baseline) for name in names]
    return list(dict.fromkeys(found))


def holm(family: Sequence[Comparison]) -> list[Comparison]:
    """The same comparisons with corrected p-values, and what they could have found."""
    tested = sorted(
        (p_value, place, key)
        for place, found in enumerate(family)
        for key, p_value in (("p_holm", found.p_value), ("p_alike_holm", found.p_alike))
        if p_value is not None
    )
    size = len({place for _, place, _ in tested})
    corrected, least, seen, settled = list(family), 0.0, set[int](), 0
    for p_value, place, key in tested:
        least = max(least, min(1.0, (size - settled) * p_value))
        corrected[place] = replace(corrected[place], **{key: least})  # type: ignore[arg-type]
        settled += place in seen
        seen.add(place)
    return [replace(found, detectable=_detectable(found.differences, size)) for found in corrected]


def undecidable(seeds: int, family: int) -> str:
    """Reason that so many seeds decide none of so many comparisons; empty where they can."""
    if not family:
        return ""
    if seeds < ENOUGH_SEEDS:
        return f"a claim wants {ENOUGH_SEEDS} seeds, there are {seeds}"
    most = int(LEVEL / least_p(seeds))
    if family <= most:
        return ""
    return (
        f"{seeds} seeds can call none of {family} comparisons better or worse, whatever comes out; it takes "
        f"{most} at most, or {math.ceil(1 - math.log2(LEVEL / family))} seeds"
    )


def _row(rows: Iterable[Row], method: str, setting: str) -> Row | None:
    return next((r for r in rows if (r.method, r.setting) == (method, setting)), None)


def _compared(mine: Row, theirs: Row) -> Comparison:
    kept = keeps_models(mine) or keeps_models(theirs)
    by_client = kept and all(any(own_models(row).values()) for row in (mine, theirs))
    if by_client:
        differences = by_clients(mine, theirs) if mine.metric is ACCURACY else []
    else:
        ours, others = mine.score_by_seed, theirs.score_by_seed
        differences = [ours[seed] - others[seed] for seed in ours if seed in others]
    found = paired(
        mine.method, theirs.method, differences, mine.setting, metric=mine.metric, scale=mine.scale
    )
    return replace(found, by_client=by_client)


def paired(
    method: str,
    baseline: str,
    differences: Sequence[float],
    setting: str = "",
    *,
    metric: Metric = ACCURACY,
    scale: float = 1.0,
) -> Comparison:
    """A comparison by its differences of each seed; not yet corrected for others, see `holm`."""
    found = Comparison(
        method=method,
        baseline=baseline,
        setting=setting,
        differences=tuple(differences),
        mean=Estimate(value=fmean(differences or (math.nan,))),
        metric=metric,
        scale=scale,
    )
    if len(differences) < 2:
        return found
    mean, alike = over_seeds(differences, *metric.difference_bounds), ALIKE * scale
    return replace(found, mean=mean, p_value=sign_flip(differences), p_alike=_p_alike(differences, alike))


def _p_alike(differences: Sequence[float], alike: float = ALIKE) -> float:
    """The larger p-value of the two tests that the mean lies above -``alike`` and below it."""
    mean, error = fmean(differences), stdev(differences) / math.sqrt(len(differences))
    room = alike - abs(mean)
    return float(t.sf(room / error, len(differences) - 1)) if error else float(room <= 0)


def _detectable(differences: Sequence[float], family: int) -> float | None:
    if len(differences) < ENOUGH_SEEDS:
        return None
    least = detectable(len(differences), LEVEL / family)
    return None if least is None else least * stdev(differences)
