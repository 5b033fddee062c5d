"""What an adapter is asked about: the texts, pairs of texts or pictures of a caller, or of a file."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Set
from os import PathLike
from pathlib import Path
from typing import Any, TypeAlias

from PIL import Image

from fedlora.core.files import user_path
from fedlora.data.named_files import FILE_KINDS
from fedlora.data.sources import open_table
from fedlora.data.text_files import kind_of, text_lines
from fedlora.data.values import unicode_text
from fedlora.errors import ConfigError, first_line

TEXT_FILE = ".txt"
"""End of files in which each line is a text."""
Item: TypeAlias = "str | tuple[str, str] | PathLike[str] | Image.Image"
"""A text, a pair of texts, or a picture: PIL's, or where its file is."""
TEXTS = "a list of texts or of pairs of texts"
PICTURES = "a list of pictures: PIL's, or where their files are"
NOT_IN_ORDER = (str, bytes, PathLike, Mapping, Set)
"""What can be gone through, but is one thing, or has no order."""


def checked(items: Any, *, pictures: bool) -> list[Item]:
    """Items as they are predicted: of a list, a pandas Series, an array of texts, or whatever has an order.

    Raises:
        ConfigError: a table, something outside of a list, or in it what is neither text, pair nor picture.
    """
    takes = PICTURES if pictures else TEXTS
    if isinstance(items, str):
        raise ConfigError(f"predict({items[:40]!r}): takes a list, predict([...])")
    if hasattr(items, "columns") or hasattr(items, "column_names"):
        raise ConfigError(
            f"predict({type(items).__name__}): is a table, takes {takes}, such as a column: table['text']"
        )
    try:
        if isinstance(items, NOT_IN_ORDER):
            raise TypeError
        found = list(items)
    except TypeError:
        raise ConfigError(f"predict({_named(items)}): takes {takes}") from None
    return [_picture(n, item) if pictures else _text(n, item) for n, item in enumerate(found)]


def _picture(number: int, item: Any) -> Item:
    if isinstance(item, (str, PathLike, Image.Image)):
        return item
    raise ConfigError(f"predict: entry {number} is {_named(item)}, takes {PICTURES}")


def _text(number: int, item: Any) -> Item:
    parts = item if isinstance(item, (tuple, list)) else [item]
    pair = parts is item
    if not all(isinstance(part, str) for part in parts) or len(parts) != (2 if pair else 1):
        raise ConfigError(f"predict: entry {number} is {_named(item)}, takes {TEXTS}")
    for part in parts:
        try:
            unicode_text(part)
        except ValueError as error:
            raise ConfigError(f"predict: entry {number} holds {error}") from None
    return (str(parts[0]), str(parts[1])) if pair else str(parts[0])


def _named(item: Any) -> str:
    """A value and its kind in a message, shortened.

    >>> _named(5), _named(("a",))
    ('5 (int)', "('a',) (tuple of 1)")
    """
    count = f" of {len(item)}" if isinstance(item, (tuple, list)) else ""
    return f"{first_line(repr(item))[:40]} ({type(item).__name__}{count})"


def items_of(given: str, text_column: str, *, pictures: bool) -> list[Any]:
    """Examples that ``fedlora predict`` was given: rows, lines or pictures of a file or directory, or a text.

    Raises:
        ConfigError: a file that cannot be read, without that column, or without a row.
    """
    if not given.strip():
        raise ConfigError("predict: the text is empty")
    path = Path(given)
    try:
        path = user_path(given)
        exists = path.exists()
    except (OSError, ConfigError):  # a text too long for a name, or one that begins with a tilde
        exists = False
    if not exists:
        if pictures or kind_of(path) in (*FILE_KINDS, TEXT_FILE):
            raise ConfigError(f"{given}: no such {'picture or directory' if pictures else 'file'}")
        return [given]
    if pictures:
        files = sorted(file for file in path.iterdir() if file.is_file()) if path.is_dir() else [path]
        if not files:
            raise ConfigError(f"{given}: holds no pictures")
        return files
    if path.is_dir():
        raise ConfigError(f"{given}: is a directory, name a file or a text")
    texts = lines_of(path) if kind_of(path) == TEXT_FILE else open_table(path, text_column, "predict")
    if not texts:
        raise ConfigError(f"{given}: holds no texts")
    return texts


def lines_of(path: Path) -> list[str]:
    """The lines of a text file that are not blank, read as files of examples are: UTF-8, or UTF-16, or gzip.

    Raises:
        ConfigError: a file that cannot be read, or a byte in it that is no text.
    """
    try:
        return [_line(number, line) for number, line in enumerate(text_lines(path), start=1) if line.strip()]
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise ConfigError(f"{path}: cannot be read ({first_line(error)})") from None


def _line(number: int, line: str) -> str:
    if "\0" in line:
        raise ValueError(f"line {number} holds a NUL, save the file as UTF-8")
    return line.removesuffix("\n").removesuffix("\r")
