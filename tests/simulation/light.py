"""ClientApps that need no model, so that actors start fast; messages with a number, and Ray to send them."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from flwr.app import ConfigRecord, Context, Message, MessageType, RecordDict
from flwr.clientapp import ClientApp

from fedlora.simulation.local_grid import LocalGrid

LIGHT = "tests.simulation.light:app"
app = ClientApp()


@app.train()
def train(message: Message, context: Context) -> Message:
    """Answer with who and where; what ``do`` says comes first."""
    asked = message.content.config_records["config"]
    marks = Path(str(context.node_config["state-dir"]))
    partition = int(context.node_config["partition-id"])
    times = len(list(marks.glob(f"{partition}-*")))
    (marks / f"{partition}-{times}-{time.monotonic_ns()}").touch()
    match asked["do"]:
        case "die" if times < int(asked["times"]):
            os.kill(os.getpid(), signal.SIGKILL)
        case "eat" if times < int(asked["times"]):
            Path(asked["group"]).write_text(str(os.getpid()))
            eaten = [b"x" * 20_000_000 for _ in range(100)]
            raise MemoryError(f"{len(eaten)} pieces fit")
        case "sleep":
            time.sleep(60)
        case "raise":
            raise ValueError("first line\nsecond line")
    answer = {"partition": partition, "pid": os.getpid(), "gpus": os.environ.get("CUDA_VISIBLE_DEVICES", "")}
    answer |= {
        "directory": os.getcwd(),
        "paths": list(sys.path),
        "quiet": os.environ["RAY_USAGE_STATS_ENABLED"],
    }
    return Message(RecordDict({"config": ConfigRecord(answer)}), reply_to=message)


def order(grid: LocalGrid, partition: int, do: str = "answer", times: int = 0, group: str = "") -> Message:
    """A message to a partition; ``group`` is the file by which a process joins a control group."""
    node = next(n for n, p in grid.partition_ids.items() if p == partition)
    content = RecordDict({"config": ConfigRecord({"do": do, "times": times, "group": group})})
    return grid.create_message(content, MessageType.TRAIN, node, "1")


def partitions_of(replies: Sequence[Message]) -> list[int]:
    """Who answered, in the order of the answers."""
    return [int(r.content.config_records["config"]["partition"]) for r in replies]  # type: ignore[arg-type]
