"""A step of secure aggregation as somebody else wrote it down: every value is checked when it is read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fedlora.errors import SecureRefused, first_line

SECURE, MASKED = "secure", "masked"
"""Records of a message: what a step says, and a masked update."""
STEP = "query.secure"
"""Kind of the messages of steps that carry no update."""
ADVERTISE, SHARE, CONFIRM, UNMASK = "advertise", "share", "confirm", "unmask"
"""Their phases."""
SKETCH = "sketch"
"""Key of the width of sketches, where the rows of a round are of these."""
START, STARTS = "start", "starts"
"""Keys of the digest of what a client starts from, and of those of all, where they are not the same."""
ALIKE = ("max-weight", SKETCH, "sketch-seed", "layers")
"""Keys beside an order to train that say how a row is written, and so belong to its start."""
LONGEST_REASON = 200


def size_of(record: Mapping[str, Any]) -> int:
    """Payload bytes of a step: of its keys, shares and numbers, without names."""
    items = (item for value in record.values() for item in (value if isinstance(value, list) else [value]))
    return sum(len(item) if isinstance(item, (str, bytes)) else 8 for item in items)


@dataclass(frozen=True, slots=True)
class Step:
    """A record of a step; each method raises `SecureRefused` where a value is not what it should be."""

    record: Mapping[str, Any]

    def text(self, key: str) -> str:
        """A text."""
        value = self.record.get(key)
        if not isinstance(value, str):
            raise SecureRefused(f"{key} is no text")
        return value

    def number(self, key: str) -> int:
        """A whole number >= 1."""
        value = self.record.get(key)
        if type(value) is not int or value < 1:
            raise SecureRefused(f"{key} is no number >= 1")
        return value

    def binary(self, key: str) -> bytes:
        """Bytes."""
        value = self.record.get(key)
        if not isinstance(value, bytes):
            raise SecureRefused(f"{key} is not bytes")
        return value

    def numbers(self, key: str) -> list[int]:
        """Partitions, each once; none where there is no such key."""
        values = self.record.get(key, [])
        if not isinstance(values, list) or any(type(v) is not int or not 0 <= v < 2**63 for v in values):
            raise SecureRefused(f"{key} is no list of partitions")
        if len(set(values)) < len(values):
            raise SecureRefused(f"{key} names a partition twice")
        return values

    def texts(self, key: str) -> list[str]:
        """Texts, each once."""
        values = self.record.get(key)
        if not isinstance(values, list) or any(not isinstance(v, str) for v in values):
            raise SecureRefused(f"{key} is no list of texts")
        if len(set(values)) < len(values):
            raise SecureRefused(f"{key} names one twice")
        return values

    def table(self, partitions: str, values: str) -> dict[int, bytes]:
        """Bytes by partition, out of two lists."""
        found, keys = self.record.get(values, []), self.numbers(partitions)
        table = [v for v in found if isinstance(v, bytes)] if isinstance(found, list) else []
        if len(table) != len(keys) or table != found:
            raise SecureRefused(f"{values} is no list of bytes, one for each of {partitions}")
        return dict(zip(keys, table, strict=True))


def step_of(records: Mapping[str, Mapping[str, Any]]) -> Step:
    """The step in a message's or an answer's records of settings.

    Raises:
        SecureRefused: there is none, or the other side refused it.
    """
    record = records.get(SECURE)
    if record is None:
        raise SecureRefused("the message says nothing of secure sums")
    if "reason" in record:
        raise SecureRefused(first_line(str(record["reason"]), "no reason")[:LONGEST_REASON])
    return Step(record)
