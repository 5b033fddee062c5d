"""Runs first in each process of a federation that is tested (PYTHONPATH leads here), and changes Flower's.

A node that died is let in again after 20 s instead of 60 s, and a ServerApp that died is missed after 20 s.
The clock of a process is off by as many seconds as the file says that ``FEDLORA_TEST_CLOCK`` names.
"""

from __future__ import annotations

import os
import sys
from datetime import datetime, timedelta
from pathlib import Path

HEARTBEAT_SECONDS = 10
"""The least that a SuperLink allows; a node is away after two."""


def beat_sooner() -> None:
    """Nodes and ServerApps: say oftener that they are there."""
    from flwr.supercore import heartbeat

    vars(heartbeat)["HEARTBEAT_DEFAULT_INTERVAL"] = HEARTBEAT_SECONDS


def promise_less() -> None:
    """Nodes: be taken for gone sooner."""
    from flwr.supernode import fleet_http_connection

    vars(fleet_http_connection)["HEARTBEAT_DEFAULT_INTERVAL"] = HEARTBEAT_SECONDS


def miss_sooner() -> None:
    """The SuperLink: take a ServerApp for gone after a third of its 60 s."""
    from flwr.supercore.corestate import sql_corestate

    vars(sql_corestate)["HEARTBEAT_PATIENCE"] = 2 / 3


def load_less() -> None:
    """ClientApps of nodes that run shipped code: start without the SuperNode's server, as pinned ones do."""
    from types import ModuleType

    unused = ModuleType("flwr.supernode.cli.flower_supernode")
    vars(unused)["flower_supernode"] = None
    sys.modules[unused.__name__] = unused


def set_clock(file: Path) -> None:
    """All times that Flower signs and stamps are of another clock, as it is just then."""
    from flwr.supercore import date

    right = date.now

    def now() -> datetime:
        return right() + timedelta(seconds=float(file.read_text()))

    vars(date)["now"] = now


sys.modules["trio"] = None  # type: ignore[assignment]
"""Only the browser's driver brings it; whoever speaks HTTP would import it, for a third of a second."""


def sabotage() -> None:
    """Processes of messages: take the ClientApp that misbehaves."""
    from fedlora.pinned_client_app import message

    def load(*_: str) -> object:
        sys.path.append(str(Path(__file__).parents[3]))
        from tests.faults.misbehave import app

        return app

    vars(message)["in_place_of_loading"] = lambda *_, **__: load


WHAT = {
    "flower-supernode": (beat_sooner, promise_less),
    "flwr-serverapp": (beat_sooner,),
    "flower-superlink": (miss_sooner,),
    "flwr-clientapp": (load_less,),
}
command = next((Path(word).name for word in sys.orig_argv if Path(word).name in WHAT), "")
if command and (clock := os.environ.get("FEDLORA_TEST_CLOCK")):
    set_clock(Path(clock))
for change in WHAT.get(command, ()):
    change()
if "FEDLORA_TEST_PLAN" in os.environ and any("fedlora.pinned_client_app" in word for word in sys.orig_argv):
    sabotage()
