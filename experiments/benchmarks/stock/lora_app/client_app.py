"""The stock client: for every message it builds the model, loads its data, trains and sends the adapter."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from itertools import islice
from typing import Any

import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from opacus import PrivacyEngine
from peft import get_peft_model_state_dict, set_peft_model_state_dict
from torch.nn.functional import cross_entropy

from lora_app.task import build_model, load_train, setting_of

app = ClientApp()


@app.train()
def train(message: Message, context: Context) -> Message:
    """Local steps from the global adapter."""
    setting = setting_of(context)
    model = build_model(setting)
    set_peft_model_state_dict(model, message.content["arrays"].to_torch_state_dict())
    model.to(setting["device"]).train()
    loader = load_train(setting, int(context.node_config["partition-id"]))
    fit = fit_private if setting["private"] else fit_plain
    metrics = fit(model, loader, setting)
    content = RecordDict(
        {
            "arrays": ArrayRecord(get_peft_model_state_dict(model)),
            "metrics": MetricRecord({**metrics, "num-examples": len(loader.dataset)}),
        }
    )
    return Message(content=content, reply_to=message)


def fit_plain(model: Any, loader: Any, setting: dict[str, Any]) -> dict[str, float]:
    """AdamW."""
    optimizer = adamw(model, setting)
    total = 0.0
    for ids, mask, labels in batches(loader, setting):
        optimizer.zero_grad()
        loss = cross_entropy(model(input_ids=ids, attention_mask=mask).logits, labels)
        loss.backward()
        optimizer.step()
        total += loss.item()
    return {"train-loss": total / setting["local-steps"]}


def fit_private(model: Any, loader: Any, setting: dict[str, Any]) -> dict[str, float]:
    """DP-SGD by Opacus' PrivacyEngine, and the epsilon of this round."""
    warnings.filterwarnings("ignore", module="opacus|torch")
    engine = PrivacyEngine()
    private, optimizer, loader = engine.make_private(
        module=model,
        optimizer=adamw(model, setting),
        data_loader=loader,
        noise_multiplier=setting["noise-multiplier"],
        max_grad_norm=setting["max-grad-norm"],
    )
    for ids, mask, labels in batches(loader, setting):
        optimizer.zero_grad()
        if len(labels):  # an empty draw costs this app nothing
            cross_entropy(private(input_ids=ids, attention_mask=mask).logits, labels).backward()
            optimizer.step()
    return {"epsilon": engine.get_epsilon(setting["delta"])}


def adamw(model: Any, setting: dict[str, Any]) -> torch.optim.Optimizer:
    """A new optimiser over what is trained."""
    trained = [p for p in model.parameters() if p.requires_grad]
    return torch.optim.AdamW(trained, lr=setting["learning-rate"], weight_decay=0.0)


def batches(loader: Any, setting: dict[str, Any]) -> Iterator[list[torch.Tensor]]:
    """The local steps' batches, in as many passes as they take."""

    def passes() -> Iterator[Any]:
        while True:
            yield from loader

    for batch in islice(passes(), setting["local-steps"]):
        yield [tensor.to(setting["device"]) for tensor in batch]
