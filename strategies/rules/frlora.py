"""FRLoRA: what a round changes goes into the base, and every round begins from the same principal factors.

Yan et al., "Federated Residual Low-Rank Adaption of Large Language Models", ICLR 2025; read in the abstract
and in the authors' code (github.com/IAMJackYan/FRLoRA, label_skew_ours.py and fed_global.py at 61264175).

    W_0 = U S V^T;   B_0 = U_r (S_r / s)^(1/2),   A_0 = (S_r / s)^(1/2) V_r^T,     W <- W_0 - s B_0 A_0
    A' = sum_k p_k A_k,   B' = sum_k p_k (s_k / s) B_k
    W <- W + s B' A' - s B_0 A_0 = W + s [B' - B_0, B_0] [A'; A' - A_0],     next start B_0, A_0

The start is ``strategy.init-a = 'pissa'`` (`fedlora.core.init_svd`). The update of a round has rank 2 r
at most, and the sum of all rounds any rank, while clients train the same principal directions of the
pre-trained weight again and again, which is to keep them from drifting apart.

Not exact: A and B are averaged apart, as in FedAvg, only the residual is not lost to the start. Not blind to
how a client splits its product.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from fedlora.core.factors import Product, bounded
from strategies.facts import Facts
from strategies.layer import Layer, Merged, mean_a, mean_b
from strategies.rule import Rule


@dataclass(frozen=True, kw_only=True)
class FRLoRARule(Rule):
    """The change of the averaged product into the base, the factors back to where they began."""

    facts: ClassVar[Facts] = Facts(
        name="frlora",
        title="FRLoRA",
        paper="Yan et al., ICLR 2025, openreview.net/forum?id=e0rQRMUhs7",
        exact=False,
        updates_base=True,
        mean=False,
        secure_sum=True,
        up="r(o+i)",
        down="2r(o+i) for each round missed, and r(o+i)",
        deviation="the paper's start is strategy.init-a = 'pissa', with another each round begins from that; "
        "clients count by their examples, in the released code alike",
    )

    def merge(self, layer: Layer) -> Merged:
        start = layer.start
        A, B = mean_a(layer), mean_b(layer)
        left = torch.cat([B - start.B, start.B], dim=1)
        right = start.scaling * torch.cat([A, A - start.A])
        return Merged(start, into_base=bounded(Product(left, right)))
