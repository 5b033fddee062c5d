"""Seconds a step of each local optimiser and each kind of adapter, beside LoRA with AdamW.

A step is what a longer training costs more than a shorter one of the same client: batch, forward, backward,
optimiser. The methods take turns on models of their own, so that whatever slows the machine slows all of
them. Reported is the median over the turns of the ratio to LoRA with AdamW in the same turn, by processor
time, with one thread.

    python -m experiments.benchmarks.methods --json experiments/benchmarks/results/methods.json
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from clients.training.train import train_local
from experiments.benchmarks.hardware import hardware
from fedlora.adapters.tuners import TUNERS
from fedlora.config import RunConfig, from_flat
from fedlora.server.preview import preview

PLAIN = "lora, adamw"
SHORT, LONG = 1, 4
"""Steps of the two trainings of which the difference is taken."""
OPTIMIZERS = ("adamw", "sgd", "adabelief", "lora-pro", "scaled", "torch.optim:NAdam")
PLACES = '{"n_frequency": 500}'
OWN = {
    "c3a": {"lora.method-options": '{"block_size": 16}'},
    "fourierft": {"lora.method-options": PLACES},
    "waveft": {"lora.method-options": PLACES},
}
"""Keys that a kind needs beside its name."""


def methods() -> dict[str, dict[str, Any]]:
    """Name of a row -> its keys."""
    optimizers = {f"lora, {name}": {"train.optimizer": name} for name in OPTIMIZERS}
    return optimizers | {f"{name}, adamw": {"lora.method": name, **OWN.get(name, {})} for name in TUNERS}


def measure(model: str, batch_size: int, turns: int) -> list[dict[str, Any]]:
    """All methods, after a turn that is not counted."""
    steps = {name: step_of(config_of(model, batch_size, keys)) for name, keys in methods().items()}
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(-1, turns):
        for number in range(len(steps)):  # nobody is always first
            name = list(steps)[(number + turn) % len(steps)]
            taken = steps[name]()
            if turn >= 0:
                seconds[name].append(taken)
    return [row(name, seconds) for name in steps]


def row(name: str, seconds: dict[str, list[float]]) -> dict[str, Any]:
    """The medians of one method, and the quartiles of its ratio."""
    ratios = np.array(seconds[name]) / np.array(seconds[PLAIN])
    low, middle, high = np.quantile(ratios, [0.25, 0.5, 0.75])
    return {
        "method": name,
        "milliseconds": round(1e3 * float(np.median(seconds[name])), 1),
        "ratio": round(float(middle), 3),
        "quartiles": [round(float(low), 3), round(float(high), 3)],
    }


def config_of(model: str, batch_size: int, keys: dict[str, Any]) -> RunConfig:
    """A run of generated sentences."""
    base = {"model.name": model, "data.name": "synthetic", "train.batch-size": batch_size}
    return from_flat({**base, **keys})


def step_of(config: RunConfig) -> Callable[[], float]:
    """Processor seconds of a step of the first client."""
    run = preview(config)
    model, data, began = run.runtime.model, run.runtime.data, run.broadcast(0)

    def train(steps: int) -> float:
        model.load(began.adapters, began.head, trained=began.trained, modules=began.modules, train_head=True)
        start = time.process_time()
        train_local(
            model, data.train, data.indices(0), data.pad_token_id, config.train, local_steps=steps, seed=0
        )
        return time.process_time() - start

    def step() -> float:
        short = train(SHORT)
        return (train(LONG) - short) / (LONG - SHORT)

    return step


def main() -> None:
    """Print the table and, with ``--json``, write it."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--json", type=Path, help="where to write the result")
    parser.add_argument("--turns", type=int, default=10)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--model", default="minilm", help="as model.name")
    options = parser.parse_args()
    if min(options.turns, options.batch_size) < 1:
        parser.error("turns and batch size must be >= 1")
    torch.set_num_threads(1)
    load = os.getloadavg()
    rows = measure(options.model, options.batch_size, options.turns)
    for found in rows:
        low, high = found["quartiles"]
        took = f"{found['milliseconds']:8.1f} ms"
        print(f"{found['method']:26} {took} {found['ratio']:7.3f}  {low:.3f}-{high:.3f}")
    if options.json:
        told = {"model": options.model, "batch_size": options.batch_size, "turns": options.turns}
        record = {**told, "load_average": load, "hardware": hardware(), "rows": rows}
        options.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
