"""Means of the numbers that clients release."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from fedlora.updates import ClientUpdate
from strategies.courier import Parcel
from strategies.intake import NUM_EXAMPLES

TRAIN_LOSS = "train-loss"


def mean_loss(parcels: Sequence[Parcel], updates: Sequence[ClientUpdate]) -> float | None:
    """The training losses weighted as the updates are; None where nobody released one."""
    weight_of = {update.partition_id: update.weight for update in updates}
    losses = [
        (weight_of[p.partition_id], p.reply.metrics[TRAIN_LOSS])
        for p in parcels
        if p.partition_id in weight_of and p.reply is not None and TRAIN_LOSS in p.reply.metrics
    ]
    total = sum(weight for weight, _ in losses)
    return sum(weight * loss for weight, loss in losses) / total if total > 0 else None


def mean_metrics(measured: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The metrics that all clients have, weighted by their examples; empty where there are none."""
    total = sum(m[NUM_EXAMPLES] for m in measured)
    if total == 0:
        return {}
    keys = [k for k in measured[0] if k != NUM_EXAMPLES and all(k in m for m in measured)]
    return {k: sum(m[NUM_EXAMPLES] * m[k] for m in measured) / total for k in keys}
