"""Tokenizers without files and downloads: hashed words for the model ``tiny``, bytes for ``tiny-lm``."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any
from zlib import crc32

from fedlora.data.chat.template import ChatSettings
from fedlora.data.chat.tokenise import Chats

TINY_VOCAB_SIZE = 1000
PAD, CLS, SEP = 0, 1, 2
_TINY_SPECIAL = 3
_TOKEN = re.compile(r"\w+|[^\w\s]")
BYTE_PAD, BYTE_END = 0, 1
_BYTE_SPECIAL = 2
BYTE_VOCAB_SIZE = _BYTE_SPECIAL + 256


class BuiltInTokenizer(Chats):
    """No chat template, nothing before a text, one token that ends it; its subclasses know the others."""

    identity: str
    end_token_id: int
    opening: Sequence[int] = ()
    end_text = "\ufdd0"
    """No character, by Unicode's own word, so that it stands in no text."""

    def __init__(self, settings: ChatSettings | None = None) -> None:
        self.settings = settings or ChatSettings()
        self.identity = type(self).identity + self.settings.identity

    @property
    def marks(self) -> frozenset[int]:
        """The end token."""
        return frozenset([self.end_token_id])

    @property
    def variables(self) -> Mapping[str, Any]:
        """The end token by name."""
        return {"eos_token": self.end_text, "bos_token": ""}

    def template(self, tools: bool) -> str | None:
        """None."""
        return None

    def pieces(self, texts: Sequence[str]) -> Sequence[list[int]]:
        """Token ids of each text, in which ``end_text`` stands for the end token."""
        return [self._whole(text) for text in texts]

    def ids(self, text: str) -> Sequence[int]:
        """Token ids of a text."""
        raise NotImplementedError

    def documents(self, texts: Sequence[str]) -> Sequence[list[int]]:
        """Token ids of each text and the end token."""
        return [[*ids, self.end_token_id] for ids in self.pieces(texts)]

    def spans(self, text: str) -> None:
        """None: no token holds parts of two words."""

    def _whole(self, text: str) -> list[int]:
        first, *others = text.split(self.end_text)
        return [
            *self.ids(first),
            *(token for part in others for token in (self.end_token_id, *self.ids(part))),
        ]


class TinyTokenizer(BuiltInTokenizer):
    """Words hashed into a small vocabulary, the same id everywhere.

    ``[CLS] text [SEP]`` or ``[CLS] text [SEP] pair [SEP]``.
    """

    identity = f"tiny-{TINY_VOCAB_SIZE}"
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
    return [_TINY_SPECIAL + crc32(word.encode()) % (TINY_VOCAB_SIZE - _TINY_SPECIAL) for word in words]


def _framed(parts: list[list[int]], max_length: int) -> list[int]:
    """CLS, then each part and a SEP; the longest part loses words until all fit."""
    excess = 1 + sum(len(part) + 1 for part in parts) - max_length
    for _ in range(excess):
        max(parts, key=len).pop()
    return [CLS, *(token for part in parts for token in (*part, SEP))]


class ByteTokenizer(BuiltInTokenizer):
    """The UTF-8 bytes of a text; the end token after it where a sequence is framed. It can be undone."""

    identity = "bytes"
    pad_token_id = BYTE_PAD
    end_token_id = BYTE_END

    def encode(
        self, texts: Sequence[str], pairs: Sequence[str] | None, max_length: int
    ) -> tuple[Sequence[Sequence[int]], None]:
        """Token ids of each text (and the end token, and its pair), cut to ``max_length``."""
        ids = self.pieces(texts)
        if pairs is not None:
            ids = [[*a, BYTE_END, *b] for a, b in zip(ids, self.pieces(pairs), strict=True)]
        return [[*row[: max_length - 1], BYTE_END] for row in ids], None

    def ids(self, text: str) -> list[int]:
        """Token ids of a text, whole and without specials."""
        return [_BYTE_SPECIAL + byte for byte in text.encode()]

    def decode(self, ids: Sequence[int]) -> str:
        """The text; specials are left out."""
        return bytes(i - _BYTE_SPECIAL for i in ids if i >= _BYTE_SPECIAL).decode(errors="replace")
