"""Counts how far one round travels through the code: files, functions, and changes from file to file.

    python -m experiments.benchmarks.round_trip

The second round of a tiny run (4 clients, one process, no Ray). Each call of a function of this project is an
event; a file change is an event whose file is another than that of the event before. Comprehensions and
generators count as functions, as Python makes them some. The figures tell how often a reader who follows a
round call by call must turn to another file; they are no measure of time.
"""

from __future__ import annotations

import sys
import tempfile
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

from fedlora.config import read_config
from fedlora.core.code import code_root
from fedlora.server.callbacks import Tell
from fedlora.server.directory import RunDirectory
from fedlora.server.federated_run import FederatedRun
from fedlora.simulation.in_process import InProcessEngine
from fedlora.simulation.simulate import quiet

TINY = code_root() / "experiments" / "tiny.toml"
ONE_BY_ONE = {"num-server-rounds": 3, "lora.ranks": "", "engine.cohort-size": 1}
PACKAGES = ("fedlora", "strategies", "clients")


@dataclass(slots=True)
class Trip:
    """Calls of project functions between `start` and `stop`.

    Attributes:
        functions: (file, name) -> calls.
        changes: (file before, file) -> how often the second followed the first.
    """

    functions: Counter[tuple[str, str]] = field(default_factory=Counter)
    changes: Counter[tuple[str, str]] = field(default_factory=Counter)
    _root: str = f"{code_root()}/"
    _last: str = ""

    def start(self) -> None:
        """Count from here on."""
        sys.setprofile(self._see)

    def stop(self) -> None:
        """Count no more."""
        sys.setprofile(None)

    def _see(self, frame: FrameType, event: str, argument: Any) -> None:
        name = frame.f_code.co_filename
        if event != "call" or not name.startswith(self._root):
            return
        file = name.removeprefix(self._root)
        if not file.startswith(PACKAGES):
            return
        self.functions[file, frame.f_code.co_qualname] += 1
        if self._last and file != self._last:
            self.changes[self._last, file] += 1
        self._last = file


def second_round(strategy: str) -> Trip:
    """The trip of the second round under a strategy."""
    trip = Trip()

    def watch(record: dict[str, Any]) -> None:
        if record["round"] == 1:
            trip.start()
        elif record["round"] == 2:
            trip.stop()

    quiet()
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "run"
        session = InProcessEngine().session(
            read_config(TINY, {**ONE_BY_ONE, "strategy.name": strategy}), path
        )
        FederatedRun(session, RunDirectory(path), [Tell(watch)]).run()
    return trip


def main() -> None:
    """Print the figures for FedAvg and FLoRA."""
    for strategy in ("fedavg", "flora"):
        trip = second_round(strategy)
        files = len({file for file, _ in trip.functions})
        calls, changes = trip.functions.total(), trip.changes.total()
        print(f"{strategy}: {files} files, {len(trip.functions)} functions, {calls} calls, {changes} changes")
        if "--pairs" in sys.argv:
            for (before, after), count in trip.changes.most_common(60):
                print(f"  {count:5} {before} -> {after}")


if __name__ == "__main__":
    main()
