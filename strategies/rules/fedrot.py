"""FedRot-LoRA: each client's factors are rotated towards the last global factor, then averaged.

Zhang et al., "FedRot-LoRA: Mitigating Rotational Misalignment in Federated LoRA", ICML 2026
(arXiv 2602.23638). ``(B_k R)(R^T A_k) = B_k A_k`` for every orthogonal R, so factors may cancel in a mean
although the products agree. With A, B the global factors before round t, counted from 0:

    odd t:   R_k = argmin || R^T A_k - A ||_F   over R^T R = I, det R = 1  (orthogonal Procrustes)
    even t:  R_k = argmin || B_k R - B ||_F
    A_k <- Q_k^T A_k,   B_k <- B_k Q_k,    Q_k = the orthogonal matrix nearest to (1 - lam) I + lam R_k
    A' = sum_k p_k A_k,    B' = sum_k p_k (s_k / s) B_k

Solution: U S V^T = SVD(A_k A^T), or SVD(B_k^T B), in r x r; R_k = U V^T, with the sign of its weakest
direction turned where the determinant would be -1.

No product of a client changes, and no aligned factor moves away from its reference. Not exact: what is left
of the covariance of the factors is dropped. Bringing one factor together can pull the other apart, so that
while B is small the gap may even rise above FedAvg's. With lam = 1 the clients' own rotations (not
reflections) of a well-conditioned factor do not matter; lam = 0 is FedAvg.

lam > 1 is the authors' released default, 1.5: R_k is the best matrix of O(r), reflections among them
(``U V^T`` with no sign turned), and Q_k = R_k, whatever the number. The default here is lam = 0.5 with
rotations: the paper reports 0.4 to 0.6 as best, and only rotations can be softened, as a reflection has no
way to the identity.

Choices: the authors rotate at the clients, here the server does, from the same numbers. Where the reference
says nothing of some directions (B = 0, r > in), R_k is the identity on them; so a fresh adapter's first
round is left as it is, as in their code. Clients of unequal rank are refused.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fedlora.core.factors import LoraFactors
from fedlora.errors import ConfigError
from strategies.facts import Facts
from strategies.layer import Layer, Merged, weighted_sum
from strategies.rule import Rule

NEGLIGIBLE = 1e-7
"""Singular values below this share of the largest (float32 factors' rounding) say nothing of a direction."""


@dataclass(frozen=True, kw_only=True)
class FedRotLoRARule(Rule):
    """Factors aligned to the last global A or B in turn, then averaged apart.

    Attributes:
        lam: the paper's lambda, how far to rotate, from 0 (not at all, FedAvg) to 1; above 1 the whole of the
            best orthogonal matrix, reflections too, as in the authors' released default of 1.5.
    """

    lam: float = 0.5

    facts: ClassVar[Facts] = Facts(
        name="fedrot",
        title="FedRot-LoRA",
        paper="Zhang et al., ICML 2026, arXiv 2602.23638",
        exact=False,
        mean=False,
        stale="factors are turned to those of the round",
        first_round="FedAvg: B = 0 gives no direction to rotate to",
        secure_sum=False,
        up="r(o+i)",
        down="r(o+i)",
        deviation="lam = 0.5 and rotations alone, the paper's best; released is lam = 1.5, all of O(r); "
        "rotated at the server, not at the clients",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.lam < math.inf:
            raise ConfigError(
                f"strategy.options lam = {self.lam}: must be in [0, 1], or above it for all of O(r)"
            )

    def merge(self, layer: Layer) -> Merged:
        pairs = zip(layer.shipped("A"), layer.shipped("B"), strict=True)
        aligned = [align(A, B, layer.start, self.lam, to_a=layer.server_round % 2 == 0) for A, B in pairs]
        A = weighted_sum(layer.weights, (A for A, _ in aligned))
        B = weighted_sum(layer.weights, (B for _, B in aligned))
        return Merged(LoraFactors(A, B, layer.start.scaling))


def align(A: Tensor, B: Tensor, reference: LoraFactors, lam: float, *, to_a: bool) -> tuple[Tensor, Tensor]:
    """``(Q^T A, B Q)`` with the rotation Q that brings A to the reference's A, or else B to its B."""
    overlap = A.double() @ reference.A.double().T if to_a else B.double().T @ reference.B.double()  # (r, r)
    Q = softened(rotation(overlap, reflections=lam > 1), lam).to(A.dtype)
    return Q.T @ A, B @ Q


def rotation(overlap: Tensor, *, reflections: bool = False) -> Tensor:
    """The R of determinant 1 with the largest ``tr(R^T overlap)``, the identity where that is indifferent.

    Args:
        overlap: (r, r), of the client's factor with the reference.
        reflections: determinant -1 will do as well.
    """
    U, S, Vh = torch.linalg.svd(overlap)
    known = int((NEGLIGIBLE * S[0] < S).sum())  # directions in which the overlap decides
    if known < S.numel():
        left, _, right = torch.linalg.svd(U[:, known:].T @ Vh[known:].T)  # the rest: as near to I as it gets
        U = torch.cat([U[:, :known], U[:, known:] @ left], dim=1)
        Vh = torch.cat([Vh[:known], right @ Vh[known:]], dim=0)
    if not reflections and torch.linalg.det(U @ Vh) < 0:
        U = torch.cat([U[:, :-1], -U[:, -1:]], dim=1)
    R: Tensor = U @ Vh
    return R


def softened(R: Tensor, lam: float) -> Tensor:
    """The orthogonal matrix nearest to ``(1 - lam) I + lam R``; R itself for a lam of 1 or more."""
    if lam >= 1:
        return R
    U, _, Vh = torch.linalg.svd((1 - lam) * torch.eye(R.shape[0], dtype=R.dtype) + lam * R)
    Q: Tensor = U @ Vh
    return Q
