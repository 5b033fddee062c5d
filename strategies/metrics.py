"""Means of what clients tell beside their updates: losses of training, metrics of an app."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
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
    """The `mean_of_losses` of the clients whose updates counted, weighted as these are."""
    weight_of = {update.partition_id: update.weight for update in updates}
    return mean_of_losses(
        (weight_of[p.partition_id], told_loss(p)) for p in requests if p.partition_id in weight_of
    )


def told_loss(request: PendingRequest) -> float | None:
    """The training loss that a client told, whatever it is; None where it told none."""
    return None if request.reply is None else request.reply.metrics.get(TRAIN_LOSS)


def mean_of_losses(told: Iterable[tuple[float, float | None]]) -> float | None:
    """The weighted mean of the losses up to `LARGEST`; None where there is none of any weight.

    Args:
        told: each client's weight and its loss.

    >>> mean_of_losses([(1.0, 2.0), (3.0, 6.0), (1.0, float("nan")), (1.0, 1e300), (1.0, None)])
    5.0
    """
    losses = [(weight, x) for weight, x in told if x is not None and abs(x) <= LARGEST]
    total = sum(weight for weight, _ in losses)
    return sum(weight * x for weight, x in losses) / total if total > 0 else None


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
