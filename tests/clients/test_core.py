"""Training a core: Opacus sees each example's gradient of it, and only the core and the head move."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from clients.training.batches import load_batch
from clients.training.dp_mechanism import Mechanism
from clients.training.dp_step import private_steps
from clients.training.train import batch_loss, train_local
from fedlora.config import TrainConfig
from fedlora.models import AdaptedModel
from tests.clients.samples import PAD, everyone, examples, train_by_dp_sgd
from tests.models.samples import adapted, cored_adapters

DATA = examples()
ALL = everyone(DATA)
SGD = TrainConfig(optimizer="sgd", learning_rate=0.1, batch_size=6)
CORE = frozenset("R")


def loaded(train_head: bool = True, heads: int = 1) -> AdaptedModel:
    model = adapted()
    model.load(cored_adapters(model.modules, 4, heads=heads), {}, trained=CORE, train_head=train_head)
    return model


def mechanism(mode: str) -> Mechanism:
    return Mechanism(noise_multiplier=0.0, max_grad_norm=1.0, expected_batch_size=6, grad_sample_mode=mode)


@pytest.mark.parametrize("heads", [1, 2, 4])
@pytest.mark.parametrize("mode", ["hooks", "ghost"])
def test_per_example_gradients_of_the_core_are_those_of_single_examples(mode: str, heads: int) -> None:
    """In float64: hooks give the gradients, ghost their norms."""
    model, drawn = loaded(heads=heads), np.arange(6)
    model.module.double()
    with model.training() as trained:
        assert {name.rpartition(".")[2] for name in trained.factors} == {"R"}
        alone = [
            torch.autograd.grad(
                batch_loss(model, load_batch(DATA, drawn[[i]], PAD, model.device)), trained.all
            )
            for i in drawn
        ]
        sgd = torch.optim.SGD(trained.all, lr=0.1)
        with private_steps(model, sgd, mechanism(mode)) as private:
            private.optimizer.zero_grad()
            private.backward(DATA, drawn, PAD)
            for number, parameter in enumerate(trained.all):
                wanted = torch.stack([gradients[number] for gradients in alone])
                if mode == "ghost":
                    norms = wanted.flatten(1).norm(dim=1)
                    torch.testing.assert_close(parameter._norm_sample, norms, rtol=1e-9, atol=1e-12)
                else:
                    torch.testing.assert_close(parameter.grad_sample, wanted, rtol=1e-9, atol=1e-12)


def changed(model: AdaptedModel, before: dict[str, torch.Tensor]) -> set[str]:
    return {name for name, tensor in values(model).items() if not torch.equal(tensor, before[name])}


def values(model: AdaptedModel) -> dict[str, torch.Tensor]:
    adapters, head = model.read()
    return {f"{n}.{x}": t for n, f in adapters.items() for x, t in f.tensors().items()} | head


@pytest.mark.parametrize("train_head", [False, True])
@pytest.mark.parametrize("noise", [None, 1.0])
def test_only_the_core_and_the_head_move(noise: float | None, train_head: bool) -> None:
    model = loaded(train_head)
    before = values(model)
    if noise is None:
        result = train_local(model, DATA, ALL, PAD, SGD, local_steps=2, seed=1)
    else:
        result = train_by_dp_sgd(
            model, DATA, ALL, PAD, SGD, local_steps=2, noise_multiplier=noise, max_grad_norm=1.0, seed=1
        )
    cores = {f"{name}.R" for name in model.modules}
    assert changed(model, before) == cores | (set(model.initial_head) if train_head else set())
    assert all(factors.R is not None for factors in result.adapters.values())
