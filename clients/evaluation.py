"""The model's loss and prediction for each example, from which every other figure is a mean."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from clients.batches import Indices, load_batch
from fedlora.data.examples import Examples
from fedlora.errors import ConfigError
from fedlora.models import AdaptedModel

BATCH_SIZE = 64
Outcome: TypeAlias = tuple[np.ndarray, np.ndarray]
"""Losses (float32) and predictions (int64) of one batch."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """Results for each example, in the order in which they were asked for.

    Attributes:
        indices: the examples.
        losses: cross entropy, float32.
        predictions: the most likely label.
        labels: the true label.
        domains: the domain's number, -1 where there is none.
    """

    indices: Indices
    losses: np.ndarray[Any, np.dtype[np.float32]]
    predictions: np.ndarray[Any, np.dtype[np.int64]]
    labels: np.ndarray[Any, np.dtype[np.int64]]
    domains: np.ndarray[Any, np.dtype[np.int64]]

    @property
    def num_examples(self) -> int:
        return len(self.indices)

    @property
    def accuracy(self) -> float:
        return float((self.predictions == self.labels).mean())

    @property
    def loss(self) -> float:
        """Mean cross entropy."""
        return float(self.losses.mean(dtype=np.float64))

    def among(self, indices: Indices) -> Evaluation:
        """The results of those examples alone, in the order in which they stand here."""
        chosen = np.isin(self.indices, indices)
        return Evaluation(
            indices=self.indices[chosen],
            losses=self.losses[chosen],
            predictions=self.predictions[chosen],
            labels=self.labels[chosen],
            domains=self.domains[chosen],
        )

    def accuracy_by_domain(self) -> dict[int, float]:
        """Domain number -> accuracy, for the domains that occur; empty where the data has none."""
        right = self.predictions == self.labels
        return {int(d): float(right[self.domains == d].mean()) for d in np.unique(self.domains) if d >= 0}


def evaluate(
    model: AdaptedModel | nn.Module,
    examples: Examples,
    indices: Indices,
    pad_token_id: int,
    batch_size: int = BATCH_SIZE,
) -> Evaluation:
    """Run the model over the examples, short ones together so that little is padded.

    Raises:
        ConfigError: there is no example.
    """
    places = cut(examples, indices, batch_size)
    outcomes = [run_batch(model, examples, indices[chosen], pad_token_id) for chosen in places]
    return assemble(examples, indices, places, outcomes)


def cut(examples: Examples, indices: Indices, batch_size: int = BATCH_SIZE) -> list[Indices]:
    """The batches, as places in ``indices``: by length, so that they depend on the examples alone.

    Raises:
        ConfigError: there is no example.
    """
    if len(indices) == 0:
        raise ConfigError("there is no example to evaluate on")
    lengths = examples.offsets[indices + 1] - examples.offsets[indices]
    by_length = np.argsort(lengths, kind="stable")
    return [by_length[start : start + batch_size] for start in range(0, len(indices), batch_size)]


def run_batch(
    model: AdaptedModel | nn.Module, examples: Examples, indices: Indices, pad_token_id: int
) -> Outcome:
    """The model's losses and predictions on one batch."""
    module = model.module if isinstance(model, AdaptedModel) else model
    module.eval()
    with torch.inference_mode():
        batch = load_batch(examples, indices, pad_token_id, next(module.parameters()).device)
        logits = module(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        losses = cross_entropy(logits.float(), batch["labels"], reduction="none").cpu().numpy()
        return losses, logits.argmax(dim=-1).cpu().numpy()


def assemble(
    examples: Examples, indices: Indices, places: Sequence[Indices], outcomes: Iterable[Outcome]
) -> Evaluation:
    """The outcomes of all batches of `cut`, put where they belong."""
    losses = np.empty(len(indices), dtype=np.float32)
    predictions = np.empty(len(indices), dtype=np.int64)
    for chosen, (loss, prediction) in zip(places, outcomes, strict=True):
        losses[chosen], predictions[chosen] = loss, prediction
    return Evaluation(
        indices=indices,
        losses=losses,
        predictions=predictions,
        labels=examples.labels[indices].astype(np.int64),
        domains=examples.domains[indices].astype(np.int64),
    )
