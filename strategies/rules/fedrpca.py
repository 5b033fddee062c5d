"""FedRPCA: of the clients' changes what they share is averaged, what is a client's own is scaled up as well.

Jhunjhunwala et al., "FedRPCA: Enhancing Federated LoRA Aggregation Using Robust PCA", arXiv 2506.01194 (of
which the abstract could be read); Candès, Li, Ma, Wright, "Robust Principal Component Analysis?", J. ACM
2011, for the split; `common` says how it is found.

    M = [vec(X_1 - X) .. vec(X_K - X)],    X one of A and B
    L, S = argmin ||L||_* + lam ||S||_1   where L + S = M,    lam = max(K, numbers)^(-1/2)
    X' = X + sum_k p_k L_k + beta sum_k p_k S_k

Choices where no text could be read: ``beta`` is one number for all rounds; M has the changes of one factor
of one layer, each client's own scaling folded into B; columns are not weighed, the means are. S is taken as
M - L, so that beta = 1 is FedAvg.

Not exact, as FedAvg is not; with beta > 1 the mean of what is a client's own counts more than it asks for.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fedlora.core.factors import LoraFactors
from fedlora.errors import ConfigError
from strategies.facts import Facts
from strategies.layer import Layer, Merged
from strategies.rule import Rule

PENALTY = 12.0
"""mu ||M||_2: singular values below ||M||_2 / 12 go in a step."""
RELAXATION = 1.7
"""How far a step goes, 1 being plain ADMM and 2 the end of what converges."""
TOLERANCE, MOST_STEPS = 1e-6, 500
ROWS = 8192
"""Of M, that a step does at once: with ten clients they stay in a processor's cache."""


@dataclass(frozen=True, kw_only=True)
class FedRPCARule(Rule):
    """A and B averaged apart, what is sparse in their changes scaled.

    Attributes:
        beta: how often the clients' own part counts, >= 0; 1 is FedAvg.
    """

    beta: float = 2.0

    facts: ClassVar[Facts] = Facts(
        name="fedrpca",
        title="FedRPCA",
        paper="Jhunjhunwala et al., arXiv 2506.01194",
        exact=False,
        mean=False,
        single_client_exact=False,
        secure_sum=False,
        up="r(o+i)",
        down="r(o+i)",
        deviation="of the paper the abstract could be read: beta is one number, and the split is that of "
        "principal component pursuit for each factor of a layer",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (math.isfinite(self.beta) and self.beta >= 0):
            raise ConfigError(f"strategy.options beta = {self.beta}: must be finite and >= 0")

    def merge(self, layer: Layer) -> Merged:
        start = layer.start
        A, B = (self._moved(start.tensors()[name], layer.shipped(name), layer.weights) for name in ("A", "B"))
        return Merged(LoraFactors(A, B, start.scaling))

    def _moved(self, start: Tensor, own: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
        """X', out of X and the clients' X_k."""
        M = torch.stack([(X - start).flatten() for X in own], dim=1).double()  # (numbers, clients)
        p = M.new_tensor(weights)
        shared = common(M) @ p
        change = shared + self.beta * (M @ p - shared)
        return start + change.view_as(start).to(start.dtype)


def common(M: Tensor) -> Tensor:
    """The low-rank part L of M (numbers, clients), by principal component pursuit.

    Algorithm 1 of Candès et al. (ADMM) with U = Y / mu, over-relaxed as of Eckstein and Bertsekas 1992, from
    the dual start of Lin, Chen, Ma, arXiv 1009.5055. Its own mu, ``n1 n2 / (4 ||M||_1)``, suits square M:
    after 500 steps, L of 65,536 x 10 random numbers is 16 % of ||M|| off.

        L = D(M - S + U)                        D: singular values less by 1 / mu, none below zero
        Z = S + U + RELAXATION (M - S - L)
        U = Z within +-lam / mu,  S = Z - U

    It ends at ``||M - S - L|| <= TOLERANCE ||M||`` or after MOST_STEPS; of what was measured,
    ``||L||_* + lam ||M - L||_1`` was then within 1e-6 of the least, and L within 1e-4 ||M|| of the L that has
    it. D is exact to rounding: right singular vectors come from X^T X (clients, clients), X = M - S + U,
    which errs only in values far below X's largest, and those D takes. A step goes through M and Z once, in
    blocks, and sums the next X^T X.
    """
    gram = M.T @ M  # (clients, clients)
    size, largest = float(M.norm()), math.sqrt(max(0.0, float(torch.linalg.eigvalsh(gram)[-1])))
    if largest == 0:
        return M
    lam, threshold = max(M.shape) ** -0.5, largest / PENALTY  # threshold: 1 / mu
    start = threshold / max(largest, float(M.abs().max()) / lam)  # U = start M is within lam / mu: S = 0
    Z, gram = start * M, (1 + start) ** 2 * gram  # Z: (numbers, clients)
    for _ in range(MOST_STEPS):
        gram, missed = _step(M, Z, _kept(gram, threshold), lam * threshold)
        if missed <= TOLERANCE * size:
            break
    return _unexplained(M, Z, lam * threshold) @ _kept(gram, threshold)


def _step(M: Tensor, Z: Tensor, kept: Tensor, most: float) -> tuple[Tensor, float]:
    """Z after a step, in place; the next X^T X (clients, clients), and ``||M - S - L||`` before it."""
    gram, squares = torch.zeros_like(kept), 0.0
    for at in range(0, len(M), ROWS):
        m, z = M[at : at + ROWS], Z[at : at + ROWS]  # (rows, clients)
        u = z.clamp(-most, most)
        missed = m - z + u  # M - S
        missed.addmm_(missed + u, kept, alpha=-1)  # less L
        z.add_(missed, alpha=RELAXATION)
        x = _unexplained(m, z, most)
        gram.addmm_(x.T, x)
        squares += float(missed.norm()) ** 2
    return gram, math.sqrt(squares)


def _unexplained(M: Tensor, Z: Tensor, most: float) -> Tensor:
    """X = M - S + U, as S + U = Z."""
    return Z.clamp(-most, most).mul_(2).add_(M).sub_(Z)


def _kept(gram: Tensor, threshold: float) -> Tensor:
    """V diag(1 - threshold / value) V^T (clients, clients): X times it is D(X)."""
    squares, V = torch.linalg.eigh(gram)
    values = squares.clamp_min(0.0).sqrt()
    kept: Tensor = (V * torch.where(values > threshold, (values - threshold) / values, 0.0)) @ V.T
    return kept
