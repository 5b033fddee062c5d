"""Adapters that PEFT saved: one directory in, factors and head out. Pickles are never opened."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from fedlora.errors import ConfigError
from fedlora.factors import AdapterSet, LoraFactors, Tensors
from fedlora.models.export import CARD_FILE, TENSORS_FILE, AdapterCard
from fedlora.models.plain_lora import PlainLora
from fedlora.peft_keys import PREFIX, from_peft

PICKLE_FILE = "adapter_model.bin"
LARGEST = 1e18
"""Norm of ``s B A`` whose square is still a float32."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PeftAdapter:
    """One adapter directory.

    Attributes:
        path: as the user wrote it; messages name the adapter so.
        config: what ``adapter_config.json`` says.
        adapters: the factors by module, float32 (mapped from the file where they are stored so).
        head: the tensors of ``modules_to_save``.
        card: which base it is, where fedlora wrote the adapter.
    """

    path: Path
    config: PlainLora
    adapters: AdapterSet
    head: Tensors
    card: AdapterCard | None

    @property
    def ranks(self) -> tuple[int, ...]:
        """The ranks of its modules, each once, ascending."""
        return tuple(sorted({factors.rank for factors in self.adapters.values()}))


def read_adapter(path: Path) -> PeftAdapter:
    """The adapter of a directory that ``save_pretrained`` wrote.

    Raises:
        ConfigError: no adapter there, a pickle, a damaged file, not plain LoRA, an A without its B, a rank
            other than the configuration says, NaN or infinity.
    """
    if not path.is_dir():
        raise ConfigError(f"{path}: no such directory (an adapter is a directory that save_pretrained wrote)")
    config = PlainLora.read(path)
    tensors = dict(_tensors(path))
    try:
        parts = from_peft(tensors)
        if parts.R:
            raise ConfigError(f"{min(parts.R)}: a core (lora_R) is fedlora's own, PEFT's adapters have none")
        return PeftAdapter(
            path=path,
            config=config,
            adapters=_factors(parts.A, parts.B, config),
            head=_head(parts.head, config),
            card=AdapterCard.read(path) if (path / CARD_FILE).exists() else None,
        )
    except ConfigError as error:
        raise ConfigError(f"{path / TENSORS_FILE}: {error}") from None


def _tensors(path: Path) -> Iterator[tuple[str, Tensor]]:
    file = path / TENSORS_FILE
    if not file.is_file():
        if (path / PICKLE_FILE).exists():
            raise ConfigError(
                f"{path / PICKLE_FILE}: a pickle can run any code when it is opened, so it is not read; "
                f"save the adapter again as {TENSORS_FILE} (save_pretrained(..., safe_serialization=True))"
            )
        raise ConfigError(f"{path}: it has no {TENSORS_FILE}")
    try:
        with safe_open(file, framework="pt") as opened:
            for key in sorted(opened.keys()):
                yield key, _checked(file, key, opened.get_tensor(key))
    except ConfigError:
        raise
    except (SafetensorError, OSError, ValueError, TypeError, RuntimeError) as error:
        raise ConfigError(f"{file}: not a whole safetensors file ({error})") from None


def _checked(file: Path, key: str, tensor: Tensor) -> Tensor:
    if not key.startswith(PREFIX):
        raise ConfigError(f"{file}: {key}: PEFT's names begin with {PREFIX}")
    if not tensor.is_floating_point():
        raise ConfigError(f"{file}: {key} is {tensor.dtype}: only floating point can be averaged")
    tensor = tensor.float()
    if not torch.isfinite(tensor).all():
        raise ConfigError(f"{file}: {key} holds a NaN or an infinity")
    return tensor


def _factors(A: Tensors, B: Tensors, config: PlainLora) -> AdapterSet:
    if not A and not B:
        raise ConfigError("it holds no lora_A and lora_B of linear layers")
    for name in sorted(set(A) ^ set(B)):
        raise ConfigError(f"{name} has no lora_{'B' if name in A else 'A'}")
    return {name: _pair(name, A[name], B[name], config) for name in A}


def _pair(name: str, A: Tensor, B: Tensor, config: PlainLora) -> LoraFactors:
    shapes = f"lora_A {tuple(A.shape)} and lora_B {tuple(B.shape)}"
    if A.ndim != 2 or B.ndim != 2:
        raise ConfigError(f"{name}: {shapes}: only linear layers can be aggregated")
    rank = config.rank_of(name)
    if A.shape[0] != rank or B.shape[1] != rank or 0 in (*A.shape, *B.shape):
        raise ConfigError(f"{name}: {shapes} are not of the rank {rank} that the configuration says")
    factors = LoraFactors(A, B, config.scaling(name, rank))
    size = abs(factors.scaling) * float(A.norm()) * float(B.norm())
    if not size < LARGEST:
        raise ConfigError(f"{name}: a product of norm {size:.1e} is too large for float32")
    return factors


def _head(tensors: Tensors, config: PlainLora) -> Tensors:
    for name in tensors:
        if any(part.startswith("lora_") for part in name.split(".")):
            raise ConfigError(f"{name}: only lora_A and lora_B of linear layers can be aggregated")
        if config.saver(name) is None:
            raise ConfigError(
                f"{name} is neither a LoRA factor nor part of modules_to_save "
                "(embeddings that PEFT added: save with save_embedding_layers=False)"
            )
    return tensors
