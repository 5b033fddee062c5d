"""One adapted layer in one round: what a rule sees of it, and what it makes of it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import ClassVar

import torch
from torch import Tensor

from fedlora.core.adapters import LayerAdapter, as_lora
from fedlora.core.factors import LoraFactors, Product, Tensors, stack
from fedlora.core.seeding import torch_stream
from fedlora.core.state import ClientUpdate
from fedlora.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Weighted:
    """One client's adapter of one layer with its normalised weight p_k.

    Attributes:
        weight: p_k.
        adapter: after its local steps.
        partition_id: whose, for what a rule draws for each client.
    """

    weight: float
    adapter: LayerAdapter
    partition_id: int = -1

    @property
    def factors(self) -> LoraFactors:
        """The adapter as LoRA's factors."""
        return as_lora(self.adapter)


@dataclass(frozen=True)
class Layer:
    """One layer's round.

    Attributes:
        name: the module.
        adapter: the global adapter before the round.
        clients: the clients' adapters, in partition order, weights summing to 1.
        server_round: the round that is being aggregated, from 1.
        seed: the root seed of the run, for directions that the server draws.
        memory: what the rule kept of this layer, `Merged.memory` of the last round.
    """

    name: str
    adapter: LayerAdapter
    clients: Sequence[Weighted]
    server_round: int
    seed: int = 0
    memory: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def start(self) -> LoraFactors:
        """The global adapter as LoRA's factors."""
        return as_lora(self.adapter)

    @cached_property
    def stacked(self) -> Sequence[Weighted]:
        """The clients that are in `target`: not those whose product is zero, unless everybody's is."""
        return [c for c in self.clients if c.factors.B.any()] or self.clients[:1]

    @cached_property
    def target(self) -> Product:
        """``T = sum_k p_k s_k B_k A_k``, stacked: the product that the clients' mean asks for.

        Clients whose product is zero, as of a layer that they do not train, take no room in it.
        """
        return stack((c.weight, c.factors) for c in self.stacked)

    @property
    def weights(self) -> list[float]:
        return [c.weight for c in self.clients]

    def shipped(self, name: str) -> list[Tensor]:
        """The clients' A_k (r, in), or their ``(s_k / s) B_k`` (out, r), ``(s_k / s) R_k`` (r, r).

        Scalings are folded into B, and into the core where there is one; another kind's tensors have one.
        """
        tensors = [c.adapter.tensors()[name] for c in self.clients]
        if name == "A":
            return tensors
        s = self.adapter.scaling
        return [
            t if c.adapter.scaling == s else (c.adapter.scaling / s) * t
            for c, t in zip(self.clients, tensors, strict=True)
        ]

    def generator(self, purpose: str) -> torch.Generator:
        """A stream of the run's seed for this layer and round."""
        return torch_stream(self.seed, purpose, self.server_round, self.name)


@dataclass(frozen=True, slots=True)
class Merged:
    """A layer after aggregation: the next adapter, what moves into the base, and what is remembered."""

    adapter: LayerAdapter
    into_base: Product | None = None
    memory: Tensors = field(default_factory=dict)


def weighted_sum(weights: Iterable[float], tensors: Iterable[Tensor]) -> Tensor:
    """``sum_k w_k X_k``, added in the given order."""
    total: Tensor | None = None
    for weight, tensor in zip(weights, tensors, strict=True):
        total = weight * tensor if total is None else total.add_(tensor, alpha=weight)
    if total is None:
        raise ConfigError("there is no tensor to average")
    return total


@dataclass(frozen=True)
class Center:
    """Middle of the clients' tensors: the weighted mean. `strategies.robust` has the others."""

    name: ClassVar[str] = "mean"

    @property
    def is_mean(self) -> bool:
        """Whether every update counts, with its weight: a subclass is another middle."""
        return type(self) is Center

    def for_products(self) -> Center | None:
        """The same for a rule whose aggregate is no mean; None where there is no such thing."""
        return None

    def choose(self, updates: Sequence[ClientUpdate]) -> Sequence[ClientUpdate]:
        """The updates that count at all, in the given order."""
        return updates

    def of(self, weights: Sequence[float], tensors: Sequence[Tensor]) -> Tensor:
        """One tensor out of the clients' tensors of one name; weights sum to 1."""
        return weighted_sum(weights, tensors)


def mean_a(layer: Layer) -> Tensor:
    """``sum_k p_k A_k``, (r, in)."""
    return weighted_sum(layer.weights, layer.shipped("A"))


def mean_b(layer: Layer) -> Tensor:
    """``sum_k p_k (s_k / s) B_k``, (out, r): unequal scalings are folded into B."""
    return weighted_sum(layer.weights, layer.shipped("B"))
