"""Settings of a private step: what is clipped to which norm, and how much noise covers the sum."""

from __future__ import annotations

from dataclasses import dataclass

from clients.training.clip_shares import Shares
from fedlora.config import PrivacyConfig
from fedlora.privacy.quantile import Quantile, quantile_of


@dataclass(frozen=True, slots=True, kw_only=True)
class Mechanism:
    """Settings of a private step, in Opacus' terms.

    Attributes:
        noise_multiplier: noise standard deviation / ``max_grad_norm``.
        max_grad_norm: C, what one example adds to the sum at most.
        expected_batch_size: what the noisy sum is divided by, whatever was drawn.
        clipping: ``flat`` clips each example's gradient over all trained tensors together to C,
            ``per-layer`` each of its L tensors to C / sqrt(L), or by ``shares``.
        grad_sample_mode: ``hooks``, ``ghost`` or ``loop``; ``ghost`` clips flat only.
        max_physical_batch_size: examples that are in memory at once; 0 means all that were drawn.
        secure: noise from the operating system, which nobody can draw again.
        unit_examples: 0: an example is clipped by itself; else the mean over the examples of its unit, of
            which so many are in a step at most, see `clients.training.units`.
        quantile: how C goes on from step to step, beginning at ``max_grad_norm``; None: it stays.
        count_noise: standard deviation of the noise on the counts that it goes by.
        shares: of groups of tensors in C, see `clients.training.clip_shares`.
    """

    noise_multiplier: float
    max_grad_norm: float
    expected_batch_size: int
    clipping: str = "flat"
    grad_sample_mode: str = "hooks"
    max_physical_batch_size: int = 0
    secure: bool = False
    unit_examples: int = 0
    quantile: Quantile | None = None
    count_noise: float = 0.0
    shares: Shares = ()

    @classmethod
    def of(
        cls,
        privacy: PrivacyConfig,
        expected_batch_size: int,
        *,
        noise_multiplier: float = 0.0,
        secure: bool = False,
    ) -> Mechanism:
        """The step of a configuration; the noise multiplier is claimed for sum and count together.

        Raises:
            ConfigError: counts of norms take all that the noise multiplier allows.
        """
        quantile = quantile_of(privacy)
        return cls(
            noise_multiplier=quantile.noise_of_sum(noise_multiplier, expected_batch_size)
            if quantile
            else noise_multiplier,
            max_grad_norm=privacy.max_grad_norm,
            expected_batch_size=expected_batch_size,
            clipping="flat" if quantile else privacy.clipping,
            grad_sample_mode=privacy.grad_sample_mode,
            max_physical_batch_size=privacy.max_physical_batch_size,
            secure=secure,
            unit_examples=privacy.unit_examples,
            quantile=quantile,
            count_noise=quantile.noise_of_count(noise_multiplier, expected_batch_size) if quantile else 0.0,
            shares=privacy.shares,
        )

    @property
    def noise_std(self) -> float:
        """Standard deviation of the noise on every coordinate of the averaged gradient."""
        return self.noise_multiplier * self.max_grad_norm / self.expected_batch_size
