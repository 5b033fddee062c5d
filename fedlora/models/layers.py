"""Layers of a model that take an adapter, and tensors of a head that is trained."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Mapping
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from fedlora.config import name_list
from fedlora.core.state import ModuleSpec
from fedlora.errors import ConfigError

LinearLayer: TypeAlias = nn.Linear | Conv1D
"""A layer that can take an adapter."""
ALL_LINEAR = "all-linear"
"""PEFT's word for every linear layer of the base; the head is none of them."""
QUERY_AND_VALUE = (
    ("q_proj", "v_proj"), ("query", "value"), ("query_proj", "value_proj"), ("q_lin", "v_lin"),
    ("qkv_proj",), ("Wqkv",), ("query_key_value",), ("c_attn",), ("in_proj",), ("q", "v"),
    ("fc1", "fc2"),
)  # fmt: skip
"""What architectures call the query and value projections, where PEFT has no choice of its own; the last are
the layers of a network of perceptrons, which has none."""


def head_tensors(model: nn.Module) -> dict[str, nn.Parameter]:
    """The classification head: every parameter outside the model's own base, in the order of the model.

    By transformers' convention the pretrained part is the child that ``base_model_prefix`` names and
    everything beside it (``classifier``, ``score``, ``pre_classifier``, ...) belongs to the task. A language
    model's output embedding stands there too; it is pretrained, no head, and stays frozen.
    """
    base, frozen = f"{model.base_model_prefix}.", _output_embedding(model)
    return {
        name: p for name, p in model.named_parameters() if not name.startswith(base) and id(p) not in frozen
    }


def in_half_precision(model: nn.Module) -> bool:
    """Whether a part of a model is in half precision, so that its results are exact to hundredths alone."""
    return any(p.dtype in (torch.bfloat16, torch.float16) for p in model.parameters())


def keep_head_exact(model: nn.Module) -> None:
    """Keep the head in float32 over a base in half precision, in place: its layers widen their inputs."""
    for parameter in head_tensors(model).values():
        if parameter.dtype != torch.float32:
            parameter.data = parameter.data.float()
    if not in_half_precision(model):
        return
    for name in {name.rpartition(".")[0] for name in head_tensors(model)}:
        model.get_submodule(name).register_forward_pre_hook(_widened)


def _widened(_: nn.Module, given: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(x.float() if isinstance(x, Tensor) and x.is_floating_point() else x for x in given)


def _output_embedding(model: Any) -> set[int]:
    """The ids of its parameters; empty where there is none."""
    find = getattr(model, "get_output_embeddings", None)
    layer = find() if find is not None else None
    return set() if layer is None else {id(p) for p in layer.parameters()}


def linear_layers(model: nn.Module) -> dict[str, ModuleSpec]:
    """Every layer of the base that can take an adapter (nn.Linear, Conv1D), in the order of the model."""
    base = f"{model.base_model_prefix}."
    return {
        name: layer_spec(module)
        for name, module in model.named_modules()
        if name.startswith(base) and isinstance(module, LinearLayer)
    }


def is_transposed(layer: nn.Module) -> bool:
    """Whether the weight is stored (in, out), as in transformers' Conv1D and in embeddings."""
    return isinstance(layer, Conv1D | nn.Embedding)


def oriented(layer: nn.Module, matrix: Tensor) -> Tensor:
    """An (out, in) matrix in the orientation of the layer's weight."""
    return matrix.T if is_transposed(layer) else matrix


def layer_spec(layer: LinearLayer | nn.Embedding) -> ModuleSpec:
    """The layer's size in nn.Linear orientation."""
    if isinstance(layer, nn.Linear):  # its weight may be packed
        return ModuleSpec(out_features=layer.out_features, in_features=layer.in_features)
    out_features, in_features = oriented(layer, layer.weight).shape
    return ModuleSpec(out_features=out_features, in_features=in_features)


def resolve_targets(model: nn.Module, target_modules: str) -> tuple[str, ...]:
    """The names of the layers that ``lora.target-modules`` means, in the order of the model.

    Args:
        model: a base without adapters, from `build_model`.
        target_modules: comma list of names or their endings (``query`` means every ``*.query``);
            `ALL_LINEAR` means every layer; empty means PEFT's choice for the architecture, else what it
            chooses for most: the query and value projections under one of their usual names,
            `QUERY_AND_VALUE`.

    Raises:
        ConfigError: an ending that matches no linear layer, or an architecture without such a choice.
    """
    layers, config = linear_layers(model), _config(model)
    if target_modules.strip() == ALL_LINEAR:
        _tell_experts(model, layers)
        return tuple(layers)
    endings = name_list(target_modules) or _default_endings(config.model_type, layers)
    chosen: set[str] = set()
    for ending in endings:
        matches = [name for name in layers if name == ending or name.endswith(f".{ending}")]
        if not matches:
            known = ", ".join(dict.fromkeys(name.rpartition(".")[2] for name in layers))
            why = _why_not(model, ending)
            raise ConfigError(
                f"lora.target-modules = {target_modules!r}: no linear layer is called {ending!r}, "
                f"{config.model_type} has {known}{f' ({why})' if why else ''}"
            )
        chosen.update(matches)
    return tuple(name for name in layers if name in chosen)


def _experts(model: nn.Module) -> dict[str, nn.Parameter]:
    """The weights of all experts of a layer as one tensor (experts, out, in), as transformers keeps them."""
    return {name: p for name, p in model.named_parameters() if p.ndim == 3 and ".experts." in name}


def _tell_experts(model: nn.Module, layers: Mapping[str, ModuleSpec]) -> None:
    """Warn where the experts, which are no linear layers, hold weights that `ALL_LINEAR` leaves alone."""
    experts = _experts(model)
    if not experts:
        return
    total = sum(p.numel() for p in model.parameters())
    taken = sum(spec.out_features * spec.in_features for spec in layers.values())
    left = sum(p.numel() for p in experts.values())
    names = ", ".join(dict.fromkeys(name.rpartition(".")[2] for name in layers))
    warnings.warn(
        f"lora.target-modules = 'all-linear': takes {names}, {100 * taken / total:.0f} % of the weights; the "
        f"experts, {100 * left / total:.0f} %, are no linear layers and stay frozen",
        stacklevel=3,
    )


def _why_not(model: nn.Module, ending: str) -> str:
    """Description of what is no linear layer of the base under a name; empty where nothing is."""
    under = [name for name in _experts(model) if f".{ending}." in f".{name}."]
    if under:
        return (
            f"{under[0]} holds all experts of a layer in one tensor; PEFT's target_parameters are not "
            "carried through a federation, so experts stay frozen"
        )
    if any(c in ending for c in "*+?[](){}^$|\\"):
        return "names and their endings are accepted, no regular expression"
    for name, module in model.named_modules():
        if name == ending or name.endswith(f".{ending}"):
            linear = isinstance(module, LinearLayer)
            return f"{name} {'is no part of the base' if linear else f'is a {type(module).__name__}'}"
    return ""


def _default_endings(model_type: str, layers: Collection[str]) -> tuple[str, ...]:
    from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as known

    own = {name.rpartition(".")[2] for name in layers}
    endings = known.get(model_type)
    if isinstance(endings, list) and own.issuperset(endings):
        return tuple(endings)
    usual = next((names for names in QUERY_AND_VALUE if own.issuperset(names)), None)
    if usual is None:
        raise ConfigError(
            f"lora.target-modules = '': there is no default for {model_type}, "
            f"name some of its layers: {', '.join(sorted(own))}"
        )
    return usual


def _config(model: nn.Module) -> Any:
    return model.config
