"""What the operator and a node's owner read of a SuperNode that the SuperLink refuses.

Flower tells a node whose clock is off that it is unauthorized, and one whose key is in use by another that it
could not be activated; the operator is told nothing. The gate sees both.
"""

from __future__ import annotations

import binascii
import json
import logging
import time
from base64 import b64decode
from collections.abc import Callable, Mapping
from datetime import UTC, datetime

from flwr.supercore.primitives.asymmetric import bytes_to_public_key, verify_signature

from fedlora.deployment.operator.keys import fingerprint

TIMESTAMP, KEY, SIGNATURE = b"flwr-timestamp", b"flwr-public-key", b"flwr-signature"
BEHIND, AHEAD = 305.0, 5.0
"""Seconds by which a clock may be off, as Flower has it."""
UNAUTHORIZED, NOT_ACTIVATED = 401, 412
CODE = 2000
"""Of an error in Flower's form, which a SuperNode shows as it ends; none of Flower's own."""
AGAIN_SECONDS = 600.0
ACTIVATE = "/v1/fleet/activate-node"
TWICE = (
    "is refused: another that is online has its key (fedlora federation rotate), it ended less than a minute "
    "ago, or its key is not registered (fedlora federation register)"
)

Headers = Mapping[bytes, bytes]


class Refusals:
    """Says in the gate's log which node was refused, and why; of each node and status once in ten minutes.

    Args:
        names: gives key fingerprint -> the node's name; asked at each refusal.
    """

    def __init__(self, names: Callable[[], Mapping[str, str]]) -> None:
        self._names = names
        self._said: dict[tuple[str, int], float] = {}

    def body(self, path: str, status: int, headers: Headers) -> bytes | None:
        """What to answer in place of what the SuperLink did; None: just that."""
        off = clock_off(headers) if status == UNAUTHORIZED else ""
        if off:
            self._say(status, headers, f"is refused, {off}")
            return json.dumps({"code": CODE, "detail": f"{off}; set it, and start this node again"}).encode()
        if (path, status) == (ACTIVATE, NOT_ACTIVATED) and is_signed(headers):
            self._say(status, headers, TWICE)
        return None

    def _say(self, status: int, headers: Headers, what: str) -> None:
        name, now = self._names().get(fingerprint(_decoded(headers, KEY))), time.monotonic()
        if name and now - self._said.get((name, status), -AGAIN_SECONDS) >= AGAIN_SECONDS:
            self._said[name, status] = now
            logging.getLogger("fedlora").warning("%s %s", name, what)


def is_signed(headers: Headers) -> bool:
    """Whether the key that a request names has signed its time."""
    try:
        key = bytes_to_public_key(_decoded(headers, KEY))
        return verify_signature(key, headers.get(TIMESTAMP, b""), _decoded(headers, SIGNATURE))
    except (ValueError, TypeError, AttributeError):  # no key at all, or none on a curve
        return False


def clock_off(headers: Headers) -> str:
    """How far the clock that signed a request is off; empty if it is not, or the request does not say.

    >>> clock_off({})
    ''
    """
    try:
        signed = datetime.fromisoformat(headers.get(TIMESTAMP, b"").decode())
        behind = (datetime.now(UTC) - signed).total_seconds()
    except (ValueError, TypeError, OverflowError):  # no time, or one without a zone
        return ""
    if -AHEAD < behind < BEHIND or not is_signed(headers):
        return ""
    return f"its clock is {abs(behind):.0f} s {'behind' if behind > 0 else 'ahead of'} that of the server"


def _decoded(headers: Headers, name: bytes) -> bytes:
    try:
        return b64decode(headers.get(name, b""), validate=True)
    except binascii.Error:
        return b""
