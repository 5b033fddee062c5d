"""Batches of the local steps: shuffled passes, or independent draws for DP-SGD."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedlora.config import TrainConfig
from fedlora.data.examples import Examples, collate
from fedlora.data.packing import collate_packed
from fedlora.errors import ConfigError

Indices = np.ndarray[Any, np.dtype[np.int64]]


def num_steps(config: TrainConfig, num_examples: int, local_steps: int) -> int:
    """Optimiser steps of a round: ``local_steps``, or whole passes where ``train.local-epochs`` is set.

    Raises:
        ConfigError: there is no example to train on.
    """
    if num_examples == 0:
        raise ConfigError("the client has no training example: every partition needs at least one")
    if config.local_epochs == 0:
        return local_steps
    return config.local_epochs * -(-num_examples // config.batch_size)


def shuffled_batches(
    indices: Indices, batch_size: int, steps: int, rng: np.random.Generator
) -> Iterator[Indices]:
    """``steps`` batches out of shuffled passes; the last batch of a pass may be smaller.

    A client with fewer examples than ``batch_size`` sees all of them in every step.
    """
    step = 0
    while True:
        order = rng.permutation(indices)
        for start in range(0, len(order), batch_size):
            if step == steps:
                return
            step += 1
            yield order[start : start + batch_size]


def poisson_batches(
    indices: Indices, sample_rate: float, steps: int, rng: np.random.Generator
) -> Iterator[Indices]:
    """``steps`` draws in which every example appears with probability ``sample_rate``; may be empty."""
    for _ in range(steps):
        yield indices[rng.random(len(indices)) < sample_rate]


def physical_batches(drawn: Indices, most: int) -> list[Indices]:
    """The drawn examples in order, at most so many at once (0: all); one empty batch if there are none.

    >>> [[len(chunk) for chunk in physical_batches(np.arange(n), 3)] for n in (7, 0)]
    [[3, 3, 1], [0]]
    """
    count = max(len(drawn), 1)
    return [drawn[start : start + (most or count)] for start in range(0, count, most or count)]


def load_batch(
    examples: Examples, indices: Indices, pad_token_id: int, device: torch.device, *, packed: bool = False
) -> dict[str, Tensor]:
    """``input_ids``, ``attention_mask`` (batch, tokens) and ``labels`` (batch,) on the device.

    ``packed`` puts several examples into a row, see `fedlora.data.packing`.
    """
    batch = (collate_packed if packed else collate)(examples, indices, pad_token_id)
    for name in batch:
        batch[name] = batch[name].to(device)
    return batch
