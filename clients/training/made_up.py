"""Made-up examples for self-tests, their gradients one by one, and what clipping makes of them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor, nn

from clients.training.batches import Indices, load_batch
from clients.training.clip_shares import Shares, tensor_clips
from clients.training.train import batch_loss
from fedlora.core.seeding import torch_stream
from fedlora.data.examples import Examples
from fedlora.errors import RunFailed
from fedlora.models import AdaptedModel

EXAMPLES, WHOSE = np.arange(4), np.array([0, 0, 1, 2], dtype=np.int32)
"""The made-up examples, and to which unit each belongs where units are private."""
Named = dict[str, nn.Parameter]
"""The trained tensors, as in `fedlora.core.state.Trainable`."""


def one_by_one(model: AdaptedModel, named: Named, examples: Examples, pad_token_id: int) -> list[Tensor]:
    """Each example's gradient from a batch of one, or units' means of them: (number, *parameter.shape)."""
    single = [load_batch(examples, EXAMPLES[[i]], pad_token_id, model.device) for i in EXAMPLES]
    gradients = [torch.autograd.grad(batch_loss(model, batch), list(named.values())) for batch in single]
    stacked = [torch.stack(of_parameter) for of_parameter in zip(*gradients, strict=True)]
    if examples.units is None:
        return stacked
    return [
        torch.stack([g[examples.units == unit].mean(dim=0) for unit in np.unique(WHOSE)]) for g in stacked
    ]


def all_of(examples: Examples) -> Indices:
    """Whom of the made-up examples a batch draws: all, or all units."""
    return EXAMPLES if examples.units is None else np.unique(examples.units, return_index=True)[1]


def clipped(
    gradients: Sequence[Tensor], clip: float, clipping: str, names: Sequence[str] = (), shares: Shares = ()
) -> list[Tensor]:
    """Per-example gradients after clipping; Opacus adds 1e-6 to every norm."""
    clips = torch.full((len(gradients), 1), clip, dtype=torch.float64)
    norms = torch.stack([norms_by_row(g) for g in gradients])
    if clipping == "per-layer":
        alike = [clip / math.sqrt(len(clips))] * len(clips)
        of_tensors = tensor_clips(names, clip, shares) if shares else alike
        if math.hypot(*of_tensors) > clip * (1 + 1e-9):
            raise RunFailed("privacy self-test: tensors together may be longer than max-grad-norm")
        clips = torch.tensor(of_tensors, dtype=torch.float64)[:, None]
    else:
        norms = norms.norm(dim=0).expand_as(norms)
    factors = (clips.to(norms) / (norms + 1e-6)).clamp(max=1.0)
    return [torch.einsum("n,n...->n...", f, g) for f, g in zip(factors, gradients, strict=True)]


def norms_by_row(gradients: Tensor) -> Tensor:
    """(examples, ...) -> (examples,)."""
    norms: Tensor = torch.linalg.vector_norm(gradients.flatten(1), dim=1)
    return norms


def synthetic_examples(model: AdaptedModel, pad_token_id: int, *, units: bool = False) -> Examples:
    """A few examples of the model's task; with units two of them belong together."""
    examples = model.task.synthetic_examples(len(EXAMPLES), model.module.config, pad_token_id)
    return replace(examples, units=WHOSE) if units else examples


@contextmanager
def prepared(model: AdaptedModel) -> Iterator[Named]:
    """Inside, dropout is off and no factor is zero: every gradient has something to be compared with."""
    generator = torch_stream(0, "self-test")
    with model.training() as trained, kept(trained.all) as before:
        moves = [0.05 * torch.randn(p.shape, generator=generator).to(p) for p in before]
        put(trained.all, [p + move for p, move in zip(before, moves, strict=True)])
        for layer in model.module.modules():
            if isinstance(layer, nn.Dropout):
                layer.eval()
        yield {**trained.factors, **trained.head}


@contextmanager
def kept(parameters: Iterable[nn.Parameter]) -> Iterator[list[Tensor]]:
    """The values; afterwards the parameters have them again."""
    kept = [p.detach().clone() for p in parameters]
    try:
        yield kept
    finally:
        put(parameters, kept)


def put(parameters: Iterable[nn.Parameter], values: Sequence[Tensor]) -> None:
    """Give parameters other values."""
    with torch.no_grad():
        for parameter, value in zip(parameters, values, strict=True):
            parameter.copy_(value)
