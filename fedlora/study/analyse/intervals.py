"""Intervals of scores, at 95 %.

One seed: the interval is Wilson's, for the share of the test examples that are right, or of other metrics by
their standard error over the test examples; it knows nothing of other seeds. Several seeds: mean and
Student's t interval over the seeds.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

from scipy.stats import binomtest, norm, t

from fedlora.tasks.metrics import ACCURACY, Metric

LEVEL = 0.05
"""Of all tests; intervals hold at 1 - LEVEL."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """A number with its 95 % interval; without bounds if there is nothing to estimate them from."""

    value: float
    low: float | None = None
    high: float | None = None


def of_examples(accuracy: float, examples: int, level: float = 1 - LEVEL) -> Estimate:
    """A share of test examples with its Wilson interval."""
    bounds = binomtest(round(accuracy * examples), examples).proportion_ci(level, method="wilson")
    return Estimate(value=accuracy, low=float(bounds.low), high=float(bounds.high))


def of_one(
    metric: Metric, score: float, units: int, error: float | None, level: float = 1 - LEVEL
) -> Estimate:
    """A score of one seed with its interval.

    Args:
        metric: of the score.
        score: its value.
        units: of the test set, of which an accuracy is a share.
        error: the standard error of another metric; without one there is no interval.
        level: of the interval.
    """
    if metric is ACCURACY:
        return of_examples(score, units, level)
    if error is None:
        return Estimate(value=score)
    low, high = metric.bounds
    half = float(norm.ppf((1 + level) / 2)) * error
    return Estimate(value=score, low=max(low, score - half), high=min(high, score + half))


def over_seeds(
    values: Sequence[float], low: float = 0.0, high: float = 1.0, *, level: float = 1 - LEVEL
) -> Estimate:
    """The mean with its t interval, cut to what is possible; at least two values."""
    mean, count = fmean(values), len(values)
    half = float(t.ppf((1 + level) / 2, count - 1)) * stdev(values) / math.sqrt(count)
    return Estimate(value=mean, low=max(low, mean - half), high=min(high, mean + half))
