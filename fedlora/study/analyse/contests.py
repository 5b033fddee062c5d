"""Contests: the runs that may be compared, those of one setting at one privacy, and which differ for certain.

Differences are paired over the seeds (Student's t). With one seed they are those of two shares of the test
set, taken as independent (Newcombe, Statistics in Medicine 17, 1998, method 10), which is too wide where both
saw the same. Nobody declared these comparisons, so the intervals of all pairs hold together (Bonferroni).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from fedlora.study.analyse.intervals import LEVEL, Estimate, over_seeds
from fedlora.study.analyse.summary import CONTROL, Row

WORTHWHILE = 0.02
"""A smaller gain over the control is not worth an adapter; of 1, or of `Row.scale`."""
SAME_EPSILON = 0.05
"""Relative difference up to which two epsilons count as equal."""
ROUNDING = 1e-9
NO_GAP = 1e-4
"""An aggregation gap below it is rounding."""
Gain = Literal["enough", "too little", "open"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Contest:
    """Runs under one setting at one privacy.

    Attributes:
        rows: the best first.
        family: how many pairs the study has; the intervals of all hold together.
    """

    rows: tuple[Row, ...]
    family: int

    @property
    def control(self) -> Row | None:
        """Trains the head alone; None if it was not run."""
        return next((row for row in self.rows if row.strategy == CONTROL), None)

    @property
    def tied(self) -> list[Row]:
        """The best and all that it is not told apart from."""
        return [row for row in self.rows if not self.told_apart(self.rows[0], row)]

    @property
    def undecided(self) -> bool:
        """No two runs are told apart."""
        pairs = [(a, b) for place, a in enumerate(self.rows) for b in self.rows[:place]]
        return not any(self.told_apart(*pair) for pair in pairs)

    def difference(self, row: Row, other: Row) -> Estimate:
        """Difference in score of ``row``, with the interval that holds for all pairs together."""
        return difference(row, other, self.family)

    def told_apart(self, row: Row, other: Row) -> bool:
        """Whether the interval of the difference leaves out 0."""
        low, high = _bounds(self.difference(row, other))
        return low > 0 or high < 0

    def gain(self, row: Row) -> Gain | None:
        """Whether a run is ahead of the control by `WORTHWHILE`, all of its interval; None without one."""
        if self.control is None or row is self.control:
            return None
        bounds = _bounds(self.difference(row, self.control))
        least, most = sorted(-row.metric.cost(bound) for bound in bounds)
        enough = (WORTHWHILE - ROUNDING) * row.scale
        if least >= enough:
            return "enough"
        return "too little" if most < enough else "open"


def contests(rows: Sequence[Row]) -> list[Contest]:
    """The contests of a study, those without privacy first; references take no part."""
    groups: list[list[Row]] = []
    for row in (row for row in rows if row.kind != "reference"):
        alike = next((group for group in groups if _comparable(group[0], row)), None)
        if alike is None:
            groups.append([row])
        else:
            alike.append(row)
    family = max(1, sum(math.comb(len(group), 2) for group in groups))
    groups.sort(key=lambda group: group[0].config.privacy.mode != "none")
    return [
        Contest(rows=tuple(sorted(group, key=lambda row: row.metric.cost(row.score.value))), family=family)
        for group in groups
    ]


def exact_and_behind(rows: Sequence[Row]) -> list[str]:
    """The runs whose aggregation loses nothing and that are told apart from a better one all the same."""
    return [
        row.name
        for contest in contests(rows)
        for row in contest.rows
        if row.gap is not None and row.gap < NO_GAP and row not in contest.tied
    ]


def difference(row: Row, other: Row, family: int = 1) -> Estimate:
    """Difference in score of ``row``: over the seeds that both have, else of the two scores.

    Args:
        row: a run.
        other: another.
        family: the intervals of so many differences hold together at 95 %.
    """
    mine, theirs = row.score_by_seed, other.score_by_seed
    paired = [mine[seed] - theirs[seed] for seed in mine if seed in theirs]
    level = 1 - LEVEL / family
    if len(paired) > 1:
        return over_seeds(paired, *row.metric.difference_bounds, level=level)
    p, q = next(
        ((mine[seed], theirs[seed]) for seed in mine if seed in theirs),
        (row.score.value, other.score.value),
    )
    (p_low, p_high), (q_low, q_high) = (
        _bounds(one.of_one(score, level)) for one, score in ((row, p), (other, q))
    )
    if math.isinf(q_high - q_low) or math.isinf(p_high - p_low):
        return Estimate(value=p - q)
    return Estimate(
        value=p - q,
        low=p - q - math.hypot(p - p_low, q_high - q),
        high=p - q + math.hypot(p_high - p, q - q_low),
    )


CLAIM = ("target_delta", "neighboring_relation", "unit_column")
"""Keys of ``privacy`` without which an epsilon says nothing."""


def _comparable(row: Row, other: Row) -> bool:
    mine, theirs = row.config.privacy, other.config.privacy
    if row.setting != other.setting or mine.mode != theirs.mode:
        return False
    if mine.mode == "none":
        return True
    if row.epsilon is None or other.epsilon is None:
        return False
    if any(getattr(mine, key) != getattr(theirs, key) for key in CLAIM):
        return False
    return math.isclose(row.epsilon, other.epsilon, rel_tol=SAME_EPSILON)


def _bounds(estimate: Estimate) -> tuple[float, float]:
    """Bounds of an estimate; anything is possible where it has none."""
    if estimate.low is None or estimate.high is None:
        return -math.inf, math.inf
    return estimate.low, estimate.high
