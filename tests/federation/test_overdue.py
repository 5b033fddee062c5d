"""Overdue replies: found by the message that they answer, once, with the bytes of this reply alone."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from flwr.app import ArrayRecord, RecordDict

from fedlora import wire
from strategies.overdue import Overdue
from strategies.request import PendingRequest


def request_of(partition_id: int, **more: Any) -> PendingRequest:
    """A request that was sent as the message of its partition's number."""
    sent: Any = [SimpleNamespace(metadata=SimpleNamespace(message_id=f"message {partition_id}"))]
    nothing: Any = None
    return PendingRequest(partition_id, 7, nothing, nothing, nothing, sent=sent, **more)


def reply_to(partition_id: int, *, error: bool = False) -> Any:
    content = RecordDict({"arrays": ArrayRecord({"a": torch.ones(5)})})
    metadata = SimpleNamespace(reply_to_message_id=f"message {partition_id}")
    return SimpleNamespace(metadata=metadata, content=content, has_error=lambda: error)


def test_a_late_reply_is_found_once_and_counts_its_own_bytes() -> None:
    """What a first try of the round sent up was counted in that round."""
    overdue, late = Overdue(), request_of(0, bytes_up=500)
    overdue.note(2, [late, request_of(1, failure="refused before")])
    assert list(overdue.answered([reply_to(0), reply_to(1), reply_to(2)])) == [(2, late)]
    assert late.bytes_up == wire.payload_bytes(reply_to(0).content) > 0
    assert list(overdue.answered([reply_to(0)])) == []


def test_an_error_of_the_network_ends_the_waiting() -> None:
    overdue = Overdue()
    overdue.note(2, [request_of(0)])
    assert list(overdue.answered([reply_to(0, error=True), reply_to(0)])) == []
