"""Perturbations: vectors over all that is trained, drawn from a seed and a number, as any side can."""

from __future__ import annotations

import torch
from torch import Tensor

from fedlora.core.seeding import torch_stream


def perturbation(seed: int, number: int, key: str, shape: torch.Size) -> Tensor:
    """One tensor's part of perturbation ``number``: standard normal, float32, on the CPU.

    Args:
        seed: of the client and round.
        number: of the local step, from 0.
        key: the tensor's, in PEFT's spelling (`fedlora.core.peft_keys`).
        shape: its shape.
    """
    return torch.randn(shape, generator=torch_stream(seed, "perturbation", number, key))
