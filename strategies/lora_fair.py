"""LoRA-FAIR: average A and B, then correct B so that B' A points where the true mean update points.

Bian et al., "LoRA-FAIR: Federated LoRA Fine-Tuning with Aggregation and Initialization Refinement",
ICCV 2025 (arXiv 2411.14961), the server problem for dB:

    A = sum_k p_k A_k,   B = sum_k p_k (s_k / s) B_k,   T = sum_k p_k s_k B_k A_k
    dB = argmin  1 - cos(T, (B + dB) A) + lam ||dB||_F^2,     A' = A,  B' = B + dB

Choices where the paper is silent or code differs: the similarity S is used as the dissimilarity
1 - cos, over the flattened layer; the norm is squared; dB starts at zero (a random start with the
paper's lam = 0.01 never forgets its noise).

Solved without the (out, in) matrix. With the thin SVD ``A = P S V^T``, of rank q:

    Y = (B + dB) P (out, q),   (B + dB) A = Y S V^T,   cos = <T V, Y S> / (||T|| ||Y S||)

dB outside span(P) costs and gains nothing, and Y stays in span[B P, T V]: a QR of those two leaves a
(2q, q) unknown. Its length does not enter the cosine, and the length nearest ``Y_0 = B P`` is known, so
only a direction y is searched, by L-BFGS in float64 (searching the length too fails at the size that B
really has: at ||B|| = 0.01 the penalty is 1e-6 of the cosine's curvature):

    y = argmin 1 - cos(T V, y S) ||T V|| / ||T|| + lam ||Y_0||^2 (1 - cos(Y_0, y)^2)

Not exact: only what T has in the row space of A can be repaired, ``cos <= ||T V|| / ||T||``; the rest
is dropped.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import minimize
from torch import Tensor

from fedlora.errors import ConfigError
from fedlora.factors import LoraFactors, Product, norm
from strategies.facts import Facts
from strategies.layer import Layer, Merged, mean_a, mean_b
from strategies.rule import Rule

Matrix = NDArray[np.float64]
Vector = np.ndarray[tuple[int], np.dtype[np.float64]]
ILL_CONDITIONED = 1e-6
"""Directions of A weaker than this times the strongest are left uncorrected."""


@dataclass(frozen=True, kw_only=True)
class LoRAFAIRRule(Rule):
    """A averaged, B averaged and corrected, the remainder dropped.

    Attributes:
        lam: the paper's lambda, >= 0; larger keeps B' nearer to the plain average.
    """

    lam: float = 0.01

    facts: ClassVar[Facts] = Facts(
        name="lora-fair",
        title="LoRA-FAIR",
        paper="Bian et al., ICCV 2025, arXiv 2411.14961",
        exact=False,
        mean=False,
        secure_sum=False,
        up="r(o+i)",
        down="r(o+i)",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (math.isfinite(self.lam) and self.lam >= 0):
            raise ConfigError(f"strategy.options lam = {self.lam}: must be finite and >= 0")

    def merge(self, layer: Layer) -> Merged:
        A, B = mean_a(layer), mean_b(layer)
        return Merged(LoraFactors(A, B + correction(A, B, layer.target, self.lam), layer.start.scaling))


def correction(A: Tensor, B: Tensor, target: Product, lam: float) -> Tensor:
    """The dB (out, r) that minimises ``1 - cos(target, (B + dB) A) + lam ||dB||^2``, found from dB = 0.

    Zero where the cosine is undefined (an A, a mean product or a target that vanishes), and where there
    is no minimum because the cosine wants a direction at a right angle to B or beyond, towards B' = 0.
    """
    P, S, Vh = torch.linalg.svd(A.double(), full_matrices=False)
    keep = ILL_CONDITIONED * S[0] < S
    P, S, V = P[:, keep], S[keep], Vh[keep].T
    start = B.double() @ P
    wanted = target.left.double() @ (target.right.double() @ V)
    tau, size = norm(target), float(start.norm())
    if tau == 0 or size == 0:
        return torch.zeros_like(B)
    basis, _ = torch.linalg.qr(torch.cat([start, wanted], dim=1))
    unit = (basis.T @ start).numpy() / size
    y = _best_direction(unit, (basis.T @ wanted).numpy() / tau, S.numpy(), lam * size**2)
    length = float((unit * y).sum() / (y * y).sum())
    if length <= 0:
        return torch.zeros_like(B)
    dB: Tensor = basis @ torch.from_numpy(size * (length * y - unit)) @ P.T
    return dB.to(B.dtype)


def _best_direction(unit: Matrix, wanted: Matrix, singular: Matrix, weight: float) -> Matrix:
    """The y (2q, q) of least ``1 - <wanted, y S> / ||y S|| + weight (1 - max(cos(unit, y), 0)^2)``."""

    def objective(flat: Vector) -> tuple[float, Vector]:
        y = flat.reshape(unit.shape)
        z, m = y * singular, float(np.linalg.norm(y))
        n = float(np.linalg.norm(z))
        cosine, along = float((wanted * z).sum() / n), max(float((unit * y).sum() / m), 0.0)
        slope = (wanted / n - cosine * z / n**2) * singular
        slope += 2 * weight * along * (unit / m - along * y / m**2)
        return 1.0 - cosine + weight * (1.0 - along**2), -slope.ravel()

    result = minimize(
        objective, unit.ravel(), jac=True, method="L-BFGS-B",
        options={"maxiter": 10_000, "maxfun": 50_000, "ftol": 1e-16, "gtol": 1e-12},
    )  # fmt: skip
    found: Matrix = result.x.reshape(unit.shape)
    return found
