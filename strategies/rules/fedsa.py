"""FedSA-LoRA: A is shared, B stays at home.

Guo et al., "Selective Aggregation for Low-Rank Adaptation in Federated Learning", ICLR 2025
(arXiv 2410.01463), Algorithm 1.

    A' = sum_k p_k A_k;     client k goes on from (A', B_k), its model is W_0 + s B_k A'

Clients train both factors and keep B_k between rounds, over rounds that they sit out too (here on the
client's own disk). There is no global model, so no aggregation is exact and the diagnostics measure nothing
of it: for the server, B stays at its start. The authors also keep the classifier local; that is
``model.head = "local"``, whatever the strategy.

A run ends with one adapter for each client, ``adapters/client-K/``, where their stores can be reached (in
simulation), and ``adapter/`` holds A with the mean of the B_k, a model for whom nobody trained.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from strategies.facts import Facts
from strategies.mean import MeanRule


@dataclass(frozen=True, kw_only=True)
class FedSALoRARule(MeanRule):
    """A averaged, B personal."""

    facts: ClassVar[Facts] = Facts(
        name="fedsa",
        title="FedSA-LoRA",
        paper="Guo et al., ICLR 2025, arXiv 2410.01463",
        uploaded=frozenset({"A"}),
        any_kind=True,
        exact=False,
        mean=True,
        stale="clients keep a part to themselves",
        secure_sum=True,
        up="r*i",
        down="r*i (start of B once)",
        deviation="the head is averaged, in the paper it stays at the client (model.head = 'local')",
    )
