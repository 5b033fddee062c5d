"""Local-only: nobody shares anything, each client goes on from its own adapter; the reference.

No method of a paper: a strategy is worth its traffic where it beats what clients reach alone. The server
learns nothing, so there is no global model; each client's model is measured on its own domains.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from strategies.facts import Facts
from strategies.mean import MeanRule


@dataclass(frozen=True, kw_only=True)
class LocalOnlyRule(MeanRule):
    """Both factors are trained and stay at the client."""

    facts: ClassVar[Facts] = Facts(
        name="local-only",
        title="Local only (reference)",
        paper="reference",
        uploaded=frozenset(),
        any_kind=True,
        exact=False,
        mixed_ranks=True,
        mean=True,
        stale="nothing is sent",
        secure_sum=True,
        up="0",
        down="0 (start once)",
    )
