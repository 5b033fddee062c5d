"""Rules whose aggregate is a mean of what is shipped; server optimisers and robust centres compose with all.

    X' = step(X, center_k X_k)    for each shipped tensor X of a layer, and for each tensor of the head

with `Center` the weighted mean or a robust one, and `ServerOptimizer` the step. What a rule then makes of
(A', B') is `MeanRule.settle`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor

from fedlora.core.factors import LoraFactors, Tensors
from fedlora.core.state import ClientUpdate, State
from fedlora.errors import ConfigError, NotApplicable
from strategies.checks import check_heads
from strategies.layer import Layer, Merged
from strategies.rule import Rule
from strategies.server_optimizer import LINEAR, ServerOptimizer


@dataclass(frozen=True, kw_only=True)
class MeanRule(Rule):
    """A subclass declares ``facts`` and, where it does more than average, defines `settle`.

    Attributes:
        optimizer: how the server moves there.

    Raises:
        ConfigError: a step by coordinate under a rule that turns the basis: a second moment per coordinate
            has no meaning in another basis.
        NotApplicable: a server optimiser where directions rest.
    """

    optimizer: ServerOptimizer = field(default_factory=ServerOptimizer)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.optimizer.plain and self.allocation.parts:
            raise NotApplicable(
                f"strategy.allocation = {self.allocation.name!r}: strategy.server-optimizer = "
                f"{self.optimizer.name!r} has a momentum for each number, and others train in each round"
            )
        if self.facts.rotates_basis and self.optimizer.by_coordinate:
            raise ConfigError(
                f"strategy.server-optimizer = {self.optimizer.name!r}: {self.facts.name} turns the basis of "
                f"the factors each round, accepted are {', '.join(LINEAR)}"
            )

    @property
    def plain(self) -> bool:
        return super().plain and self.optimizer.plain

    def settle(self, layer: Layer, adapter: LoraFactors, memory: Tensors) -> Merged:
        """The next adapter of LoRA, given the stepped mean; ``memory`` is the optimiser's."""
        return Merged(adapter, memory=memory)

    def middle(self, layer: Layer, name: str) -> Tensor:
        """The centre of one tensor over the clients, in the shape of the global one."""
        return self.center.of(layer.weights, layer.shipped(name))

    def merge(self, layer: Layer) -> Merged:
        tensors, memory = layer.adapter.tensors(), dict(layer.memory)
        shipped = self.shipped_names([layer.adapter], layer.server_round)
        for name in sorted(shipped & tensors.keys()):
            center = self.middle(layer, name)
            tensors[name], kept = self.optimizer.step(name, tensors[name], center, layer.memory)
            memory |= kept
        adapter = layer.adapter.replaced(tensors)
        return (
            self.settle(layer, adapter, memory)
            if isinstance(adapter, LoraFactors)
            else Merged(adapter, memory=memory)
        )

    def merge_head(
        self, state: State, updates: Sequence[ClientUpdate], weights: Sequence[float]
    ) -> tuple[Tensors, Tensors]:
        head, kept, before = dict(state.head), Tensors(), self.kept(state, "head")
        for name in check_heads(state.head, updates):
            center = self.center.of(weights, [update.head[name] for update in updates])
            head[name], memory = self.optimizer.step(name, state.head[name], center, before)
            kept |= memory
        return head, kept
