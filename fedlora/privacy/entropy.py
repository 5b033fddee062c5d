"""Noise that nobody can draw again, and sums of it that tell nothing by their last bits.

A sum in floating point betrays its terms: not every number can come of adding noise to a given value
(Mironov, "On significance of the least significant bits for differential privacy", CCS 2012). So value and
noise are added in float64 and rounded to a grid that does not depend on the value.
"""

from __future__ import annotations

import math
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


GRID = 2.0**-8
"""Width of the grid in standard deviations of the noise, to a power of two.

Rounding in float64 is about 2**-43 of them for sums up to 1,000 of them, so it moves a number to another grid
point with a probability of about 2**-34. The grid adds at most GRID**2 / 12 = 1.3e-6 to the variance.
"""


def on_grid(values: Tensor, std: float) -> Tensor:
    """Float64 values with noise of that standard deviation, rounded to the grid of multiples of its width."""
    if not std:
        return values
    width = 2.0 ** math.floor(math.log2(std * GRID))
    return (values / width).round() * width
