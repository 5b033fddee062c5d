"""Instruction tuning: conversations, of which the assistant's answers alone are learned."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator

import numpy as np

from fedlora.config import DataConfig
from fedlora.data.chat.conversations import Conversation, prompted
from fedlora.data.chat.template import TODAY, writes_date
from fedlora.data.chat.tokenise import sequences
from fedlora.data.columns import ROW
from fedlora.data.tokenizers import Tokenizer
from fedlora.errors import ConfigError
from fedlora.tasks.language import LanguageTask
from fedlora.tasks.task import Encoded, Rows


class Instruction(LanguageTask):
    """Conversations in one of the forms of `fedlora.data.chat.conversations`.

    ``data.text-column`` names the columns where they are called otherwise: one for messages, two for prompt
    and response, three with an input between them. A conversation is an example, or several where the chat
    template rewrites earlier turns, see `fedlora.data.chat.tokenise`; each is cut to ``data.max-length``
    tokens.
    """

    name = "instruction"
    conversations = True

    def cut_by(self, config: DataConfig) -> tuple[str, ...]:
        """The chat template says of how many examples a conversation is, unless its last answer is the one.

        ``data.max-length`` cuts them or leaves them out, and makes no others of them.
        """
        return () if config.assistant_loss == "last" else ("task", "tokenizer")

    def encode(self, batches: Iterable[Rows], tokenizer: Tokenizer, max_length: int) -> Encoded:
        """The sequences that still have a counted token when they are cut.

        Raises:
            ConfigError: a row that is no conversation or that the chat template cannot write, or none that
                has a counted token.
        """
        values: list[np.ndarray] = []
        counted: list[np.ndarray] = []
        rows: list[int] = []
        merged = number = 0
        for where, conversation in _conversations(batches):
            for tokens in sequences(conversation, tokenizer, where, max_length):
                mask = np.array(tokens.counted[:max_length], dtype=np.uint8)
                if mask[1:].any():
                    values.append(np.array(tokens.ids[:max_length], dtype=np.int32))
                    counted.append(mask)
                    rows.append(number)
                    merged += tokens.merged
            number += 1
        if not rows:
            raise ConfigError(
                f"data.max-length = {max_length}: no conversation has a word of the assistant within so many "
                "tokens"
            )
        _warn(tokenizer, max_length, number, rows, merged)
        return Encoded(values, np.array(rows), counted)


def _conversations(batches: Iterable[Rows]) -> Iterator[tuple[str, Conversation]]:
    """Each with the row in which it stands, for an error."""
    number = 0
    for batch in batches:
        for i, text in enumerate(batch["text"]):
            number += 1
            where = f"data: row {batch[ROW][i] if ROW in batch else number}"
            pair = batch["text_pair"][i] if "text_pair" in batch else None
            yield where, Conversation.load(text, where) if pair is None else prompted(text, pair, None, where)


def _warn(tokenizer: Tokenizer, max_length: int, number: int, rows: list[int], merged: int) -> None:
    """Say once what was not taken as it stands."""
    kept = len(set(rows))
    if kept < number:
        warnings.warn(
            f"data.max-length = {max_length}: {number - kept} of {number} conversations have no "
            "word of the assistant within so many tokens and are left out",
            stacklevel=3,
        )
    if len(rows) > kept:
        warnings.warn(
            f"data.assistant-loss = 'all': {kept} conversations are {len(rows)} examples, since the chat "
            "template writes earlier turns differently once later ones are there ('last' learns the last "
            "answer of each)",
            stacklevel=3,
        )
    if merged:
        warnings.warn(
            f"model.chat-template: {merged} of {len(rows)} examples have an answer whose first token holds "
            "the end of its prompt too; the model cannot generate it so",
            stacklevel=3,
        )
    template = tokenizer.settings.template or tokenizer.template(False) or ""
    if writes_date(template, tokenizer.settings.kwargs):
        warnings.warn(
            f"model.chat-template: asks for today's date and is always told {TODAY}, so that runs repeat",
            stacklevel=3,
        )
