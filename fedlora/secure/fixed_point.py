"""Real numbers as integers modulo 2^b, so that sums of masked ones are exact and never overflow.

    S = floor((2^(b-1) - 1) / n),    q_k = floor(S (w_k / w_max) clip(x_k / R) + u),    u ~ U[0, 1)

n clients, weights w_k <= w_max, numbers within [-R, R]. |q_k| <= S, so that sum_k q_k is read back from its
residue, and E q_k is what was meant. The mean sum_k w_k x_k / sum_k w_k that follows is off by at most

    n R w_max / (S sum_k w_k),

and in standard deviation by at most sqrt(n) / 2 of R w_max / (S sum_k w_k).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedlora.errors import ConfigError
from fedlora.secure.masks import Unsigned, of_integers, signed

Floats = NDArray[np.float64]
LEAST_STEPS = 2**10
MOST_STEPS = 2**52
"""Integers of this size are exact in a float64, with room to round."""


@dataclass(frozen=True, slots=True)
class FixedPoint:
    """How numbers of a round are written.

    Attributes:
        clients: that may be in the sum, n.
        bits: of the modulus, 16, 24, 32 or 64.
        limit: magnitude beyond which a number is cut, R.
        max_weight: the largest weight, w_max.

    Raises:
        ConfigError: too many clients for the modulus, or weights whose sum could overflow.
    """

    clients: int
    bits: int
    limit: float
    max_weight: int

    def __post_init__(self) -> None:
        if self.steps < LEAST_STEPS:
            raise ConfigError(f"secure.bits = {self.bits}: too few for sums of {self.clients} clients")
        if self.clients * self.max_weight >= 1 << (self.bits - 1):
            raise ConfigError(
                f"secure.max-weight = {self.max_weight}: sums of {self.clients} such weights overflow "
                f"secure.bits = {self.bits}"
            )

    @property
    def steps(self) -> int:
        """Integer that stands for the limit at the largest weight, S."""
        return min(((1 << (self.bits - 1)) - 1) // self.clients, MOST_STEPS)

    def encode(self, values: Floats, weight: float, generator: np.random.Generator) -> Unsigned:
        """``w x`` as integers, rounded at random."""
        scaled = np.clip(values / self.limit, -1.0, 1.0) * (self.steps * (weight / self.max_weight))
        drawn = np.floor(scaled + generator.random(len(values)))
        return of_integers(np.minimum(drawn, self.steps), self.bits)  # S + u may round up to S + 1

    def decode(self, total: Unsigned) -> Floats:
        """``sum_k w_k x_k`` out of the sum of the integers."""
        return signed(total, self.bits) * (self.limit * self.max_weight / self.steps)

    def count(self, number: int) -> Unsigned:
        """A number from 0 to ``max_weight`` as itself, one entry; sums of it are exact."""
        return of_integers(np.array([number], np.float64), self.bits)

    def counted(self, total: Unsigned) -> list[int]:
        """The sums of such numbers."""
        return [int(number) % (1 << self.bits) for number in total]

    def clipped(self, values: Floats) -> int:
        """How many numbers are beyond the limit."""
        return int(np.count_nonzero(np.abs(values) > self.limit))

    def error(self, weights: float) -> float:
        """The most that an entry of the mean is off by, for a sum of weights."""
        return self.clients * self.limit * self.max_weight / (self.steps * weights) if weights else math.inf

    def spread(self, weights: float) -> float:
        """The largest standard deviation of that: an entry's own roundings are independent."""
        return self.error(weights) / (2 * math.sqrt(self.clients))
