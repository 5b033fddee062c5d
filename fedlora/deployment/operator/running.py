"""State of a federation on this machine, as `fedlora.deployment.operator.loopback` wrote it down."""

from __future__ import annotations

import json
from typing import Any

import psutil

from fedlora.deployment.operator.layout import Layout

SUPERLINK, GATE = "superlink", "gate"


def read_up(layout: Layout) -> dict[str, Any]:
    """Record of the federation that runs here; empty if none does."""
    try:
        content = json.loads(layout.up_file.read_text())
    except (FileNotFoundError, json.JSONDecodeError):
        return {}
    return content if isinstance(content, dict) and _process(content) is not None else {}


def supervisor(layout: Layout) -> psutil.Process | None:
    """The process of ``fedlora federation up``, or None if there is none."""
    up = read_up(layout)
    return _process(up) if up else None


def is_ready(layout: Layout) -> bool:
    """Whether it has come so far that all nodes were online."""
    return bool(read_up(layout).get("ready"))


def control_port(layout: Layout) -> int:
    """The port of the SuperLink on this machine."""
    return int(read_up(layout).get("ports", {}).get(SUPERLINK, layout.control_port))


def _process(up: dict[str, Any]) -> psutil.Process | None:
    try:
        process = psutil.Process(int(up["pid"]))
        same = abs(process.create_time() - float(up["created"])) < 1
        return process if same and process.status() != psutil.STATUS_ZOMBIE else None
    except (KeyError, ValueError, psutil.NoSuchProcess):
        return None
