"""The model's loss and hits on each example, from which every other figure is a mean."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from clients.training.batches import Indices, load_batch
from fedlora.data.examples import Examples
from fedlora.errors import ConfigError
from fedlora.models import AdaptedModel
from fedlora.models.packed_linear import packed_base
from fedlora.tasks import CLASSIFICATION, ExampleMetrics, Task

BATCH_SIZE = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """Results for each example, in the order in which they were asked for.

    Attributes:
        indices: the examples.
        losses: the mean over an example's units, float32.
        units: what was judged in each example: its label, or its counted tokens.
        right: how many of them the model's first choice hits.
        domains: the domain's number, -1 where there is none.
    """

    indices: Indices
    losses: np.ndarray[Any, np.dtype[np.float32]]
    units: np.ndarray[Any, np.dtype[np.int64]]
    right: np.ndarray[Any, np.dtype[np.int64]]
    domains: np.ndarray[Any, np.dtype[np.int64]]

    @property
    def num_examples(self) -> int:
        return len(self.indices)

    @property
    def num_units(self) -> int:
        return int(self.units.sum())

    @property
    def accuracy(self) -> float:
        """Hits among all units."""
        return float(self.right.sum() / self.units.sum())

    @property
    def loss(self) -> float:
        """Mean over all units."""
        return float((self.losses * self.units.astype(np.float32)).sum(dtype=np.float64) / self.units.sum())

    def among(self, indices: Indices) -> Evaluation:
        """The results of those examples alone, in the order in which they stand here."""
        return self._those(np.isin(self.indices, indices))

    def by_domain(self) -> dict[int, Evaluation]:
        """Domain number -> its results, for the domains that occur; empty where the data has none."""
        return {int(d): self._those(self.domains == d) for d in np.unique(self.domains) if d >= 0}

    def accuracy_by_domain(self) -> dict[int, float]:
        """Domain number -> accuracy."""
        return {domain: results.accuracy for domain, results in self.by_domain().items()}

    def _those(self, chosen: np.ndarray) -> Evaluation:
        return Evaluation(
            indices=self.indices[chosen],
            losses=self.losses[chosen],
            units=self.units[chosen],
            right=self.right[chosen],
            domains=self.domains[chosen],
        )


def evaluate(
    model: AdaptedModel | nn.Module,
    examples: Examples,
    indices: Indices,
    pad_token_id: int,
    batch_size: int = BATCH_SIZE,
    *,
    task: Task = CLASSIFICATION,
) -> Evaluation:
    """Run the model over the examples, short ones together so that little is padded.

    Args:
        model: an `AdaptedModel`, which knows its task, or another one.
        examples: the data set.
        indices: which of them.
        pad_token_id: fills up shorter sequences.
        batch_size: examples of a pass at most.
        task: of a model that is no `AdaptedModel`.

    Raises:
        ConfigError: there is no example.
    """
    module, task = (model.module, model.task) if isinstance(model, AdaptedModel) else (model, task)
    places = cut(examples, indices, batch_size, task.most_tokens)
    with packed_base(model) if isinstance(model, AdaptedModel) else nullcontext():
        outcomes = [run_batch(module, task, examples, indices[chosen], pad_token_id) for chosen in places]
    return assemble(examples, indices, places, outcomes)


def cut(
    examples: Examples, indices: Indices, batch_size: int = BATCH_SIZE, most_tokens: int = 0
) -> list[Indices]:
    """The batches, as places in ``indices``: by length, so that they depend on the examples alone.

    Args:
        examples: the data set.
        indices: which of them.
        batch_size: examples of a batch at most.
        most_tokens: padded tokens of a batch at most (0: any number); one longer example is a batch.

    Raises:
        ConfigError: there is no example.
    """
    if len(indices) == 0:
        raise ConfigError("there is no example to evaluate on")
    lengths = examples.lengths_of(indices)
    by_length = np.argsort(lengths, kind="stable")
    batches: list[Indices] = []
    start = 0
    while start < len(by_length):
        size = batch_size
        if most_tokens:
            next_lengths = lengths[by_length[start : start + batch_size]]
            padded = next_lengths * np.arange(1, len(next_lengths) + 1)
            size = max(1, int(np.searchsorted(padded, most_tokens, side="right")))
        batches.append(by_length[start : start + size])
        start += size
    return batches


def run_batch(
    module: nn.Module, task: Task, examples: Examples, indices: Indices, pad_token_id: int
) -> ExampleMetrics:
    """Metrics of the model on one batch."""
    module.eval()
    with torch.inference_mode():
        return task.evaluate_batch(
            module, load_batch(examples, indices, pad_token_id, next(module.parameters()).device)
        )


def assemble(
    examples: Examples, indices: Indices, places: Sequence[Indices], outcomes: Iterable[ExampleMetrics]
) -> Evaluation:
    """The outcomes of all batches of `cut`, put where they belong."""
    losses = np.empty(len(indices), dtype=np.float32)
    units, right = np.empty((2, len(indices)), dtype=np.int64)
    for chosen, judged in zip(places, outcomes, strict=True):
        losses[chosen], units[chosen], right[chosen] = judged.losses, judged.units, judged.right
    return Evaluation(
        indices=indices,
        losses=losses,
        units=units,
        right=right,
        domains=examples.domains[indices].astype(np.int64),
    )
