"""The clients of an audit, in this process: their real code, with canaries among their examples."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from uuid import uuid4

from flwr.app import Message, MessageType

from clients.execute import Node, evaluate_instruction, load, set_up, train_instruction
from clients.runtime import ClientRuntime
from clients.training.dp_sgd import train_private
from fedlora import wire
from fedlora.audit.canaries import ClientCanaries, Design
from fedlora.audit.views import ServerView, tensors_of
from fedlora.config import RunConfig
from fedlora.core.factors import Tensors
from fedlora.core.seeding import derive
from fedlora.simulation.local_grid import LocalGrid

LARGER = 4
"""Batches of the rehearsal / those of the client: the expected step is the same, and nearer to its mean."""


class AuditGrid(LocalGrid):
    """One node for each partition; what the clients ship is shown to the attacker.

    Args:
        runtime: model and data of all clients.
        config: the run.
        design: the canaries.
        view: the attacker at the server.
        state_dir: where clients keep what they hold between messages.
    """

    def __init__(
        self, runtime: ClientRuntime, config: RunConfig, design: Design, view: ServerView, state_dir: Path
    ) -> None:
        super().__init__(design.clients)
        self._runtime, self._config = runtime, config
        self._design = design
        self._view = view
        self._state_dir = state_dir

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        """Carry out all messages, one after the other; an error of a client is an error of the audit."""
        replies = []
        for message in messages:
            message.metadata.__dict__["_message_id"] = str(uuid4())
            instruction = wire.decode_instruction(message.content)
            node = Node(
                partition_id=self.partition_ids[message.metadata.dst_node_id],
                state_dir=self._state_dir,
                simulation=True,
            )
            if message.metadata.message_type == MessageType.TRAIN:
                reply = self._train(instruction, node)
            else:
                reply = evaluate_instruction(self._runtime, instruction, self._config, node)
            replies.append(Message(wire.encode_reply(reply, instruction), reply_to=message))
        return replies

    def _train(self, instruction: wire.TrainInstruction, node: Node) -> wire.Reply:
        canaries = ClientCanaries(self._design, node.partition_id, instruction.uploaded)
        reply = train_instruction(self._runtime, instruction, self._config, replace(node, canaries=canaries))
        if reply.status == wire.OK:
            self._view.see(
                canaries, tensors_of(reply.arrays), rehearsal(self._runtime, instruction, self._config, node)
            )
        return reply


def rehearsal(
    runtime: ClientRuntime, instruction: wire.TrainInstruction, config: RunConfig, node: Node
) -> Tensors:
    """What a client would send without canaries and without noise, by larger batches of the attacker's own.

    Under differential privacy the attacker may know everything but the coin, the other examples included.
    """
    resolved = set_up(runtime, instruction, config, node)
    assert not isinstance(resolved, wire.Reply)  # the client has just carried out the same instruction
    modules = load(runtime, resolved, instruction, config)
    privacy, indices = config.privacy, runtime.data.indices(node.partition_id)
    result = train_private(
        runtime.model,
        runtime.data.train,
        indices,
        runtime.data.pad_token_id,
        replace(config.train, batch_size=min(len(indices), LARGER * config.train.batch_size)),
        local_steps=config.local_steps_of(node.partition_id),
        noise_multiplier=0.0,
        max_grad_norm=privacy.max_grad_norm,
        seed=derive(config.seed, "audit", "rehearsal", instruction.server_round, node.partition_id),
        clipping=privacy.clipping,
        max_physical_batch_size=privacy.max_physical_batch_size,
    )
    return tensors_of(wire.to_peft(result.adapters, result.head, instruction.uploaded, modules))
