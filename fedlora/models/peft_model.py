"""Somebody's own PEFT model: LoRA layers, their ranks and scalings, its moving base, loading any rank."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any
from weakref import WeakKeyDictionary

import torch
from peft import PeftModel, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from fedlora.core.factors import AdapterSet, check_same_modules
from fedlora.core.peft_keys import from_peft
from fedlora.errors import ConfigError
from fedlora.models.base_weights import PatchedBase
from fedlora.models.layers import LinearLayer

_moving: WeakKeyDictionary[nn.Module, PatchedBase] = WeakKeyDictionary()
"""Models whose base this process moves."""
SAME = 1e-6
"""Relative difference up to which two scalings are one."""


def lora_layers(model: Any) -> dict[str, Any]:
    """The layers that the active adapter changes, by their name in the base model.

    Raises:
        ConfigError: not a PEFT model with one active LoRA adapter, a layer that is no linear one, or more in
            it than ``s B A``.
    """
    if not isinstance(model, PeftModel) or not isinstance(model.active_adapter, str):
        raise ConfigError(f"{type(model).__name__}: not a PeftModel with one active adapter")
    base, adapter = model.get_base_model(), model.active_adapter
    layers = {n: m for n, m in base.named_modules() if isinstance(m, LoraLayer) and adapter in m.r}
    if not layers:
        raise ConfigError(f"{type(base).__name__}: its adapter {adapter!r} has no LoRA layers")
    for name, layer in layers.items():
        if adapter not in layer.lora_A or not isinstance(layer.get_base_layer(), LinearLayer):
            raise ConfigError(f"{name}: only linear layers can be federated, not {type(layer).__name__}")
        if layer.lora_variant.get(adapter) is not None or layer.lora_bias.get(adapter):
            raise ConfigError(f"{name}: only plain LoRA can be federated, no use_dora, no lora_bias")
    return layers


def check_fits(model: Any, adapters: AdapterSet) -> None:
    """Compare names, ranks and scalings of the factors that were sent with what PEFT would compute.

    PEFT multiplies by its own alpha / r, so that a strategy with another scaling aggregates other updates
    than the clients trained; nothing in the shapes shows it.

    Raises:
        ConfigError: the first layer that differs, or that has a core.
        FactorShapeError: other modules than the model has.
    """
    layers = lora_layers(model)
    check_same_modules(layers, adapters, "what the strategy sent")
    scalings = {name: float(layer.scaling[model.active_adapter]) for name, layer in layers.items()}
    several = len({f"{scaling:.6g}" for scaling in scalings.values()}) > 1
    for name, factors in adapters.items():
        if factors.R is not None or factors.A0 is not None:
            what = "core between A and B" if factors.R is not None else "directions at rest"
            raise ConfigError(f"{name}: PEFT has no {what}: use fedlora's ClientApp")
        rank = layers[name].r[model.active_adapter]
        if factors.rank != rank:
            raise ConfigError(
                f"{name}: the PEFT model has rank {rank}, the strategy sent rank {factors.rank}: set r="
                f"{factors.rank} in LoraConfig without rank_pattern, or the strategy's client_spec"
            )
        if not math.isclose(scalings[name], factors.scaling, rel_tol=SAME):
            way = (
                "one scaling for all layers in LoraConfig (no alpha_pattern or rank_pattern)"
                if several
                else f"scaling={scalings[name]:.6g} in the strategy, or in its client_spec"
            )
            got = f"{scalings[name]:.6g} ({_origin(model, layers[name])})"
            raise ConfigError(
                f"{name}: the PEFT model's scaling is {got}, the strategy's {factors.scaling:.6g}: set {way}"
            )


def _origin(model: Any, layer: Any) -> str:
    adapter = model.active_adapter
    alpha, rank = layer.lora_alpha[adapter], layer.r[adapter]
    return f"lora_alpha {alpha:g}, r {rank}" + (", use_rslora" if layer.use_rslora.get(adapter) else "")


def moving_base(model: Any) -> PatchedBase:
    """The base weights under the model's LoRA layers, always the same object for the same model.

    Raises:
        ConfigError: as `lora_layers`.
    """
    if model not in _moving:
        _moving[model] = PatchedBase({n: layer.get_base_layer() for n, layer in lora_layers(model).items()})
    return _moving[model]


def load_any_rank(model: Any, tensors: Mapping[str, Tensor]) -> None:
    """Load a PEFT state dict into a model in place, its layers resized to the ranks that it has.

    Each layer keeps its scaling: its alpha grows with its rank, in the model's ``peft_config`` too, so that
    ``model.save_pretrained`` writes what PEFT loads again. A base that was moved goes back to W_0.

    Raises:
        ConfigError: not a PEFT LoRA model on linear layers, or tensors that it has no place for.
        FactorShapeError: other modules than the model has, or an A without its B.
    """
    layers, adapter = lora_layers(model), model.active_adapter
    adapters = from_peft(tensors).lora(1.0)
    check_same_modules(layers, adapters, "the state dict")
    if model in _moving:
        _moving[model].reset()
    if any(layer.merged for layer in layers.values()):
        raise ConfigError("the adapter is merged into the base: call unmerge_adapter first")
    for name, factors in adapters.items():
        _resize(layers[name], adapter, factors.rank)
    _write_config(model.peft_config[adapter], layers, adapter)
    found = set_peft_model_state_dict(model, dict(tensors), adapter)
    if found.unexpected_keys:
        raise ConfigError(f"{found.unexpected_keys[0]}: the PEFT model has no such tensor (modules_to_save?)")


def _resize(layer: Any, adapter: str, rank: int) -> None:
    if layer.r[adapter] == rank:
        return
    A, B = layer.lora_A[adapter], layer.lora_B[adapter]
    like: dict[str, Any] = {"device": A.weight.device, "dtype": A.weight.dtype}
    layer.lora_A[adapter] = nn.Linear(A.in_features, rank, bias=False, **like)
    layer.lora_B[adapter] = nn.Linear(rank, B.out_features, bias=B.bias is not None, **like)
    for factor, old in ((layer.lora_A[adapter], A), (layer.lora_B[adapter], B)):
        factor.requires_grad_(old.weight.requires_grad).train(old.training)
    with torch.no_grad():
        if B.bias is not None:
            layer.lora_B[adapter].bias.copy_(B.bias)
    grown = rank / layer.r[adapter]
    layer.lora_alpha[adapter] *= math.sqrt(grown) if layer.use_rslora.get(adapter) else grown
    layer.r[adapter] = rank


def _write_config(config: Any, layers: Mapping[str, Any], adapter: str) -> None:
    """Ranks and alphas as the layers have them, by whole names: a bare one also matches longer ones."""
    ranks = {f"^{re.escape(name)}": layer.r[adapter] for name, layer in layers.items()}
    alphas = {f"^{re.escape(name)}": layer.lora_alpha[adapter] for name, layer in layers.items()}
    config.r, config.lora_alpha = next(iter(ranks.values())), next(iter(alphas.values()))
    config.rank_pattern = {name: rank for name, rank in ranks.items() if rank != config.r}
    config.alpha_pattern = {name: alpha for name, alpha in alphas.items() if alpha != config.lora_alpha}
