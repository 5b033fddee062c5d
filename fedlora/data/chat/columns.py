"""Columns of conversations as columns of text: JSON of each conversation, or prompts and responses."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from fedlora.data.chat.conversations import conversation, prompted, refuse_halves
from fedlora.data.values import python_values
from fedlora.errors import ConfigError

if TYPE_CHECKING:
    from datasets import Dataset

KEY = "data.text-column"
TOOLS = "tools"
USUAL = (
    ("messages",), ("conversations",), ("prompt", "response"), ("prompt", "completion"),
    ("instruction", "input", "output"), ("instruction", "output"),
)  # fmt: skip
"""Names under which conversations are found where none are configured, the first that are there."""


def usual_columns(names: Sequence[str]) -> tuple[str, ...] | None:
    """The columns that hold conversations by their usual names; None where there are none.

    >>> usual_columns(["output", "input", "instruction", "id"])
    ('instruction', 'input', 'output')
    """
    return next((usual for usual in USUAL if set(usual) <= set(names)), None)


def conversation_texts(table: Dataset, texts: Sequence[str], where: str) -> dict[str, pa.ChunkedArray]:
    """Column name -> its texts, of the first column or of prompt and response; each row is checked.

    Prompts and responses that are plain texts stay two columns; with ``input`` the prompt is the instruction,
    a line break and the input. Everything else becomes JSON under the first column's name, see
    `fedlora.data.chat.conversations.Conversation.dump`.

    Args:
        table: has the columns.
        texts: messages; prompt and response; or prompt, input and response.
        where: the table, in an error.

    Raises:
        ConfigError: a row that is no conversation, with its number, counted from 1.
    """
    rows = list(cells(table, texts))
    places = [f"{KEY} = {','.join(texts)!r}: row {n} of {where}" for n in range(1, len(rows) + 1)]
    if len(texts) == 1:
        found = [
            conversation(messages, tools, place).dump()
            for place, (messages, tools) in zip(places, rows, strict=True)
        ]
        return {texts[0]: as_column(found)}
    pairs = [_pair(cells[:-1], place) for place, cells in zip(places, rows, strict=True)]
    tools = [cells[-1] for cells in rows]
    if all(isinstance(side, str) for pair in pairs for side in pair) and not any(tools):
        prompts, responses = zip(*pairs, strict=True)
        return {texts[0]: as_column(prompts), texts[-1]: as_column(responses)}
    found = [
        prompted(prompt, response, tool, place).dump()
        for (prompt, response), tool, place in zip(pairs, tools, places, strict=True)
    ]
    return {texts[0]: as_column(found)}


def cells(table: Dataset, texts: Sequence[str]) -> Iterator[tuple[Any, ...]]:
    """Row by row the cells of the text columns and of ``tools``."""
    arrow: pa.Table = table.with_format("arrow")[:]
    columns = [_values(arrow[name]) for name in texts]
    tools = _values(arrow[TOOLS]) if TOOLS in arrow.column_names else [None] * len(table)
    return zip(*columns, tools, strict=True)


def _values(column: pa.ChunkedArray) -> list[Any]:
    """The cells; where a row of a columnar file has the keys of all others, without those that are empty."""
    cells = list(python_values(column))
    return cells if isinstance(column.type, pa.JsonType) else list(map(_unpadded, cells))


def _pair(cells: Sequence[Any], where: str) -> tuple[Any, Any]:
    """Prompt, with its input if there is one, and response."""
    for cell in (cells[0], cells[-1]):
        if cell is None or (isinstance(cell, str) and not cell.strip()):
            raise ConfigError(f"{where}: a prompt or response is empty")
        if isinstance(cell, str):
            refuse_halves(cell, where)
        if not isinstance(cell, str | list):
            raise ConfigError(f"{where}: holds {type(cell).__name__} {cell!r}, must be text")
    prompt, extra, response = cells[0], cells[1] if len(cells) == 3 else None, cells[-1]
    if extra is None or extra == "":
        return prompt, response
    if not isinstance(extra, str) or not isinstance(prompt, str):
        raise ConfigError(f"{where}: an input must be text that follows a text")
    refuse_halves(extra, where)
    return (f"{prompt}\n{extra}" if extra.strip() else prompt), response


def _unpadded(cell: Any) -> Any:
    """Without keys that hold nothing."""
    if isinstance(cell, dict):
        return {key: _unpadded(value) for key, value in cell.items() if value is not None}
    return [_unpadded(value) for value in cell] if isinstance(cell, list) else cell


def as_column(texts: Sequence[str]) -> pa.ChunkedArray:
    """A column of large strings."""
    return pa.chunked_array([pa.array(texts, pa.large_string())])
