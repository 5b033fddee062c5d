"""Messages between two processes of one machine: a JSON head, then the arrays' bytes; nothing is unpickled.

8 bytes, big-endian: length of the head | the head | the bytes of the arrays, in the head's order
"""

from __future__ import annotations

import json
import socket
from base64 import b64decode, b64encode
from typing import Any

from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict

from fedlora.errors import UpdateRefused

LARGEST_HEAD = 64 * 2**20
LENGTH = 8
_KINDS = {"config": ConfigRecord, "metrics": MetricRecord}


def send_frame(connection: socket.socket, about: dict[str, Any], content: RecordDict) -> None:
    """Send one frame.

    Args:
        connection: a stream socket.
        about: whatever JSON can say.
        content: the records that go with it.
    """
    records, arrays = _described(content)
    head = json.dumps({**about, "records": records}).encode()
    connection.sendall(len(head).to_bytes(LENGTH, "big") + head)
    for data in arrays:
        connection.sendall(data)


def receive_frame(connection: socket.socket) -> tuple[dict[str, Any], RecordDict] | None:
    """One frame, or None if the other side has hung up before it.

    Raises:
        UpdateRefused: it is none.
    """
    start = _read(connection, LENGTH)
    if not start:
        return None
    length = int.from_bytes(start, "big")
    if len(start) < LENGTH or length > LARGEST_HEAD:
        raise UpdateRefused("a frame of unknown form")
    try:
        about = json.loads(_all(connection, length))
        records = about.pop("records")
        content = RecordDict({name: _record(entry, connection) for name, entry in records.items()})
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UpdateRefused(f"a frame that cannot be read ({error})") from None
    return about, content


def _described(content: RecordDict) -> tuple[dict[str, Any], list[bytes]]:
    records: dict[str, Any] = {}
    arrays: list[bytes] = []
    for name, record in content.items():
        if isinstance(record, ArrayRecord):
            items = [[k, a.dtype, list(a.shape), a.stype, len(a.data)] for k, a in record.items()]
            records[name] = {"kind": "arrays", "items": items}
            arrays += [array.data for array in record.values()]
        else:
            kind = "config" if isinstance(record, ConfigRecord) else "metrics"
            records[name] = {"kind": kind, "items": [[k, _plain(v)] for k, v in record.items()]}
    return records, arrays


def _record(entry: dict[str, Any], connection: socket.socket) -> Any:
    if entry["kind"] != "arrays":
        return _KINDS[entry["kind"]]({key: _value(value) for key, value in entry["items"]})
    return ArrayRecord(
        {
            key: Array(dtype=dtype, shape=tuple(shape), stype=stype, data=_all(connection, int(size)))
            for key, dtype, shape, stype, size in entry["items"]
        }
    )


def _plain(value: Any) -> Any:
    """What JSON can hold; bytes as {"base64": ...}."""
    if isinstance(value, bytes):
        return {"base64": b64encode(value).decode()}
    return [_plain(item) for item in value] if isinstance(value, list) else value


def _value(plain: Any) -> Any:
    if isinstance(plain, dict):
        return b64decode(plain["base64"])
    return [_value(item) for item in plain] if isinstance(plain, list) else plain


def _all(connection: socket.socket, size: int) -> bytes:
    data = _read(connection, size)
    if len(data) < size:
        raise UpdateRefused(f"a frame that ends after {len(data)} of {size} bytes")
    return data


def _read(connection: socket.socket, size: int) -> bytes:
    """``size`` bytes, or fewer where the other side has hung up."""
    parts, left = [], size
    while left > 0:
        part = connection.recv(min(left, 2**20))
        if not part:
            break
        parts.append(part)
        left -= len(part)
    return b"".join(parts)
