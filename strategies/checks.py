"""Checks of a round's updates beside each other: weights that sum to 1, heads of one shape."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence

from fedlora.core.state import ClientUpdate
from fedlora.errors import ConfigError, FactorShapeError


def normalised(updates: Sequence[ClientUpdate]) -> list[float]:
    """Weights p_k that sum to 1.

    Raises:
        ConfigError: nothing to average, two updates of one client, a negative or non-finite weight,
            or a total that is zero or overflows.
    """
    if not updates:
        raise ConfigError("there is no update to aggregate")
    replies = Counter(update.partition_id for update in updates)
    for update in updates:
        if replies[update.partition_id] > 1:
            raise ConfigError(f"partition {update.partition_id} sent more than one update for the round")
        if not (math.isfinite(update.weight) and update.weight >= 0):
            raise ConfigError(
                f"partition {update.partition_id}: weight {update.weight} must be finite and >= 0"
            )
    total = sum(update.weight for update in updates)
    if not 0 < total < math.inf:
        raise ConfigError(f"the weights of all updates sum to {total:g}: nothing can be averaged")
    return [update.weight / total for update in updates]


def check_heads(head: Mapping[str, object], updates: Sequence[ClientUpdate]) -> list[str]:
    """The head tensors that are shipped, sorted by name.

    Raises:
        FactorShapeError: a tensor that the head lacks or that only some clients ship, or another shape.
    """
    shipped = sorted({name for update in updates for name in update.head})
    for name in shipped:
        expected = _shape(head, name)
        for update in updates:
            if (given := _shape(update.head, name)) != expected:
                who = f"partition {update.partition_id}, head tensor {name}"
                raise FactorShapeError(f"{who}: {given}, expected {expected}")
    return shipped


def _shape(tensors: Mapping[str, object], name: str) -> str:
    return str(tuple(getattr(tensors[name], "shape", ()))) if name in tensors else "nothing"
