"""The ClientApp: messages in, messages out; the work is in ``clients``.

Importing this imports nothing heavy, as in deployment there is a new process for every message.
"""

from __future__ import annotations

from collections.abc import Sequence
from logging import WARNING

from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.common.logger import log

from clients.node_settings import node_settings
from fedlora.deployment.node.model_client import ask, start

app = ClientApp()


@app.query()
def identify(message: Message, context: Context) -> Message:
    """Say which partition this node holds."""
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
    """Carry out an order to train."""
    return Message(_carried_out("train", message, context), reply_to=message)


@app.evaluate()
def evaluate_message(message: Message, context: Context) -> Message:
    """Carry out an order to evaluate."""
    return Message(_carried_out("evaluate", message, context), reply_to=message)


def train_together(messages: Sequence[Message], contexts: Sequence[Context]) -> list[Message | str]:
    """Carry out orders to train for several simulated nodes in this process; see `clients.training.batched`.

    Returns:
        The replies, in the order of the messages; of a node that failed its one-line error.
    """
    from clients.handler import handle_together

    replies = handle_together(
        [message.content for message in messages],
        [context.run_config for context in contexts],
        [context.node_config for context in contexts],
    )
    return [
        reply if isinstance(reply, str) else Message(reply, reply_to=message)
        for message, reply in zip(messages, replies, strict=True)
    ]


def _carried_out(kind: str, message: Message, context: Context) -> RecordDict:
    settings = node_settings(context.node_config)
    if settings.keep_model:
        reply = ask(kind, message.content, context.run_config, context.node_config, settings)
        if reply is not None:
            return reply
    from clients.handler import handle

    return handle(kind, message.content, context.run_config, context.node_config)
