"""What a private step costs: the same step without privacy, in ``hooks`` and in ``ghost`` mode, side by side.

One step is what a client does with one batch: collate, forward, backward, (clip, noise,) optimiser. The
ways take turns on copies of one model, so that whatever slows the machine down slows all of them down, and
what is reported is the median over the turns of the ratio to the plain step of the same turn, by processor
time of the process and by the clock.

    python -m experiments.benchmarks.private_step --json experiments/benchmarks/results/private_step.json
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch

from clients.training.batches import load_batch
from clients.training.dp_mechanism import Mechanism
from clients.training.dp_step import private_steps
from clients.training.optimizers.registry import make_optimizer
from clients.training.train import batch_loss
from experiments.benchmarks.hardware import hardware
from fedlora.config import LoraConfig, ModelConfig, TrainConfig
from fedlora.core.init_drawn import fresh_adapters
from fedlora.data.examples import Examples
from fedlora.models import AdaptedModel, build_model, resolve_targets

RANK, TOKENS, SEED = 8, (28, 36), 0
PLAIN = "plain"
WAYS: dict[str, dict[str, object]] = {
    PLAIN: {},
    "hooks": {"grad_sample_mode": "hooks"},
    "hooks, secure noise": {"grad_sample_mode": "hooks", "secure": True},
    "ghost": {"grad_sample_mode": "ghost"},
}
Step = Callable[[], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One way at one batch size; times are medians in milliseconds, ratios medians over the turns.

    Attributes:
        cpu_quartiles: of the ratios by processor time.
    """

    batch_size: int
    way: str
    turns: int
    cpu_ms: float
    wall_ms: float
    cpu_ratio: float
    cpu_quartiles: tuple[float, float]
    wall_ratio: float


def measure(model: str, batch_size: int, turns: int) -> list[Row]:
    """All ways at one batch size, after two turns that are not counted."""
    cpu: dict[str, list[float]] = {way: [] for way in WAYS}
    wall: dict[str, list[float]] = {way: [] for way in WAYS}
    with ExitStack() as stack:
        steps = {way: stack.enter_context(step_of(way, model, batch_size)) for way in WAYS}
        for turn in range(-2, turns):
            for number in range(len(WAYS)):  # nobody is always first
                way = list(WAYS)[(number + turn) % len(WAYS)]
                began = time.process_time(), time.perf_counter()
                steps[way]()
                ended = time.process_time(), time.perf_counter()
                if turn >= 0:
                    cpu[way].append(ended[0] - began[0])
                    wall[way].append(ended[1] - began[1])
    return [row(way, batch_size, cpu, wall) for way in WAYS]


def row(way: str, batch_size: int, cpu: dict[str, list[float]], wall: dict[str, list[float]]) -> Row:
    """The medians of one way."""
    ratios = np.array(cpu[way]) / np.array(cpu[PLAIN])
    low, high = np.quantile(ratios, [0.25, 0.75])
    return Row(
        batch_size=batch_size,
        way=way,
        turns=len(ratios),
        cpu_ms=1e3 * float(np.median(cpu[way])),
        wall_ms=1e3 * float(np.median(wall[way])),
        cpu_ratio=float(np.median(ratios)),
        cpu_quartiles=(float(low), float(high)),
        wall_ratio=float(np.median(np.array(wall[way]) / np.array(wall[PLAIN]))),
    )


@contextmanager
def step_of(way: str, model_name: str, batch_size: int) -> Iterator[Step]:
    """A step of that way on a model of its own, batches in a fixed order."""
    network = build_model(ModelConfig(name=model_name), 2, SEED)
    model = AdaptedModel(network, resolve_targets(network, ""))
    adapters = fresh_adapters(model.modules, RANK, LoraConfig(rank=RANK).scaling(RANK), SEED)
    model.load(adapters, {}, trained=frozenset("AB"), train_head=True)
    examples = sentences(8 * batch_size, network.config.vocab_size)
    batches = np.arange(len(examples)).reshape(-1, batch_size)
    taken = iter(range(10**9))
    config = TrainConfig(batch_size=batch_size)
    with model.training() as trained:
        optimizer = make_optimizer(trained, config)
        if way == PLAIN:

            def plain() -> None:
                batch = load_batch(examples, batches[next(taken) % len(batches)], 0, model.device)
                optimizer.zero_grad()
                batch_loss(model, batch).backward()
                optimizer.step()

            yield plain
            return
        mechanism = Mechanism(
            noise_multiplier=1.0, max_grad_norm=1.0, expected_batch_size=batch_size, **WAYS[way]
        )
        noise = torch.Generator(model.device).manual_seed(SEED)
        with private_steps(model, optimizer, mechanism, noise) as private:
            yield lambda: private.step(examples, batches[next(taken) % len(batches)], 0)


def sentences(number: int, vocabulary: int) -> Examples:
    """Made-up sentences of about 32 tokens."""
    rng = np.random.default_rng(SEED)
    lengths = rng.integers(TOKENS[0], TOKENS[1] + 1, number)
    return Examples(
        tokens=rng.integers(1, vocabulary, lengths.sum()).astype(np.int32),
        offsets=np.cumsum([0, *lengths]),
        labels=rng.integers(0, 2, number),
        domains=np.zeros(number, dtype=np.int32),
    )


def main() -> None:
    """Print the table and, with ``--json``, write it."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--json", type=Path, help="where to write the result")
    parser.add_argument("--turns", type=int, default=30, help="steps of each way at each batch size")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[8, 16, 32])
    parser.add_argument("--model", default="minilm", help="as model.name")
    options = parser.parse_args()
    if min(options.turns, *options.batch_sizes) < 1:
        parser.error("turns and batch sizes must be >= 1")
    torch.set_num_threads(1)
    before = os.getloadavg()
    rows: list[Row] = []
    print("batch  way                    cpu ms  wall ms  cpu ratio    quartiles wall ratio")
    for batch_size in options.batch_sizes:
        for r in measure(options.model, batch_size, options.turns):
            rows.append(r)
            low, high = r.cpu_quartiles
            print(
                f"{r.batch_size:5}  {r.way:20} {r.cpu_ms:8.1f} {r.wall_ms:8.1f} {r.cpu_ratio:10.3f} "
                f"{low:6.3f}-{high:5.3f} {r.wall_ratio:10.3f}",
                flush=True,
            )
    if options.json:
        record = {
            "model": options.model,
            "rank": RANK,
            "tokens": TOKENS,
            "hardware": {
                **hardware(),
                "torch_threads": torch.get_num_threads(),
                **{name: version(name) for name in ("opacus", "peft", "transformers")},
            },
            "load_average": {"before": before, "after": os.getloadavg()},
            "rows": [asdict(r) for r in rows],
        }
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
