"""Outline of somebody's table: its columns, and what each is likely for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from fedlora.config import DataConfig
from fedlora.data.chat.columns import usual_columns
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
    """

    name: str
    columns: Sequence[str]
    task: str
    text: str = ""
    label: str = ""
    image: str = ""


def outline(name: str) -> Outline:
    """The outline of a file, directory, hub dataset or built-in one.

    Raises:
        ConfigError: it cannot be read.
        AssetError: it could not be fetched.
    """
    if name in PICTURES:
        return Outline(name=name, columns=(), task="image-classification", label="label", image="image")
    table, _ = open_source(DataConfig(name=name), labelled=False)
    columns = tuple(table.column_names)
    image = next((column for column in columns if has_pictures(table, column)), "")
    if usual_columns(columns) and name not in BUILT_IN:
        return Outline(name=name, columns=columns, task="instruction")
    arrow = table.with_format("arrow")
    few = {
        column: list(islice(python_values(arrow.select_columns(column)[:LOOKED_AT][column]), LOOKED_AT))
        for column in columns
        if column != image
    }
    label = _label(few)
    text = "" if image else _text(few, label)
    task = "image-classification" if image else "classification" if label else "causal-lm"
    return Outline(name=name, columns=columns, task=task, text=text, label=label, image=image)


def _label(columns: Mapping[str, Sequence[Any]]) -> str:
    """A usual name, else the column with the fewest values, several of them and each more than once."""
    named = next((column for column in columns if column.lower() in LABEL_NAMES), "")
    counts = {column: len(set(map(str, values))) for column, values in columns.items()}
    few = [c for c, count in counts.items() if 2 <= count <= min(MOST_LABELS, len(columns[c]) // 2)]
    return named or min(few, key=counts.__getitem__, default="")


def _text(columns: Mapping[str, Sequence[Any]], label: str) -> str:
    """A usual name, else the column with the longest values."""
    named = next((column for column in columns if column.lower() in TEXT_NAMES), "")
    lengths = {c: sum(len(str(v)) for v in values) for c, values in columns.items() if c != label}
    return named or max(lengths, key=lengths.__getitem__, default="")
