"""RoLoRA: A and B are trained in turn, so that the mean of the trained factor is the mean of the products.

Chen et al., "Robust Federated Finetuning of LLMs via Alternating Optimization of LoRA", NeurIPS 2025
(arXiv 2502.01755).

    odd t:   A frozen,  B' = sum_k p_k (s_k / s) B_k,   A' = A
    even t:  B frozen,  A' = sum_k p_k A_k,             B' = B

Exact in every round: what is frozen has the same product at all clients, and ``B A_k`` (or ``B_k A``) is
linear in what is not. Half of FedAvg's traffic: up the factor that was trained, down the factor that was
trained in the round before; a client that was there holds the other, which rested with it. Who was away
receives both.

Rounds count from 1. B comes first, since B = 0 leaves A without a gradient. Each factor keeps its own
server momentum over the rounds in which it rests. With local AdamW the optimiser is new in every round.
Clients of unequal rank are refused.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from strategies.facts import Facts
from strategies.mean import MeanRule


@dataclass(frozen=True, kw_only=True)
class RoLoRARule(MeanRule):
    """One factor trained and averaged, the other frozen, in turn."""

    facts: ClassVar[Facts] = Facts(
        name="rolora",
        title="RoLoRA",
        paper="Chen et al., NeurIPS 2025, arXiv 2502.01755",
        any_kind=True,
        exact=True,
        mean=True,
        stale="A and B are trained by turns",
        secure_sum=True,
        up="r*o / r*i in turn",
        down="r*o / r*i in turn",
    )

    def trained(self, server_round: int) -> frozenset[str]:
        return frozenset({"B"}) if server_round % 2 else frozenset({"A"})
