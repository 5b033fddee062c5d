"""May one more release be made? A privacy filter over everything that was released before.

Composition theorems speak of mechanisms that are fixed beforehand. A ledger outlives runs, so the noise
and the sample rate of a later release may have been chosen after looking at earlier ones. Two cases:

* *One noise multiplier and sample rate throughout.* The budget fixes beforehand the most steps that fit,
  and all that can depend on earlier releases is when to stop, which is post-processing of those steps.
  Ordinary composition holds, by the tight accountant too (``prv``). A step of more noise or of a lower rate
  counts as one of this setting: its privacy loss is dominated by that one's, so that composition holds
  however the step was chosen (Zhu, Dong and Wang, AISTATS 2022, Theorem 10).
* *Several.* PRV accounting is not known to be a filter (exact ones are known for Gaussian noise without
  sampling: Koskela, Tobaben and Honkela, ICLR 2023), nor is the minimum over Renyi orders. At one order
  alpha that is fixed beforehand Renyi DP is: if the sum of the steps' ``rho_t(alpha)`` never exceeds B,
  the whole is ``(alpha, B)``-RDP however the steps were chosen (Feldman and Zrnic, NeurIPS 2021; for
  approximate DP Whitehouse, Ramdas, Rogers and Wu, ICML 2023). The order is the one that suits the
  ledger's first release best, settled before anything was released. What ``prv`` had decided while
  there was one setting is summed again in Renyi terms.

Each case is (epsilon, delta)-DP. Outputs may decide not only how the settings change, but *whether*: then the
two mix, and their deltas add up. So from the first change on the delta that is stated (`stated_delta`) is
the sum of both. Outputs must not decide what the target is.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

from fedlora.privacy.accountants import ORDERS, History
from fedlora.privacy.calibration import epsilon_of

TINY = 1e-300


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """What may be spent.

    Attributes:
        target_epsilon: the most that all releases together may cost, at ``target_delta``.
        target_delta: delta.
        accountant: one of `ACCOUNTANTS`, for a history of one noise and rate.
    """

    target_epsilon: float
    target_delta: float
    accountant: str


Setting = tuple[float, float]
"""Noise multiplier and sample rate."""


def dominates(charged: Setting, made: Setting) -> bool:
    """Whether a step with the setting ``charged`` costs at least what one with ``made`` costs.

    More noise is post-processing. A lower rate is a mixture of the higher one's draws with leaving the
    example out, and the hockey-stick divergence of mixtures is at most that of the worse part.

    >>> dominates((1.0, 0.1), (1.0001, 0.1)), dominates((1.0, 0.1), (1.1, 0.11))
    (True, False)
    """
    return charged[0] <= made[0] and charged[1] >= made[1]


def stated_delta(before_change: float, budget: Budget) -> float:
    """The delta that holds with the epsilon of a history.

    Args:
        before_change: the largest target delta by which releases were decided while there was one setting;
            0 as long as there is only one.
        budget: of the last release.
    """
    return before_change + budget.target_delta


Bounds = dict[tuple[float, float, Budget], tuple[int, float]]
"""Noise, rate, budget -> the most steps known to fit, the fewest known not to."""


def fits(history: History, budget: Budget, order: float, bounds: Bounds, planned_steps: int = 0) -> bool:
    """Whether a history keeps the budget.

    Where noise and rate never changed, the accountant is asked once for the planned steps; that many or
    fewer then fit without asking again.

    Args:
        history: all releases and the one in question; each pair of noise and rate once.
        budget: what may be spent.
        order: the ledger's Renyi order, see `first_order`.
        bounds: what was found before; what is found is added.
        planned_steps: steps for which the noise was calibrated.
    """
    if len(history) > 1:
        return renyi_epsilon(history, budget.target_delta, order) <= budget.target_epsilon
    noise, rate, steps = history[0]
    low, high = bounds.get((noise, rate, budget), (0, math.inf))
    for asked in (planned_steps, steps):
        if low < steps < high and low < asked < high:
            if _epsilon(noise, rate, asked, budget) <= budget.target_epsilon:
                low = asked
            else:
                high = asked
    bounds[noise, rate, budget] = (low, high)
    return steps <= low


def spent(history: History, budget: Budget, order: float) -> tuple[float, str]:
    """The epsilon of a history and the accountant that found it: the one by which `fits` decides."""
    if len(history) > 1:
        return renyi_epsilon(history, budget.target_delta, order), "rdp"
    if not history:
        return 0.0, budget.accountant
    return epsilon_of(history, budget.target_delta, budget.accountant, quick=True), budget.accountant


@lru_cache(maxsize=1024)
def first_order(noise_multiplier: float, sample_rate: float, budget: Budget) -> float:
    """The Renyi order at which the most steps of one setting fit the budget."""

    def steps(order: float) -> float:
        room = budget.target_epsilon - _conversion(order, budget.target_delta)
        return room / max(_renyi(noise_multiplier, sample_rate, order), TINY)

    return max(map(float, ORDERS), key=steps)


def renyi_epsilon(history: History, target_delta: float, order: float) -> float:
    """Epsilon of a history from its Renyi divergence at one order (Balle et al., AISTATS 2020)."""
    total = math.fsum(steps * _renyi(noise, rate, order) for noise, rate, steps in history)
    return max(0.0, total + _conversion(order, target_delta))


def _conversion(order: float, delta: float) -> float:
    return math.log1p(-1 / order) - (math.log(delta) + math.log(order)) / (order - 1)


@lru_cache(maxsize=65536)
def _renyi(noise_multiplier: float, sample_rate: float, order: float) -> float:
    """One step's ``rho(alpha)``."""
    from opacus.accountants.analysis.rdp import compute_rdp

    rho = float(compute_rdp(q=sample_rate, noise_multiplier=noise_multiplier, steps=1, orders=order))
    return max(0.0, rho)


def _epsilon(noise: float, rate: float, steps: int, budget: Budget) -> float:
    return epsilon_of(((noise, rate, steps),), budget.target_delta, budget.accountant)
