"""Turns: one tensor of an adapter a round, of whatever kind the adapter is; RoLoRA for anything.

After Chen et al., "Robust Federated Finetuning of LLMs via Alternating Optimization of LoRA", NeurIPS 2025
(arXiv 2502.01755). For an adapter of tensors X_1 .. X_n, in round t, with j = 1 + (t - 1) mod n:

    X_j' = sum_k p_k X_kj,    all others rest

Exact wherever the weight is affine in each tensor alone, the others held, which is measured on the run's
own layers (`fedlora.server.exactness`). Of LoRA it is ``rolora``. LoHa's weight has four factors: here it is
exact, under ``rolora``, which trains three of them at once, it is not.

X_1 is what starts the update at zero, as the others have no gradient before it has moved. A layer without
tensor j rests in that round.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import ClassVar

from fedlora.core.adapters import TURNS, LayerAdapter, NamedTensors
from strategies.facts import Facts
from strategies.rules.rolora import RoLoRARule


@dataclass(frozen=True, kw_only=True)
class TurnsRule(RoLoRARule):
    """One tensor trained and averaged, the others frozen, in turn."""

    facts: ClassVar[Facts] = replace(
        RoLoRARule.facts,
        name="turns",
        title="Turns",
        paper="RoLoRA for adapters of any kind; cf. arXiv 2502.01755",
    )

    def trained_names(self, layers: Iterable[LayerAdapter], server_round: int) -> frozenset[str]:
        return frozenset().union(*[self._in_turn(layer, server_round) for layer in layers])

    def shipped_names(self, layers: Iterable[LayerAdapter], server_round: int) -> frozenset[str]:
        return self.trained_names(layers, server_round)

    def _in_turn(self, layer: LayerAdapter, server_round: int) -> frozenset[str]:
        if not isinstance(layer, NamedTensors):
            return super().trained_names([layer], server_round)
        turns = layer.parts[TURNS]
        return frozenset({turns[(server_round - 1) % len(turns)]}).intersection(layer.values)
