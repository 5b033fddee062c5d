"""Common code of tasks on language models: each counted token is predicted from all tokens before it.

The loss of an example is the *mean* negative log-likelihood of its own counted tokens, and the loss of a
batch the mean over its examples. transformers' Trainer averages over all tokens of a batch instead, so that
there an example weighs more in short company. Here no example may depend on another: DP-SGD bounds what each
adds, and examples of several clients share a pass.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from fedlora.config import DataConfig
from fedlora.data.columns import Columns
from fedlora.data.examples import Examples
from fedlora.errors import ConfigError
from fedlora.tasks.task import ExampleMetrics, inputs
from fedlora.tasks.text import TextTask, made_up_text

IGNORED = -100
BY_LABEL = ("dirichlet", "pathological", "shard", "natural-dirichlet")
"""Partitioners that deal examples out by their label."""


class LanguageTask(TextTask):
    """Loss, hits and made-up examples of a causal language model; its subclasses read the data."""

    name: str
    network = "language-model"
    labelled = False
    conversations = False
    unit = "token"
    most_tokens = 1024
    packs = True
    keeps_rows = False

    def columns(self, config: DataConfig) -> Columns:
        """The text columns and no label.

        Raises:
            ConfigError: a partitioner that goes by the label.
        """
        if config.partitioner in BY_LABEL:
            raise ConfigError(
                f"data.partitioner = {config.partitioner!r}: goes by labels, {self.name} has none; accepted "
                "are natural, iid, linear, square, exponential, bootstrap"
            )
        return Columns.of(config, labelled=False, conversations=self.conversations)

    def loss(self, module: nn.Module, batch: Mapping[str, Tensor], reduction: str) -> Tensor:
        """Mean negative log-likelihood of each example's counted tokens, (rows,)."""
        losses, counted, _ = token_losses(module, batch)
        if "segments" in batch:
            losses, counted = by_example(losses, counted, batch["segments"][:, 1:], len(batch["labels"]))
        means = losses.sum(dim=1) / counted.sum(dim=1)
        if reduction == "none":
            return means
        return means.mean() if reduction == "mean" else means.sum()

    def evaluate_batch(self, module: nn.Module, batch: Mapping[str, Tensor]) -> ExampleMetrics:
        """One unit for each counted token; a hit is a token that was the most likely one."""
        losses, counted, likeliest = token_losses(module, batch)
        units = counted.sum(dim=1)
        right = ((likeliest == batch["input_ids"][:, 1:]) & counted).sum(dim=1)
        means = (losses.sum(dim=1) / units).float()
        return ExampleMetrics(means.cpu().numpy(), units.cpu().numpy(), right.cpu().numpy())

    def synthetic_examples(self, number: int, config: Any, pad_token_id: int) -> Examples:
        """Texts of unequal length, of which every token but the first counts."""
        return made_up_text(number, config, pad_token_id)


def by_example(losses: Tensor, counted: Tensor, segments: Tensor, number: int) -> tuple[Tensor, Tensor]:
    """Sums of losses and of counted tokens of each packed example, (number, 1), from those of tokens."""
    places = segments[counted]
    zeros = losses.new_zeros(number)
    sums = zeros.index_add(0, places, losses[counted])
    return sums[:, None], torch.bincount(places, minlength=number)[:, None]


def token_losses(module: nn.Module, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Predictions of a model for each token but the first.

    Returns:
        Of shape (rows, tokens - 1) each: the negative log-likelihood in float32 or better, 0 where the token
        does not count; whether it counts; the most likely token.
    """
    logits = module(**inputs(module, batch)).logits[:, :-1]
    counted = batch["counted" if "counted" in batch else "attention_mask"][:, 1:].bool()
    targets = torch.where(counted, batch["input_ids"][:, 1:], IGNORED)
    exact = logits.to(torch.promote_types(logits.dtype, torch.float32))
    losses = cross_entropy(
        exact.reshape(-1, exact.shape[-1]), targets.reshape(-1), ignore_index=IGNORED, reduction="none"
    )
    return losses.view_as(targets), counted, logits.argmax(dim=-1)
