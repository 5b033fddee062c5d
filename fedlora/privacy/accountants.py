"""The three accountants: what a history of Poisson-subsampled Gaussian steps costs.

Neighbouring data sets differ by one example that is in the draws or is not, rate and noise being the same for
both, see `fedlora.privacy.types.NeighboringRelation`. A history is composed as it is, entry by entry; its
order does not matter.

- ``prv``: numerical composition of privacy loss random variables (Gopi, Lee, Wutschitz, NeurIPS 2021), of
  Opacus. An upper bound at most about 0.02 above the true epsilon.
- ``pld``: privacy loss distributions (Doroshenko et al., PoPETs 2022), of Google's dp-accounting; an
  independent code. An upper bound as tight, on a grid of fixed width: more accurate than prv where
  epsilon is small.
- ``rdp``: Renyi DP (Mironov, Talwar, Zhang, 2019), of Opacus. A closed formula; a looser upper bound.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

History = tuple[tuple[float, float, int], ...]
"""Entries of (noise multiplier, sample rate, steps)."""

ORDERS = (
    1.1, 1.2, 1.3, 1.4, 1.5, 1.6, 1.8, 2, 2.25, 2.5, 2.75, 3, 3.5, 4, 4.5, 5, 5.5, *range(6, 65),
    80, 96, 128, 192, 256, 384, 512, 768, 1024,
)  # fmt: skip
"""Renyi orders: the small ones decide for large epsilons, and fractions of them take long."""

EPSILON_ERROR = 0.01
"""Half the width of the interval that prv gives for epsilon."""
DELTA_ERROR = 1e-3
"""What prv may err in delta, relative to the target."""
NEGLIGIBLE = math.log(1e-22)
"""Fourier coefficients of a composed loss that are left out are below this, and all of them move no digit."""
LONGEST_KEPT = 2**20
"""Points of a grid of prv that is worth its memory, 8 bytes each."""


def rdp(history: History, target_delta: float) -> float:
    """Epsilon by Renyi DP, at the best of `ORDERS`."""
    return epsilon_of_divergence(renyi_divergence(history), target_delta)


def renyi_divergence(history: History) -> NDArray[np.float64]:
    """Of all steps together, at each of `ORDERS`."""
    found = [steps * _one_step_divergence(noise, rate) for noise, rate, steps in history]
    return np.asarray(sum(found), dtype=np.float64)


def epsilon_of_divergence(divergence: NDArray[np.float64], target_delta: float) -> float:
    """Epsilon of a Renyi divergence, at the best of `ORDERS`."""
    from opacus.accountants.analysis.rdp import get_privacy_spent

    with warnings.catch_warnings():  # that the largest order is the best leaves an upper bound
        warnings.simplefilter("ignore")
        epsilon, _ = get_privacy_spent(orders=ORDERS, rdp=divergence, delta=target_delta)
    return max(0.0, float(epsilon))


@lru_cache(maxsize=1024)
def _one_step_divergence(noise_multiplier: float, sample_rate: float) -> NDArray[np.float64]:
    """One step's Renyi divergence at all `ORDERS`; steps add up."""
    from opacus.accountants.analysis.rdp import compute_rdp

    divergence = compute_rdp(q=sample_rate, noise_multiplier=noise_multiplier, steps=1, orders=ORDERS)
    return np.asarray(divergence, dtype=np.float64)


def prv(history: History, target_delta: float) -> float:
    """Epsilon by privacy loss random variables: the upper end of Opacus' interval.

    Equal steps are composed from one grid for all counts up to the next power of two, so that an account
    that grows by a few steps a round is not begun anew each time; the grid is at least as fine as
    ``PRVAccountant`` would take it.
    """
    from opacus.accountants import PRVAccountant
    from opacus.accountants.analysis.prv import compose_heterogeneous

    with warnings.catch_warnings():  # log(1 - q) at q = 1 leaves an upper bound
        warnings.simplefilter("ignore")
        if len(history) > 1:
            accountant = PRVAccountant()
            accountant.history = list(history)
            return float(accountant.get_epsilon(target_delta))
        noise, rate, steps = history[0]
        most = 1 << (steps - 1).bit_length()
        one_step = _one_step_loss(noise, rate, most, target_delta)
        composed = compose_heterogeneous([one_step], [steps])
        if len(one_step) > LONGEST_KEPT:
            _one_step_loss.cache_clear()
        _, _, upper = composed.compute_epsilon(target_delta, target_delta * DELTA_ERROR, EPSILON_ERROR)
        return float(upper)


def prv_of_equal_steps(noise_multiplier: float, sample_rate: float, steps: int, target_delta: float) -> float:
    """As `prv` to rounding, in a fraction of the time: what a growing account is told by after each release.

    The composed privacy loss p is never written out. With c_k its Fourier coefficients, of which few are left
    after many steps, w_k = e^{2 pi i k / N} and h the width of the grid, both sums of
    delta(t_i) = sum_{j >= i} p_j (1 - e^{t_i - t_j}) are geometric:

        sum_{j >= i} p_j                = Re sum_k c_k (w_k^i - 1) / (1 - w_k)
        sum_{j >= i} p_j e^{t_i - t_j}  = Re sum_k c_k (w_k^i - e^{-(N - i) h}) / (1 - w_k e^{-h})

    so that the place of epsilon is found by bisection. The grid is padded to a length that Fourier transforms
    like (the one of `prv` may be twice a prime, and noise was calibrated by its last bits).
    """
    most = 1 << (steps - 1).bit_length()
    with warnings.catch_warnings():  # log(1 - q) at q = 1 leaves an upper bound
        warnings.simplefilter("ignore")
        spectrum, decay, domain = _one_step_spectrum(noise_multiplier, sample_rate, most, target_delta)
    size, width = domain.size, domain.dt
    k = np.flatnonzero(steps * decay > NEGLIGIBLE)
    shift = steps - 1 + (size // 2 if steps % 2 == 0 else 0)
    twice = np.where((k == 0) | (2 * k == size), 1.0, 2.0) / size  # k and N - k together
    c = twice * spectrum[k] ** steps * _roots(-k * shift, size)
    rest = k > 0
    plain = c[rest] / -np.expm1(2j * np.pi * k[rest] / size)
    falling = c / -np.expm1(2j * np.pi * k / size - width)

    def tails(i: int) -> tuple[float, float]:
        """The two sums from the i-th loss on."""
        turned = _roots(k * i, size)
        mass = c[~rest].real.sum() * (size - i) + (plain * (turned[rest] - 1)).real.sum()
        return float(mass), float((falling * (turned - math.exp(-(size - i) * width))).real.sum())

    delta = target_delta * (1 - DELTA_ERROR)
    first = domain.shift_right(domain.shifts * (steps - 1)).t_min
    low, high = 0, size - 1  # the first place whose delta is not above the target
    while low < high:
        middle = (low + high) // 2
        mass, weighted = tails(middle)
        low, high = (low, middle) if mass - weighted <= delta else (middle + 1, high)
    mass, weighted = tails(low)
    if domain.size > LONGEST_KEPT:
        _one_step_spectrum.cache_clear()
        _one_step_loss.cache_clear()
    epsilon = first + low * width + math.log((mass - delta) / weighted)
    return max(0.0, float(epsilon) + EPSILON_ERROR)


def _roots(numerators: NDArray[np.int64], size: int) -> NDArray[np.complex128]:
    """Powers of e^{2 pi i / size}."""
    roots: NDArray[np.complex128] = np.exp(2j * np.pi / size * (numerators % size))
    return roots


@lru_cache(maxsize=8)
def _one_step_spectrum(noise_multiplier: float, sample_rate: float, most: int, target_delta: float) -> Any:
    """One step's privacy loss with zeros on both sides: its Fourier transform, log |it|, and the grid."""
    from opacus.accountants.analysis.prv import Domain
    from scipy.fft import next_fast_len, rfft

    one_step = _one_step_loss(noise_multiplier, sample_rate, most, target_delta)
    domain = one_step.domain
    size = len(one_step)
    while (size := next_fast_len(size, real=True)) % 2:
        size += 1
    margin = (size - len(one_step)) // 2
    padded = Domain(
        t_min=domain.t_min - margin * domain.dt,
        t_max=domain.t_max + margin * domain.dt,
        size=size,
        shifts=domain.shifts,
    )
    spectrum = rfft(np.pad(one_step.pmf, margin))
    return spectrum, np.log(np.abs(spectrum) + 1e-300), padded


@lru_cache(maxsize=32)
def _one_step_loss(noise_multiplier: float, sample_rate: float, most: int, target_delta: float) -> Any:
    """One step's privacy loss on a grid that serves for up to ``most`` steps (Gopi et al., Algorithm 1)."""
    from opacus.accountants.analysis.prv import (
        Domain,
        PoissonSubsampledGaussianPRV,
        TruncatedPrivacyRandomVariable,
        discretize,
    )

    loss = PoissonSubsampledGaussianPRV(sample_rate, noise_multiplier)
    delta_error = target_delta * DELTA_ERROR
    bound = safe_domain_size(noise_multiplier, sample_rate, most, delta_error)
    mesh = EPSILON_ERROR / math.sqrt(most * math.log(12 / delta_error) / 2)
    domain = Domain.create_aligned(-bound, bound, mesh)
    return discretize(TruncatedPrivacyRandomVariable(loss, domain.t_min, domain.t_max), domain)


def safe_domain_size(noise_multiplier: float, sample_rate: float, most: int, delta_error: float) -> float:
    """``compute_safe_domain_size`` of Opacus for equal steps, bit by bit in half the time.

    Its two bounds are of the same divergence, which is what takes long: at some hundred orders, most broken.
    """
    from opacus.accountants import RDPAccountant
    from opacus.accountants.analysis.rdp import compute_rdp, get_privacy_spent

    orders = RDPAccountant.DEFAULT_ALPHAS
    divergence = compute_rdp(q=sample_rate, noise_multiplier=noise_multiplier, steps=1, orders=orders)
    all_steps, _ = get_privacy_spent(orders=orders, rdp=divergence * most, delta=delta_error / 4)
    one_step, _ = get_privacy_spent(orders=orders, rdp=divergence, delta=delta_error / (8 * most))
    return max(float(all_steps), float(one_step), EPSILON_ERROR) + 3


def pld(history: History, target_delta: float) -> float:
    """Epsilon by privacy loss distributions."""
    return float(_losses(history).get_epsilon_for_delta(target_delta))


def profile(history: History, epsilons: NDArray[np.float64]) -> NDArray[np.float64]:
    """The delta of each epsilon by privacy loss distributions: of the worse direction, an upper bound."""
    deltas: NDArray[np.float64] = _losses(history).get_delta_for_epsilon(epsilons)
    return np.minimum(deltas, 1.0)


def _losses(history: History) -> Any:
    """Of all steps together, on a grid of 1e-4, coarser where little noise makes it long."""
    width = 1e-4 * max(1.0, 1.5 / min(noise_multiplier for noise_multiplier, _, _ in history))
    whole, *others = (_one_step_losses(noise, rate, width).self_compose(n) for noise, rate, n in history)
    for other in others:
        whole = whole.compose(other)
    return whole


@lru_cache(maxsize=8)
def _one_step_losses(noise_multiplier: float, sample_rate: float, width: float) -> Any:
    """One step's privacy loss distributions, for an example added and for one removed."""
    from dp_accounting.pld.privacy_loss_distribution import from_gaussian_mechanism

    return from_gaussian_mechanism(
        noise_multiplier, sampling_prob=sample_rate, value_discretization_interval=width
    )


ACCOUNTANTS: dict[str, Callable[[History, float], float]] = {"prv": prv, "rdp": rdp, "pld": pld}
"""By their names in ``privacy.accountant``."""
