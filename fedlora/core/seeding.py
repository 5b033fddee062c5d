"""Named, seeded streams of randomness: one root seed, one independent stream per purpose.

A stream is addressed by words and numbers, ``stream(seed, "client", round, partition_id)``, so
that no draw ever depends on how many draws were made elsewhere or on which worker made them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


def derive(seed: int, *names: str | int) -> int:
    """A 63-bit seed for the stream of that name.

    >>> derive(1, "sampling", 3) == derive(1, "sampling", 3) != derive(1, "sampling", 4)
    True
    """
    text = "\x1f".join([str(seed), *map(str, names)])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def stream(seed: int, *names: str | int) -> np.random.Generator:
    """A NumPy generator for the named stream."""
    return np.random.default_rng(derive(seed, *names))


def torch_stream(seed: int, *names: str | int) -> torch.Generator:
    """A CPU torch generator for the named stream."""
    return torch.Generator().manual_seed(derive(seed, *names))


@contextmanager
def drawn_from(seed: int, *names: str | int) -> Iterator[None]:
    """Libraries that draw from torch's global CPU state draw from a named stream; the state is restored."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(derive(seed, *names))
        yield
