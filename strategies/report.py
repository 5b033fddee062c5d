"""Report of one round of a strategy."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from logging import WARNING
from typing import Any

from flwr.app import ArrayRecord, MetricRecord
from flwr.common.logger import log

from fedlora.wire import Reply
from strategies.diagnostics import Diagnostics


@dataclass(slots=True, kw_only=True)
class RoundReport:
    """One round of a strategy, for logs and for ``rounds.jsonl``.

    Attributes:
        server_round: from 1.
        participants: partitions whose updates were aggregated.
        refused: partition id -> one-line reason.
        late: partition id -> what came of its reply to an earlier round, which came after that had ended.
        staleness: partition id -> versions by which its update was late, where rounds do not wait.
        bytes_up, bytes_down: payload bytes over all sampled clients.
        train_loss: weighted mean of the losses that clients released, or None.
        privacy: partition id -> what that client has spent.
        diagnostics: of the aggregation.
        halved: partitions that trained in a smaller cohort than was meant, because memory ran out.
        sketch_lost: of a round of sketches, the share of the mean products' norm that they did not tell.
        clipping_norm: to which updates were clipped, where that is adapted from round to round.
        client_metrics: partition id -> metrics of its own evaluation, where clients evaluate.
        train_metrics, evaluate_metrics: the clients' means as in Flower's Result; None where there are none.
        arrays: the global ones after the round.
        record: its line in ``rounds.jsonl``, which whoever runs the strategy fills in.
    """

    server_round: int
    participants: list[int] = field(default_factory=list)
    refused: dict[int, str] = field(default_factory=dict)
    late: dict[int, str] = field(default_factory=dict)
    staleness: dict[int, int] = field(default_factory=dict)
    bytes_up: int = 0
    bytes_down: int = 0
    train_loss: float | None = None
    privacy: dict[int, dict[str, Any]] = field(default_factory=dict)
    diagnostics: Diagnostics | None = None
    halved: list[int] = field(default_factory=list)
    sketch_lost: float | None = None
    clipping_norm: float | None = None
    client_metrics: dict[int, dict[str, float]] = field(default_factory=dict)
    train_metrics: MetricRecord | None = None
    evaluate_metrics: MetricRecord | None = None
    arrays: ArrayRecord = field(default_factory=ArrayRecord)
    record: dict[str, Any] = field(default_factory=dict)

    def refuse(self, reasons: Mapping[int, str]) -> None:
        """Count clients out, and log why; reasons by partition."""
        self.refused.update(reasons)
        for partition_id, reason in reasons.items():
            log(WARNING, "\tpartition %s refused: %s", partition_id, reason)

    def refusals(self) -> str:
        """Refusals on one line, those of one reason together."""
        partitions: dict[str, list[int]] = {}
        for partition, reason in self.refused.items():
            partitions.setdefault(reason, []).append(partition)
        return "; ".join(f"partition {', '.join(map(str, p))}: {reason}" for reason, p in partitions.items())

    def note(self, partition_id: int, reply: Reply | None) -> None:
        """Notes what a reply with an update says besides its arrays; to evaluation as to training."""
        if reply is not None and reply.privacy is not None:
            self.privacy[partition_id] = reply.privacy
        if reply is not None and reply.cohort_halved and partition_id not in self.halved:
            self.halved.append(partition_id)
