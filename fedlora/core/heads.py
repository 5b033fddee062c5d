"""A fresh classification head, drawn as transformers initialises its own."""

from __future__ import annotations

import torch
from torch import nn

from fedlora.core.seeding import torch_stream

HEAD_STD = 0.02
"""Standard deviation of its weights."""


def draw_head(layer: nn.Linear, seed: int) -> None:
    """New weights from a stream of ``seed``, biases zero, in place."""
    fresh = torch.randn(layer.weight.shape, generator=torch_stream(seed, "head"))
    layer.weight.data.copy_(HEAD_STD * fresh)
    layer.bias.data.zero_()
