"""A ClientApp that does its work and then sends something else: a node's in place of the installed one."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

import numpy as np
import psutil
from flwr.app import Array, Context, Message, RecordDict
from flwr.clientapp import ClientApp

from clients.node_settings import node_settings
from fedlora.client_app import identify, secure_message, train_message
from fedlora.deployment.node.fork_client import OWNER
from fedlora.secure.step import step_of

app = ClientApp()


@app.query()
def query(message: Message, context: Context) -> Message:
    return identify(message, context)


def planned(context: Context, server_round: int) -> str:
    plan = json.loads(Path(os.environ["FEDLORA_TEST_PLAN"]).read_text()).get(
        str(node_settings(context.node_config).partition_id), {}
    )
    return str(plan.get(str(server_round), ""))


def die_if_planned(kind: str, phase: str) -> None:
    """End the SuperNode with all its children and this process, without a word to anybody."""
    if kind == f"die at {phase}":
        above = psutil.Process(int(os.environ[OWNER])).parents()
        node = next(p for p in above if any("supernode" in w for w in p.cmdline()))
        for process in [node, *node.children(recursive=True), psutil.Process()]:
            process.send_signal(signal.SIGKILL)


@app.query("secure")
def secure(message: Message, context: Context) -> Message:
    """A step of secure sums, whose session begins with ``round N of run``."""
    step = step_of(message.content.config_records)
    die_if_planned(planned(context, int(step.text("session").split()[1])), step.text("phase"))
    return secure_message(message, context)


@app.train()
def train(message: Message, context: Context) -> Message:
    settings = node_settings(context.node_config)
    kind = planned(context, int(message.content["config"]["server-round"]))
    die_if_planned(kind, "train")
    if kind.startswith("slow"):  # "slow-8": by so many seconds
        time.sleep(float(kind.partition("-")[2]))
    reply = train_message(message, context)
    if kind.startswith("die") or not kind:
        return reply
    return Message(spoil(kind, reply.content, settings.home / "old-reply.npz"), reply_to=message)


def spoil(kind: str, content: RecordDict, kept: Path) -> RecordDict:
    """The reply made wrong in one way; ``keep`` and ``replay`` send an old one again."""
    from fedlora.wire import from_record, to_record  # with torch, which honest messages do without

    arrays = content["arrays"] = to_record(from_record(content["arrays"]))
    name = next(key for key in arrays if "lora_B" in key)
    values = arrays[name].numpy().copy()
    match kind:
        case "nan":
            values[0, 0] = np.nan
        case "far":
            values += 100.0
        case "shape":
            values = values[:-1]
        case "rank":
            for key in list(arrays):
                if "lora_" in key:
                    array = arrays[key].numpy()
                    arrays[key] = Array(array[:2] if "lora_A" in key else array[:, :2])
            return content
        case "keep":
            old = {key: array.numpy() for key, array in arrays.items()}
            np.savez(kept, answers=content["config"]["answers"], **old)
        case "replay":
            with np.load(kept) as old:
                content["config"]["answers"] = str(old["answers"])
                for key in arrays:
                    arrays[key] = Array(old[key])
            return content
        case "blob":
            arrays[name] = Array(arrays[name].dtype, arrays[name].shape, "numpy.ndarray", b"\x80\x04rubbish")
            return content
    arrays[name] = Array(values)
    return content
