"""The core R between PEFT's ``lora_A`` and ``lora_B``, as a layer of its own."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class CoredOutput(nn.Module):
    """Takes the place of a PEFT layer's ``lora_B``: ``x -> B R x``.

    PEFT computes ``lora_B(lora_A(dropout(x))) * scaling``, so that the adapter becomes ``s B R A``. R and B
    are plain linear layers, for which Opacus has per-example gradients.

    Attributes:
        core: R (r, r), zero at first.
        outer: PEFT's own ``lora_B``, (out, r).
    """

    def __init__(self, outer: nn.Linear) -> None:
        super().__init__()
        rank, like = outer.in_features, outer.weight
        self.core = nn.Linear(rank, rank, bias=False, device="meta")  # draws nothing
        self.core.weight = nn.Parameter(torch.zeros(rank, rank, device=like.device, dtype=like.dtype))
        self.outer = outer

    @property
    def weight(self) -> Tensor:
        """``B R``, (out, r): what PEFT multiplies by A where it merges."""
        return self.outer.weight @ self.core.weight

    def forward(self, x: Tensor) -> Tensor:
        """``B R x`` of inputs (..., r)."""
        y: Tensor = self.outer(self.core(x))
        return y
