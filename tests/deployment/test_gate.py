"""The gate lets SuperNodes through, nothing else, and holds their questions until there is an answer."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from fedlora.deployment.operator.create import create
from fedlora.deployment.superlink import proxy
from fedlora.deployment.superlink.proxy import PULL, Gate

Handler = Callable[[httpx.Request], httpx.Response]


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return create(tmp_path_factory.mktemp("gate") / "f", 1).server / "ca.crt"


def asked(authority: Path, handler: Handler, path: str, *, method: str = "POST", stay: float = 60.0) -> Any:
    """Status and body that a SuperNode gets, or None if it hung up after ``stay`` seconds without one."""

    async def talk() -> Any:
        door = Gate("https://127.0.0.1:1", authority)
        door._client = httpx.AsyncClient(
            transport=httpx.MockTransport(handler), base_url="https://127.0.0.1:1"
        )
        heard: list[dict[str, Any]] = []
        told = iter([{"type": "http.request", "body": b"question", "more_body": False}])

        async def receive() -> dict[str, Any]:
            event = next(told, None)
            if event is None:
                await asyncio.sleep(stay)
                return {"type": "http.disconnect"}
            return event

        async def send(event: dict[str, Any]) -> None:
            heard.append(event)

        headers = [(b"flwr-public-key", b"key"), (b"cookie", b"secret"), (b"host", b"elsewhere")]
        scope = {"type": "http", "method": method, "path": path, "headers": headers}
        await door(scope, receive, send)
        return (heard[0]["status"], heard[1]["body"]) if heard else None

    return asyncio.run(talk())


def never(request: httpx.Request) -> httpx.Response:
    raise AssertionError(f"{request.url} reached the SuperLink")


@pytest.mark.parametrize(
    "path",
    [
        "/v1/control/start-run",
        "/v1/runtime/acquire-task",
        "/v1/fleet/../control/start-run",
        "/v1/fleet/pull-messages/x",
        "/v1/fleet/",
        "/v1/fleet/pull-messages\n",
        "/v1/FLEET/pull-messages",
        "/health",
        "/",
    ],
)
def test_no_other_path_reaches_the_superlink(path: str, authority: Path) -> None:
    assert asked(authority, never, path)[0] == 404


def test_no_other_method_reaches_the_superlink(authority: Path) -> None:
    assert asked(authority, never, PULL, method="GET")[0] == 404


def test_a_request_of_a_supernode_is_passed_on_with_its_signature_alone(authority: Path) -> None:
    def superlink(request: httpx.Request) -> httpx.Response:
        assert request.headers["flwr-public-key"] == "key"
        assert "cookie" not in request.headers
        assert request.headers["host"] == "127.0.0.1:1"
        return httpx.Response(200, content=request.content + b" heard")

    assert asked(authority, superlink, "/v1/fleet/push-messages") == (200, b"question heard")


def test_a_question_for_messages_is_held_until_there_is_one(
    authority: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(proxy, "IDLE_SECONDS", 0.01)
    answers = iter([b"", b"", b"", b"message"])
    reply = asked(authority, lambda _: httpx.Response(200, content=next(answers)), PULL)
    assert reply == (200, b"message")


def test_a_held_question_is_answered_in_the_end_and_a_refusal_at_once(
    authority: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(proxy, "IDLE_SECONDS", 0.01)
    monkeypatch.setattr(proxy, "HOLD_SECONDS", 0.05)
    assert asked(authority, lambda _: httpx.Response(200), PULL) == (200, b"")
    monkeypatch.setattr(proxy, "HOLD_SECONDS", 60.0)
    assert asked(authority, lambda _: httpx.Response(401, content=b""), PULL) == (401, b"")


def test_a_question_whose_signature_grows_too_old_while_it_is_held_is_answered_with_none(
    authority: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A node ends of a refusal; a clock that is 290 s behind is one of the allowed ones."""
    monkeypatch.setattr(proxy, "IDLE_SECONDS", 0.01)
    answers = iter([httpx.Response(200), httpx.Response(200), httpx.Response(401)])
    assert asked(authority, lambda _: next(answers), PULL) == (200, b"")


def test_of_a_supernode_that_hung_up_nothing_more_is_asked(
    authority: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A message that is fetched for nobody would be lost."""
    monkeypatch.setattr(proxy, "IDLE_SECONDS", 0.02)
    count = 0

    def superlink(_: httpx.Request) -> httpx.Response:
        nonlocal count
        count += 1
        return httpx.Response(200)

    assert asked(authority, superlink, PULL, stay=0.1) is None
    assert 1 <= count <= 8


def test_without_a_superlink_a_supernode_is_told_to_try_again(authority: Path) -> None:
    def dead(_: httpx.Request) -> httpx.Response:
        raise httpx.ConnectError("no")

    assert asked(authority, dead, PULL)[0] == 503
