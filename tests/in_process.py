"""Model and data of the test process, and runs on them, for tests that carry out clients themselves."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from clients.runtime import ClientRuntime, RuntimeCache
from fedlora.config import RunConfig
from fedlora.prepared.node_data import OwnData
from fedlora.server.callbacks import Tell
from fedlora.server.directory import RunDirectory
from fedlora.server.federated_run import FederatedRun
from fedlora.server.session import Session

RUNTIMES = RuntimeCache()


def client_runtime(config: RunConfig, own: OwnData | None = None) -> ClientRuntime:
    return RUNTIMES.get(config, own)


def federated(
    config: RunConfig,
    path: Path,
    progress: Callable[[dict[str, Any]], None] | None = None,
    *,
    resume: bool = False,
    **session: Any,
) -> FederatedRun:
    """A run on the model of this process, whose clients the test brings."""
    lent = Session(config=config, runtime=client_runtime(config), **session)
    return FederatedRun(lent, RunDirectory(path, resume=resume), [Tell(progress)] if progress else [])
