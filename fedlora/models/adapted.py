"""One base model that serves clients of different ranks, or of one other kind of adapter, in turn."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from hashlib import sha256
from typing import Any

import torch
from torch import Tensor, nn

from fedlora.adapters.kind import AdapterKind, InjectedAdapter
from fedlora.adapters.lora import LoraKind
from fedlora.assets.loading import DRAWN
from fedlora.core.adapters import Adapters
from fedlora.core.factors import AdapterSet, Tensors, check_same_modules
from fedlora.core.state import ModuleSpec, RankRegularizer, Template, Trainable
from fedlora.errors import ConfigError, FactorShapeError
from fedlora.models.base_weights import PatchedBase
from fedlora.models.gradient_checkpointing import recomputed
from fedlora.models.layers import LinearLayer, head_tensors, is_transposed, linear_layers
from fedlora.models.shared_memory import hashes
from fedlora.tasks import CLASSIFICATION, Task


class AdaptedModel:
    """A frozen base with an adapter from PEFT, LoRA of any rank or of one other kind.

    `load` makes one client's (or the global) adapter the only active one; `read` takes it out.

    Attributes:
        module: the model; its task calls it and knows what it returns.
        task: what it is trained for.
        modules: the adapted layers, in the order of the model.
        adapter: what is in them.
        base: their weights, which patches move.
        frozen: all linear layers of the base, by name.
        packed: what `fedlora.models.packed_linear` has laid out of them.
        passed: the self-checks that this model has passed, each with what it depends on.
        references: what the base makes of clients' pairs, see `clients.training.reference`.
        device: where it is, and stays.
        initial_head: the head before any training.
        names: those of all modules of the base.
        drawn: frozen tensors of the base that its checkpoint lacks: transformers drew them.
        fan_in_fan_out: whether the adapted layers are Conv1D, in PEFT's term.
        precision: what training passes are computed in, see `computing`.
        checkpointing: whether they keep only the inputs of blocks, see
        `fedlora.models.gradient_checkpointing`.
    """

    def __init__(
        self,
        module: nn.Module,
        modules: Collection[str],
        task: Task = CLASSIFICATION,
        kind: AdapterKind | None = None,
    ) -> None:
        """Adapt the named layers of a model from `build_model`, in place; without a kind, by LoRA.

        The head is copied; no other tensor of the model is ever written to, so that they may be shared.

        Raises:
            ConfigError: settings of the kind that these layers do not allow.
        """
        self.task = task
        self.module = module.requires_grad_(False).eval()
        self.names = frozenset(name for name, _ in module.named_modules() if name)
        self.modules: dict[str, ModuleSpec] = {n: s for n, s in linear_layers(module).items() if n in modules}
        layers: dict[str, Any] = {name: module.get_submodule(name) for name in self.modules}
        self.initial_head: Tensors = {n: _copy(p) for n, p in head_tensors(module).items()}
        self.drawn: Tensors = {
            name: _copy(module.get_parameter(name))
            for name in getattr(module, DRAWN, ())
            if name not in self.initial_head
        }
        self.fan_in_fan_out = any(map(is_transposed, layers.values()))
        self.base = PatchedBase(layers)
        self._head = head_tensors(module)
        head = {name.rpartition(".")[0] for name in self._head}
        self.frozen: dict[str, LinearLayer] = {
            name: layer
            for name, layer in module.named_modules()
            if isinstance(layer, LinearLayer) and name not in head
        }
        self.packed: dict[tuple[str, torch.dtype], Any] = {}
        self.passed: set[tuple[Any, ...]] = set()
        self.references: dict[str, tuple[Any, Any]] = {}
        for parameter in self._head.values():
            parameter.data = parameter.data.clone()
        self._frozen = {
            name: tensor
            for name, tensor in (*module.named_parameters(), *module.named_buffers())
            if name not in {*self._head, *(f"{layer}.weight" for layer in layers)}
        }
        self._in_files = module.state_dict().keys() - self.drawn.keys()
        self.device = next(module.parameters()).device
        self.precision = torch.float32
        self.checkpointing = False
        self._tail: RankRegularizer | None = None
        self._control: Mapping[str, Tensor] = {}
        self.adapter: InjectedAdapter = (kind or LoraKind()).inject(
            module, self.modules, fan_in_fan_out=self.fan_in_fan_out
        )

    def template(self, rank: int, scaling: float, *, share_head: bool = True) -> Template:
        """Template of the model for rules, before round 1.

        Args:
            rank: the global adapter's rank.
            scaling: the global adapter's scaling.
            share_head: whether the head is trained and averaged.

        Raises:
            ConfigError: the rank is larger than a layer allows.
        """
        self.check_rank(rank)
        head = dict(self.initial_head) if share_head else {}
        return Template(
            modules=self.modules, rank=rank, scaling=scaling, head=head, adapters=self.adapter.start()
        )

    def check_rank(self, rank: int, key: str = "lora.rank") -> None:
        """Refuse a rank that is larger than an adapted layer allows; ``key`` says which it is."""
        self.adapter.check_rank(rank, key)

    def load(
        self,
        adapters: Adapters,
        head: Mapping[str, Tensor],
        *,
        trained: frozenset[str] = frozenset(),
        modules: frozenset[str] | None = None,
        dropout: float = 0.0,
        train_head: bool = False,
        tail: RankRegularizer | None = None,
        control: Mapping[str, Tensor] | None = None,
        beside: AdapterSet | None = None,
    ) -> None:
        """Make these values the model's own; nothing of the last client remains.

        Args:
            adapters: one for every adapted layer, all of one rank.
            head: head tensors; those not given take their initial values.
            trained: the names of the tensors that will be trained, of LoRA a subset of {"A", "B", "R"}.
            modules: the layers whose tensors will be trained; None means all.
            dropout: on the adapter's input, while training.
            train_head: whether the head will be trained.
            tail: what will be added to the loss.
            control: what will be taken off the gradients.
            beside: a second adapter, without a core, whose product is added and which is held as it is.

        Raises:
            FactorShapeError: other layers, other shapes, more than one rank, or a core in some layers only.
            ConfigError: the rank is larger than a layer allows.
        """
        self.check(adapters, head)
        self._tail, self._control = tail, control or {}
        self.adapter.activate(adapters, dropout, beside)
        tensors = {module: adapter.tensors() for module, adapter in adapters.items()}
        parameters = {module: self.adapter.parameters(module) for module in adapters}
        for module, of_module in parameters.items():
            chosen = modules is None or module in modules
            for name, parameter in of_module.items():
                _assign(parameter, tensors[module][name], chosen and name in trained)
        for name, parameter in self._head.items():
            _assign(parameter, head.get(name, self.initial_head[name]), train_head)
        self.module.eval()

    def read(self) -> tuple[Adapters, Tensors]:
        """The active adapter and the whole head, as detached float32 copies on the CPU."""
        parameters = {module: self.adapter.parameters(module) for module in self.modules}
        tensors = {module: {n: _copy(p) for n, p in found.items()} for module, found in parameters.items()}
        head = {name: _copy(p) for name, p in self._head.items()}
        return self.adapter.adapters(tensors), head

    def trainable(self) -> Trainable:
        """The parameters that the last `load` asked to train."""
        tensors = {f"{m}.{n}": p for m in self.modules for n, p in self.adapter.parameters(m).items()}
        return Trainable(
            factors={name: p for name, p in tensors.items() if p.requires_grad},
            head={name: p for name, p in self._head.items() if p.requires_grad},
            tail=self._tail,
            control=self._control,
            frozen={name: p for name, p in tensors.items() if not p.requires_grad},
            scaling={module: self.adapter.scaling(module) for module in self.modules},
        )

    def computing(self, precision: torch.dtype | None = None) -> AbstractContextManager[None]:
        """Inside, passes are computed in a precision; the parameters stay as they are.

        Args:
            precision: ``torch.float32`` or ``torch.bfloat16``; None means ``self.precision``.

        Raises:
            ConfigError: the device has no such arithmetic.
        """
        wanted, device = precision or self.precision, self.device.type
        lacks = device == "cuda" and not torch.cuda.is_bf16_supported()
        if wanted != torch.float32 and (lacks or not torch.amp.is_autocast_available(device)):
            raise ConfigError(
                f"this {device} device has no bfloat16, train.precision and evaluation-precision must be "
                "'float32'"
            )
        passes = torch.autocast(device, dtype=torch.bfloat16, enabled=wanted != torch.float32)
        return passes if wanted == self.precision else self._computing(wanted, passes)

    @contextmanager
    def _computing(self, precision: torch.dtype, passes: AbstractContextManager[None]) -> Iterator[None]:
        before, self.precision = self.precision, precision
        try:
            with passes:
                yield
        finally:
            self.precision = before

    @contextmanager
    def as_base(self) -> Iterator[None]:
        """Inside, the network computes what the base computes: W_0, no adapter, evaluation mode."""
        from peft.tuners.tuners_utils import BaseTunerLayer

        layers = [layer for layer in self.module.modules() if isinstance(layer, BaseTunerLayer)]
        moved = self.frozen if self.base.version else {}  # packed forwards hold the weights of now
        laid_out = {name: vars(layer).pop("forward", None) for name, layer in moved.items()}
        self.module.eval()
        for layer in layers:
            layer._disable_adapters = True
        try:
            with self.base.pristine_again():
                yield
        finally:
            for layer in layers:
                layer._disable_adapters = False
            for name, forward in laid_out.items():
                if forward is not None:
                    vars(self.frozen[name])["forward"] = forward

    @contextmanager
    def training(self) -> Iterator[Trainable]:
        """The trained parameters, while the adapter's dropout is on and the base stays in evaluation mode."""
        for module in self.module.modules():
            module.training = any(p.requires_grad for p in module.parameters(recurse=False))
        for dropout in self.adapter.dropouts():
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

    def base_digest(self) -> str:
        """One hash of all of them that a model's files hold, as server and nodes compare it.

        What is computed or drawn where the model is loaded (rotary frequencies, a pooler that the files lack)
        differs in the last bit from one kind of processor to the next.
        """
        found = self.base_digests()
        told = {name: found[name] if name in self._in_files else "" for name in found}
        return sha256(json.dumps(sorted(told.items())).encode()).hexdigest()

    def base_bytes(self) -> int:
        """Bytes of the base in memory, without head and adapters, whatever is loaded."""
        tensors = *self._frozen.values(), *self.base.pristine_weights.values()
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    def check(self, adapters: Adapters, head: Mapping[str, Tensor]) -> None:
        """Refuse what `load` would refuse, for the same reasons."""
        check_same_modules(self.modules, adapters, "the adapter")
        self.adapter.check(adapters)
        for name, tensor in head.items():
            if name not in self._head or self._head[name].shape != tensor.shape:
                known = ", ".join(f"{n} {tuple(p.shape)}" for n, p in self._head.items())
                told = f"it is {known}" if known else "it has none"
                raise FactorShapeError(f"the head has no {name} {tuple(tensor.shape)}, {told}")


def _copy(parameter: nn.Parameter) -> Tensor:
    return parameter.detach().to("cpu", torch.float32, copy=True)


def _assign(parameter: nn.Parameter, value: Tensor, trained: bool) -> None:
    with torch.no_grad():
        parameter.copy_(value)
    parameter.requires_grad_(trained)
