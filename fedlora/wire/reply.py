"""A client's reply, fedlora's own or that of anybody's PEFT ClientApp."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from typing import Any

from flwr.app import ArrayRecord, ConfigRecord, MetricRecord, RecordDict

from fedlora.core.adapters import Adapters
from fedlora.core.factors import Tensors
from fedlora.errors import UpdateRefused
from fedlora.wire.arrays import ARRAYS, CONFIG, METRICS, from_record, read_json, to_record
from fedlora.wire.instruction import TrainInstruction
from fedlora.wire.upload import CODECS

OK, MISSING, DECLINED = "ok", "missing", "declined"
"""What a reply's status can be."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply:
    """A decoded reply to a training message.

    Attributes:
        status: ``ok``, ``missing`` or ``declined``.
        arrays: what was shipped, in PEFT's spelling; as ``codec`` wrote it, if that is not empty.
        written: at the client, what the instruction's codec sends, where the trainer itself wrote it.
        start: at the client, what those tensors began from; it does not travel.
        adapters: at the client, all of its adapter after training; it does not travel.
        codec: of `fedlora.wire.upload`; empty for plain floats.
        metrics: single numbers that the client released, not all of them need be finite.
        missing: digests that it lacks, with status ``missing``.
        holds: digests that it now holds, which need not be sent again.
        reason: why it declined.
        own_reason: the same in full, for the node's owner; it does not travel.
        privacy: what it has spent, or None; the fields of `PrivacySpent`.
        answers: the instruction's, see `TrainInstruction.identity`; empty from other people's apps.
        cohort_halved: it trained in a smaller cohort than was meant, so that its bits are not the run's.
        half: some array travelled in half precision.
    """

    status: str
    arrays: Tensors = field(default_factory=dict)
    written: Tensors = field(default_factory=dict)
    start: Tensors = field(default_factory=dict)
    adapters: Adapters = field(default_factory=dict)
    codec: str = ""
    metrics: dict[str, float] = field(default_factory=dict)
    missing: tuple[str, ...] = ()
    holds: tuple[str, ...] = ()
    reason: str = ""
    own_reason: str = ""
    privacy: dict[str, Any] | None = None
    answers: str = ""
    cohort_halved: bool = False
    half: bool = False


def encode_reply(
    reply: Reply, instruction: TrainInstruction | None = None, *, packed: bool = False
) -> RecordDict:
    """The records of a reply.

    Args:
        reply: its arrays are plain floats.
        instruction: whose codec writes the arrays; by default they travel as float32.
        packed: as in `to_record`.
    """
    codec, arrays, answers = "", reply.arrays, reply.answers if instruction is None else instruction.identity
    if instruction is not None and arrays:
        codec, arrays = instruction.codec.name, reply.written or instruction.coded(reply.start, arrays)
    config: dict[str, Any] = {
        "status": reply.status,
        "missing": list(reply.missing),
        "holds": list(reply.holds),
        "reason": reply.reason,
        "privacy": json.dumps(reply.privacy),
        **({"answers": answers} if answers else {}),
        **({"upload": codec} if codec else {}),
        **({"cohort-halved": True} if reply.cohort_halved else {}),
    }
    return RecordDict(
        {
            ARRAYS: to_record(arrays, None if codec else "float32", packed=packed),
            METRICS: MetricRecord(dict(reply.metrics)),
            CONFIG: ConfigRecord({key: value for key, value in config.items() if value != []}),
        }
    )


def decode_reply(content: RecordDict, *, trained: bool = True) -> Reply:
    """A reply, whether from fedlora's ClientApp or from anybody's PEFT ClientApp (arrays and metrics).

    Args:
        content: the records; the arrays may have any name where there is one such record only.
        trained: it answers a training instruction, so that it must hold arrays.

    Raises:
        UpdateRefused: there is no record ``arrays``, or something in it cannot be decoded.
    """
    arrays = array_record(content)
    if arrays is None and trained:
        raise UpdateRefused(f"the reply has no record {ARRAYS!r}")
    config = content.config_records.get(CONFIG, ConfigRecord())
    codec = str(config.get("upload", ""))
    codec = codec if codec in CODECS else ""
    numbers = {k: float(v) for k, v in metrics_in(content).items() if isinstance(v, (int, float))}
    return Reply(
        status=_status(config),
        arrays={} if arrays is None else from_record(arrays, coded=bool(codec)),
        codec=codec,
        metrics=numbers,
        missing=_strings(config.get("missing", [])),
        holds=_strings(config.get("holds", [])),
        reason=str(config.get("reason", "")),
        privacy=_privacy(config.get("privacy", "null")),
        answers=str(config.get("answers", "")),
        cohort_halved=config.get("cohort-halved") is True,
        half=arrays is not None and any(array.dtype == "float16" for array in arrays.values()),
    )


def array_record(content: RecordDict) -> ArrayRecord | None:
    """The arrays of a reply: the record of the usual name, or the only one there is."""
    if ARRAYS in content.array_records or len(content.array_records) != 1:
        return content.array_records.get(ARRAYS)
    return next(iter(content.array_records.values()))


def metrics_in(content: RecordDict) -> dict[str, float | int | list[float] | list[int]]:
    """All metrics of a reply, whatever the names of their records."""
    return {k: v for record in content.metric_records.values() for k, v in record.items()}


def _status(config: ConfigRecord) -> str:
    """Status of the reply; other people's apps may say anything under that key."""
    status = str(config.get("status", OK))
    return status if "answers" in config or status in (OK, MISSING, DECLINED) else OK


def _privacy(text: object) -> dict[str, Any] | None:
    """Spending that a client claims."""
    if text == "null":
        return None
    found = read_json(text)
    epsilon = found.get("epsilon") if isinstance(found, dict) else None
    if isinstance(epsilon, (int, float)) and math.isfinite(epsilon) and epsilon >= 0:
        return dict(found)
    raise UpdateRefused("the reply's privacy report has no epsilon, a number >= 0")


def _strings(value: object) -> tuple[str, ...]:
    return tuple(str(item) for item in value) if isinstance(value, list) else ()
