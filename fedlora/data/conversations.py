"""Conversations as tokens, of which the assistant's are marked.

With a chat template an assistant's turn is what the template adds to the text before it (with its generation
prompt); so the mark needs no support from the template. Without one each turn is a line, ``User: ...`` and
``Assistant: ...``, the end token after each answer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

from fedlora.errors import ConfigError

Marked = tuple[list[int], list[bool]]
"""Token ids, and for each whether it counts."""
Template = Callable[[Sequence["Turn"], bool], str]
"""Turns, and whether an answer is to follow -> text."""


@dataclass(frozen=True, slots=True)
class Turn:
    """What one side says."""

    role: str
    content: str


class Pieces(Protocol):
    """What it takes to put texts together."""

    @property
    def end_token_id(self) -> int:
        """Ends a text."""

    def pieces(self, texts: Sequence[str]) -> Sequence[list[int]]:
        """Token ids of each text, whole and without specials."""


def plainly(turns: Sequence[Turn], tokenizer: Pieces) -> Marked:
    """A conversation without a template."""
    parts: list[tuple[str, bool]] = []
    for turn in turns:
        if turn.role == "assistant":
            parts += [("Assistant:", False), (f" {turn.content}", True)]
        else:
            parts.append((f"{turn.role.capitalize()}: {turn.content}\n", False))
    return _joined(parts, tokenizer, end_answers=True)


def by_template(turns: Sequence[Turn], template: Template, tokenizer: Pieces, where: str) -> Marked:
    """A conversation as a chat template writes it.

    Raises:
        ConfigError: the template writes earlier turns differently once later ones are there.
    """
    parts: list[tuple[str, bool]] = []
    text = ""
    for place, turn in enumerate(turns, start=1):
        if turn.role == "assistant":
            asked, answered = template(turns[: place - 1], True), template(turns[:place], False)
            if not (asked.startswith(text) and answered.startswith(asked)):
                raise ConfigError(
                    f"{where}: its chat template rewrites earlier turns, so answers have no place"
                )
            parts += [(asked[len(text) :], False), (answered[len(asked) :], True)]
            text = answered
    whole = template(turns, False)
    parts.append((whole[len(text) :], False))
    return _joined(parts, tokenizer, end_answers=False)


def _joined(parts: Iterable[tuple[str, bool]], tokenizer: Pieces, *, end_answers: bool) -> Marked:
    ids: list[int] = []
    counted: list[bool] = []
    for text, counts in parts:
        piece = list(tokenizer.pieces([text])[0]) if text else []
        if counts and end_answers:
            piece.append(tokenizer.end_token_id)
        ids += piece
        counted += [counts] * len(piece)
    return ids, counted
