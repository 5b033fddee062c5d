"""Attacks by one client of eight on a small generated task: what each defence leaves of the accuracy.

    python -m experiments.attacks run runs/attacks --seeds 0-9   # one JSON a cell; those that are there stay
    python -m experiments.attacks pack runs/attacks              # to published/attacks
    python -m experiments.attacks table                          # from there into docs/security.md

The strategies are the ones that ship, with their messages, checks and rules; clients and model are made here,
so that a cell takes seconds. 32 numbers have one of four labels (a random network's first choice, with
noise); a random two-layer base is frozen, LoRA of rank 4 (or of 2, 4 and 8) is in both layers, the head is
trained; 16 rounds of 10 steps of Adam. A backdoor is a pattern in four inputs that is to mean label 0.
"""

from __future__ import annotations

import argparse
import json
import logging
import re
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from uuid import uuid4

import torch
from flwr.app import Message, RecordDict
from torch import Tensor
from torch.nn.functional import cross_entropy

from clients.store import ClientStore, ResolvedInstruction, resolve
from experiments.marked import remade
from fedlora import wire
from fedlora.config import RunConfig
from fedlora.config.checks import int_list
from fedlora.core.adapters import lora_set
from fedlora.core.factors import AdapterSet, LoraFactors, Product, Tensors, resize
from fedlora.core.files import write_atomic
from fedlora.core.seeding import torch_stream
from fedlora.core.state import ClientSpec, State
from fedlora.server.validate import configured_screening
from fedlora.simulation.local_grid import LocalGrid
from strategies.flower import FactorStrategy
from strategies.registry import make_rule
from strategies.robust import make_center

CLIENTS, ROUNDS, STEPS, BATCH, RATE, SCALING = 8, 16, 10, 32, 5e-3, 2.0
INPUTS, WIDTH, LABELS, TEST = 32, 48, 4, 2000
EXAMPLES = 400
"""Of each client."""
TRIGGER, TARGET = slice(0, 4), 0
RANKS = {"equal": (4,), "mixed": (2, 4, 8)}
LAYERS = {"first": (WIDTH, INPUTS), "second": (WIDTH, WIDTH)}
ATTACKER = 3
BOOST = 8.0
"""Of a boosted backdoor: with m clients its model replaces the mean (Bagdasaryan et al., AISTATS 2020)."""
RULES = ("fedavg", "flora", "flexlora", "fedsvd", "ffa")
MEANS = ("fedavg", "fedsvd", "ffa")
ATTACKS = (
    "none", "huge claim", "update x 100", "sign flip x 10", "1e19", "overflowing weight",
    "overflowing product", "wrong labels", "wrong labels, huge claim", "sign flip x 1.9",
    "sign flip x 1.9, huge claim", "backdoor", "boosted backdoor",
)  # fmt: skip
DEFENCES = ("off", "default", "median", "trimmed-mean", "multi-krum")
"""Off: no screening. Default: that of a deployment. The others stand beside the default screening."""
BESIDE = DEFENCES[2:]
PUBLISHED = Path(__file__).parent / "published" / "attacks"
PAGE = Path(__file__).parents[1] / "docs" / "security.md"


@dataclass(frozen=True, slots=True)
class Cell:
    """One run: what it is and where its result lies."""

    rule: str
    attack: str
    defence: str
    ranks: str
    seed: int

    @property
    def name(self) -> str:
        return "-".join([self.rule, self.attack, self.defence, self.ranks, str(self.seed)]).replace(" ", "_")

    @property
    def there_is(self) -> bool:
        """Whether the rule takes such ranks and such a defence."""
        mixed = self.ranks == "equal" or self.rule in ("flora", "flexlora")
        return mixed and (self.rule in MEANS or self.defence not in ("median", "trimmed-mean"))


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
        cell: which attack.
        root: where clients keep their parts.
    """

    def __init__(self, task: Task, cell: Cell, root: Path) -> None:
        super().__init__(range(CLIENTS))
        self.task, self.cell = task, cell
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
            adapters, after, weight = attacked(self.cell.attack, start, head, adapters, after, weight)
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
        if partition == ATTACKER and "wrong labels" in self.cell.attack:
            y = (y + 1) % LABELS
        if partition == ATTACKER and "backdoor" in self.cell.attack:
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
        g = torch_stream(self.cell.seed, "attacks", "train", asked.server_round)
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


def carried_out(cell: Cell, folder: Path) -> None:
    """Run a cell and write its result."""
    task = Task(cell.seed)
    rule = make_rule(cell.rule, center=make_center(cell.defence if cell.defence in BESIDE else "none"))
    ranks = RANKS[cell.ranks]
    strategy = FactorStrategy(
        rule,
        scaling=SCALING,
        rank=max(ranks),
        seed=cell.seed,
        fraction_evaluate=0.0,
        client_spec=lambda p: ClientSpec(partition_id=p, rank=ranks[p % len(ranks)], scaling=SCALING),
        screening=None if cell.defence == "off" else configured_screening(RunConfig(), simulation=False),
    )
    g = torch_stream(cell.seed, "attacks", "initial")
    start = {
        n: LoraFactors(torch.randn(max(ranks), i, generator=g) / i**0.5, torch.zeros(o, max(ranks)), SCALING)
        for n, (o, i) in LAYERS.items()
    }
    head = {"head.weight": torch.zeros(LABELS, WIDTH), "head.bias": torch.zeros(LABELS)}
    refused: dict[str, int] = {}
    result: dict[str, object] = {**asdict(cell), "lost": ""}
    with TemporaryDirectory() as root:
        grid = Clients(task, cell, Path(root))
        strategy.open(wire.to_record(wire.to_peft(start, head)))
        try:
            for report in strategy.rounds(grid, ROUNDS):
                for partition in report.refused:
                    refused[str(partition)] = refused.get(str(partition), 0) + 1
        except Exception as error:  # the finding: what ends a run
            result["lost"] = f"{type(error).__name__}: {error}".splitlines()[0][:300]
    assert strategy.state is not None
    result |= {"rounds": strategy.state.round, "refused": refused}
    result |= task.measured(strategy.state)
    write_atomic(folder / f"{cell.name}.json", json.dumps(result) + "\n")


def cells(seeds: Iterable[int]) -> Iterator[Cell]:
    """All cells, seed by seed."""
    for seed in seeds:
        for ranks, rule, attack, defence in product(RANKS, RULES, ATTACKS, DEFENCES):
            cell = Cell(rule, attack, defence, ranks, seed)
            if cell.there_is:
                yield cell


def pack(folder: Path) -> None:
    """All results in one file, a line each, in the order of the cells."""
    found = [json.loads(file.read_text()) for file in sorted(folder.glob("*.json"))]
    lines = [json.dumps(result) + "\n" for result in sorted(found, key=_order)]
    write_atomic(PUBLISHED / "cells.jsonl", "".join(lines))


def _order(result: dict[str, Any]) -> tuple[int, ...]:
    places = (list(RANKS), RULES, ATTACKS, DEFENCES)
    keys = ("ranks", "rule", "attack", "defence")
    return *(list(p).index(result[k]) for p, k in zip(places, keys, strict=True)), result["seed"]


def table(ranks: str = "equal", shown: Sequence[str] = DEFENCES) -> str:
    """Means over the seeds: accuracy, and behind it the success of a backdoor, in percent."""
    results = [json.loads(line) for line in (PUBLISHED / "cells.jsonl").read_text().splitlines()]
    rules = [rule for rule in RULES if any(r["rule"] == rule and r["ranks"] == ranks for r in results)]
    columns = [
        (rule, defence)
        for rule in rules
        for defence in shown
        if Cell(rule, "none", defence, ranks, 0).there_is
    ]
    lines = ["| attack | " + " | ".join(f"{rule}<br>{defence}" for rule, defence in columns) + " |"]
    lines.append("|---" * (len(columns) + 1) + "|")
    for attack in ATTACKS:
        cells = []
        for rule, defence in columns:
            wanted = {"rule": rule, "defence": defence, "attack": attack, "ranks": ranks}
            found = [r for r in results if wanted.items() <= r.items()]
            text = f"{statistics.fmean(r['accuracy'] for r in found):.0f}" if found else ""
            if found and "backdoor" in attack:
                text += f" ({statistics.fmean(r['backdoor'] for r in found):.0f})"
            lost = sum(bool(r["lost"]) for r in found)
            cells.append(text + (f", {lost} lost" if lost else ""))
        lines.append(f"| {attack} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    """The command line of this module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("what", choices=["run", "pack", "table"])
    parser.add_argument("folder", nargs="?", default="runs/attacks", type=Path)
    parser.add_argument("--seeds", default="0-9")
    given = parser.parse_args()
    if given.what == "table":
        sections = {
            "attacks": lambda: table(shown=DEFENCES[:2]),
            "robust": lambda: table(shown=BESIDE),
            "mixed": lambda: table("mixed"),
        }
        write_atomic(PAGE, remade(PAGE.read_text(), sections))
    elif given.what == "pack":
        pack(given.folder)
    else:
        torch.set_num_threads(1)
        logging.disable(logging.WARNING)
        for cell in cells(int_list("--seeds", given.seeds)):
            if not (given.folder / f"{cell.name}.json").exists():
                carried_out(cell, given.folder)


if __name__ == "__main__":
    main()
