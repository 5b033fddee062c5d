"""What tasks on text share."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from fedlora.config import DataConfig
from fedlora.data.columns import Columns, standard
from fedlora.data.examples import Examples
from fedlora.data.tokenizers import Tokenizer, load_tokenizer
from fedlora.seeding import stream

if TYPE_CHECKING:
    from datasets import Dataset

    from fedlora.data.sources import RawData


class TextTask:
    """Rows of text, and a tokenizer that makes examples of them."""

    def columns(self, config: DataConfig) -> Columns:
        """Texts and label."""
        return Columns.of(config)

    def reader(self, model: str) -> Tokenizer:
        """The model's tokenizer."""
        return load_tokenizer(model)

    def load(self, config: DataConfig, reader: Tokenizer) -> RawData:
        """The rows of the columns that the task reads."""
        from fedlora.data.sources import load_examples

        return load_examples(config, self.columns(config))

    def rows(
        self, source: Dataset, columns: Columns, config: DataConfig, reader: Tokenizer | None, where: str
    ) -> pa.Table:
        """The columns as texts."""
        return standard(source, columns, where)


def made_up_text(number: int, config: Any, pad_token_id: int) -> Examples:
    """A few examples of unequal length, the labels in turn."""
    rng = stream(0, "self-test", "examples")
    lengths = rng.integers(4, 16, number)
    tokens = rng.integers(0, config.get_text_config().vocab_size, lengths.sum()).astype(np.int32)
    return Examples(
        tokens=np.where(tokens == pad_token_id, (pad_token_id + 1) % 2, tokens),
        offsets=np.cumsum([0, *lengths]),
        labels=np.arange(number) % config.num_labels,
        domains=np.zeros(number, dtype=np.int32),
    )
