"""FedEx-LoRA: A and B are averaged apart, and what the averages miss moves into the base.

Singhal et al., "FedEx-LoRA: Exact Aggregation for Federated and Efficient Fine-Tuning of Large Language
Models", ACL 2025 (arXiv 2410.09432).

    A' = sum_k p_k A_k,   B' = sum_k p_k (s_k / s) B_k,     W <- W + (T - s B' A')

The residual is never multiplied out. As ``sum_k p_k ((s_k / s) B_k - B') = 0``, any common A_c may be taken
from every A_k; with a client's own A as A_c, that client's term vanishes:

    T - s B' A' = [(s_k / s) B_k - B'] [p_k s (A_k - A_c)],   k != c

No QR, no SVD, m r (o + i) operations, rank (m - 1) r. Clients of lower rank are padded with zeros, as in
`strategies.rules.zero_padding`; with a client of the lowest rank as c all rows of zeros drop out again, and
the rank is R - r_c, never more than either (m - 1) max r_k or the R + r of [B_k, B'] [p_k s_k A_k; -s A'].
Where even that is more than the layer has rows or columns, the residual travels as the smaller identity
times the matrix.

Exact for any ranks and scalings; the effective weight is blind to how a client splits its product, the next
adapter is not. The paper weighs clients alike, here p_k = n_k / sum_j n_j. The authors' code adds the
residual transposed, which is right for GPT-2's Conv1D only (on square layers it goes unnoticed); patches here
are (out, in), and the model turns them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fedlora.core.factors import LoraFactors, Product, bounded
from strategies.facts import Facts
from strategies.layer import Layer, Merged, Weighted, mean_a, mean_b
from strategies.rule import Rule
from strategies.rules.zero_padding import padded


@dataclass(frozen=True, kw_only=True)
class FedExLoRARule(Rule):
    """A and B averaged apart, the remainder into the base."""

    facts: ClassVar[Facts] = Facts(
        name="fedex",
        title="FedEx-LoRA",
        paper="Singhal et al., ACL 2025, arXiv 2410.09432",
        exact=True,
        mixed_ranks=True,
        updates_base=True,
        product_invariant=True,
        mean=False,
        secure_sum=False,
        up="r_k(o+i)",
        down="r_k(o+i)+(R-r)(o+i) for each round missed",
        deviation="clients count by their examples, in the paper alike; the released code adds the residual "
        "transposed, here it is not",
    )

    def merge(self, layer: Layer) -> Merged:
        everybody = padded(layer)
        mean = LoraFactors(mean_a(everybody), mean_b(everybody), layer.start.scaling)
        rest = residual(layer.clients, mean)
        moved = rest.left.any() and rest.right.any()
        return Merged(mean, into_base=rest if moved else None)


def residual(clients: Sequence[Weighted], mean: LoraFactors) -> Product:
    """``sum_k p_k s_k B_k A_k - s B' A'`` in factors, of rank sum_k r_k - min_k r_k where no r_k > r."""
    lowest = min(range(len(clients)), key=lambda k: clients[k].factors.rank)
    common = clients[lowest].factors.A[: mean.rank]
    lefts, rights = [], []
    for k, client in enumerate(clients):
        f, vanishes = client.factors, min(mean.rank, client.factors.rank) if k == lowest else 0
        left = (f.scaling / mean.scaling) * f.B - _sized(mean.B.T, f.rank).T  # (out, r_k)
        right = (client.weight * mean.scaling) * (f.A - _sized(common, f.rank))  # (r_k, in)
        lefts.append(left[:, vanishes:])  # the reference client's own A is `common`: its rows are 0
        rights.append(right[vanishes:])
    return bounded(Product(torch.cat(lefts, dim=1), torch.cat(rights, dim=0)))


def _sized(rows: Tensor, rank: int) -> Tensor:
    """The leading ``rank`` rows, zeros where there are fewer."""
    return torch.nn.functional.pad(rows[:rank], (0, 0, 0, max(0, rank - rows.shape[0])))
