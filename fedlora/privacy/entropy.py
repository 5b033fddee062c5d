"""Normal numbers that nobody can draw again: from the operating system, never from a seed."""

from __future__ import annotations

import os

import numpy as np
import torch
from torch import Tensor


def system_normal(shape: torch.Size) -> Tensor:
    """Standard normal float64 numbers by the inverse distribution function of 52 random bits each.

    torch's CPU generator keeps only 32 bits of its seed, which can be tried out one by one.
    """
    bits = np.frombuffer(os.urandom(8 * shape.numel()), dtype=np.uint64) >> np.uint64(12)
    uniform = torch.from_numpy((bits.astype(np.float64) + 0.5) * 2.0**-52)
    normal: Tensor = torch.special.ndtri(uniform)
    return normal.reshape(shape)
