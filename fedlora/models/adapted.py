"""One resident base model that serves clients of different ranks, with and without a core, in turn."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from peft import LoraConfig as PeftLoraConfig
from peft.functional import inject_adapter_in_model, set_adapter
from torch import Tensor, nn

from fedlora.core.factors import AdapterSet, LoraFactors, Tensors, check_same_modules
from fedlora.core.state import ModuleSpec, RankRegularizer, Template, Trainable
from fedlora.errors import ConfigError, FactorShapeError
from fedlora.models.base_weights import PatchedBase
from fedlora.models.cored import CoredOutput
from fedlora.models.gradient_checkpointing import recomputed
from fedlora.models.layers import head_tensors, is_transposed, linear_layers
from fedlora.models.shared_memory import hashes
from fedlora.tasks import CLASSIFICATION, Task


class AdaptedModel:
    """A frozen base with LoRA from PEFT, one PEFT adapter for each rank that was asked for, cored or not.

    `load` makes one client's (or the global) adapter the only active one; `read` takes it out.

    Attributes:
        module: the model; its task calls it and knows what it returns.
        task: what it is trained for.
        modules: the adapted layers, in the order of the model.
        base: their weights, which patches move.
        initial_head: the head before any training.
        fan_in_fan_out: whether the adapted layers are Conv1D, in PEFT's term.
        precision: what training passes are computed in, see `computing`.
        checkpointing: whether they keep only the inputs of blocks, see
        `fedlora.models.gradient_checkpointing`.
    """

    def __init__(self, module: nn.Module, modules: Collection[str], task: Task = CLASSIFICATION) -> None:
        """Adapt the named layers of a model from `build_model`, in place.

        The head is copied; no other tensor of the model is ever written to, so that they may be shared.
        """
        self.task = task
        self.module = module.requires_grad_(False).eval()
        self.modules: dict[str, ModuleSpec] = {n: s for n, s in linear_layers(module).items() if n in modules}
        layers: dict[str, Any] = {name: module.get_submodule(name) for name in self.modules}
        self.initial_head: Tensors = {n: _copy(p) for n, p in head_tensors(module).items()}
        self.fan_in_fan_out = any(map(is_transposed, layers.values()))
        self.base = PatchedBase(layers)
        self._head = head_tensors(module)
        for parameter in self._head.values():
            parameter.data = parameter.data.clone()
        self._frozen = {
            name: tensor
            for name, tensor in (*module.named_parameters(), *module.named_buffers())
            if name not in {*self._head, *(f"{layer}.weight" for layer in layers)}
        }
        self.precision = torch.float32
        self.checkpointing = False
        self._adapters: set[str] = set()
        self._active = ""
        self._tail: RankRegularizer | None = None

    @property
    def device(self) -> torch.device:
        return next(self.module.parameters()).device

    def template(self, rank: int, scaling: float, *, share_head: bool = True) -> Template:
        """What a rule must know before round 1.

        Args:
            rank: the global adapter's rank.
            scaling: the global adapter's scaling.
            share_head: whether the head is trained and averaged.

        Raises:
            ConfigError: the rank is larger than a layer allows.
        """
        self.check_rank(rank)
        head = dict(self.initial_head) if share_head else {}
        return Template(modules=self.modules, rank=rank, scaling=scaling, head=head)

    def check_rank(self, rank: int) -> None:
        """Refuse a rank that is larger than an adapted layer allows."""
        for name, spec in self.modules.items():
            most = min(spec.out_features, spec.in_features)
            if rank > most:
                raise ConfigError(f"lora.rank = {rank}: {name} allows at most {most}")

    def load(
        self,
        adapters: AdapterSet,
        head: Mapping[str, Tensor],
        *,
        trained: frozenset[str] = frozenset(),
        modules: frozenset[str] | None = None,
        dropout: float = 0.0,
        train_head: bool = False,
        tail: RankRegularizer | None = None,
    ) -> None:
        """Make these values the model's own; nothing of the last client remains.

        Args:
            adapters: factors of one rank for every adapted layer.
            head: head tensors; those not given take their initial values.
            trained: the factors that will be trained, a subset of {"A", "B", "R"}.
            modules: the layers whose factors will be trained; None means all.
            dropout: on the adapter's input, while training.
            train_head: whether the head will be trained.
            tail: what will be added to the loss.

        Raises:
            FactorShapeError: other layers, other shapes, more than one rank, or a core in some layers only.
            ConfigError: the rank is larger than a layer allows.
        """
        self.check(adapters, head)
        self._tail = tail
        first = next(iter(adapters.values()))
        self._activate(first.rank, cored=first.R is not None)
        for name, factors in adapters.items():
            layer = self._lora(name)
            layer.scaling[self._active] = factors.scaling
            layer.lora_dropout[self._active].p = dropout
            chosen = modules is None or name in modules
            for letter, parameter in self._factors(name).items():
                _assign(parameter, factors.tensors()[letter], chosen and letter in trained)
        for name, parameter in self._head.items():
            _assign(parameter, head.get(name, self.initial_head[name]), train_head)
        self.module.eval()

    def read(self) -> tuple[AdapterSet, Tensors]:
        """The active adapter and the whole head, as detached float32 copies on the CPU."""
        adapters = {
            name: LoraFactors(
                **{letter: _copy(p) for letter, p in self._factors(name).items()},
                scaling=self._lora(name).scaling[self._active],
            )
            for name in self.modules
        }
        return adapters, {name: _copy(p) for name, p in self._head.items()}

    def trainable(self) -> Trainable:
        """The parameters that the last `load` asked to train."""
        factors = {f"{name}.{x}": p for name in self.modules for x, p in self._factors(name).items()}
        return Trainable(
            factors={name: p for name, p in factors.items() if p.requires_grad},
            head={name: p for name, p in self._head.items() if p.requires_grad},
            tail=self._tail,
            frozen={name: p for name, p in factors.items() if not p.requires_grad},
            scaling={name: self._lora(name).scaling[self._active] for name in self.modules},
        )

    @contextmanager
    def computing(self, precision: torch.dtype | None = None) -> Iterator[None]:
        """Inside, passes are computed in a precision; the parameters stay as they are.

        Args:
            precision: ``torch.float32`` or ``torch.bfloat16``; None means ``self.precision``.

        Raises:
            ConfigError: the device has no such arithmetic.
        """
        wanted, before = precision or self.precision, self.precision
        device = self.device.type
        lacks = device == "cuda" and not torch.cuda.is_bf16_supported()
        if wanted != torch.float32 and (lacks or not torch.amp.is_autocast_available(device)):
            raise ConfigError(f"train.precision = 'bfloat16': this {device} device has none, use 'float32'")
        self.precision = wanted
        try:
            with torch.autocast(device, dtype=torch.bfloat16, enabled=wanted != torch.float32):
                yield
        finally:
            self.precision = before

    @contextmanager
    def training(self) -> Iterator[Trainable]:
        """The trained parameters, while LoRA dropout is on and the base stays in evaluation mode."""
        for module in self.module.modules():
            module.training = any(p.requires_grad for p in module.parameters(recurse=False))
        for name in self.modules:
            dropout = self._lora(name).lora_dropout[self._active]
            dropout.train(dropout.p > 0)
        try:
            with recomputed(self.module, self.checkpointing):
                yield self.trainable()
        finally:
            self.module.eval()
            self.module.zero_grad(set_to_none=True)

    def base_digests(self) -> dict[str, str]:
        """A hash of every tensor of the pristine base as it stands; W_0 of the layers that moved."""
        pristine = {f"{name}.weight": weight for name, weight in self.base.pristine_weights.items()}
        return hashes({**self._frozen, **pristine})

    def _lora(self, name: str) -> Any:
        """PEFT's layer in place of the adapted one; there is none before the first `load`."""
        return self.module.get_submodule(name)

    def _factors(self, name: str) -> dict[str, nn.Parameter]:
        layer = self._lora(name)
        inner, outer = layer.lora_A[self._active], layer.lora_B[self._active]
        if isinstance(outer, CoredOutput):
            return {"A": inner.weight, "B": outer.outer.weight, "R": outer.core.weight}
        return {"A": inner.weight, "B": outer.weight}

    def _activate(self, rank: int, *, cored: bool) -> None:
        """One PEFT adapter per rank and shape; its values, scaling and dropout are set by `load`."""
        adapter = f"rank{rank}core" if cored else f"rank{rank}"
        if adapter not in self._adapters:
            self.check_rank(rank)
            config = PeftLoraConfig(
                r=rank,
                lora_dropout=0.5,
                target_modules=list(self.modules),
                fan_in_fan_out=self.fan_in_fan_out,
                init_lora_weights=False,
            )
            with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="Already found a `peft_config` attribute")
                inject_adapter_in_model(config, self.module, adapter)
            for layer in map(self._lora, self.modules if cored else ()):
                layer.lora_B[adapter] = CoredOutput(layer.lora_B[adapter])
            self._adapters.add(adapter)
        if adapter != self._active:
            self._active = adapter
            set_adapter(self.module, self._active)

    def check(self, adapters: AdapterSet, head: Mapping[str, Tensor]) -> None:
        """Refuse what `load` would refuse, for the same reasons."""
        check_same_modules(self.modules, adapters, "the adapter")
        ranks = sorted({factors.rank for factors in adapters.values()})
        if len(ranks) > 1:
            raise FactorShapeError(f"an adapter has one rank in all layers, this one has {ranks}")
        if len({factors.R is None for factors in adapters.values()}) > 1:
            raise FactorShapeError("an adapter has a core in all layers or in none, this one in some")
        for name, factors in adapters.items():
            spec, shape = self.modules[name], (factors.out_features, factors.in_features)
            if shape != (spec.out_features, spec.in_features):
                raise FactorShapeError(
                    f"{name}: the factors are for a layer {shape}, the layer is "
                    f"{(spec.out_features, spec.in_features)}"
                )
        for name, tensor in head.items():
            if name not in self._head or self._head[name].shape != tensor.shape:
                known = ", ".join(f"{n} {tuple(p.shape)}" for n, p in self._head.items())
                raise FactorShapeError(f"the head has no {name} {tuple(tensor.shape)}, it is {known}")
        self.check_rank(ranks[0])


def _copy(parameter: nn.Parameter) -> Tensor:
    return parameter.detach().to("cpu", torch.float32, copy=True)


def _assign(parameter: nn.Parameter, value: Tensor, trained: bool) -> None:
    with torch.no_grad():
        parameter.copy_(value)
    parameter.requires_grad_(trained)
