"""Nodes with keys of their own, and the configuration of their runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fedlora.config import RunConfig, from_flat
from tests.federation.secured import KEYS

NODES = 5


def file_of(home: Path, partition: int) -> Path:
    return home / "nodes" / f"node-{partition}" / "peers.toml"


def config_of(**keys: Any) -> RunConfig:
    more = {k.replace("_", "-"): v for k, v in keys.items()}
    return from_flat({**KEYS, "engine.cohort-size": 1, "secure.threshold": 0.6, **more})
