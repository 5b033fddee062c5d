"""The stock app reads what fedlora reads."""

from __future__ import annotations

import importlib
from typing import Any

import numpy as np
import pytest

from experiments.benchmarks.engine_cell import APP
from experiments.benchmarks.engine_micro import sentences
from fedlora.data.examples import Examples, collate


@pytest.fixture
def task(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(APP))
    return importlib.import_module("lora_app.task")


def test_its_batches_are_those_of_fedlora(task: Any) -> None:
    examples = Examples(
        tokens=np.arange(1, 13, dtype=np.int32),
        offsets=np.array([0, 3, 5, 12]),
        labels=np.array([1, 0, 1]),
        domains=np.zeros(3, dtype=np.int32),
    )
    ids, mask, labels = task.padded([task.Texts(examples, [2, 0, 1])[i] for i in range(3)])
    expected = collate(examples, [2, 0, 1], pad_token_id=0)
    assert ids.tolist() == expected["input_ids"].tolist()
    assert mask.tolist() == expected["attention_mask"].tolist()
    assert labels.tolist() == expected["labels"].tolist()


def test_made_up_sentences_are_enough_for_every_client() -> None:
    made = sentences(3, 100)
    assert len(made) == 96
    assert set(made.lengths.tolist()) == {32}
