"""Noise for a budget and the budget that noise has spent, by Opacus' accountants.

The mechanism is Poisson-subsampled Gaussian noise, neighbouring data sets differ by one example added
or removed. ``prv`` (Gopi, Lee, Wutschitz, NeurIPS 2021) is tight: an upper bound at most about 0.02
above the true epsilon. ``rdp`` (Mironov, Talwar, Zhang, 2019) is a looser upper bound.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from functools import lru_cache

from scipy.optimize import brentq

from fedlora.errors import ConfigError

ORDERS = (
    1.1, 1.2, 1.3, 1.4, 1.5, 1.6, 1.8, 2, 2.25, 2.5, 2.75, 3, 3.5, 4, 4.5, 5, 5.5, *range(6, 65),
    80, 96, 128, 192, 256, 384, 512, 768, 1024,
)  # fmt: skip
"""Renyi orders: the small ones decide for large epsilons, and fractions of them take long."""
MAX_EPSILON = 100.0
"""Larger targets protect nobody."""
PRV_LIMIT = 2 * MAX_EPSILON
"""The PRV grid grows with epsilon: beyond this it takes gigabytes."""
MAX_NOISE = 1e6
RELATIVE_TOLERANCE = 1e-3
"""Calibrated noise is at most about this much larger than it has to be."""


@lru_cache(maxsize=4096)
def epsilon_spent(
    noise_multiplier: float, sample_rate: float, steps: int, target_delta: float, accountant: str = "prv"
) -> float:
    """The epsilon, at ``target_delta``, of so many steps; 0 without a step, infinite without noise.

    Raises:
        ConfigError: an argument out of range, or an epsilon that ``prv`` cannot resolve (about 200).
    """
    _check(sample_rate, steps, target_delta, accountant)
    if steps == 0:
        return 0.0
    if not noise_multiplier > 0:
        return math.inf
    bound = _account("rdp", noise_multiplier, sample_rate, steps, target_delta)
    if accountant == "rdp":
        return bound
    if bound > PRV_LIMIT:
        raise ConfigError(
            f"privacy.noise-multiplier = {noise_multiplier:g}: epsilon is near {bound:.0f}, beyond what "
            f'privacy.accountant = "prv" resolves ({PRV_LIMIT:g}), use more noise or "rdp"'
        )
    return _account("prv", noise_multiplier, sample_rate, steps, target_delta)


@lru_cache(maxsize=1024)
def calibrate_noise(
    target_epsilon: float, target_delta: float, sample_rate: float, steps: int, accountant: str = "prv"
) -> float:
    """The least noise multiplier (to 0.1 %) whose ``epsilon_spent`` does not exceed the target.

    Raises:
        ConfigError: an argument out of range, or a target that no noise reaches.
    """
    _check(sample_rate, steps, target_delta, accountant)
    if not 0 < target_epsilon <= MAX_EPSILON:
        raise ConfigError(
            f"privacy.target-epsilon = {target_epsilon}: must be > 0 and at most {MAX_EPSILON:g}"
        )
    if steps < 1:
        raise ConfigError(f"steps = {steps}: noise is calibrated for at least one step")

    def excess(name: str) -> Callable[[float], float]:
        """log(epsilon / target) as a function of log(noise): smooth and falling."""

        def of(log_noise: float) -> float:
            epsilon = _account(name, math.exp(log_noise), sample_rate, steps, target_delta)
            return math.log(max(epsilon, 1e-9) / target_epsilon)

        return of

    log_noise = _least(excess("rdp"), start=0.0, stride=math.log(2.0))
    if accountant == "prv":
        log_noise = _least(excess("prv"), start=log_noise, stride=math.log(1.25))
    if log_noise > math.log(MAX_NOISE):
        raise ConfigError(
            f"privacy.target-epsilon = {target_epsilon}: no noise reaches it at delta {target_delta:g} "
            f'with privacy.accountant = "{accountant}"'
        )
    return math.exp(log_noise)


def _least(excess: Callable[[float], float], start: float, stride: float) -> float:
    """The least x with ``excess(x) <= 0``, within the tolerance; above log(MAX_NOISE) if there is none."""
    high = start
    while excess(high) > 0:
        high += stride
        if high > math.log(MAX_NOISE):
            return high
    low = high - stride
    while excess(low) <= 0:
        low -= stride
    x: float = brentq(excess, low, high, xtol=RELATIVE_TOLERANCE / 2)
    while excess(x) > 0:
        x += RELATIVE_TOLERANCE / 4
    return x


@lru_cache(maxsize=4096)
def _account(
    accountant: str, noise_multiplier: float, sample_rate: float, steps: int, target_delta: float
) -> float:
    from opacus.accountants import PRVAccountant, RDPAccountant

    with warnings.catch_warnings():  # the largest order, or log(1 - q) at q = 1: both leave an upper bound
        warnings.simplefilter("ignore")
        if accountant == "prv":
            prv = PRVAccountant()
            prv.history = [(noise_multiplier, sample_rate, steps)]
            return float(prv.get_epsilon(target_delta))
        rdp = RDPAccountant()
        rdp.history = [(noise_multiplier, sample_rate, steps)]
        return max(0.0, float(rdp.get_epsilon(target_delta, alphas=ORDERS)))


def _check(sample_rate: float, steps: int, target_delta: float, accountant: str) -> None:
    if not 0 < sample_rate <= 1:
        raise ConfigError(
            f"sample rate = {sample_rate:g}: must be in (0, 1], it is train.batch-size / examples"
        )
    if steps < 0:
        raise ConfigError(f"steps = {steps}: must be >= 0")
    if not 0 < target_delta < 1:
        raise ConfigError(f"privacy.target-delta = {target_delta}: must be in (0, 1)")
    if accountant not in ("prv", "rdp"):
        raise ConfigError(f"privacy.accountant = {accountant!r}: accepted are prv, rdp")
