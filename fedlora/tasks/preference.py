"""Preference tuning by DPO: of two answers to one prompt the chosen one is made likelier than the rejected.

Rafailov et al., "Direct Preference Optimization", NeurIPS 2023 (arXiv 2305.18290). With log-likelihoods of
answers by the model (pi) and by the base from which the run starts (ref), both summed over tokens,

    margin = beta ((pi_chosen - ref_chosen) - (pi_rejected - ref_rejected)),    loss = -log sigmoid(margin).

One pair is one example, so that DP-SGD protects pairs, and cohorts share passes; the two answers are two
passes, each with a row for each example. The reference needs no second model, see
`clients.training.reference`.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid

from fedlora.config import DataConfig
from fedlora.data.chat.conversations import Conversation
from fedlora.data.chat.tokenise import ChatTokens, sequences
from fedlora.data.columns import ROW, Columns
from fedlora.data.examples import REJECTED, Examples
from fedlora.data.tokenizers import Tokenizer
from fedlora.errors import ConfigError
from fedlora.tasks.language import LanguageTask, token_losses
from fedlora.tasks.task import Encoded, ExampleMetrics, Rows
from fedlora.tasks.text import made_up_pairs


@dataclass(frozen=True, slots=True)
class Preference(LanguageTask):
    """Pairs in one of the forms of `fedlora.data.chat.preferences`; each side is cut to ``data.max-length``.

    A pair of which one answer has no token within that length is left out.

    Attributes:
        beta: ``train.dpo-beta``, see the module.
    """

    beta: float = 0.1

    name = "dpo"
    unit = "pair"
    conversations = True
    packs = False

    def columns(self, config: DataConfig) -> Columns:
        """Two or three columns.

        Raises:
            ConfigError: a partitioner that goes by the label, or one column.
        """
        return LanguageTask.columns(self, config).of_preferences()

    def encode(self, batches: Iterable[Rows], tokenizer: Tokenizer, max_length: int) -> Encoded:
        """The pairs of which both answers have a token when they are cut.

        Raises:
            ConfigError: a row that the chat template cannot write, or no pair that is left.
        """
        values: list[np.ndarray] = []
        counted: list[np.ndarray] = []
        rows: list[int] = []
        splits: list[int] = []
        number = -1
        for number, (where, both) in enumerate(_conversations(batches)):
            sides = [_answer(one, tokenizer, where, max_length) for one in both]
            marks = [np.array(side.counted[:max_length], dtype=np.uint8) for side in sides]
            if all(mark[1:].any() for mark in marks):
                values.append(np.concatenate([np.array(s.ids[:max_length], dtype=np.int32) for s in sides]))
                counted.append(np.concatenate(marks))
                splits.append(len(marks[0]))
                rows.append(number)
        if not rows:
            raise ConfigError(
                f"data.max-length = {max_length}: no pair has a word of both answers within so many tokens"
            )
        if len(rows) <= number:
            warnings.warn(
                f"data.max-length = {max_length}: {number + 1 - len(rows)} of {number + 1} pairs lack a "
                "word of an answer within so many tokens and are left out",
                stacklevel=2,
            )
        return Encoded(values, np.array(rows), counted, splits=splits)

    def loss(self, module: nn.Module, batch: Mapping[str, Tensor], reduction: str) -> Tensor:
        """The loss of each pair, (rows,)."""
        losses = -logsigmoid(self.margins(module, batch))
        if reduction == "none":
            return losses
        return losses.mean() if reduction == "mean" else losses.sum()

    def evaluate_batch(self, module: nn.Module, batch: Mapping[str, Tensor]) -> ExampleMetrics:
        """One unit for each pair; a hit is a pair whose chosen answer has the larger reward."""
        margins = self.margins(module, batch)
        right = (margins > 0).long().cpu().numpy()
        losses = (-logsigmoid(margins)).float().cpu().numpy()
        return ExampleMetrics(losses, np.ones_like(right), right)

    def margins(self, module: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        """The chosen answer's reward without the rejected one's, (rows,)."""
        ratios = self.log_likelihoods(module, batch) - batch["reference"]
        return self.beta * (ratios[:, 0] - ratios[:, 1])

    def log_likelihoods(self, module: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        """Of the chosen and the rejected answer, each summed over its tokens, (rows, 2)."""
        rejected = {n.removeprefix(REJECTED): t for n, t in batch.items() if n.startswith(REJECTED)}
        return torch.stack([-token_losses(module, side)[0].sum(dim=1) for side in (batch, rejected)], dim=1)

    def synthetic_examples(self, number: int, config: Any, pad_token_id: int) -> Examples:
        """Pairs of unequal lengths, each with a made-up reference."""
        return made_up_pairs(number, config, pad_token_id)


def margin(losses: np.ndarray) -> float:
    """The mean margin of pairs with these losses, from which it follows: ``-log(exp(loss) - 1)``.

    >>> round(margin(np.array([np.log1p(np.exp(-2.0)), np.log1p(np.exp(3.0))])), 6)
    -0.5
    """
    exact = np.maximum(losses.astype(np.float64), np.finfo(np.float32).tiny)
    return float(np.where(exact > 30, -exact, -np.log(np.expm1(np.minimum(exact, 30)))).mean())


def _conversations(batches: Iterable[Rows]) -> Iterator[tuple[str, tuple[Conversation, Conversation]]]:
    """Each pair with the row in which it stands, for an error."""
    number = 0
    for batch in batches:
        for i, (chosen, rejected) in enumerate(zip(batch["text"], batch["text_pair"], strict=True)):
            number += 1
            where = f"data: row {batch[ROW][i] if ROW in batch else number}"
            yield where, (Conversation.load(chosen, where), Conversation.load(rejected, where))


def _answer(conversation: Conversation, tokenizer: Tokenizer, where: str, max_length: int) -> ChatTokens:
    """The tokens of a side, empty where the prompt alone is too long."""
    found = sequences(conversation, tokenizer, where, max_length)
    if len(found) > 1:
        raise ConfigError(
            f"{where}: the chat template writes its answers as {len(found)} texts, must be one; set "
            "model.chat-template"
        )
    return found[0] if found else ChatTokens([], [])
