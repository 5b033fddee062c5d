"""Clients that train together and one by one, and how far apart they come out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from clients.training.batched import BatchSettings, Member
from clients.training.batched.stacks import BESIDE
from clients.training.batched.train import Cohort
from clients.training.dp_mechanism import Mechanism
from clients.training.dp_sgd import train_private
from clients.training.train import train_local
from fedlora.config import TrainConfig
from fedlora.data.examples import Examples
from fedlora.models import AdaptedModel
from tests.clients.samples import BOTH, PAD, examples
from tests.models.samples import adapted, cored_adapters, random_adapters

DATA = examples(60, seed=3)
Values = dict[str, Tensor]


def model(dtype: torch.dtype = torch.float64, **options: Any) -> AdaptedModel:
    """The tiny model."""
    found = adapted(**options)
    found.module.to(dtype)
    return found


def member(
    network: AdaptedModel, number: int, *, rank: int = 4, cored: int = 0, size: int = 12, **options: Any
) -> Member:
    """Client ``number``: its own adapter (with a core in so many blocks), head, examples and seed."""
    adapters = random_adapters(network.modules, rank, 0.5 + number, seed=number)
    if cored:
        adapters = cored_adapters(network.modules, rank, 0.5 + number, number, cored)
    g = torch.Generator().manual_seed(number)
    head = {n: torch.randn(t.shape, generator=g) * 0.3 for n, t in network.initial_head.items()}
    start = (7 * number) % (len(DATA) - size)
    given = {
        "trained": frozenset("R") if cored else BOTH,
        "modules": frozenset(network.modules),
        "train_head": True,
        "steps": 4,
        "seed": 100 + number,
        **options,
    }
    return Member(adapters=adapters, head=head, indices=torch.arange(start, start + size).numpy(), **given)


def mechanism(**options: Any) -> Mechanism:
    return Mechanism(**{"noise_multiplier": 0.7, "max_grad_norm": 0.5, "expected_batch_size": 4, **options})


def together(
    network: AdaptedModel, members: Sequence[Member], task: BatchSettings
) -> tuple[list[Values], list[float]]:
    """What each member has after training in one cohort, unrounded; and its loss."""
    order = sorted(range(len(members)), key=lambda k: -members[k].steps)
    cohort = Cohort(network, [members[k] for k in order], task)
    with cohort.route_laid():
        for step in range(max(m.steps for m in members)):
            cohort.step(step)
    stacks, results = cohort.stacks, cohort.results()
    values: list[Values] = [{} for _ in members]
    losses = [0.0 for _ in members]
    for place, k in enumerate(order):
        values[k] = {
            name: stacks.own(tensor.detach(), name, place).clone()
            for name, tensor in stacks.values.items()
            if f".{BESIDE}." not in name
        }
        losses[k] = results[place].loss or 0.0
    return values, losses


def alone(network: AdaptedModel, member: Member, task: BatchSettings) -> tuple[Values, float]:
    """What a member has after training with the one-by-one trainer, unrounded; and its loss."""
    network.load(
        member.adapters,
        member.head,
        trained=member.trained,
        modules=member.modules,
        dropout=task.dropout,
        train_head=member.train_head,
        tail=member.tail,
        control=member.control,
        beside=member.beside,
    )
    network.module.to(next(iter(network.module.parameters())).dtype)
    common: Any = (network, task.examples, member.indices, task.pad_token_id, task.config)
    if member.mechanism is None:
        result = train_local(*common, local_steps=member.steps, seed=member.seed, stage=task.stage)
    else:
        result = train_private(
            *common,
            local_steps=member.steps,
            mechanism=member.mechanism,
            seed=member.seed,
            release_loss=True,
            stage=task.stage,
        )
    factors = {
        f"{name}.{letter}": parameter.detach().clone()
        for name in network.modules
        for letter, parameter in network.adapter.parameters(name).items()
    }
    return {**factors, **{n: p.detach().clone() for n, p in network._head.items()}}, result.loss or 0.0


def task(data: Examples = DATA, *, dropout: float = 0.0, **config: Any) -> BatchSettings:
    settings = TrainConfig(**{"batch_size": 4, **config})
    return BatchSettings(examples=data, pad_token_id=PAD, config=settings, dropout=dropout, release_loss=True)


def starts(network: AdaptedModel, member: Member, dtype: torch.dtype = torch.float64) -> Values:
    """What a member starts from."""
    factors = {
        f"{name}.{x}": t.to(dtype) for name, f in member.adapters.items() for x, t in f.tensors().items()
    }
    return {**factors, **{n: t.to(dtype) for n, t in {**network.initial_head, **member.head}.items()}}


def assert_same(
    network: AdaptedModel, members: Sequence[Member], task: BatchSettings, tolerance: float = 1e-9
) -> list[Values]:
    """Every member comes out as it does alone, and something was trained."""
    values, losses = together(network, members, task)
    for number, one in enumerate(members):
        wanted, loss = alone(network, one, task)
        begun = starts(network, one, next(iter(wanted.values())).dtype)
        assert set(wanted) == set(values[number])
        for name, tensor in wanted.items():
            assert values[number][name].shape == tensor.shape
            if not tensor.numel():
                continue
            error = (values[number][name] - tensor).abs().max()
            assert error <= tolerance * max(1.0, float(tensor.abs().max())), (number, name, float(error))
        assert any(not torch.equal(tensor, begun[name]) for name, tensor in wanted.items())
        assert abs(losses[number] - loss) <= max(tolerance, 1e-6) * max(1.0, abs(loss))
    return values


def privately(members: Sequence[Member], **options: Any) -> list[Member]:
    """The same members, each with noise of its own size."""
    return [
        replace(m, mechanism=mechanism(noise_multiplier=0.5 + 0.1 * k, **options))
        for k, m in enumerate(members)
    ]


def assert_rested(network: AdaptedModel, members: Sequence[Member], values: Sequence[Values]) -> None:
    """Layers that a member does not train are what it began with, bit by bit; the others moved."""
    for one, found in zip(members, values, strict=True):
        begun = starts(network, one)
        for name in network.modules:
            for letter in "AB":
                still = torch.equal(found[f"{name}.{letter}"], begun[f"{name}.{letter}"])
                assert still == (name not in one.modules)
