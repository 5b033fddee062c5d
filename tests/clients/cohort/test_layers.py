"""The model outside of a cohort: untouched by it, whatever happened; and which models cannot form one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from clients.training.batched import private, train_cohort
from clients.training.batched.layers import why_alone
from clients.training.batched.self_check import check_cohort
from clients.training.train import train_local
from fedlora.errors import RunFailed
from fedlora.models import AdaptedModel
from fedlora.privacy import plausible
from tests.clients.cohort.samples import DATA, member, model, privately, task
from tests.clients.measures import same_bits
from tests.clients.samples import PAD
from tests.conftest import ALL_DRAWS
from tests.models.samples import random_patch, save_tiny_gpt2


def train(network: AdaptedModel) -> Any:
    one = member(network, 5)
    network.load(one.adapters, one.head, trained=one.trained, train_head=True)
    return train_local(network, DATA, one.indices, PAD, task().config, local_steps=2, seed=1)


def forwards(network: AdaptedModel) -> list[str]:
    return [name for name, module in network.module.named_modules() if "forward" in vars(module)]


@pytest.mark.parametrize("fails", [False, True])
def test_the_model_stays_as_it_was(fails: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also one that no client was ever loaded into, and one in which a step failed."""
    network = model(torch.float32)
    members = [member(network, k) for k in range(2)]
    train_cohort(network, members, task())
    before = train(network)
    parameters = {name: p.clone() for name, p in network.module.named_parameters()}
    if fails:
        monkeypatch.setattr("clients.training.batched.train.batch_loss", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            train_cohort(network, members, task())
    else:
        train_cohort(network, members, task())
    assert forwards(network) == []
    assert all(torch.equal(p, parameters[name]) for name, p in network.module.named_parameters())
    assert all(p.grad is None for p in network.module.parameters())
    assert same_bits(before, train(network))


def test_what_was_loaded_before_does_not_matter() -> None:
    results = []
    for first in (None, 7, 8):
        network = model(torch.float32)
        if first is not None:
            other = member(network, first, rank=3)
            network.load(other.adapters, other.head, trained=frozenset("A"), dropout=0.5)
        results.append(train_cohort(network, [member(network, k) for k in range(2)], task()))
    for found in results[1:]:
        assert all(same_bits(one, other) for one, other in zip(results[0], found, strict=True))


def test_a_base_that_moved_is_the_one_that_is_used() -> None:
    """Packed weights are made anew."""
    network = model(torch.float32)
    members = [member(network, 0)]
    before = train_cohort(network, members, task())
    network.base.move([random_patch(network.modules, 2, 0)])
    moved = train_cohort(network, members, task())
    network.base.reset()
    again = train_cohort(network, members, task())
    assert not same_bits(before[0], moved[0])
    assert same_bits(before[0], again[0])


def test_a_head_that_is_not_linear_trains_alone() -> None:
    network = model(torch.float32)
    assert why_alone(network) == ""
    network.module.classifier = nn.LayerNorm(32)
    head = AdaptedModel(network.module, list(network.modules))
    assert why_alone(head) == "the head's classifier is a LayerNorm, not a linear layer"


def bare_bias(noise: torch.Tensor, std: float) -> torch.Tensor:
    return torch.zeros_like(noise) if noise.shape == (2,) else noise


Change = Callable[[torch.Tensor, float], torch.Tensor]
NOISES: dict[str, tuple[Change, str]] = {
    "a tenth too little": (lambda noise, std: 0.9 * noise, "the noise on .* has standard deviation"),
    "one percent too much": (lambda noise, std: 1.01 * noise, "the noise on .* has standard deviation"),
    "none": (lambda noise, std: 0 * noise, "the noise on .* has standard deviation 0, claimed"),
    "none on the head's bias": (bare_bias, "the noise on classifier.bias has standard deviation 0, claimed"),
    "its deviation squared": (lambda noise, std: std * noise, "the noise on .* has standard deviation"),
    "each number twice": (
        lambda noise, std: (
            noise.flatten()[: (noise.numel() + 1) // 2]
            .repeat_interleave(2)[: noise.numel()]
            .reshape(noise.shape)
        ),
        "the noise on .* is correlated",
    ),
    "uniform": (
        lambda noise, std: (torch.special.ndtr(noise / std) - 0.5) * 12**0.5 * std,
        "the noise on .* is not normally distributed",
    ),
}


@pytest.mark.parametrize(("change", "why"), NOISES.values(), ids=NOISES)
def test_noise_that_is_not_what_is_claimed_is_refused(
    change: Change, why: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plausible, "NOISE_DRAWS", ALL_DRAWS if "one percent" in request.node.name else 40_000)
    network = model(torch.float32)
    first = privately([member(network, 0)])[0]
    network.load(first.adapters, first.head, trained=first.trained, train_head=True)
    real = private.noisy

    def wrong(total: torch.Tensor, mechanism: Any, generator: Any) -> torch.Tensor:
        std = mechanism.noise_multiplier * mechanism.max_grad_norm
        noise = real(total, mechanism, generator) - total
        return total + change(noise, std) if std and noise.any() else total + noise

    monkeypatch.setattr(private, "noisy", wrong)
    with pytest.raises(RunFailed, match=why):
        check_cohort(network, PAD, first.mechanism)


class Mixing(nn.Linear):
    """A layer in which every token sees all tokens of the batch, padding included."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) + x.mean(dim=(0, 1))


@pytest.mark.parametrize("private", [False, True])
def test_a_model_that_mixes_examples_is_refused(private: bool) -> None:
    network = model(torch.float32)
    members = [member(network, k) for k in range(2)]
    members = privately(members) if private else members
    first = members[0]
    network.load(first.adapters, first.head, trained=first.trained, train_head=True)
    check_cohort(network, PAD, first.mechanism)
    old: Any = network.module.backbone.encoder.layer[0].attention.output  # type: ignore[union-attr,index]
    mixing = Mixing(32, 32)
    mixing.load_state_dict(old.dense.state_dict())
    old.dense = mixing.requires_grad_(False)
    other = AdaptedModel.__new__(AdaptedModel)
    other.__dict__.update(network.__dict__, passed=set())  # nothing was checked of this one yet
    with pytest.raises(RunFailed, match=r"cohort self-test: the .* is not that of its clients on this model"):
        check_cohort(other, PAD, first.mechanism)


def test_padding_that_counts_is_refused(tmp_path: Any) -> None:
    """GPT-2's own head looks for the last token that is not its padding token: 2, not 0."""
    network = model(torch.float32, name=str(save_tiny_gpt2(tmp_path)), pooling="model", targets="c_attn")
    first = member(network, 0)
    network.load(first.adapters, first.head, trained=first.trained, train_head=True)
    with pytest.raises(RunFailed, match=r"use engine\.cohort-size = 1"):
        check_cohort(network, 0, None)
    check_cohort(network, 2, None)
