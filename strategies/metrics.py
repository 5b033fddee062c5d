"""Means of what clients tell beside their updates: losses of training, metrics of an app."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from logging import WARNING

import numpy as np
from flwr.app import MetricRecord, RecordDict
from flwr.common.logger import log

from fedlora import wire
from fedlora.core.state import ClientUpdate
from strategies.replies import LARGEST
from strategies.request import PendingRequest

TRAIN_LOSS = "train-loss"

MetricsFn = Callable[[list[RecordDict], str], MetricRecord]
"""Flower's: the contents of the replies and the key that weighs them."""


def mean_loss(requests: Sequence[PendingRequest], updates: Sequence[ClientUpdate]) -> float | None:
    """The losses up to `LARGEST`, weighted as the updates are; None where nobody released one."""
    weight_of = {update.partition_id: update.weight for update in updates}
    losses = [
        (weight_of[p.partition_id], p.reply.metrics[TRAIN_LOSS])
        for p in requests
        if p.partition_id in weight_of
        and p.reply is not None
        and abs(p.reply.metrics.get(TRAIN_LOSS, math.nan)) <= LARGEST
    ]
    total = sum(weight for weight, _ in losses)
    return sum(weight * loss for weight, loss in losses) / total if total > 0 else None


def aggregated(
    function: MetricsFn | None, contents: list[RecordDict], weighted_by_key: str | None
) -> MetricRecord:
    """What an app's own function makes of the clients' metrics; without one, or a key, `mean_metrics`."""
    if function is None or weighted_by_key is None:
        return mean_metrics(contents, weighted_by_key)
    return function(contents, weighted_by_key)


def mean_metrics(contents: Sequence[RecordDict], weighted_by_key: str | None) -> MetricRecord:
    """The weighted mean of each metric over the clients that have it.

    Args:
        contents: of the replies, each with a valid weight.
        weighted_by_key: the metric that weighs the clients; None weighs them equally.
    """
    measured = [wire.metrics_in(content) for content in contents]
    weights = [1.0 if weighted_by_key is None else float(m[weighted_by_key]) for m in measured]  # type: ignore[arg-type]
    means = MetricRecord()
    for name in dict.fromkeys(name for m in measured for name in m if name != weighted_by_key):
        found = [(weight, m[name]) for weight, m in zip(weights, measured, strict=True) if name in m]
        if len({np.shape(value) for _, value in found}) > 1:
            log(WARNING, "metric %r has no mean: its values are not of one length", name)
            continue
        means[name] = _mean(found)
    return means


def _mean(found: Sequence[tuple[float, float | int | list[float] | list[int]]]) -> float | list[float]:
    """The mean over the finite values, entry by entry for lists; NaN where there is none of any weight."""
    numbers = np.array([value for _, value in found], dtype=np.float64)
    finite = np.isfinite(numbers)
    weights = np.array([weight for weight, _ in found]).reshape(-1, *[1] * (numbers.ndim - 1)) * finite
    with np.errstate(invalid="ignore", divide="ignore"):
        mean = (weights * np.where(finite, numbers, 0.0)).sum(axis=0) / weights.sum(axis=0)
    result: float | list[float] = mean.tolist()
    return result
