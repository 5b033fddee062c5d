"""Model and data of the stock app."""

from __future__ import annotations

import os
import tomllib
from pathlib import Path
from typing import Any

import torch
from flwr.app import Context
from peft import LoraConfig, get_peft_model
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from transformers import AutoModelForSequenceClassification

from fedlora.data.examples import Examples
from fedlora.prepared.cache import open_prepared

SETTING = "STOCK_APP_SETTING"
Row = tuple[Tensor, Tensor]


def setting_of(context: Context) -> dict[str, Any]:
    """The run-config; ``run_simulation`` has none, there a file takes its place."""
    return dict(context.run_config) or tomllib.loads(Path(os.environ[SETTING]).read_text())


def build_model(setting: dict[str, Any]) -> Any:
    """The base with an adapter; dropout is off, as in what it is compared with."""
    base = AutoModelForSequenceClassification.from_pretrained(
        setting["model"], num_labels=2, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0
    )
    return get_peft_model(
        base, LoraConfig(task_type="SEQ_CLS", r=setting["rank"], lora_alpha=setting["alpha"])
    )


class Texts(Dataset[Row]):
    """Some of the tokenised examples."""

    def __init__(self, examples: Examples, indices: Any) -> None:
        self.examples, self.chosen = examples, indices

    def __len__(self) -> int:
        return len(self.chosen)

    def __getitem__(self, position: int) -> Row:
        index = int(self.chosen[position])
        ids = torch.from_numpy(self.examples.input_ids(index).astype("int64"))
        return ids, torch.tensor(int(self.examples.labels[index]))


def padded(rows: list[Row]) -> tuple[Tensor, Tensor, Tensor]:
    """``input_ids``, ``attention_mask`` and labels of a batch; the model's padding token is 0."""
    ids = torch.nn.utils.rnn.pad_sequence([ids for ids, _ in rows], batch_first=True)
    lengths = torch.tensor([len(ids) for ids, _ in rows])
    mask = (torch.arange(ids.shape[1]) < lengths[:, None]).long()
    return ids, mask, torch.stack([label for _, label in rows])


def load_train(setting: dict[str, Any], partition_id: int) -> DataLoader[Any]:
    """The batches of one client."""
    prepared = open_prepared(setting["data"])
    texts = Texts(prepared.train, prepared.indices(partition_id))
    return DataLoader(texts, batch_size=setting["batch-size"], shuffle=True, collate_fn=padded)


def load_test(setting: dict[str, Any]) -> DataLoader[Any]:
    """The test examples, in one batch."""
    test = open_prepared(setting["data"]).test
    return DataLoader(Texts(test, range(len(test))), batch_size=len(test), collate_fn=padded)
