"""A federation of real processes, kept up as systemd would, with an app that can misbehave."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest

from fedlora.config import RunConfig, from_flat
from fedlora.core.files import write_atomic
from fedlora.deployment.operator import loopback as on_loopback
from fedlora.deployment.operator import submit as submitting
from fedlora.deployment.operator.create import create
from fedlora.deployment.operator.layout import Layout
from fedlora.deployment.operator.loopback import Loopback
from fedlora.deployment.operator.operate import node_states
from fedlora.errors import RunFailed
from fedlora.server.directory import RunDirectory

NODES = 3
BACK_SECONDS = 180.0
INSIDE = Path(__file__).with_name("inside")
"""Is looked into first by all processes of a federation, see `tests.faults.inside.sitecustomize`."""
PLAN = "FEDLORA_TEST_PLAN"
"""Names the file that says who misbehaves, see `tests.faults.misbehave`."""
BACK_AFTER = 24
"""Seconds in which a node that died is started again, in place of 75: its lease ends sooner, too."""
KEYS: dict[str, Any] = {
    "seed": 5,
    "model.name": "tiny",
    "lora.rank": 4,
    "data.name": "synthetic",
    "data.evaluate-examples": 40,
    "train.local-steps": 2,
    "min-available-nodes": 2,
    "min-train-nodes": 2,
    "round-timeout": 180,  # for machines that others work on, too: who is gone is not waited for that long
}
Plan = Mapping[int, Mapping[int, str]]
"""Partition -> round -> what its reply is turned into, see `tests.faults.misbehave.spoil`."""


@dataclass
class Up:
    """A federation that is up; what dies is started again as its systemd unit would.

    Attributes:
        loopback: its processes.
        told: what the supervisor said.
        left_alone: while it is set nothing is started again.
    """

    loopback: Loopback
    told: list[str] = field(default_factory=list)
    left_alone: threading.Event = field(default_factory=threading.Event)

    def kill(self, name: str) -> None:
        """SIGKILL of one of its processes (``superlink``, ``node-1``, ..) with all its children."""
        parent = psutil.Process(self.loopback.processes[name].pid)
        for process in [*parent.children(recursive=True), parent]:
            process.send_signal(signal.SIGKILL)

    def state(self, partition: int) -> Path:
        """What a node keeps between messages."""
        return self.loopback.layout.path / "nodes" / f"node-{partition}" / "state"


@contextmanager
def federation(
    home: Path, hosts: tuple[str, ...] = (), prepare: Callable[[Layout], None] = lambda _: None,
    nodes: int = NODES, sabotage: bool = False,
) -> Iterator[Up]:  # fmt: skip
    """Nodes on the loopback, each with one partition of the made-up data.

    Args:
        home: for everything.
        hosts: the server's addresses.
        prepare: called with the directory before anything is started.
        nodes: how many.
        sabotage: their ClientApps are `tests.faults.misbehave`, and do what `misbehaving` has them do.
    """
    layout = create(home / "federation", nodes, hosts)
    prepare(layout)
    if sabotage:
        plan(layout).write_text("{}")
    told: list[str] = []
    done = threading.Event()
    with hastened(home, plan(layout) if sabotage else None), Loopback(layout, told.append) as loopback:
        up = Up(loopback, told)

        def keep_up() -> None:
            while not done.wait(0.3):
                if not up.left_alone.is_set():
                    loopback.supervise()

        thread = threading.Thread(target=keep_up)
        thread.start()
        try:
            yield up
        finally:
            done.set()
            thread.join()


@contextmanager
def hastened(home: Path, plan: Path | None = None) -> Iterator[None]:
    """Inside, processes that are started have a cache of their own, leases that end sooner, and that plan."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("FEDLORA_CACHE", str(home / "cache"))
        patched.setenv("PYTHONPATH", str(INSIDE), prepend=os.pathsep)
        if plan is not None:
            patched.setenv(PLAN, str(plan))
        patched.setattr(on_loopback, "RESTART_SECONDS", BACK_AFTER)
        yield


def run(up: Up, out: Path, progress: Callable[[dict[str, Any]], None] = lambda _: None, *,
        resume: bool = False, **keys: Any) -> list[dict[str, Any]]:  # fmt: skip
    """One run on it; returns the rounds' records.

    Raises:
        RunFailed, ConfigError: as `submit`.
    """
    submitting.submit(up.loopback.layout, config(**keys), out, resume=resume, progress=progress)
    return RunDirectory(out, resume=True).rounds()


def config(**keys: Any) -> RunConfig:
    return from_flat({**KEYS, **{key.replace("_", "-"): value for key, value in keys.items()}})


def wait_for_nodes(up: Up) -> None:
    """Until all nodes are online."""
    deadline = time.monotonic() + BACK_SECONDS
    while time.monotonic() < deadline:
        try:
            if node_states(up.loopback.layout).get("online", 0) == len(up.loopback.layout.nodes):
                return
        except RunFailed:
            pass  # the SuperLink is not back yet
        time.sleep(1)
    raise AssertionError("the nodes did not come back")


def adapter(out: Path) -> bytes:
    return (out / "adapter" / "adapter_model.safetensors").read_bytes()


def trusting(layout: Layout) -> None:
    """Let the nodes run what a run ships, as their owners may."""
    for script in (layout.path / "nodes").glob("*/start.sh"):
        lines = script.read_text().splitlines(keepends=True)
        script.write_text("".join(line for line in lines if not line.startswith("export PATH=")))


@contextmanager
def misbehaving(up: Up, how: Plan) -> Iterator[None]:
    """Inside, some clients of a federation that was brought up with ``sabotage`` misbehave."""
    file = plan(up.loopback.layout)
    write_atomic(file, json.dumps(how))
    try:
        yield
    finally:
        write_atomic(file, "{}")


def plan(layout: Layout) -> Path:
    return layout.path / "plan.json"
