"""Federated LoRA as a bare loop: one resident PEFT model, one client after another, FedAvg by hand.

    python -m experiments.benchmarks.engine_loop SETTING.toml OUT --rounds 10 --threads 1 --device cpu

No messages, no processes, no checks: as fast as PyTorch, PEFT and Opacus are on these threads. Clients,
batches and noise come from the streams that fedlora uses, so that the adapter can be compared.
"""

from __future__ import annotations

import argparse
import json
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from opacus import GradSampleModule
from opacus.optimizers import DPOptimizer
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import AutoModelForSequenceClassification

from clients.training.batches import load_batch, poisson_batches, shuffled_batches
from fedlora.core.seeding import derive, stream
from fedlora.models import pick_device
from fedlora.prepared.cache import Prepared, open_prepared
from strategies.sampling import sample_partitions

Setting = dict[str, Any]


def main() -> None:
    """All rounds; ``OUT/rounds.jsonl`` gets a line each, ``OUT/adapter`` the last adapter."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("setting", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--rounds", type=int, required=True)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--device", default="auto")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    setting = tomllib.loads(options.setting.read_text())
    data = open_prepared(setting["data"])
    model = build(setting, data.num_labels).to(pick_device(options.device))
    steps = private_steps(model, setting) if setting["private"] else plain_steps(model, setting)
    adapter = load_file(setting["initial"])
    options.out.mkdir(parents=True, exist_ok=True)
    for server_round in range(1, options.rounds + 1):
        record: dict[str, Any] = {"round": server_round}
        adapter = one_round(model, data, setting, server_round, adapter, steps)
        if server_round == options.rounds:
            set_peft_model_state_dict(model, adapter)
            record["accuracy"] = accuracy(model, data)
        with (options.out / "rounds.jsonl").open("a") as file:
            file.write(json.dumps(record) + "\n")
    (options.out / "adapter").mkdir()
    save_file(adapter, options.out / "adapter" / "adapter_model.safetensors")


def build(setting: Setting, num_labels: int) -> nn.Module:
    """The base with a LoRA adapter and a trained head, as PEFT's users write it; dropout is off."""
    base = AutoModelForSequenceClassification.from_pretrained(
        setting["model"], num_labels=num_labels, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0
    )
    lora = LoraConfig(task_type="SEQ_CLS", r=setting["rank"], lora_alpha=setting["alpha"])
    model: nn.Module = get_peft_model(base, lora).train()
    return model


Steps = Callable[[Prepared, Any, int], None]
"""All local steps of a client: data, indices, seed."""


def one_round(
    model: nn.Module, data: Prepared, setting: Setting, server_round: int, adapter: dict[str, Tensor],
    steps: Steps,
) -> dict[str, Tensor]:  # fmt: skip
    """The mean of what the sampled clients end with; all hold the same number of examples."""
    population, sampled, seed = setting["population"], setting["sampled"], setting["seed"]
    chosen = sample_partitions(range(population), sampled / population, sampled, seed, server_round)
    mean: dict[str, Tensor] = {}
    for client in chosen:
        set_peft_model_state_dict(model, adapter)
        steps(data, data.indices(client), derive(seed, "client", server_round, client))
        for name, tensor in get_peft_model_state_dict(model).items():
            share = tensor.detach().cpu() * (1 / len(chosen))
            mean[name] = share if name not in mean else mean[name] + share
    return mean


def plain_steps(model: nn.Module, setting: Setting) -> Steps:
    """AdamW on the batches of `clients.training.batches.shuffled_batches`."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    device = parameters[0].device

    def steps(data: Prepared, indices: Any, seed: int) -> None:
        optimizer = torch.optim.AdamW(parameters, lr=setting["learning-rate"], weight_decay=0.0)
        rng = stream(seed, "batches")
        for drawn in shuffled_batches(indices, setting["batch-size"], setting["local-steps"], rng):
            batch = load_batch(data.train, drawn, data.pad_token_id, device)
            labels = batch.pop("labels")
            optimizer.zero_grad()
            cross_entropy(model(**batch).logits, labels).backward()
            optimizer.step()

    return steps


def private_steps(model: nn.Module, setting: Setting) -> Steps:
    """The same by DP-SGD: Opacus' hooks, put on once, and its optimiser, on Poisson batches."""
    watched = GradSampleModule(model, loss_reduction="sum")
    parameters = [p for p in model.parameters() if p.requires_grad]
    device = parameters[0].device

    def steps(data: Prepared, indices: Any, seed: int) -> None:
        optimizer = DPOptimizer(
            torch.optim.AdamW(parameters, lr=setting["learning-rate"], weight_decay=0.0),
            noise_multiplier=setting["noise-multiplier"],
            max_grad_norm=setting["max-grad-norm"],
            expected_batch_size=setting["batch-size"],
            generator=torch.Generator(device).manual_seed(derive(seed, "noise")),
        )
        rate, rng = setting["batch-size"] / len(indices), stream(seed, "poisson")
        for drawn in poisson_batches(indices, rate, setting["local-steps"], rng):
            optimizer.zero_grad()
            if len(drawn) == 0:
                for p in parameters:
                    p.grad_sample = p.new_zeros((0, *p.shape))
                    p.grad = torch.zeros_like(p)
            else:
                batch = load_batch(data.train, drawn, data.pad_token_id, device)
                labels = batch.pop("labels")
                cross_entropy(watched(**batch).logits, labels, reduction="sum").backward()
            optimizer.step()
        optimizer.zero_grad()

    return steps


def accuracy(model: nn.Module, data: Prepared) -> float:
    """On the test examples, in one batch."""
    device = next(model.parameters()).device
    batch = load_batch(data.test, torch.arange(len(data.test)).numpy(), data.pad_token_id, device)
    labels = batch.pop("labels")
    with torch.no_grad():
        return float((model(**batch).logits.argmax(1) == labels).float().mean())


if __name__ == "__main__":
    main()
