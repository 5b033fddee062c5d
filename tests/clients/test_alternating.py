"""A and B by turns inside a client's steps (LA-LoRA), plainly, privately and in cohorts."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch

from clients.training.train import train_local
from fedlora.config import TrainConfig, from_flat
from fedlora.errors import ConfigError, NotApplicable
from fedlora.models import AdaptedModel
from fedlora.server.validate import check
from tests.clients.cohort.samples import assert_same, member, model, privately, task
from tests.clients.measures import tensors, values
from tests.clients.samples import PAD, everyone, examples, loaded, train_by_dp_sgd

DATA = examples()
ALL = everyone(DATA)
SGD: dict[str, Any] = {"optimizer": "sgd", "learning_rate": 0.1}


@pytest.fixture(scope="module")
def network() -> AdaptedModel:
    return model()


def trained(steps: int, of: AdaptedModel | None = None, how: str = "", **config: Any) -> Any:
    """All tensors after so many steps: plain ones, or private ones with gradients by hooks or a loop."""
    of, given = of or loaded(), TrainConfig(**{**SGD, "alternating": True, **config})
    if not how:
        result = train_local(of, DATA, ALL, PAD, given, local_steps=steps, seed=1)
    else:
        result = train_by_dp_sgd(
            of, DATA, ALL, PAD, given, local_steps=steps, seed=1,
            noise_multiplier=0.0, max_grad_norm=0.05, grad_sample_mode=how,
        )  # fmt: skip
    return tensors(result)


def part(found: dict[str, torch.Tensor], letter: str) -> dict[str, torch.Tensor]:
    return {name: t for name, t in found.items() if name.endswith(f".{letter}")}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(tensor, other[name]) for name, tensor in one.items())


@pytest.mark.parametrize("how", ["", "hooks", "loop"])
def test_b_moves_first_then_a_and_the_other_keeps_its_bits(how: str) -> None:
    states = [values(loaded()), *(trained(steps, how=how) for steps in (1, 2, 3))]
    for step, (before, after) in enumerate(pairwise(states)):
        moving, resting = ("B", "A") if step % 2 == 0 else ("A", "B")
        assert same(part(after, resting), before)
        for name, tensor in part(after, moving).items():
            assert not torch.equal(tensor, before[name]), name
        head = before.keys() - part(before, "A").keys() - part(before, "B").keys()
        assert not same({name: after[name] for name in head}, before)


@pytest.mark.parametrize("how", ["", "hooks", "loop"])
def test_a_step_is_that_of_a_client_that_trains_the_moving_factor_alone(how: str) -> None:
    """What rests takes no share of the clipping norm, neither of a batch nor of an example."""
    clip = {} if how else {"max_grad_norm": 0.01}
    alone = trained(1, loaded(trained=frozenset("B")), how, alternating=False, **clip)
    found = trained(1, how=how, **clip)
    for name, tensor in alone.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-6, atol=1e-8)
    both = trained(1, how=how, alternating=False, **clip)
    assert not same(part(both, "B"), found)


@pytest.mark.parametrize("config", [{}, {"momentum": 0.9, "weight_decay": 0.1}, {"optimizer": "adamw"}])
def test_noise_moves_nothing_that_rests(config: dict[str, Any]) -> None:
    network = loaded()
    before = values(network)
    given = TrainConfig(**{**SGD, "alternating": True, **config})
    result = train_by_dp_sgd(
        network, DATA, ALL, PAD, given, local_steps=1, seed=1, noise_multiplier=1.0, max_grad_norm=1.0
    )
    assert same(part(tensors(result), "A"), before)


@pytest.mark.parametrize(
    "config",
    [
        SGD,
        {**SGD, "momentum": 0.9, "weight_decay": 0.1, "proximal_mu": 0.5},
        {"dropout": 0.3, "weight_decay": 0.1},
        {"max_grad_norm": 0.3},
        {"optimizer": "torch.optim:NAdam"},
    ],
    ids=lambda c: "-".join(c),
)
@pytest.mark.parametrize("private", [False, True], ids=["plain", "private"])
def test_a_cohort_is_its_clients_one_by_one(
    private: bool, config: dict[str, Any], network: AdaptedModel
) -> None:
    members = [
        member(network, 0, steps=2, size=9),
        member(network, 1, rank=2, size=7, steps=5),
        member(network, 2, rank=1, size=20, steps=3),
    ]
    if private:
        members, config = privately(members), {**config, "max_grad_norm": 0.0}
    assert_same(network, members, task(alternating=True, **config))


@pytest.mark.parametrize(
    ("keys", "line"),
    [
        ({"strategy.name": "ffa"}, "ffa does not train both A and B of lora in each round"),
        ({"strategy.name": "rolora"}, "rolora does not train both"),
        ({"lora.method": "vera"}, "lora.method = 'vera' does not train both"),
        ({"train.optimizer": "lora-pro"}, "train.optimizer = 'lora-pro' moves A and B together"),
        ({"train.local-steps": 1}, "train.local-steps = 1: A would never move, must be >= 2"),
        (
            {"privacy.mode": "example", "privacy.grad-sample-mode": "ghost"},
            "privacy.grad-sample-mode = 'ghost' takes the norms of A and B together",
        ),
    ],
)
def test_what_has_no_turns_is_refused(keys: dict[str, Any], line: str) -> None:
    with pytest.raises((ConfigError, NotApplicable), match=r"^train\.alternating = true: ") as error:
        check(from_flat({"train.alternating": True, **keys}))
    assert line in str(error.value)
    assert "\n" not in str(error.value)
