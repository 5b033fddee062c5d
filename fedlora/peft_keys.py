"""Adapters as PEFT state dicts: the spelling that any PEFT ClientApp can load."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import Tensor

from fedlora.factors import AdapterSet, Tensors

PREFIX = "base_model.model."


def key_of(module: str, factor: str) -> str:
    """PEFT's state-dict key of one factor, ``A`` or ``B``."""
    return f"{PREFIX}{module}.lora_{factor}.weight"


def to_peft(
    adapters: AdapterSet, head: Tensors, factors: Iterable[str] = ("A", "B"),
    modules: Iterable[str] | None = None,
) -> Tensors:  # fmt: skip
    """Named tensors in PEFT's spelling: the chosen factors of the chosen modules, and the head."""
    chosen = set(adapters if modules is None else modules)
    tensors = {
        key_of(name, factor): getattr(f, factor)
        for name, f in adapters.items()
        if name in chosen
        for factor in sorted(factors)
    }
    return tensors | {PREFIX + name: tensor for name, tensor in head.items()}


@dataclass(frozen=True, slots=True)
class PeftTensors:
    """A PEFT state dict taken apart: ``A`` and ``B`` by module, and everything else as head."""

    A: Tensors
    B: Tensors
    head: Tensors


def from_peft(tensors: Mapping[str, Tensor]) -> PeftTensors:
    """The factors by module and the head of a PEFT state dict.

    >>> import torch
    >>> parts = from_peft({"base_model.model.q.lora_A.weight": torch.ones(1, 2)})
    >>> list(parts.A), list(parts.head)
    (['q'], [])
    """
    parts = PeftTensors({}, {}, {})
    for key, tensor in tensors.items():
        name = key.removeprefix(PREFIX)
        for factor, store in (("A", parts.A), ("B", parts.B)):
            ending = f".lora_{factor}.weight"
            if name.endswith(ending):
                store[name.removesuffix(ending)] = tensor
                break
        else:
            parts.head[name] = tensor
    return parts
