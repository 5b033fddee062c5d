"""One cell of `experiments.benchmarks.engine`: start it, watch it, say what it cost; prints a JSON object.

    python -m experiments.benchmarks.engine_cell ORDER.json

All ways are watched alike, from outside: a round ends when its line appears in ``OUT/rounds.jsonl``, the
run when its process does; memory is that of the process and all that it started.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import psutil
import tomli_w

from experiments.benchmarks.engine_cells import (
    COHORT,
    HOME,
    LOOP,
    LOOP_ALL,
    ONE_ACTOR,
    STOCK,
    STOCK_SIMULATION,
)
from fedlora.simulation.memory import PeakMemory, memory_now

LOOK_SECONDS, CHILDREN_SECONDS = 0.02, 1.0
APP = Path(__file__).parent / "stock"
BIN = Path(sys.executable).parent


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """What to start.

    Attributes:
        regime: its name.
        way: how it is run.
        rounds: of the run.
        device: cpu, cuda or mps.
        actors: client processes of fedlora.
        cohort_size: clients that one of them trains together in `COHORT`; 0 lets fedlora choose.
        folder: what the run writes; its log and settings lie beside it.
    """

    regime: str
    way: str
    rounds: int
    device: str
    actors: int
    cohort_size: int
    folder: str

    @property
    def out(self) -> Path:
        return Path(self.folder).resolve()

    @property
    def gpus(self) -> float:
        """The share of a GPU that one of several client processes has."""
        return 1 / self.actors if self.device == "cuda" else 0.0


@dataclass(slots=True)
class Watched:
    """Seconds after the start at which rounds ended, and at which all did."""

    rounds: list[float] = field(default_factory=list)
    whole: float = 0.0
    peak_bytes: int = 0


def main() -> None:
    """Prints the record of the cell."""
    signal.signal(
        signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM)
    )  # so that nothing is left running
    order = Order(**json.loads(sys.argv[1]))
    order.out.mkdir(parents=True)
    before = os.getloadavg()[0]
    command, extra = command_of(order)
    seen = watch(command, {**os.environ, **QUIET, **extra}, order.out)
    if len(seen.rounds) != order.rounds:
        sys.exit(f"{order.way}: {len(seen.rounds)} of {order.rounds} rounds, see {order.out}.log")
    print(json.dumps({**record_of(seen), "load_before": round(before, 2)}))


QUIET = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TRANSFORMERS_VERBOSITY": "error",
}


def command_of(order: Order) -> tuple[list[str], dict[str, str]]:
    """The command and what its environment has besides this one's."""
    folder = HOME / order.regime
    if order.way in (LOOP, LOOP_ALL):
        threads = 1 if order.way == LOOP else os.cpu_count() or 1
        arguments = [folder / "setting.toml", order.out, "--rounds", order.rounds, "--threads", threads]
        module = "experiments.benchmarks.engine_loop"
        return [sys.executable, "-m", module, *map(str, arguments), "--device", order.device], {}
    if order.way in (STOCK, STOCK_SIMULATION):
        return stock_command(order, tomllib.loads((folder / "setting.toml").read_text()))
    settings = {
        "num-server-rounds": order.rounds,
        "evaluate-every": order.rounds,
        "engine.num-actors": 1 if order.way == ONE_ACTOR else order.actors,
        "engine.cohort-size": order.cohort_size if order.way == COHORT else 1,
        "engine.num-gpus": order.gpus,
    }
    sets = [part for key, value in settings.items() for part in ("--set", f"{key}={value}")]
    return [str(BIN / "fedlora"), "run", str(folder / "config.toml"), *sets, "--out", str(order.out)], {}


def stock_command(order: Order, setting: dict[str, Any]) -> tuple[list[str], dict[str, str]]:
    """The stock app, with a Flower home and ports of its own."""
    own = {"num-server-rounds": order.rounds, "out": str(order.out), "device": order.device}
    written = order.out.parent / f"{order.out.name}.toml"
    written.write_text(tomli_w.dumps(setting | own))
    clients = str(setting["population"])
    if order.way == STOCK_SIMULATION:
        extra = {"STOCK_APP_SETTING": str(written), "PYTHONPATH": str(APP)}
        return [sys.executable, "-m", "lora_app.simulate", clients, str(order.gpus)], extra
    resources = f"client-resources-num-cpus=1 client-resources-num-gpus={order.gpus}"
    extra = {
        "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
        "FLWR_HOME": str(order.out.parent / f"{order.out.name}.flwr"),
        "FLWR_LOCAL_SUPERLINK_HTTP_API_PORT": str(_free_port()),
        "FLWR_LOCAL_CONTROL_API_PORT": str(_free_port()),
    }
    federation = f"num-supernodes={clients} {resources}"
    command = [str(BIN / "flwr"), "run", str(APP), "--stream", "--federation-config", federation]
    return [*command, "--run-config", str(written)], extra


def watch(command: list[str], environment: dict[str, str], out: Path) -> Watched:
    """Start the command and look on until it ends; what it leaves running is stopped."""
    seen, own = Watched(), memory_now()
    started: dict[int, psutil.Process] = {}
    with (out.parent / f"{out.name}.log").open("w") as log, PeakMemory() as memory:
        began = time.perf_counter()
        process = psutil.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT)
        try:
            look_on(process, out / "rounds.jsonl", began, seen, started)
        finally:
            stop(started)
    seen.peak_bytes = memory.peak_bytes - own
    return seen


def look_on(
    process: psutil.Popen, lines: Path, began: float, seen: Watched, started: dict[int, psutil.Process]
) -> None:
    """Note when rounds end and which processes there are, until the first of them ends."""
    looked = began
    while not seen.whole:
        ended = process.poll() is not None
        now = time.perf_counter()
        done = lines.read_bytes().count(b"\n") if lines.exists() else 0
        seen.rounds += [now - began] * (done - len(seen.rounds))
        if now - looked > CHILDREN_SECONDS:
            looked = now
            started |= {child.pid: child for child in psutil.Process().children(recursive=True)}
        if ended:
            seen.whole = now - began
        else:
            time.sleep(LOOK_SECONDS)


def stop(started: dict[int, psutil.Process]) -> None:
    """End those of the processes that still run."""
    left = [process for process in started.values() if process.is_running()]
    for process in left:
        process.terminate()
    for process in psutil.wait_procs(left, timeout=10)[1]:
        process.kill()


def record_of(seen: Watched) -> dict[str, Any]:
    """The figures of a cell.

    The steady seconds are the median over the rounds without the first, which loads everything, and
    the last, which evaluates; of two rounds it is the second.
    """
    times = [after - before for before, after in zip(seen.rounds, seen.rounds[1:], strict=False)]
    return {
        "first_round_seconds": seen.rounds[0],
        "round_seconds": times,
        "steady_seconds": median(times[:-1] or times),
        "whole_seconds": seen.whole,
        "peak_memory_bytes": seen.peak_bytes,
    }


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


if __name__ == "__main__":
    main()
