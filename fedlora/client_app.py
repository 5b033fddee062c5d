"""The ClientApp: messages in, messages out; the work is in ``clients``.

Importing this imports nothing heavy, as in deployment there is a new process for every message.
"""

from __future__ import annotations

from functools import cache
from logging import WARNING
from typing import TYPE_CHECKING

from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.common.logger import log

from clients.node_settings import node_settings
from fedlora.deployment.node.model_client import ask, start

if TYPE_CHECKING:
    from clients.runtime import RuntimeCache

app = ClientApp()


@app.query()
def identify(message: Message, context: Context) -> Message:
    """The partition that this node holds."""
    settings = node_settings(context.node_config)
    if settings.keep_model:
        try:
            start(settings.home)  # it imports what it needs while other nodes answer
        except OSError as error:
            log(WARNING, "the process that keeps the model does not start: %s", error)
    answer = ConfigRecord({"partition-id": settings.partition_id})
    return Message(RecordDict({"config": answer}), reply_to=message)


@app.train()
def train_message(message: Message, context: Context) -> Message:
    """Carry out an instruction to train."""
    return Message(_carried_out("train", message, context), reply_to=message)


@app.query("secure")
def secure_message(message: Message, context: Context) -> Message:
    """Carry out a step of secure sums."""
    from clients.secure_steps import carry_out
    from fedlora.config import from_flat

    config, settings = from_flat(dict(context.run_config)), node_settings(context.node_config)
    return Message(carry_out(message.content, config, settings, context.state), reply_to=message)


@app.evaluate()
def evaluate_message(message: Message, context: Context) -> Message:
    """Carry out an instruction to evaluate."""
    return Message(_carried_out("evaluate", message, context), reply_to=message)


def _carried_out(kind: str, message: Message, context: Context) -> RecordDict:
    settings = node_settings(context.node_config)
    if settings.keep_model and "secure" not in message.content:  # whose secrets stay in the node's state
        reply = ask(kind, message.content, context.run_config, context.node_config, settings)
        if reply is not None:
            return reply
    from clients.handler import handle

    return handle(kind, message.content, context.run_config, context.node_config, _runtimes(), context.state)


@cache
def _runtimes() -> RuntimeCache:
    """The model of this process."""
    # A module global: Flower imports the module and calls its functions, so no object of ours could own it.
    from clients.runtime import RuntimeCache

    return RuntimeCache()
