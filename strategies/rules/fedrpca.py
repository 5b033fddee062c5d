"""FedRPCA: of the clients' changes what they share is averaged, what is a client's own is scaled up as well.

Jhunjhunwala et al., "FedRPCA: Enhancing Federated LoRA Aggregation Using Robust PCA", arXiv 2506.01194 (of
which the abstract could be read); Candès, Li, Ma, Wright, "Robust Principal Component Analysis?", J. ACM
2011, for the split and Algorithm 1, by which it is found.

    M = [vec(X_1 - X) .. vec(X_K - X)],    X one of A and B
    L, S = argmin ||L||_* + lam ||S||_1   where L + S = M,    lam = max(K, numbers)^(-1/2)
    X' = X + sum_k p_k L_k + beta sum_k p_k S_k

Choices where no text could be read: ``beta`` is one number for all rounds; M has the changes of one factor
of one layer, each client's own scaling folded into B; columns are not weighed, the means are. Algorithm 1
ends at its ``||M - L - S|| <= 1e-7 ||M||`` or after 500 steps, and S is then taken as M - L, so that beta = 1
is FedAvg.

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

TOLERANCE, MOST_STEPS = 1e-7, 500


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

    An SVD of M's height would be most of the work: M has as many columns as there are clients, so that the
    right singular vectors come from M^T M (clients, clients), which is exact to half of float64's digits, and
    the directions that it cannot tell from zero are those that the threshold takes anyway.
    """
    size, absolute = float(M.norm()), float(M.abs().sum())
    if size == 0:
        return M
    lam, mu = max(M.shape) ** -0.5, M.numel() / (4 * absolute)
    S, Y = torch.zeros_like(M), torch.zeros_like(M)
    for _ in range(MOST_STEPS):
        L = _with_smaller_values(M - S + Y / mu, 1 / mu)
        S = torch.nn.functional.softshrink(M - L + Y / mu, lam / mu)
        rest = M - L - S
        Y += mu * rest
        if float(rest.norm()) <= TOLERANCE * size:
            break
    return L


def _with_smaller_values(M: Tensor, threshold: float) -> Tensor:
    """M with each singular value less by the threshold, and none below zero."""
    squares, V = torch.linalg.eigh(M.T @ M)
    values = squares.clamp_min(0.0).sqrt()
    kept = torch.where(values > threshold, (values - threshold) / values, 0.0)
    found: Tensor = M @ ((V * kept) @ V.T)
    return found
