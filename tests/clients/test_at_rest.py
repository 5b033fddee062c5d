"""Private steps on some directions: all ways are a loop over examples, whose norms know the others not."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pytest
import torch
from torch import Tensor

from clients.training.batches import load_batch
from clients.training.dp_mechanism import Mechanism
from clients.training.dp_step import private_steps
from clients.training.self_check import self_check
from clients.training.train import batch_loss
from fedlora.adapters.lora import PartedOutput
from fedlora.core.adapters import lora_set
from fedlora.core.directions import all_parted
from fedlora.core.factors import AdapterSet
from fedlora.errors import RunFailed
from fedlora.models import AdaptedModel
from tests.clients.samples import BOTH, PAD, examples
from tests.models.samples import adapted, random_adapters

DATA, DRAWN, LR = examples(), np.arange(6), 0.1
MODES = ["hooks", "ghost", "loop"]


def loaded(directions: Mapping[str, tuple[int, ...]] | None) -> tuple[AdaptedModel, AdapterSet]:
    """The tiny model in float64, with some directions of its first layer and none of its second."""
    model = adapted()
    adapters = random_adapters(model.modules, 4)
    if directions is not None:
        adapters = lora_set(all_parted(adapters, directions))
    moves = {name for name, factors in adapters.items() if factors.rank}
    model.load(adapters, {}, trained=BOTH, modules=frozenset(moves), train_head=False)
    model.module.double()
    return model, adapters


def some(model: AdaptedModel) -> dict[str, tuple[int, ...]]:
    first, second, *_ = model.modules
    return {first: (1, 3), second: ()}


def rows_of_single_examples() -> list[dict[str, Tensor]]:
    """By autograd on whole layers, of each example: gradients of the directions that train."""
    model, _ = loaded(None)
    directions, found = some(model), []
    with model.training() as values:
        for i in DRAWN:
            loss = batch_loss(model, load_batch(DATA, DRAWN[[i]], PAD, model.device))
            own = dict(
                zip(values.factors, torch.autograd.grad(loss, list(values.factors.values())), strict=True)
            )
            for module, training in directions.items():
                rows = list(training)
                own[f"{module}.A"] = own[f"{module}.A"][rows]
                own[f"{module}.B"] = own[f"{module}.B"][:, rows]
            found.append({name: gradient for name, gradient in own.items() if gradient.numel()})
    return found


@pytest.mark.parametrize("mode", MODES)
def test_clipped_are_the_directions_that_train_alone(mode: str) -> None:
    """Against whole layers: the norm is over rows of A and columns of B that train; the others keep bits."""
    single = rows_of_single_examples()
    norms = [sum(float(g.square().sum()) for g in own.values()) ** 0.5 for own in single]
    clip = sorted(norms)[len(norms) // 2]
    wanted: dict[str, Tensor] = {}
    for own, norm in zip(single, norms, strict=True):
        for name, gradient in own.items():
            wanted[name] = wanted.get(name, 0) + min(1.0, clip / (norm + 1e-6)) * gradient
    model, adapters = loaded(some(adapted()))
    before = {name: value.detach().clone() for name, value in model.trainable().factors.items()}
    assert before.keys() == wanted.keys()
    mechanism = Mechanism(
        noise_multiplier=0.0, max_grad_norm=clip, expected_batch_size=4, grad_sample_mode=mode
    )
    with model.training() as values:
        sgd = torch.optim.SGD(values.all, lr=LR)
        with private_steps(model, sgd, mechanism, torch.Generator()) as private:
            private.step(DATA, DRAWN, PAD)
        for name, value in values.factors.items():
            torch.testing.assert_close(
                value.detach(), before[name] - LR / 4 * wanted[name], rtol=1e-8, atol=1e-13
            )
    for module, start in adapters.items():
        for name, tensor in model.adapter.parameters(module).items():
            if name in ("A0", "B0"):
                assert torch.equal(tensor.float(), start.tensors()[name])


@pytest.mark.parametrize("mode", MODES)
def test_the_self_test_passes_and_sees_examples_that_see_each_other(
    mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    mechanism = Mechanism(
        noise_multiplier=1.0, max_grad_norm=1.0, expected_batch_size=4, grad_sample_mode=mode
    )
    model, _ = loaded(some(adapted()))
    self_check(model, PAD, mechanism)
    if mode == "loop":  # examples are never together
        return
    whole = PartedOutput.forward

    def mixed(self: PartedOutput, x: Tensor) -> Tensor:
        y = whole(self, x)
        return y + y.mean(dim=0, keepdim=True)

    monkeypatch.setattr(PartedOutput, "forward", mixed)
    model, _ = loaded(some(adapted()))
    with pytest.raises(RunFailed) as caught:
        self_check(model, PAD, mechanism)
    assert "\n" not in str(caught.value)
