"""Outline of somebody's table: its columns, and what each is likely for."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from fedlora.config import DataConfig
from fedlora.data.chat.columns import usual_columns
from fedlora.data.chat.preferences import PREFERENCES
from fedlora.data.columns import BUILT_IN, PICTURES
from fedlora.data.image_files import has_pictures
from fedlora.data.sources import open_source
from fedlora.data.values import python_values

TEXT_NAMES = ("text", "sentence", "content", "review", "body", "comment", "message", "note")
LABEL_NAMES = ("label", "labels", "target", "class", "category", "sentiment", "stars", "rating", "score")
LOOKED_AT = 2000
"""Rows that decide, where names do not."""
MOST_LABELS = 50


@dataclass(frozen=True, slots=True, kw_only=True)
class Outline:
    """A table.

    Attributes:
        name: as ``data.name`` has it.
        columns: their names.
        task: what they are likely for.
        text, label, image: the likely columns; empty where there is none.
        rows: from which test examples would be held out; 0 where it has its own, or nothing was read.
    """

    name: str
    columns: Sequence[str]
    task: str
    text: str = ""
    label: str = ""
    image: str = ""
    rows: int = 0


def outline(name: str) -> Outline:
    """The outline of a file, directory, hub dataset or built-in one.

    Raises:
        ConfigError: it cannot be read.
        AssetError: it could not be fetched.
    """
    if name in PICTURES:
        return Outline(name=name, columns=(), task="image-classification", label="label", image="image")
    table, test = open_source(DataConfig(name=name), labelled=False)
    columns, rows = tuple(table.column_names), len(table) if test is None else 0
    image = next((column for column in columns if has_pictures(table, column)), "")
    if any(set(pair) <= set(columns) for pair in PREFERENCES):
        return Outline(name=name, columns=columns, task="dpo", rows=rows)
    if usual_columns(columns) and name not in BUILT_IN:
        return Outline(name=name, columns=columns, task="instruction", rows=rows)
    arrow = table.with_format("arrow")
    few = {
        column: list(islice(python_values(arrow.select_columns(column)[:LOOKED_AT][column]), LOOKED_AT))
        for column in columns
        if column != image
    }
    label = _label(few)
    text = "" if image else _text(few, label)
    kind = "regression" if label and _measures(few[label]) else "classification"
    task = "image-classification" if image else kind if label else "causal-lm"
    return Outline(name=name, columns=columns, task=task, text=text, label=label, image=image, rows=rows)


def _label(columns: Mapping[str, Sequence[Any]]) -> str:
    """A usual name, else the column with the fewest values, several of them and each more than once."""
    named = next((column for column in columns if column.lower() in LABEL_NAMES), "")
    counts = {column: len(set(map(str, values))) for column, values in columns.items()}
    few = [c for c, count in counts.items() if 2 <= count <= min(MOST_LABELS, len(columns[c]) // 2)]
    return named or min(few, key=counts.__getitem__, default="")


def _measures(values: Sequence[Any]) -> bool:
    """Whether they are numbers and no classes: with fractions, and too many different ones.

    >>> _measures([n / 7 for n in range(60)]), _measures(["0.5", "1.0"] * 40), _measures(["good"] * 60)
    (True, False, False)
    """
    try:
        numbers = [float(str(value)) for value in values]
    except ValueError:
        return False
    fractions = any(math.isfinite(number) and number != int(number) for number in numbers)
    return fractions and len(set(numbers)) > min(MOST_LABELS, len(numbers) // 2)


def _text(columns: Mapping[str, Sequence[Any]], label: str) -> str:
    """A usual name, else the column with the longest values."""
    named = next((column for column in columns if column.lower() in TEXT_NAMES), "")
    lengths = {c: sum(len(str(v)) for v in values) for c, values in columns.items() if c != label}
    return named or max(lengths, key=lengths.__getitem__, default="")
