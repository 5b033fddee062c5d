"""A client's reply, fedlora's own or that of anybody's PEFT ClientApp."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from typing import Any

from flwr.app import ConfigRecord, MetricRecord, RecordDict

from fedlora.errors import UpdateRefused
from fedlora.factors import Tensors
from fedlora.wire.records import ARRAYS, CONFIG, METRICS, from_record, read_json, to_record

OK, MISSING, DECLINED = "ok", "missing", "declined"
"""What a reply's status can be."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply:
    """A decoded reply to a training message.

    Attributes:
        status: ``ok``, ``missing`` or ``declined``.
        arrays: what was shipped, in PEFT's spelling.
        metrics: numbers that the client released.
        missing: digests that it lacks, with status ``missing``.
        holds: digests that it now holds, which need not be sent again.
        reason: why it declined.
        privacy: what it has spent, or None; the fields of `PrivacySpent`.
        answers: which order it answers, see `TrainOrder.identity`; empty from other people's apps.
        cohort_halved: it trained in a smaller cohort than was meant, so that its bits are not the run's.
    """

    status: str
    arrays: Tensors = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)
    missing: tuple[str, ...] = ()
    holds: tuple[str, ...] = ()
    reason: str = ""
    privacy: dict[str, Any] | None = None
    answers: str = ""
    cohort_halved: bool = False


def encode_reply(reply: Reply, dtype: str = "float32", *, packed: bool = False) -> RecordDict:
    """The records of a reply, its arrays as ``float32`` or ``float16``; ``packed`` as in `to_record`."""
    config: dict[str, Any] = {
        "status": reply.status,
        "missing": list(reply.missing),
        "holds": list(reply.holds),
        "reason": reply.reason,
        "privacy": json.dumps(reply.privacy),
        **({"answers": reply.answers} if reply.answers else {}),
        **({"cohort-halved": True} if reply.cohort_halved else {}),
    }
    return RecordDict(
        {
            ARRAYS: to_record(reply.arrays, dtype, packed=packed),
            METRICS: MetricRecord(dict(reply.metrics)),
            CONFIG: ConfigRecord({key: value for key, value in config.items() if value != []}),
        }
    )


def decode_reply(content: RecordDict) -> Reply:
    """A reply, whether from fedlora's ClientApp or from anybody's PEFT ClientApp (``arrays`` only).

    Raises:
        UpdateRefused: there is no record ``arrays``, or something in it cannot be decoded.
    """
    if ARRAYS not in content.array_records:
        raise UpdateRefused(f"the reply has no record {ARRAYS!r}")
    config = content.config_records.get(CONFIG, ConfigRecord())
    metrics = content.metric_records.get(METRICS, MetricRecord())
    numbers = {k: float(v) for k, v in metrics.items() if isinstance(v, (int, float))}
    for name, value in numbers.items():
        if not math.isfinite(value):
            raise UpdateRefused(f"metric {name!r} = {value}: must be finite")
    return Reply(
        status=str(config.get("status", OK)),
        arrays=from_record(content.array_records[ARRAYS]),
        metrics=numbers,
        missing=_strings(config.get("missing", [])),
        holds=_strings(config.get("holds", [])),
        reason=str(config.get("reason", "")),
        privacy=_privacy(config.get("privacy", "null")),
        answers=str(config.get("answers", "")),
        cohort_halved=config.get("cohort-halved") is True,
    )


def _privacy(text: object) -> dict[str, Any] | None:
    """What a client says it has spent."""
    if text == "null":
        return None
    found = read_json(text)
    epsilon = found.get("epsilon") if isinstance(found, dict) else None
    if isinstance(epsilon, (int, float)) and math.isfinite(epsilon) and epsilon >= 0:
        return dict(found)
    raise UpdateRefused("the reply's privacy report has no epsilon, a number >= 0")


def _strings(value: object) -> tuple[str, ...]:
    return tuple(str(item) for item in value) if isinstance(value, list) else ()
