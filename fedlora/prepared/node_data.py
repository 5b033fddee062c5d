"""A node's own examples: read where they are, encoded into the node's own directory, never sent anywhere.

What the run decides is the task, the model (hence the tokenizer, or the form of pictures), the longest
sequence and the names of the labels. A node may lack some of the labels; one that the run does not know is
refused. Texts and conversations without labels are for tasks that have none. Pictures become those of
the model, see `fedlora.data.images.fitted`; they are in no domain.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from fedlora.assets.fetch import create_directory
from fedlora.config import DataConfig, name_list
from fedlora.core.files import file_stamps
from fedlora.data.chat.columns import usual_columns
from fedlora.data.chat.template import ChatSettings
from fedlora.data.columns import UNIT, Columns, in_order
from fedlora.data.examples import open_examples
from fedlora.data.split import split_table
from fedlora.data.targets import TARGETS, encode_targets
from fedlora.data.values import is_text
from fedlora.errors import ConfigError, OwnDataRefused, shown
from fedlora.prepared.cache import FORMAT, META, Prepared, tokenised
from fedlora.tasks import CLASSIFICATION, Task, task_named

if TYPE_CHECKING:
    from datasets import Dataset

TRAIN, TEST = "train.arrow", "test.arrow"
UNREADABLE = "this node's own data cannot be used, its log says why"


@dataclass(frozen=True, slots=True, kw_only=True)
class OwnData:
    """Location of a node's examples, as its owner gives it; see `clients.node_settings`.

    Attributes:
        path: a jsonl, csv, tsv or parquet file, a dataset directory, or one of pictures.
        text_column, image_column, label_column: as in ``data`` of a run; an empty label column for examples
            that have none.
        unit_column: as in ``privacy`` of a run.
        test_fraction: share kept from training where the dataset has no test split of its own.
        dataset_id: under which the privacy spent on it is written down.
        partition_id: the partition that it is in the federation.
        labels: the run's label names, in its order.
        home: where the tokenised examples go.
    """

    path: str
    text_column: str = "text"
    image_column: str = "image"
    label_column: str = "label"
    unit_column: str = ""
    test_fraction: float = 0.0
    dataset_id: str
    partition_id: int
    labels: tuple[str, ...] = ()
    home: Path


@dataclass(frozen=True, slots=True)
class Table:
    """A node's examples: text (and text_pair) or image, and label, as names, where they have one."""

    train: pa.Table
    test: pa.Table | None
    columns: tuple[str, ...]

    @property
    def labels(self) -> dict[str, int]:
        """Label -> number of training examples; empty where they have none."""
        if "label" not in self.train.column_names:
            return {}
        counts = self.train["label"].value_counts().to_pylist()
        return {entry["values"]: entry["counts"] for entry in sorted(counts, key=lambda e: str(e["values"]))}


def read_own(own: OwnData, task: Task | None = None, reader: Any = None) -> Table:
    """The examples, checked, for a task; without one for any that they may serve.

    Args:
        own: where they are.
        task: of the run.
        reader: of the run's model, see `fedlora.tasks.Task.reader`.

    Raises:
        OwnDataRefused: a missing file or column, an empty value, a text that is no text, a picture that
            cannot be decoded, no label where the task needs one.
    """
    if not Path(own.path).exists():
        raise OwnDataRefused(f"data = {own.path!r}: there is no such file or directory", UNREADABLE)
    try:
        return _read(own, task, reader)
    except ConfigError as error:
        raise OwnDataRefused(_in_own_terms(str(error)), UNREADABLE) from None


def own_data(
    own: OwnData,
    model: str,
    max_length: int,
    task: Task = CLASSIFICATION,
    chat: ChatSettings | None = None,
) -> Prepared:
    """The examples encoded for a model: all in partition ``own.partition_id``, the others are empty.

    ``chat`` is how the run writes conversations.

    Raises:
        OwnDataRefused: they cannot be read, or have a label that the run does not know.
    """
    reader = task.reader(model, chat)
    home = own.home / _key(own, task, max_length, reader.identity)

    def write(draft: Path) -> None:
        table = read_own(own, task, reader)
        for name, part in ((TRAIN, table.train), (TEST, table.test)):
            if part is not None:
                _write(draft / name, part, own, reader, max_length, task)
        (draft / META).write_text(json.dumps({"pad_token_id": reader.pad_token_id}))

    create_directory(home, write)
    return _open(home, own, task.name, reader.identity)


@lru_cache(maxsize=8)
def _open(home: Path, own: OwnData, task: str, reader: str) -> Prepared:
    train = open_examples(home / TRAIN)
    return Prepared(
        train=train,
        test=open_examples(home / TEST) if (home / TEST).exists() else train.none(),
        label_names=own.labels,
        domain_names=(),
        pad_token_id=json.loads((home / META).read_text())["pad_token_id"],
        flat=np.arange(len(train)),
        offsets=np.array([0] * (own.partition_id + 1) + [len(train)]),
        declared=own.dataset_id,
        task=task,
        reader=reader,
    )


def _read(own: OwnData, task: Task | None, reader: Any) -> Table:
    from fedlora.data.sources import open_source

    config = DataConfig(
        name=own.path,
        text_column=own.text_column,
        image_column=own.image_column,
        label_column=own.label_column,
    )
    source, own_test = open_source(config, labelled=bool(own.label_column) if task is None else task.labelled)
    served = task or _served(own, source)
    columns = _columns(own, config, served)

    def named(part: Dataset, where: str) -> pa.Table:
        return served.rows(part, columns, config, reader, where)

    train = named(source, repr(own.path))
    columns = replace(columns, unit="")  # only what is trained on is private
    test = None if own_test is None else named(own_test, f"the test examples of {own.path!r}")
    if test is None and own.test_fraction:
        train, test = split_table(train, own.test_fraction, "test-fraction")
    return Table(train, test, tuple(source.column_names))


def _served(own: OwnData, source: Dataset) -> Task:
    """A task that the examples may serve, as their columns show."""
    from fedlora.data.image_files import has_pictures

    texts = name_list(own.text_column)
    if has_pictures(source, own.image_column) and not set(texts) <= set(source.column_names):
        return task_named("image-classification")
    if own.label_column:
        return _labelled(source, name_list(own.label_column))
    if not set(texts) <= set(source.column_names) and usual_columns(source.column_names):
        return task_named("instruction")
    lists = any(
        not is_text(source.features.arrow_schema.field(name).type)
        for name in texts
        if name in source.features
    )
    return task_named("instruction" if lists or len(texts) > 1 else "causal-lm")


def _labelled(source: Dataset, columns: Sequence[str]) -> Task:
    """The task that labels may serve: of several columns or of fractions regression, of lists many labels."""
    kinds = [source.features.arrow_schema.field(c).type for c in columns if c in source.column_names]
    if any(pa.types.is_list(kind) or pa.types.is_large_list(kind) for kind in kinds):
        return task_named("multi-label-classification")
    numbers = len(columns) > 1 or any(pa.types.is_floating(kind) for kind in kinds)
    return task_named("regression") if numbers else CLASSIFICATION


def _columns(own: OwnData, config: DataConfig, task: Task) -> Columns:
    """Columns of a node's data; a node has no domains, groups or clients, but may have units."""
    if task.labelled and not own.label_column:
        raise ConfigError(f"label-column = '': {task.name} learns labels, name their column")
    return replace(task.columns(config), domain="", group="", natural="", unit=own.unit_column)


def _write(path: Path, table: pa.Table, own: OwnData, reader: Any, max_length: int, task: Task) -> None:
    from datasets import Dataset

    coded = Dataset(_coded(table, own) if task.labelled else table)
    units = {UNIT: in_order(table[UNIT].to_pylist())} if UNIT in table.column_names else {}
    try:
        batch = tokenised(coded, reader, max_length, units, f"encoding {len(table):,} own examples", task)
    except ConfigError as error:
        raise OwnDataRefused(_in_own_terms(str(error)), UNREADABLE) from None
    with pa.ipc.new_file(str(path), batch.schema) as file:
        file.write_batch(batch)


def _coded(table: pa.Table, own: OwnData) -> pa.Table:
    """With the run's number for each label, or its targets."""
    if TARGETS in table.column_names:
        try:
            return encode_targets([table], own.label_column, own.labels, [own.path])[0][0]
        except ConfigError as error:
            told = "this node's data has other targets than the run"
            raise OwnDataRefused(_in_own_terms(str(error)), told) from None
    codes: Mapping[str, int] = {name: code for code, name in enumerate(own.labels)}
    labels = table["label"].to_pylist()
    row = next((row for row, label in enumerate(labels) if label not in codes), None)
    if row is not None:
        odd, known = f"{labels[row]!r} in row {row + 1}", f"the run's labels are {shown(own.labels)}"
        raise OwnDataRefused(
            f"label-column = {own.label_column!r}: {own.path} holds {odd}, {known}",
            f"this node's data has labels that the run does not know, {known}",
        )
    numbers = pa.array([codes[label] for label in labels], pa.int64())
    return table.set_column(table.column_names.index("label"), "label", numbers)


def _in_own_terms(text: str) -> str:
    """A message about the keys of a run, said in those of a node."""
    for key, own in (
        ("data.name", "data"),
        ("data.text-", "text-"),
        ("data.image-", "image-"),
        ("data.label-", "label-"),
        ("privacy.unit-", "unit-"),
    ):
        text = text.replace(key, own)
    return text


def _key(own: OwnData, task: Task, max_length: int, reader: str) -> str:
    columns = [own.text_column, own.image_column, own.label_column]
    units = [own.unit_column] if own.unit_column else []
    settings = [own.path, *columns, *units, own.test_fraction, own.labels]
    text = json.dumps([FORMAT, task.name, *settings, file_stamps(own.path), max_length, reader])
    return hashlib.sha256(text.encode()).hexdigest()[:20]
