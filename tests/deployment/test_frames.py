"""Frames between a ClientApp and the process that keeps the model: whole, or refused."""

from __future__ import annotations

import socket
import threading
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict

from fedlora.deployment.node.ipc import receive_frame, send_frame
from fedlora.errors import UpdateRefused

CONTENT = RecordDict(
    {
        "arrays": ArrayRecord(
            {
                "a": Array(np.arange(6, dtype=np.float32).reshape(2, 3)),
                "b": Array(np.zeros((0, 4), dtype=np.float16)),
            }
        ),
        "metrics": MetricRecord({"loss": 0.5, "n": 3, "many": [1.0, 2.0]}),
        "config": ConfigRecord(
            {"s": "x", "flag": True, "blob": b"\x00\xff", "blobs": [b"a", b""], "list": ["p"]}
        ),
    }
)


def sent(data: bytes) -> tuple[dict[str, Any], RecordDict] | None:
    """What the other side makes of these bytes."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        writer = threading.Thread(target=lambda: (ours.sendall(data), ours.shutdown(socket.SHUT_WR)))
        writer.start()
        try:
            return receive_frame(theirs)
        finally:
            writer.join()


def frame() -> bytes:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        send_frame(ours, {"kind": "train", "number": 2**40}, CONTENT)
        ours.shutdown(socket.SHUT_WR)
        parts = []
        while part := theirs.recv(4096):
            parts.append(part)
    return b"".join(parts)


def test_every_kind_of_record_arrives_as_it_was() -> None:
    received = sent(frame())
    assert received is not None
    about, content = received
    assert about == {"kind": "train", "number": 2**40}
    assert content == CONTENT
    assert {k: type(v) for k, v in content["config"].items()} == {
        k: type(v) for k, v in CONTENT["config"].items()
    }


def test_a_frame_that_ends_too_soon_is_refused_wherever_it_ends() -> None:
    whole = frame()
    assert sent(b"") is None
    for end in range(1, len(whole), 7):
        with pytest.raises(UpdateRefused):
            sent(whole[:end])


@pytest.mark.parametrize(
    "head",
    [
        b"[]",
        b"{}",
        b'{"records": 3}',
        b'{"records": {"a": {"kind": "pickle", "items": [["k", 1]]}}}',
        b"\xff",
    ],
)
def test_a_head_of_another_form_is_refused(head: bytes) -> None:
    with pytest.raises(UpdateRefused):
        sent(len(head).to_bytes(8, "big") + head)


def test_a_head_of_absurd_length_is_not_waited_for() -> None:
    with pytest.raises(UpdateRefused):
        sent((2**60).to_bytes(8, "big"))
