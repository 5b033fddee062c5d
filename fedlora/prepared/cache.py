"""Prepared data: tokenised once for a model, partitioned once for a seed, opened by memory map.

``<cache>/prepared/<key>/`` holds train.arrow, test.arrow and meta.json, shared by all partitionings;
``<key>/<partition key>/`` holds partitions.npz and left_out.json and is the path that `prepare` returns.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from fedlora.assets.fetch import ASSETS, asset_identity, cache_dir, create_directory
from fedlora.config import DataConfig, RunConfig
from fedlora.core.files import file_stamps
from fedlora.data.chat.template import chat_settings
from fedlora.data.clients import named_clients, why_left_out
from fedlora.data.columns import NATURAL, UNIT, codes_of, in_order
from fedlora.data.examples import Examples, open_examples, with_form
from fedlora.data.targets import TARGETS
from fedlora.data.tokenizers import Tokenizer
from fedlora.errors import ConfigError
from fedlora.tasks import CLASSIFICATION, SINGLE_LABEL, Task, task_named

if TYPE_CHECKING:
    from datasets import Dataset

META, LEFT_OUT, SET = "meta.json", "left_out.json", "set-"
FORMAT = 5
"""Counted up whenever the same configuration would be prepared differently."""
BATCH = 1000

_PARTITION_KEYS = (
    "partitioner", "partition_by", "num_partitions", "dirichlet_alpha", "classes_per_partition",
    "min_partition_size", "partition_size",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Prepared:
    """Everything about the data that training and evaluation need.

    Attributes:
        train: the training examples of all clients.
        test: the test examples.
        label_names: name of each label; empty where examples have none.
        domain_names: name of each domain; empty where there are none.
        pad_token_id: what `collate` fills up with.
        flat: the indices of all partitions one after another, int64.
        offsets: partition i is ``flat[offsets[i]:offsets[i + 1]]``, int64.
        declared: the owner's name for the data where it is a node's own, see `fedlora.prepared.node_data`.
        task: what the examples were prepared for.
        left_out: partition -> why it has no example; it takes no part, and no other has its number.
        sets: further test examples, of ``data.evaluation-sets``, by name.
        reader: identity of what made the examples, see `fedlora.tasks.Task.reader`.
    """

    train: Examples
    test: Examples
    label_names: tuple[str, ...]
    domain_names: tuple[str, ...]
    pad_token_id: int
    flat: np.ndarray
    offsets: np.ndarray
    declared: str = ""
    task: str = CLASSIFICATION.name
    left_out: Mapping[int, str] = field(default_factory=dict)
    sets: Mapping[str, Examples] = field(default_factory=dict)
    reader: str = ""

    @property
    def clients(self) -> tuple[int, ...]:
        """The partitions that have examples."""
        return tuple(p for p in range(self.num_partitions) if p not in self.left_out)

    @property
    def num_labels(self) -> int:
        return len(self.label_names)

    @property
    def num_partitions(self) -> int:
        return len(self.offsets) - 1

    def indices(self, partition_id: int) -> np.ndarray:
        """The training examples of one client, sorted.

        Raises:
            ConfigError: no such partition.
        """
        if not 0 <= partition_id < self.num_partitions:
            raise ConfigError(
                f"partition {partition_id}: there are partitions 0 to {self.num_partitions - 1}"
            )
        return self.flat[self.offsets[partition_id] : self.offsets[partition_id + 1]]

    def num_protected(self, partition_id: int) -> int:
        """How many units of privacy one client has: people where a column names them, else examples."""
        indices, units = self.indices(partition_id), self.train.units
        return len(indices) if units is None else len(np.unique(units[indices]))


def open_prepared(path: Path | str) -> Prepared:
    """Reads prepared data; imports neither datasets nor transformers.

    Raises:
        ConfigError: nothing prepared lies there.
    """
    home = Path(path)
    if not (home / "partitions.npz").is_file():
        raise ConfigError(f"prepared data {str(home)!r}: not there, or not a prepared directory")
    meta = json.loads((home.parent / META).read_text())
    with np.load(home / "partitions.npz", allow_pickle=False) as arrays:
        flat, offsets = arrays["indices"], arrays["offsets"]
    return Prepared(
        train=open_examples(home.parent / "train.arrow"),
        test=open_examples(home.parent / "test.arrow"),
        label_names=tuple(meta["label_names"]),
        domain_names=tuple(meta["domain_names"]),
        pad_token_id=meta["pad_token_id"],
        flat=flat,
        offsets=offsets,
        task=meta.get("task", CLASSIFICATION.name),
        left_out={int(p): why for p, why in json.loads((home / LEFT_OUT).read_text()).items()},
        sets={name: open_examples(home.parent / f"{SET}{name}.arrow") for name in meta.get("sets", ())},
        reader=meta["tokenizer"],
    )


def prepare(config: RunConfig, tokenizer: Tokenizer | None = None, *, trained: bool = True) -> Path:
    """The prepared directory of a configuration, written on first use and then found again.

    The seed decides the partitioning only.

    Args:
        config: of the run.
        tokenizer: that of ``model.name`` unless given.
        trained: a model is to learn the labels, so that there must be two; one alone can be evaluated.

    Raises:
        ConfigError: data, tokenizer or partitioning cannot be had as asked.
        AssetError: something could not be fetched.
    """
    task = task_named(config.task)
    tokenizer = tokenizer or task.reader(config.model.name, chat_settings(config))
    unit = config.privacy.unit_column
    home = cache_dir() / "prepared" / _token_key(config.data, tokenizer, task, unit)
    create_directory(home, lambda draft: _write_examples(task, config.data, tokenizer, draft, unit))
    if trained and task.problem_type == SINGLE_LABEL:
        _check_labels(config.data, json.loads((home / META).read_text())["label_names"])
    path = home / _partition_key(config)
    create_directory(path, lambda draft: _write_partitions(config, home, draft))
    return path


def _check_labels(config: DataConfig, names: Sequence[str]) -> None:
    if len(names) < 2:
        raise ConfigError(
            f"data.label-column = {config.label_column!r}: {config.name!r} has one label only, {names[0]!r}"
        )


def _token_key(config: DataConfig, tokenizer: Tokenizer, task: Task = CLASSIFICATION, unit: str = "") -> str:
    shared = {k: v for k, v in dataclasses.asdict(config).items() if k not in _PARTITION_KEYS}
    for key in ("evaluate_examples", "public"):
        shared.pop(key)
    if not config.evaluation_sets:
        shared.pop("evaluation_sets")
    natural = task.columns(config).natural
    named = (config.name, config.test, *config.evaluation_files.values())
    files = [file_stamps(name) for name in named]
    asset = asset_identity(config.name) if config.name in ASSETS else ""
    name = [] if task is CLASSIFICATION else [task.name]
    units = [{"unit": unit}] if unit else []
    return _hash(FORMAT, shared, natural, files, asset, tokenizer.identity, *name, *units)


def _partition_key(config: RunConfig) -> str:
    return _hash(FORMAT, config.seed, {key: getattr(config.data, key) for key in _PARTITION_KEYS})


def _hash(*parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:20]


def _write_examples(
    task: Task, config: DataConfig, tokenizer: Tokenizer, draft: Path, unit: str = ""
) -> None:
    raw = task.load(config, tokenizer, unit)
    names, counts = {}, {}
    for column in ("domain", "group", NATURAL, UNIT):
        if column in raw.train.column_names:
            tables = [t for t in (raw.train, raw.test, *raw.sets.values()) if column in t.column_names]
            held = (value for table in tables for value in table[column][:])
            names[column] = in_order({*held, *raw.names.get(column, ())})
    sets = {f"{SET}{name}": table for name, table in raw.sets.items()}
    for part, table in {"train": raw.train, "test": raw.test, **sets}.items():
        line = f"encoding {len(table):,} {part} examples of {config.name}"
        batch = tokenised(table, tokenizer, config.max_length, names, line, task)
        counts[part] = batch.num_rows
        with pa.ipc.new_file(str(draft / f"{part}.arrow"), batch.schema) as file:
            file.write_batch(batch)
    meta = {
        "format": FORMAT,
        "task": task.name,
        "source": config.name,
        "label_names": raw.label_names,
        "domain_names": names.get("domain", []),
        "pad_token_id": tokenizer.pad_token_id,
        "num_train": counts["train"],
        "num_test": counts["test"],
        "sets": list(raw.sets),
        "max_length": config.max_length,
        "tokenizer": tokenizer.identity,
        "clients": {
            part: named_clients(
                known, raw.label_names if part == "label" else names[part], raw.train[part][:]
            )
            for part, known in raw.names.items()
        },
    }
    (draft / META).write_text(json.dumps(meta, indent=1) + "\n")


def tokenised(
    table: Dataset,
    tokenizer: Tokenizer,
    max_length: int,
    names: dict[str, list[str]],
    line: str,
    task: Task = CLASSIFICATION,
) -> Any:
    """One record batch: input_ids, label, domain (-1 if none), and codes of group, natural and unit.

    And, as long as input_ids, ``counted`` where the task says which tokens count, and ``types`` where the
    tokens are not all of type 0.
    """
    encoded = task.encode(_tracked(table.iter(BATCH), -(-len(table) // BATCH), line), tokenizer, max_length)
    rows = encoded.rows
    offsets = np.concatenate([[0], np.cumsum([len(values) for values in encoded.values])])
    known = "label" in table.column_names
    labels = np.asarray(table["label"][:]) if known else np.zeros(len(table), dtype=np.int64)
    columns = {
        "input_ids": pa.LargeListArray.from_arrays(offsets, np.concatenate(encoded.values)),
        "label": labels[rows],
        "domain": np.full(len(rows), -1, dtype=np.int32),
        **{
            column: codes_of(table[column][:], values)[rows]
            for column, values in names.items()
            if column in table.column_names
        },
    }
    for name, by_token in (("counted", encoded.counted), ("types", encoded.types)):
        if by_token is not None:
            columns[name] = pa.LargeListArray.from_arrays(offsets, np.concatenate(by_token))
    if encoded.splits is not None:
        columns["split"] = np.array(encoded.splits, dtype=np.int64)
    batch = pa.record_batch({name: pa.array(values) for name, values in columns.items()})
    if TARGETS in table.column_names:
        lists = table.with_format("arrow")[:][TARGETS].combine_chunks().take(pa.array(rows))
        batch = batch.append_column(TARGETS, lists.cast(pa.list_(pa.float32(), lists.type.list_size)))
    return with_form(batch, encoded.image)


def _tracked(batches: Iterable[Any], total: int, line: str) -> Iterable[Any]:
    """The batches, with a progress bar on a terminal, else after one plain line; both on stderr."""
    from rich.console import Console
    from rich.progress import track

    console = Console(stderr=True, markup=False, emoji=False)
    if not console.is_terminal:
        print(line, file=sys.stderr, flush=True)
        return batches
    return track(batches, line, total, console=console)


def _write_partitions(config: RunConfig, home: Path, draft: Path) -> None:
    from datasets import Dataset

    from fedlora.data.partition import natural_column, partition

    with pa.ipc.open_file(pa.memory_map(str(home / "train.arrow"))) as file:
        table = file.read_all()
    by_token = [n for n in table.column_names if n in ("input_ids", "counted", "types", "split", TARGETS)]
    clients = json.loads((home / META).read_text())["clients"]
    known = {column: np.array(of["codes"]) for column, of in clients.items()}
    parts = partition(Dataset(table.drop_columns(by_token)), config.data, config.seed, known)
    ends = np.cumsum([0, *map(len, parts)])
    np.savez(draft / "partitions.npz", indices=np.concatenate(parts), offsets=ends)
    column = natural_column(table.column_names, config.data)
    held = set(table[column].unique().to_pylist()) if column in clients else set()
    left_out = why_left_out(parts, clients.get(column, {}), held, config.data)
    (draft / LEFT_OUT).write_text(json.dumps(left_out) + "\n")
