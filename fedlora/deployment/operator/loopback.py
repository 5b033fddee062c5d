"""``fedlora federation up``: a whole federation on this machine, as the processes that it really has.

The SuperLink, the gate and each node are started by their own start scripts, on the loopback. A node that
ends is started again after the delay that its systemd unit has. Leaving the block stops everything.
"""

from __future__ import annotations

import json
import socket
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import psutil

from fedlora.core.files import write_atomic
from fedlora.deployment.operator.keys import check_server
from fedlora.deployment.operator.layout import Layout, NodeEntry
from fedlora.deployment.operator.operate import node_states, register
from fedlora.deployment.operator.running import GATE, SUPERLINK, supervisor
from fedlora.deployment.operator.scripts import REQUEST_REFUSED, RESTART_SECONDS, flower_environment
from fedlora.errors import ConfigError, RunFailed

START_SECONDS = 120.0
STOP_SECONDS = 15.0

Say = Callable[[str], None]
"""Told what happens, one line at a time."""


@dataclass(slots=True)
class Loopback:
    """The processes of a federation on this machine; a context manager.

    Attributes:
        layout: the federation.
        say: told about each step.
        port: the gate's; 0 takes a free one.
        processes: by name; a node's is that of its directory.
        ports: by name.
    """

    layout: Layout
    say: Say
    port: int = 0
    processes: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)
    ports: dict[str, int] = field(default_factory=dict)
    _due: dict[str, float] = field(default_factory=dict)

    def __enter__(self) -> Loopback:
        """Start everything and wait until all nodes are online.

        Raises:
            ConfigError: this federation is up already, or the port is taken.
            RunFailed: something did not start; what did is stopped again.
        """
        if supervisor(self.layout) is not None:
            raise ConfigError(f"{self.layout.path}: is up already (fedlora federation down stops it)")
        check_server(self.layout.server)
        self._choose_ports()
        try:
            self._start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def supervise(self) -> None:
        """Start again what has ended: the server at once, a node after its delay. Call it now and then."""
        now = time.monotonic()
        for name, process in list(self.processes.items()):
            code = process.poll()
            if code is None:
                continue
            if name not in self._due:
                wait = 0 if name in (SUPERLINK, GATE) else RESTART_SECONDS
                if code == REQUEST_REFUSED and wait:
                    self.say(f"{name} ended, its settings or data are wrong: see {self._log(name)}")
                    del self.processes[name]
                    continue
                self._due[name] = now + wait
                self.say(f"{name} ended with {code}, it is started again in {wait} s")
            if now >= self._due[name]:
                del self._due[name]
                self._launch(name)
                self._write_up(ready=True)

    def stop(self) -> None:
        """End all processes and their children, nodes first."""
        family: dict[int, psutil.Process] = {}
        for process in self.processes.values():
            with suppress(psutil.NoSuchProcess):
                parent = psutil.Process(process.pid)
                family |= {p.pid: p for p in [parent, *parent.children(recursive=True)]}
        names = sorted(self.processes, key=lambda name: name in (SUPERLINK, GATE))
        for name in names:
            self.processes[name].terminate()
        for name in names:
            with suppress(subprocess.TimeoutExpired):
                self.processes[name].wait(STOP_SECONDS)
        _, left = psutil.wait_procs(family.values(), timeout=3)
        for process in left:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(left, timeout=5)
        self.layout.up_file.unlink(missing_ok=True)

    # --- pieces -----------------------------------------------------------------------------------------

    def _choose_ports(self) -> None:
        names = [entry.name for entry in self.layout.nodes]
        if self.port and not is_free(self.port):
            raise ConfigError(f"--port {self.port}: is taken on {HOST}")
        self.ports = dict(zip([GATE, SUPERLINK, *names], free_ports(len(names) + 2), strict=True))
        if self.port:
            self.ports[GATE] = self.port

    def _start(self) -> None:
        self._write_up(ready=False)
        self.say(f"starting the SuperLink on {HOST}:{self.ports[SUPERLINK]}")
        self._launch(SUPERLINK)
        self._wait_for_port(SUPERLINK)
        self._launch(GATE)
        self._wait_for_port(GATE)
        self.say(f"gate on {HOST}:{self.ports[GATE]}; registering {len(self.layout.nodes)} keys")
        register(self.layout)
        for entry in self.layout.nodes:
            self._launch(entry.name)
        self.say("waiting for the nodes")
        self._wait_for_nodes()
        self._write_up(ready=True)

    def _launch(self, name: str) -> None:
        script, home, settings = self._script(name)
        log = self._log(name)
        with log.open("ab") as file:
            self.processes[name] = subprocess.Popen(
                [str(script)],
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=file,
                env=flower_environment(home, **settings),
                start_new_session=True,
            )

    def _script(self, name: str) -> tuple[Path, Path, dict[str, str]]:
        """Start script, Flower home and environment of one process."""
        server = self.layout.server
        if name in (SUPERLINK, GATE):
            settings = {
                "FEDLORA_CONTROL_PORT": str(self.ports[SUPERLINK]),
                "FEDLORA_GATE_HOST": HOST,
                "FEDLORA_GATE_PORT": str(self.ports[GATE]),
            }
            return server / f"{name}.sh", self.layout.flower_home, settings
        node = self.layout.node(self._entry(name))
        settings = {
            "FEDLORA_SUPERLINK": f"{HOST}:{self.ports[GATE]}",
            "FEDLORA_NODE_PORT": str(self.ports[name]),
        }
        return node / "start.sh", node / "flwr", settings

    def _entry(self, name: str) -> NodeEntry:
        return next(entry for entry in self.layout.nodes if entry.name == name)

    def _log(self, name: str) -> Path:
        folder = self.layout.server if name in (SUPERLINK, GATE) else self.layout.node(self._entry(name))
        return folder / f"{name}.log"

    def _wait_for_port(self, name: str) -> None:
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline:
            self._refuse_dead(name)
            with socket.socket() as probe:
                probe.settimeout(1)
                if probe.connect_ex((HOST, self.ports[name])) == 0:
                    return
            time.sleep(0.1)
        raise RunFailed(f"{name} did not start in {START_SECONDS:.0f} s, see {self._log(name)}")

    def _wait_for_nodes(self) -> None:
        wanted, told = len(self.layout.nodes), -1
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline:
            for entry in self.layout.nodes:
                if self.processes[entry.name].poll() == REQUEST_REFUSED:
                    self._refuse_dead(entry.name)
            self.supervise()
            online = node_states(self.layout).get("online", 0)
            if online != told:
                self.say(f"{online} of {wanted} nodes online")
                told = online
            if online >= wanted:
                return
            time.sleep(0.5)
        raise RunFailed(f"only {told} of {wanted} nodes came online, see the logs in {self.layout.path}")

    def _refuse_dead(self, name: str) -> None:
        code = self.processes[name].poll()
        if code is not None:
            lines = self._log(name).read_text(errors="replace").strip().splitlines() or ["nothing"]
            raise RunFailed(f"{name} ended with {code}, its log {self._log(name)} ends: {lines[-1]}")

    def _write_up(self, *, ready: bool) -> None:
        own = psutil.Process()
        content: dict[str, Any] = {
            "ready": ready,
            "pid": own.pid,
            "created": own.create_time(),
            "ports": self.ports,
            "pids": {name: process.pid for name, process in self.processes.items()},
        }
        write_atomic(self.layout.up_file, json.dumps(content) + "\n")


def bring_down(layout: Layout) -> None:
    """Tell the process of ``fedlora federation up`` to stop, and wait for it.

    Raises:
        ConfigError: there is none.
        RunFailed: it does not end.
    """
    process = supervisor(layout)
    if process is None:
        raise ConfigError(f"{layout.path}: is not up on this machine")
    process.terminate()
    try:
        process.wait(4 * STOP_SECONDS)
    except psutil.TimeoutExpired:
        raise RunFailed(f"{layout.path}: process {process.pid} does not end") from None


HOST = "127.0.0.1"


def is_free(port: int) -> bool:
    """Whether it can be listened on."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError:
            return False
    return True


def free_ports(count: int) -> list[int]:
    """Ports that were free a moment ago; held together so that they differ."""
    probes = [socket.socket() for _ in range(count)]
    try:
        for probe in probes:
            probe.bind((HOST, 0))
        return [int(probe.getsockname()[1]) for probe in probes]
    finally:
        for probe in probes:
            probe.close()
