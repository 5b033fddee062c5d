"""The clipping norm of a client's private steps where it follows a quantile, see `fedlora.privacy.quantile`.

It begins anew in each round, at ``privacy.max-grad-norm``: a client keeps nothing of it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from clients.training.dp_mechanism import Mechanism


class FollowedNorm:
    """The norm of one client in one round.

    Args:
        mechanism: with a quantile.
        rng: draws the noise on counts unless ``mechanism.secure``.

    Attributes:
        value: C, of the next step.
        counts: the noisy count of each step.
    """

    def __init__(self, mechanism: Mechanism, rng: torch.Generator | None) -> None:
        self._mechanism = mechanism
        self._rng = None if mechanism.secure else rng
        self._count = 0.0
        self.value = mechanism.max_grad_norm
        self.counts: list[float] = []

    def see(self, norms: Tensor) -> None:
        """Count some of a step's examples or units by the norms of their gradients."""
        assert self._mechanism.quantile is not None
        self.add(self._mechanism.quantile.counted(norms, self.value))

    def add(self, count: float) -> None:
        """Add to the step's count."""
        self._count += count

    def advance(self) -> None:
        """The step is done: the norm is the next one's."""
        mechanism = self._mechanism
        assert mechanism.quantile is not None
        noisy = mechanism.quantile.noisy(self._count, mechanism.count_noise, self._rng)
        self.value = mechanism.quantile.next_norm(self.value, noisy, mechanism.expected_batch_size)
        self.counts.append(noisy)
        self._count = 0.0


def followed(mechanism: Mechanism | None, rng: torch.Generator | None) -> FollowedNorm | None:
    """None where the norm stays as it is."""
    return None if mechanism is None or mechanism.quantile is None else FollowedNorm(mechanism, rng)
