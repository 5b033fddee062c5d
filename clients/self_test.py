"""Does DP-SGD compute what it claims on this model? Asked before training, because errors are silent."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from opacus.optimizers import DPOptimizer
from torch import Tensor, nn

from clients.batches import Indices, load_batch
from clients.private import backward, per_example_gradients
from clients.training import batch_loss
from fedlora.data.examples import Examples
from fedlora.errors import RunFailed
from fedlora.models import AdaptedModel
from fedlora.seeding import torch_stream

TOLERANCE = 1e-3
"""Largest accepted difference, relative to the largest entry: far above rounding, far below any error."""
HUGE = 1e9


def self_test(model: AdaptedModel, examples: Examples, indices: Indices, pad_token_id: int) -> None:
    """Check per-example gradients and the noise-free DP step on a few examples; the model stays as it is.

    Every example's gradient is compared with that of a batch of one, and a step of SGD with a huge
    clipping norm and no noise with the mean gradient.

    Raises:
        RunFailed: they differ, so nothing may be trained privately with this model.
    """
    drawn = indices[:4]
    with model.training() as trained, _moved(trained.all):
        for layer in model.module.modules():
            if isinstance(layer, nn.Dropout):
                layer.eval()
        alone = _one_by_one(model, trained.all, examples, drawn, pad_token_id)
        names = [*trained.factors, *trained.head]
        before = [p.detach().clone() for p in trained.all]
        with per_example_gradients(model.module):
            optimizer = DPOptimizer(
                torch.optim.SGD(trained.all, lr=1.0),
                noise_multiplier=0.0,
                max_grad_norm=HUGE,
                expected_batch_size=len(drawn),
            )
            optimizer.zero_grad()
            backward(model, trained.all, examples, drawn, pad_token_id)
            _compare("per-example gradients", names, optimizer.grad_samples, alone)
            optimizer.step()
        steps = [b - p.detach() for b, p in zip(before, trained.all, strict=True)]
        _compare("the noise-free step", names, steps, [g.mean(dim=0) for g in alone])


def _one_by_one(
    model: AdaptedModel,
    parameters: Sequence[nn.Parameter],
    examples: Examples,
    drawn: Indices,
    pad_token_id: int,
) -> list[Tensor]:
    """Each example's gradient from a batch of one, stacked: (examples, *parameter.shape)."""
    gradients = [
        torch.autograd.grad(
            batch_loss(model, load_batch(examples, drawn[i : i + 1], pad_token_id, model.device)), parameters
        )
        for i in range(len(drawn))
    ]
    return [torch.stack(of_parameter) for of_parameter in zip(*gradients, strict=True)]


@contextmanager
def _moved(parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """Inside, no factor is zero, so that every gradient has something to be compared with."""
    kept = [p.detach().clone() for p in parameters]
    generator = torch_stream(0, "self-test")
    with torch.no_grad():
        for parameter in parameters:
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator).to(parameter.device))
    try:
        yield
    finally:
        with torch.no_grad():
            for parameter, value in zip(parameters, kept, strict=True):
                parameter.copy_(value)


def _compare(what: str, names: Sequence[str], found: Sequence[Tensor], wanted: Sequence[Tensor]) -> None:
    for name, f, w in zip(names, found, wanted, strict=True):
        if f.shape != w.shape or not bool((f - w).abs().max() <= TOLERANCE * w.abs().max()):
            raise RunFailed(
                f"privacy self-test: {what} of {name} are wrong on this model, nothing was trained"
            )
