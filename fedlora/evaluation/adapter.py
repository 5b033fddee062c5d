"""``fedlora evaluate``: an exported adapter on the test examples of a dataset."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from clients.evaluation import evaluate
from fedlora.config import DataConfig, RunConfig, TrainConfig, name_list
from fedlora.core.files import user_path
from fedlora.data.columns import label_codes
from fedlora.data.targets import REGRESSION, check_columns
from fedlora.errors import ConfigError, shown
from fedlora.models import AdapterCard, check_fit
from fedlora.models.export import load_adapter
from fedlora.prepared.cache import open_prepared, prepare
from fedlora.server.records import summary
from fedlora.tasks import task_named, task_of


def evaluate_adapter(adapter: Path, name: str, *, text_column: str, label_column: str) -> dict[str, Any]:
    """Accuracy, loss, accuracy by domain and number of examples; of a language model also its perplexity.

    Args:
        adapter: a directory that `save_adapter` wrote.
        name: a built-in dataset or hub id (its test examples), or a file (all its rows).
        text_column: column with the text.
        label_column: column with the label: the adapter's label names, or in all rows their numbers. Columns
            of numbers are those of the adapter's names unless others are named.

    Raises:
        ConfigError: no adapter there, no such data, or a label that the adapter does not know.
    """
    card = AdapterCard.read(adapter)
    task = task_named(card.task)
    if task.problem_type == REGRESSION and label_column == DataConfig.label_column:
        label_column = ",".join(card.label_names)
    name = str(user_path(name)) if name.startswith("~") else name
    data = DataConfig(
        name=name,
        test=name if Path(name).is_file() else "",
        text_column=text_column,
        label_column=label_column,
        partitioner="iid",
        num_partitions=1,
        max_length=card.max_length,
        assistant_loss=card.assistant_loss,
    )
    train = TrainConfig(dpo_beta=card.dpo_beta)
    config = RunConfig(task=card.task, model=card.model, data=data, train=train, seed=card.seed)
    task = task_of(config)
    prepared = open_prepared(prepare(config, trained=False))
    test = prepared.test
    where = f"data.label-column = {label_column!r}: {name!r}"
    if test.targets is not None:
        test = dataclasses.replace(
            test, targets=_in_order(test.targets, prepared.label_names, card, label_column, where)
        )
    elif task.labelled:
        names = pa.chunked_array(
            [pa.array(prepared.label_names, pa.large_string()).take(pa.array(test.labels))]
        )
        codes = label_codes(names, card.label_names, where, "the adapter has")
        test = dataclasses.replace(test, labels=codes.to_numpy())
    model, _ = load_adapter(adapter)
    check_fit(card.model, model, prepared, card.max_length)
    outcome = evaluate(model, test, np.arange(len(test)), prepared.pad_token_id, task=task)
    return summary(outcome, prepared.domain_names, task)


def _in_order(
    targets: np.ndarray, names: Sequence[str], card: AdapterCard, label_column: str, where: str
) -> np.ndarray:
    """Targets of a file in the order of the adapter's outputs: columns as they are named, lists by name."""
    if tuple(names) == name_list(label_column):
        check_columns(names, card.label_names, where)
        return targets
    if unknown := [name for name in names if name not in card.label_names]:
        raise ConfigError(f"{where} holds {unknown[0]!r}, the adapter has {shown(card.label_names)}")
    ordered = np.zeros((len(targets), len(card.label_names)), dtype=np.float32)
    ordered[:, [card.label_names.index(name) for name in names]] = targets
    return ordered
