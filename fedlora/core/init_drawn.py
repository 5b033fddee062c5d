"""Starting values of adapters and heads, drawn from named streams so that everybody can draw them again."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from fedlora.core.factors import AdapterSet, LoraFactors
from fedlora.core.seeding import torch_stream
from fedlora.core.state import ModuleSpec
from fedlora.errors import unknown_name

DRAWN = ("kaiming", "orthonormal")
"""Kinds of A that are drawn."""
FRESH = (*DRAWN, "miss")
"""Those, and the one that is the same for everybody; they need no model."""
FROM_BASE = ("pissa", "olora")
"""The kinds that come out of the base weights, see `fedlora.core.init_svd`."""
FROM_DATA = ("eva", "lora-ga")
"""The kinds that look at public examples, see `fedlora.core.init_eva` and `fedlora.core.init_svd`."""
TAKEN_OUT = (*FROM_BASE, "lora-ga")
"""The kinds whose first product leaves the base."""
INIT_A = (*FRESH, *FROM_BASE, *FROM_DATA)
HEAD_STD = 0.02
"""Standard deviation of the weights of a fresh head."""


def initial_a(kind: str, rank: int, in_features: int, generator: torch.Generator) -> Tensor:
    """A starting A of shape (rank, in), float32.

    ``kaiming``: uniform on (-1/sqrt(in), 1/sqrt(in)), which is PEFT's and loralib's Kaiming-uniform
    with a = sqrt(5). ``orthonormal``: orthonormal rows, from the QR of a Gaussian matrix; its rows
    are about sqrt(3) longer than Kaiming's. ``miss``: ``A[j, i] = 1`` where ``i mod r = j``, else 0, nothing
    is drawn. With A frozen and s = 1 that is MiSS ("MiSS: Revisiting the Trade-off in LoRA with an Efficient
    Shard-Sharing Structure", arXiv 2409.15371, at first named Bone), whose matrix is D = B^T.

    Raises:
        ConfigError: an unknown kind.
    """
    if kind == "kaiming":
        bound = 1.0 / math.sqrt(in_features)
        return (torch.rand(rank, in_features, generator=generator) * 2 - 1) * bound
    if kind == "orthonormal":
        gaussian = torch.randn(in_features, rank, generator=generator, dtype=torch.float64)
        Q, R = torch.linalg.qr(gaussian)
        rows: Tensor = (Q * R.diagonal().sign()).T
        return rows.float().contiguous()
    if kind == "miss":
        return torch.eye(rank).repeat(1, -(-in_features // rank))[:, :in_features].contiguous()
    raise unknown_name("strategy.init-a", kind, FRESH)


def fresh_adapters(
    modules: Mapping[str, ModuleSpec],
    rank: int,
    scaling: float,
    seed: int,
    init_a: str = "kaiming",
) -> AdapterSet:
    """An adapter with B = 0 and a `FRESH` A; each module has its own stream of ``seed``.

    The same arguments give the same bits on every machine for ``kaiming`` (no linear algebra).
    """
    streams = {name: torch_stream(seed, "init-a", name) for name in modules}
    drawn = {n: initial_a(init_a, rank, spec.in_features, streams[n]) for n, spec in modules.items()}
    return {
        name: LoraFactors(A=drawn[name], B=torch.zeros(spec.out_features, rank), scaling=scaling)
        for name, spec in modules.items()
    }


def draw_head(layer: nn.Linear, seed: int) -> None:
    """A fresh head as transformers draws its own, weights N(0, 0.02) from ``seed``, biases 0; in place."""
    fresh = torch.randn(layer.weight.shape, generator=torch_stream(seed, "head"))
    layer.weight.data.copy_(HEAD_STD * fresh)
    layer.bias.data.zero_()
