"""Our factors mean what PEFT means, for both layer types and both scalings."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import LoraConfig as PeftLoraConfig
from peft import get_peft_model
from torch import nn

from fedlora.config import LoraConfig, ModelConfig
from fedlora.core.factors import LoraFactors
from fedlora.models import build_model, resolve_targets
from fedlora.models.layers import oriented
from tests.models.samples import adapted, logits, random_adapters, token_batch


@pytest.mark.parametrize("use_rslora", [False, True])
@pytest.mark.parametrize("kind", ["linear", "conv1d"])
def test_delta_is_pefts_delta_weight(kind: str, use_rslora: bool, gpt2: Path) -> None:
    name = "tiny" if kind == "linear" else str(gpt2)
    module = build_model(ModelConfig(name=name), 2, 0)
    targets = resolve_targets(module, "intermediate.dense" if kind == "linear" else "c_attn")
    config = PeftLoraConfig(
        r=3,
        lora_alpha=7,
        use_rslora=use_rslora,
        target_modules=list(targets),
        fan_in_fan_out=kind == "conv1d",
        init_lora_weights=False,
    )
    layer = get_peft_model(module, config).base_model.model.get_submodule(targets[0])
    scaling = LoraConfig(rank=3, alpha=7.0, use_rslora=use_rslora).scaling(3)
    factors = LoraFactors(layer.lora_A["default"].weight, layer.lora_B["default"].weight, scaling)
    delta = oriented(layer.base_layer, factors.delta())
    torch.testing.assert_close(delta, layer.get_delta_weight("default"), rtol=1e-6, atol=1e-7)
    assert delta.shape == layer.base_layer.weight.shape
    assert delta.shape[0] != delta.shape[1]


@pytest.mark.parametrize("kind", ["linear", "conv1d"])
def test_adding_the_delta_to_the_weight_is_the_adapters_forward(kind: str, gpt2: Path) -> None:
    model = adapted("tiny", targets="intermediate.dense,query") if kind == "linear" else adapted(str(gpt2))
    adapters = random_adapters(model.modules, rank=3)
    model.load(adapters, {})
    batch = token_batch(vocabulary=200)
    unmerged = logits(model.module, batch)
    merged = build_model(ModelConfig(name="tiny" if kind == "linear" else str(gpt2)), 2, 0)
    for name, factors in adapters.items():
        layer: nn.Module = merged.get_submodule(name)
        layer.weight.data = layer.weight.data + oriented(layer, factors.delta())
    assert not torch.allclose(
        unmerged,
        logits(build_model(ModelConfig(name=merged.config.name_or_path or "tiny"), 2, 0), batch),
        atol=1e-3,
    )
    torch.testing.assert_close(unmerged, logits(merged, batch), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["linear", "conv1d"])
def test_all_linear_is_what_peft_means_by_it(kind: str, gpt2: Path) -> None:
    module = build_model(ModelConfig(name="tiny" if kind == "linear" else str(gpt2)), 2, 0)
    targets, usual = resolve_targets(module, "all-linear"), resolve_targets(module, "")
    config = PeftLoraConfig(r=2, task_type="SEQ_CLS", target_modules="all-linear")
    wrapped = get_peft_model(module, config).base_model.model
    theirs = [name for name, layer in wrapped.named_modules() if hasattr(layer, "lora_A")]
    assert list(targets) == theirs
    assert set(targets) > set(usual)
