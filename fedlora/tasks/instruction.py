"""Instruction tuning: conversations, of which the assistant's turns alone are learned."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from fedlora.config import DataConfig
from fedlora.data.columns import Columns
from fedlora.data.conversations import Turn
from fedlora.data.tokenizers import Tokenizer
from fedlora.errors import ConfigError
from fedlora.tasks.language import LanguageTask
from fedlora.tasks.task import Encoded, Rows

if TYPE_CHECKING:
    from datasets import Dataset

ROLES = ("system", "user", "assistant", "tool")


class Instruction(LanguageTask):
    """A column ``messages`` with lists of ``{role, content}``, or columns ``prompt`` and ``response``.

    ``data.text-column`` names others: one for messages, two for prompt and response. A conversation is an
    example; it is cut to ``data.max-length`` tokens.
    """

    name = "instruction"

    def columns(self, config: DataConfig) -> Columns:
        """One column with messages, or two."""
        return replace(super().columns(config), conversations=True)

    def rows(
        self, source: Dataset, columns: Columns, config: DataConfig, reader: Tokenizer | None, where: str
    ) -> pa.Table:
        """The conversations as texts, each of them checked.

        Raises:
            ConfigError: also a row that is no conversation.
        """
        table = super().rows(source, columns, config, reader, where)
        for _ in _conversations(table.to_pydict(), 0):
            pass
        return table

    def encode(self, batches: Iterable[Rows], tokenizer: Tokenizer, max_length: int) -> Encoded:
        """The conversations that still have a counted token when they are cut.

        Raises:
            ConfigError: a row that is no conversation, or none that has a counted token.
        """
        values: list[np.ndarray] = []
        counted: list[np.ndarray] = []
        rows: list[int] = []
        number = 0
        for batch in batches:
            for turns in _conversations(batch, number):
                ids, counts = tokenizer.chat(turns)
                mask = np.array(counts[:max_length], dtype=np.uint8)
                if mask[1:].any():
                    values.append(np.array(ids[:max_length], dtype=np.int32))
                    counted.append(mask)
                    rows.append(number)
                number += 1
        if not rows:
            raise ConfigError(
                f"data.max-length = {max_length}: no conversation has a word of the assistant within so many "
                "tokens"
            )
        if len(rows) < number:
            warnings.warn(
                f"data.max-length = {max_length}: {number - len(rows)} of {number} conversations have no "
                "word of the assistant within so many tokens and are left out",
                stacklevel=2,
            )
        return Encoded(values, np.array(rows), counted)


def _conversations(batch: Rows, first: int) -> Iterable[Sequence[Turn]]:
    if "text_pair" in batch:
        for prompt, response in zip(batch["text"], batch["text_pair"], strict=True):
            yield [Turn("user", prompt), Turn("assistant", response)]
        return
    for row, text in enumerate(batch["text"], start=first):
        yield _turns(json.loads(text), row)


def _turns(messages: Any, row: int) -> list[Turn]:
    turns = []
    for message in messages:
        role, content = message.get("role"), message.get("content")
        if role not in ROLES or not isinstance(content, str):
            raise ConfigError(
                f"data: conversation {row} has a message with role {role!r} and content of type "
                f"{type(content).__name__}, accepted are the roles {', '.join(ROLES)} with text"
            )
        turns.append(Turn(role, content))
    if all(turn.role != "assistant" for turn in turns):
        raise ConfigError(f"data: conversation {row} has no turn of the assistant, nothing can be learned")
    return turns
