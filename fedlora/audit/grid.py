"""The clients of an audit, in this process: their real code, with canaries among their examples."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from uuid import uuid4

from flwr.app import Message, MessageType

from clients.budget import rate_of
from clients.execute import load, seed_of, set_up, stage_of, train_instruction
from clients.execute_cohort import Assignment, train_instructions
from clients.execute_evaluation import evaluate_instruction
from clients.node import Node
from clients.runtime import ClientRuntime
from clients.training.dp_mechanism import Mechanism
from clients.training.dp_sgd import train_private
from fedlora import wire
from fedlora.audit.canaries import ClientCanaries
from fedlora.audit.views import ServerView, tensors_of
from fedlora.config import RunConfig
from fedlora.core.factors import Tensors
from fedlora.simulation.local_grid import LocalGrid


class AuditGrid(LocalGrid):
    """One node for each partition; what the clients ship is shown to the attacker.

    Args:
        runtime: model and data of all clients.
        config: the run.
        clients: the partitions.
        state_dir: where clients keep what they hold between messages.
        view: the attacker at the server, with the canaries; None where there are none at the clients.
    """

    def __init__(
        self,
        runtime: ClientRuntime,
        config: RunConfig,
        clients: Sequence[int],
        state_dir: Path,
        view: ServerView | None = None,
    ) -> None:
        super().__init__(clients)
        self._runtime, self._config = runtime, config
        self._view = view
        self._state_dir = state_dir

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        """Carry out all messages, in cohorts where the run has them; a client's error is one of the audit."""
        waiting = list(messages)
        replies: list[Message] = []
        size = max(1, self._config.engine.cohort_size)
        for start in range(0, len(waiting), size):
            replies += self._answered(waiting[start : start + size])
        return replies

    def _answered(self, messages: list[Message]) -> list[Message]:
        assignments = []
        for message in messages:
            message.metadata.__dict__["_message_id"] = str(uuid4())
            instruction = wire.decode_instruction(message.content)
            node = Node(
                partition_id=self.partition_ids[message.metadata.dst_node_id],
                state_dir=self._state_dir,
                simulation=True,
            )
            assignments.append(Assignment(self._runtime, instruction, self._config, node))
        if messages[0].metadata.message_type == MessageType.TRAIN:
            answers = self._train(assignments)
        else:
            answers = [
                evaluate_instruction(self._runtime, one.instruction, self._config, one.node)
                for one in assignments
            ]
        return [
            Message(wire.encode_reply(reply, one.instruction), reply_to=message)
            for message, one, reply in zip(messages, assignments, answers, strict=True)
        ]

    def _train(self, assignments: list[Assignment]) -> list[wire.Reply]:
        """The replies; the attacker sees them beside the same round without canaries and noise."""
        view = self._view
        canaries = [None if view is None else self._canaries(one, view) for one in assignments]
        hidden = [
            replace(one, node=replace(one.node, canaries=own))
            for one, own in zip(assignments, canaries, strict=True)
        ]
        answers: list[Any] = (
            train_instructions(hidden)
            if len(hidden) > 1
            else [train_instruction(self._runtime, one.instruction, self._config, one.node) for one in hidden]
        )
        for one, own, answer in zip(assignments, canaries, answers, strict=True):
            if isinstance(answer, Exception):
                raise answer
            if view is not None and own is not None and answer.status == wire.OK:
                view.see(own, tensors_of(answer.arrays), self._replayed(one, view))
        return answers

    def _canaries(self, one: Assignment, view: ServerView, *, silent: bool = False) -> ClientCanaries:
        return ClientCanaries(
            view.design,
            one.node.partition_id,
            one.instruction.uploaded,
            clipping=self._config.privacy.clipping,
            shares=self._config.privacy.shares,
            silent=silent,
        )

    def _replayed(self, one: Assignment, view: ServerView) -> Tensors:
        """The round with the same draws, canaries that push along nothing, and no noise.

        Under differential privacy the attacker may know everything but a canary's coin and draws: the other
        examples, and which of them were drawn, too.
        """
        runtime, instruction, config, node = self._runtime, one.instruction, self._config, one.node
        resolved = set_up(runtime, instruction, config, node)
        assert not isinstance(resolved, wire.Reply)  # the client has just carried out the same instruction
        modules = load(runtime, resolved, instruction, config)
        train = config.train_of(node.partition_id)
        result = train_private(
            runtime.model,
            runtime.data.train,
            runtime.data.indices(node.partition_id),
            runtime.data.pad_token_id,
            train,
            local_steps=config.local_steps_of(node.partition_id),
            mechanism=Mechanism.of(config.privacy, train.batch_size),
            seed=seed_of(instruction, config, node),
            canaries=self._canaries(one, view, silent=True),
            sample_rate=rate_of(config, node.partition_id, runtime.data.num_protected(node.partition_id)),
            stage=stage_of(instruction, config),
        )
        return tensors_of(wire.to_peft(result.adapters, result.head, instruction.uploaded, modules))
