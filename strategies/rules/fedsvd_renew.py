"""FedSVD that really adapts A: the weakest directions move into the base, fresh ones take their place.

A variant of this project; for FedSVD itself see `strategies.rules.fedsvd` (arXiv 2505.12805). FedSVD only
rotates the row space of its first, random A: what the model needs outside of it can never be learned. Here,
every ``period`` rounds, with ``U S V^T = SVD(B A)`` of the averaged B and n = ``renew``:

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

from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from fedlora.core.decompositions import outside
from fedlora.core.factors import LoraFactors, Product, Tensors
from fedlora.errors import ConfigError
from strategies.facts import Facts
from strategies.layer import Layer, Merged
from strategies.rules.fedsvd import FedSVDRule, refactored, turned_momentum


@dataclass(frozen=True, kw_only=True)
class FedSVDRenewRule(FedSVDRule):
    """A frozen within a round, B averaged, B A refactored, its weakest directions renewed.

    Attributes:
        renew: share of the rank that is renewed, in (0, 1]; at least one direction.
        period: as in FedSVD; directions are renewed whenever B A is refactored.
    """

    renew: float = 0.25

    facts: ClassVar[Facts] = replace(
        FedSVDRule.facts,
        name="fedsvd-renew",
        title="FedSVD, renewed",
        paper="variant of arXiv 2505.12805, this project",
        updates_base=True,
        down="(r+n)(o+i)",
        deviation="A takes up fresh directions, in the paper it never leaves the row space of its start; the "
        "head as for fedsvd",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.renew <= 1:
            raise ConfigError(f"strategy.options renew = {self.renew}: must be in (0, 1]")

    def settle(self, layer: Layer, adapter: LoraFactors, memory: Tensors) -> Merged:
        if layer.server_round % self.period:
            return Merged(adapter, memory=memory)
        turned = refactored(adapter)
        renewed = max(1, round(self.renew * adapter.rank))
        kept = adapter.rank - renewed
        weak = Product(turned.B[:, kept:], turned.scaling * turned.A[kept:])  # (out, n) @ (n, in)
        left = turned.A[: max(kept, adapter.in_features - renewed)]  # all rows, unless there is no room
        A = torch.cat([turned.A[:kept], outside(left, renewed, layer.generator("renew"))])
        B = turned.B.clone()
        B[:, kept:] = 0
        after = LoraFactors(A, B, turned.scaling)
        return Merged(after, into_base=weak, memory=turned_momentum(memory, adapter, after))
