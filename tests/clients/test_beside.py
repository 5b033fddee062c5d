"""A second adapter beside the one that trains: held, added, and the same in cohorts."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from clients.training.train import train_local
from fedlora.config import TrainConfig
from fedlora.core.factors import LoraFactors
from fedlora.models import AdaptedModel
from tests.clients.cohort.samples import DATA, assert_same, member, model, task
from tests.clients.samples import BOTH, PAD, everyone
from tests.models.samples import random_adapters


def outputs(network: AdaptedModel) -> torch.Tensor:
    ids = torch.arange(1, 13).view(2, 6)
    with torch.no_grad():
        found: torch.Tensor = network.module(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
    return found


def test_its_product_is_added() -> None:
    """As one adapter with both ranks has it; and nothing is left of it afterwards."""
    network = model()
    own = random_adapters(network.modules, 3, 0.7, seed=1)
    held = random_adapters(network.modules, 5, 1.9, seed=2)
    network.load(own, {})
    before = outputs(network)
    network.load(own, {}, beside=held)
    found = outputs(network)
    both = {
        name: LoraFactors(
            torch.cat([own[name].A, held[name].A]),
            torch.cat([0.7 * own[name].B, 1.9 * held[name].B], dim=1),
            1.0,
        )
        for name in own
    }
    network.load(both, {})
    torch.testing.assert_close(found, outputs(network), rtol=1e-6, atol=1e-6)
    assert (found - before).abs().max() > 1e-2
    network.load(own, {})
    assert torch.equal(outputs(network), before)


def test_it_is_held_while_the_other_trains() -> None:
    network = model()
    own, held = (random_adapters(network.modules, 3, 1.0, seed=s) for s in (1, 2))
    network.load(own, {}, trained=BOTH, beside=held)
    assert {name.rpartition(".")[2] for name in network.trainable().factors} == {"A", "B"}
    assert all(p.shape[0] == 3 or p.shape[1] == 3 for p in network.trainable().factors.values())
    result = train_local(network, DATA, everyone(DATA), PAD, TrainConfig(batch_size=4), local_steps=3, seed=1)
    for name, layer in held.items():
        kept = network.module.get_submodule(name)
        assert torch.equal(kept.lora_A["beside3"].weight, layer.A)
        assert torch.equal(kept.lora_B["beside3"].weight, layer.B)
        assert not torch.equal(result.adapters[name].tensors()["A"], own[name].A)


@pytest.mark.parametrize("optimizer", ["adamw", "sgd", "lora-pro"])
def test_cohorts_hold_it_as_clients_alone_do(optimizer: str) -> None:
    """Of other ranks than the adapters that train, and of a rank of its own at each client."""
    network = model()
    members = [
        replace(
            member(network, number, rank=2 + number, train_head=False),
            beside=random_adapters(network.modules, 4 - number, 0.5, seed=number + 50),
        )
        for number in range(3)
    ]
    assert_same(network, members, task(optimizer=optimizer, weight_decay=0.1))
