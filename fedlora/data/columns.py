"""From a dataset's own columns to fedlora's: text, text_pair, label, domain, group, checked."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from fedlora.config import DataConfig, name_list
from fedlora.errors import ConfigError

if TYPE_CHECKING:
    from datasets import Dataset

BUILT_IN = {
    "sentiment": ("domain", "group"), "newsgroups": ("domain", ""), "synthetic": ("domain", "group"),
    "novels": ("domain", ""), "digits": ("domain", ""), "fashion-mnist": ("domain", ""),
}  # fmt: skip
"""Domain and group column of each built-in dataset."""
PICTURES = frozenset({"digits", "fashion-mnist"})
"""Built-in datasets of images."""
LONG_TEXTS = frozenset({"novels"})
"""Built-in datasets whose rows are whole books: the last part of each is held out, not some of the rows."""
TEXTS = ("text", "text_pair")
PICTURE = "image"
"""Pixels in the form of a model, as bytes."""
DEFAULT_TEXTS = ("text",)
NATURAL = "natural"
BY_NATURE = (NATURAL, "natural-dirichlet")
"""Partitioners that go by the values of ``data.partition-by``."""


@dataclass(frozen=True, slots=True)
class Columns:
    """Which column of a dataset plays which part; empty where there is none.

    Attributes:
        texts: one column, or two for sentence pairs.
        label: the label; empty where examples have none.
        domain: by what accuracy is also reported.
        group: what must not be split between train and test.
        natural: the column whose values are the clients, where that is none of the other parts.
        conversations: the text is a column of messages, or two columns, a prompt and its response.
    """

    texts: tuple[str, ...]
    label: str
    domain: str
    group: str
    natural: str
    conversations: bool = False

    @classmethod
    def of(cls, config: DataConfig, *, labelled: bool = True) -> Columns:
        """The columns that a configuration names; a built-in dataset brings its own domain and group.

        Where examples have no label their clients are always a part of their own, since one example may be
        made of several rows.

        Raises:
            ConfigError: no text column, or more than two.
        """
        texts = name_list(config.text_column)
        if len(texts) not in (1, 2):
            raise ConfigError(
                f"data.text-column = {config.text_column!r}: must name one column, or two for sentence pairs"
            )
        domain, group = BUILT_IN.get(config.name, (config.domain_column, config.group_column))
        by = config.partition_by if config.partitioner in BY_NATURE else ""
        if not labelled:
            natural = "" if by == "domain" and domain else (by == "group" and group) or by
            return cls(texts, "", domain, group, natural=natural)
        known = {"label": config.label_column, "domain": domain, "group": group}.get(by)
        return cls(texts, config.label_column, domain, group, natural="" if known else by)

    def settled(self, names: Sequence[str]) -> Columns:
        """With the texts of conversations by their usual names, where the configuration names none."""
        if not self.conversations or self.texts != DEFAULT_TEXTS:
            return self
        return replace(self, texts=("messages",) if "messages" in names else ("prompt", "response"))

    def parts(self) -> dict[str, tuple[str, str]]:
        """Our name -> (the key that names the dataset's column, that column); parts in use only."""
        parts = {name: ("data.text-column", text) for name, text in zip(TEXTS, self.texts, strict=False)}
        parts["label"] = ("data.label-column", self.label)
        parts["domain"] = ("data.domain-column", self.domain)
        parts["group"] = ("data.group-column", self.group)
        parts[NATURAL] = ("data.partition-by", self.natural)
        return {name: (key, column) for name, (key, column) in parts.items() if column}


def standard(table: Dataset, columns: Columns, where: str) -> pa.Table:
    """The parts in use under our names: strings without blanks, labels still as they are.

    Raises:
        ConfigError: no rows, a missing column, an empty value, a text column that is not text.
    """
    if len(table) == 0:
        raise ConfigError(f"data: {where} holds no examples")
    columns = columns.settled(table.column_names)
    used = columns.parts()
    for key, column in used.values():
        if column not in table.column_names:
            raise ConfigError(
                f"{key} = {column!r}: no such column in {where}, it has {', '.join(table.column_names)}"
            )
    arrow: pa.Table = table.with_format("arrow").select_columns(sorted({c for _, c in used.values()}))[:]
    parts = {}
    for name, (key, column) in used.items():
        values = arrow[column]
        if name in TEXTS and columns.conversations and len(columns.texts) == 1:
            values = _as_json(values, key, column, where)
        if name in TEXTS and not _is_text(values.type):
            raise ConfigError(f"{key} = {column!r}: holds {values.type} in {where}, must be text")
        parts[name] = values if name == "label" else _as_text(values, key, column, where)
        _refuse_empty(parts[name], key, column, where)
    return pa.table(parts)


def encode_labels(
    tables: Sequence[pa.Table], source: Dataset, columns: Columns, where: str
) -> tuple[list[pa.Table], tuple[str, ...]]:
    """The tables with labels 0 .. K-1, and the K names; the first table decides which labels exist.

    A dataset that names its classes keeps its own order, else names are sorted.

    Raises:
        ConfigError: fewer than two labels, fractional labels, a label unknown to the first table.
    """
    feature = source.features[columns.label]
    own = getattr(feature, "names", None)  # of a ClassLabel
    texts = [label_texts(table["label"], columns.label, where) for table in tables]
    names = [str(code) for code in range(len(own))] if own else in_order(texts[0].to_pylist())
    if len(names) < 2:
        raise ConfigError(f"data.label-column = {columns.label!r}: {where} has one label only, {names[0]!r}")
    encoded = []
    for table, text in zip(tables, texts, strict=True):
        codes = pc.index_in(text, pa.array(names, pa.large_string()))
        if codes.null_count:
            odd = text[pc.index(pc.is_null(codes), True).as_py()].as_py()
            raise ConfigError(
                f"data.label-column = {columns.label!r}: {odd!r} in {where} is none of the "
                f"{len(names)} labels known from the training examples"
            )
        index = table.column_names.index("label")
        encoded.append(table.set_column(index, "label", codes.cast(pa.int64())))
    return encoded, tuple(own or names)


def in_order(values: Iterable[str]) -> list[str]:
    """Distinct names sorted; by value where all are whole numbers.

    >>> in_order(["10", "9"]), in_order(["10", "9", "b"])
    (['9', '10'], ['10', '9', 'b'])
    """
    distinct = set(values)
    try:
        return sorted(distinct, key=lambda value: (int(value), value))
    except ValueError:
        return sorted(distinct)


def codes_of(values: Sequence[Any], names: Sequence[str]) -> np.ndarray:
    """Position of each value in the names, int32, shape (rows,)."""
    position = {name: index for index, name in enumerate(names)}
    return np.array([position[str(value)] for value in values], dtype=np.int32)


def _is_text(kind: Any) -> bool:
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind))


def _as_text(values: pa.ChunkedArray, key: str, column: str, where: str) -> pa.ChunkedArray:
    try:
        return values.cast(pa.large_string())
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
        raise ConfigError(
            f"{key} = {column!r}: holds {values.type} in {where}, must be whole numbers or names"
        ) from None


def _as_json(values: pa.ChunkedArray, key: str, column: str, where: str) -> pa.ChunkedArray:
    """Messages as JSON text; without any they are empty."""
    kind = values.type
    if not ((pa.types.is_list(kind) or pa.types.is_large_list(kind)) and pa.types.is_struct(kind.value_type)):
        raise ConfigError(
            f"{key} = {column!r}: holds {kind} in {where}, must be lists of messages with role and content"
        )
    texts = [json.dumps(messages) if messages else "" for messages in values.to_pylist()]
    return pa.chunked_array([pa.array(texts, pa.large_string())])


def _refuse_empty(values: pa.ChunkedArray, key: str, column: str, where: str) -> None:
    empty = pc.is_null(values, nan_is_null=True)
    if _is_text(values.type):
        empty = pc.or_(empty, pc.fill_null(pc.equal(pc.utf8_trim_whitespace(values), ""), True))
    count = pc.sum(empty).as_py()
    if count:
        row = pc.index(empty, True).as_py()
        raise ConfigError(f"{key} = {column!r}: {count} empty in {where}, the first is example {row}")


def label_texts(values: pa.ChunkedArray, column: str, where: str) -> pa.ChunkedArray:
    """Labels as strings; whole numbers stored as floats lose their .0."""
    key = "data.label-column"
    if pa.types.is_floating(values.type):
        if not pc.all(pc.equal(pc.floor(values), values)).as_py():
            raise ConfigError(
                f"{key} = {column!r}: holds fractions in {where}, must be whole numbers or names"
            )
        values = values.cast(pa.int64())
    return _as_text(values, key, column, where)
