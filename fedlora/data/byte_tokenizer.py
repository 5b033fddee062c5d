"""The tokenizer of the model ``tiny-lm``: bytes, no files, no download; it can be undone."""

from __future__ import annotations

from collections.abc import Sequence

from fedlora.data.built_in_tokenizer import BuiltInTokenizer

PAD, END = 0, 1
_NUM_SPECIAL = 2
VOCAB_SIZE = _NUM_SPECIAL + 256


class ByteTokenizer(BuiltInTokenizer):
    """The UTF-8 bytes of a text; the end token after it where a sequence is framed."""

    identity = "bytes"
    pad_token_id = PAD
    end_token_id = END

    def encode(
        self, texts: Sequence[str], pairs: Sequence[str] | None, max_length: int
    ) -> tuple[Sequence[Sequence[int]], None]:
        """Token ids of each text (and the end token, and its pair), cut to ``max_length``."""
        ids = self.pieces(texts)
        if pairs is not None:
            ids = [[*a, END, *b] for a, b in zip(ids, self.pieces(pairs), strict=True)]
        return [[*row[: max_length - 1], END] for row in ids], None

    def ids(self, text: str) -> list[int]:
        """Token ids of a text, whole and without specials."""
        return [_NUM_SPECIAL + byte for byte in text.encode()]

    def decode(self, ids: Sequence[int]) -> str:
        """The text; specials are left out."""
        return bytes(i - _NUM_SPECIAL for i in ids if i >= _NUM_SPECIAL).decode(errors="replace")
