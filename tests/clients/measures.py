"""Comparing local results."""

from __future__ import annotations

import torch
from torch import Tensor

from clients.training.train import LocalResult
from fedlora.models import AdaptedModel


def tensors(result: LocalResult) -> dict[str, Tensor]:
    """All tensors of a result, by ``<module>.A``, ``<module>.B`` and head name."""
    return {**_factors(result.adapters), **result.head}


def values(model: AdaptedModel) -> dict[str, Tensor]:
    """All tensors of the model as they are now, by the same names."""
    adapters, head = model.read()
    return {**_factors(adapters), **head}


def _factors(adapters: dict[str, object]) -> dict[str, Tensor]:
    return {f"{name}.{letter}": getattr(f, letter) for name, f in adapters.items() for letter in "AB"}


def same_bits(one: LocalResult, other: LocalResult) -> bool:
    a, b = tensors(one), tensors(other)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def distance(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    """Euclidean distance over the names that both have."""
    return float(sum((one[n] - other[n]).double().square().sum() for n in one if n in other) ** 0.5)


def traces(model: AdaptedModel) -> list[str]:
    """What Opacus may have left on the model."""
    found = [
        f"{name}: hooks"
        for name, m in model.module.named_modules()
        if m._forward_hooks or m._backward_hooks or m._forward_pre_hooks
    ]
    found += [
        f"{name}: {a}"
        for name, m in model.module.named_modules()
        for a in ("activations", "max_batch_len")
        if hasattr(m, a)
    ]
    found += [f"{name}: {a}" for name, p in model.module.named_parameters() for a in vars(p)]
    return found + [name for name, p in model.module.named_parameters() if p.grad is not None]
