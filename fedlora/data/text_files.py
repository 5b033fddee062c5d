"""csv, tsv and JSON files as tables in which nothing is guessed.

Every cell of a csv or tsv file is text. A JSON value stays what it is: a column of texts is one of texts, a
column in which anything else occurs is one of JSON values, Arrow's type ``arrow.json``. `fedlora.data.values`
reads both.
"""

from __future__ import annotations

import codecs
import csv
import gzip
import io
import json
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from itertools import chain, islice
from pathlib import Path
from typing import Any

import pyarrow as pa

from fedlora.errors import first_line

DELIMITERS = {".csv": ",", ".tsv": "\t"}
JSON = (".jsonl", ".json", ".ndjson")
PIECE = 10_000
"""Rows that are held as Python objects at a time."""
_FORM = "must be an object in each line, or a list of objects"
_UTF_16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


def kind_of(name: str | Path) -> str:
    """The suffix that says how a file is read, in small letters; ``.gz`` after it is no part of it.

    >>> kind_of("a/notes.csv.gz"), kind_of("notes.v2.jsonl"), kind_of("NOTES.CSV")
    ('.csv', '.jsonl', '.csv')
    """
    path = Path(str(name).lower())
    return (path.with_suffix("") if path.suffix == ".gz" else path).suffix


def read_text_files(files: Sequence[tuple[str, Path]]) -> pa.Table:
    """The rows of the files one after another, a column for each name that occurs in any of them.

    Args:
        files: the kind of each, a key of `DELIMITERS` or one of `JSON`, and where it is.

    Raises:
        ValueError: a file that cannot be read as such, with the line.
        OSError: one that cannot be opened, or is no gzip file.
    """
    tables = [table for kind, path in files for table in _pieces(kind, path)]
    names = dict.fromkeys(chain.from_iterable(table.column_names for table in tables))
    return pa.table({name: _joined(name, tables) for name in names})


def column_names(kind: str, path: Path) -> list[str]:
    """The names of the columns in a csv or tsv file, of which no more is read.

    Raises:
        ValueError, OSError: as `read_text_files`.
    """
    return list(next(_pieces(kind, path)).column_names)


def _pieces(kind: str, path: Path) -> Iterator[pa.Table]:
    try:
        if kind in JSON:
            yield from _json_pieces(path)
        else:
            yield from _csv_pieces(path, DELIMITERS[kind])
    except (EOFError, UnicodeDecodeError, zlib.error) as error:  # a gzip or UTF-16 file that is damaged
        raise ValueError(first_line(error)) from None


def _joined(name: str, tables: Sequence[pa.Table]) -> pa.ChunkedArray:
    """One column of all tables; of JSON values where any of them has such."""
    parts: list[pa.Array] = [
        chunk
        for table in tables
        for chunk in (
            table[name].chunks if name in table.column_names else [pa.nulls(len(table), pa.large_string())]
        )
    ]
    if any(isinstance(part.type, pa.JsonType) for part in parts):
        parts = [
            part if isinstance(part.type, pa.JsonType) else _json_array(part.to_pylist()) for part in parts
        ]
    return pa.chunked_array(parts)


# --- csv and tsv -------------------------------------------------------------------------------------


def _csv_pieces(path: Path, delimiter: str) -> Iterator[pa.Table]:
    """Cells as they stand. In a tsv file a quote is a character like others, as GLUE ships it."""
    csv.field_size_limit(2**31 - 1)
    options: dict[str, Any] = {"quoting": csv.QUOTE_NONE} if delimiter == "\t" else {}
    reader = csv.reader(text_lines(path), delimiter=delimiter, strict=True, **options)
    try:
        header = next(reader, None)
        if header is None:
            raise ValueError("the file is empty, its first line must name the columns")
        _check_separated(header, delimiter)
        rows = _cells(reader, len(header))
        names = _distinct([name.strip() for name in header])
        yield pa.table({name: pa.array([], pa.large_string()) for name in names})
        while piece := list(islice(rows, PIECE)):
            columns = zip(*piece, strict=True)
            yield pa.table(
                {n: pa.array(cells, pa.large_string()) for n, cells in zip(names, columns, strict=True)}
            )
    except csv.Error as error:
        raise ValueError(f"line {reader.line_num}: {error}") from None


def _check_separated(header: Sequence[str], delimiter: str) -> None:
    """Refuse a header of one column in which another separator stands, as Excel writes it in Europe."""
    found = next((mark for mark in ";\t|," if mark in header[0]), "") if len(header) == 1 else ""
    if found and found != delimiter:
        raise ValueError(
            f"line 1: {header[0]!r} is one column, columns are separated by {delimiter!r} here, not by "
            f"{found!r}"
        )


def _cells(reader: Any, count: int) -> Iterator[list[str]]:
    for cells in reader:
        if cells and len(cells) != count:
            raise ValueError(f"line {reader.line_num} has {len(cells)} fields, the header has {count}")
        if cells:
            yield cells


def _distinct(names: Sequence[str]) -> list[str]:
    """The names of columns; one that several columns have tells nothing, so each adds its place.

    >>> _distinct(["text", "label", "label"])
    ['text', 'label (column 2)', 'label (column 3)']
    """
    return [
        f"{name} (column {place})" if names.count(name) > 1 else name
        for place, name in enumerate(names, start=1)
    ]


# --- JSON ----------------------------------------------------------------------------------------------


def _json_pieces(path: Path) -> Iterator[pa.Table]:
    rows = _objects(text_lines(path))
    while piece := list(islice(rows, PIECE)):
        names = dict.fromkeys(chain.from_iterable(piece))
        yield pa.table({name: _values([row.get(name) for row in piece]) for name in names})


def _objects(lines: Iterator[str]) -> Iterator[dict[str, Any]]:
    """One object for each line that is not empty, or those of one array."""
    blank: list[str] = []
    first = ""
    for first in lines:
        if first.strip():
            break
        blank.append(first)
    if first.lstrip().startswith("["):
        for place, row in enumerate(_parsed("".join([*blank, first, *lines]), ""), start=1):
            yield _object(row, f"entry {place}")
        return
    for number, line in enumerate(chain([first], lines), start=len(blank) + 1):
        if line.strip():
            yield _object(_parsed(line, f"line {number}: "), f"line {number}")


def _object(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"{where} is no object; {_FORM}")
    return value


def _parsed(text: str, where: str) -> Any:
    try:
        # What is no JSON (NaN) is nothing: it must not be missed where nobody needs it.
        return json.loads(text, object_pairs_hook=_without_repeats, parse_constant=lambda _: None)
    except RecursionError:
        raise ValueError(f"{where}is nested too deeply") from None
    except json.JSONDecodeError as error:
        if not where:
            raise
        raise ValueError(f"{where}{error.msg} at character {error.colno}; {_FORM}") from None
    except ValueError as error:
        raise ValueError(f"{where}{first_line(error)}") from None


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        repeated = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"names the key {repeated!r} twice")
    return found


def _values(values: Sequence[Any]) -> pa.Array:
    if all(value is None or isinstance(value, str) for value in values):
        with suppress(UnicodeEncodeError):  # half of a surrogate pair, which only JSON can hold
            return pa.array(values, pa.large_string())
    return _json_array(values)


def _json_array(values: Iterable[Any]) -> pa.Array:
    texts = [None if value is None else json.dumps(value) for value in values]
    return pa.ExtensionArray.from_storage(pa.json_(), pa.array(texts, pa.string()))


# --- lines -----------------------------------------------------------------------------------------------


def text_lines(path: Path) -> Iterator[str]:
    """The lines with their ends, UTF-8, or UTF-16 where the file begins with its byte order mark."""
    with _opened(path) as file:
        if file.peek(2)[:2] in _UTF_16:
            with io.TextIOWrapper(file, encoding="utf-16", newline="\n") as text:
                yield from text
            return
        for number, line in enumerate(file, start=1):
            try:
                yield line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise ValueError(
                    f"line {number} is not UTF-8 (byte 0x{line[error.start]:02x}), save the file as UTF-8"
                ) from None


def _opened(path: Path) -> io.BufferedReader | gzip.GzipFile:
    if path.suffix.lower() == ".gz":
        return gzip.open(path, "rb")
    return path.open("rb")
