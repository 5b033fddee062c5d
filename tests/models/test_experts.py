"""Experts, embeddings and output layers: what ``all-linear`` takes is told, what it cannot take is named."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from torch import nn

from fedlora.config import ModelConfig
from fedlora.errors import ConfigError
from fedlora.models import build_model, resolve_targets

Save = Callable[..., Path]


@pytest.fixture
def mixtral(saved: Save) -> nn.Module:
    return build_model(ModelConfig(name=str(saved("mixtral", "CausalLM"))), 0, 0, "language-model")


def test_all_linear_says_what_it_leaves_alone(mixtral: nn.Module) -> None:
    total = sum(p.numel() for p in mixtral.parameters())
    experts = sum(p.numel() for n, p in mixtral.named_parameters() if ".experts." in n)
    with pytest.warns(UserWarning, match="'all-linear': takes q_proj, k_proj, v_proj, o_proj") as told:
        found = resolve_targets(mixtral, "all-linear")
    taken = sum(mixtral.get_submodule(name).weight.numel() for name in found)
    line = str(told[0].message)
    assert f", {100 * taken / total:.0f} % of the weights" in line
    assert f"the experts, {100 * experts / total:.0f} %, are no linear layers" in line


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("experts.gate_up_proj", "holds all experts of a layer in one tensor; PEFT's target_parameters"),
        ("gate_up_proj", "holds all experts"),
        ("experts", "holds all experts"),
        ("embed_tokens", "model.embed_tokens is a Embedding"),
        ("lm_head", "lm_head is no part of the base"),
        (".*q_proj", "no regular expression"),
    ],
)
def test_what_cannot_be_adapted_is_refused_by_name(name: str, why: str, mixtral: nn.Module) -> None:
    with pytest.raises(ConfigError, match=r"lora\.target-modules = ") as error:
        resolve_targets(mixtral, name)
    assert why in str(error.value)
    assert "\n" not in str(error.value)
