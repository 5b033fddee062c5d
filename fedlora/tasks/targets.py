"""Regression and multi-label classification: K numbers, or which of K labels, for a text or a pair of texts.

Losses are those of transformers' ``problem_type`` (``ForSequenceClassificationLoss``), example by example:
the mean over K of squared errors, or of binary cross entropies of logits.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, mse_loss

from fedlora.config import DataConfig
from fedlora.core.seeding import stream
from fedlora.data.columns import Columns
from fedlora.data.examples import Examples
from fedlora.data.targets import MULTI_LABEL, REGRESSION
from fedlora.errors import ConfigError
from fedlora.tasks.classification import Classification
from fedlora.tasks.language import BY_LABEL
from fedlora.tasks.task import ExampleMetrics, inputs
from fedlora.tasks.text import made_up_text

RESAMPLED = 200
"""Sets of test examples that are drawn for a standard error."""


class Regression(Classification):
    """``data.label-column`` names K columns of numbers; the loss is the mean squared error."""

    name = "regression"
    problem_type = REGRESSION
    metrics: tuple[str, ...] = ("rmse", "mae", "r2")

    def columns(self, config: DataConfig) -> Columns:
        """Texts and the columns of targets.

        Raises:
            ConfigError: clients that go by a label.
        """
        if config.partitioner in BY_LABEL or config.partition_by == "label":
            raise ConfigError(
                f"data.partitioner = {config.partitioner!r}: goes by one label of each example, {self.name} "
                "has none; accepted are natural (by another column), iid, linear, square, exponential, "
                "bootstrap"
            )
        return replace(Columns.of(config), targets=self.problem_type)

    def loss(self, module: nn.Module, batch: Mapping[str, Tensor], reduction: str) -> Tensor:
        """The mean over an example's K targets."""
        losses = self.losses(_logits(module, batch), batch["labels"])
        if reduction == "none":
            return losses
        return losses.mean() if reduction == "mean" else losses.sum()

    def losses(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """(rows, K) each -> (rows,)."""
        return mse_loss(outputs, targets.to(outputs.dtype), reduction="none").mean(dim=1)

    def evaluate_batch(self, module: nn.Module, batch: Mapping[str, Tensor]) -> ExampleMetrics:
        """The loss and the K outputs of each example; there are no hits."""
        outputs = _logits(module, batch)
        losses = self.losses(outputs, batch["labels"]).float().cpu().numpy()
        units, right = self.hits(outputs, batch["labels"])
        return ExampleMetrics(losses, units, right, outputs.float().cpu().numpy())

    def hits(self, outputs: Tensor, targets: Tensor) -> tuple[np.ndarray, np.ndarray]:
        """What is judged in each example, and how much of it is right."""
        return np.ones(len(outputs), dtype=np.int64), np.zeros(len(outputs), dtype=np.int64)

    def measures(self, outputs: np.ndarray, targets: np.ndarray) -> dict[str, float | None]:
        """RMSE and MAE over all numbers; R2 and Pearson's r, each the mean over the K targets.

        R2 of a target that is the same in all examples is 1 if it is hit exactly, else 0, as in scikit-learn;
        Pearson's r is None where one of the two does not vary.
        """
        y, f = targets.astype(np.float64), outputs.astype(np.float64)
        error, spread = ((f - y) ** 2).sum(axis=0), ((y - y.mean(axis=0)) ** 2).sum(axis=0)
        varies = spread > 0
        r2 = np.where(varies, 1 - error / np.where(varies, spread, 1), np.where(error == 0, 1.0, 0.0))
        around = f - f.mean(axis=0)
        norms = np.sqrt((around**2).sum(axis=0) * spread)
        known = bool((norms > 0).all())
        r = ((around * (y - y.mean(axis=0))).sum(axis=0) / norms).mean() if known else None
        return {
            "rmse": float(np.sqrt(error.sum() / y.size)),
            "mae": float(np.abs(f - y).mean()),
            "r2": float(r2.mean()),
            "pearson": None if r is None else float(r),
        }

    def baseline(self, targets: np.ndarray) -> dict[str, float]:
        """What each target's mean has, which has seen the test examples."""
        mean = np.broadcast_to(targets.mean(axis=0, dtype=np.float64), targets.shape)
        return self._judged("mean", mean, targets)

    def _judged(self, name: str, outputs: np.ndarray, targets: np.ndarray) -> dict[str, float]:
        """The task's own figures of constant outputs, named after them."""
        found = self.measures(outputs, targets).items()
        return {f"{name}_{key}": value for key, value in found if key in self.metrics and value is not None}

    def standard_errors(self, outputs: np.ndarray, targets: np.ndarray) -> dict[str, float]:
        """How far other test examples would move each figure: over `RESAMPLED` draws with replacement."""
        draws = stream(0, "standard-errors", self.name)
        drawn = [draws.integers(len(targets), size=len(targets)) for _ in range(RESAMPLED)]
        found = [self.measures(outputs[rows], targets[rows]) for rows in drawn]
        each = {key: np.array([one[key] for one in found], dtype=np.float64) for key in found[0]}
        return {key: float(values.std(ddof=1)) for key, values in each.items() if np.isfinite(values).all()}

    def synthetic_examples(self, number: int, config: Any, pad_token_id: int) -> Examples:
        """Texts of unequal length, and targets around 0."""
        drawn = stream(0, "self-test", "targets").normal(size=(number, config.num_labels))
        return replace(made_up_text(number, config, pad_token_id), targets=self.made_up(drawn))

    def made_up(self, drawn: np.ndarray) -> np.ndarray:
        """Targets of numbers around 0."""
        return drawn.astype(np.float32)


class MultiLabelClassification(Regression):
    """``data.label-column`` names K columns of 0 and 1, or one of lists of names.

    The loss is the mean binary cross entropy. A label is predicted where its probability is above 1/2; what
    accuracy counts are the K decisions of each example.
    """

    name = "multi-label-classification"
    problem_type = MULTI_LABEL
    metrics: tuple[str, ...] = ("f1_micro", "f1_macro", "accuracy")

    def losses(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """(rows, K) each -> (rows,)."""
        losses = binary_cross_entropy_with_logits(outputs, targets.to(outputs.dtype), reduction="none")
        return losses.mean(dim=1)

    def hits(self, outputs: Tensor, targets: Tensor) -> tuple[np.ndarray, np.ndarray]:
        """The K decisions of each example."""
        right = ((outputs > 0) == (targets > 0)).sum(dim=1).cpu().numpy()
        return np.full_like(right, outputs.shape[1]), right

    def measures(self, outputs: np.ndarray, targets: np.ndarray) -> dict[str, float | None]:
        """F1 over all decisions, and the mean over labels; 0 of a label that nobody has or is given."""
        has, given = targets > 0, outputs > 0
        both, sizes = (has & given).sum(axis=0), has.sum(axis=0) + given.sum(axis=0)
        own = 2 * both / np.maximum(sizes, 1)
        return {"f1_micro": float(2 * both.sum() / max(sizes.sum(), 1)), "f1_macro": float(own.mean())}

    def baseline(self, targets: np.ndarray) -> dict[str, float]:
        """The share of right decisions where each label is given to all or to nobody; F1 where to all."""
        share = (targets > 0).mean(axis=0)
        given = self._judged("all", np.ones_like(targets), targets)
        return {"majority_accuracy": float(np.maximum(share, 1 - share).mean()), **given}

    def made_up(self, drawn: np.ndarray) -> np.ndarray:
        """About every second label."""
        return (drawn > 0).astype(np.float32)


def _logits(module: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """(rows, K), in float32 or better."""
    logits: Tensor = module(**inputs(module, batch)).logits
    return logits.to(torch.promote_types(logits.dtype, torch.float32))
