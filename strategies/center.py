"""The middle of the clients' tensors: a weighted mean, unless something robust takes its place."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from fedlora.core.state import ClientUpdate
from strategies.layer import weighted_sum


@dataclass(frozen=True)
class Center:
    """The weighted mean. `strategies.robust` has the others."""

    name: ClassVar[str] = "mean"

    def choose(self, updates: Sequence[ClientUpdate]) -> Sequence[ClientUpdate]:
        """The updates that count at all, in the given order."""
        return updates

    def of(self, weights: Sequence[float], tensors: Sequence[Tensor]) -> Tensor:
        """One tensor out of the clients' tensors of one name; weights sum to 1."""
        return weighted_sum(weights, tensors)
