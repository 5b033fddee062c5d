"""Exact sign-flip test (Fisher, "The Design of Experiments", 1935, section 21), and what it can find.

Under the null hypothesis each paired difference is as likely to have the other sign.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from itertools import product

import numpy as np
from numpy.typing import NDArray

EXACT_UP_TO = 17
"""Differences whose sign patterns are all tried; beyond, `RANDOM` drawn ones and the observed one."""
RANDOM = 2**16
TOLERANCE = 1e-9
"""Means that are closer are equal: accuracies are counts over a test set, rounded when divided."""
POWER = 0.8
DRAWS = 2000


def sign_flip(differences: Sequence[float]) -> float:
    """Two-sided p-value: how often random signs give a mean at least as far from 0.

    >>> sign_flip([0.01, 0.02, 0.03])
    0.25
    """
    found = np.asarray(differences, dtype=np.float64)
    signs = _signs(len(found), EXACT_UP_TO, RANDOM)
    return float((abs(signs @ found) >= abs(found.sum()) - TOLERANCE * len(found)).mean())


def least_p(count: int) -> float:
    """The smallest p-value that so many differences can have."""
    return 2.0 ** (1 - count)


@lru_cache
def detectable(count: int, level: float) -> float | None:
    """The true mean difference, in standard deviations, that is found in four of five studies.

    By simulation of `DRAWS` studies with normal differences.

    Args:
        count: paired differences, >= 2.
        level: a p-value up to it is a find; None where none can be so small.
    """
    if least_p(count) > level:
        return None
    signs = _signs(count, 12, 4096)
    noise = np.random.default_rng(0).normal(size=(DRAWS, count))
    flipped, sums = noise @ signs.T, signs.sum(axis=1)

    def power(mean: float) -> float:
        observed = abs(noise.sum(axis=1) + count * mean)[:, None]
        return float(((abs(flipped + mean * sums) >= observed - TOLERANCE).mean(axis=1) <= level).mean())

    low, high = 0.0, 16.0
    while high - low > 0.005:
        middle = (low + high) / 2
        low, high = (low, middle) if power(middle) >= POWER else (middle, high)
    return high


@lru_cache
def _signs(count: int, exact_up_to: int, drawn: int) -> NDArray[np.float64]:
    """Sign patterns, patterns x differences, the observed one first; of two opposite ones only one."""
    if count <= exact_up_to:
        return np.array([(1, *rest) for rest in product((1, -1), repeat=count - 1)], dtype=np.float64)
    random = np.random.default_rng(0).choice((1.0, -1.0), size=(drawn, count))
    return np.vstack([np.ones(count), random])
