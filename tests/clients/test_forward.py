"""Forward-only steps: slopes by autograd, values that stay, cohorts, and rounds told by their seeds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import fedlora
from clients.training.batches import load_batch
from clients.training.forward import ForwardSteps, at_both_sides, keys, moves
from clients.training.schedule import ONLY_ROUND
from clients.training.train import batch_loss, train_local
from fedlora import wire
from fedlora.config import TrainConfig, from_flat
from fedlora.core.factors import Tensors
from fedlora.core.peft_keys import to_peft
from fedlora.core.perturbations import perturbation
from fedlora.errors import ConfigError, NotApplicable
from fedlora.models import AdaptedModel
from fedlora.server.validate import check
from tests.clients.cohort.samples import assert_same, member, model, task
from tests.clients.samples import PAD, everyone, examples, loaded

DATA = examples()
ALL = everyone(DATA)
FORWARD: dict[str, Any] = {"gradient": "forward", "optimizer": "sgd", "learning_rate": 0.01}
SEED = 5


def trained(network: AdaptedModel, steps: int, **config: Any) -> Any:
    given = TrainConfig(**{**FORWARD, **config})
    return train_local(network, DATA, ALL, PAD, given, local_steps=steps, seed=SEED)


def test_the_slope_is_that_of_the_gradient_along_the_perturbation() -> None:
    """In float64, and the values keep their bits."""
    network = loaded()
    network.module.double()
    parts = network.trainable()
    named = {**parts.factors, **parts.head}
    batch = load_batch(DATA, ALL[:6], PAD, network.device)
    steps = ForwardSteps(parts, TrainConfig(perturbation_size=1e-4), SEED)
    before = {n: p.detach().clone() for n, p in named.items()}
    loss = steps.step(lambda: batch_loss(network, batch))
    found = {name: p.grad.clone() for name, p in named.items() if p.grad is not None}
    for parameter in named.values():
        parameter.grad = None
    exact = batch_loss(network, batch)
    exact.backward()  # type: ignore[no-untyped-call]
    key = keys([*parts.factors], [*parts.head])
    along = {name: perturbation(SEED, 0, key[name], p.shape).double() for name, p in named.items()}
    slope = sum((p.grad * along[name]).sum() for name, p in named.items() if p.grad is not None)
    torch.testing.assert_close(steps.slopes[0], slope, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(loss, exact.detach(), rtol=1e-4, atol=0)
    for name, p in named.items():
        torch.testing.assert_close(found[name], steps.slopes[0] * along[name])
        assert torch.equal(p.detach(), before[name])


def test_values_are_put_back_when_a_pass_fails() -> None:
    value, along = {"w": torch.full((3,), 0.1)}, {"w": torch.ones(3)}

    def fail() -> None:
        with at_both_sides(value, along, 0.5) as shift:
            shift(1)
            assert torch.equal(value["w"], torch.full((3,), 0.1) + 0.5)
            raise ValueError("a pass")

    with pytest.raises(ValueError, match="a pass"):
        fail()
    assert torch.equal(value["w"], torch.full((3,), 0.1))


def test_both_sides_see_the_same_dropout() -> None:
    """Otherwise the slope were mostly the difference of two masks, over a tiny distance."""
    still = max(trained(loaded(dropout=0.5), 8, perturbation_size=1e-4).slopes.abs())
    assert still < 20
    steps, drawn = ForwardSteps(loaded().trainable(), TrainConfig(perturbation_size=1.0), 0), []
    torch.manual_seed(1)
    steps.step(lambda: (drawn.append(torch.rand(1)), torch.zeros(()))[1])
    steps.step(lambda: (drawn.append(torch.rand(1)), torch.zeros(()))[1])
    assert drawn[0] == drawn[1] != drawn[2] == drawn[3]


def test_the_loss_falls() -> None:
    first, last = (trained(loaded(), steps, learning_rate=0.02).loss for steps in (1, 300))
    assert last < 0.95 * first


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"dropout": 0.3},
        {"micro_batch_size": 3},
        {"optimizer": "adamw", "weight_decay": 0.1, "proximal_mu": 0.5, "max_grad_norm": 0.3},
        {"optimizer": "lora-pro", "schedule": "linear"},
    ],
)
def test_a_cohort_is_its_clients_one_by_one(config: dict[str, Any]) -> None:
    network = model()
    members = [
        member(network, 0, steps=2, size=9),
        member(network, 1, rank=2, size=7, steps=5),
        member(network, 2, rank=6, size=20, steps=3, trained=frozenset("B")),
        member(network, 3, size=20, steps=3, modules=frozenset(list(network.modules)[:1]), train_head=False),
    ]
    if config.get("optimizer") == "lora-pro":
        members = members[:2]
    assert_same(network, members, task(**{**FORWARD, **config}))


@pytest.mark.parametrize("config", [{}, {"schedule": "cosine", "warmup_steps": 1}, {"micro_batch_size": 5}])
def test_seeds_tell_all_that_a_round_did(config: dict[str, Any]) -> None:
    network = loaded(dropout=0.2)
    before = in_peft(network)
    result = trained(network, 6, batch_size=4, **config)
    told = wire.written(SEED, moves(TrainConfig(**{**FORWARD, **config}), result.slopes, ONLY_ROUND))
    arrived = wire.CODECS["seeds"].decode(before, told)
    after = in_peft(network)
    assert arrived.keys() == after.keys()
    for name, tensor in after.items():
        assert not torch.equal(tensor, before[name])
        torch.testing.assert_close(arrived[name], tensor, rtol=1e-5, atol=1e-6)


def in_peft(network: AdaptedModel) -> Tensors:
    adapters, head = network.read()
    return to_peft(adapters, head)


SMALL: dict[str, Any] = {
    "engine.name": "in-process", "num-server-rounds": 2, "train.local-steps": 3,
    "lora.rank": 4, "lora.ranks": "",
    "train.gradient": "forward", "train.optimizer": "sgd", "train.learning-rate": 0.01,
}  # fmt: skip


@pytest.mark.parametrize(
    "keys",
    [
        {"strategy.name": "fedavg"},
        {"strategy.name": "flora", "lora.ranks": "2,4"},
        {"strategy.name": "fedsa", "engine.cohort-size": 3},
        {"strategy.name": "ffa", "train.schedule": "linear", "train.schedule-over": "run"},
        {"strategy.name": "fedavg", "lora.method": "vera"},
        {"strategy.name": "fed-sb", "strategy.options": '{"subspace": "random"}'},
        {"strategy.name": "fedavg", "strategy.allocation": "random-layers"},
        {"strategy.name": "fedavg", "model.head": "local"},
        {"strategy.name": "fedavg", "model.head": "freeze"},
    ],
    ids=lambda keys: "-".join(map(str, keys.values())),
)
def test_a_run_by_seeds_is_the_run_by_floats_in_a_few_bytes(
    keys: dict[str, Any], tmp_path: Path, cache: Path
) -> None:
    floats, seeds = (
        fedlora.run("experiments/tiny.toml", tmp_path / name, overrides={**SMALL, **keys, "upload": name})
        for name in ("float32", "seeds")
    )
    for one, other in zip(floats.records, seeds.records, strict=True):
        assert other["bytes_up"] == len(one["participants"]) * (8 + 4 * 3) < one["bytes_up"]
    assert floats.record["loss"] == pytest.approx(seeds.record["loss"], rel=1e-4)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"privacy.mode": "example", "privacy.target-epsilon": 4.0}, "DP-SGD clips gradients of examples"),
        ({"train.alternating": True}, "train.alternating = true needs gradients of single factors"),
        ({"train.nested-ranks": True}, "train.nested-ranks = true needs gradients of single factors"),
        ({"train.control-variates": True}, "train.control-variates = true needs gradients"),
        ({"train.precision": "bfloat16"}, "train.precision = 'bfloat16' must be 'float32'"),
        ({"model.dtype": "bfloat16"}, "model.dtype = 'bfloat16' must be 'float32'"),
        ({"train.perturbation-size": 1e-7}, "train.perturbation-size = 1e-07: must be >= 0.000001"),
        ({"train.gradient": "backward", "upload": "seeds"}, "train.gradient = 'backward' must be 'forward'"),
        ({"upload": "seeds", "train.optimizer": "adamw"}, "train.optimizer = 'adamw' must be 'sgd'"),
        ({"upload": "seeds", "train.momentum": 0.9}, "train.momentum = 0.9 must be 0.0"),
        ({"upload": "seeds", "train.weight-decay": 0.1}, "train.weight-decay = 0.1 must be 0.0"),
        ({"upload": "seeds", "train.max-grad-norm": 1.0}, "train.max-grad-norm = 1.0 must be 0.0"),
        ({"upload": "seeds", "train.proximal-mu": 1.0}, "train.proximal-mu = 1.0 must be 0.0"),
        ({"upload": "seeds", "train.loraplus-lr-ratio": 2.0}, "train.loraplus-lr-ratio = 2.0 must be 1.0"),
        ({"upload": "seeds", "train.head-learning-rate": 1.0}, "train.head-learning-rate = 1.0 must be 0.01"),
        ({"upload": "seeds", "train.local-steps": 5000}, "train.local-steps = 5000 must be <= 4096"),
        ({"upload": "seeds", "strategy.name": "hetlora"}, "hetlora penalises tails, which seeds do not tell"),
        ({"upload": "seeds", "strategy.name": "lora-a2"}, "lora-a2 leaves directions at rest"),
        ({"upload": "seeds", "strategy.allocation": "sized-ranks"}, "fedavg leaves directions at rest"),
        ({"upload": "seeds", "devices.profiles": "equal"}, "devices take time by the bytes of tensors"),
        ({"upload": "seeds", "secure.mode": "sums"}, "masked updates travel as integers, leave it out"),
    ],
)
def test_what_needs_more_is_refused_in_one_line(given: dict[str, Any], words: str) -> None:
    keys = {"train.gradient": "forward", "train.optimizer": "sgd", "train.learning-rate": 0.01, **given}
    with pytest.raises((ConfigError, NotApplicable)) as error:
        check(from_flat(keys))
    assert words in str(error.value)
    assert "\n" not in str(error.value)
