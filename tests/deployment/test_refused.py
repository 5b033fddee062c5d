"""Of a node that the SuperLink refuses, the operator and its owner read why, in one line each."""

from __future__ import annotations

import json
from base64 import b64encode
from datetime import UTC, datetime, timedelta

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from flwr.supercore.primitives.asymmetric import generate_key_pairs, public_key_to_bytes, sign_message

from fedlora.deployment.operator.keys import fingerprint
from fedlora.deployment.superlink.refused import (
    ACTIVATE,
    AGAIN_SECONDS,
    KEY,
    SIGNATURE,
    TIMESTAMP,
    Headers,
    Refusals,
)

OURS, OTHERS = generate_key_pairs(), generate_key_pairs()
Pair = tuple[ec.EllipticCurvePrivateKey, ec.EllipticCurvePublicKey]
NAMES = {fingerprint(public_key_to_bytes(OURS[1])): "node-3"}
PULL = "/v1/fleet/pull-messages"


def signed(behind: float, pair: Pair = OURS, by: Pair | None = None) -> Headers:
    """What a SuperNode sends whose clock is so many seconds behind, signed ``by`` another key where given."""
    time = (datetime.now(UTC) - timedelta(seconds=behind)).isoformat().encode()
    return {
        TIMESTAMP: time,
        KEY: b64encode(public_key_to_bytes(pair[1])),
        SIGNATURE: b64encode(sign_message((by or pair)[0], time)),
    }


@pytest.mark.parametrize(
    ("behind", "words"), [(400.2, "400 s behind"), (-30.3, "30 s ahead of"), (7200.2, "7200 s behind")]
)
def test_a_clock_that_is_off_is_told_to_both(
    behind: float, words: str, caplog: pytest.LogCaptureFixture
) -> None:
    told = json.loads(Refusals(lambda: NAMES).body(PULL, 401, signed(behind)) or b"{}")
    assert told["detail"] == f"its clock is {words} that of the server; set it, and start this node again"
    assert caplog.messages == [f"node-3 is refused, its clock is {words} that of the server"]


@pytest.mark.parametrize(
    ("behind", "changed"),
    [
        (300, {}), (-4, {}), (400, {TIMESTAMP: b"0001-01-01T00:00:00"}), (400, {TIMESTAMP: b"\xff"}),
        (400, {KEY: b"x"}), (400, {SIGNATURE: b"!"}), (400, {TIMESTAMP: b""}),
    ],
)  # fmt: skip
def test_of_any_other_refusal_nothing_is_made_up(
    behind: float, changed: Headers, caplog: pytest.LogCaptureFixture
) -> None:
    assert Refusals(lambda: NAMES).body(PULL, 401, {**signed(behind), **changed}) is None
    assert Refusals(lambda: NAMES).body(PULL, 401, signed(400, by=OTHERS)) is None
    assert caplog.messages == []


def test_a_second_node_with_a_key_is_told_to_the_operator_once_in_a_while(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    refusals = Refusals(lambda: NAMES)
    now = [0.0]
    monkeypatch.setattr("fedlora.deployment.superlink.refused.time.monotonic", lambda: now[0])
    for at in (0.0, 1.0, AGAIN_SECONDS):
        now[0] = at
        refusals.body(PULL, 401, signed(400.2))
        assert refusals.body(ACTIVATE, 412, signed(0)) is None
    said = [message.split(" (")[0] for message in caplog.messages]
    clock, key = "its clock is 400 s behind that of the server", "another that is online has its key"
    assert said == [f"node-3 is refused, {clock}", f"node-3 is refused: {key}"] * 2


@pytest.mark.parametrize(
    ("path", "status", "headers"),
    [
        (PULL, 412, signed(0)),
        (ACTIVATE, 200, signed(0)),
        (ACTIVATE, 412, signed(0, by=OTHERS)),
        (ACTIVATE, 412, signed(0, OTHERS)),
    ],
)
def test_strangers_cannot_make_the_gate_say_anything_of_a_node(
    path: str, status: int, headers: Headers, caplog: pytest.LogCaptureFixture
) -> None:
    assert Refusals(lambda: NAMES).body(path, status, headers) is None
    assert caplog.messages == []
