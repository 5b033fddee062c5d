"""Canaries in gradient space: directions that are pushed along, or not, by the toss of a coin.

A canary is an example of one client whose gradient is `LOUDNESS` max_grad_norm long, so that clipping leaves
of it exactly max_grad_norm, along its own direction. The directions of a client are orthonormal, and where
the trained tensors have room for it those of all clients together; no canary then speaks in another's score.
Half of the canaries push along the factors alone, the others along the head alone: a mechanism that leaves
one of them out is found there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from clients.training.batches import Indices
from clients.training.canaries import Rows
from clients.training.clip_shares import Shares, tensor_clips
from fedlora.audit.attack import Coins
from fedlora.core.factors import Tensors
from fedlora.core.seeding import stream, torch_stream

FACTORS, HEAD = "factors", "head"
LOUDNESS = 10.0
"""Length of a canary's gradient / max_grad_norm; a mechanism that does not clip shows it."""
ROOM = 100_000_000
"""Numbers that the directions of all clients together may take; beyond, they are orthonormal by client."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Design:
    """All canaries of an audit.

    Attributes:
        counts: group -> canaries at each client.
        clients: the partitions, sorted.
        seed: root of the coins and directions.
        max_grad_norm: the norm that gradients are clipped to.
    """

    counts: Mapping[str, int]
    clients: Sequence[int]
    seed: int
    max_grad_norm: float

    def coins(self, group: str, partition: int) -> Coins:
        """Which of a client's canaries are in its data."""
        return stream(self.seed, "audit", "coins", group, partition).random(self.counts[group]) < 0.5

    def directions(self, group: str, partition: int, dimension: int) -> Tensor:
        """A client's directions in the shipped tensors of a group, orthonormal rows (canaries, dimension)."""
        count, place = self.counts[group], self.clients.index(partition)
        together = count * len(self.clients)
        if together <= dimension and together * dimension <= ROOM:
            return orthonormal(self.seed, group, together, dimension)[place * count : (place + 1) * count]
        return orthonormal(self.seed, f"{group} {partition}", count, dimension)


@lru_cache(maxsize=4)
def orthonormal(seed: int, name: str, count: int, dimension: int) -> Tensor:
    """Directions that no other name has: orthonormal rows (count, dimension)."""
    generator = torch_stream(seed, "audit", "directions", name)
    rows: Tensor = torch.linalg.qr(torch.randn(dimension, count, generator=generator)).Q.T
    return rows.contiguous()


@dataclass(slots=True)
class ClientCanaries:
    """A client's canaries in one round, as `clients.training.canaries` wants them.

    Attributes:
        design: all canaries.
        partition: whose these are.
        uploaded: the factors that come back; canaries push along nothing else.
        clipping, shares: of the run.
        silent: they are drawn and push along nothing, so that a round can be repeated without them.
        names: group -> the tensors that its canaries push along, known once the round is trained.
        gains: group -> the length that clipping leaves of a canary / max_grad_norm, on average.
        sizes, examples: of the batches, and how many examples and canaries each was drawn from.
    """

    design: Design
    partition: int
    uploaded: frozenset[str]
    clipping: str = "flat"
    shares: Shares = ()
    silent: bool = False
    names: dict[str, tuple[str, ...]] = field(default_factory=dict)
    gains: dict[str, float] = field(default_factory=dict)
    sizes: list[int] = field(default_factory=list)
    examples: int = 0

    def drew(self, sizes: Sequence[int], examples: int) -> None:
        """See `clients.training.canaries.Canaries`."""
        self.sizes, self.examples = list(sizes), examples

    def members(self) -> Indices:
        """Numbers of the canaries whose coin says so; groups count on one after the other."""
        coins = [self.design.coins(group, self.partition) for group in self.design.counts]
        return np.flatnonzero(np.concatenate(coins))

    def rows(self, trained: Mapping[str, Tensor]) -> Rows:
        """See `clients.training.canaries.Canaries`."""
        self.names = named_groups(trained, self.uploaded, self.design.counts)
        length = LOUDNESS * self.design.max_grad_norm
        spread: dict[str, Tensor] = {}
        for group, names in self.names.items():
            sizes = [trained[name].numel() for name in names]
            directions = self.design.directions(group, self.partition, sum(sizes))
            parts = torch.split(directions, sizes, dim=1)
            self.gains[group] = 1.0
            if self.clipping == "per-layer":
                clips = dict(zip(trained, tensor_clips(list(trained), 1.0, self.shares), strict=True))
                of_parts = [clips[n] * part.norm(dim=1) for n, part in zip(names, parts, strict=True)]
                self.gains[group] = float(torch.stack(of_parts).sum(dim=0).mean())
            strength = 0.0 if self.silent else length
            spread |= {name: strength * part for name, part in zip(names, parts, strict=True)}
        group_of = {name: group for group, names in self.names.items() for name in names}
        starts = dict(zip(self.design.counts, np.cumsum([0, *self.design.counts.values()]), strict=False))

        def rows(numbers: Indices) -> list[Tensor]:
            found = []
            for name, tensor in trained.items():
                row = torch.zeros(len(numbers), tensor.numel())
                if name in group_of:
                    group = group_of[name]
                    own = numbers - starts[group]
                    mine = torch.from_numpy((own >= 0) & (own < self.design.counts[group]))
                    row[mine] = spread[name][own[mine.numpy()]]
                found.append(row.reshape(len(numbers), *tensor.shape))
            return found

        return rows


def named_groups(
    trained: Mapping[str, Tensor], uploaded: frozenset[str], groups: Mapping[str, object]
) -> dict[str, tuple[str, ...]]:
    """The trained tensors of each group that a client sends, factors as ``query.A``."""
    factors = [name for name in trained if _is_factor(name)]
    tensors = {
        FACTORS: tuple(name for name in factors if name.rpartition(".")[2] in uploaded),
        HEAD: tuple(name for name in trained if not _is_factor(name)),
    }
    return {group: tensors[group] for group in groups}


def flat(tensors: Tensors, names: Sequence[str]) -> Tensor:
    """Those tensors as one vector."""
    return torch.cat([tensors[name].flatten() for name in names])


def _is_factor(name: str) -> bool:
    return name.endswith((".A", ".B", ".R"))
