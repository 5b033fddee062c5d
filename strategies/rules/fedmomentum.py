"""FedMomentum: the strongest directions of the mean product stay warm, the others move into the base.

Yan et al., "FedMomentum: Preserving LoRA Training Momentum in Federated Fine-Tuning", 2026
(arXiv 2603.08014).

    T = sum_k p_k s_k B_k A_k = U S V^T
    A' = V_r^T,   B' = U_r S_r / s,     W <- W + sum_{j > r} sigma_j u_j v_j^T

FlexLoRA's adapter without its loss: what FlexLoRA drops is FedMomentum's patch, of rank R - r at most.
Clients go on from the directions they trained most, where FLoRA's begin again at B = 0.

Exact for any ranks and scalings, and blind to how a client splits its product. "Momentum" is the paper's
word for the warm start; no optimiser state is carried over. The paper takes a randomised SVD of the
(out, in) matrix; here it is the exact SVD of the stacked factors, which costs less. How the singular values
are shared between A and B is not settled by the abstract; here B has them all, as in FlexLoRA. Directions
that T lacks come from the start's A, at B = 0.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from fedlora.core.decompositions import completed, split
from strategies.facts import Facts
from strategies.layer import Layer, Merged
from strategies.rule import Rule


@dataclass(frozen=True, kw_only=True)
class FedMomentumRule(Rule):
    """The best rank-r approximation of the mean product, the remainder into the base."""

    facts: ClassVar[Facts] = Facts(
        name="fedmomentum",
        title="FedMomentum",
        paper="Yan et al., 2026, arXiv 2603.08014",
        exact=True,
        mixed_ranks=True,
        updates_base=True,
        product_invariant=True,
        mean=False,
        stale="products are cut to the rank after each round",
        secure_sum=True,
        sketched=True,
        up="r_k(o+i)",
        down="r_k(o+i)+(R-r)(o+i) for each round missed",
        deviation="read in the abstract alone: how A and B share the singular values could not be verified, "
        "here B has them all; the SVD is exact, not randomised",
    )

    def merge(self, layer: Layer) -> Merged:
        best, rest = split(layer.target, layer.start.rank, layer.start.scaling)
        adapter = completed(best, layer.start.A, layer.generator("missing-directions"))
        return Merged(adapter, into_base=rest if rest.rank_bound else None)
