"""What tasks on text share."""

from __future__ import annotations

from typing import Any

import numpy as np

from fedlora.data.examples import Examples
from fedlora.seeding import stream


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
