"""Runs of which the server sees sums alone, and somebody between it and the clients."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from flwr.app import Message, RecordDict
from hypothesis import strategies as st

from fedlora.config import RunConfig, from_flat
from fedlora.core.state import State
from fedlora.secure.step import SECURE, STEP
from fedlora.server.directory import RunDirectory
from fedlora.server.federated_run import FederatedRun
from fedlora.simulation.in_process import InProcessEngine
from fedlora.simulation.local_grid import LocalGrid

ENGINE = InProcessEngine()
KEYS: dict[str, Any] = {
    "model.name": "tiny", "data.name": "synthetic", "data.evaluate-examples": 8, "data.num-partitions": 5,
    "lora.rank": 2, "train.local-steps": 2, "train.batch-size": 2, "engine.name": "in-process",
    "num-server-rounds": 2, "secure.mode": "sums", "engine.cohort-size": 2,
}  # fmt: skip
Answer = Callable[[Message, int, Message], Message | None]
"""A message, its partition and the reply: what arrives in its place."""
VALUES = st.one_of(
    st.integers(-3, 2**40), st.text(max_size=4), st.binary(max_size=70),
    st.lists(st.integers(0, 6), min_size=1, max_size=6),
    st.lists(st.binary(max_size=70), min_size=1, max_size=6),
)  # fmt: skip


def config_of(**keys: Any) -> RunConfig:
    return from_flat({**KEYS, **{k.replace("_", "-"): v for k, v in keys.items()}})


class Between(LocalGrid):
    """Grid around an engine's, with somebody between server and clients."""

    def __init__(self, inner: LocalGrid, answer: Answer) -> None:
        super().__init__(inner.partition_ids.values())
        self.inner, self.answer = inner, answer
        self.replies: list[tuple[int, str, RecordDict]] = []

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        sent = list(messages)
        by_node = {m.metadata.dst_node_id: m for m in sent}
        arrived = []
        for reply in self.inner.send_and_receive(sent, timeout=timeout):
            node = reply.metadata.src_node_id
            if reply.has_content():
                self.replies.append((self.partition_ids[node], phase(by_node[node]), reply.content))
            changed = self.answer(by_node[node], self.partition_ids[node], reply)
            arrived += [] if changed is None else [changed]
        return arrived


def phase(message: Message) -> str:
    """``advertise``, ``share``, ``train``, ``unmask`` or ``evaluate``."""
    kind = message.metadata.message_type
    return str(message.content[SECURE]["phase"]) if kind == STEP else kind


def honest(message: Message, partition: int, reply: Message) -> Message | None:
    return reply


def first_vanish(at: str, number: int, message: Message, partition: int, reply: Message) -> Message | None:
    """The first so many partitions do not answer in a phase."""
    return None if phase(message) == at and partition < number else reply


def carry_out(
    path: Path, answer: Answer = honest, *, resume: bool = False, **keys: Any
) -> tuple[FederatedRun, Between]:
    run = FederatedRun(ENGINE.session(config_of(**keys), path), RunDirectory(path, resume=resume))
    grid = Between(run.session.grid(run), answer)
    run.run(grid)
    return run, grid


def numbers(state: State) -> dict[str, torch.Tensor]:
    """The products, which do not depend on how a rule splits them, and the head."""
    return {name: state.product(name).dense() for name in state.adapters} | dict(state.head)


def distance(one: State, other: State) -> float:
    """The largest difference, as a share of the norm of its tensor."""
    first, second = numbers(one), numbers(other)
    return max(float((first[n] - t).norm() / max(float(t.norm()), 1e-6)) for n, t in second.items())
