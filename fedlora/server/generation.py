"""Generated texts: the likeliest continuation of a few texts that nobody trained on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from clients.runtime import ClientRuntime
from fedlora.config import RunConfig
from fedlora.data.examples import Examples, evaluation_subset
from fedlora.data.tokenizers import load_tokenizer

NUMBER = 3
"""Texts that are continued."""
GIVEN, WRITTEN = 24, 24
"""Tokens of a text that are given at most, and tokens that are written at most."""


def samples(runtime: ClientRuntime, config: RunConfig) -> list[dict[str, Any]]:
    """Prompt, what the model writes, and how the text goes on, for a few test examples, always the same.

    Args:
        runtime: loaded with the model that is to write.
        config: the run.
    """
    tokenizer, test = load_tokenizer(config.model.name), runtime.data.test
    found = []
    for index in evaluation_subset(test, NUMBER).tolist():
        ids = test.input_ids(index).tolist()
        given = _given(test, index)
        end = tokenizer.end_token_id if test.counted is None else _end(test, test.counted, index)
        written = continued(runtime.model.module, ids[:given], end)
        parts = {"prompt": ids[:given], "written": written, "text": ids[given : given + WRITTEN]}
        found.append({name: tokenizer.decode(part) for name, part in parts.items()})
    return found


def continued(module: nn.Module, prompt: Sequence[int], end: int) -> list[int]:
    """The likeliest token again and again, until the end token or enough of them."""
    device = next(module.parameters()).device
    ids = torch.tensor([list(prompt)], device=device)
    with torch.inference_mode():
        for _ in range(WRITTEN):
            logits = module(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
            following = logits[:, -1:].argmax(dim=-1)
            if int(following) == end:
                break
            ids = torch.cat([ids, following], dim=1)
    written: list[int] = ids[0, len(prompt) :].tolist()
    return written


def _end(examples: Examples, marks: np.ndarray, index: int) -> int:
    """The last token of the first answer: its end mark, unless the answer was cut."""
    start, end = examples.offsets[index : index + 2]
    counted = np.flatnonzero(marks[start:end])
    run = np.flatnonzero(np.diff(counted, append=end) > 1)
    return int(examples.tokens[start + counted[run[0] if len(run) else -1]])


def _given(examples: Examples, index: int) -> int:
    """Tokens of the prompt: up to the first answer, or the first half of a text."""
    length = int(examples.lengths[index])
    if examples.counted is None:
        return max(1, min(GIVEN, length // 2))
    start = examples.offsets[index]
    return max(1, int(np.flatnonzero(examples.counted[start : start + length])[0]))
