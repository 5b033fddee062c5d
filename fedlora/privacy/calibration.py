"""Noise for a budget, and the budget that noise has spent.

The mechanism is Poisson-subsampled Gaussian noise. Who counts, and for which neighbouring data sets, is in
`fedlora.privacy.accountants`.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from functools import lru_cache

from fedlora.errors import ConfigError, unknown_name
from fedlora.privacy.accountants import ACCOUNTANTS, History, prv_of_equal_steps

MAX_EPSILON = 100.0
"""Larger targets protect nobody."""
MIN_NOISE, MAX_NOISE = 0.05, 1e4
"""Noise that calibration looks at: less keeps no target, more drowns every gradient."""
RELATIVE_TOLERANCE = 1e-3
"""Calibrated noise is at most about this much larger than it has to be."""

LIMIT = 2 * MAX_EPSILON
"""Largest epsilon of prv and pld: beyond, their grids take gigabytes."""
MIN_DELTA = 1e-10
"""Smallest delta of prv and pld: rounding errors of their Fourier transforms are near 1e-13."""
MAX_STEPS = 100_000
"""Most steps of prv and pld: beyond, they take minutes and those rounding errors add up."""


def epsilon_spent(
    noise_multiplier: float, sample_rate: float, steps: int, target_delta: float, accountant: str = "prv"
) -> float:
    """`epsilon_of` so many equal steps.

    Raises:
        ConfigError: see `epsilon_of`.
    """
    return epsilon_of(((noise_multiplier, sample_rate, steps),), target_delta, accountant)


@lru_cache(maxsize=4096)
def epsilon_of(
    history: History, target_delta: float, accountant: str = "prv", *, quick: bool = False
) -> float:
    """The epsilon of all steps of a history together; 0 without a step, infinite without noise.

    Args:
        history: (noise multiplier, sample rate, steps) for each stretch of equal steps, in any order.
        target_delta: the delta that it is for.
        accountant: ``prv``, ``pld`` or ``rdp``.
        quick: equal steps by `prv_of_equal_steps`: as ``prv``, but for the last digits.

    Raises:
        ConfigError: an argument out of range, or beyond what ``prv`` and ``pld`` resolve (epsilon near
            200, delta 1e-10, 100,000 steps, noise multiplier 0.05).
    """
    _check(history, target_delta, accountant)
    composed = _composed(history)
    if not composed:
        return 0.0
    least = min(noise for noise, _, _ in composed)
    if not least > 0:
        return math.inf
    bound = _account("rdp", composed, target_delta)
    if accountant == "rdp":
        return bound
    _require(least >= MIN_NOISE, "privacy.noise-multiplier", least, f"at least {MIN_NOISE:g}", accountant)
    _require(
        bound <= LIMIT, "privacy.noise-multiplier", least,
        f"epsilon up to {LIMIT:g}, here it is near {bound:.0f}", accountant,
    )  # fmt: skip
    if quick and accountant == "prv" and len(composed) == 1:
        return prv_of_equal_steps(*composed[0], target_delta)
    return _account(accountant, composed, target_delta)


def _composed(history: History) -> History:
    """Equal steps counted together, in a fixed order, without stretches of no step."""
    steps: dict[tuple[float, float], int] = {}
    for noise, rate, count in history:
        steps[noise, rate] = steps.get((noise, rate), 0) + count
    return tuple(sorted((noise, rate, count) for (noise, rate), count in steps.items() if count))


@lru_cache(maxsize=1024)
def calibrate_noise(
    target_epsilon: float, target_delta: float, sample_rate: float, steps: int, accountant: str = "prv"
) -> float:
    """The least noise multiplier (to 0.1 %) whose ``epsilon_spent`` does not exceed the target.

    It is `MIN_NOISE` where still less would do.

    Raises:
        ConfigError: an argument out of range, or a target that no noise reaches.
    """
    _check(((MAX_NOISE, sample_rate, steps),), target_delta, accountant)
    if not 0 < target_epsilon <= MAX_EPSILON:
        raise ConfigError(
            f"privacy.target-epsilon = {target_epsilon}: must be > 0 and at most {MAX_EPSILON:g}"
        )
    if steps < 1:
        raise ConfigError(f"steps = {steps}: noise is calibrated for at least one step")

    def excess(name: str) -> Callable[[float], float]:
        """log(epsilon / target) over log(noise), falling; by rdp where the accountant cannot resolve it."""

        def of(log_noise: float) -> float:
            history = ((math.exp(log_noise), sample_rate, steps),)
            epsilon = _account("rdp", history, target_delta)
            if name != "rdp" and epsilon <= LIMIT:
                epsilon = _account(name, history, target_delta)
            return math.log(max(epsilon, 1e-9) / target_epsilon)

        return of

    log_noise = _least(excess("rdp"), start=0.0, stride=math.log(2.0))
    if accountant != "rdp":
        log_noise = _least(excess(accountant), start=log_noise, stride=math.log(1.25))
    if log_noise > math.log(MAX_NOISE):
        raise ConfigError(
            f"privacy.target-epsilon = {target_epsilon}: no noise reaches it at delta {target_delta:g} "
            f'with privacy.accountant = "{accountant}"'
            + (', "pld" resolves less' if accountant != "pld" else "")
        )
    return math.exp(log_noise)


@lru_cache(maxsize=256)
def warn_of_delta(target_delta: float, count: int, units: str) -> None:
    """Log, once in a process, that a delta lets whole units be given away: it is not below 1 / their number.

    Args:
        target_delta: delta.
        count: of the units that are protected, such as the examples of a client.
        units: what they are.
    """
    if target_delta * count >= 1:
        logging.getLogger("fedlora").warning(
            "privacy.target-delta = %g: is not below 1 / %d %s, so giving one away whole passes as private",
            target_delta, count, units,
        )  # fmt: skip


def _least(excess: Callable[[float], float], start: float, stride: float) -> float:
    """The least x with ``excess(x) <= 0``, within the tolerance.

    It is log(MIN_NOISE) if that is enough, and above log(MAX_NOISE) if there is none.
    """
    high, lowest = start, math.log(MIN_NOISE)
    while excess(high) > 0:
        high += stride
        if high > math.log(MAX_NOISE):
            return high
    from scipy.optimize import brentq

    low = max(high - stride, lowest)
    while excess(low) <= 0:
        if low == lowest:
            return low
        low = max(low - stride, lowest)
    x: float = brentq(excess, low, high, xtol=RELATIVE_TOLERANCE / 2)
    while excess(x) > 0:
        x += RELATIVE_TOLERANCE / 4
    return x


@lru_cache(maxsize=4096)
def _account(accountant: str, history: History, target_delta: float) -> float:
    """Never below zero, which the tight ones go where delta alone would do."""
    return max(0.0, ACCOUNTANTS[accountant](history, target_delta))


def _check(history: History, target_delta: float, accountant: str) -> None:
    for _, sample_rate, steps in history:
        if not 0 < sample_rate <= 1:
            raise ConfigError(
                f"sample rate = {sample_rate:g}: must be in (0, 1], it is train.batch-size / examples"
            )
        if steps < 0:
            raise ConfigError(f"steps = {steps}: must be >= 0")
    if not 0 < target_delta < 1:
        raise ConfigError(f"privacy.target-delta = {target_delta}: must be in (0, 1)")
    if accountant not in ACCOUNTANTS:
        raise unknown_name("privacy.accountant", accountant, ACCOUNTANTS)
    if accountant != "rdp":
        all_steps = sum(steps for _, _, steps in history)
        _require(
            target_delta >= MIN_DELTA,
            "privacy.target-delta",
            target_delta,
            f"{MIN_DELTA:g} or more",
            accountant,
        )
        _require(all_steps <= MAX_STEPS, "steps", all_steps, f"at most {MAX_STEPS:,}", accountant)


def _require(condition: bool, key: str, value: float, resolved: str, accountant: str) -> None:
    """Refuse what prv and pld cannot resolve; rdp always gives a bound."""
    if not condition:
        raise ConfigError(
            f'{key} = {value:g}: privacy.accountant = "{accountant}" resolves {resolved}; "rdp" gives a bound'
        )
