"""The strategies in an app that is not fedlora's: a plain PEFT ClientApp, as Flower's users write it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from transformers import BertConfig, BertForSequenceClassification

from strategies import FedAvg, FedSVD, FFALoRA, FLoRA, LoRAFAIR
from strategies.flower import FactorStrategy
from tests.federation.fake_grid import FakeGrid
from tests.federation.small import watched

RANK, ALPHA, CLIENTS = 4, 8, 3
INPUTS = torch.arange(24).reshape(4, 6) % 50


def peft_model(**options: Any) -> PeftModel:
    """A tiny random classifier with LoRA; ``options`` are of ``LoraConfig``."""
    torch.manual_seed(0)
    size = {
        "initializer_range": 0.4,
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 24,
    }
    base = BertForSequenceClassification(BertConfig(vocab_size=50, num_labels=3, **size)).eval()
    own = {"r": RANK, "lora_alpha": ALPHA, "target_modules": ["query", "value"], **options}
    return get_peft_model(base, LoraConfig(**own, modules_to_save=["classifier"])).eval()


def plain_app(model: PeftModel, frozen: str, mods: list[Callable[..., Message]]) -> ClientApp:
    """One SGD step on data that depends on the partition; ``frozen`` names factors that are not trained."""
    app = ClientApp(mods=mods)

    @app.train()
    def train(message: Message, context: Context) -> Message:
        set_peft_model_state_dict(model, message.content["arrays"].to_torch_state_dict())
        partition = int(context.node_config["partition-id"])
        trained = [p for n, p in model.named_parameters() if p.requires_grad and not (frozen and frozen in n)]
        optimizer = torch.optim.SGD(trained, lr=0.5)
        labels = (torch.arange(4) + partition) % 3
        loss = model(input_ids=(INPUTS + partition) % 50, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        arrays = ArrayRecord(get_peft_model_state_dict(model))
        metrics = MetricRecord({"num-examples": partition + 1})
        return Message(RecordDict({"arrays": arrays, "metrics": metrics}), reply_to=message)

    return app


def federate(
    strategy: FactorStrategy, app: Callable[..., Message], model: PeftModel, rounds: int
) -> ArrayRecord:
    def client(message: Message, partition: int) -> Message:
        context = Context(
            run_id=1,
            node_id=partition,
            node_config={"partition-id": partition},
            state=RecordDict(),
            run_config={},
        )
        return app(message, context)

    initial = ArrayRecord(get_peft_model_state_dict(model))
    return strategy.start(FakeGrid(range(CLIENTS), client), initial, num_rounds=rounds).arrays


@pytest.mark.parametrize(
    ("named", "frozen"), [(FedAvg, ""), (FFALoRA, "lora_A"), (LoRAFAIR, ""), (FedSVD, "lora_A")]
)
def test_a_plain_peft_app_works_and_its_model_takes_the_result(
    named: type[FactorStrategy], frozen: str, tmp_path: Path
) -> None:
    model = peft_model()
    before = model(input_ids=INPUTS).logits.detach().clone()
    strategy = named(scaling=ALPHA / RANK)
    reports = watched(strategy)
    arrays = federate(strategy, plain_app(model, frozen, []), model, rounds=3)
    assert all(report.refused == {} for report in reports)
    set_peft_model_state_dict(model, arrays.to_torch_state_dict())
    assert (model(input_ids=INPUTS).logits - before).abs().max() > 1e-3


def test_flora_refuses_a_plain_app_without_the_mod(tmp_path: Path) -> None:
    model = peft_model()
    from fedlora.errors import RunFailed

    with pytest.raises(RunFailed, match="round"):
        federate(FLoRA(scaling=ALPHA / RANK), plain_app(model, "", []), model, rounds=2)
