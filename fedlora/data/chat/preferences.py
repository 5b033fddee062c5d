"""Preference pairs: a prompt, the answer that was chosen and the one that was rejected, in TRL's forms.

| columns | form |
|---|---|
| ``prompt``, ``chosen`` and ``rejected`` | texts, or lists of messages |
| ``chosen`` and ``rejected`` | whole conversations; the messages with which both begin are the prompt |

Beside conversations ``prompt`` may be a text, which is not read. Each side becomes a conversation of which
what follows the prompt alone is learned.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import takewhile
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from fedlora.data.chat.columns import KEY, as_column, cells
from fedlora.data.chat.conversations import Conversation, messages_in, prompted
from fedlora.errors import ConfigError

if TYPE_CHECKING:
    from datasets import Dataset

PREFERENCES = (("prompt", "chosen", "rejected"), ("chosen", "rejected"))
"""Names under which pairs are found where none are configured, the first that are there."""


def preference_texts(table: Dataset, texts: Sequence[str], where: str) -> dict[str, pa.ChunkedArray]:
    """The chosen and the rejected conversation of each row as JSON, under the names of the last two columns.

    Args:
        table: has the columns.
        texts: prompt, chosen and rejected; or chosen and rejected.
        where: the table, in an error.

    Raises:
        ConfigError: a row that is no pair, with its number, counted from 1.
    """
    sides: tuple[list[str], list[str]] = ([], [])
    for number, (*given, tools) in enumerate(cells(table, texts), start=1):
        place = f"{KEY} = {','.join(texts)!r}: row {number} of {where}"
        for side, conversation in zip(sides, pair(given, tools, place), strict=True):
            side.append(conversation.dump())
    return {name: as_column(side) for name, side in zip(texts[-2:], sides, strict=True)}


def pair(cells: Sequence[Any], tools: Any, where: str) -> tuple[Conversation, Conversation]:
    """The chosen and the rejected conversation of a row.

    Args:
        cells: prompt, chosen and rejected; or chosen and rejected.
        tools: of the row.
        where: the row, in an error.

    Raises:
        ConfigError: it is no pair.
    """
    *prompts, chosen, rejected = cells
    for name, cell in (("chosen", chosen), ("rejected", rejected)):
        if cell is None or not str(cell).strip() or cell == []:
            raise ConfigError(f"{where}: {name} is empty")
        if not isinstance(cell, str | list):
            raise ConfigError(
                f"{where}: {name} holds {type(cell).__name__} {cell!r}, must be text or messages"
            )
    if chosen == rejected:
        raise ConfigError(f"{where}: chosen and rejected are the same, nothing is preferred")
    one, other = messages_in(chosen), messages_in(rejected)
    if (one is None) != (other is None):
        raise ConfigError(f"{where}: one of chosen and rejected is a text, the other a list of messages")
    prompt = prompts[0] if prompts else None
    if one is not None and other is not None and messages_in(prompt) is None:
        prompt, chosen, rejected = _apart(one, other, where)
    if prompt is None or not str(prompt).strip():
        raise ConfigError(f"{where}: has no prompt; texts need the columns {', '.join(PREFERENCES[0])}")
    return (
        prompted(prompt, chosen, tools, f"{where}, chosen"),
        prompted(prompt, rejected, tools, f"{where}, rejected"),
    )


def _apart(chosen: list[Any], rejected: list[Any], where: str) -> tuple[list[Any], list[Any], list[Any]]:
    """The messages with which both conversations begin, and what each of them goes on with."""
    alike = takewhile(lambda both: both[0] == both[1], zip(chosen, rejected, strict=False))
    shared = min(sum(1 for _ in alike), len(chosen) - 1, len(rejected) - 1)
    if shared < 1:
        raise ConfigError(f"{where}: chosen and rejected do not begin with the same messages, the prompt")
    return chosen[:shared], chosen[shared:], rejected[shared:]
