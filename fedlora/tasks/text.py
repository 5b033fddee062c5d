"""Common code of tasks on text."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from fedlora.config import DataConfig
from fedlora.core.seeding import stream
from fedlora.data.chat.template import ChatSettings
from fedlora.data.columns import Columns, standard
from fedlora.data.examples import Examples
from fedlora.data.tokenizers import Tokenizer, load_tokenizer
from fedlora.tasks.metrics import ACCURACY

if TYPE_CHECKING:
    from datasets import Dataset

    from fedlora.data.sources import RawData


class TextTask:
    """Rows of text, and a tokenizer that makes examples of them."""

    packs = False
    keeps_rows = True
    problem_type = ""
    metrics: tuple[str, ...] = (ACCURACY.name,)

    def columns(self, config: DataConfig) -> Columns:
        """Texts and label."""
        return Columns.of(config)

    def cut_by(self, config: DataConfig) -> tuple[str, ...]:
        """None: a row is an example, if it is one at all."""
        return ()

    def reader(self, model: str, chat: ChatSettings | None = None) -> Tokenizer:
        """The model's tokenizer."""
        return load_tokenizer(model, chat)

    def load(self, config: DataConfig, reader: Tokenizer, unit: str = "") -> RawData:
        """The rows of the columns that the task reads."""
        from fedlora.data.sources import load_examples

        return load_examples(config, replace(self.columns(config), unit=unit))

    def rows(
        self, source: Dataset, columns: Columns, config: DataConfig, reader: Tokenizer | None, where: str
    ) -> pa.Table:
        """The columns as texts."""
        return standard(source, columns, where)


def made_up_text(number: int, config: Any, pad_token_id: int) -> Examples:
    """A few examples of unequal length, the labels in turn.

    Those of an encoder with a decoder end with its end token and have it nowhere else: T5 and BART classify
    by it. Where tokens have types, the second half of each example is of type 1.
    """
    rng = stream(0, "self-test", "examples")
    lengths = rng.integers(4, 16, number)
    offsets = np.cumsum([0, *lengths])
    tokens = rng.integers(0, config.get_text_config().vocab_size, lengths.sum()).astype(np.int32)
    end = config.eos_token_id if config.is_encoder_decoder else None
    kept = {pad_token_id, end}
    tokens = np.where(np.isin(tokens, [t for t in kept if t is not None]), min({0, 1, 2} - kept), tokens)
    if end is not None:
        tokens[offsets[1:] - 1] = end
    places = np.arange(len(tokens)) - np.repeat(offsets[:-1], lengths)
    typed = getattr(config, "type_vocab_size", 0) > 1
    return Examples(
        tokens=tokens,
        offsets=offsets,
        labels=np.arange(number) % config.num_labels,
        domains=np.zeros(number, dtype=np.int32),
        types=(2 * places >= np.repeat(lengths, lengths)).astype(np.uint8) if typed else None,
    )


def made_up_pairs(number: int, config: Any, pad_token_id: int) -> Examples:
    """Pairs of `made_up_text`: the first third of a side is its prompt, and the reference is near 0."""
    sides = made_up_text(2 * number, config, pad_token_id)
    places = np.arange(len(sides.tokens)) - np.repeat(sides.offsets[:-1], sides.lengths)
    return replace(
        sides,
        offsets=sides.offsets[::2],
        splits=sides.offsets[1::2],
        labels=sides.labels[:number],
        domains=sides.domains[:number],
        counted=(3 * places >= np.repeat(sides.lengths, sides.lengths)).astype(np.uint8),
        types=None,
        reference=stream(0, "self-test", "reference").normal(size=(number, 2)).astype(np.float32),
    )
