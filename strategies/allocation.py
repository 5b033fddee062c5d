"""Allocations: which layers a round trains, a pure function of the state that `Rule` asks.

All clients train the same layers, so that every aggregation stays what it is: a layer at rest is asked for no
change, keeps its bits, its memory and its momentum, and costs no bytes. No client's data decides, so that
nothing is spent on it under differential privacy.

An allocation is one class below and one entry of `ALLOCATIONS`; tests, refusals and keys follow from that.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, fields
from typing import Any, Protocol

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


ALLOCATIONS: dict[str, type[All] | type[RandomLayers]] = {"all": All, "random-layers": RandomLayers}
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
