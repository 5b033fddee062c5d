"""The mod in a plain PEFT app: base-moving rules compute the dense values, and no scaling is guessed."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from peft import PeftModel, get_peft_model_state_dict
from torch import Tensor

from clients.mod import base_mod
from fedlora.core.state import ClientSpec
from fedlora.errors import RunFailed
from fedlora.models.arrays import load_arrays
from fedlora.models.peft_model import moving_base
from strategies import FedAvg, FedExLoRA, FedMomentum, FedSB, FedSVDRenew, FLoRA, FLoRIST
from strategies.flower import FactorStrategy
from tests.federation.test_anybodys_app import ALPHA, INPUTS, RANK, federate, peft_model, plain_app
from tests.federation.test_global_arrays import DenseServer

SCALING = ALPHA / RANK
ATTENTION = "bert.encoder.layer.0.attention.self.query"
MOVING = [FLoRA, FLoRIST, FedExLoRA, FedMomentum, FedSVDRenew]


def logits(model: PeftModel) -> Tensor:
    with torch.no_grad():
        return model(input_ids=INPUTS).logits


def dense_logits(server: DenseServer, state_head: dict[str, Tensor]) -> Tensor:
    """The pristine base with the oracle's change in its weights and the head, and no adapter at all."""
    model = peft_model().unload()
    for name, change in server.total.items():
        layer = model.get_submodule(name)
        layer.weight.data = layer.weight.data + torch.from_numpy(change).float()
    for name, tensor in state_head.items():
        module, _, kind = name.rpartition(".")
        getattr(model.get_submodule(module), kind).data = tensor
    with torch.no_grad():
        return model(input_ids=INPUTS).logits


def with_mod(
    strategy: FactorStrategy, directory: Path, model: PeftModel, frozen: str = "", rounds: int = 3
) -> ArrayRecord:
    app = plain_app(model, frozen, [base_mod(lambda context: model, directory)])
    return federate(strategy, app, model, rounds)


@pytest.mark.parametrize("named", MOVING)
def test_a_base_moving_rule_in_a_plain_app_is_the_dense_computation(
    named: type[FactorStrategy], tmp_path: Path
) -> None:
    """The arrays, in a fresh PEFT model over the pristine base, predict what the dense weights predict."""
    strategy = named(scaling=SCALING)
    server = DenseServer(strategy)
    arrays = with_mod(strategy, tmp_path, peft_model(), "lora_A" if named is FedSVDRenew else "")
    assert strategy.report.refused == {}
    assert strategy.state is not None
    fresh = peft_model()
    untrained = logits(fresh)
    load_arrays(fresh, arrays)
    wanted = dense_logits(server, strategy.state.head)
    torch.testing.assert_close(logits(fresh), wanted, rtol=1e-4, atol=1e-4)
    assert (wanted - untrained).abs().max() > 1e-2


def test_the_clients_base_holds_the_patches_and_goes_back_when_arrays_are_loaded(tmp_path: Path) -> None:
    model, strategy = peft_model(), FLoRA(scaling=SCALING)
    pristine = {k: v.clone() for k, v in model.state_dict().items() if "base_layer" in k}
    arrays = with_mod(strategy, tmp_path, model)
    assert moving_base(model).version == 2
    fresh = peft_model()
    load_arrays(fresh, arrays)
    load_arrays(model, arrays)
    torch.testing.assert_close(logits(model), logits(fresh))
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in pristine.items())


def test_a_second_run_with_the_same_model_starts_from_its_pristine_base(tmp_path: Path) -> None:
    model = peft_model()
    initial = {k: v.clone() for k, v in get_peft_model_state_dict(model).items()}
    first = with_mod(FLoRA(scaling=SCALING), tmp_path / "1", model)
    load_arrays(model, initial)
    second = with_mod(FLoRA(scaling=SCALING), tmp_path / "2", model)
    assert all((first[k].numpy() == second[k].numpy()).all() for k in first)


WRONG: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "forgotten": ({}, {}, r"scaling is 2 \(lora_alpha 8, r 4\), the strategy's 1: set scaling=2 in"),
    "wrong": ({}, {"scaling": 4.0}, r"scaling is 2 .*, the strategy's 4: set scaling=2 in"),
    "rslora": ({"use_rslora": True}, {"scaling": 2.0}, r"scaling is 4 \(lora_alpha 8, r 4, use_rslora\)"),
    "alpha_pattern": (
        {"alpha_pattern": {"layer.1.attention.self.query": 16}}, {"scaling": 2.0},
        r"layer\.1\.attention\.self\.query: .* is 4 \(lora_alpha 16.* one scaling for all layers",
    ),
    "alpha_pattern of all": (
        {"alpha_pattern": {"query": 16, "value": 16}}, {"scaling": 2.0}, r"scaling is 4 .* set scaling=4",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("named", "case"), [*((FLoRA, case) for case in WRONG), (FedAvg, "forgotten")])
def test_another_scaling_than_the_models_is_refused_in_round_1(
    named: type[FactorStrategy], case: str, tmp_path: Path
) -> None:
    lora, options, message = WRONG[case]
    model = peft_model(**lora)
    with pytest.raises(RunFailed, match=rf"^round 1: .*bert\.encoder\..*{message}") as caught:
        with_mod(named(**options), tmp_path, model)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("lora", "scaling"),
    [
        ({"use_rslora": True}, ALPHA / math.sqrt(RANK)),
        ({"r": 8, "rank_pattern": {"query": RANK, "value": RANK}}, 2.0),
        ({"alpha_pattern": {"query": 12, "value": 12}}, 3.0),
        ({"r": 3, "lora_alpha": 1}, 1 / 3),
    ],
)
def test_the_right_scaling_is_accepted(lora: dict[str, Any], scaling: float, tmp_path: Path) -> None:
    strategy = FLoRA(scaling=scaling)
    with_mod(strategy, tmp_path, peft_model(**lora), rounds=1)
    assert strategy.report.refused == {}


def test_another_rank_than_the_models_is_refused_in_round_1(tmp_path: Path) -> None:
    model = peft_model()
    app = plain_app(model, "", [base_mod(lambda context: peft_model(r=8, lora_alpha=16), tmp_path)])
    with pytest.raises(RunFailed, match="same object for every message"):
        federate(FLoRA(scaling=SCALING), app, model, 1)
    other = peft_model(r=8, lora_alpha=16)
    app = plain_app(model, "", [base_mod(lambda context: other, tmp_path)])
    with pytest.raises(RunFailed, match="the PEFT model has rank 8, the strategy sent rank 4: set r=4 in"):
        federate(FLoRA(scaling=SCALING), app, model, 1)


def test_a_core_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(RunFailed, match="PEFT has no core between A and B: use fedlora's ClientApp"):
        with_mod(FedSB(scaling=SCALING), tmp_path, peft_model())


@pytest.mark.parametrize("named", [FLoRA, FedExLoRA, FedMomentum])
def test_mixed_ranks_in_a_plain_app_are_the_dense_computation(
    named: type[FactorStrategy], tmp_path: Path
) -> None:
    """Each node makes its PEFT model by its partition, alpha alike, so that each has a scaling of its own."""
    ranks = (4, 1, 3)
    models = [peft_model(r=rank) for rank in ranks]
    apps = [
        plain_app(model, "", [base_mod(lambda context, model=model: model, tmp_path / str(k))])
        for k, model in enumerate(models)
    ]
    strategy = named(
        scaling=SCALING,
        client_spec=lambda p: ClientSpec(partition_id=p, rank=ranks[p], scaling=ALPHA / ranks[p]),
    )
    server = DenseServer(strategy)

    def app(message: Message, context: Context) -> Message:
        return apps[int(context.node_config["partition-id"])](message, context)

    arrays = federate(strategy, app, models[0], 3)
    assert strategy.report.refused == {}
    assert strategy.state is not None
    fresh = peft_model()
    load_arrays(fresh, arrays)
    wanted = dense_logits(server, strategy.state.head)
    torch.testing.assert_close(logits(fresh), wanted, rtol=1e-4, atol=1e-4)


def test_a_base_that_takes_no_patch_is_refused_in_round_1(tmp_path: Path) -> None:
    """Of a rule that moves it; another one trains over it."""
    model = peft_model()
    layer = model.get_base_model().get_submodule(ATTENTION).base_layer
    layer.weight = torch.nn.Parameter(torch.zeros(8, 1, dtype=torch.uint8), requires_grad=False)
    seen: list[str] = []

    def app(message: Message, context: Context) -> Message:
        def train(message: Message, context: Context) -> Message:
            seen.append(message.metadata.message_type)
            arrays = message.content["arrays"]
            metrics = MetricRecord({"num-examples": 1})
            return Message(RecordDict({"arrays": arrays, "metrics": metrics}), reply_to=message)

        return base_mod(lambda context: model, tmp_path)(message, context, train)

    with pytest.raises(RunFailed, match=rf"^round 1: .*{ATTENTION} is held in 4 bits"):
        federate(FLoRA(scaling=SCALING), app, model, 1)
    assert seen == []
    federate(FedAvg(scaling=SCALING), app, model, 1)
    assert seen.count("train") == 3
