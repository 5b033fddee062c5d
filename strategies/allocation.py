"""Allocations: which layers or directions a round trains, a pure function of the state that `Rule` asks.

All clients train the same, so that every aggregation stays what it is: a layer at rest is asked for no
change, keeps its bits, its memory and its momentum, and costs no bytes; directions at rest likewise, see
`fedlora.core.directions`. No client's data decides, so that nothing is spent on it under differential
privacy.

An allocation is one class below and one entry of `ALLOCATIONS`; tests, refusals and keys follow from that.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, fields
from typing import Any, Protocol

import numpy as np

from fedlora.core.adapters import Adapters, lora_set
from fedlora.core.directions import Directions, sizes
from fedlora.core.factors import norm
from fedlora.core.seeding import stream
from fedlora.core.state import State
from fedlora.errors import ConfigError, unknown_name


class Allocation(Protocol):
    """Chooses layers; options are the fields of its class."""

    @property
    def name(self) -> str:
        """The value of ``strategy.allocation``."""

    @property
    def parts(self) -> bool:
        """Whether it lets directions of a layer rest beside others that train."""

    def check(self, adapters: Adapters) -> None:
        """Refuse a model that it cannot choose from.

        Raises:
            ConfigError: which option it is.
        """

    def modules(self, state: State) -> frozenset[str]:
        """The modules that the round after this state trains."""

    def directions(self, state: State) -> Directions:
        """The directions that it trains of the modules of which some rest."""


@dataclass(frozen=True, kw_only=True)
class All:
    """Every layer, every round."""

    @property
    def name(self) -> str:
        return "all"

    @property
    def parts(self) -> bool:
        return False

    def check(self, adapters: Adapters) -> None:
        pass

    def modules(self, state: State) -> frozenset[str]:
        return frozenset(state.adapters)

    def directions(self, state: State) -> Directions:
        return {}


@dataclass(frozen=True, kw_only=True)
class RandomLayers(All):
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

    def check(self, adapters: Adapters) -> None:
        count = len(blocks(adapters))
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


@dataclass(frozen=True, kw_only=True)
class SizedRanks(All):
    """A budget of directions over all layers, for those in which the global adapter is largest.

    AdaLoRA's budget (Zhang et al., ICLR 2023, arXiv 2303.10512) and IncreLoRA's growth (Zhang et al., 2023,
    arXiv 2308.12043) at the server, with what was aggregated in the place of clients' scores: direction j of
    layer l has the size ``s_l ||b_lj|| ||a_lj||``, a singular value among those directions that a rule wrote
    together by an SVD. After the warm-up, in which all directions train, a round trains

        explore ranks   of all directions, drawn uniformly, for ``period`` rounds the same;
        the others      the largest of those that were not drawn.

    What is not chosen rests: it stays in the model, where AdaLoRA prunes it, and can be drawn again. It is
    post-processing of what was released, and knows nothing that secure sums hide.

    Attributes:
        ranks: directions that a round trains, summed over layers; 0: half of all there are.
        warmup: first rounds, in which all directions train.
        explore: share of the budget that is drawn, above 0 and at most 1.
        period: rounds for which a draw holds, >= 1.
    """

    ranks: int = 0
    warmup: int = 1
    explore: float = 0.25
    period: int = 5

    def __post_init__(self) -> None:
        for key, least in (("ranks", 0), ("warmup", 0), ("period", 1)):
            if getattr(self, key) < least:
                given = getattr(self, key)
                raise ConfigError(f"strategy.allocation-options {key} = {given}: must be >= {least}")
        if not 0 < self.explore <= 1:
            raise ConfigError(f"strategy.allocation-options explore = {self.explore}: must be > 0 and <= 1")

    @property
    def name(self) -> str:
        return "sized-ranks"

    @property
    def parts(self) -> bool:
        return True

    def check(self, adapters: Adapters) -> None:
        count = sum(factors.rank for factors in lora_set(adapters).values())
        if self.ranks > count:
            raise ConfigError(
                f"strategy.allocation-options ranks = {self.ranks}: the model's adapters have {count} in all"
            )

    def modules(self, state: State) -> frozenset[str]:
        directions = self.directions(state)
        return frozenset(name for name in state.adapters if directions.get(name, (0,)))

    def directions(self, state: State) -> Directions:
        if state.round < self.warmup:
            return {}
        found = {name: sizes(factors).tolist() for name, factors in sorted(lora_set(state.adapters).items())}
        places = [(name, j) for name, own in found.items() for j in range(len(own))]
        budget = self.ranks or max(1, len(places) // 2)
        draw = stream(state.seed, self.name, (state.round - self.warmup) // self.period)
        order = [places[i] for i in draw.permutation(len(places))]
        drawn = math.ceil(self.explore * budget)
        largest = sorted(order[drawn:], key=lambda place: -found[place[0]][place[1]])
        chosen = {*order[:drawn], *largest[: budget - drawn]}
        training = {n: tuple(j for j in range(len(own)) if (n, j) in chosen) for n, own in found.items()}
        return {name: own for name, own in training.items() if len(own) < len(found[name])}


ALLOCATIONS: dict[str, type[All]] = {
    "all": All,
    "random-layers": RandomLayers,
    "sized-layers": SizedLayers,
    "sized-ranks": SizedRanks,
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
