"""``fedlora evaluate``: an exported adapter on the test examples of a dataset."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np

from clients.evaluation import evaluate
from fedlora.config import DataConfig, RunConfig
from fedlora.data.prepared import open_prepared, prepare
from fedlora.errors import ConfigError
from fedlora.models import AdapterCard, check_fit, load_adapter
from fedlora.summaries import summary
from fedlora.tasks import task_named


def evaluate_adapter(adapter: Path, name: str, *, text_column: str, label_column: str) -> dict[str, Any]:
    """Accuracy, loss, accuracy by domain and number of examples; of a language model also its perplexity.

    Args:
        adapter: a directory that `save_adapter` wrote.
        name: a built-in dataset or hub id (its test examples), or a file (all its rows).
        text_column: column with the text.
        label_column: column with the label: the adapter's label names, or their numbers.

    Raises:
        ConfigError: no adapter there, no such data, or labels that the adapter does not know.
    """
    card = AdapterCard.read(adapter)
    data = DataConfig(
        name=name,
        test=name if Path(name).is_file() else "",
        text_column=text_column,
        label_column=label_column,
        partitioner="iid",
        num_partitions=1,
        max_length=card.max_length,
    )
    task = task_named(card.task)
    prepared = open_prepared(prepare(RunConfig(task=card.task, model=card.model, data=data, seed=card.seed)))
    test = prepared.test
    if task.labelled:
        translation = np.array([_label_number(label, card, name) for label in prepared.label_names])
        test = dataclasses.replace(test, labels=translation[test.labels])
    model, _ = load_adapter(adapter)
    check_fit(card.model, model, prepared, card.max_length)
    outcome = evaluate(model, test, np.arange(len(test)), prepared.pad_token_id, task=task)
    return summary(outcome, prepared.domain_names, task)


def _label_number(label: str, card: AdapterCard, where: str) -> int:
    if label in card.label_names:
        return card.label_names.index(label)
    if label.isdigit() and int(label) < len(card.label_names):
        return int(label)
    raise ConfigError(
        f"{where}: label {label!r} is unknown to the adapter, it knows {', '.join(card.label_names)}"
    )
