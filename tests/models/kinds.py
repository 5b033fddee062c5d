"""Every kind of adapter with settings that the tiny model allows."""

from __future__ import annotations

import json
from typing import Any

import torch

from fedlora.adapters import KINDS, TUNERS, adapter_kind
from fedlora.config import LoraConfig, ModelConfig
from fedlora.core.adapters import Adapters
from fedlora.core.init_drawn import fresh_adapters
from fedlora.models import AdaptedModel, build_model, resolve_targets

OPTIONS = {"fourierft": {"n_frequency": 40}, "waveft": {"n_frequency": 40}, "c3a": {"block_size": 8}}
"""Where PEFT's defaults are for larger layers."""


def config_of(method: str, **more: Any) -> LoraConfig:
    rank = {"rank": 4} if method == "lora" or TUNERS[method].rank else {}
    return LoraConfig(method=method, method_options=json.dumps(OPTIONS.get(method, {})), **rank, **more)


def keys_of(method: str) -> dict[str, Any]:
    """As keys of a run's configuration."""
    lora = config_of(method)
    return {
        "lora.method": method,
        "lora.rank": lora.rank,
        "lora.method-options": lora.method_options if method in OPTIONS else "",
    }


def model_with(method: str, seed: int = 0, **more: Any) -> AdaptedModel:
    module = build_model(ModelConfig(name="tiny"), 2, 0)
    return AdaptedModel(
        module, resolve_targets(module, ""), kind=adapter_kind(config_of(method, **more), seed)
    )


def start_of(model: AdaptedModel) -> Adapters:
    return model.adapter.start() or fresh_adapters(model.modules, 4, 4.0, 0)


def moved(adapters: Adapters, seed: int, size: float = 0.3) -> Adapters:
    """Every tensor at a random place."""
    g = torch.Generator().manual_seed(seed)
    return {
        module: adapter.replaced(
            {n: t + size * torch.randn(t.shape, generator=g) for n, t in adapter.tensors().items()}
        )
        for module, adapter in adapters.items()
    }


def names_of(adapters: Adapters) -> frozenset[str]:
    return frozenset(name for adapter in adapters.values() for name in adapter.tensors())


__all__ = ["KINDS", "config_of", "keys_of", "model_with", "moved", "names_of", "start_of"]
