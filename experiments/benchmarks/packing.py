"""Instruction tuning of SmolLM2 with packed rows and without: tokens of conversations a second, side by side.

A step is what a client does with one batch: collate, forward, backward. Both ways take turns over
the same batches in one process, so that whatever slows the machine down slows both; reported is the median
over the turns of the ratio of each turn, by processor time. Conversations are questions of the sentences of
`fedlora.data.builtin.sentiment`: ``even`` asks about one sentence each; ``uneven`` about one to sixteen, as
many as a Zipf law (exponent 2) says, as lengths of chats have a tail.

    python -m experiments.benchmarks.packing --json experiments/benchmarks/results/packing.json
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from clients.training.batches import load_batch
from clients.training.optimizers.registry import make_optimizer
from clients.training.train import batch_loss
from experiments.benchmarks.hardware import hardware
from fedlora.config import DataConfig, ModelConfig, RunConfig, TrainConfig
from fedlora.core.init_drawn import fresh_adapters
from fedlora.data.builtin.sentiment import sentiment_table
from fedlora.models import AdaptedModel, build_model, resolve_targets
from fedlora.prepared.cache import Prepared, open_prepared, prepare
from fedlora.tasks import task_named

MODEL, MAX_LENGTH, SEED = "smollm2", 256, 0
KINDS = ("even", "uneven")


def conversations(kind: str, number: int) -> Prepared:
    """Questions about real sentences, written by SmolLM2's chat template, most of them to train on."""
    rng = np.random.default_rng(SEED)
    sentences = rng.permutation(sentiment_table()["text"][:])
    lengths = np.ones(number, dtype=int) if kind == "even" else np.minimum(rng.zipf(2.0, number), 16)
    ends = np.cumsum(lengths)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "talks.jsonl"
        with path.open("w") as file:
            for start, end in zip(ends - lengths, ends, strict=True):
                asked = "Is this kind? " + " ".join(sentences[start:end])
                file.write(json.dumps({"prompt": asked, "response": "It is, I think."}) + "\n")
        data = DataConfig(
            name=str(path), partitioner="iid", num_partitions=1, max_length=MAX_LENGTH, test_fraction=0.1
        )
        return open_prepared(prepare(RunConfig(task="instruction", model=ModelConfig(name=MODEL), data=data)))


def measure(data: Prepared, turns: int, batch_size: int) -> dict[str, object]:
    """Processor seconds of each way in each turn, and what follows from them."""
    network = build_model(ModelConfig(name=MODEL), 0, SEED, "language-model")
    model = AdaptedModel(network, resolve_targets(network, ""), task_named("instruction"))
    model.load(fresh_adapters(model.modules, 8, 2.0, SEED), {}, trained=frozenset("AB"))
    config, examples = TrainConfig(batch_size=batch_size), data.train
    order = np.random.default_rng(SEED).permutation(len(examples))[: turns * batch_size]
    seconds: dict[bool, list[float]] = {False: [], True: []}
    losses: dict[bool, list[float]] = {False: [], True: []}
    with model.training() as trained:
        optimizer = make_optimizer(trained, config)
        for turn, drawn in enumerate(np.split(order, turns)):
            for packed in (False, True) if turn % 2 else (True, False):
                began = time.process_time()
                batch = load_batch(examples, drawn, data.pad_token_id, model.device, packed=packed)
                optimizer.zero_grad()
                loss = batch_loss(model, batch)
                loss.backward()  # type: ignore[no-untyped-call]
                seconds[packed].append(time.process_time() - began)
                losses[packed].append(float(loss.detach()))
            optimizer.step()
            print(
                f"{turn + 1}/{turns}: {seconds[False][-1]:.2f} s unpacked, {seconds[True][-1]:.2f} s packed",
                flush=True,
            )
    ratios = np.array(seconds[False]) / np.array(seconds[True])
    tokens = int(examples.lengths_of(order).sum())
    return {
        "turns": turns, "batch_size": batch_size,
        "tokens": {"median": float(np.median(examples.lengths)), "largest": int(examples.lengths.max())},
        "tokens_per_second": {
            "unpacked": tokens / sum(seconds[False]), "packed": tokens / sum(seconds[True])
        },
        "ratio": {"median": float(np.median(ratios)), "all": [round(float(r), 3) for r in ratios]},
        "largest_difference_of_losses": float(np.abs(np.subtract(losses[False], losses[True])).max()),
    }  # fmt: skip


def main() -> None:
    """Print what was measured and, with ``--json``, write it."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--json", type=Path, help="where to write the result")
    parser.add_argument("--turns", type=int, default=8, help="batches that each way takes")
    parser.add_argument("--batch-size", type=int, default=8)
    options = parser.parse_args()
    torch.set_num_threads(1)
    record: dict[str, object] = {"model": MODEL, "hardware": {**hardware(), "torch_threads": 1}}
    for kind in KINDS:
        record[kind] = measure(conversations(kind, 400), options.turns, options.batch_size)
        print(kind, json.dumps(record[kind]), flush=True)
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
