"""The model's loss and hits on each example, from which every other figure is a mean."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from clients.training.batches import Indices, load_batch
from clients.training.reference import reference_batch
from fedlora.data.examples import EVALUATION_BATCH, Examples, cut
from fedlora.models import AdaptedModel
from fedlora.models.packed_linear import evaluating
from fedlora.tasks import CLASSIFICATION, ExampleMetrics, Task


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """Results for each example, in the order in which they were asked for.

    Attributes:
        indices: the examples.
        losses: the mean over an example's units, float32.
        units: what was judged in each example: its label, or its counted tokens.
        right: how many of them the model's first choice hits.
        domains: the domain's number, -1 where there is none.
        outputs, targets: of examples with K targets, what the model gives and what they are, (examples, K).
    """

    indices: Indices
    losses: np.ndarray[Any, np.dtype[np.float32]]
    units: np.ndarray[Any, np.dtype[np.int64]]
    right: np.ndarray[Any, np.dtype[np.int64]]
    domains: np.ndarray[Any, np.dtype[np.int64]]
    outputs: np.ndarray[Any, np.dtype[np.float32]] | None = None
    targets: np.ndarray[Any, np.dtype[np.float32]] | None = None

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
            outputs=None if self.outputs is None else self.outputs[chosen],
            targets=None if self.targets is None else self.targets[chosen],
        )


def evaluate(
    model: AdaptedModel | nn.Module,
    examples: Examples,
    indices: Indices,
    pad_token_id: int,
    batch_size: int = EVALUATION_BATCH,
    *,
    task: Task = CLASSIFICATION,
    precision: str = "float32",
    around: Callable[[Indices], AbstractContextManager[None]] = lambda places: nullcontext(),
) -> Evaluation:
    """Run the model over the examples, short ones together so that little is padded.

    Args:
        model: an `AdaptedModel`, which knows its task, or another one.
        examples: the data set.
        indices: which of them.
        pad_token_id: fills up shorter sequences.
        batch_size: examples of a pass at most.
        task: of a model that is no `AdaptedModel`.
        precision: of an `AdaptedModel`'s passes, as ``evaluation-precision``.
        around: of places in ``indices``, what a pass over those examples is made inside of.

    Raises:
        ConfigError: there is no example, or the device has no such arithmetic.
    """
    task = model.task if isinstance(model, AdaptedModel) else task
    places = cut(examples, indices, batch_size, task.most_tokens)
    with evaluating(model, precision) if isinstance(model, AdaptedModel) else nullcontext():
        outcomes = []
        for chosen in places:
            with around(chosen):
                outcomes.append(run_batch(model, task, examples, indices[chosen], pad_token_id))
    return assemble(examples, indices, places, outcomes)


def run_batch(
    model: AdaptedModel | nn.Module, task: Task, examples: Examples, indices: Indices, pad_token_id: int
) -> ExampleMetrics:
    """Metrics of the model on one batch."""
    module = model.module if isinstance(model, AdaptedModel) else model
    module.eval()
    examples = reference_batch(model, task, examples, indices, pad_token_id)
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
    targets = None if examples.targets is None else examples.targets[indices]
    outputs = None if targets is None else np.empty_like(targets)
    for chosen, judged in zip(places, outcomes, strict=True):
        losses[chosen], units[chosen], right[chosen] = judged.losses, judged.units, judged.right
        if outputs is not None:
            outputs[chosen] = judged.outputs
    return Evaluation(
        indices=indices,
        losses=losses,
        units=units,
        right=right,
        domains=examples.domains[indices].astype(np.int64),
        outputs=outputs,
        targets=targets,
    )
