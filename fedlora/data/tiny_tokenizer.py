"""The tokenizer of the model ``tiny``: words hashed into a small vocabulary, no files, no download."""

from __future__ import annotations

import re
from collections.abc import Sequence
from zlib import crc32

from fedlora.data.built_in_tokenizer import BuiltInTokenizer

VOCAB_SIZE = 1000
PAD, CLS, SEP = 0, 1, 2
_NUM_SPECIAL = 3
_TOKEN = re.compile(r"\w+|[^\w\s]")


class TinyTokenizer(BuiltInTokenizer):
    """``[CLS] text [SEP]`` or ``[CLS] text [SEP] pair [SEP]``; the same word has the same id everywhere."""

    identity = f"tiny-{VOCAB_SIZE}"
    pad_token_id = PAD
    end_token_id = SEP

    def encode(
        self, texts: Sequence[str], pairs: Sequence[str] | None, max_length: int
    ) -> tuple[Sequence[Sequence[int]], None]:
        """Token ids of each text (with its pair), cut to ``max_length``, which counts CLS and SEP."""
        if pairs is None:
            return [_framed([_ids(text)], max_length) for text in texts], None
        both = zip(texts, pairs, strict=True)
        return [_framed([_ids(text), _ids(pair)], max_length) for text, pair in both], None

    def ids(self, text: str) -> list[int]:
        """Token ids of a text, whole and without specials."""
        return _ids(text)

    def decode(self, ids: Sequence[int]) -> str:
        """The ids: hashes cannot be undone."""
        return " ".join(map(str, ids))


def _ids(text: str) -> list[int]:
    words = _TOKEN.findall(text.casefold())
    return [_NUM_SPECIAL + crc32(word.encode()) % (VOCAB_SIZE - _NUM_SPECIAL) for word in words]


def _framed(parts: list[list[int]], max_length: int) -> list[int]:
    """CLS, then each part and a SEP; the longest part loses words until all fit."""
    excess = 1 + sum(len(part) + 1 for part in parts) - max_length
    for _ in range(excess):
        max(parts, key=len).pop()
    return [CLS, *(token for part in parts for token in (*part, SEP))]
