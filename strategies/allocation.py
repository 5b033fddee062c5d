"""Allocations: which layers a round trains, a pure function of the state that `Rule` asks.

All clients train the same layers, so that every aggregation stays what it is: a layer at rest is asked for no
change, keeps its bits, its memory and its momentum, and costs no bytes. No client's data decides, so that
nothing is spent on it under differential privacy.

An allocation is one class below and one entry of `ALLOCATIONS`; tests, refusals and keys follow from that.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, fields
from typing import Any, Protocol

import numpy as np

from fedlora.core.factors import norm
from fedlora.core.seeding import stream
from fedlora.core.state import State
from fedlora.errors import ConfigError, unknown_name


class Allocation(Protocol):
    """Chooses layers; options are the fields of its class."""

    @property
    def name(self) -> str:
        """The value of ``strategy.allocation``."""

    def check(self, modules: Collection[str]) -> None:
        """Refuse a model that it cannot choose from.

        Raises:
            ConfigError: which option it is.
        """

    def modules(self, state: State) -> frozenset[str]:
        """The modules that the round after this state trains."""


@dataclass(frozen=True, kw_only=True)
class All:
    """Every layer, every round."""

    @property
    def name(self) -> str:
        return "all"

    def check(self, modules: Collection[str]) -> None:
        pass

    def modules(self, state: State) -> frozenset[str]:
        return frozenset(state.adapters)


@dataclass(frozen=True, kw_only=True)
class RandomLayers:
    """Some transformer blocks, drawn anew for each round from the run's seed.

    Pan et al., "LISA: Layerwise Importance Sampling for Memory-Efficient Large Language Model Fine-Tuning",
    NeurIPS 2024 (arXiv 2403.17919), with a round in the place of its period: blocks are drawn uniformly,
    alike for all clients. There the whole weights of a block are trained, and embeddings and head always; it
    is the block's adapters here, and the head.

    Attributes:
        layers: how many blocks, >= 1.
    """

    layers: int = 2

    def __post_init__(self) -> None:
        if self.layers < 1:
            raise ConfigError(f"strategy.allocation-options layers = {self.layers}: must be >= 1")

    @property
    def name(self) -> str:
        return "random-layers"

    def check(self, modules: Collection[str]) -> None:
        count = len(blocks(modules))
        if self.layers > count:
            raise ConfigError(
                f"strategy.allocation-options layers = {self.layers}: the model has {count} blocks with "
                "adapters"
            )

    def modules(self, state: State) -> frozenset[str]:
        found = blocks(state.adapters)
        drawn = stream(state.seed, "random-layers", state.round + 1).permutation(len(found))[: self.layers]
        names = sorted(found)
        return frozenset(module for place in drawn for module in found[names[place]])


@dataclass(frozen=True, kw_only=True)
class SizedLayers(RandomLayers):
    """Some transformer blocks, drawn the more often the further the global model has moved them.

    In place of clients' own scores (DiffoRA, TriAdaptLoRA, IncreLoRA), which would cost privacy, the size of
    what was aggregated: with D_l the change of layer l since the pristine base, block b is drawn with

        p_b = explore / N + (1 - explore) size_b / sum_c size_c

    with size_b^2 the mean of the squared entries of D_l over its layers, and without replacement; uniformly
    while nothing has moved. It is post-processing of what was released, and knows nothing that secure sums
    hide.

    Attributes:
        layers: how many blocks, >= 1.
        explore: share of the probability that all blocks have alike, above 0 and at most 1.
    """

    explore: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.explore <= 1:
            raise ConfigError(f"strategy.allocation-options explore = {self.explore}: must be > 0 and <= 1")

    @property
    def name(self) -> str:
        return "sized-layers"

    def modules(self, state: State) -> frozenset[str]:
        found = blocks(state.adapters)
        names = sorted(found)
        sizes = np.array([_size(state, found[name]) for name in names])
        even = np.full(len(names), 1 / len(names))
        share = sizes / sizes.sum() if sizes.sum() > 0 else even
        draw = stream(state.seed, self.name, state.round + 1)
        chances = self.explore * even + (1 - self.explore) * share
        drawn = draw.choice(len(names), self.layers, replace=False, p=chances / chances.sum())
        return frozenset(module for place in drawn for module in found[names[place]])


def _size(state: State, modules: Collection[str]) -> float:
    """Root mean square of the entries by which some layers differ from the pristine base."""
    products = [state.product(name) for name in modules]
    entries = sum(p.left.shape[0] * p.right.shape[1] for p in products)
    return math.sqrt(sum(norm(p) ** 2 for p in products) / entries)


ALLOCATIONS: dict[str, type[All] | type[RandomLayers] | type[SizedLayers]] = {
    "all": All,
    "random-layers": RandomLayers,
    "sized-layers": SizedLayers,
}
"""By the value of ``strategy.allocation``."""


def make_allocation(name: str, options: Mapping[str, Any] | None = None) -> Allocation:
    """The allocation of that name with its options.

    Raises:
        ConfigError: an unknown name or option, or a value that it refuses.

    >>> make_allocation("random-layers", {"layers": 1})
    RandomLayers(layers=1)
    """
    if name not in ALLOCATIONS:
        raise unknown_name("strategy.allocation", name, ALLOCATIONS)
    own = {field.name: field for field in fields(ALLOCATIONS[name])}
    for key, value in (options or {}).items():
        if key not in own or type(value) is not type(own[key].default):
            accepted = ", ".join(f"{k} ({type(f.default).__name__})" for k, f in own.items()) or "none"
            raise ConfigError(f"strategy.allocation-options {key} = {value!r}: {name} accepts {accepted}")
    return ALLOCATIONS[name](**(options or {}))


def blocks(modules: Collection[str]) -> dict[str, list[str]]:
    """Modules by transformer block: their names up to the first number; those without one are their own.

    >>> blocks(["h.0.query", "h.0.output", "pooler.dense"])
    {'h.0': ['h.0.query', 'h.0.output'], 'pooler.dense': ['pooler.dense']}
    """
    found: dict[str, list[str]] = {}
    for module in modules:
        block = re.match(r"(?:.*?\.)?\d+(?=\.|$)", module)
        found.setdefault(block[0] if block else module, []).append(module)
    return found
