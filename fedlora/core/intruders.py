"""Intruder dimensions: singular vectors that an update brought to the top and the base weight does not have.

Shuttleworth, Andreas, Torralba, Sharma, "LoRA vs Full Fine-tuning: An Illusion of Equivalence", 2024 (arXiv
2410.21228). With W_0 = sum_l s_l x_l z_l^T and W_0 + Delta = sum_j t_j u_j v_j^T, u_j is an intruder if

    max_l |<u_j, x_l>| < threshold,    j <= top

and they are found beside forgetting. Taking them down to a share keeps ``share`` of each:

    Delta' = Delta - (1 - share) sum_{intruders j} t_j u_j v_j^T

so that share 1 changes nothing and share 0 takes them out whole. All weights are (out, in): layers that store
(in, out), such as transformers' Conv1D, must be turned before.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fedlora.core.factors import Product, add, scale

TOP, THRESHOLD = 10, 0.5


@dataclass(frozen=True, slots=True)
class Intruders:
    """Intruders of one layer.

    Attributes:
        count: how many among the first ``top``.
        top: of how many singular vectors, at most `TOP`.
        part: ``sum t_j u_j v_j^T`` over them; None where there is none.
    """

    count: int
    top: int
    part: Product | None


def intruders(weight: Tensor, update: Product, top: int = TOP, threshold: float = THRESHOLD) -> Intruders:
    """Intruders of a layer, in float64.

    Args:
        weight: W_0 (out, in).
        update: Delta.
        top: how many singular vectors are looked at.
        threshold: the cosine below which none of W_0's is like it.
    """
    base = weight.double()
    X = torch.linalg.svd(base, full_matrices=False).U  # (out, q)
    U, t, Vh = torch.linalg.svd(base + update.left.double() @ update.right.double(), full_matrices=False)
    top = min(top, t.numel())
    nearest = (X.T @ U[:, :top]).abs().amax(dim=0)  # (top,)
    found = (nearest < threshold).nonzero().flatten()
    if not len(found):
        return Intruders(0, top, None)
    left, right = (U[:, found] * t[found]).to(update.left.dtype), Vh[found].to(update.right.dtype)
    return Intruders(len(found), top, Product(left, right))


def reduced(update: Product, found: Intruders, share: float) -> Product:
    """The update with ``share`` of each intruder left."""
    return update if found.part is None else add(update, scale(share - 1.0, found.part))
