"""Adapters for serving engines: cut to a largest rank, and held to vLLM's documented limits."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from fedlora.core.decompositions import svd
from fedlora.core.factors import AdapterSet, LoraFactors, as_product
from fedlora.core.parallel import parallel_map

VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""Values of vLLM's ``--max-lora-rank`` (vllm/config/lora.py); an adapter's rank must not be above it."""
VLLM_DEFAULT = 16


@dataclass(frozen=True, slots=True)
class Cut:
    """Adapters of bounded rank.

    Attributes:
        adapters: all of scaling 1 where anything was cut, as engines that know one scaling want it.
        energy_lost: share of ``sum ||s B A||_F^2`` over all layers that is not in them.
    """

    adapters: AdapterSet
    energy_lost: float


def cut(adapters: AdapterSet, max_rank: int) -> Cut:
    """The nearest adapters of at most that rank, layer by layer (Eckart-Young); no layer above it: the same.

    Args:
        adapters: without cores.
        max_rank: 1 or more; 0 means no bound.
    """
    if not max_rank or all(factors.rank <= max_rank for factors in adapters.values()):
        return Cut(adapters, 0.0)

    def one(factors: LoraFactors) -> tuple[LoraFactors, float, float]:
        U, S, Vh = svd(as_product(factors))
        energy = S.double().square()
        kept = min(max_rank, max(1, int(S.count_nonzero())))
        if factors.rank <= max_rank:
            return LoraFactors(factors.A, factors.B * factors.scaling, 1.0), float(energy.sum()), 0.0
        shorter = LoraFactors(A=Vh[:kept].contiguous(), B=U[:, :kept] * S[:kept], scaling=1.0)
        return shorter, float(energy.sum()), float(energy[kept:].sum())

    done = parallel_map(one, list(adapters.values()))
    total, lost = sum(energy for _, energy, _ in done), sum(gone for *_, gone in done)
    shorter = {name: factors for name, (factors, *_) in zip(adapters, done, strict=True)}
    return Cut(shorter, lost / total if total else 0.0)


def vllm_says(adapters: AdapterSet, head: Collection[str]) -> str:
    """How vLLM serves an adapter, or why it does not.

    >>> import torch
    >>> vllm_says({"q": LoraFactors(torch.zeros(40, 50), torch.zeros(60, 40), 1.0)}, [])
    'vLLM serves it with --max-lora-rank 64'
    """
    rank = max(factors.rank for factors in adapters.values())
    if head:
        return "vLLM serves no adapter with a trained head (modules_to_save)"
    if len({factors.scaling for factors in adapters.values()}) > 1:
        return "vLLM takes one scaling for all layers, this adapter has several"
    if rank > VLLM_RANKS[-1]:
        return f"vLLM serves rank {VLLM_RANKS[-1]} at most, this adapter has {rank}"
    needed = next(limit for limit in VLLM_RANKS if limit >= rank)
    return "vLLM serves it" if needed <= VLLM_DEFAULT else f"vLLM serves it with --max-lora-rank {needed}"
