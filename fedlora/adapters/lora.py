"""LoRA by PEFT, with or without a core, or with directions at rest: a PEFT adapter for each rank."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fedlora.core.adapters import Adapters, lora_set
from fedlora.core.factors import AdapterSet, LoraFactors, Tensors, after_core, before_core
from fedlora.core.state import ModuleSpec
from fedlora.errors import ConfigError, FactorShapeError


@dataclass(frozen=True, slots=True)
class LoraKind:
    """``s B A``, ``s B R A``, or ``s (B A + B0 A0)``; ranks and scalings come with the values."""

    @property
    def name(self) -> str:
        return "lora"

    def inject(
        self, module: nn.Module, modules: Mapping[str, ModuleSpec], *, fan_in_fan_out: bool
    ) -> InjectedLora:
        """See `AdapterKind.inject`; the layers are replaced by the first `InjectedLora.activate`."""
        return InjectedLora(module, modules, fan_in_fan_out)


class InjectedLora:
    """LoRA inside a model; see `fedlora.adapters.kind.InjectedAdapter`."""

    batched = True

    def __init__(self, module: nn.Module, modules: Mapping[str, ModuleSpec], fan_in_fan_out: bool) -> None:
        self._module, self._modules = module, modules
        self._fan_in_fan_out = fan_in_fan_out
        self._adapters: set[str] = set()
        self._active = ""
        self._names: list[str] = []

    def start(self) -> None:
        """Drawn by the rule."""

    def check_rank(self, rank: int, key: str = "lora.rank") -> None:
        """Refuse a rank over the features of an adapted layer."""
        for name, spec in self._modules.items():
            most = min(spec.out_features, spec.in_features)
            if rank > most:
                raise ConfigError(f"{key} = {rank}: {name} allows at most {most}")

    def check(self, adapters: Adapters) -> None:
        """Refuse other shapes, more than one rank, or a core in some layers only."""
        factors = lora_set(adapters)
        ranks = sorted({f.whole_rank for f in factors.values()})
        if len(ranks) > 1:
            raise FactorShapeError(f"an adapter has one rank in all layers, this one has {ranks}")
        if len({f.R is None for f in factors.values()}) > 1:
            raise FactorShapeError("an adapter has a core in all layers or in none, this one in some")
        if len(cores := sorted({tuple(f.R.shape) for f in factors.values() if f.R is not None})) > 1:
            raise FactorShapeError(f"an adapter has one shape of core in all layers, this one has {cores}")
        for name, f in factors.items():
            spec = self._modules[name]
            if f.shape != (spec.out_features, spec.in_features):
                raise FactorShapeError(
                    f"{name}: the factors are for a layer {f.shape}, the layer is "
                    f"{(spec.out_features, spec.in_features)}"
                )
        self.check_rank(ranks[0])

    def activate(self, adapters: Adapters, dropout: float, beside: AdapterSet | None = None) -> None:
        """One PEFT adapter per rank and shape, at the given scalings; one more for what stands beside."""
        from peft.functional import set_adapter

        names = [self._prepared("rank", lora_set(adapters), dropout)]
        if beside is not None:
            names.append(self._prepared("beside", beside, 0.0))
        if names != self._names:
            self._active, self._names = names[0], names
            set_adapter(self._module, names)
        for module, held in (beside or {}).items():
            layer = self._layer(module)
            for linear, value in ((layer.lora_A[names[1]], held.A), (layer.lora_B[names[1]], held.B)):
                linear.weight.data.copy_(value)
                linear.requires_grad_(False)

    def _prepared(self, kind: str, adapters: AdapterSet, dropout: float) -> str:
        """The name of the PEFT adapter of this rank, with these scalings and directions at rest."""
        first = next(iter(adapters.values()))
        rests = any(f.A0 is not None for f in adapters.values())
        core = () if first.R is None else tuple(first.R.shape)
        name = f"{kind}{first.whole_rank}" + (
            "parted" if rests else "".join(f"core{size}" for size in core[:-1])
        )
        if name not in self._adapters:
            self._add(name, first.whole_rank, core=core, parted=rests)
        for module, adapter in adapters.items():
            layer = self._layer(module)
            layer.scaling[name] = adapter.scaling
            layer.lora_dropout[name].p = dropout
            if rests:
                layer.lora_A[name].take(adapter.rank)
                layer.lora_B[name].take(adapter.rank)
        return name

    def parameters(self, module: str) -> dict[str, nn.Parameter]:
        """A, B and, where there is one, the core R, or A0 and B0 at rest."""
        layer = self._layer(module)
        inner, outer = layer.lora_A[self._active], layer.lora_B[self._active]
        if isinstance(outer, CoredOutput):
            return {"A": inner.weight, "B": outer.outer.weight, "R": outer.core.weight}
        if isinstance(outer, Parted):
            own = {"A": inner.moves.weight, "B": outer.moves.weight}
            still = {"A0": inner.rests.weight, "B0": outer.rests.weight}
            return own | still if outer.rests.in_features else own
        return {"A": inner.weight, "B": outer.weight}

    def outputs(self, module: str) -> list[nn.Module]:
        """What a layer's products come out of: the active adapter's, and that of what stands beside it."""
        return [self._layer(module).lora_B[name] for name in self._names]

    def scaling(self, module: str) -> float:
        """Alpha / r, as PEFT has it."""
        return float(self._layer(module).scaling[self._active])

    def adapters(self, tensors: Mapping[str, Tensors]) -> AdapterSet:
        """The factors with the layers' scalings."""
        scaling = {module: self.scaling(module) for module in tensors}
        return {module: LoraFactors(scaling=scaling[module], **own) for module, own in tensors.items()}

    def saved(self) -> None:
        """See `fedlora.models.export.save_adapter`."""

    def dropouts(self) -> Iterator[nn.Dropout]:
        """PEFT's, one for each layer."""
        for name in self._modules:
            yield self._layer(name).lora_dropout[self._active]

    def _layer(self, name: str) -> Any:
        """PEFT's layer in place of the adapted one; there is none before the first `activate`."""
        return self._module.get_submodule(name)

    def _add(self, name: str, rank: int, *, core: tuple[int, ...], parted: bool) -> None:
        from peft import LoraConfig
        from peft.functional import inject_adapter_in_model

        self.check_rank(rank)
        config = LoraConfig(
            r=rank,
            lora_dropout=0.5,
            target_modules=list(self._modules),
            fan_in_fan_out=self._fan_in_fan_out,
            init_lora_weights=False,
        )
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Already found a `peft_config` attribute")
            inject_adapter_in_model(config, self._module, name)
        for layer in map(self._layer, self._modules):
            layer.lora_A[name].float()  # PEFT makes them like the base
            layer.lora_B[name].float()
            if core:
                layer.lora_B[name] = CoredOutput(layer.lora_B[name], core)
            if parted:
                inner, outer = layer.lora_A[name], layer.lora_B[name]
                layer.lora_A[name], layer.lora_B[name] = PartedInput(inner), PartedOutput(outer)
        self._adapters.add(name)


class CoredOutput(nn.Module):
    """Takes the place of a PEFT layer's ``lora_B``: ``x -> B R x``.

    PEFT computes ``lora_B(lora_A(dropout(x))) * scaling``, so that the adapter becomes ``s B R A``. B and a
    dense R are plain linear layers, for which Opacus has per-example gradients.

    Args:
        outer: PEFT's own ``lora_B``, (out, r).
        shape: of R, (r, r), or (h, b, b) in blocks.

    Attributes:
        core: R, zero at first.
        outer: as given.
    """

    def __init__(self, outer: nn.Linear, shape: tuple[int, ...]) -> None:
        super().__init__()
        rank, like = outer.in_features, outer.weight
        dense = len(shape) == 2  # on the meta device a layer draws nothing
        self.core = nn.Linear(rank, rank, bias=False, device="meta") if dense else BlockCore()
        self.core.weight = nn.Parameter(torch.zeros(shape, device=like.device, dtype=like.dtype))
        self.outer = outer

    @property
    def weight(self) -> Tensor:
        """``B R``, (out, r): what PEFT multiplies by A where it merges."""
        return before_core(self.outer.weight, self.core.weight)

    def forward(self, x: Tensor) -> Tensor:
        """``B R x`` of inputs (..., r)."""
        y: Tensor = self.outer(self.core(x))
        return y


class BlockCore(nn.Module):
    """``x -> R x`` of an R that is zero but for its blocks.

    Attributes:
        weight: the blocks (h, b, b).
    """

    weight: nn.Parameter

    def forward(self, x: Tensor) -> Tensor:
        """``R x`` of inputs (..., h b)."""
        return after_core(self.weight, x.mT).mT


class Parted(nn.Module):
    """In place of one of PEFT's linear layers: what trains and what rests of it, as two.

    PEFT computes ``lora_B(lora_A(x))``, the first of which gives the directions that train before those at
    rest. Both are plain linear layers, for which Opacus has per-example gradients.

    Attributes:
        moves, rests: rows of A or columns of B; how many of each says `take`.
    """

    axis: int

    def __init__(self, whole: nn.Linear) -> None:
        super().__init__()
        self._whole = whole.out_features, whole.in_features
        self._like: dict[str, Any] = {"device": whole.weight.device, "dtype": whole.weight.dtype}
        self.take(self._whole[self.axis])

    def take(self, count: int) -> None:
        """Let so many directions train; all values are to be set anew."""
        other, rests = self._whole[1 - self.axis], self._whole[self.axis] - count
        self.moves, self.rests = (
            self._linear(*((n, other) if self.axis == 0 else (other, n))) for n in (count, rests)
        )

    def _linear(self, out_features: int, in_features: int) -> nn.Linear:
        layer = nn.Linear(1, 1, bias=False, device="meta")  # draws nothing, and none would be warned of
        layer.in_features, layer.out_features = in_features, out_features
        layer.weight = nn.Parameter(torch.zeros(out_features, in_features, **self._like))
        return layer

    @property
    def weight(self) -> Tensor:
        """The factor with all its directions, which PEFT multiplies by the other where it merges."""
        return torch.cat([self.moves.weight, self.rests.weight], dim=self.axis)


class PartedInput(Parted):
    """Takes the place of a PEFT layer's ``lora_A``: ``x -> [A; A0] x``."""

    axis = 0

    def forward(self, x: Tensor) -> Tensor:
        """All directions of inputs (..., in): those that train first."""
        return torch.cat([self.moves(x), self.rests(x)], dim=-1)


class PartedOutput(Parted):
    """Takes the place of a PEFT layer's ``lora_B``: ``x -> [B B0] x``."""

    axis = 1

    def forward(self, x: Tensor) -> Tensor:
        """Outputs (..., out) of directions as `PartedInput` gives them."""
        count = self.moves.in_features
        y: Tensor = self.moves(x[..., :count]) + self.rests(x[..., count:])
        return y
