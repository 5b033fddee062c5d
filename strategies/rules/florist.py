"""FLoRIST: as FLoRA, but only the strongest directions of the stack travel and stay.

Ramesh and Dass, "FLoRIST: Singular Value Thresholding for Efficient and Accurate Federated Fine-Tuning of
Large Language Models", MLSys 2026 (arXiv 2506.09199).

    T = sum_k p_k s_k B_k A_k = U S V^T,     W <- W + [U_p S_p] [V_p^T]
    p = the fewest directions with  sum_{j <= p} sigma_j^2 >= threshold * sum_j sigma_j^2

As in the authors' code clients merge the p directions into their base and start a new adapter, B_k = 0.
``threshold`` is the paper's tau; 0.9 is the code's default, the paper reports 0.80 to 0.99. p is chosen
for each layer and round. Not verified: which threshold made the paper's tables. The code has further ways
to choose p (Gavish-Donoho, ScreeNOT), which are not here. It has one common scaling, here each s_k is
inside T.

No secure sums, though T is all that it needs: the server knows the A_k that each client drew, which hardly
move, and reads every B_k out of T.

Not exact: up to a share of 1 - threshold of T's energy is dropped in every layer, for good (diagnostics:
``energy_lost``). With threshold = 1 it is FLoRA, sent as rank(T) directions instead of R.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from torch import Tensor

from fedlora.core.decompositions import compact_svd
from fedlora.core.factors import Product
from fedlora.errors import ConfigError
from strategies.facts import Facts
from strategies.layer import Layer, Merged
from strategies.rules.flora import FLoRARule


@dataclass(frozen=True, kw_only=True)
class FLoRISTRule(FLoRARule):
    """The strongest directions of the stack into the base, start afresh.

    Attributes:
        threshold: the paper's tau, the share of each layer's energy that is kept, in (0, 1].
    """

    threshold: float = 0.9

    facts: ClassVar[Facts] = Facts(
        name="florist",
        title="FLoRIST",
        paper="Ramesh and Dass, MLSys 2026, arXiv 2506.09199",
        exact=False,
        mixed_ranks=True,
        updates_base=True,
        product_invariant=True,
        single_client_exact=False,
        mean=False,
        stale="factors are cut to the rank that a whole round needs",
        secure_sum=False,
        supported_inits=FLoRARule.facts.supported_inits,
        inits_why=FLoRARule.facts.inits_why,
        up="r_k(o+i)",
        down="R(o+i) at most for each round missed",
        deviation="which threshold made the paper's tables could not be verified; of the released code's "
        "ways to choose it, only the share of energy is here",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.threshold <= 1:
            raise ConfigError(f"strategy.options threshold = {self.threshold}: must be in (0, 1]")

    def merge(self, layer: Layer) -> Merged:
        U, S, Vh = compact_svd(layer.target)
        p = directions(S, self.threshold)
        kept = Product((U[:, :p] * S[:p]).contiguous(), Vh[:p].clone())
        return replace(super().merge(layer), into_base=kept if p else None)


def directions(S: Tensor, threshold: float) -> int:
    """The fewest leading singular values with at least that share of the energy; 0 only of none."""
    energy = S.double().square()
    left_out = energy.flip(0).cumsum(0).flip(0)  # entry p: what is lost by keeping p directions
    return int(left_out.gt((1.0 - threshold) * energy.sum()).sum())
