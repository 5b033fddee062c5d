"""Processes that a node keeps beside Flower's, each of which ends with the one that it serves."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import psutil


def launch(
    module: str, home: Path, owner: int | str, log: str, env: Mapping[str, str] | None = None
) -> subprocess.Popen[bytes]:
    """Start ``python -m module home owner`` in a session of its own.

    Args:
        module: what is run.
        home: the node's directory, made where it is missing.
        owner: process id of the one with which it ends.
        log: file in ``home`` that its output is added to.
        env: its environment; none is this process's.

    Raises:
        OSError: it cannot be started.
    """
    home.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-P", "-m", module, str(home), str(owner)]
    with (home / log).open("a") as out:
        return subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=out, stderr=out, env=env, start_new_session=True
        )


def is_running(process: psutil.Process) -> bool:
    """Whether a process is still there and no zombie."""
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False
