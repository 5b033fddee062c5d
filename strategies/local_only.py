"""Local-only: nobody shares anything, each client goes on from its own adapter; the reference.

No method of a paper: a strategy is worth its traffic where it beats what clients reach alone. The server
learns nothing, so there is no global model; each client's model is measured on its own domains.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from fedlora.factors import LoraFactors
from strategies.rule import Facts, Merged, Rule, Weighted


@dataclass(frozen=True, kw_only=True)
class LocalOnlyRule(Rule):
    """Both factors are trained and stay at the client."""

    facts: ClassVar[Facts] = Facts(
        name="local-only",
        title="Local only (reference)",
        paper="reference",
        ships=frozenset(),
        exact=False,
        mixed_ranks=True,
        client_dp=True,
        secure_sum=True,
        up="0",
        down="0 (start once)",
    )

    def merge(self, start: LoraFactors, clients: Sequence[Weighted], server_round: int) -> Merged:
        """Nothing arrives, nothing changes."""
        return Merged(start)
