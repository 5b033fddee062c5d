"""Zero-padding: clients of lower rank are padded with zeros, then A and B are averaged apart.

The baseline of Cho et al., "Heterogeneous LoRA for Federated Fine-tuning of On-Device Foundation Models",
EMNLP 2024 (arXiv 2401.06432), and of FLoRA (arXiv 2409.05976); with ``renormalise`` it is RBLA, Chen et
al., "RBLA: Rank-Based-LoRA-Aggregation for Fine-tuning Heterogeneous Models in FLaaS", 2024
(arXiv 2408.08699). For row j of A and column j of B, j <= r:

    plain:          A'_j = sum_{k: r_k >= j} p_k A_kj,                     B'_j alike with (s_k / s) B_kj
    renormalised:   the same divided by sum_{k: r_k >= j} p_k;  where nobody has j, the start stays

Plain padding shrinks what only some clients have: column j of both factors is weighted by the share of
clients that have it, so their product by its square. Renormalising ends that, at the price of a mean over
fewer clients.

Not exact, not even for clients with identical A; the covariance of the factors is dropped as in FedAvg, which
this is for equal ranks, bit for bit. Not invariant under (B_k G, G^-1 A_k). Column j of one client has
nothing to do with column j of another unless all start from a common adapter.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from fedlora.core.adapters import Adapters, lora_set
from fedlora.core.factors import AdapterSet, LoraFactors, resize
from fedlora.core.state import ClientUpdate
from strategies.facts import Facts
from strategies.layer import Layer
from strategies.mean import MeanRule


@dataclass(frozen=True, kw_only=True)
class ZeroPaddingRule(MeanRule):
    """A and B padded to the global rank and averaged apart, the remainder dropped.

    Attributes:
        renormalise: divide row j by the weights of the clients that have it (RBLA).
    """

    renormalise: bool = False

    facts: ClassVar[Facts] = Facts(
        name="zero-padding",
        title="Zero-padding, RBLA",
        paper="Cho et al., EMNLP 2024, arXiv 2401.06432; RBLA: arXiv 2408.08699",
        exact=False,
        mixed_ranks=True,
        mean=True,
        stale="factors",
        secure_sum=True,
        up="r_k(o+i)",
        down="r_k(o+i)",
    )

    def middle(self, layer: Layer, factor: str) -> Tensor:
        everybody = padded(layer)
        if not self.renormalise:
            return super().middle(everybody, factor)
        side = ("A", "B").index(factor)
        own, shipped = layer.start.tensors()[factor], everybody.shipped(factor)
        blocks, first = [], 0
        for last in sorted({min(c.factors.rank, own.shape[side]) for c in layer.clients} | {own.shape[side]}):
            have = [k for k, c in enumerate(layer.clients) if c.factors.rank >= last]
            total = sum(layer.weights[k] for k in have)
            weights = [layer.weights[k] / total for k in have]
            rows = [t.narrow(side, first, last - first) for t in (*(shipped[k] for k in have), own)]
            blocks.append(self.center.of(weights, rows[:-1]) if have else rows[-1])
            first = last
        return torch.cat(blocks, dim=side)

    def choose(self, updates: Sequence[ClientUpdate]) -> Sequence[ClientUpdate]:
        """As the centre chooses among the padded updates."""
        alike = [replace(u, adapters=_as_large(u.adapters, updates)) for u in updates]
        chosen = {u.partition_id for u in self.center.choose(alike)}
        return [u for u in updates if u.partition_id in chosen]


def padded(layer: Layer) -> Layer:
    """The layer as if every client had the global rank: zeros where it has less, cut where it has more."""
    clients = [replace(c, adapter=_sized(c.factors, layer.start.rank)) for c in layer.clients]
    return replace(layer, clients=clients)


def _as_large(adapters: Adapters, updates: Sequence[ClientUpdate]) -> AdapterSet:
    largest = {name: max(u.adapters[name].rank for u in updates) for name in adapters}
    return {name: _sized(factors, largest[name]) for name, factors in lora_set(adapters).items()}


def _sized(factors: LoraFactors, rank: int) -> LoraFactors:
    return factors if factors.rank == rank else resize(factors, rank, factors.scaling)
