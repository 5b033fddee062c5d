"""raFLoRA: the clients' products are averaged rank by rank, each over those who have it.

Wu, Hu, Min, Wang, "Preventing Rank Collapse in Federated Low-Rank Adaptation with Client Heterogeneity", 2026
(arXiv 2602.13486). With b_kj the column j of B_k and a_kj the row j of A_k, j from 1 to r_k,

    P_j = sum_{k: r_k >= j} p_k,     T = sum_j sum_{k: r_k >= j} (p_k / P_j) s_k b_kj a_kj^T = U S V^T,
    A' = V_r^T,   B' = U_r S_r / s

and a client of rank r_k starts from the leading r_k directions, as in FlexLoRA. There column j counts with
p_k alone: a direction that only a share P_j of the clients holds comes back P_j times as long from every
round, even where nobody moves it, so that the energy ends in the ranks that all clients share (the paper's
rank collapse). Here clients that return what they were sent leave the model as it is.

The paper weighs blocks of ranks between the clients' different ranks; within a block all columns have the
same P_j. Not exact: T is no mean of products, and ``sum_{j > r} sigma_j^2`` is dropped. With equal ranks it
is FlexLoRA. Columns are told apart by their place, so that it matters how a client splits its product.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from fedlora.core.factors import LoraFactors, Product
from strategies.facts import Facts
from strategies.layer import Layer, Merged
from strategies.rules.flexlora import FlexLoRARule, leading


@dataclass(frozen=True, kw_only=True)
class RaFLoRARule(FlexLoRARule):
    """Products averaged rank by rank over the clients that have it, the best rank-r approximation kept."""

    facts: ClassVar[Facts] = replace(
        FlexLoRARule.facts,
        name="raflora",
        title="raFLoRA",
        paper="Wu et al., 2026, arXiv 2602.13486",
        product_invariant=False,
        secure_sum=False,
        sketched=False,
        deviation="read in the abstract and the introduction alone; ranks that nobody of a round has stay as "
        "they are, and directions that T lacks are filled at B = 0, of which what was read says nothing",
    )

    def merge(self, layer: Layer) -> Merged:
        return Merged(leading(layer, balanced(layer)))


def balanced(layer: Layer) -> Product:
    """``T``, stacked; ranks that nobody has are the global adapter's own."""
    clients = [(c.weight, c.factors.folded()) for c in layer.clients]
    highest = max(f.rank for _, f in clients)
    shares = [math.fsum(p for p, f in clients if f.rank > j) for j in range(highest)]  # P_j, from j = 0
    terms = [(f, [p / share for share in shares[: f.rank]]) for p, f in clients]
    rest = layer.start.folded()
    rest = LoraFactors(rest.A[highest:], rest.B[:, highest:], rest.scaling)
    terms.append((rest, [1.0] * rest.rank))
    return Product(
        torch.cat([f.B for f, _ in terms], dim=1),  # (out, R)
        torch.cat([f.scaling * f.A.new_tensor(w)[:, None] * f.A for f, w in terms], dim=0),  # (R, in)
    )
