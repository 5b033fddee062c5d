"""Request to one client on its way: what it says as named tensors, and the reply that is put into it."""

from __future__ import annotations

from dataclasses import dataclass, field

from flwr.app import ConfigRecord, Message

from fedlora import wire
from fedlora.core.factors import Tensors
from fedlora.core.state import Broadcast
from fedlora.errors import UpdateRefused

NO_REPLY = "no reply before the deadline"


@dataclass(frozen=True, slots=True)
class Payload:
    """Tensors of a broadcast in PEFT's spelling, taken out of it once for all clients that get the same.

    Attributes:
        source: whose they are; held, as it is known by the identity of its tensors.
        moving: see `fedlora.wire.moving_tensors`.
        frozen: see `fedlora.wire.frozen_tensors`.
        layers: see `fedlora.wire.layer_parts`.
        head: the other trained tensors.
    """

    source: Broadcast
    moving: Tensors
    frozen: Tensors
    layers: list[tuple[Tensors, bool]]
    head: Tensors

    @property
    def tensors(self) -> Tensors:
        """All of them."""
        parts = [self.moving, self.frozen, *(part for part, _ in self.layers), self.head]
        return {name: tensor for part in parts for name, tensor in part.items()}


@dataclass(slots=True)
class PendingRequest:
    """Instruction to one client on its way, and what came of it.

    Attributes:
        partition_id: whose it is.
        node_id: where it goes.
        broadcast: what it says.
        payload: the same as tensors with names.
        needs: what the client must hold for it.
        rank: of the adapter that the rule wants, where it travels padded to a larger one; else 0.
        half: it travels in half precision.
        upload: the codec of its reply, see `fedlora.wire.upload`.
        reply: the decoded reply, once there is one.
        failure: why there is none.
        identity: of the instruction, once it is sent.
        bytes_down, bytes_up: payload bytes that travelled, repetitions included.
        sent: the messages that carried it.
    """

    partition_id: int
    node_id: int
    broadcast: Broadcast
    payload: Payload
    needs: wire.Needs
    rank: int = 0
    half: bool = False
    upload: str = "float32"
    reply: wire.Reply | None = None
    failure: str = NO_REPLY
    identity: str = ""
    bytes_down: int = 0
    bytes_up: int = 0
    sent: list[Message] = field(default_factory=list)

    @property
    def is_silent(self) -> bool:
        """Whether its deadline has passed without a reply."""
        return self.reply is None and self.failure == NO_REPLY

    def message_ids(self) -> set[str]:
        """Ids that the Grid gave the messages; a lost node's error names only these."""
        return {message.metadata.message_id for message in self.sent}


def says_missing(reply: Message) -> bool:
    """Whether a client answered that it lacks something."""
    if reply.has_error():
        return False
    config = reply.content.config_records.get(wire.CONFIG, ConfigRecord())
    return config.get("status") == wire.MISSING


def read_reply(request: PendingRequest, message: Message, *, trained: bool) -> wire.Reply | None:
    """Put the decoded reply, or the reason why it cannot be used, into its request."""
    if message.has_error():
        request.failure = (message.error.reason or f"error {message.error.code}").strip().splitlines()[-1]
        return None
    request.bytes_up += wire.payload_bytes(message.content)
    try:
        reply = wire.decode_reply(message.content, trained=trained)
        if reply.answers not in ("", request.identity):
            raise UpdateRefused(f"answers {reply.answers}, not {request.identity}")
        request.reply = reply
    except UpdateRefused as error:
        request.failure = str(error)
    return request.reply
