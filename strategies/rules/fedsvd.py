"""FedSVD: as FFA-LoRA, but the server refactors B A by an SVD so that A becomes orthonormal.

"FedSVD: Adaptive Orthogonalization for Private Federated Learning with LoRA", NeurIPS 2025
(arXiv 2505.12805), Algorithm 1.

    B = sum_k p_k (s_k / s) B_k;   every ``period`` rounds:  U S V^T = SVD(B A),  A' = V_r^T,  B' = U_r S_r

Exact: all clients share one frozen A, and the refactorisation keeps the product. The paper takes the
SVD of the (out, in) matrix; here it is the QR core of the factors, the same result at O((o + i) r^2).

The paper freezes the head, a random one, with everything else; here that is ``model.head = "freeze"``,
and by default the head is trained and averaged as under the other rules, which changes GLUE numbers a lot.

What it is not: A' = W^T orth(A) for an r x r rotation W, so A never leaves the row space of its random
start. Under SGD (clipped or not) the trajectory of B A equals FFA-LoRA's from an orthonormal A;
with Adam-like optimisers, or before the first refactorisation of a Kaiming start, it differs.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from fedlora.core.decompositions import truncate
from fedlora.core.factors import LoraFactors, Tensors, as_product
from fedlora.errors import ConfigError
from strategies.facts import Facts
from strategies.layer import Layer, Merged
from strategies.mean import MeanRule
from strategies.server_optimizer import FIRST


@dataclass(frozen=True, kw_only=True)
class FedSVDRule(MeanRule):
    """A frozen within a round, B averaged, B A refactored.

    Attributes:
        period: refactor every so many rounds, >= 1; the paper found 1, 2, 5 and 10 alike.
    """

    period: int = 1

    facts: ClassVar[Facts] = Facts(
        name="fedsvd",
        title="FedSVD",
        paper="NeurIPS 2025, arXiv 2505.12805",
        trained=frozenset({"B"}),
        uploaded=frozenset({"B"}),
        exact=True,
        mean=True,
        stale="the basis A is another one after each round",
        rotates_basis=True,
        secure_sum=True,
        up="r*o",
        down="r(o+i)",
        deviation="the head is trained, in the paper it is frozen (model.head = 'freeze'); the SVD is exact, "
        "also where the paper's is randomised",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.period < 1:
            raise ConfigError(f"strategy.options period = {self.period}: must be >= 1")

    def settle(self, layer: Layer, adapter: LoraFactors, memory: Tensors) -> Merged:
        if layer.server_round % self.period:
            return Merged(adapter, memory=memory)
        turned = refactored(adapter)
        return Merged(turned, memory=turned_momentum(memory, adapter, turned))


def turned_momentum(memory: Tensors, before: LoraFactors, after: LoraFactors) -> Tensors:
    """Momentum of B in the basis of the new A: ``m A = m' A'``, so ``m' = m A A'^T`` for orthonormal A'."""
    return {name: m @ (before.A @ after.A.T) if name == f"{FIRST}/B" else m for name, m in memory.items()}


def refactored(factors: LoraFactors) -> LoraFactors:
    """The same product, with orthonormal rows of A in its old row space and orthogonal columns of B.

    Rows of zeros under B keep the SVD among the factors, so that A keeps all r directions where B A has
    fewer (softmax gradients, fewer outputs than r). Only r > in leaves rows of zeros.
    """
    missing = max(0, factors.rank + 1 - factors.out_features)  # rows that B lacks for a thin SVD of r + 1
    padded = replace(factors, B=torch.nn.functional.pad(factors.B, (0, 0, 0, missing)))
    found = truncate(as_product(padded), factors.rank, factors.scaling)
    return replace(found, B=found.B[: factors.out_features])
