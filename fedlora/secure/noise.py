"""Noise that clients share: each adds so much that what is left of it in the sum covers every one of them.

Distributed discrete Gaussian (after Kairouz, Liu, Steinke, ICML 2021, arXiv 2102.06387). Client k, whose
change x_k it has clipped to norm C, uploads for each number an integer

    q_k ~ N_Z(x_k / g, s^2),    P(q) prop. to exp(-(q - x_k / g)^2 / (2 s^2)),    g = z C / sqrt(T s^2 - t^2)

and the server reads g sum_k q_k. The centre is a real number: nothing is rounded before the noise, so that no
rounding makes the norm longer. With s = 32 and t = 2, the noise of any T clients is worth a Gaussian one of
noise multiplier z. For by Poisson's formula, with V the sum of their x_k / g, pointwise and for all m

    P(sum_k q_k = m) = N(m; V, T s^2) (1 +- 4 T e^{-pi^2 s^2})

    N(m; V, T s^2)   = E_y [ N_Z(m; y, t^2) ] (1 +- 4 e^{-2 pi^2 t^2}),    y ~ N(V, T s^2 - t^2),

and the last is post-processing of a Gaussian mechanism of noise z C / g on a sum in which a client moves V by
at most C / g. Both factors differ from 1 by less than 1e-33 a number; noise of further clients, and whatever
colluders take off of their own, is post-processing too. `fedlora.privacy.accountants` then counts as ever.

No sum wraps around: a number is at most C / g by its client's norm, and its noise at most 14 s (beyond which
1e-42 is left out). So there is no rotation, which would make room in a smaller modulus, and no seed of one.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from fedlora.errors import ConfigError
from fedlora.secure.fixed_point import Floats
from fedlora.secure.masks import Unsigned, of_integers, signed

Words = Callable[[int], NDArray[np.uint64]]
"""So many words of 64 random bits."""
STD = 32.0
"""Standard deviation of a client's noise, in steps of the grid."""
SMOOTHING = 2.0
"""What of it makes integers of real numbers, t; far fewer would do (1.5: 5e-20 a number)."""
MOST = int(14 * STD)
"""The largest noise."""
PIECE = 2**17
"""Numbers that are drawn at once."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SharedNoise:
    """How the clients of a round write their changes and noise.

    Attributes:
        clipping_norm: C, > 0.
        noise_multiplier: z, of the noise that the honest ones add together, over C.
        honest: T, whose noise is counted on.
        clients: that may be in the sum.
        bits: of the modulus, 16, 24, 32 or 64.

    Raises:
        ConfigError: so little noise that sums could wrap around.
    """

    clipping_norm: float
    noise_multiplier: float
    honest: int
    clients: int
    bits: int

    def __post_init__(self) -> None:
        if self.clients * (math.ceil(self.clipping_norm / self.width) + MOST + 1) >= 1 << (self.bits - 1):
            raise ConfigError(
                f"privacy.noise-multiplier = {self.noise_multiplier:g}: its grid is too fine for sums of "
                f"{self.clients} clients in secure.bits = {self.bits}"
            )

    @property
    def width(self) -> float:
        """Step of the grid, g."""
        return self.noise_multiplier * self.clipping_norm / math.sqrt(self.honest * STD**2 - SMOOTHING**2)

    def encode(self, change: Floats, words: Words) -> Unsigned:
        """A change, cut to the clipping norm, as integers with noise; one that is not finite counts as zero.

        Args:
            change: all that a client changed.
            words: the operating system's (`system_words`), or a simulation's.
        """
        centres = clipped(change, self.clipping_norm) / self.width
        whole = np.rint(centres)
        noisy = whole + np.concatenate(
            [drawn((centres - whole)[i : i + PIECE], words) for i in range(0, len(whole), PIECE)] or [whole]
        )
        return of_integers(noisy, self.bits)

    def decode(self, total: Unsigned) -> Floats:
        """The noisy sum of the changes, out of the sum of the integers."""
        return signed(total, self.bits) * self.width


def worth(noise_multiplier: float, honest: int, clients: int) -> float:
    """The noise multiplier of so many clients' shares, where those of the honest ones are worth one."""
    shares = (clients * STD**2 - SMOOTHING**2) / (honest * STD**2 - SMOOTHING**2)
    return noise_multiplier * math.sqrt(shares)


def clipped(change: Floats, norm: float) -> Floats:
    """A change at most so long; zero where it is not finite, which would tell more than its length."""
    with np.errstate(over="ignore"):
        length = float(np.linalg.norm(change))
    if not math.isfinite(length):
        return np.zeros_like(change)
    return change if length <= norm else change * (norm / length)


def drawn(centres: Floats, words: Words) -> Floats:
    """An integer of N_Z(f, s^2) for each centre f in [-1/2, 1/2], by rejection from N_Z(0, s^2).

        N_Z(m; f) / N_Z(m; 0)  prop. to  exp(m f / s^2)  <=  exp(MOST / (2 s^2))

    Comparisons of uniform numbers with probabilities, both to a relative 2^-53, decide all: each integer's
    probability is right to about 1e-15 of itself.
    """
    found, left = np.zeros(len(centres)), np.arange(len(centres))
    tails = _tails()
    while len(left):
        high, low, third = words(3 * len(left)).reshape(3, -1)
        uniform = np.ldexp(high.astype(np.float64), -64) + np.ldexp(low.astype(np.float64), -128)
        size = MOST - np.searchsorted(tails, uniform)
        noise = np.where(third & np.uint64(1), size, -size).astype(np.float64)
        chance = np.exp((noise * centres[left] - MOST / 2) / STD**2)
        taken = np.ldexp((third >> np.uint64(11)).astype(np.float64), -53) < chance
        found[left[taken]] = noise[taken]
        left = left[~taken]
    return found


@lru_cache
def _tails() -> Floats:
    """``P(|m| >= MOST), .., P(|m| >= 1)`` of N_Z(0, s^2), each to rounding."""
    sizes = np.arange(MOST, -1, -1)
    masses = np.where(sizes, 2.0, 1.0) * np.exp(-(sizes**2) / (2 * STD**2))
    tails: Floats = np.cumsum(masses) / math.fsum(masses)
    return tails[:-1]


def system_words(number: int) -> NDArray[np.uint64]:
    """Words of the operating system, which nobody can draw again."""
    return np.frombuffer(os.urandom(8 * number), dtype=np.uint64)


def seeded_words(generator: np.random.Generator) -> Words:
    """Words of a stream, for simulations."""
    return lambda number: generator.integers(0, 2**64, number, dtype=np.uint64)
