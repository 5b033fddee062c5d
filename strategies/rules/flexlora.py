"""FlexLoRA: the clients' products are averaged, and the best rank-r approximation goes back to them.

Bai et al., "Federated Fine-tuning of Large Language Models under Heterogeneous Tasks and Client
Resources", NeurIPS 2024 (arXiv 2402.11505), Section 3.

    T = sum_k p_k s_k B_k A_k = U S V^T,     A' = V_r^T,   B' = U_r S_r / s

and a client of rank r_k starts from the leading r_k directions: ``s_k B_k A_k`` is then the best rank-r_k
approximation of T. The SVD is that of the stacked factors, the paper's dense one at O((o + i) R^2).

Not exact: with sigma_j the singular values of T, ``sum_{j > r} sigma_j^2`` is dropped (diagnostics:
``energy_lost``), for a client of rank r_k also what lies between r_k and r. Exact where r is at least the
rank of T. Each round drops again, so that the energy gathers in the ranks that all clients share.

As in the authors' code all singular values go into B. Its aggregation has alpha = 16 written into it, here
every s_k is the client's own. Directions that T lacks come from the start's A, at B = 0, so that clients
can train them (the paper is silent; zeros would stay zeros).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from fedlora.core.decompositions import completed, split
from fedlora.core.factors import LoraFactors, Product
from strategies.facts import Facts
from strategies.layer import Layer, Merged
from strategies.rule import Rule


@dataclass(frozen=True, kw_only=True)
class FlexLoRARule(Rule):
    """The best rank-r approximation of the mean product, the remainder dropped."""

    facts: ClassVar[Facts] = Facts(
        name="flexlora",
        title="FlexLoRA",
        paper="Bai et al., NeurIPS 2024, arXiv 2402.11505",
        exact=False,
        mixed_ranks=True,
        product_invariant=True,
        mean=False,
        stale="products are cut to the rank after each round",
        secure_sum=True,
        sketched=True,
        up="r_k(o+i)",
        down="r_k(o+i)",
        deviation="each client's own alpha counts, where the released code has 16 written in; directions "
        "that the mean lacks are filled at B = 0, of which the paper says nothing",
    )

    def merge(self, layer: Layer) -> Merged:
        return Merged(leading(layer, layer.target))


def leading(layer: Layer, product: Product) -> LoraFactors:
    """The leading directions of a product, those that it lacks from the start's A at B = 0."""
    best, _ = split(product, layer.start.rank, layer.start.scaling)
    return completed(best, layer.start.A, layer.generator("missing-directions"))
