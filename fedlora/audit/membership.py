"""Membership inference on real examples: does a low loss give away that an example was trained on?

The attack of Yeom et al., CSF 2018, measured as Carlini et al., "Membership Inference Attacks From First
Principles", S&P 2022, demand: by the true positives at few false positives. Members are the training examples
and non-members the test examples: where the two differ otherwise, that is measured too.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.stats import norm, rankdata

from fedlora.audit.bounds import clopper_pearson

Values = np.ndarray[Any, np.dtype[np.floating[Any]]]

FALSE_POSITIVE_RATES = (0.01, 0.001)
FEWEST = 5
"""False positives that a rate must stand for to be resolved: with fewer it is not known to a factor of 3."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """A number and its 95 % interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, slots=True, kw_only=True)
class TruePositives:
    """The share of members that is found where at most a given share of non-members is accused.

    Attributes:
        false_positive_rate: the given share.
        non_members_needed: how many resolve it.
        rate: what was measured; None where there are too few non-members.
    """

    false_positive_rate: float
    non_members_needed: int
    rate: Measured | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Membership:
    """The attack's outcome.

    Attributes:
        members, non_members: how many there were.
        auc: probability that a member scores above a non-member; 0.5 is a coin.
        true_positives: one for each of `FALSE_POSITIVE_RATES`.
    """

    members: int
    non_members: int
    auc: Measured
    true_positives: tuple[TruePositives, ...]


def membership(members: Values, non_members: Values) -> Membership:
    """The outcome for the scores of both; high says member."""
    return Membership(
        members=len(members),
        non_members=len(non_members),
        auc=auc(members, non_members),
        true_positives=tuple(true_positives(members, non_members, rate) for rate in FALSE_POSITIVE_RATES),
    )


def auc(inside: Values, outside: Values, confidence: float = 0.95) -> Measured:
    """The area under the ROC curve, ties counting one half, with the interval of DeLong et al., 1988.

    The placements of each score among the other group's give the variance; two of each group at least.
    """
    m, n = len(inside), len(outside)
    ranks = rankdata(np.concatenate([inside, outside]))
    of_inside = (ranks[:m] - rankdata(inside)) / n
    of_outside = 1 - (ranks[m:] - rankdata(outside)) / m
    value = float(of_inside.mean())
    variance = of_inside.var(ddof=1) / m + of_outside.var(ddof=1) / n
    width = float(norm.ppf((1 + confidence) / 2) * np.sqrt(variance))
    return Measured(value=value, low=max(0.0, value - width), high=min(1.0, value + width))


def true_positives(inside: Values, outside: Values, false_positive_rate: float) -> TruePositives:
    """At the lowest threshold that at most ``false_positive_rate`` of the non-members exceed.

    The Clopper-Pearson interval is over the members, the threshold taken as given. It is not resolved unless
    the rate stands for `FEWEST` non-members.
    """
    needed = math.ceil(FEWEST / false_positive_rate)
    rate = None
    if len(outside) >= needed:
        allowed = math.floor(false_positive_rate * len(outside) + 1e-9)
        threshold = np.sort(outside)[::-1][allowed]
        hits = int((inside > threshold).sum())
        low, high = clopper_pearson(hits, len(inside))
        rate = Measured(value=hits / len(inside), low=low, high=high)
    return TruePositives(false_positive_rate=false_positive_rate, non_members_needed=needed, rate=rate)
