"""Adapters as PEFT state dicts: the spelling that any PEFT ClientApp can load.

A core has no name in PEFT: ``lora_R`` is ours, understood by fedlora's own clients. What leaves for PEFT has
it folded into A first (`LoraFactors.folded`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import Tensor

from fedlora.core.factors import FACTORS, AdapterSet, LoraFactors, Tensors
from fedlora.errors import FactorShapeError

PREFIX = "base_model.model."


def key_of(module: str, factor: str) -> str:
    """The state-dict key of one factor, ``A``, ``B`` or ``R``."""
    return f"{PREFIX}{module}.lora_{factor}.weight"


def to_peft(
    adapters: AdapterSet, head: Tensors, factors: Iterable[str] = FACTORS,
    modules: Iterable[str] | None = None,
) -> Tensors:  # fmt: skip
    """Named tensors in PEFT's spelling: the chosen factors of the chosen modules, and the head."""
    chosen, wanted = set(adapters if modules is None else modules), set(factors)
    tensors = {
        key_of(name, factor): tensor
        for name, f in adapters.items()
        if name in chosen
        for factor, tensor in f.tensors().items()
        if factor in wanted
    }
    return tensors | {PREFIX + name: tensor for name, tensor in head.items()}


@dataclass(frozen=True, slots=True)
class PeftTensors:
    """A PEFT state dict taken apart: ``A``, ``B`` and ``R`` by module, and everything else as head."""

    A: Tensors
    B: Tensors
    R: Tensors
    head: Tensors

    @property
    def modules(self) -> set[str]:
        """Every module that has a factor in it."""
        return {*self.A, *self.B, *self.R}

    def adapters(self, scaling: float) -> AdapterSet:
        """The modules' factors as adapters of that scaling.

        Raises:
            FactorShapeError: a module lacks a factor, has a core that others have not, or shapes differ.
        """
        for name in sorted(self.modules):
            if name not in self.A or name not in self.B or (self.R and name not in self.R):
                raise FactorShapeError(f"module {name} has only some of its factors")
        return {n: LoraFactors(A, self.B[n], scaling, self.R.get(n)) for n, A in self.A.items()}

    def over(self, adapters: AdapterSet) -> AdapterSet:
        """The adapters with these factors in place of their own."""
        return {
            n: LoraFactors(self.A.get(n, f.A), self.B.get(n, f.B), f.scaling, self.R.get(n, f.R))
            for n, f in adapters.items()
        }


def from_peft(tensors: Mapping[str, Tensor]) -> PeftTensors:
    """The factors by module and the head of a PEFT state dict.

    >>> import torch
    >>> parts = from_peft({"base_model.model.q.lora_A.weight": torch.ones(1, 2)})
    >>> list(parts.A), list(parts.head)
    (['q'], [])
    """
    parts = PeftTensors({}, {}, {}, {})
    for key, tensor in tensors.items():
        name = key.removeprefix(PREFIX)
        for factor, store in (("A", parts.A), ("B", parts.B), ("R", parts.R)):
            ending = f".lora_{factor}.weight"
            if name.endswith(ending):
                store[name.removesuffix(ending)] = tensor
                break
        else:
            parts.head[name] = tensor
    return parts
