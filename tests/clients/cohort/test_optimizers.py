"""Laws of every local optimiser: a cohort equals its clients one by one, privately too; bad ones are refused.

Under test are the listed ones and a dozen of torch's own, or the one ``module:Class`` that the environment's
``FEDLORA_OPTIMIZER`` names.
"""

from __future__ import annotations

import json
import os
from dataclasses import replace
from typing import Any

import pytest
import torch

from clients.training.batched import Member
from clients.training.optimizers.registry import OPTIMIZERS, check_optimizer
from fedlora.config import TrainConfig
from fedlora.core.state import RankRegularizer
from fedlora.errors import ConfigError
from fedlora.models import AdaptedModel
from tests.clients.cohort.samples import alone, assert_rested, assert_same, member, privately, starts, task

OWN = os.environ.get("FEDLORA_OPTIMIZER", "")
TORCHS = (
    *("Adam", "NAdam", "RAdam", "Adagrad", "Adamax", "RMSprop", "Rprop", "Adadelta", "ASGD", "Adafactor"),
    *("AdamW", "SGD"),
)
VARIANTS: dict[str, dict[str, Any]] = {
    "sgd": {"optimizer": "sgd", "momentum": 0.9, "optimizer_options": '{"nesterov": true}'},
    "adamw": {"optimizer": "adamw", "optimizer_options": '{"amsgrad": true, "betas": [0.8, 0.99]}'},
    "lora-pro": {"optimizer": "lora-pro", "momentum": 0.9, "weight_decay": 0.1},
    "lora-pro-sized": {"optimizer": "lora-pro", "momentum": 0.9, "optimizer_options": '{"beta2": 0.9}'},
    "scaled-sized": {"optimizer": "scaled", "optimizer_options": '{"beta2": 0.9, "damping": 0.01}'},
    "adabelief": {
        "optimizer": "adabelief",
        "weight_decay": 0.1,
        "optimizer_options": '{"betas": [0.8, 0.99]}',
    },
    "lora-pro-even": {"optimizer": "lora-pro", "momentum": 0.9, "optimizer_options": '{"x": "even"}'},
}
LISTED = {**{name: {"optimizer": name} for name in OPTIMIZERS}, **{f"{n}+": v for n, v in VARIANTS.items()}}
OTHERS = {f"torch.optim:{name}": {"optimizer": f"torch.optim:{name}"} for name in TORCHS}
UNDER_TEST: dict[str, dict[str, Any]] = {OWN: {"optimizer": OWN}} if OWN else {**LISTED, **OTHERS}
every = pytest.mark.parametrize("how", UNDER_TEST.values(), ids=UNDER_TEST)
in_layers = pytest.mark.parametrize("how", ({OWN: UNDER_TEST[OWN]} if OWN else LISTED).values(), ids=str)
RATE = {"learning_rate": 0.01}


def unequal(network: AdaptedModel) -> list[Member]:
    """Clients of other ranks, steps and example counts."""
    return [
        member(network, 0, steps=2, size=9),
        member(network, 1, rank=2, size=7, steps=4),
        member(network, 2, rank=1, size=20, steps=3),
    ]


def test_every_listed_one_is_under_test() -> None:
    assert OWN or {how["optimizer"] for how in UNDER_TEST.values()} >= set(OPTIMIZERS)
    assert OWN or len(UNDER_TEST) >= 12


@every
def test_every_client_comes_out_as_if_alone(how: dict[str, Any], network: AdaptedModel) -> None:
    """With mixed ranks, a head, dropout, a proximal term, a tail penalty and clipping."""
    tail = RankRegularizer(weight=0.3, start=1)
    members = [replace(m, tail=tail if m.rank > 1 else None) for m in unequal(network)]
    assert_same(network, members, task(dropout=0.3, proximal_mu=0.5, max_grad_norm=0.3, **{**RATE, **how}))


@every
def test_every_client_comes_out_as_if_alone_privately(how: dict[str, Any], network: AdaptedModel) -> None:
    assert_same(network, privately(unequal(network)), task(proximal_mu=0.5, **{**RATE, **how}))


@in_layers
@pytest.mark.parametrize(("trained", "private"), [("A", False), ("B", True)], ids=["plain", "private"])
def test_one_factor_rests(trained: str, private: bool, how: dict[str, Any], network: AdaptedModel) -> None:
    members = [replace(m, trained=frozenset(trained)) for m in unequal(network)]
    values = assert_same(network, privately(members) if private else members, task(**{**RATE, **how}))
    for one, found in zip(members, values, strict=True):
        begun = starts(network, one)
        resting = [name for name in begun if name.endswith(("A", "B")) and not name.endswith(trained)]
        assert resting
        assert all(torch.equal(found[name], begun[name]) for name in resting)


@in_layers
def test_a_core_between_factors_that_rest(how: dict[str, Any], network: AdaptedModel) -> None:
    members = [member(network, k, rank=rank, cored=1, steps=2 + k) for k, rank in enumerate((3, 5, 2))]
    assert_same(network, members, task(**{**RATE, **how}))


@in_layers
def test_clients_that_train_other_layers(how: dict[str, Any], network: AdaptedModel) -> None:
    """What a client does not train stays, bit by bit."""
    names = list(network.modules)
    members = unequal(network)
    members[0] = replace(members[0], modules=frozenset(names[:1]))
    members[1] = replace(members[1], modules=frozenset(names[1:]), train_head=False)
    values = assert_same(network, members, task(**{**RATE, "weight_decay": 0.1, **how}))
    assert_rested(network, members, values)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (
            {"optimizer": "adam-w"},
            r"train.optimizer = 'adam-w' \(did you mean adamw\?\): accepted are adamw, ",
        ),
        ({"optimizer": "nowhere:Adam"}, "train.optimizer = 'nowhere:Adam': cannot be imported"),
        ({"optimizer": "torch.nn:Linear"}, "is no subclass of torch.optim.Optimizer"),
        ({"optimizer": "torch.optim:LBFGS"}, "its step needs a closure"),
        ({"optimizer": "torch.optim:SparseAdam"}, "takes no step on layer.A .*SparseAdam does"),
        ({"optimizer": "torch.optim:Muon"}, "cannot be made with .*2D"),
        ({"optimizer_options": '{"nesterof": true}'}, "nesterof = True: adamw accepts betas, eps, amsgrad"),
        ({"optimizer_options": '{"amsgrad": 1}'}, "amsgrad = 1: adamw expects bool"),
        ({"optimizer_options": '{"betas": 0.9}'}, "betas = 0.9: adamw expects list"),
        ({"optimizer_options": '{"betas": [0.9, 2]}'}, "cannot be made with .*Invalid beta"),
        ({"optimizer_options": '{"lr": 0.1}'}, "lr = 0.1: is train.learning-rate"),
        ({"optimizer": "sgd", "optimizer_options": '{"nesterov": true}'}, "Nesterov momentum requires"),
        (
            {"optimizer": "adabelief", "optimizer_options": '{"betas": [0.9]}'},
            r"betas = .0.9.: must be two",
        ),
        ({"optimizer": "adabelief", "optimizer_options": '{"eps": 0.0}'}, "eps = 0.0: must be > 0"),
        ({"optimizer": "scaled", "optimizer_options": '{"damping": -1.0}'}, "damping = -1.0: must be >= 0"),
        ({"optimizer": "scaled", "optimizer_options": '{"beta2": 1.0}'}, "beta2 = 1.0: must be >= 0 and < 1"),
        ({"optimizer": f"{__name__}:Patient", "local_steps": 3}, "moves nothing in train.local-steps = 3"),
        ({"momentum": 0.9}, "train.momentum = 0.9: adamw has none, must be 0"),
        ({"optimizer": "torch.optim:Rprop", "weight_decay": 0.1}, "train.weight-decay = 0.1: .* has none"),
        ({"optimizer": "lora-pro", "loraplus_lr_ratio": 4.0}, "lora-pro moves A and B together, must be 1"),
        (
            {"optimizer": "lora-pro", "optimizer_options": '{"x": "odd"}'},
            "x = 'odd': accepted are nearest, even",
        ),
    ],
)
def test_what_cannot_train_is_refused_in_one_line(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words) as refused:
        check_optimizer(TrainConfig(**settings), trained=[frozenset("AB")], head=True)
    assert "\n" not in str(refused.value)


def test_two_factors_beside_a_core_are_refused_by_lora_pro() -> None:
    with pytest.raises(ConfigError, match="of a layer with a core it moves one factor, not A, B, R at once"):
        check_optimizer(TrainConfig(optimizer="lora-pro"), trained=[frozenset("ABR")], head=True)


class Restless(torch.optim.SGD):
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        torch.rand(1)


class Patient(torch.optim.SGD):
    """Begins with the fifth step, as rectified ones do."""

    steps = 0

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        self.steps += 1
        if self.steps > 4:
            super().step()


def test_who_begins_late_enough_is_taken() -> None:
    how = TrainConfig(optimizer=f"{__name__}:Patient", local_steps=5)
    check_optimizer(how, trained=[frozenset("AB")], head=True)


class Flat(torch.optim.SGD):
    """Takes flat views of parameters and gradients, as AdamP does."""

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.data.view(-1).sub_(p.grad.view(-1).sign(), alpha=group["lr"])


class Averaged(torch.optim.SGD):
    """Trains one sequence and is read at its mean, as schedule-free ones are."""

    reading = True

    def train(self) -> None:
        self.reading = False

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        assert not self.reading
        super().step()
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                state["count"] = state.get("count", 0) + 1
                mean = state.setdefault("mean", torch.zeros_like(p))
                mean.add_((p.detach() - mean) / state["count"])

    def eval(self) -> None:
        self.reading = True
        for group in self.param_groups:
            for p in group["params"]:
                p.data.copy_(self.state[p]["mean"])


@pytest.mark.parametrize("private", [False, True], ids=["plain", "private"])
@pytest.mark.parametrize("kind", [Flat, Averaged])
def test_flat_views_and_values_to_be_read(kind: type, private: bool, network: AdaptedModel) -> None:
    members = privately(unequal(network)) if private else unequal(network)
    assert_same(network, members, task(optimizer=f"{__name__}:{kind.__name__}", **RATE))


def test_what_is_read_is_not_what_was_trained_last(network: AdaptedModel) -> None:
    """By hand: of plain steps, the mean of where they came by."""
    (one,) = unequal(network)[:1]
    found, _ = alone(network, one, task(optimizer=f"{__name__}:Averaged", **RATE))
    stops = [alone(network, replace(one, steps=steps), task(optimizer="sgd", **RATE))[0] for steps in (1, 2)]
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, (stops[0][name] + stops[1][name]) / 2)


def test_random_steps_are_refused() -> None:
    with pytest.raises(ConfigError, match="draws random numbers"):
        check_optimizer(TrainConfig(optimizer=f"{__name__}:Restless"), trained=[frozenset()], head=True)


def test_muon_where_there_is_no_head() -> None:
    check_optimizer(TrainConfig(optimizer="torch.optim:Muon"), trained=[frozenset("AB")], head=False)


def test_options_that_are_no_json_object() -> None:
    with pytest.raises(ConfigError, match=r"train.optimizer-options = .*not JSON"):
        TrainConfig(optimizer_options="{nesterov}")
    assert TrainConfig(optimizer_options=json.dumps({"weight-x": 1})).optimizer_option_dict == {"weight_x": 1}
