"""From right guesses to a lower bound on epsilon: one-run auditing.

Steinke, Nasr, Jagielski, "Privacy Auditing with One (1) Training Run", NeurIPS 2023 (arXiv 2305.08846),
Theorem 5.2 and Appendix D. Each of m canaries is in the data by a fair coin of its own; an attacker guesses
r of the coins and v guesses are right. Under (epsilon, delta)-DP, add or remove one,

    P[right >= v] <= P[X >= v] + 2 m delta max_i P[v > X >= v - i] / i,   X ~ Binomial(r, e^eps / (1 + e^eps))

An epsilon for which this is at most 1 - confidence is refuted, and every smaller one with it.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from scipy.special import bdtrc, expit
from scipy.stats import beta, binom

LARGEST = 50.0
"""Bounds beyond are not told apart."""
TOLERANCE = 1e-5


def p_value(canaries: int, guesses: int, right: int, epsilon: float, delta: float) -> float:
    """The most likely that so many right guesses can be under (epsilon, delta)-DP.

    >>> p_value(10, 4, 4, 0.0, 0.0)
    0.0625
    """
    if not 0 <= right <= guesses <= canaries:
        raise ValueError(f"need 0 <= right <= guesses <= canaries, not {right}, {guesses}, {canaries}")
    q = expit(epsilon)
    p = float(bdtrc(right - 1, guesses, q)) if right > 0 else 1.0
    if delta > 0 and right > 0:
        within = np.cumsum(
            binom.pmf(np.arange(right - 1, -1, -1), guesses, q)
        )  # P[right > X >= right - i], i = 1, 2, ..
        p += 2 * canaries * delta * float((within / np.arange(1, right + 1)).max())
    return min(p, 1.0)


@lru_cache(maxsize=4096)
def epsilon_bound(canaries: int, guesses: int, right: int, delta: float, confidence: float) -> float:
    """The largest epsilon that the guesses refute; 0 if they refute none.

    Args:
        canaries: m, those that were abstained from included.
        guesses: r, fixed before the coins were looked at.
        right: v.
        delta: of the claim.
        confidence: probability with which the bound holds, in (0, 1).
    """

    def refuted(epsilon: float) -> bool:
        return p_value(canaries, guesses, right, epsilon, delta) <= 1 - confidence

    if not refuted(0.0):
        return 0.0
    low, high = 0.0, 1.0
    while high < LARGEST and refuted(high):
        low, high = high, 2 * high
    while high - low > TOLERANCE:
        middle = (low + high) / 2
        low, high = (middle, high) if refuted(middle) else (low, middle)
    return low


def largest_bound(canaries: int, guesses: int, delta: float, confidence: float) -> float:
    """What is shown when every guess is right.

    >>> largest_bound(100, 100, 0.0, 0.95) < largest_bound(1000, 1000, 0.0, 0.95)
    True
    """
    return epsilon_bound(canaries, guesses, guesses, delta, confidence)


def shared_confidence(confidence: float, statements: int) -> float:
    """The confidence that each of so many statements needs for all to hold together (Bonferroni)."""
    return 1 - (1 - confidence) / statements


def clopper_pearson(hits: int, trials: int, confidence: float = 0.95) -> tuple[float, float]:
    """The exact two-sided interval of a probability (Clopper and Pearson, 1934).

    >>> [round(end, 3) for end in clopper_pearson(0, 10)]
    [0.0, 0.308]
    """
    if not 0 <= hits <= trials or trials < 1:
        raise ValueError(f"need 0 <= hits <= trials and a trial, not {hits} of {trials}")
    tail = (1 - confidence) / 2
    low = 0.0 if hits == 0 else float(beta.ppf(tail, hits, trials - hits + 1))
    high = 1.0 if hits == trials else float(beta.isf(tail, hits + 1, trials - hits))
    return low, high
