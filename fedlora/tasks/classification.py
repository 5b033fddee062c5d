"""Sequence classification: one label for a text or a pair of texts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from fedlora.data.examples import Examples
from fedlora.data.tokenizers import Tokenizer
from fedlora.errors import ConfigError
from fedlora.tasks.task import Encoded, ExampleMetrics, Rows, inputs
from fedlora.tasks.text import TextTask, made_up_text

SINGLE_LABEL = "single_label_classification"
"""Of transformers' kinds of ``problem_type`` the one with one label for each example."""


class Classification(TextTask):
    """``data.text-column`` (one, or two for pairs) and ``data.label-column``; the loss is cross entropy."""

    name = "classification"
    network = "classifier"
    labelled = True
    problem_type = SINGLE_LABEL
    unit = "example"
    most_tokens = 0

    def encode(self, batches: Iterable[Rows], tokenizer: Tokenizer, max_length: int) -> Encoded:
        """One example for each row, cut to ``max_length``.

        Raises:
            ConfigError: a text without any token.
        """
        values: list[np.ndarray] = []
        types: list[np.ndarray] = []
        for batch in batches:
            ids, kinds = tokenizer.encode(batch["text"], batch.get("text_pair"), max_length)
            for text, row in zip(batch["text"], ids, strict=True):
                if not len(row):
                    raise ConfigError(f"data: the text {text!r} has no token for this model's tokenizer")
                values.append(np.asarray(row, dtype=np.int32))
            types += [np.asarray(row, dtype=np.uint8) for row in kinds or ()]
        typed = any(row.any() for row in types)
        return Encoded(values, np.arange(len(values)), types=types if typed else None)

    def loss(self, module: nn.Module, batch: Mapping[str, Tensor], reduction: str) -> Tensor:
        """The cross entropy of each label."""
        logits = module(**inputs(module, batch)).logits
        exact = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return cross_entropy(exact, batch["labels"], reduction=reduction)

    def evaluate_batch(self, module: nn.Module, batch: Mapping[str, Tensor]) -> ExampleMetrics:
        """One unit for each example."""
        logits = module(**inputs(module, batch)).logits
        losses = cross_entropy(logits.float(), batch["labels"], reduction="none").cpu().numpy()
        right = (logits.argmax(dim=-1) == batch["labels"]).long().cpu().numpy()
        return ExampleMetrics(losses, np.ones_like(right), right)

    def synthetic_examples(self, number: int, config: Any, pad_token_id: int) -> Examples:
        """Texts of unequal length, the labels in turn."""
        return made_up_text(number, config, pad_token_id)


CLASSIFICATION = Classification()
