"""A small generated task with eight clients that follow the protocol, one of which lies.

32 numbers have one of four labels (a random network's first choice, with noise); a random two-layer base is
frozen, LoRA is in both layers, the head is trained by 10 steps of Adam a round. A backdoor is a pattern in
four inputs that is to mean label 0.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from uuid import uuid4

import torch
from flwr.app import Message, RecordDict
from torch import Tensor
from torch.nn.functional import cross_entropy

from clients.store import ClientStore, ResolvedInstruction, resolve
from fedlora import wire
from fedlora.core.adapters import lora_set
from fedlora.core.factors import AdapterSet, LoraFactors, Product, Tensors, resize
from fedlora.core.seeding import torch_stream
from fedlora.core.state import State
from fedlora.simulation.local_grid import LocalGrid

CLIENTS, STEPS, BATCH, RATE, SCALING = 8, 10, 32, 5e-3, 2.0
INPUTS, WIDTH, LABELS, TEST = 32, 48, 4, 2000
EXAMPLES = 400
"""Of each client."""
TRIGGER, TARGET = slice(0, 4), 0
LAYERS = {"first": (WIDTH, INPUTS), "second": (WIDTH, WIDTH)}
ATTACKER = 3
BOOST = 8.0
"""Of a boosted backdoor: with m clients its model replaces the mean (Bagdasaryan et al., AISTATS 2020)."""


class Task:
    """Data of all clients, test data, and the frozen base.

    Args:
        seed: root of all that is drawn.
    """

    def __init__(self, seed: int) -> None:
        g = torch_stream(seed, "attacks", "task")
        self.base = {n: torch.randn(o, i, generator=g) / i**0.5 for n, (o, i) in LAYERS.items()}
        teacher = torch.randn(64, INPUTS, generator=g) / INPUTS**0.5, torch.randn(LABELS, 64, generator=g)
        count = CLIENTS * EXAMPLES + TEST
        x = torch.randn(count, INPUTS, generator=g)
        scores = torch.relu(2 * x @ teacher[0].T) @ teacher[1].T
        scores -= scores.mean(dim=0)
        y = (scores + 0.5 * torch.randn(scores.shape, generator=g)).argmax(dim=1)
        self.test = x[:TEST], y[:TEST]
        self.train = [
            (x[first : first + EXAMPLES], y[first : first + EXAMPLES])
            for first in range(TEST, count, EXAMPLES)
        ]

    def moved(self, patches: Iterable[Mapping[str, Product]]) -> Tensors:
        """The base after patches."""
        base = dict(self.base)
        for patch in patches:
            for name, change in patch.items():
                base[name] = base[name] + change.dense()
        return base

    def measured(self, state: State) -> dict[str, float]:
        """Accuracy, and how often the trigger turns another label into the target, in percent."""
        base = self.moved(patch.products for patch in state.base)
        own = {n: {k: t[None] for k, t in f.tensors().items()} for n, f in lora_set(state.adapters).items()}
        top = {name: t[None] for name, t in state.head.items()}
        x, y = self.test
        guess = logits(x[None], own, top, base)[0].argmax(dim=1)
        shown = logits(triggered(x)[None], own, top, base)[0].argmax(dim=1)
        others = y != TARGET
        return {
            "accuracy": 100 * float((guess == y).double().mean()),
            "backdoor": 100 * float((shown[others] == TARGET).double().mean()),
        }


def logits(x: Tensor, own: Mapping[str, Tensors], top: Tensors, base: Tensors) -> Tensor:
    """Scores (models, examples, labels) of models side by side on inputs (models, examples, inputs)."""
    for name, weight in base.items():
        A, B = own[name]["A"], own[name]["B"]
        x = torch.relu(x @ weight.T + SCALING * (x @ A.transpose(1, 2)) @ B.transpose(1, 2))
    return x @ top["head.weight"].transpose(1, 2) + top["head.bias"][:, None]


def triggered(x: Tensor) -> Tensor:
    """The inputs with the backdoor's pattern."""
    x = x.clone()
    x[:, TRIGGER] = 3.0
    return x


class Clients(LocalGrid):
    """The clients: all follow the protocol, one of them lies.

    Args:
        task: data and base.
        attack: what the attacker does, one of `experiments.attacks.ATTACKS`.
        seed: root of the batches.
        root: where clients keep their parts.
    """

    def __init__(self, task: Task, attack: str, seed: int, root: Path) -> None:
        super().__init__(range(CLIENTS))
        self.task, self.attack, self.seed = task, attack, seed
        self.stores = {p: ClientStore(root / str(p)) for p in range(CLIENTS)}

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        opened = {}
        for message in messages:
            message.metadata.__dict__["_message_id"] = str(uuid4())
            partition = self.partition_ids[message.metadata.dst_node_id]
            asked = wire.decode_instruction(message.content)
            resolved = resolve(asked, self.stores[partition])
            assert not isinstance(resolved, wire.Reply), "no client is ever away"
            opened[partition] = message, asked, resolved
        return [
            Message(self._content(partition, *opened[partition][1:], *trained), reply_to=opened[partition][0])
            for partition, trained in self._trained(opened).items()
        ]

    def _content(
        self, partition: int, asked: wire.TrainInstruction, opened: ResolvedInstruction, adapters: AdapterSet,
        after: Tensors,
    ) -> RecordDict:  # fmt: skip
        start, head, weight = lora_set(opened.adapters), opened.head, float(EXAMPLES)
        if partition == ATTACKER:
            adapters, after, weight = attacked(self.attack, start, head, adapters, after, weight)
        reply = wire.Reply(
            status=wire.OK,
            arrays=wire.to_peft(adapters, after, asked.uploaded),
            start=wire.to_peft(start, head, asked.uploaded),
            metrics={"num-examples": weight, "train-loss": 1.0},
            holds=asked.needs.digests,
        )
        return wire.encode_reply(reply, asked)

    def _data(self, partition: int) -> tuple[Tensor, Tensor]:
        x, y = self.task.train[partition]
        if partition == ATTACKER and "wrong labels" in self.attack:
            y = (y + 1) % LABELS
        if partition == ATTACKER and "backdoor" in self.attack:
            half = torch.arange(len(x)) % 2 == 0
            x = torch.where(half[:, None], triggered(x), x)
            y = torch.where(half, torch.full_like(y, TARGET), y)
        return x, y

    def _trained(
        self, opened: Mapping[int, tuple[Message, wire.TrainInstruction, ResolvedInstruction]]
    ) -> dict[int, tuple[AdapterSet, Tensors]]:
        """Partition -> its adapter and head; all train at once, lower ranks with zeros beyond their own."""
        asked, first = next((asked, resolved) for _, asked, resolved in opened.values())
        base = self.task.moved(first.patch(name).products for name in asked.needs.base)
        starts = {p: lora_set(resolved.adapters) for p, (_, _, resolved) in opened.items()}
        rank = max(f.rank for start in starts.values() for f in start.values())
        wide = [{n: resize(f, rank, f.scaling) for n, f in start.items()} for start in starts.values()]
        own = {n: {k: torch.stack([w[n].tensors()[k] for w in wide]) for k in ("A", "B")} for n in LAYERS}
        top = {k: torch.stack([r.head[k] for _, _, r in opened.values()]) for k in first.head}
        x, y = (torch.stack(parts) for parts in zip(*map(self._data, opened), strict=True))
        trained = [own[n][k].requires_grad_() for n in own for k in sorted(asked.trained)]
        optimizer = torch.optim.Adam([*trained, *(t.requires_grad_() for t in top.values())], lr=RATE)
        g = torch_stream(self.seed, "attacks", "train", asked.server_round)
        rows = torch.arange(len(opened))[:, None]
        for _ in range(STEPS):
            batch = torch.randint(EXAMPLES, (len(opened), BATCH), generator=g)
            optimizer.zero_grad()
            scores = logits(x[rows, batch], own, top, base)
            losses = cross_entropy(scores.transpose(1, 2), y[rows, batch], reduction="none")
            losses.mean(dim=1).sum().backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        return {
            p: (
                {
                    n: LoraFactors(
                        own[n]["A"][k, : f.rank].detach(), own[n]["B"][k, :, : f.rank].detach(), SCALING
                    )
                    for n, f in start.items()
                },
                {name: t[k].detach() for name, t in top.items()},
            )
            for k, (p, start) in enumerate(starts.items())
        }


def attacked(
    kind: str, start: AdapterSet, head: Tensors, adapters: AdapterSet, after: Tensors, weight: float
) -> tuple[AdapterSet, Tensors, float]:
    """What the attacker sends, from what honest (or backdoored) training gave it."""
    factor = 1.0
    if found := re.match(r"(update|sign flip) x ([0-9.]+)", kind):
        factor = float(found[2]) * (-1 if found[1] == "sign flip" else 1)
    if kind == "boosted backdoor":
        factor = BOOST

    def moved(before: Tensor, now: Tensor) -> Tensor:
        return torch.full_like(now, 1e19) if kind == "1e19" else before + factor * (now - before)

    claimed = 1e9 if "huge claim" in kind else 1.7e308 if kind == "overflowing weight" else weight
    if kind == "overflowing product":  # finite factors, infinite product
        return {n: replace(f, A=f.A + 1e30, B=f.B + 1e30) for n, f in adapters.items()}, after, claimed
    sent = {
        n: f.replaced({k: moved(start[n].tensors()[k], t) for k, t in f.tensors().items()})
        for n, f in adapters.items()
    }
    return sent, {name: moved(head[name], t) for name, t in after.items()}, claimed
