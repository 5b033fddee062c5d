"""The ClientApp: messages in, messages out; the work is in ``clients``."""

from __future__ import annotations

import os
from pathlib import Path

from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp

from clients.carry_out import Node, evaluate_order, train_order
from clients.resident import configured
from fedlora import wire
from fedlora.assets import cache_dir

app = ClientApp()


@app.query()
def identify(message: Message, context: Context) -> Message:
    """Say which partition this node holds."""
    answer = ConfigRecord({"partition-id": int(context.node_config["partition-id"])})
    return Message(RecordDict({wire.CONFIG: answer}), reply_to=message)


@app.train()
def train_message(message: Message, context: Context) -> Message:
    """Carry out an order to train."""
    reply = train_order(wire.decode_order(message.content), configured(context.run_config), node_of(context))
    return Message(wire.encode_reply(reply), reply_to=message)


@app.evaluate()
def evaluate_message(message: Message, context: Context) -> Message:
    """Carry out an order to evaluate."""
    reply = evaluate_order(
        wire.decode_order(message.content), configured(context.run_config), node_of(context)
    )
    return Message(wire.encode_reply(reply), reply_to=message)


def node_of(context: Context) -> Node:
    """This node, from its node-config; ``state-dir`` defaults to a place in the cache."""
    state_dir = context.node_config.get("state-dir") or os.environ.get("FEDLORA_STATE_DIR")
    return Node(
        partition_id=int(context.node_config["partition-id"]),
        state_dir=Path(str(state_dir)) if state_dir else cache_dir() / "clients",
        simulation=bool(context.node_config.get("simulation", False)),
    )
