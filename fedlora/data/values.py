"""Columns as texts and as names: what the file says, or a refusal with the row.

Names (labels, domains, groups, clients) are texts, whole numbers or truth values, one of these in a whole
column. A name is called what it is in the file, without blanks around it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterator
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from fedlora.config import name_list
from fedlora.errors import ConfigError

LARGEST = 2**53
"""Below it every whole number that is stored as a float is the one that was meant."""
SHOWN = 60
"""Characters of a value that a refusal shows."""
_ONLY_NAMES = "must be texts, or whole numbers, or truth values (labels with fractions: task = 'regression')"


def columns_named(value: str, names: Collection[str]) -> tuple[str, ...]:
    """The columns that a key names: the one that is called so letter for letter, else a comma string of them.

    >>> columns_named("a, b", ["a, b", "c"]), columns_named("a, b", ["a", "b"])
    (('a, b',), ('a', 'b'))
    """
    return (value,) if value in names else name_list(value)


def is_text(kind: pa.DataType) -> bool:
    """Whether a column holds texts and nothing else."""
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind))


def as_texts(values: pa.ChunkedArray, key: str, column: str, where: str) -> pa.ChunkedArray:
    """A column of texts as large strings, each as it stands.

    Raises:
        ConfigError: a value that is no text, with its row.
    """
    if isinstance(values.type, pa.JsonType):
        return _each(values, _text, key, column, where)
    if not is_text(values.type):
        raise ConfigError(f"{key} = {column!r}: holds {values.type} in {where}, must be text")
    return values.cast(pa.large_string())


def as_names(values: pa.ChunkedArray, key: str, column: str, where: str) -> pa.ChunkedArray:
    """A column of names as large strings without blanks around them.

    Whole numbers are called by their digits, also where they are stored as floats; truth values ``true`` and
    ``false``.

    Raises:
        ConfigError: a value that is no name, or of another kind than those before it, with its row.
    """
    if isinstance(values.type, pa.JsonType):
        values = _each(values, _OneKind(), key, column, where)
    elif pa.types.is_floating(values.type):
        values = _whole(values, key, column, where)
    try:
        return pc.utf8_trim_whitespace(values.cast(pa.large_string()))
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
        raise ConfigError(f"{key} = {column!r}: holds {values.type} in {where}, {_ONLY_NAMES}") from None


def class_names(values: pa.ChunkedArray, names: list[str], key: str, column: str, where: str) -> Any:
    """The names of classes that a dataset stores by their numbers.

    Raises:
        ConfigError: a number that is none of a class, such as -1 for a label that is kept back.
    """

    def name(code: int) -> str:
        if not 0 <= code < len(names):
            raise ValueError(f"{code}, which is none of its {len(names)} classes")
        return names[code]

    return _each(values, name, key, column, where)


def refuse_empty(values: pa.ChunkedArray, key: str, column: str, where: str) -> None:
    """Refuse a column of large strings in which something is missing or blank.

    Raises:
        ConfigError: how many are empty, and the row of the first.
    """
    empty = pc.fill_null(pc.equal(pc.utf8_trim_whitespace(values), ""), True)
    count = pc.sum(empty).as_py()
    if count:
        row = pc.index(empty, True).as_py() + 1
        raise ConfigError(f"{key} = {column!r}: {count} empty in {where}, the first in row {row}")


def _each(
    values: pa.ChunkedArray, read: Callable[[Any], str], key: str, column: str, where: str
) -> pa.ChunkedArray:
    """Result of ``read`` for each value that is there; its ValueError is told with the row."""
    found: list[str | None] = []
    for row, value in enumerate(python_values(values), start=1):
        try:
            found.append(None if value is None else read(value))
        except ValueError as error:
            raise ConfigError(f"{key} = {column!r}: row {row} of {where} holds {error}") from None
    return pa.chunked_array([pa.array(found, pa.large_string())])


def python_values(values: pa.ChunkedArray) -> Iterator[Any]:
    """The values of a column, JSON decoded; None where there is none."""
    if not isinstance(values.type, pa.JsonType):
        yield from values.to_pylist()
        return
    for chunk in values.chunks:
        for stored in chunk.storage.to_pylist():
            yield None if stored is None else json.loads(stored)


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{described(value)}, must be text")
    return unicode_text(value)


class _OneKind:
    """The name that a JSON value is; the first one decides of which kind all are."""

    def __init__(self) -> None:
        self._kind = ""

    def __call__(self, value: Any) -> str:
        kind, name = named(value)
        self._kind = self._kind or kind
        if kind != self._kind:
            raise ValueError(f"{described(value)}, before it are {self._kind}; {_ONLY_NAMES}")
        return name


def named(value: Any) -> tuple[str, str]:
    """Kind and name of a JSON value.

    Raises:
        ValueError: it is none.
    """
    if isinstance(value, str):
        return "texts", unicode_text(value)
    if isinstance(value, bool):
        return "truth values", json.dumps(value)
    if isinstance(value, int):
        return "whole numbers", str(value)
    if isinstance(value, float) and value.is_integer() and abs(value) < LARGEST:
        return "whole numbers", str(int(value))
    raise ValueError(f"{described(value)}; {_ONLY_NAMES}")


def described(value: Any) -> str:
    """A value of a file in an error.

    >>> described(404), described("a"), described({})
    ('the number 404', "the text 'a'", 'the object {}')
    """
    kinds = {
        str: "the text", bool: "the truth value", int: "the number", float: "the number", list: "the list",
        dict: "the object",
    }  # fmt: skip
    text = repr(value) if isinstance(value, str) else json.dumps(value, default=str)
    short = text if len(text) <= SHOWN else f"{text[:SHOWN]}.."
    return f"{kinds.get(type(value), type(value).__name__)} {short}"


def unicode_text(text: str) -> str:
    """The text itself.

    Raises:
        ValueError: it holds what is no character.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        part = text[max(0, error.start - SHOWN // 2) :][:SHOWN]
        raise ValueError(f"half of a surrogate pair in {json.dumps(part)}, which is no character") from None
    return text


def _whole(values: pa.ChunkedArray, key: str, column: str, where: str) -> pa.ChunkedArray:
    """Floats that are whole numbers as such; NaN is empty."""
    numbers = pc.if_else(pc.is_nan(values.cast(pa.float64())), None, values.cast(pa.float64()))
    odd = pc.or_(pc.not_equal(pc.floor(numbers), numbers), pc.greater_equal(pc.abs(numbers), LARGEST))
    row = pc.index(odd, True).as_py()
    if row >= 0:
        raise ConfigError(
            f"{key} = {column!r}: row {row + 1} of {where} holds {numbers[row].as_py()}; {_ONLY_NAMES}"
        )
    return numbers.cast(pa.int64())
