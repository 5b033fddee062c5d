"""The only door of the server that other machines reach: it lets SuperNodes' requests through, nothing else.

A SuperLink serves three APIs on one port. Only that of the SuperNodes is authenticated by node keys: whoever
reaches the port could also start a run, which is code that the server and every node carry out. So the
SuperLink listens on the server's loopback, and the gate passes ``/v1/fleet/`` on to it, over TLS on both
sides.

The gate also holds a SuperNode's question for messages until there is one, at most `HOLD_SECONDS`. A
SuperNode that is told "none" sleeps for three seconds, which would be added to every round.

Of a SuperNode that the SuperLink refuses it says why, see `fedlora.deployment.superlink.refused`.
"""

from __future__ import annotations

import asyncio
import re
import ssl
from collections.abc import Awaitable, Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import uvicorn

from fedlora.deployment.operator.layout import SERVER_FILE, names_of
from fedlora.deployment.superlink.refused import KEY, UNAUTHORIZED, Refusals

PULL = "/v1/fleet/pull-messages"
HOLD_SECONDS = 20.0
"""A SuperNode gives up on a request after 30 s."""
BUSY_SECONDS, IDLE_SECONDS = 0.25, 2.0
"""Between two questions on behalf of a node that had a message lately, and of one that had not."""
LATELY = 120.0
LARGEST_BODY = 64 * 2**20
"""Bytes; Flower sends arrays in chunks of 5 MiB."""
_FLEET = re.compile(r"/v1/fleet/[a-z-]{1,40}")
_PASSED_ON = (b"content-type", b"flwr-", b"x-flwr-", b"traceparent")
"""Beginnings of the headers that are passed on."""

Receive = Callable[[], Awaitable[dict[str, Any]]]
Send = Callable[[dict[str, Any]], Awaitable[None]]


class Gate:
    """An ASGI app in front of a SuperLink.

    Args:
        superlink: its address, ``https://127.0.0.1:PORT``.
        authority: the CA certificate that vouches for it.
        names: gives key fingerprint -> the node's name, for what it says of nodes.
    """

    def __init__(
        self, superlink: str, authority: Path, names: Callable[[], Mapping[str, str]] = dict
    ) -> None:
        self._client = httpx.AsyncClient(
            base_url=superlink,
            verify=ssl.create_default_context(cafile=str(authority)),
            timeout=60.0,
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=100),
            trust_env=False,
        )
        self._last_message: dict[bytes, float] = {}
        self._refusals = Refusals(names)

    async def __call__(self, scope: dict[str, Any], receive: Receive, send: Send) -> None:
        """One request: refused, or answered by the SuperLink."""
        if scope["type"] != "http":
            return
        if scope["method"] != "POST" or not _FLEET.fullmatch(scope["path"]):
            await _answer(send, 404, b"only for SuperNodes")
            return
        body = await _body(receive)
        if body is None:
            await _answer(send, 413, b"too large")
            return
        headers = [(k, v) for k, v in scope["headers"] if k.startswith(_PASSED_ON)]
        try:
            reply = await self._ask(scope["path"], headers, body, receive)
        except httpx.HTTPError:
            await _answer(send, 503, b"the SuperLink does not answer")
            return
        if reply is None:
            return
        told = self._refusals.body(scope["path"], reply.status_code, dict(headers))
        if told is not None:
            await _answer(send, reply.status_code, told, "application/json")
        else:
            await _answer(send, reply.status_code, reply.content, reply.headers.get("content-type"))

    async def _ask(
        self, path: str, headers: list[tuple[bytes, bytes]], body: bytes, receive: Receive
    ) -> httpx.Response | None:
        """The SuperLink's answer; of a question for messages the first that holds one. None: nobody waits.

        A question whose signature grows too old while it is held is one that was answered with none before.
        """
        if path != PULL:
            return await self._client.post(path, headers=headers, content=body)
        loop, node = asyncio.get_running_loop(), dict(headers).get(KEY, b"")
        until = loop.time() + HOLD_SECONDS
        gone, before = asyncio.ensure_future(_gone(receive)), None
        try:
            while not gone.done():
                reply = await self._client.post(path, headers=headers, content=body)
                if reply.status_code == UNAUTHORIZED and before is not None:
                    return before
                before = reply
                if reply.status_code == 200 and reply.content:
                    self._last_message[node] = loop.time()
                if reply.status_code != 200 or reply.content or loop.time() >= until:
                    return reply
                lately = loop.time() - self._last_message.get(node, -LATELY) < LATELY
                await asyncio.wait([gone], timeout=BUSY_SECONDS if lately else IDLE_SECONDS)
            return None
        finally:
            gone.cancel()


def serve_gate(server: Path, host: str, port: int, control_port: int) -> None:
    """Serve until the process is told to stop.

    Args:
        server: the ``server`` directory of a federation.
        host: the address to listen on.
        port: the port that nodes reach.
        control_port: the SuperLink's, on this machine's loopback.
    """
    uvicorn.run(
        Gate(f"https://127.0.0.1:{control_port}", server / "ca.crt", partial(names_of, server / SERVER_FILE)),
        host=host,
        port=port,
        ssl_certfile=str(server / "server.crt"),
        ssl_keyfile=str(server / "server.key"),
        lifespan="off",
        access_log=False,
        log_level="warning",
        timeout_graceful_shutdown=2,
    )


async def _body(receive: Receive) -> bytes | None:
    parts: list[bytes] = []
    size = 0
    while True:
        event = await receive()
        if event["type"] != "http.request":
            return b"".join(parts)
        parts.append(event.get("body", b""))
        size += len(parts[-1])
        if size > LARGEST_BODY:
            return None
        if not event.get("more_body", False):
            return b"".join(parts)


async def _gone(receive: Receive) -> None:
    """Returns once the SuperNode has hung up."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def _answer(send: Send, status: int, body: bytes, kind: str | None = None) -> None:
    headers = [(b"content-length", str(len(body)).encode())]
    headers.append((b"content-type", (kind or "text/plain").encode()))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
