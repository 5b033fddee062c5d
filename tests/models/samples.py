"""Small models and random adapters for the tests of models and clients."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor
from transformers import GPT2Config, GPT2Model

from fedlora.config import ModelConfig
from fedlora.core.base_patches import Patch
from fedlora.core.factors import AdapterSet, LoraFactors, Product
from fedlora.core.state import ModuleSpec
from fedlora.models import AdaptedModel, build_model, resolve_targets


def adapted(
    name: str = "tiny", pooling: str = "mean", targets: str = "", num_labels: int = 2, seed: int = 0
) -> AdaptedModel:
    module = build_model(ModelConfig(name=name, pooling=pooling), num_labels, seed)
    return AdaptedModel(module, resolve_targets(module, targets))


def random_adapters(
    modules: Mapping[str, ModuleSpec], rank: int, scaling: float = 2.0, seed: int = 0
) -> AdapterSet:
    g = torch.Generator().manual_seed(seed)
    return {
        name: LoraFactors(
            torch.randn(rank, spec.in_features, generator=g) * 0.2,
            torch.randn(spec.out_features, rank, generator=g) * 0.2,
            scaling,
        )
        for name, spec in modules.items()
    }


def cored_adapters(
    modules: Mapping[str, ModuleSpec], rank: int, scaling: float = 2.0, seed: int = 0, heads: int = 1
) -> AdapterSet:
    """`random_adapters` with a random core between the factors, in so many blocks."""
    g = torch.Generator().manual_seed(seed + 1)
    plain = random_adapters(modules, rank, scaling, seed)
    shape = (rank, rank) if heads == 1 else (heads, rank // heads, rank // heads)
    return {name: replace(f, R=torch.randn(shape, generator=g)) for name, f in plain.items()}


def dense_core(R: Tensor) -> Tensor:
    """R as a matrix, its blocks on the diagonal."""
    return torch.block_diag(*R) if R.ndim == 3 else R


def random_patch(modules: Mapping[str, ModuleSpec], rank: int, seed: int) -> Patch:
    g = torch.Generator().manual_seed(seed)
    return Patch(
        {
            name: Product(
                torch.randn(spec.out_features, rank, generator=g) * 0.1,
                torch.randn(rank, spec.in_features, generator=g) * 0.1,
            )
            for name, spec in modules.items()
        }
    )


def token_batch(vocabulary: int = 1000, shape: tuple[int, int] = (5, 12), seed: int = 0) -> dict[str, Tensor]:
    """Sequences of unequal length, padded with 0."""
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, vocabulary, shape, generator=g)
    lengths = torch.randint(2, shape[1] + 1, (shape[0],), generator=g)
    mask = (torch.arange(shape[1]) < lengths[:, None]).long()
    return {"input_ids": ids * mask, "attention_mask": mask}


def logits(model: torch.nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return model(**batch).logits


def save_tiny_gpt2(directory: Path) -> Path:
    """A random GPT-2, whose layers are Conv1D and not square."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = GPT2Config(
            vocab_size=200, n_positions=64, n_embd=24, n_layer=2, n_head=2, bos_token_id=1, eos_token_id=2
        )
        GPT2Model(config).save_pretrained(directory)
    return directory
