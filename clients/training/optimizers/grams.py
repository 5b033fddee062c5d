"""Gram matrices of factors, their pseudo-inverses, and one factor's nearest step to the full gradient."""

from __future__ import annotations

import torch
from torch import Tensor

from clients.training.optimizers.local import Layer


def nearest(layer: Layer, letter: str, damping: float = 0.0) -> Tensor:
    """The change of one factor alone by which the product comes nearest to the full gradient.

        A: H g_A / s^2,    B: g_B K / s^2,    R: H g_R K / s^2,    H = (B^T B)^-1, K = (A A^T)^-1

    beside a core, B R takes the place of B, and R A that of A.

    Args:
        layer: its gradients are there.
        letter: of the factor.
        damping: added to each Gram matrix, as a share of its largest eigenvalue.
    """
    A, B, R = layer.factors["A"], layer.factors["B"], layer.factors.get("R")
    found = layer.gradients[letter] / layer.scaling**2
    if letter in "AR":
        left = B if R is None or letter == "R" else B @ R
        beta, U = spectrum(left.mT @ left, damping)
        found = U @ (inverse(beta) * (U.mT @ found))
    if letter in "BR":
        right = A if R is None or letter == "R" else R @ A
        alpha, V = spectrum(right @ right.mT, damping)
        found = ((found @ V) * inverse(alpha).mT) @ V.mT
    return found


def spectrum(gram: Tensor, damping: float = 0.0) -> tuple[Tensor, Tensor]:
    """Eigenvalues (..., r), those that are rounding alone as 0, and eigenvectors (..., r, r).

    ``damping`` times the largest is added to all but such zeros.

    One client's overflow must not stop the others' decomposition: it gets zeros here, and stays what it is
    in the products.
    """
    finite = gram.isfinite().all(-1, keepdim=True).all(-2, keepdim=True)
    values, vectors = torch.linalg.eigh(torch.where(finite, gram, 0.0))
    floor = values[..., -1:] * gram.shape[-1] * torch.finfo(gram.dtype).eps
    return torch.where(values > floor, values + damping * values[..., -1:], 0.0), vectors


def inverse(values: Tensor) -> Tensor:
    """Reciprocals as a column, (..., r, 1)."""
    return reciprocal(values).unsqueeze(-1)


def reciprocal(values: Tensor) -> Tensor:
    """1 / x, and 0 for 0."""
    return torch.where(values > 0, 1 / values, 0.0)
