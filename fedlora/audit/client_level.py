"""Client-level privacy, audited: made-up clients among the real ones, of which a coin decides who takes part.

A made-up client changes the shipped tensors along its own direction, `LOUDNESS` times as far as it is clipped
to. It takes part in as many rounds as one client may, in the first and then every b-th, b being the bands of
the noise. The attacker sees each published mean and knows what the real clients sent; whatever the server
makes of the mean is post-processing, which shows no more.

Noise that is correlated over rounds hides less from whoever knows its factor C: of the published rows P it is
the rows of C P whose noise is independent again, and a canary v shows there as s_t <v, (C P)_t>, with s what
C makes of the rounds in which it takes part.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from fedlora.audit.attack import Coins, Scores
from fedlora.audit.canaries import LOUDNESS, orthonormal
from fedlora.core.factors import Tensors
from fedlora.core.seeding import stream
from fedlora.core.state import Broadcast, ClientUpdate
from strategies.adaptive_dp import AdaptiveClientDP
from strategies.client_dp import ClientDP, changes, moved

FIRST = 1_000_000_000
"""Partition id of the first made-up client; real ones come before it, as they would alone."""


@dataclass(slots=True)
class WithCanaries:
    """A run's `ClientDP` with made-up clients, in its place.

    Attributes:
        mechanism: the run's own.
        canaries: made-up clients.
        rounds: in how many each of them takes part.
        seed: of coins and directions.
        scores: of each: how far the published sums went along its direction, in clipping norms.
        claimed: standard deviation that it should have, in clipping norms.
        noise: of each round: what was published less what was sent, times C, in clipping norms.
        power: |s|^2, the rounds that a canary shows in.
    """

    mechanism: ClientDP | AdaptiveClientDP
    canaries: int
    rounds: int
    seed: int
    scores: Scores = field(init=False)
    noise: list[Tensor] = field(default_factory=list)
    claimed: float = 0.0
    power: float = 0.0
    _published: list[Tensor] = field(default_factory=list)
    _drawn: list[Tensor] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.scores = np.zeros(self.canaries)

    @property
    def seeded(self) -> bool:
        """See `ClientDP.seeded`."""
        return self.mechanism.seeded

    @property
    def coins(self) -> Coins:
        """Which of the made-up clients take part."""
        return stream(self.seed, "audit", "coins", "clients").random(self.canaries) < 0.5

    def privatise(
        self, updates: Sequence[ClientUpdate], sent: Mapping[int, Broadcast], planned: int, server_round: int
    ) -> list[ClientUpdate]:
        """See `ClientDP.privatise`."""
        shows = self._shows(server_round)
        if not shows:
            return self.mechanism.privatise(updates, sent, planned, server_round)
        norm, start = self.mechanism.clipping_norm, sent[min(update.partition_id for update in updates)]
        like = changes(updates[0], sent[updates[0].partition_id])
        sizes = [tensor.numel() for tensor in like.values()]
        directions = orthonormal(self.seed, "clients", self.canaries, sum(sizes))
        inside = np.flatnonzero(self.coins) if self._take_part(server_round) else np.arange(0)
        made_up = [self._made_up(int(number), start, like, directions[number]) for number in inside]
        everyone = {**sent, **{update.partition_id: start for update in made_up}}
        told = planned + self.canaries
        now = self.mechanism.now(told)
        self.claimed = now.noise_multiplier
        private = self.mechanism.privatise([*updates, *made_up], everyone, told, server_round)
        published = told * _flat(changes(private[0], start))
        known = sum(_flat(now.clipped(changes(u, sent[u.partition_id]))) for u in updates)
        apart = (published - known) / norm
        self._published.append(apart)
        self._drawn.append(apart - directions[torch.from_numpy(inside)].double().sum(dim=0))
        self.scores += shows * (directions.double() @ self._times_factor(self._published)).numpy()
        self.noise.append(self._times_factor(self._drawn))
        self.power += shows**2
        return private

    def memory(self) -> Tensors:
        """See `ClientDP.memory`."""
        return self.mechanism.memory()

    @property
    def adapted_norm(self) -> float | None:
        """See `ClientDP.adapted_norm`."""
        return self.mechanism.adapted_norm

    def _take_part(self, server_round: int) -> bool:
        number, early = divmod(server_round - 1, self.mechanism.bands)
        return not early and number < self.rounds

    def _shows(self, server_round: int) -> float:
        """S of the round; 0 once all of a canary was published."""
        coefficients = enumerate(self.mechanism.coefficients[:server_round])
        return math.fsum(c for lag, c in coefficients if self._take_part(server_round - lag))

    def _times_factor(self, rows: Sequence[Tensor]) -> Tensor:
        """The last row of C times the rows so far."""
        first, *others = self.mechanism.coefficients
        total = first * rows[-1]
        for c, row in zip(others, rows[-2::-1], strict=False):
            total = total + c * row
        return total

    def _made_up(
        self, number: int, start: Broadcast, like: Mapping[str, Tensor], direction: Tensor
    ) -> ClientUpdate:
        length = LOUDNESS * self.mechanism.clipping_norm
        parts = torch.split(length * direction, [tensor.numel() for tensor in like.values()])
        pushed = {name: p.reshape(t.shape) for p, (name, t) in zip(parts, like.items(), strict=True)}
        adapters, head = moved(start, pushed)
        return ClientUpdate(partition_id=FIRST + number, adapters=adapters, head=head, weight=1.0)


def _flat(of_update: Mapping[str, Tensor]) -> Tensor:
    return torch.cat([tensor.double().flatten() for tensor in of_update.values()])
