"""Adapters as PEFT state dicts: the spelling that any PEFT ClientApp can load.

A core has no name in PEFT: ``lora_R`` is ours, understood by fedlora's own clients. What leaves for PEFT has
it folded into A first (`LoraFactors.folded`).
"""

from __future__ import annotations

from collections.abc import Collection, Container, Iterable, Mapping
from dataclasses import dataclass

from torch import Tensor

from fedlora.core.adapters import Adapters, NamedTensors
from fedlora.core.factors import FACTORS, AdapterSet, LoraFactors, Tensors
from fedlora.errors import FactorShapeError

PREFIX = "base_model.model."


def key_of(module: str, name: str) -> str:
    """The state-dict key of one tensor of a layer: a factor ``A``, ``B`` or ``R``, or by PEFT's own name."""
    return f"{PREFIX}{module}.{_ending(name)}"


def of_names(tensors: Mapping[str, Tensor], names: Iterable[str]) -> Tensors:
    """The tensors of layers that have one of these names, of a PEFT state dict."""
    endings = tuple(f".{_ending(name)}" for name in names)
    return {key: tensor for key, tensor in tensors.items() if key.endswith(endings)}


def peft_name(name: str) -> str:
    """PEFT's name of the tensor: ``lora_A`` for ``A``, its own names as they are."""
    return f"lora_{name}" if name in FACTORS else name


def _ending(name: str) -> str:
    return f"lora_{name}.weight" if name in FACTORS else name


def to_peft(
    adapters: Adapters, head: Tensors, names: Container[str] | None = None,
    modules: Iterable[str] | None = None,
) -> Tensors:  # fmt: skip
    """Named tensors in PEFT's spelling: those of the chosen names and modules (None: all), and the head."""
    chosen = set(adapters if modules is None else modules)
    values = {module: adapter.tensors() for module, adapter in adapters.items() if module in chosen}
    tensors = {
        key_of(module, name): tensor
        for module, of_module in values.items()
        for name, tensor in of_module.items()
        if names is None or name in names
    }
    return tensors | {PREFIX + name: tensor for name, tensor in head.items()}


@dataclass(frozen=True, slots=True)
class PeftTensors:
    """A PEFT state dict taken apart.

    Attributes:
        layers: module -> its tensors by name.
        head: everything else.
    """

    layers: dict[str, Tensors]
    head: Tensors

    def of(self, name: str) -> Tensors:
        """The tensors of one name, by module."""
        return {module: own[name] for module, own in self.layers.items() if name in own}

    def adapters(self, scaling: float, names: Collection[str] = (), rank: int = 0) -> Adapters:
        """The modules' tensors as adapters: LoRA of that scaling, or of other ``names`` and rank.

        Raises:
            FactorShapeError: a module lacks a factor, has a core that others have not, or shapes differ.
        """
        if names:
            return {module: NamedTensors(own, rank, scaling) for module, own in self.layers.items()}
        return self.lora(scaling)

    def lora(self, scaling: float) -> AdapterSet:
        """The modules' factors as LoRA of that scaling.

        Raises:
            FactorShapeError: a module lacks a factor, has a core that others have not, or shapes differ.
        """
        cored = bool(self.of("R"))
        for module in sorted(self.layers):
            own = self.layers[module]
            if "A" not in own or "B" not in own or (cored and "R" not in own):
                raise FactorShapeError(f"module {module} has only some of its factors")
        return {module: LoraFactors(scaling=scaling, **own) for module, own in self.layers.items()}

    def over(self, adapters: Adapters) -> Adapters:
        """The adapters with these tensors in place of their own."""
        return {module: a.replaced(self.layers.get(module, {})) for module, a in adapters.items()}


def from_peft(tensors: Mapping[str, Tensor], names: Iterable[str] = ()) -> PeftTensors:
    """The tensors of layers, by module and name, and the head of a PEFT state dict.

    Args:
        tensors: under PEFT's keys.
        names: those of the layers' tensors, where they are other than LoRA's.

    >>> import torch
    >>> parts = from_peft({"base_model.model.q.lora_A.weight": torch.ones(1, 2)})
    >>> list(parts.layers), list(parts.head)
    (['q'], [])
    """
    endings = {_ending(name): name for name in (*FACTORS, *names)}
    parts = PeftTensors({}, {})
    for key, tensor in tensors.items():
        plain = key.removeprefix(PREFIX)
        found = next((e for e in endings if plain.endswith(f".{e}")), None)
        if found is None:
            parts.head[plain] = tensor
        else:
            parts.layers.setdefault(plain.removesuffix(f".{found}"), {})[endings[found]] = tensor
    return parts
