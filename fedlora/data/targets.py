"""Targets of examples: K numbers to predict, or which of K labels each example has."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from fedlora.config import name_list
from fedlora.data.values import columns_named, described, named, python_values
from fedlora.errors import ConfigError, shown

if TYPE_CHECKING:
    from datasets import Dataset

TARGETS = "targets"
"""The part of a table that holds them: K numbers in each row, or the names of the row's labels."""
KEY = "data.label-column"
REGRESSION, MULTI_LABEL = "regression", "multi_label_classification"
"""Kinds of targets, in the words of transformers' ``problem_type``."""
TRUTH = {"0": 0.0, "1": 1.0, "false": 0.0, "true": 1.0}


def read_targets(table: Dataset, label_column: str, kind: str, where: str) -> pa.Array:
    """The targets of each row.

    Of `REGRESSION` one or more columns of numbers. Of `MULTI_LABEL` one or more columns of 0 and 1 (or false
    and true), or one column of lists of names.

    Returns:
        Lists of K float32; of lists of names these lists.

    Raises:
        ConfigError: a missing column, or a value that is no such target, with its row.
    """
    columns = columns_named(label_column, table.column_names)
    lost = next((column for column in columns if column not in table.column_names), None)
    if lost is not None or not columns:
        raise ConfigError(
            f"{KEY} = {label_column!r}: no column {lost!r} in {where}, it has {', '.join(table.column_names)}"
        )
    arrow = table.with_format("arrow").select_columns(list(dict.fromkeys(columns)))[:]
    if len(set(columns)) < len(columns):
        raise ConfigError(f"{KEY} = {label_column!r}: names a column twice")
    values = [list(python_values(arrow[column])) for column in columns]
    if kind == MULTI_LABEL and len(columns) == 1 and any(isinstance(value, list) for value in values[0]):
        inner = getattr(table.features[columns[0]], "feature", None)
        classes = getattr(inner, "names", None)
        found = _each(values[0], lambda value: _names(value, classes), columns[0], where)
        return pa.array(found, pa.large_list(pa.large_string()))
    read = _number if kind == REGRESSION else _truth
    numbers = [_each(own, read, column, where) for own, column in zip(values, columns, strict=True)]
    return _rows(np.array(numbers, dtype=np.float32).T)


def encode_targets(
    tables: Sequence[pa.Table], label_column: str, known: Sequence[str] | None, where: Sequence[str]
) -> tuple[list[pa.Table], tuple[str, ...]]:
    """The tables with K numbers in each row, and the K names.

    Args:
        tables: with the part `TARGETS`; the first one decides which names there are.
        label_column: ``data.label-column``.
        known: the names, where they are known already.
        where: what each table is from, in an error.

    Raises:
        ConfigError: a name that is not known, with its row, or another number of columns than of names.
    """
    from fedlora.data.columns import in_order

    lists_in = [not pa.types.is_fixed_size_list(table[TARGETS].type) for table in tables]
    if any(lists_in) and not all(lists_in):
        raise ConfigError(
            f"{KEY} = {label_column!r}: holds lists of names in some of {', '.join(where)}, 0 and 1 in others"
        )
    if not lists_in[0]:
        listed, width = name_list(label_column), tables[0][TARGETS].type.list_size
        columns = listed if len(listed) == width else (label_column,)
        if known is not None:
            check_columns(columns, known, f"{KEY} = {label_column!r}")
        return list(tables), tuple(columns if known is None else known)
    lists = [table[TARGETS].to_pylist() for table in tables]
    names = tuple(in_order(name for row in lists[0] for name in row)) if known is None else tuple(known)
    if not names:
        raise ConfigError(f"{KEY} = {label_column!r}: no row of {where[0]} has a label")
    place = {name: number for number, name in enumerate(names)}
    encoded = []
    for table, rows, file in zip(tables, lists, where, strict=True):
        numbers = np.zeros((len(rows), len(names)), dtype=np.float32)
        for row, of_row in enumerate(rows):
            for name in of_row:
                if name not in place:
                    raise ConfigError(
                        f"{KEY} = {label_column!r}: {file} holds {name!r} in row {row + 1}, known are "
                        f"{len(names)} labels: {shown(names)}"
                    )
                numbers[row, place[name]] = 1.0
        encoded.append(table.set_column(table.column_names.index(TARGETS), TARGETS, _rows(numbers)))
    return encoded, names


def check_columns(columns: Sequence[str], known: Sequence[str], where: str) -> None:
    """Hold columns of targets to the names that are known: as many, and none of these at another's place.

    Raises:
        ConfigError: one of these, after ``where``.
    """
    if len(columns) != len(known):
        raise ConfigError(f"{where}: names {len(columns)} columns, must be {len(known)}, for {shown(known)}")
    pairs = zip(columns, known, strict=True)
    if moved := [column for column, name in pairs if column != name and column in known]:
        raise ConfigError(f"{where}: names {moved[0]!r} at another place than in {shown(known)}")


def _rows(numbers: np.ndarray) -> pa.Array:
    """A (rows, K) matrix as lists."""
    return pa.FixedSizeListArray.from_arrays(pa.array(numbers.ravel()), numbers.shape[1])


def _each(values: Sequence[Any], read: Callable[[Any], Any], column: str, where: str) -> list[Any]:
    """Result of ``read`` for each value; its ValueError is told with the row."""
    found = []
    for row, value in enumerate(values, start=1):
        try:
            if value is None:
                raise ValueError("nothing")
            found.append(read(value))
        except ValueError as error:
            raise ConfigError(f"{KEY} = {column!r}: row {row} of {where} holds {error}") from None
    return found


def _number(value: Any) -> float:
    """A number, or a text that is one, which float32 holds."""
    try:
        if isinstance(value, bool) or (isinstance(value, str) and "_" in value):
            raise ValueError
        number = float(value)
    except OverflowError:  # a whole number of JSON has no end
        number = math.inf
    except (TypeError, ValueError):
        raise ValueError(f"{described(value)}, must be a number") from None
    if not math.isfinite(number) or abs(number) > float(np.finfo(np.float32).max):
        raise ValueError(f"{described(value)}, must be a finite number of 32 bits")
    return number


def _truth(value: Any) -> float:
    """Whether an example has a label."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    found = TRUTH.get(str(value).strip().lower()) if isinstance(value, bool | int | str) else None
    if found is None:
        raise ValueError(f"{described(value)}, must be 0 or 1, or lists of names in one column")
    return found


def _names(value: Any, classes: Sequence[str] | None) -> list[str]:
    """The names in a list, those of classes by their numbers."""
    if not isinstance(value, list):
        raise ValueError(f"{described(value)}, must be a list of names")
    if classes is not None:
        if odd := [code for code in value if code is None or not 0 <= code < len(classes)]:
            raise ValueError(f"{described(odd[0])}, which is none of its {len(classes)} classes")
        return [classes[code] for code in value]
    names = [named(name)[1].strip() for name in value]
    if "" in names:
        raise ValueError("an empty name in a list")
    return names
