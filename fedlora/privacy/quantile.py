"""A clipping norm that follows a quantile of the norms that it clips, by a noisy count.

Andrew, Thakkar, McMahan, Ramaswamy, "Differentially private learning with adaptive clipping", NeurIPS 2021
(arXiv 1905.03871). Who is counted adds 1/2 if its norm is at most C, else -1/2, and at most C to a sum. Sum
and count with noise of z_delta C and sigma_b are one Gaussian mechanism of noise multiplier z with

    1 / z^2 = 1 / z_delta^2 + (1/2)^2 / sigma_b^2
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fedlora.config import PrivacyConfig
from fedlora.errors import ConfigError
from fedlora.privacy.entropy import on_grid, system_normal

SHARE_OF_COHORT, TIMES_NOISE = 20, 5.0
"""Noise on a count by default: the cohort over the first, as in the paper, but at least z times the second,
where it takes 1 % of 1 / z^2 from the sum."""
MOST_EXPONENT = 3.0
"""A norm is at most e^3 times larger or smaller after one count, whatever its noise."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Quantile:
    """The rule by which a clipping norm follows a quantile.

    Attributes:
        target: gamma, the share of norms that are to lie within the clipping norm, in (0, 1).
        learning_rate: eta, > 0.
        count_noise: sigma_b, standard deviation of the noise on a count; 0: by the size of the cohort.
    """

    target: float = 0.5
    learning_rate: float = 0.2
    count_noise: float = 0.0

    def noise_of_count(self, noise_multiplier: float, expected: int) -> float:
        """sigma_b, for so many whose norms are expected to be counted."""
        return self.count_noise or max(expected / SHARE_OF_COHORT, TIMES_NOISE * noise_multiplier)

    def noise_of_sum(self, noise_multiplier: float, expected: int) -> float:
        """z_delta, which leaves room in z for the count.

        >>> Quantile(count_noise=5.0).noise_of_sum(1.0, 100)
        1.005037815259212

        Raises:
            ConfigError: the count alone takes all that z allows.
        """
        if noise_multiplier == 0:
            return 0.0
        count = self.noise_of_count(noise_multiplier, expected)
        if 2 * count <= noise_multiplier:
            raise ConfigError(
                f"privacy.count-noise = {self.count_noise:g}: must be above half of the noise multiplier "
                f"{noise_multiplier:g}, or nothing is left for the sum"
            )
        return 1 / math.sqrt(noise_multiplier**-2 - (2 * count) ** -2)

    def counted(self, norms: Tensor, norm: float) -> float:
        """The sum of b - 1/2 over norms, shape (number,)."""
        return float((norms <= norm).sum()) - len(norms) / 2

    def noisy(self, count: float, std: float, rng: torch.Generator | None) -> float:
        """A count with its noise, on a grid; None draws it from the operating system."""
        if rng is None:
            drawn = system_normal(torch.Size([1]))
        else:
            drawn = torch.randn(1, generator=rng, dtype=torch.float64)
        return float(on_grid(count + std * drawn, std))

    def next_norm(self, norm: float, noisy_count: float, expected: int) -> float:
        """The norm after a noisy sum of b - 1/2."""
        share = 0.5 + noisy_count / expected
        exponent = -self.learning_rate * (share - self.target)
        return norm * math.exp(min(MOST_EXPONENT, max(-MOST_EXPONENT, exponent)))


def quantile_of(privacy: PrivacyConfig) -> Quantile | None:
    """The rule of a configuration; None where the norm stays as it is."""
    if privacy.clipping != "adaptive":
        return None
    return Quantile(
        target=privacy.target_quantile,
        learning_rate=privacy.clip_learning_rate,
        count_noise=privacy.count_noise,
    )
