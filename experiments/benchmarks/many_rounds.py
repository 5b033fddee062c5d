"""What a run of many tiny rounds takes of memory and disk, and whether that grows with its rounds.

    python -m experiments.benchmarks.many_rounds runs/many --strategy flora --engine in-process --rounds 2000

Four clients, rank 4, one step a round. A line after every tenth of the rounds: memory of this process and
of the largest client process, files and bytes in the run directory without ``rounds.jsonl`` (a run is asked
for a line a round), bytes sent to clients in that round, and processor seconds since the last line.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import psutil

from fedlora.config import from_flat
from fedlora.simulation.simulate import simulate

KEYS: dict[str, Any] = {
    "model.name": "tiny", "data.name": "synthetic", "data.num-partitions": 4, "data.evaluate-examples": 8,
    "evaluate-every": 1000, "lora.rank": 4, "train.local-steps": 1, "train.batch-size": 2,
    "strategy.diagnostics": False,
}  # fmt: skip


def resident(process: psutil.Process) -> float:
    """MB of a process's own and shared memory."""
    return float(process.memory_info().rss) / 1e6


def clients() -> list[psutil.Process]:
    """Processes of Ray's actors below this one."""
    below = psutil.Process().children(recursive=True)
    return [p for p in below if p.is_running() and p.name().startswith("ray::")]


def on_disk(path: Path) -> tuple[int, float]:
    """Files below a run directory but its lines, and their kB."""
    files = [f for f in path.rglob("*") if f.is_file() and f.name != "rounds.jsonl"]
    return len(files), sum(f.stat().st_size for f in files) / 1e3


def main() -> None:
    """The command line of this module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--strategy", default="flora")
    parser.add_argument("--engine", default="in-process", choices=["in-process", "ray"])
    parser.add_argument("--rounds", type=int, default=2000)
    given = parser.parse_args()
    engine = {"engine.name": given.engine, "engine.num-actors": 0 if given.engine == "in-process" else 1}
    config = from_flat({**KEYS, **engine, "strategy.name": given.strategy, "num-server-rounds": given.rounds})
    every, spent = max(1, given.rounds // 10), [time.process_time()]

    def told(record: dict[str, Any]) -> None:
        if record["round"] % every or not record["round"]:
            return
        files, size = on_disk(given.out)
        largest = max(map(resident, clients()), default=0.0)
        now = time.process_time()
        print(
            f"round {record['round']}: driver {resident(psutil.Process()):.0f} MB, client {largest:.0f} MB, "
            f"{files} files, {size:.0f} kB, down {record['bytes_down'] / 1e3:.1f} kB, "
            f"{now - spent[0]:.1f} s of this process",
            flush=True,
        )
        spent[0] = now

    simulate(config, given.out, callback=told)


if __name__ == "__main__":
    main()
