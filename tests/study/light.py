"""What a process that runs cells does in tests: no engine, and it imports next to nothing."""

from __future__ import annotations

import os
import signal
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any


def serve(pipe: Connection, config: Any, address: str) -> None:
    """Do what the title says, once for each cell."""
    while True:
        _, home, title = pipe.recv()
        Path(home).mkdir(parents=True, exist_ok=True)
        (Path(home) / "pid").write_text(str(os.getpid()))
        if title == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        if title == "sleep":
            time.sleep(600)
        pipe.send(None if title == "run" else title)
