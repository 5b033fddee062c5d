"""Client-level privacy whose clipping norm follows a quantile of the updates' norms, found privately.

Andrew, Thakkar, McMahan, Ramaswamy, "Differentially private learning with adaptive clipping", NeurIPS 2021
(arXiv 1905.03871), Algorithm 1. With b_k = 1 if client k's change is at most S long, else 0:

    X' = X + ( sum_k clip(dX_k, S) + N(0, z_delta^2 S^2) ) / m        z_delta = (z^-2 - (2 sigma_b)^-2)^(-1/2)
    b  = 1/2 + ( sum_k (b_k - 1/2) + N(0, sigma_b^2) ) / m
    S' = S exp(-eta (b - gamma))

A client adds at most S to the sum and 1/2 to the count, and nothing to either where it sends nothing, so that
both together are one Gaussian mechanism of noise multiplier z:

    S^2 / (z_delta S)^2 + (1/2)^2 / sigma_b^2 = 1 / z^2

What is claimed and charged is z; the count is paid for by more noise on the sum. S' is made of private
numbers alone, and so is free.

Flower's ``DifferentialPrivacyServerSideAdaptiveClipping`` has the same terms: ``noise_multiplier`` z,
``initial_clipping_norm``, ``target_clipped_quantile`` gamma, ``clip_norm_lr`` eta, ``clipped_count_stddev``
sigma_b.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch

from fedlora.core.factors import Tensors
from fedlora.core.seeding import torch_stream
from fedlora.core.state import Broadcast, ClientUpdate
from fedlora.errors import ConfigError
from fedlora.privacy.quantile import Quantile
from strategies.client_dp import ClientDP, changes
from strategies.rule import Rule


class AdaptiveClientDP:
    """`ClientDP` whose clipping norm is part of what a strategy remembers between rounds.

    Args:
        first: the mechanism with the first clipping norm, and with z.
        quantile: how the norm goes on.

    Attributes:
        clipping_norm: S, of the next round.
    """

    def __init__(self, first: ClientDP, quantile: Quantile) -> None:
        quantile.noise_of_sum(first.noise_multiplier, 1)
        if first.bands > 1:
            raise ConfigError(f"client_dp: {first.bands} coefficients, but the clipping norm changes")
        self._first, self._quantile = first, quantile
        self.clipping_norm = first.clipping_norm

    coefficients = (1.0,)
    """Its noise is independent from round to round."""
    bands = 1

    @property
    def seeded(self) -> bool:
        """See `ClientDP.seeded`."""
        return self._first.seeded

    def check(self, rule: Rule) -> None:
        """See `ClientDP.check`."""
        self._first.check(rule)

    def memory(self) -> Tensors:
        """The clipping norm of the next round, see `ClientDP.memory`."""
        return {"clipping-norm": torch.tensor(self.clipping_norm, dtype=torch.float64)}

    def remember(self, memory: Tensors, done: int) -> None:
        """Go on from a `memory` after so many rounds.

        Raises:
            ConfigError: it has no clipping norm.
        """
        if "clipping-norm" not in memory and done:
            raise ConfigError(f"privacy.clipping = 'adaptive': the norm after round {done} was not kept")
        self.clipping_norm = float(memory.get("clipping-norm", self.clipping_norm))

    @property
    def adapted_norm(self) -> float:
        return self.clipping_norm

    def now(self, planned: int) -> ClientDP:
        """What clips and noises the next round's sum over so many clients."""
        noise = self._quantile.noise_of_sum(self._first.noise_multiplier, planned)
        return replace(self._first, clipping_norm=self.clipping_norm, noise_multiplier=noise)

    def privatise(
        self, updates: Sequence[ClientUpdate], sent: Mapping[int, Broadcast], planned: int, server_round: int
    ) -> list[ClientUpdate]:
        """As `ClientDP.privatise`; afterwards the clipping norm is that of the next round."""
        private = self.now(planned).privatise(updates, sent, planned, server_round)
        norms = torch.tensor([_norm(u, sent[u.partition_id]) for u in updates], dtype=torch.float64)
        seed, z = self._first.seed, self._first.noise_multiplier
        rng = None if seed is None else torch_stream(seed, "client-dp-count", server_round)
        count = self._quantile.counted(norms, self.clipping_norm)
        noisy = self._quantile.noisy(count, self._quantile.noise_of_count(z, planned), rng)
        self.clipping_norm = self._quantile.next_norm(self.clipping_norm, noisy, planned)
        return private


def _norm(update: ClientUpdate, start: Broadcast) -> float:
    return math.sqrt(sum(float(t.square().sum()) for t in changes(update, start).values()))
