"""One process, one thread: a cohort's step beside the frozen model's own forward and backward.

    python -m experiments.benchmarks.engine_micro [--cohort-size 16] [--batch-size 4] [--device cpu]

At the same tokens, in turns: the base without adapters, from the loss back to the embeddings' output; a
step of the cohort; a step of each of its clients, one by one; and, for scale, a square matrix product. A
step is what a longer training costs more than a shorter one: batch, forward, backward, optimiser. On the CPU
the time is that of the processor, elsewhere that of the clock. Prints a JSON object.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from clients.training.batched.members import Member
from clients.training.batched.train import BatchSettings, train_cohort
from clients.training.train import train_local
from fedlora.config import LoraConfig, ModelConfig, TrainConfig
from fedlora.core.init_drawn import fresh_adapters
from fedlora.data.examples import Examples
from fedlora.models import AdaptedModel, build_model, pick_device, resolve_targets

TOKENS, PARTITION_SIZE, RANK, SEED = 32, 32, 8, 0
SHORT, LONG = 1, 3
"""Steps of the two trainings of which the difference is taken."""
SQUARE = {"cpu": 2048, "cuda": 8192, "mps": 4096}
FROZEN, COHORT, ONE = "frozen model, forward and backward", "cohort", "one by one"
Work = Callable[[], object]


def main() -> None:
    """Measure, print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--cohort-size", type=int, default=16)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--model", default="minilm", help="as model.name")
    parser.add_argument("--device", default="auto")
    options = parser.parse_args()
    if min(options.cohort_size, options.batch_size, options.turns) < 1:
        parser.error("sizes and turns must be >= 1")
    torch.set_num_threads(1)
    print(json.dumps(measure(options, pick_device(options.device))))


def measure(options: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Medians over the turns, ratios turn by turn; a first turn does not count."""
    clients, batch = options.cohort_size, options.batch_size
    side = SQUARE[device.type]
    left, right = torch.randn(2, side, side, device=device)
    frozen, flops = frozen_step(options.model, clients * batch, device)
    works: dict[str, Callable[[], float]] = {
        "matmul": lambda: timed(lambda: torch.mm(left, right), device),
        FROZEN: lambda: timed(frozen, device),
        **trainers(options.model, clients, batch, device),
    }
    seconds: dict[str, list[float]] = {name: [] for name in works}
    for turn in range(-1, options.turns):
        for number in range(len(works)):  # nobody is always first
            name = list(works)[(number + turn) % len(works)]
            taken = works[name]()
            if turn >= 0:
                seconds[name].append(taken)
    matmul = [2 * side**3 / s for s in seconds["matmul"]]
    return {
        "model": options.model,
        "cohort_size": clients,
        "batch_size": batch,
        "tokens": TOKENS,
        "turns": options.turns,
        "matmul": f"{side} x {side}",
        "matmul_gflops": median(matmul) / 1e9,
        "frozen_gflops": flops / median(seconds[FROZEN]) / 1e9,
        **{
            f"{key}_of_matmul": median(flops / s / m for s, m in zip(seconds[name], matmul, strict=True))
            for key, name in (("frozen", FROZEN), ("cohort", COHORT))
        },
        "cohort_of_frozen": of_frozen(seconds, COHORT),
        "rows": {
            name: {
                "tokens_per_second": clients * batch * TOKENS / median(seconds[name]),
                "of_frozen": of_frozen(seconds, name),
            }
            for name in (FROZEN, COHORT, ONE)
        },
    }


def of_frozen(seconds: dict[str, list[float]], name: str) -> float:
    """The rate of one, relative to that of the frozen model in the same turn."""
    return median(f / s for f, s in zip(seconds[FROZEN], seconds[name], strict=True))


def timed(work: Work, device: torch.device) -> float:
    """Seconds: of the processor on the CPU, of the clock elsewhere, where work is waited for."""
    if device.type == "cpu":
        began = time.process_time()
        work()
        return time.process_time() - began
    wait = torch.cuda.synchronize if device.type == "cuda" else torch.mps.synchronize
    wait()
    began = time.perf_counter()
    work()
    wait()
    return time.perf_counter() - began


def frozen_step(model: str, examples: int, device: torch.device) -> tuple[Work, int]:
    """The base's forward and backward, and its floating point operations; no weight gets a gradient."""
    network = build_model(ModelConfig(name=model, pooling="model"), 2, SEED).to(device)
    ids = torch.randint(1, network.config.vocab_size, (examples, TOKENS), device=device)
    mask = torch.ones_like(ids)
    embeddings = network.get_input_embeddings()
    embeddings.register_forward_hook(lambda module, given, out: out.detach().requires_grad_(True))

    def step() -> None:
        nn.functional.cross_entropy(
            network(input_ids=ids, attention_mask=mask).logits, ids.new_zeros(examples)
        ).backward()

    with FlopCounterMode(display=False) as counter:
        step()
    return step, counter.get_total_flops()


def trainers(model: str, clients: int, batch: int, device: torch.device) -> dict[str, Callable[[], float]]:
    """Seconds of a step of the cohort, and of a step of each of its clients."""
    network = build_model(ModelConfig(name=model, pooling="model"), 2, SEED).to(device)
    adapted = AdaptedModel(network, resolve_targets(network, ""))
    adapters = fresh_adapters(adapted.modules, RANK, LoraConfig(rank=RANK).scaling(RANK), SEED)
    examples = sentences(clients, network.config.vocab_size)
    config = TrainConfig(batch_size=batch)

    def one_by_one(steps: int) -> None:
        for client in range(clients):
            adapted.load(adapters, {}, trained=frozenset("AB"), train_head=True)
            train_local(adapted, examples, own(client), 0, config, local_steps=steps, seed=client)

    def together(steps: int) -> None:
        members = [
            Member(
                adapters=adapters, head={}, trained=frozenset("AB"), modules=frozenset(adapters),
                train_head=True, indices=own(client), steps=steps, seed=client,
            )
            for client in range(clients)
        ]  # fmt: skip
        train_cohort(adapted, members, BatchSettings(examples=examples, pad_token_id=0, config=config))

    def step_of(train: Callable[[int], None]) -> float:
        short = timed(lambda: train(SHORT), device)
        return (timed(lambda: train(LONG), device) - short) / (LONG - SHORT)

    return {COHORT: lambda: step_of(together), ONE: lambda: step_of(one_by_one)}


def own(client: int) -> Any:
    """The examples of one client."""
    return np.arange(client * PARTITION_SIZE, (client + 1) * PARTITION_SIZE)


def sentences(clients: int, vocabulary: int) -> Examples:
    """Made-up sentences of `TOKENS` tokens for everybody."""
    number = clients * PARTITION_SIZE
    rng = np.random.default_rng(SEED)
    return Examples(
        tokens=rng.integers(1, vocabulary, number * TOKENS).astype(np.int32),
        offsets=np.arange(number + 1) * TOKENS,
        labels=rng.integers(0, 2, number),
        domains=np.zeros(number, dtype=np.int32),
    )


if __name__ == "__main__":
    main()
