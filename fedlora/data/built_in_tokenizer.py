"""Common code of the tokenizers without files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fedlora.data.chat.template import ChatSettings
from fedlora.data.chat.tokenise import Chats


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
