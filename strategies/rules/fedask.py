"""FedASK: a randomised SVD of the mean product, its singular values shared between the two factors.

Wen et al., "Differentially Private Federated Low Rank Adaptation Beyond Fixed-Matrix", NeurIPS 2025
(arXiv 2507.09990); read in the abstract and the authors' code (FLEECERmw/PrivacyFedLLM,
policy/policy_fedask.py at c3d2c4c), which takes

    Y = sum_k p_k B_k A_k O,          Q = orth(Y)                        O (in, q) drawn once, for all rounds
    Q^T sum_k p_k B_k A_k = U S V^T,  B' = Q U_r S_r^1/2,  A' = S_r^1/2 V_r^T

each sum in an exchange of its own, of what clients trained; privately that is DP-SGD on both factors, and all
of this is post-processing. Here the server has the products, or in secure sums the sketches of
`fedlora.core.sketch`, and takes both steps by itself: the result is the same, and nobody who vanishes between
two exchanges is shown.

Not exact, as FlexLoRA is not: what T has beyond rank r is dropped, and with q below the rank of T some of the
rest. Where q is at least that rank the global model is FlexLoRA's; what differs is that both factors have the
same lengths, so that clients' optimisers move them alike. The code's settings have q = r = 16, and 64 in a
comment beside; it has no scaling, as all have one: here each s_k is in T, and s is divided out of S.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from fedlora.core.factors import LoraFactors, Product
from fedlora.core.seeding import torch_stream
from fedlora.errors import ConfigError
from strategies.facts import Facts
from strategies.layer import Layer, Merged
from strategies.rules.flexlora import FlexLoRARule, leading


@dataclass(frozen=True, kw_only=True)
class FedASKRule(FlexLoRARule):
    """The best rank-r approximation of the sketched mean product, evenly in both factors.

    Attributes:
        sketch: columns of O, q; 0: no fewer than T has directions, which loses nothing.
    """

    sketch: int = 0

    facts: ClassVar[Facts] = replace(
        FlexLoRARule.facts,
        name="fedask",
        title="FedASK",
        paper="Wen et al., NeurIPS 2025, arXiv 2507.09990",
        deviation="read in abstract and authors' code, whose sketch has r columns: by default it loses "
        "nothing; the server sketches what clients send, in one exchange in place of two",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.sketch < 0:
            raise ConfigError(f"strategy.options sketch = {self.sketch}: must be >= 0")

    def merge(self, layer: Layer) -> Merged:
        merged = leading(layer, self._sketched(layer))
        length = torch.linalg.vector_norm(merged.B, dim=0)  # sigma_j / s, 0 where T lacks a direction
        share = torch.where(length > 0, length, 1.0).sqrt()  # (r,)
        return Merged(LoraFactors(share[:, None] * merged.A, merged.B / share, merged.scaling))

    def _sketched(self, layer: Layer) -> Product:
        T = layer.target
        if not 0 < self.sketch < min(T.rank_bound, *layer.start.shape):
            return T
        drawn = torch_stream(layer.seed, "sketch", layer.name)
        omega = torch.randn(
            layer.start.in_features, self.sketch, generator=drawn, dtype=torch.float64
        )  # (in, q)
        left, right = T.left.double(), T.right.double()
        Q = torch.linalg.qr(left @ (right @ omega)).Q  # (out, q)
        return Product(Q.to(T.left.dtype), ((Q.T @ left) @ right).to(T.left.dtype))
