"""A small data set whose label can be learned, and a model set up for training."""

from __future__ import annotations

from typing import Any

import numpy as np

from clients.training.batches import Indices
from clients.training.dp_mechanism import Mechanism
from clients.training.dp_sgd import train_private
from clients.training.train import LocalResult
from fedlora.config import TrainConfig
from fedlora.data.examples import Examples
from fedlora.models import AdaptedModel
from tests.models.samples import adapted, random_adapters

PAD = 0
BOTH = frozenset("AB")


def examples(number: int = 24, seed: int = 0) -> Examples:
    """Sequences of 3 to 11 tokens; label 1 where the tokens come from the upper half of the vocabulary."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 2, number)
    rows = [rng.integers(1, 500, rng.integers(3, 12)) + 500 * label - label for label in labels]
    return Examples(
        tokens=np.concatenate(rows).astype(np.int32),
        offsets=np.cumsum([0, *map(len, rows)]),
        labels=labels,
        domains=rng.integers(0, 3, number).astype(np.int32),
    )


def everyone(data: Examples) -> np.ndarray[Any, np.dtype[np.int64]]:
    return np.arange(len(data))


def loaded(
    rank: int = 4,
    *,
    trained: frozenset[str] = BOTH,
    modules: frozenset[str] | None = None,
    dropout: float = 0.0,
    train_head: bool = True,
    pooling: str = "mean",
) -> AdaptedModel:
    """The tiny model with a random adapter, ready to train."""
    model = adapted(pooling=pooling)
    reload(model, rank, trained=trained, modules=modules, dropout=dropout, train_head=train_head)
    return model


def reload(
    model: AdaptedModel,
    rank: int = 4,
    *,
    trained: frozenset[str] = BOTH,
    modules: frozenset[str] | None = None,
    dropout: float = 0.0,
    train_head: bool = True,
) -> None:
    adapters = random_adapters(model.modules, rank)
    model.load(adapters, {}, trained=trained, modules=modules, dropout=dropout, train_head=train_head)


def train_by_dp_sgd(
    model: AdaptedModel, data: Examples, indices: Indices, pad: int, config: TrainConfig, *,
    local_steps: int, seed: int, release_loss: bool = False, canaries: Any = None, **step: Any,
) -> LocalResult:  # fmt: skip
    """`train_private` by a mechanism of these settings and the configured batch size."""
    mechanism = Mechanism(expected_batch_size=config.batch_size, **step)
    return train_private(
        model, data, indices, pad, config, local_steps=local_steps, mechanism=mechanism, seed=seed,
        release_loss=release_loss, canaries=canaries,
    )  # fmt: skip
