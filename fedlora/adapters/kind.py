"""Seam: a kind of adapter, and what `fedlora.models.AdaptedModel` asks of one that is inside a model.

A kind is named by ``lora.method``. Rules, messages, checkpoints and noise see its tensors by name
(`fedlora.core.adapters`); only this seam knows how a model computes with them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from fedlora.core.adapters import Adapters
from fedlora.core.factors import AdapterSet, Tensors
from fedlora.core.seeding import torch_stream
from fedlora.core.state import ModuleSpec

AFFINE = 1e-4
"""Largest distance from the mean, relative to that of the two ends, that is rounding in float32."""


class InjectedAdapter(Protocol):
    """An adapter in the layers of one model.

    Attributes:
        batched: `clients.training.batched` can compute it, so that clients train in cohorts.
    """

    batched: bool

    def start(self) -> Adapters | None:
        """Start of a run, the same for one seed; None where the rule draws it."""
        ...

    def check_rank(self, rank: int, key: str = "lora.rank") -> None:
        """Refuse a rank that is larger than an adapted layer allows; ``key`` says which it is.

        Raises:
            ConfigError: the first layer that does not.
        """
        ...

    def check(self, adapters: Adapters) -> None:
        """Refuse adapters of all layers that this model cannot compute with.

        Raises:
            FactorShapeError: other tensors or shapes.
            ConfigError: a rank that a layer does not allow.
        """
        ...

    def activate(self, adapters: Adapters, dropout: float, beside: AdapterSet | None = None) -> None:
        """Let the layers compute with adapters of these shapes and scalings, whose values come next.

        Args:
            adapters: of all layers.
            dropout: on their inputs, while training.
            beside: of LoRA alone, a second adapter whose product is added, held as it is.
        """
        ...

    def parameters(self, module: str) -> dict[str, nn.Parameter]:
        """The active tensors of a layer by name."""
        ...

    def scaling(self, module: str) -> float:
        """Scaling of the active tensors of a layer."""
        ...

    def adapters(self, tensors: Mapping[str, Tensors]) -> Adapters:
        """The layers' active adapters with these values, by module."""
        ...

    def saved(self) -> tuple[Any, Tensors] | None:
        """PEFT's configuration, and the tensors of its file for the values that are loaded.

        None where files are written from the state, whose patches they hold too.
        """
        ...

    def dropouts(self) -> Iterator[nn.Dropout]:
        """Dropouts on the adapters' inputs."""
        ...


class AdapterKind(Protocol):
    """A kind of adapter with its settings; equal ones make equal models."""

    @property
    def name(self) -> str: ...

    def inject(
        self, module: nn.Module, modules: Mapping[str, ModuleSpec], *, fan_in_fan_out: bool
    ) -> InjectedAdapter:
        """Put the adapter into the named layers of a model, in place.

        Args:
            module: the base, frozen.
            modules: the layers, in the order of the model.
            fan_in_fan_out: they are Conv1D, in PEFT's term.

        Raises:
            ConfigError: settings that these layers do not allow.
        """
        ...


def is_affine(adapter: InjectedAdapter, model: nn.Module, module: str, names: frozenset[str]) -> bool:
    """Whether a layer is an affine function of these tensors, the others held; measured, not declared.

    Then the mean of the tensors has the mean of the weights. Asked of the layer's outputs on an identity at
    two random places and half way between them, in the layer's own arithmetic.
    """
    layer: Any = model.get_submodule(module)
    parameters = adapter.parameters(module)
    kept = {name: p.detach().clone() for name, p in parameters.items()}
    generator = torch_stream(0, "is-affine", module)

    def draw(name: str) -> Tensor:
        like = kept[name]
        return (0.5 * torch.randn(like.shape, generator=generator)).to(like)

    def output(values: Mapping[str, Tensor]) -> Tensor:
        for name, value in values.items():
            parameters[name].copy_(value)
        like = next(iter(kept.values()))
        inputs: int = layer.in_features
        found: Tensor = layer(torch.eye(inputs, device=like.device, dtype=like.dtype)).double()
        return found

    was = layer.training
    try:
        layer.eval()
        with torch.no_grad():
            held = {name: draw(name) for name in kept}
            ends = [held | {name: draw(name) for name in names & kept.keys()} for _ in range(2)]
            first, last = map(output, ends)
            middle = output({name: (ends[0][name] + ends[1][name]) / 2 for name in kept})
            return bool((middle - (first + last) / 2).norm() <= AFFINE * (first - last).norm())
    finally:
        layer.train(was)
        with torch.no_grad():
            for name, value in kept.items():
                parameters[name].copy_(value)
