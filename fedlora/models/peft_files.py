"""Adapters that PEFT saved: one directory in, factors and head out. Pickles are never opened."""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

import torch
from peft.utils.constants import EMBEDDING_LAYER_NAMES
from safetensors import SafetensorError, safe_open
from torch import Tensor

from fedlora.core.factors import AdapterSet, LoraFactors, Tensors
from fedlora.core.peft_keys import PREFIX, from_peft
from fedlora.errors import ConfigError
from fedlora.models.card import CARD_FILE, AdapterCard
from fedlora.models.peft_config import PlainLora
from fedlora.models.peft_names import TENSORS_FILE, plain_names

PICKLE_FILE = "adapter_model.bin"
EMBEDDING = re.compile(r"\.lora_embedding_([AB])$")
EMBEDDINGS_OF_THE_BASE = tuple(EMBEDDING_LAYER_NAMES)
"""Ends of modules whose weights PEFT saves where the vocabulary grew, or where it adapts them."""
LARGEST = 1e18
"""Norm of ``s B A`` whose square is still a float32."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PeftAdapter:
    """One adapter directory.

    Attributes:
        path: as the user wrote it; messages name the adapter so.
        config: what ``adapter_config.json`` says.
        adapters: the factors by module, float32 (mapped from the file where they are stored so).
        embeddings: the modules among them that are embeddings: A is (r, tokens), B is (features, r).
        head: the tensors of ``modules_to_save``.
        frozen: weights of the base that PEFT saved beside them, as they are in the file.
        wrappers: what was taken off the names of its tensors.
        card: which base it is, where fedlora wrote the adapter.
    """

    path: Path
    config: PlainLora
    adapters: AdapterSet
    embeddings: frozenset[str]
    head: Tensors
    frozen: Tensors
    wrappers: tuple[str, ...]
    card: AdapterCard | None

    @property
    def ranks(self) -> tuple[int, ...]:
        """The ranks of its modules, each once, ascending."""
        return tuple(sorted({factors.rank for factors in self.adapters.values()}))


def read_adapter(path: Path) -> PeftAdapter:
    """The adapter of a directory that ``save_pretrained`` wrote.

    Raises:
        ConfigError: no adapter there, a pickle, a damaged file, not plain LoRA, an A without its B, a rank
            other than the configuration says, a head that is not there, NaN or infinity.
    """
    if not path.is_dir():
        raise ConfigError(f"{path}: no such directory (an adapter is a directory that save_pretrained wrote)")
    PlainLora.read(path)  # what is no LoRA at all is refused before its tensors are looked at
    tensors, wrappers = _tensors(path)
    config = PlainLora.read(path, wrappers)
    try:
        tensors, embeddings = _as_linear(tensors)
        parts = from_peft(tensors)
        if cored := parts.of("R"):
            raise ConfigError(f"{min(cored)}: a core (lora_R) is fedlora's own, PEFT's adapters have none")
        adapters = _factors(_float(parts.of("A")), _float(parts.of("B")), config)
        head, frozen = _heads(parts.head, adapters, config)
        return PeftAdapter(
            path=path,
            config=config,
            adapters=adapters,
            embeddings=embeddings,
            head=_float(head),
            frozen=frozen,
            wrappers=wrappers,
            card=AdapterCard.read(path) if (path / CARD_FILE).exists() else None,
        )
    except ConfigError as error:
        raise ConfigError(f"{path / TENSORS_FILE}: {error}") from None


def _tensors(path: Path) -> tuple[Tensors, tuple[str, ...]]:
    """The tensors under their plain names, and the wrappers that were taken off."""
    file = path / TENSORS_FILE
    if not file.is_file():
        if (path / PICKLE_FILE).exists():
            raise ConfigError(
                f"{path / PICKLE_FILE}: a pickle can run any code when it is opened, so it is not read; "
                f"save the adapter again as {TENSORS_FILE} (save_pretrained(..., safe_serialization=True))"
            )
        pieces = next(iter(sorted(path.glob("*.safetensors*"))), None)
        found = "" if pieces is None else f", only {pieces.name}, which PEFT does not read"
        raise ConfigError(f"{path}: it has no {TENSORS_FILE}{found}")
    try:
        with safe_open(file, framework="pt") as opened:
            names, wrappers = plain_names(opened.keys())
            return {name: _checked(key, opened.get_tensor(key)) for key, name in names.items()}, wrappers
    except ConfigError as error:
        raise ConfigError(f"{file}: {error}") from None
    except (SafetensorError, OSError, ValueError, TypeError, RuntimeError) as error:
        raise ConfigError(f"{file}: not a whole safetensors file ({error})") from None


def _checked(key: str, tensor: Tensor) -> Tensor:
    if not tensor.is_floating_point():
        raise ConfigError(f"{key} is {tensor.dtype}: only floating point can be averaged")
    if not torch.isfinite(tensor.float()).all():
        raise ConfigError(f"{key} holds a NaN or an infinity")
    return tensor


def _float(tensors: Tensors) -> Tensors:
    return {name: tensor.float() for name, tensor in tensors.items()}


def _as_linear(tensors: Tensors) -> tuple[Tensors, frozenset[str]]:
    """The tensors with an embedding's factors under a linear layer's names, and which modules those are."""
    renamed = {name: EMBEDDING.sub(r".lora_\1.weight", name) for name in tensors}
    modules = {
        name.removeprefix(PREFIX).partition(".lora_")[0] for name, new in renamed.items() if name != new
    }
    return {renamed[name]: tensor for name, tensor in tensors.items()}, frozenset(modules)


def _factors(A: Tensors, B: Tensors, config: PlainLora) -> AdapterSet:
    if not A and not B:
        raise ConfigError("it holds no lora_A and lora_B of linear layers")
    for name in sorted(set(A) ^ set(B)):
        raise ConfigError(f"{name} has no lora_{'B' if name in A else 'A'}")
    return {name: _pair(name, A[name], B[name], config) for name in A}


def _pair(name: str, A: Tensor, B: Tensor, config: PlainLora) -> LoraFactors:
    shapes = f"lora_A {tuple(A.shape)} and lora_B {tuple(B.shape)}"
    if A.ndim != 2 or B.ndim != 2:
        raise ConfigError(
            f"{name}: {shapes}: only linear layers and embeddings can be aggregated or started from"
        )
    rank = config.rank_of(name)
    if A.shape[0] != rank or B.shape[1] != rank or 0 in (*A.shape, *B.shape):
        raise ConfigError(f"{name}: {shapes} are not of the rank {rank} that the configuration says")
    factors = LoraFactors(A, B, config.scaling(name, rank))
    size = abs(factors.scaling) * float(A.norm()) * float(B.norm())
    if not size < LARGEST:
        raise ConfigError(f"{name}: a product of norm {size:.1e} is too large for float32")
    return factors


def _heads(tensors: Tensors, adapted: Collection[str], config: PlainLora) -> tuple[Tensors, Tensors]:
    """Modules that are trained whole, and what PEFT saved of the base.

    Of ``modules_to_save`` some may be missing: PEFT adds names that a model may not have, such as ``score``.
    """
    head: Tensors = {}
    frozen: Tensors = {}
    for name, tensor in tensors.items():
        module = name.rpartition(".")[0]
        if any(part.startswith("lora_") for part in name.split(".")):
            raise ConfigError(
                f"{name}: only lora_A and lora_B of linear layers and embeddings can be averaged"
            )
        if config.saver(name) is not None:
            head[name] = tensor
        elif module.removesuffix(".base_layer") in adapted or module.endswith(EMBEDDINGS_OF_THE_BASE):
            frozen[name] = tensor
        else:
            raise ConfigError(f"{name} is neither a LoRA factor nor part of modules_to_save")
    if config.modules_to_save and not head:
        raise ConfigError(
            f"modules_to_save names {', '.join(config.modules_to_save)[:80]}, of which it holds no tensor"
        )
    return head, frozen
