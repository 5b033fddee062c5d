"""One layer's adapter, whatever its kind: tensors by name, in one of two roles.

Messages, checkpoints, means, noise and robust centres need no more than this. Rules that read products of
two factors take `LoraFactors` alone; everything that PEFT calls another tuner is `NamedTensors`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Protocol, Self, TypeAlias

from torch import Tensor

from fedlora.core.factors import AdapterSet, LoraFactors, Tensors, resize
from fedlora.errors import FactorShapeError, NotApplicable


class LayerAdapter(Protocol):
    """Adapter of one layer: its trained tensors by name."""

    @property
    def rank(self) -> int: ...

    @property
    def scaling(self) -> float: ...

    def tensors(self) -> Tensors:
        """Its tensors by name."""
        ...

    def replaced(self, tensors: Mapping[str, Tensor]) -> Self:
        """The same with these tensors in place of its own."""
        ...

    def part(self, roles: Iterable[str]) -> frozenset[str]:
        """The names of the tensors in these roles."""
        ...


TURNS = "turns"
"""Role of all tensors, of any layer of the model, in the order in which they are trained by turns."""
Adapters: TypeAlias = Mapping[str, LayerAdapter]
"""Module name (as in ``model.named_modules()``) -> its adapter, all of one kind."""


@dataclass(frozen=True, slots=True)
class NamedTensors:
    """One layer's adapter of another kind than LoRA, by PEFT's names of its tensors.

    Attributes:
        values: name -> tensor, for instance ``vera_lambda_b``.
        rank: ``lora.rank``; the tensors have their own shapes.
        scaling: ``lora.alpha`` / rank, which no tensor is multiplied with here.
        parts: role -> names. A rule that trains "A" or "B" alone trains these: with either at rest the
            weight is affine in the other, if it can be, and "B" is what starts the update at zero. Empty at
            a client, which is told the names.
    """

    values: Tensors
    rank: int
    scaling: float
    parts: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def tensors(self) -> Tensors:
        """Its tensors by name; a new dictionary."""
        return dict(self.values)

    def replaced(self, tensors: Mapping[str, Tensor]) -> NamedTensors:
        """The same with these tensors in place of its own."""
        return replace(self, values={**self.values, **tensors})

    def part(self, roles: Iterable[str]) -> frozenset[str]:
        """The names of its tensors in these roles.

        >>> NamedTensors({}, 1, 1.0, {"A": ("d",), "B": ("b",)}).part({"A"})
        frozenset({'d'})
        """
        return frozenset(name for role in roles for name in self.parts.get(role, ()))


def as_lora(adapter: LayerAdapter) -> LoraFactors:
    """The adapter as two factors.

    Raises:
        NotApplicable: it has another kind.
    """
    if isinstance(adapter, LoraFactors):
        return adapter
    raise NotApplicable(f"needs the factors A and B of LoRA, not {', '.join(sorted(adapter.tensors()))}")


def lora_set(adapters: Adapters) -> AdapterSet:
    """`as_lora` of every layer."""
    return {name: as_lora(adapter) for name, adapter in adapters.items()}


def tensor_names(adapters: Adapters) -> frozenset[str]:
    """The names that tensors of some layer have."""
    return frozenset().union(*[adapter.tensors() for adapter in adapters.values()])


def names_in(layers: Iterable[LayerAdapter], roles: Iterable[str]) -> frozenset[str]:
    """The names that tensors in these roles have in some layer."""
    return frozenset().union(*[adapter.part(roles) for adapter in layers])


def check_same_shapes(start: LayerAdapter, given: LayerAdapter, who: str) -> None:
    """Refuse tensors of other names or shapes.

    Raises:
        FactorShapeError: the first that differs, or another kind.
    """
    expected = {name: tuple(t.shape) for name, t in start.tensors().items()}
    found = {name: tuple(t.shape) for name, t in given.tensors().items()}
    for name in sorted({*expected, *found}):
        if expected.get(name) != found.get(name):
            raise FactorShapeError(
                f"{who}: {name} is {found.get(name, 'missing')}, expected {expected.get(name, 'nothing')}"
            )


def resized(adapters: Adapters, rank: int, scaling: float) -> dict[str, LayerAdapter]:
    """The leading part of factors at a rank and scaling, by `resize`; the same objects where they have both.

    Other kinds have one rank, and stay as they are.
    """
    return {
        name: resize(adapter, rank, scaling)
        if isinstance(adapter, LoraFactors) and (adapter.rank, adapter.scaling) != (rank, scaling)
        else adapter
        for name, adapter in adapters.items()
    }
