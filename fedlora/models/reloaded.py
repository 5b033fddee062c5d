"""Reloads a written adapter by PEFT: a place for every tensor, or the directory is not kept."""

from __future__ import annotations

import math
import warnings
from collections.abc import Collection, Mapping
from pathlib import Path

import torch
from peft import PeftConfig, PeftModel, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from safetensors import safe_open
from torch import nn

from fedlora.core.factors import AdapterSet
from fedlora.core.peft_keys import PREFIX
from fedlora.errors import RunFailed, first_line

CLOSE = 1e-6
FAILED = "PEFT does not load what was to be written"


def check_reloads(
    directory: Path, file: str, adapters: AdapterSet, embeddings: Collection[str], base: nn.Module | None
) -> None:
    """Load a written adapter by PEFT, without its values, and compare names, shapes and scalings.

    Args:
        directory: the adapter's.
        file: its tensors.
        adapters: what was to be written.
        embeddings: those of its modules that are embeddings.
        base: the base, on the meta device; PEFT changes it. Without one, a model of the adapted layers alone.

    Raises:
        RunFailed: PEFT has another place for a tensor, none at all, or another scaling.
    """
    with safe_open(directory / file, framework="pt") as opened:
        stored = {key: tuple(opened.get_slice(key).get_shape()) for key in opened.keys()}  # noqa: SIM118
    host = skeleton(stored, adapters, embeddings) if base is None else base
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = PeftModel(host, PeftConfig.from_pretrained(directory), low_cpu_mem_usage=True)
            found = get_peft_model_state_dict(model, save_embedding_layers=False)
    except (ValueError, KeyError, TypeError, RuntimeError, AttributeError) as error:
        raise RunFailed(f"{FAILED}: {first_line(error)}") from None
    held = {key: tuple(tensor.shape) for key, tensor in found.items()}
    held |= {
        key: tuple(tensor.shape)
        for key, tensor in model.base_model.model.state_dict(prefix=PREFIX, keep_vars=True).items()
        if key in stored and key not in held
    }
    for key in sorted(stored.keys() | held.keys()):
        if stored.get(key) != held.get(key):
            raise RunFailed(
                f"{FAILED}: {key} is {stored.get(key, 'missing')} in the file, "
                f"{held.get(key, 'missing')} in the model"
            )
    for name, module in model.base_model.model.named_modules():
        if isinstance(module, LoraLayer) and not math.isclose(
            module.scaling["default"], adapters[name].scaling, rel_tol=CLOSE
        ):
            raise RunFailed(
                f"{FAILED}: {name} has scaling {module.scaling['default']:g} "
                f"in the model, {adapters[name].scaling:g} in the file"
            )


def skeleton(
    stored: Mapping[str, tuple[int, ...]], adapters: AdapterSet, embeddings: Collection[str]
) -> nn.Module:
    """A model on the meta device that has the adapted layers and the other stored tensors, nothing else."""
    with torch.device("meta"):
        layers: dict[str, nn.Module] = {
            name: nn.Embedding(f.in_features, f.out_features)
            if name in embeddings
            else nn.Linear(f.in_features, f.out_features)
            for name, f in adapters.items()
        }
        root = nn.Module()
        for name in sorted(layers):  # a module before those inside it
            _place(root, name).add_module(name.rpartition(".")[2], layers[name])
        for key, shape in sorted(stored.items()):
            name = key.removeprefix(PREFIX)
            if ".lora_" not in name and ".base_layer." not in name:
                _place(root, name).register_parameter(
                    name.rpartition(".")[2], nn.Parameter(torch.empty(shape), requires_grad=False)
                )
    return root


def _place(root: nn.Module, name: str) -> nn.Module:
    """The module that holds a name, made where it is not there yet."""
    for part in name.split(".")[:-1]:
        if part not in root._modules:
            root.add_module(part, nn.Module())
        found = root._modules[part]
        assert found is not None
        root = found
    return root
