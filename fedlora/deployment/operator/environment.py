"""The environment of Flower's processes: nothing calls home, nothing is installed, tasks start soon."""

from __future__ import annotations

import os
import sys
from pathlib import Path

QUIET = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.25",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "OMP_WAIT_POLICY": "PASSIVE",
}
"""Set in every start script. The poll interval is how soon a process is started for a message, else 1 s."""


def flower_environment(home: Path, **more: str) -> dict[str, str]:
    """This process's environment with `QUIET`, a Flower home, and this installation's commands found first.

    Args:
        home: Flower's home directory.
        more: further variables.
    """
    path = os.pathsep.join(filter(None, (str(Path(sys.executable).parent), os.environ.get("PATH", ""))))
    return {**os.environ, **QUIET, "PATH": path, "FLWR_HOME": str(home), **more}
