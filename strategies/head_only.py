"""Head-only: the control that trains and averages the head while every adapter stays at B = 0.

No method of a paper: whatever a LoRA strategy gains over this is what LoRA brought.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from fedlora.factors import LoraFactors
from strategies.rule import Facts, Merged, Rule, Weighted


@dataclass(frozen=True, kw_only=True)
class HeadOnlyRule(Rule):
    """The adapter never moves; the shared averaging of the head is all that happens."""

    facts: ClassVar[Facts] = Facts(
        name="head-only",
        title="Head only (control)",
        paper="control",
        trains=frozenset(),
        ships=frozenset(),
        exact=True,
        mixed_ranks=True,
        client_dp=True,
        secure_sum=True,
        up="0",
        down="0",
    )

    def merge(self, start: LoraFactors, clients: Sequence[Weighted], server_round: int) -> Merged:
        return Merged(start)
