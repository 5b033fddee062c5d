"""Attacks by one client of eight on a small generated task: what each defence leaves of the accuracy.

    python -m experiments.attacks run runs/attacks --seeds 0-9   # one JSON a cell; those that are there stay
    python -m experiments.attacks pack runs/attacks              # to published/attacks
    python -m experiments.attacks table                          # from there into docs/security.md

The strategies are the ones that ship, with their messages, checks and rules; clients and model are those of
`experiments.attacked_task`, so that a cell takes seconds. LoRA has rank 4 (or 2, 4 and 8), for 16 rounds.
"""

from __future__ import annotations

import argparse
import json
import logging
import statistics
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from experiments.attacked_task import LABELS, LAYERS, SCALING, WIDTH, Clients, Task
from experiments.marked import remade
from fedlora import wire
from fedlora.config import RunConfig
from fedlora.config.checks import int_list
from fedlora.core.factors import LoraFactors
from fedlora.core.files import write_atomic
from fedlora.core.seeding import torch_stream
from fedlora.core.state import ClientSpec
from fedlora.server.validate import configured_screening
from strategies.flower import FactorStrategy
from strategies.registry import make_rule
from strategies.robust import make_center

ROUNDS = 16
RANKS = {"equal": (4,), "mixed": (2, 4, 8)}
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


def carried_out(cell: Cell, folder: Path) -> None:
    """Run a cell and write its result."""
    task = Task(cell.seed)
    rule = make_rule(cell.rule, center=make_center(cell.defence if cell.defence in BESIDE else "none"))
    ranks = RANKS[cell.ranks]
    screening = None if cell.defence == "off" else configured_screening(RunConfig(), rule, simulation=False)
    strategy = FactorStrategy(
        rule,
        scaling=SCALING,
        rank=max(ranks),
        seed=cell.seed,
        fraction_evaluate=0.0,
        client_spec=lambda p: ClientSpec(partition_id=p, rank=ranks[p % len(ranks)], scaling=SCALING),
        screening=screening,
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
        grid = Clients(task, cell.attack, cell.seed, Path(root))
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
