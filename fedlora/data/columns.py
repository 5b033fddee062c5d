"""From a dataset's own columns to fedlora's: text, text_pair, label, domain, group, checked."""

from __future__ import annotations

import unicodedata
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from fedlora.config import DataConfig, name_list
from fedlora.data.chat.columns import KEY, conversation_texts, usual_columns
from fedlora.data.chat.preferences import PREFERENCES, preference_texts
from fedlora.data.targets import TARGETS, read_targets
from fedlora.data.values import as_names, as_texts, class_names, refuse_empty
from fedlora.errors import ConfigError, shown

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
ROW = "row"
"""The number of a conversation in its table, counted from 1, by which an error names it."""
NATURAL = "natural"
UNIT, EACH_ROW = "unit", ":row"
"""Whose an example is, where ``privacy.unit-column`` says so; and its value by which each row is a unit."""
BY_NATURE = (NATURAL, "natural-dirichlet")
"""Partitioners that go by the values of ``data.partition-by``."""


@dataclass(frozen=True, slots=True)
class Columns:
    """Columns of a dataset by the part that they play; empty where there is none.

    Attributes:
        texts: one column, or two for sentence pairs; of conversations up to three.
        label: the label; empty where examples have none; of targets one column or more.
        domain: by what accuracy is also reported.
        group: what must not be split between train and test.
        natural: the column whose values are the clients, where that is none of the other parts.
        conversations: the texts are conversations, see `fedlora.data.chat.conversations`: a column of
            messages, or prompt and response, or prompt, input and response.
        unit: the column whose values are the units of example-level privacy, or `EACH_ROW`.
        preferences: the conversations are pairs, see `fedlora.data.chat.preferences`.
        targets: the kind of targets that labels are, see `fedlora.data.targets`; empty where they are names.
        written: the value of ``data.text-column``, which may be one column's name with a comma in it.
    """

    texts: tuple[str, ...]
    label: str
    domain: str
    group: str
    natural: str
    conversations: bool = False
    unit: str = ""
    preferences: bool = False
    targets: str = ""
    written: str = ""

    @classmethod
    def of(cls, config: DataConfig, *, labelled: bool = True, conversations: bool = False) -> Columns:
        """The columns that a configuration names; a built-in dataset brings its own domain and group.

        Where examples have no label their clients are always a part of their own, since one example may be
        made of several rows.

        Raises:
            ConfigError: no text column.
        """
        texts, written = name_list(config.text_column), config.text_column
        if not texts:
            raise _miscounted(written)
        domain, group = BUILT_IN.get(config.name, (config.domain_column, config.group_column))
        by = config.partition_by if config.partitioner in BY_NATURE else ""
        if not labelled:
            natural = "" if by == "domain" and domain else (by == "group" and group) or by
            return cls(
                texts, "", domain, group, natural=natural, conversations=conversations, written=written
            )
        known = {"label": config.label_column, "domain": domain, "group": group}.get(by)
        return cls(texts, config.label_column, domain, group, natural="" if known else by, written=written)

    def of_preferences(self) -> Columns:
        """The same for pairs of answers.

        Raises:
            ConfigError: one column, which is not where they are called as usual.
        """
        if len(self.texts) == 1 and self.texts != DEFAULT_TEXTS:
            raise ConfigError(
                f"{KEY} = {self.texts[0]!r}: must name prompt, chosen and rejected, or chosen and rejected"
            )
        return replace(self, preferences=True)

    def settled(self, names: Sequence[str]) -> Columns:
        """With the texts as a table of these columns has them.

        One column that is called as is written, letter for letter; conversations by their usual names, where
        the configuration names none.

        Raises:
            ConfigError: more text columns than there can be.
        """
        if not self.texts:
            return self
        if self.conversations and self.texts == DEFAULT_TEXTS:
            usual = next((u for u in PREFERENCES if set(u) <= set(names)), PREFERENCES[0])
            return replace(self, texts=usual if self.preferences else usual_columns(names) or self.texts)
        texts = (self.written,) if self.written and self.written in names else self.texts
        if len(texts) > (3 if self.conversations else 2):
            raise _miscounted(self.written)
        return replace(self, texts=texts)

    def parts(self) -> dict[str, tuple[str, str]]:
        """Our name -> (the key that names the dataset's column, that column); parts in use only."""
        parts = {name: (KEY, text) for name, text in zip(TEXTS, self.texts, strict=False)}
        parts["label"] = ("data.label-column", "" if self.targets else self.label)
        parts["domain"] = ("data.domain-column", self.domain)
        parts["group"] = ("data.group-column", self.group)
        parts[NATURAL] = ("data.partition-by", self.natural)
        parts[UNIT] = ("privacy.unit-column", "" if self.unit == EACH_ROW else self.unit)
        return {name: (key, column) for name, (key, column) in parts.items() if column}


def _miscounted(written: str) -> ConfigError:
    return ConfigError(f"{KEY} = {written!r}: must name one column, or two for sentence pairs")


def standard(table: Dataset, columns: Columns, where: str) -> pa.Table:
    """The parts in use under our names, large strings: texts as they stand, names without blanks around them.

    Of conversations also `ROW`, the number of each.

    Raises:
        ConfigError: no rows, a missing column, an empty value, one that is no text or no name, a row that is
            no conversation.
    """
    if len(table) == 0:
        raise ConfigError(f"data: {where} holds no examples")
    columns = columns.settled(table.column_names)
    used = columns.parts()
    for key, column in [*used.values(), *((KEY, text) for text in columns.texts)]:
        if column not in table.column_names:
            raise ConfigError(
                f"{key} = {column!r}: no such column in {where}, it has {', '.join(table.column_names)}"
            )
    texts: dict[str, pa.ChunkedArray] = {}
    if columns.conversations:
        read = preference_texts if columns.preferences else conversation_texts
        texts = read(table, columns.texts, where)
        columns = replace(columns, texts=tuple(texts))
        used = columns.parts()
    arrow: pa.Table = table.with_format("arrow").select_columns(sorted({c for _, c in used.values()}))[:]
    parts = {}
    for name, (key, column) in used.items():
        values = texts[column] if name in TEXTS and texts else arrow[column]
        parts[name] = _read(values, name, table, key, column, where)
        refuse_empty(parts[name], key, column, where)
    if columns.targets:
        parts[TARGETS] = pa.chunked_array([read_targets(table, columns.label, columns.targets, where)])
    if texts:
        parts[ROW] = pa.chunked_array([np.arange(1, len(table) + 1)])
    if columns.unit == EACH_ROW:
        parts[UNIT] = pa.chunked_array([np.arange(1, len(table) + 1)]).cast(pa.large_string())
    return pa.table(parts)


def names_in(table: pa.Table) -> dict[str, tuple[str, ...]]:
    """Part -> its names in order: the clients that there can be, whatever becomes of their rows.

    Two names that differ in nothing but how Unicode writes them stay two, and are told of.
    """
    parts = [part for part in ("label", "domain", "group", NATURAL) if part in table.column_names]
    names = {part: tuple(in_order(table[part].to_pylist())) for part in parts}
    for part, found in names.items():
        alike: dict[str, str] = {}
        for name in found:
            other = alike.setdefault(unicodedata.normalize("NFKC", name), name)
            if other != name:
                warnings.warn(
                    f"data: the {part} names {other!a} and {name!a} look alike, they are taken for two",
                    stacklevel=2,
                )
    return names


def encode_labels(
    tables: Sequence[pa.Table], source: Dataset, columns: Columns, where: Sequence[str]
) -> tuple[list[pa.Table], tuple[str, ...]]:
    """The tables with labels 0 .. K-1, and the K names; the first table decides which labels exist.

    A dataset that names its classes keeps its own order, and test examples may hold their numbers; else names
    are sorted. ``where`` each table is from stands in an error.

    Raises:
        ConfigError: a label unknown to the first table.
    """
    own = _class_names(source, columns.label)
    names = own or in_order(tables[0]["label"].to_pylist())
    key = f"data.label-column = {columns.label!r}"
    encoded = []
    for table, place in zip(tables, where, strict=True):
        codes = label_codes(
            table["label"], names, f"{key}: {place}", "the training examples have", by_number=bool(own)
        )
        encoded.append(table.set_column(table.column_names.index("label"), "label", codes))
    return encoded, tuple(names)


def label_codes(
    labels: pa.ChunkedArray, names: Sequence[str], where: str, source: str, *, by_number: bool = True
) -> pa.Array:
    """The number of each label, int64: all labels are names, or all are the numbers 0 .. K-1 of names.

    Numbers are never read so where a name is a number itself, for then they could mean either.

    Args:
        labels: what a file says.
        names: the K names that are known, in order.
        where: the file, as an error begins.
        source: who knows the names, in an error.
        by_number: whether labels may be numbers of names.

    Raises:
        ConfigError: a label is neither, with its row.
    """
    numbers = [str(number) for number in range(len(names))]
    found = pc.unique(labels).to_pylist()
    known = numbers if by_number and not any(map(_is_number, names)) and {*found} <= {*numbers} else names
    codes = pc.index_in(labels, pa.array(known, pa.large_string()))
    if codes.null_count:
        row = pc.index(pc.is_null(codes), True).as_py()
        raise ConfigError(
            f"{where} holds {labels[row].as_py()!r} in row {row + 1}, {source} {len(names)} labels: "
            f"{shown(names)}"
        )
    return codes.cast(pa.int64())


def _is_number(name: str) -> bool:
    try:
        int(name)
    except ValueError:
        return False
    return True


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


def _class_names(table: Dataset, column: str) -> list[str]:
    """The names of a column's classes, where the dataset stores them by number; else none."""
    return list(getattr(table.features[column], "names", None) or ())


def _read(values: pa.ChunkedArray, name: str, table: Dataset, key: str, column: str, where: str) -> Any:
    """A column in one of our parts as large strings."""
    if name in TEXTS:
        return as_texts(values, key, column, where)
    if classes := _class_names(table, column):
        return class_names(values, classes, key, column, where)
    return as_names(values, key, column, where)
