"""FFA-LoRA: A is frozen at its common start, only B is trained and averaged.

Sun et al., "Improving LoRA in Privacy-preserving Federated Learning", ICLR 2024 (arXiv 2403.12313).

    A' = A_0,    B' = sum_k p_k (s_k / s) B_k

Exact, because the product is linear in the one trained factor. ``init_a="orthonormal"`` is the
control that FedSVD needs: under plain SGD FedSVD follows the same trajectory of B A.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from strategies.facts import Facts
from strategies.mean import MeanRule


@dataclass(frozen=True, kw_only=True)
class FFALoRARule(MeanRule):
    """A frozen, B averaged."""

    facts: ClassVar[Facts] = Facts(
        name="ffa",
        title="FFA-LoRA",
        paper="Sun et al., ICLR 2024, arXiv 2403.12313",
        trained=frozenset({"B"}),
        uploaded=frozenset({"B"}),
        any_kind=True,
        exact=True,
        mean=True,
        stale="factors",
        secure_sum=True,
        up="r*o",
        down="r*o (A once)",
    )
