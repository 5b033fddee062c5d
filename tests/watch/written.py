"""Run directories as they are while a run writes them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import tomli_w


def begin(home: Path, *, rounds: int = 4, **keys: Any) -> Path:
    """A run that has begun and has no round yet."""
    home.mkdir(parents=True, exist_ok=True)
    (home / "config.toml").write_text(tomli_w.dumps({"num-server-rounds": rounds, **keys}))
    (home / "provenance.json").write_text("{}")
    return home


def record(number: int, **more: Any) -> str:
    """A line of ``rounds.jsonl``."""
    return json.dumps({
        "round": number, "accuracy": 0.5 + number / 10, "loss": 1.0, "bytes_up": 1000, "bytes_down": 2000,
        "seconds": 3.0, "epsilon": None, "participants": [0, 1], "refused": {}, **more,
    }) + "\n"  # fmt: skip


def add(home: Path, text: str) -> None:
    """Write on at the end of ``rounds.jsonl``."""
    with (home / "rounds.jsonl").open("a") as file:
        file.write(text)
