"""What a claim means to an attacker: the true positive rate that a false positive rate can buy at most.

The attacker guesses, from all that was released, whether a certain example (or client) was in. A mechanism
that is (epsilon, delta(epsilon))-DP holds every such guess to

    TPR <= delta(epsilon) + e^epsilon FPR      and      TPR <= 1 - e^-epsilon (1 - delta(epsilon) - FPR)

(Wasserman and Zhou, JASA 2010; Dong, Roth and Su, JRSS B 2022, Proposition 2.5), and since it is that for
each epsilon >= 0 at once, to the least of all these lines: the trade-off curve f, as TPR = 1 - f(FPR).
delta(epsilon) is that of the privacy loss distribution of all steps together, an upper bound, in the worse of
the two directions for each epsilon (`fedlora.privacy.accountants.profile`); lines that are left out only
loosen the bound. The claimed (epsilon, delta) is one more line: the curve never says more than it allows.

Where noise or rate changed on the way, the steps may have been chosen by what was seen, no distribution of
their sum is known to hold (`fedlora.privacy.filter`), and the two lines of the claim are all there is.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedlora.errors import ConfigError
from fedlora.privacy.accountants import History, profile
from fedlora.privacy.calibration import MAX_NOISE, MIN_DELTA, epsilon_of

NAMED = (0.001, 0.01, 0.1)
"""False positive rates that are put into words."""
CLAIM_ALONE = "epsilon and delta alone"
LOSSES = "the privacy loss distribution"
LINES = 400
"""Epsilons at which the profile is looked at, from 0 to that of `FURTHEST`."""
FURTHEST = MIN_DELTA
MOST = 700.0
"""Larger epsilons allow for everything, and their exponentials overflow."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TradeOff:
    """Bounds on what an attacker reaches.

    Attributes:
        found_by: `LOSSES` or, looser, `CLAIM_ALONE`.
        epsilons, deltas: the claims that hold together, each two lines.
    """

    found_by: str
    epsilons: NDArray[np.float64]
    deltas: NDArray[np.float64]

    def true_positive_rate(self, false_positive_rate: float) -> float:
        """The largest share of members that is found by a test that accuses this share of all others.

        >>> round(claim_alone(math.log(3), 0.0).true_positive_rate(0.1), 9)
        0.3
        """
        few = self.deltas + np.exp(np.minimum(self.epsilons, MOST)) * false_positive_rate
        many = 1 - np.exp(-self.epsilons) * (1 - self.deltas - false_positive_rate)
        return float(min(1.0, few.min(), many.min()))

    def record(self) -> dict[str, Any]:
        """For records: the true positive rates at `NAMED`, by the false positive rates, and their origin."""
        rates = {f"{rate:g}": self.true_positive_rate(rate) for rate in NAMED}
        return {"true_positive_rate_at": rates, "found_by": self.found_by}

    def said(self, rate: float = 0.01) -> str:
        """One of them in plain words, rounded up.

        >>> claim_alone(math.log(3), 0.0).said()
        'at 1% false alarms an attacker finds at most 3.0%'
        """
        return f"at {100 * rate:g}% false alarms an attacker finds at most {self.shown(rate)}"

    def shown(self, rate: float) -> str:
        """The true positive rate in percent, rounded up."""
        return f"{percent_up(self.true_positive_rate(rate))}%"


def percent_up(share: float) -> str:
    """A bound in percent, rounded up to one decimal.

    >>> percent_up(0.2001), percent_up(0.2)
    ('20.1', '20.0')
    """
    return f"{math.ceil(round(1000 * share, 6)) / 10:.1f}"


@lru_cache(maxsize=256)
def trade_off(history: History, epsilon: float, delta: float, on_evaluations: float = 0.0) -> TradeOff:
    """The curve of a claim.

    Args:
        history: all steps that the claim is about; empty where they are not known.
        epsilon: of the claim, as an account or a ledger states it.
        delta: of the claim.
        on_evaluations: of epsilon, what is spent at delta 0 and on no step: it moves each line as a whole.
    """
    if len({(noise, rate) for noise, rate, _ in history}) != 1:
        return claim_alone(epsilon, delta)
    try:
        furthest = epsilon_of(history, FURTHEST, "pld")
    except ConfigError:  # beyond what it resolves
        return claim_alone(epsilon, delta)
    if not math.isfinite(furthest):
        return claim_alone(epsilon, delta)
    epsilons = np.linspace(0.0, furthest, LINES)
    deltas = profile(history, epsilons)
    return TradeOff(
        found_by=LOSSES,
        epsilons=np.append(epsilons + on_evaluations, epsilon),
        deltas=np.append(deltas, delta),
    )


def curve_of(claim: Mapping[str, Any]) -> TradeOff | None:
    """The curve of a recorded `fedlora.privacy.types.PrivacySpent`; None where a stranger's is not one."""
    match claim:
        case {"epsilon": int() | float() as epsilon, "delta": int() | float() as delta} if (
            epsilon >= 0 and 0 <= delta <= 1
        ):
            extra = claim.get("on_evaluations", 0.0)
            extra = (
                float(extra) if isinstance(extra, int | float) and 0 <= extra <= epsilon else float(epsilon)
            )
            return trade_off(history_of(claim), float(epsilon), float(delta), extra)
    return None


def history_of(claim: Mapping[str, Any]) -> History:
    """Its history; empty where it has none."""
    found, entries = claim.get("history"), []
    for entry in found if isinstance(found, list | tuple) else ():
        match entry:
            case [int() | float() as noise, int() | float() as rate, int(steps)] if (
                0 < noise <= MAX_NOISE and 0 < rate <= 1 and steps > 0
            ):
                entries.append((float(noise), float(rate), steps))
            case _:
                return ()
    return tuple(entries)


def claim_alone(epsilon: float, delta: float) -> TradeOff:
    """What epsilon and delta say by themselves."""
    return TradeOff(found_by=CLAIM_ALONE, epsilons=np.array([epsilon]), deltas=np.array([delta]))
