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
from fedlora.core.code import versions
from fedlora.deployment.node import fork_client
from fedlora.deployment.node.model_client import ask, start
from fedlora.errors import SecureRefused
from fedlora.secure.step import MASKED

if TYPE_CHECKING:
    from clients.runtime import RuntimeCache

app = ClientApp()


@app.query()
def identify(message: Message, context: Context) -> Message:
    """The partition that this node holds, and what it has installed."""
    settings = node_settings(context.node_config)
    if settings.keep_model:
        try:
            fork_client.start(settings.home)
            start(settings.home)  # it imports what it needs while other nodes answer
        except OSError as error:
            log(WARNING, "the processes that serve the next messages do not start: %s", error)
    answer = ConfigRecord({"partition-id": settings.partition_id, "versions": versions()})
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
    simulation = bool(context.node_config.get("simulation", False))
    answer = carry_out(message.content, config, settings, context.state, simulation=simulation)
    return Message(answer, reply_to=message)


@app.evaluate()
def evaluate_message(message: Message, context: Context) -> Message:
    """Carry out an instruction to evaluate."""
    return Message(_carried_out("evaluate", message, context), reply_to=message)


def _carried_out(kind: str, message: Message, context: Context) -> RecordDict:
    settings, content = node_settings(context.node_config), message.content
    if settings.keep_model:
        reply = ask(kind, content, context.run_config, context.node_config, settings)
        if reply is not None:
            return _masked(reply, content, context) if MASKED in reply else reply
    from clients.handler import handle

    return handle(kind, content, context.run_config, context.node_config, _runtimes(), context.state)


def _masked(reply: RecordDict, content: RecordDict, context: Context) -> RecordDict:
    """The reply of the process that keeps the model under masks, whose secrets are here alone."""
    from clients.secure_steps import under_masks
    from fedlora.config import from_flat

    config, settings = from_flat(dict(context.run_config)), node_settings(context.node_config)
    try:
        under_masks(reply, content, config, settings, context.state)
    except SecureRefused as error:
        from fedlora import wire

        log(WARNING, "secure sums: %s", error)
        instruction = wire.decode_instruction(content)
        declined = wire.Reply(status=wire.DECLINED, reason=str(error))
        return wire.encode_reply(declined, instruction, packed=instruction.packed)
    return reply


@cache
def _runtimes() -> RuntimeCache:
    """The model of this process."""
    # A module global: Flower imports the module and calls its functions, so no object of ours could own it.
    from clients.runtime import RuntimeCache

    return RuntimeCache()
