"""Causal language modelling: text without labels, cut into blocks."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from fedlora.config import DataConfig
from fedlora.data.columns import NATURAL, UNIT, Columns
from fedlora.data.tokenizers import Tokenizer
from fedlora.errors import ConfigError
from fedlora.tasks.language import LanguageTask
from fedlora.tasks.task import Encoded, Rows


class CausalLM(LanguageTask):
    """``data.text-column`` names one column of texts.

    The texts of one natural client, domain and unit of privacy follow each other, each with the token that
    the tokenizer itself puts first, if any, and with the end token, and are cut into blocks of
    ``data.max-length`` tokens; a block is an example. Its first token is given, not predicted.
    """

    name = "causal-lm"

    def columns(self, config: DataConfig) -> Columns:
        """One text column.

        Raises:
            ConfigError: two, or a partitioner that goes by the label.
        """
        columns = super().columns(config)
        if len(columns.texts) != 1:
            raise ConfigError(f"data.text-column = {config.text_column!r}: {self.name} takes one column")
        return columns

    def cut_by(self, config: DataConfig) -> tuple[str, ...]:
        """A block is of so many tokens."""
        return "task", "max_length", "tokenizer"

    def encode(self, batches: Iterable[Rows], tokenizer: Tokenizer, max_length: int) -> Encoded:
        """The blocks, in the order in which their clients, domains and units first occur.

        Raises:
            ConfigError: there is no block of two tokens.
        """
        runs: dict[tuple[str, ...], _Run] = {}
        first = 0
        for batch in batches:
            texts = batch["text"]
            owners = [batch[name] for name in ("domain", NATURAL, UNIT) if name in batch]
            for row, ids in enumerate(tokenizer.documents(texts)):
                owner = tuple(str(column[row]) for column in owners)
                runs.setdefault(owner, _Run()).append(first + row, ids)
            first += len(texts)
        cut = [block for run in runs.values() for block in run.blocks(max_length)]
        if not cut:
            raise ConfigError("data: there is no text of two tokens or more")
        return Encoded([values for values, _ in cut], np.array([row for _, row in cut]))


class _Run:
    """Texts that follow each other."""

    def __init__(self) -> None:
        self._tokens: list[int] = []
        self._starts: list[int] = []
        self._rows: list[int] = []

    def append(self, row: int, tokens: list[int]) -> None:
        self._starts.append(len(self._tokens))
        self._rows.append(row)
        self._tokens.extend(tokens)

    def blocks(self, length: int) -> list[tuple[np.ndarray, int]]:
        """Blocks of two tokens or more, each with the row in which it begins."""
        starts = range(0, len(self._tokens) - 1, length)
        rows = np.array(self._rows)[np.searchsorted(self._starts, starts, side="right") - 1]
        return [
            (np.array(self._tokens[start : start + length], dtype=np.int32), int(row))
            for start, row in zip(starts, rows, strict=True)
        ]
