"""Head-only: the control that trains and averages the head while every adapter stays at B = 0.

No method of a paper: whatever a LoRA strategy gains over this is what LoRA brought.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from strategies.facts import Facts
from strategies.mean import MeanRule


@dataclass(frozen=True, kw_only=True)
class HeadOnlyRule(MeanRule):
    """The adapter never moves; the shared averaging of the head is all that happens."""

    facts: ClassVar[Facts] = Facts(
        name="head-only",
        title="Head only (control)",
        paper="control",
        trained=frozenset(),
        uploaded=frozenset(),
        any_kind=True,
        exact=True,
        mixed_ranks=True,
        mean=True,
        stale="factors",
        secure_sum=True,
        up="0",
        down="0",
    )
