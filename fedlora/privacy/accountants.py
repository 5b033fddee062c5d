"""The three accountants: what a history of Poisson-subsampled Gaussian steps costs.

Neighbouring data sets differ by one example added or removed. A history is composed as it is, entry by
entry; its order does not matter.

- ``prv``: numerical composition of privacy loss random variables (Gopi, Lee, Wutschitz, NeurIPS 2021), of
  Opacus. An upper bound at most about 0.02 above the true epsilon.
- ``pld``: privacy loss distributions (Doroshenko et al., PoPETs 2022), of Google's dp-accounting; an
  independent code. An upper bound as tight, on a grid of fixed width: more accurate than prv where
  epsilon is small.
- ``rdp``: Renyi DP (Mironov, Talwar, Zhang, 2019), of Opacus. A closed formula; a looser upper bound.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable

History = tuple[tuple[float, float, int], ...]
"""Entries of (noise multiplier, sample rate, steps)."""

ORDERS = (
    1.1, 1.2, 1.3, 1.4, 1.5, 1.6, 1.8, 2, 2.25, 2.5, 2.75, 3, 3.5, 4, 4.5, 5, 5.5, *range(6, 65),
    80, 96, 128, 192, 256, 384, 512, 768, 1024,
)  # fmt: skip
"""Renyi orders: the small ones decide for large epsilons, and fractions of them take long."""


def rdp(history: History, target_delta: float) -> float:
    """Epsilon by Renyi DP, at the best of `ORDERS`."""
    from opacus.accountants import RDPAccountant

    accountant = RDPAccountant()
    accountant.history = list(history)
    with warnings.catch_warnings():  # that the largest order is the best leaves an upper bound
        warnings.simplefilter("ignore")
        return max(0.0, float(accountant.get_epsilon(target_delta, alphas=ORDERS)))


def prv(history: History, target_delta: float) -> float:
    """Epsilon by privacy loss random variables: the upper end of Opacus' interval."""
    from opacus.accountants import PRVAccountant

    accountant = PRVAccountant()
    accountant.history = list(history)
    with warnings.catch_warnings():  # log(1 - q) at q = 1 leaves an upper bound
        warnings.simplefilter("ignore")
        return float(accountant.get_epsilon(target_delta))


def pld(history: History, target_delta: float) -> float:
    """Epsilon by privacy loss distributions, on a grid of 1e-4, coarser where little noise makes it long."""
    from dp_accounting import GaussianDpEvent, NeighboringRelation, PoissonSampledDpEvent
    from dp_accounting.pld import PLDAccountant

    least = min(noise_multiplier for noise_multiplier, _, _ in history)
    accountant = PLDAccountant(NeighboringRelation.ADD_OR_REMOVE_ONE, 1e-4 * max(1.0, 1.5 / least))
    for noise_multiplier, sample_rate, steps in history:
        accountant.compose(PoissonSampledDpEvent(sample_rate, GaussianDpEvent(noise_multiplier)), steps)
    return float(accountant.get_epsilon(target_delta))


ACCOUNTANTS: dict[str, Callable[[History, float], float]] = {"prv": prv, "rdp": rdp, "pld": pld}
"""By their names in ``privacy.accountant``."""
