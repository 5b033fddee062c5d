"""FedSVD that really adapts A: the weakest directions move into the base, fresh ones take their place.

A variant of this project; for FedSVD itself see `strategies.fedsvd` (arXiv 2505.12805). FedSVD only rotates
the row space of its first, random A: what the model needs outside of it can never be learned. Here, every
``period`` rounds, with ``U S V^T = SVD(B A)`` of the averaged B and n = ``renew``:

    base <- base + s U_w S_w V_w^T          (the n weakest directions w, exactly as they are)
    A'   =  [V_k^T; Q^T],   B' = [U_k S_k, 0]    (k the others; Q: n fresh orthonormal rows outside span(V))

Guaranteed: the round is exact (nothing of B A is lost, the new directions start at B = 0); A' has
orthonormal rows; clients still train and ship B alone, so that DP-SGD's noise stays linear in the product;
privacy costs nothing more, since the server only post-processes what it was sent, and draws Q from its own
seed. Over many rounds the update may have any rank: every round explores n directions that A did not have.

Not guaranteed: that the fresh directions are good ones. They are uniform outside span(V), because B alone
tells the server nothing about gradients there; a direction needs a round or two of training to show its
worth, and one that is slow to do so is frozen into the base (kept, but no longer trained). Costs: r (o + i)
down as FedSVD, and n (o + i) for each patch; the base moves, so that clients must apply patches.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from fedlora.errors import ConfigError
from fedlora.factors import LoraFactors, Product, Tensors
from strategies.facts import Facts
from strategies.fedsvd import refactored, turned_momentum
from strategies.layer import Layer, Merged
from strategies.mean import MeanRule


@dataclass(frozen=True, kw_only=True)
class FedSVDRenewRule(MeanRule):
    """A frozen within a round, B averaged, B A refactored, its weakest directions renewed.

    Attributes:
        renew: share of the rank that is renewed, in (0, 1]; at least one direction.
        period: renew every so many rounds, >= 1.
    """

    renew: float = 0.25
    period: int = 1

    facts: ClassVar[Facts] = Facts(
        name="fedsvd-renew",
        title="FedSVD, renewed",
        paper="variant of arXiv 2505.12805, this project",
        trains=frozenset({"B"}),
        ships=frozenset({"B"}),
        exact=True,
        moves_base=True,
        mean=True,
        turns=True,
        secure_sum=True,
        up="r*o",
        down="(r+n)(o+i)",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.renew <= 1:
            raise ConfigError(f"strategy.options renew = {self.renew}: must be in (0, 1]")
        if self.period < 1:
            raise ConfigError(f"strategy.options period = {self.period}: must be >= 1")

    def settle(self, layer: Layer, adapter: LoraFactors, memory: Tensors) -> Merged:
        if layer.server_round % self.period:
            return Merged(adapter, memory=memory)
        turned = refactored(adapter)
        kept = adapter.rank - max(1, round(self.renew * adapter.rank))
        weak = Product(turned.B[:, kept:], turned.scaling * turned.A[kept:])
        fresh = outside(turned.A, adapter.rank - kept, layer.generator("renew"))
        A = torch.cat([turned.A[:kept], fresh])
        B = turned.B.clone()
        B[:, kept:] = 0
        renewed = LoraFactors(A, B, turned.scaling)
        return Merged(renewed, into_base=weak, memory=turned_momentum(memory, adapter, renewed))


def outside(rows: torch.Tensor, count: int, generator: torch.Generator) -> torch.Tensor:
    """``count`` orthonormal rows at right angles to the given ones, drawn uniformly.

    Where the space has too few dimensions left they turn back into the span of the last of ``rows``, and
    beyond the number of dimensions they are zero.
    """
    in_features = rows.shape[1]
    drawn = torch.randn(min(count, in_features), in_features, generator=generator, dtype=torch.float64)
    held = rows.double()[: in_features - drawn.shape[0]]
    Q, R = torch.linalg.qr(torch.cat([held, drawn]).T)
    fresh = rows.new_zeros(count, in_features)
    fresh[: drawn.shape[0]] = (Q * R.diagonal().sign())[:, held.shape[0] :].T
    return fresh
