"""A Grid that carries out messages in this process, with faults on request, and a client without a model."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from uuid import uuid4

import torch
from flwr.app import Error, Message, RecordDict
from flwr.serverapp import Grid

from clients.store import ClientStore, resolve
from fedlora import wire
from fedlora.core.factors import AdapterSet, LoraFactors, Tensors
from fedlora.core.seeding import torch_stream
from fedlora.simulation.local_grid import speak_as_server

Client = Callable[[Message, int], Message | None]


class FakeGrid(Grid):
    """Nodes with random-looking ids; ``client`` answers, returning None means that the reply is lost."""

    def __init__(self, partitions: Iterable[int], client: Client, *, tells_partitions: bool = True) -> None:
        ids = list(partitions)
        self.nodes = {1000 + 37 * ((p * 7) % 101): p for p in ids}
        self.client = client
        self.sent: list[Message] = []
        if tells_partitions:
            self.partition_ids = self.nodes
        speak_as_server(run_id=1)

    def set_run(self, run: object) -> None:
        raise NotImplementedError

    @property
    def run(self) -> object:
        raise NotImplementedError

    def create_message(self, *args: object, **kwargs: object) -> Message:
        raise NotImplementedError

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        raise NotImplementedError

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        raise NotImplementedError

    def get_node_ids(self) -> Iterable[int]:
        return list(self.nodes)

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        replies = []
        for message in messages:
            message.metadata.__dict__["_message_id"] = str(uuid4())
            self.sent.append(message)
            try:
                reply = self.client(message, self.nodes[message.metadata.dst_node_id])
            except Exception as error:
                reply = Message(Error(0, f"{type(error).__name__}: {error}"), reply_to=message)
            if reply is not None:
                replies.append(reply)
        return replies[::-1]


class ToyClient:
    """Follows the protocol on disk and moves factors by seeded noise instead of training.

    Attributes:
        bases: partition -> digests of the base it last trained on, with the patches themselves.
    """

    def __init__(
        self,
        root: Path,
        num_examples: Callable[[int], int] = lambda p: p + 1,
        loss: Callable[[int], float] = lambda p: 1.0,
    ) -> None:
        self.root = root
        self.num_examples, self.loss = num_examples, loss
        self.bases: dict[int, list[Tensors]] = {}
        self.starts: dict[int, AdapterSet] = {}

    def __call__(self, message: Message, partition: int) -> Message | None:
        order = wire.decode_instruction(message.content)
        opened = resolve(order, ClientStore(self.root / str(partition)))
        if isinstance(opened, wire.Reply):
            return Message(wire.encode_reply(opened), reply_to=message)
        self.bases[partition] = [opened.patch(name).tensors() for name in order.needs.base]
        self.starts[partition] = opened.adapters
        modules = json.loads(order.config["modules"])
        moved = {n: self.moved(f, order, partition, n) for n, f in opened.adapters.items() if n in modules}
        head = {name: t + 0.1 * (partition + 1) for name, t in opened.head.items()}
        reply = wire.Reply(
            status=wire.OK,
            arrays=wire.to_peft(moved, head, order.uploaded),
            start=wire.to_peft(opened.adapters, opened.head, order.uploaded, modules),
            metrics={"num-examples": self.num_examples(partition), "train-loss": self.loss(partition)},
            holds=order.needs.digests,
        )
        return Message(wire.encode_reply(reply, order), reply_to=message)

    @staticmethod
    def moved(f: LoraFactors, order: wire.TrainInstruction, partition: int, name: str) -> LoraFactors:
        g = torch_stream(0, "toy", order.server_round, partition, name)
        moved = {
            x: t + 0.1 * torch.randn(t.shape, generator=g)
            for x, t in f.tensors().items()
            if x in order.trained
        }
        return replace(f, **moved)


def with_content(message: Message, content: RecordDict) -> Message:
    return Message(content, reply_to=message)
