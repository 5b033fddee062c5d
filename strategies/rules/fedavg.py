"""FedAvg of LoRA factors, known as FedIT: A and B are averaged apart.

Zhang et al., "Towards Building the Federated GPT: Federated Instruction Tuning", ICASSP 2024
(arXiv 2305.05644); McMahan et al., AISTATS 2017, for the averaging itself.

    A' = sum_k p_k A_k,    B' = sum_k p_k (s_k / s) B_k

Notation: p_k = n_k / sum_j n_j over the sampled clients, s_k = alpha_k / r_k, s the global scaling.

Not exact: ``T - s B' A' = s sum_k p_k (B_k - B')(A_k - A')`` for equal scalings, the covariance of the
factors, is dropped. Not invariant under (B_k G, G^-1 A_k). Clients of unequal rank are refused.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from strategies.facts import Facts
from strategies.mean import MeanRule


@dataclass(frozen=True, kw_only=True)
class FedAvgRule(MeanRule):
    """A and B averaged apart, the remainder dropped."""

    facts: ClassVar[Facts] = Facts(
        name="fedavg",
        title="FedAvg / FedIT",
        paper="Zhang et al., ICASSP 2024, arXiv 2305.05644",
        any_kind=True,
        exact=False,
        mean=True,
        stale="factors",
        secure_sum=True,
        up="r(o+i)",
        down="r(o+i)",
    )
