"""The penalty on an adapter's tail (HetLoRA), in plain and in private training, and on its way there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import ConfigRecord, RecordDict
from torch import nn

from clients.execute import train_instruction
from clients.node import Node
from clients.training.batches import load_batch, shuffled_batches
from clients.training.train import Penalties, TailGradient, batch_loss, train_local
from fedlora import wire
from fedlora.config import TrainConfig
from fedlora.core.factors import LoraFactors
from fedlora.core.seeding import stream
from fedlora.core.state import Broadcast, RankRegularizer, Trainable
from fedlora.models import AdaptedModel
from tests.clients.measures import tensors, values
from tests.clients.samples import BOTH, PAD, everyone, examples, loaded, train_by_dp_sgd
from tests.conftest import tiny_config
from tests.in_process import client_runtime
from tests.models.samples import random_adapters

DATA = examples()
ALL = everyone(DATA)
SGD: dict[str, Any] = {"optimizer": "sgd", "learning_rate": 0.1}
TAIL = RankRegularizer(weight=0.5, start=3)


def with_tail(tail: RankRegularizer | None, **settings: Any) -> AdaptedModel:
    """The tiny model with a random adapter of rank 4 and this penalty."""
    model = loaded()
    model.load(random_adapters(model.modules, 4), {}, trained=BOTH, train_head=True, tail=tail, **settings)
    return model


def penalty(factors: dict[str, Any], tail: RankRegularizer) -> torch.Tensor:
    """The definition."""
    layers = [name[:-2] for name in factors if name.endswith(".A")]
    terms = [
        factors[f"{n}.B"][:, tail.start :].norm() * factors[f"{n}.A"][tail.start :].norm() for n in layers
    ]
    return tail.weight * torch.stack(terms).sum()


@pytest.mark.parametrize("start", [0, 1, 3, 4])
def test_the_gradient_is_that_of_the_definition(start: int) -> None:
    g = torch.Generator().manual_seed(0)
    factors = {
        f"{name}.{letter}": nn.Parameter(torch.randn(*shape, generator=g))
        for name in ("q", "v")
        for letter, shape in (("A", (4, 7)), ("B", (5, 4)))
    }
    tail = RankRegularizer(weight=0.7, start=start)
    wanted = torch.autograd.grad(penalty(factors, tail), list(factors.values()), allow_unused=True)
    for parameter in factors.values():
        parameter.grad = torch.ones_like(parameter)
    TailGradient(factors, tail).add_gradient()
    for parameter, expected in zip(factors.values(), wanted, strict=True):
        assert parameter.grad is not None
        torch.testing.assert_close(parameter.grad - 1.0, torch.nan_to_num(expected), rtol=1e-5, atol=1e-6)


def test_a_tail_of_zero_gives_and_gets_no_gradient() -> None:
    """As in the first round, where B is zero: the definition has no gradient there, ours is zero."""
    factors = {"q.A": nn.Parameter(torch.ones(2, 3)), "q.B": nn.Parameter(torch.zeros(4, 2))}
    for parameter in factors.values():
        parameter.grad = torch.zeros_like(parameter)
    TailGradient(factors, RankRegularizer(weight=1.0, start=1)).add_gradient()
    assert all(not parameter.grad.any() for parameter in factors.values())


def test_plain_training_descends_the_loss_with_the_penalty() -> None:
    """SGD on the written-out sum, on the same batches."""
    model = with_tail(TAIL)
    config = TrainConfig(batch_size=8, **SGD)
    found = tensors(train_local(model, DATA, ALL, PAD, config, local_steps=4, seed=1))
    model = with_tail(None)
    with model.training() as trained:
        named = {**trained.factors, **trained.head}
        for drawn in shuffled_batches(ALL, 8, 4, stream(1, "batches")):
            loss = batch_loss(model, load_batch(DATA, drawn, PAD, model.device))
            loss = loss + penalty(trained.factors, TAIL)
            gradients = torch.autograd.grad(loss, list(named.values()))
            with torch.no_grad():
                for p, g in zip(named.values(), gradients, strict=True):
                    p -= 0.1 * g
    for name, wanted in values(model).items():
        torch.testing.assert_close(found[name], wanted, rtol=1e-5, atol=1e-6)


def test_it_shrinks_the_tail_and_leaves_the_next_client_alone() -> None:
    sizes, model = [], loaded()
    for tail in (None, TAIL, None):
        adapters = random_adapters(model.modules, 4)
        model.load(adapters, {}, trained=BOTH, train_head=True, **({} if tail is None else {"tail": tail}))
        found = tensors(train_local(model, DATA, ALL, PAD, TrainConfig(**SGD), local_steps=4, seed=1))
        factors = {name: tensor for name, tensor in found.items() if name[-2:] in (".A", ".B")}
        sizes.append(float(penalty(factors, TAIL)))
    assert sizes[1] < 0.9 * sizes[0]
    assert sizes[2] == sizes[0]


def private(tail: RankRegularizer | None, **settings: Any) -> dict[str, torch.Tensor]:
    chosen: dict[str, Any] = {"noise": 0.0, "clip": 1e6, "steps": 1, **settings}
    result = train_by_dp_sgd(
        with_tail(tail), DATA, ALL, PAD, TrainConfig(batch_size=8, **SGD),
        local_steps=chosen["steps"], noise_multiplier=chosen["noise"], max_grad_norm=chosen["clip"], seed=3,
    )  # fmt: skip
    return tensors(result)


@pytest.mark.parametrize(("noise", "clip"), [(0.0, 1e6), (2.0, 0.01)])
def test_in_private_training_it_is_added_after_clipping_and_noise(noise: float, clip: float) -> None:
    """One step differs by exactly its gradient, however small the bound and however large the noise."""
    without, found = private(None, noise=noise, clip=clip), private(TAIL, noise=noise, clip=clip)
    factors = {n: nn.Parameter(p.detach().clone()) for n, p in with_tail(TAIL).trainable().factors.items()}
    gradients = torch.autograd.grad(penalty(factors, TAIL), list(factors.values()))
    for name, gradient in zip(factors, gradients, strict=True):
        torch.testing.assert_close(without[name] - found[name], 0.1 * gradient, rtol=0, atol=1e-5)
    assert any(float(gradient.abs().max()) > 1e-3 for gradient in gradients)


def test_the_proximal_term_and_the_tail_add_up() -> None:
    A, B = nn.Parameter(torch.ones(2, 3)), nn.Parameter(torch.ones(4, 2))
    trained = Trainable({"q.A": A, "q.B": B}, {}, RankRegularizer(weight=1.0, start=1))
    penalties = Penalties(trained, TrainConfig(proximal_mu=2.0))
    with torch.no_grad():
        A += 1.0
    for parameter in (A, B):
        parameter.grad = torch.zeros_like(parameter)
    penalties.add_gradient()
    assert A.grad is not None
    torch.testing.assert_close(A.grad[0], torch.full((3,), 2.0))
    torch.testing.assert_close(A.grad[1], 2.0 + 2.0 * torch.full((3,), 3**-0.5))


@pytest.mark.parametrize("tail", [None, RankRegularizer(weight=0.25, start=3)])
def test_it_travels_in_the_order(tail: RankRegularizer | None) -> None:
    factors = {"q": LoraFactors(torch.ones(4, 3), torch.ones(2, 4), 2.0)}
    sent = Broadcast(
        adapters=factors, trained=BOTH, uploaded=BOTH, modules=frozenset({"q"}), head={}, tail=tail
    )
    config = wire.instruction_config(sent, wire.Needs(), "kaiming")
    order = wire.TrainInstruction(server_round=1, arrays={}, parts={}, needs=wire.Needs(), config=config)
    assert order.tail == tail
    assert ("tail-weight" in config) == (tail is not None)


@pytest.mark.parametrize("mode", ["none", "example"])
def test_a_client_that_is_ordered_to_shrink_its_tail_does(mode: str, tmp_path: Path, cache: Path) -> None:
    """From the order to the reply, in plain and in private training."""
    config = tiny_config(**{"privacy.mode": mode, "privacy.accountant": "rdp"})
    adapters = random_adapters(client_runtime(config).model.modules, 4)
    sizes = []
    for weight in (0.0, 20.0):
        sent = Broadcast(
            adapters=adapters, trained=BOTH, uploaded=BOTH, modules=frozenset(adapters), head={},
            tail=RankRegularizer(weight=weight, start=3),
        )  # fmt: skip
        settings = {"server-round": 1, **wire.instruction_config(sent, wire.Needs(), "kaiming")}
        record = ConfigRecord({key: value for key, value in settings.items() if value != []})
        content = RecordDict({wire.ARRAYS: wire.to_record(wire.moving_tensors(sent)), wire.CONFIG: record})
        node = Node(partition_id=0, state_dir=tmp_path / str(weight), simulation=True)
        reply = train_instruction(client_runtime(config), wire.decode_instruction(content), config, node)
        assert reply.status == wire.OK, reply.reason
        trained = wire.from_peft(reply.arrays).adapters(2.0)
        factors = {f"{name}.{x}": t for name, f in trained.items() for x, t in f.tensors().items()}
        sizes.append(float(penalty(factors, RankRegularizer(weight=1.0, start=3))))
    assert sizes[1] < 0.98 * sizes[0]
