"""Nested training (DyLoRA): a step trains the leading directions alone, plainly, privately and in cohorts."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from clients.training.nested import drawn_ranks
from clients.training.train import train_local
from fedlora.config import TrainConfig, from_flat
from fedlora.core.factors import LoraFactors
from fedlora.errors import ConfigError, NotApplicable
from fedlora.models import AdaptedModel
from fedlora.server.validate import check
from tests.clients.cohort.samples import assert_same, member, model, privately, task
from tests.clients.measures import tensors, values
from tests.clients.samples import PAD, everyone, examples, loaded, train_by_dp_sgd

DATA = examples()
ALL = everyone(DATA)
SGD: dict[str, Any] = {"optimizer": "sgd", "learning_rate": 0.1}
SEED = next(seed for seed in range(50) if drawn_ranks(4, 1, seed) == [2])
"""Of a client whose first step trains two of four directions."""


def step(network: AdaptedModel, how: str, *, noise: float = 0.0, **config: Any) -> dict[str, torch.Tensor]:
    """All tensors after one step: a plain one, or a private one with gradients found in that way."""
    given = TrainConfig(**{**SGD, **config})
    if not how:
        return tensors(train_local(network, DATA, ALL, PAD, given, local_steps=1, seed=SEED))
    result = train_by_dp_sgd(
        network, DATA, ALL, PAD, given, local_steps=1, seed=SEED,
        noise_multiplier=noise, max_grad_norm=0.05, grad_sample_mode=how,
    )  # fmt: skip
    return tensors(result)


def cut(network: AdaptedModel) -> AdaptedModel:
    """The same model, whose adapter has the first two directions only."""
    adapters, head = network.read()
    short = {
        name: LoraFactors(f.A[:2], f.B[:, :2], f.scaling)  # type: ignore[attr-defined]
        for name, f in adapters.items()
    }
    network.load(short, head, trained=frozenset("AB"), train_head=True)
    return network


def leading(found: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    ends = {"A": lambda t: t[:2], "B": lambda t: t[:, :2]}
    return {
        name: ends.get(name[-1], lambda t: t)(t) if name[-2:-1] == "." else t for name, t in found.items()
    }


@pytest.mark.parametrize("how", ["", "hooks", "ghost", "loop"])
def test_a_step_is_that_of_the_adapter_that_was_cut_and_the_rest_keeps_its_bits(how: str) -> None:
    """The rest takes no share of a clipping norm either."""
    before, clip = values(loaded()), {} if how else {"max_grad_norm": 0.01}
    found = step(loaded(), how, nested_ranks=True, **clip)
    for name, tensor in step(cut(loaded()), how, **clip).items():
        torch.testing.assert_close(leading(found)[name], tensor, rtol=1e-5, atol=1e-7)
    for name, tensor in found.items():
        if name.endswith(".A"):
            assert torch.equal(tensor[2:], before[name][2:])
            assert not torch.equal(tensor[:2], before[name][:2])
        if name.endswith(".B"):
            assert torch.equal(tensor[:, 2:], before[name][:, 2:])


@pytest.mark.parametrize("how", ["hooks", "ghost"])
def test_noise_moves_nothing_beyond(how: str) -> None:
    before, found = values(loaded()), step(loaded(), how, noise=1.0, nested_ranks=True)
    for name in (name for name in found if name.endswith(".A")):
        assert torch.equal(found[name][2:], before[name][2:])
        assert not torch.equal(found[name][:2], before[name][:2])


def test_every_number_of_directions_is_drawn_alike() -> None:
    counts = torch.bincount(torch.tensor(drawn_ranks(4, 4000, 1)), minlength=5)
    assert counts[0] == 0
    assert all(abs(int(count) - 1000) < 120 for count in counts[1:])  # 4.4 standard deviations


@pytest.mark.parametrize(
    ("private", "config"),
    [
        (False, SGD),
        (False, {"optimizer": "torch.optim:NAdam"}),
        (True, {"dropout": 0.3, "weight_decay": 0.1, "proximal_mu": 0.5}),
    ],
)
def test_a_cohort_is_its_clients_one_by_one(private: bool, config: dict[str, Any]) -> None:
    network = model()
    members = [
        member(network, 0, steps=2, size=9),
        member(network, 1, rank=2, size=7, steps=5),
        member(network, 2, rank=6, size=20, steps=3),
    ]
    assert_same(network, privately(members) if private else members, task(nested_ranks=True, **config))


@pytest.mark.parametrize(
    ("keys", "line"),
    [
        (
            {"strategy.name": "fed-sb", "strategy.options": '{"subspace": "random"}'},
            "fed-sb trains no A or B",
        ),
        ({"strategy.name": "head-only"}, "head-only trains no A or B"),
        ({"lora.method": "vera"}, "lora.method = 'vera', leading directions are of lora's"),
        ({"train.optimizer": "lora-pro"}, "train.optimizer = 'lora-pro' moves all directions"),
    ],
)
def test_what_has_no_leading_directions_is_refused(keys: dict[str, Any], line: str) -> None:
    with pytest.raises((ConfigError, NotApplicable), match=r"^train\.nested-ranks = true: ") as error:
        check(from_flat({"train.nested-ranks": True, **keys}))
    assert line in str(error.value)
    assert "\n" not in str(error.value)
