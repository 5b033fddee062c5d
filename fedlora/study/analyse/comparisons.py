"""Claims of one method against another, seed by seed, and whether this study carries them.

Both methods of a pair ran with the same seeds, so their differences are paired: a 95 % interval by Student's
t, and an exact test that flips the sign of each difference in every way (Fisher, "The Design of Experiments",
1935, section 21). The p-values of all pairs that the study file declares, under all its settings, are
one family and are corrected together (Holm, Scandinavian Journal of Statistics 6, 1979).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from statistics import fmean, stdev
from typing import Literal

import numpy as np
from scipy.stats import permutation_test, t

from fedlora.config import name_list
from fedlora.errors import ConfigError
from fedlora.study.analyse.summary import Estimate, Row, over_seeds

LEVEL = 0.05
ENOUGH_SEEDS = 10
"""A claim wants at least so many paired seeds; with 5 the exact test cannot go below 0.06."""
ALIKE = 0.01
"""Two methods are alike where the whole interval of their difference lies within one point."""
POWER = 0.8
EXACT_UP_TO = 2**17
"""Sign patterns that are all tried; beyond that so many random ones."""

Verdict = Literal["better", "worse", "alike", "undecided"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """One method against another under one setting.

    Attributes:
        method, baseline, setting: their names.
        differences: method minus baseline in accuracy, one for each seed that both have.
        mean: of the differences, with its 95 % interval over seeds.
        p_value: of the exact sign-flip test, two-sided; None for fewer than two seeds.
        p_holm: the same, corrected over the family.
        detectable: the smallest true difference that so many seeds would find in four of five studies.
    """

    method: str
    baseline: str
    setting: str
    differences: tuple[float, ...]
    mean: Estimate
    p_value: float | None
    p_holm: float | None
    detectable: float | None

    @property
    def wins(self) -> int:
        """Seeds on which the method is ahead."""
        return sum(d > 0 for d in self.differences)

    @property
    def verdict(self) -> Verdict:
        """What may be said."""
        low, high = self.mean.low, self.mean.high
        if len(self.differences) < ENOUGH_SEEDS or low is None or high is None or self.p_holm is None:
            return "undecided"
        if self.p_holm < LEVEL:
            return "better" if self.mean.value > 0 else "worse"
        return "alike" if low > -ALIKE and high < ALIKE else "undecided"


def compare(rows: Sequence[Row], pairs: str, absent: Iterable[str] = ()) -> list[Comparison]:
    """The comparisons that a study declares, where both methods have results of the same seeds.

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


def sign_flip(differences: Sequence[float]) -> float:
    """Two-sided p-value: how often random signs give a mean at least as far from 0.

    >>> sign_flip([0.01, 0.02, 0.03])
    0.25
    """
    test = permutation_test(
        (np.asarray(differences),), np.mean, permutation_type="samples", vectorized=True,
        n_resamples=EXACT_UP_TO, rng=np.random.default_rng(0),
    )  # fmt: skip
    return float(test.pvalue)


def holm(family: Sequence[Comparison]) -> list[Comparison]:
    """The same comparisons with corrected p-values."""
    tested = sorted((c.p_value, place) for place, c in enumerate(family) if c.p_value is not None)
    corrected, least = list(family), 0.0
    for rank, (p_value, place) in enumerate(tested):
        least = max(least, min(1.0, (len(tested) - rank) * p_value))
        corrected[place] = replace(family[place], p_holm=least)
    return corrected


def _row(rows: Iterable[Row], method: str, setting: str) -> Row | None:
    return next((r for r in rows if (r.method, r.setting) == (method, setting)), None)


def _compared(mine: Row, theirs: Row) -> Comparison:
    ours, others = mine.accuracy_by_seed, theirs.accuracy_by_seed
    differences = tuple(ours[seed] - others[seed] for seed in ours if seed in others)
    several = len(differences) > 1
    return Comparison(
        method=mine.method,
        baseline=theirs.method,
        setting=mine.setting,
        differences=differences,
        mean=over_seeds(differences, low=-1.0)
        if several
        else Estimate(value=fmean(differences or (math.nan,))),
        p_value=sign_flip(differences) if several else None,
        p_holm=None,
        detectable=_detectable(differences) if several else None,
    )


def _detectable(differences: Sequence[float]) -> float:
    """(t_{1 - level/2} + t_{power}) standard errors, each of n - 1 degrees of freedom."""
    n = len(differences)
    quantiles = t.ppf(1 - LEVEL / 2, n - 1) + t.ppf(POWER, n - 1)
    return float(quantiles) * stdev(differences) / math.sqrt(n)
