"""How far canaries that are in stand from those that are out, against what the claimed mechanism does.

Under plain SGD a canary's score is a sum over T steps: 1 for each draw that it was in, by rate q, and noise
of deviation z, all in units of the clipped length. The means of both kinds then lie, in standard deviations,

    d = T q g / sqrt(T z^2 + T q (1 - q) g^2 / 2)

apart (g: the length that clipping leaves of a canary, 1 where it clips flat), which is a test of Gaussian
differential privacy with mu = d (Dong, Roth, Su, JRSS-B 2022). Unlike a bound on epsilon that holds for any
mechanism, it is two-sided: a mechanism that lets canaries out too little is not the claimed one either.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from scipy.optimize import brentq
from scipy.stats import norm

from fedlora.audit.attack import Coins, Scores

POWER = 0.95
"""Probability with which half the noise must be found for an audit to say anything."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Expected:
    """A canary by the claim.

    Attributes:
        steps: T, of all rounds; at client level the rounds in which a canary shows, of `WithCanaries.power`.
        sample_rate: q.
        noise_multiplier: z.
        gain: g.
    """

    steps: float
    sample_rate: float
    noise_multiplier: float
    gain: float = 1.0

    @property
    def noise(self) -> float:
        """Standard deviation of the score of a canary that is out."""
        return self.noise_multiplier * math.sqrt(self.steps)

    @property
    def separation(self) -> float:
        """D."""
        q, g, t = self.sample_rate, self.gain, self.steps
        spread = math.sqrt(self.noise**2 + t * q * (1 - q) * g**2 / 2)
        return t * q * g / spread if spread else math.inf


@dataclass(frozen=True, slots=True, kw_only=True)
class Separation:
    """What was found.

    Attributes:
        value: d, measured.
        low, high: its interval.
        theory: d of the claimed mechanism.
        resolved: the interval is narrow enough to find half the noise with `POWER`.
        epsilon: of the lower end, at the claim's delta; what the claim itself would give is ``claimed``.
        claimed: epsilon of the theory, of a canary alone: below the ledger's, which counts the worst case.
    """

    value: float
    low: float
    high: float
    theory: float
    resolved: bool
    epsilon: float
    claimed: float

    @property
    def flaw(self) -> str:
        """What does not fit, in words; empty if the theory lies within the interval."""
        if self.low <= self.theory <= self.high:
            return ""
        side = "farther" if self.low > self.theory else "less far"
        return (
            f"canaries that are in lie {self.value:.2f} ({self.low:.2f} to {self.high:.2f}) standard "
            f"deviations from those that are out, {side} than the claimed mechanism puts them, "
            f"{self.theory:.2f}"
        )


def separation(
    scores: Scores, included: Coins, theory: float, delta: float, false_alarm: float
) -> Separation:
    """Measure d with its interval (Hedges and Olkin, 1985).

    Args:
        scores: one for each canary, in units of its noise by the claim.
        included: the coins.
        theory: d by the claim.
        delta: of the claim.
        false_alarm: probability with which a right mechanism lies outside of the interval.
    """
    inside, outside = scores[included], scores[~included]
    m, n = len(inside), len(outside)
    if min(m, n) < 2:
        return Separation(
            value=math.nan, low=-math.inf, high=math.inf, theory=theory, resolved=False, epsilon=0.0,
            claimed=gaussian_epsilon(theory, delta),
        )  # fmt: skip
    spread = math.sqrt(((m - 1) * inside.var(ddof=1) + (n - 1) * outside.var(ddof=1)) / (m + n - 2))
    value = float((inside.mean() - outside.mean()) / max(spread, TINY))
    width = float(norm.isf(false_alarm / 2)) * _error(value, m, n)
    by_theory = (float(norm.isf(false_alarm / 2)) + float(norm.ppf(POWER))) * _error(2 * theory, m, n)
    return Separation(
        value=value,
        low=value - width,
        high=value + width,
        theory=theory,
        resolved=theory >= by_theory,
        epsilon=gaussian_epsilon(value - width, delta),
        claimed=gaussian_epsilon(theory, delta),
    )


TINY = 1e-9
LARGEST = 50.0
"""Epsilons beyond are not told apart."""


def _error(d: float, m: int, n: int) -> float:
    return math.sqrt(1 / m + 1 / n + d**2 / (2 * (m + n)))


def gaussian_epsilon(mu: float, delta: float) -> float:
    """The epsilon of mu-Gaussian differential privacy (Dong, Roth, Su, Corollary 2.13); 0 for mu <= 0.

    >>> round(gaussian_epsilon(1.0, 1e-5), 2)
    4.38
    """
    if mu <= 0:
        return 0.0

    def excess(epsilon: float) -> float:
        above = norm.logcdf(-epsilon / mu - mu / 2) + epsilon
        return float(norm.cdf(-epsilon / mu + mu / 2) - np.exp(above)) - delta

    if excess(0.0) <= 0:
        return 0.0
    return LARGEST if excess(LARGEST) > 0 else float(brentq(excess, 0.0, LARGEST, xtol=1e-6))
