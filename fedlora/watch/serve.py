"""The page's server: GET alone, on the loopback alone, under its own name alone."""

from __future__ import annotations

import json
import math
import threading
from dataclasses import asdict
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined, select_autoescape

from fedlora.errors import ConfigError
from fedlora.watch.metrics import CONTENT_TYPE, metrics
from fedlora.watch.snapshot import Watcher

LOOPBACK = "127.0.0.1"
NAMES = (LOOPBACK, "localhost", "[::1]")
"""Hosts under which the loopback is reached; another site's name that points here is refused."""
SECONDS = 10.0
"""A client that says nothing for so long is dropped."""
HEADERS = {
    "Cache-Control": "no-store",
    "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; "
    "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


class Server(ThreadingHTTPServer):
    """Serves the page of one directory.

    Args:
        path: of a run, a study or a federation; it need not be there yet.
        port: on the loopback; 0 takes a free one.

    Raises:
        ConfigError: a file, a directory in which nothing can begin, or a port that cannot be had.
    """

    daemon_threads = True

    def __init__(self, path: Path, port: int = 0) -> None:
        if path.exists() and not path.is_dir():
            raise ConfigError(f"{path}: is a file, name the directory of a run, a study or a federation")
        if not path.absolute().parent.is_dir():
            raise ConfigError(f"{path}: there is no such directory, and none that it could begin in")
        self.watcher = Watcher(path)
        self.reading = threading.Lock()
        self.page = _page(path).encode()
        try:
            super().__init__((LOOPBACK, port), _Handler)
        except (OSError, OverflowError) as error:
            reason = getattr(error, "strerror", None) or error
            raise ConfigError(f"--port {port}: cannot be had on {LOOPBACK} ({reason})") from None

    @property
    def address(self) -> str:
        """Where the page is."""
        return f"http://{LOOPBACK}:{self.server_port}/"

    def state(self) -> dict[str, Any]:
        """What the page shows."""
        with self.reading:
            runs, nodes = self.watcher.runs(), self.watcher.nodes()
        found: dict[str, Any] = _finite({"runs": list(map(asdict, runs)), "nodes": list(map(asdict, nodes))})
        return found

    def metrics(self) -> str:
        """What Prometheus reads."""
        with self.reading:
            return metrics(self.watcher.runs(), self.watcher.nodes())

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A reader that went away is no news."""


class _Handler(BaseHTTPRequestHandler):
    server: Server
    timeout = SECONDS
    server_version, sys_version = "fedlora", ""

    def do_GET(self) -> None:
        """The page, its state, or the metrics."""
        host, _, port = self.headers.get("Host", "").rpartition(":")
        if host not in NAMES or port != str(self.server.server_port):
            self._send(HTTPStatus.MISDIRECTED_REQUEST, "text/plain", b"this page is for this machine alone\n")
        elif self.path == "/":
            self._send(HTTPStatus.OK, "text/html; charset=utf-8", self.server.page)
        elif self.path == "/state.json":
            self._send(HTTPStatus.OK, "application/json", json.dumps(self.server.state()).encode())
        elif self.path == "/metrics":
            self._send(HTTPStatus.OK, CONTENT_TYPE, self.server.metrics().encode())
        else:
            self._send(HTTPStatus.NOT_FOUND, "text/plain", b"there are /, /state.json and /metrics\n")

    def _send(self, status: HTTPStatus, kind: str, body: bytes) -> None:
        self.send_response(status)
        for name, value in {**HEADERS, "Content-Type": kind, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing of each request."""


def _finite(value: Any) -> Any:
    """A value for JSON, which has no number that is none or without end."""
    if isinstance(value, dict):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _page(path: Path) -> str:
    environment = Environment(
        loader=ChoiceLoader(
            [PackageLoader("fedlora.watch", "page"), PackageLoader("fedlora.study.report", "page")]
        ),
        autoescape=select_autoescape(),
        undefined=StrictUndefined,
        trim_blocks=True,
    )
    return environment.get_template("watch.html").render(title=path.absolute().name)
