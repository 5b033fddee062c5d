"""Adapters that start as a part of the base weight, or of its gradient, which is taken out of the base.

``pissa``: Meng, Wang, Zhang, "PiSSA: Principal Singular Values and Singular Vectors Adaptation of Large
Language Models", NeurIPS 2024 (arXiv 2404.02948), Eqs. 2-4:

    W_0 = U S V^T;   B_0 = U_r S_r^(1/2) / sqrt(s),   A_0 = S_r^(1/2) V_r^T / sqrt(s)

``olora``: Büyükakyüz, "OLoRA: Orthonormal Low-Rank Adaptation of Large Language Models", 2024 (arXiv
2406.01775), Algorithm 1, scaled as in PEFT:

    W_0 = Q R;   B_0 = Q_r (columns),   A_0 = R_r (rows)

``lora-ga``: Wang, Yu, Li, "LoRA-GA: Low-Rank Adaptation with Gradient Approximation", NeurIPS 2024 (arXiv
2407.05000), with G the gradient of the loss at W_0 on a few examples; split and scaled as PEFT does by
default (``ArB2r``, ``stable``, gamma = 16):

    G = U S V^T;   A_0 = V_{1..r}^T,   B_0 = out^(1/4) / sqrt(gamma) U_{r+1..2r} S_{r+1..2r}

All: W <- W_0 - s B_0 A_0, so that the model computes what it computed before. A client's update counts
from the initial product, as everywhere in this project: dW_k is measured from the effective weight. PiSSA and
OLoRA need no data, so they cost no privacy; G is of public examples alone (`fedlora.server.public_data`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from fedlora.core.base_patches import Patch
from fedlora.core.factors import LoraFactors, as_product, scale
from fedlora.core.parallel import parallel_map
from fedlora.core.state import Template
from fedlora.errors import ConfigError

GAMMA = 16.0


def subtract_from_base(template: Template, matrix_of: Callable[[str], Tensor], kind: str) -> Template:
    """The template with an adapter out of the base, and the patch ``-s B_0 A_0`` that belongs to it.

    Args:
        template: without an adapter of its own.
        matrix_of: the base weight (out, in) of a module, or of ``lora-ga`` its gradient.
        kind: ``pissa``, ``olora`` or ``lora-ga``.

    Raises:
        ConfigError: a rank that is too large for ``lora-ga``.
    """

    def of(name: str) -> LoraFactors:
        return KINDS[kind](matrix_of(name), template.rank, template.scaling)

    adapters = dict(zip(template.modules, parallel_map(of, template.modules), strict=True))
    taken = Patch({name: scale(-1.0, as_product(factors)) for name, factors in adapters.items()})
    return replace(template, adapters=adapters, base=taken)


def _pissa(weight: Tensor, rank: int, scaling: float) -> LoraFactors:
    U, S, Vh = torch.linalg.svd(weight, full_matrices=False)
    root = (S[:rank] / scaling).sqrt()
    return LoraFactors(root[:, None] * Vh[:rank], U[:, :rank] * root, scaling)


def _olora(weight: Tensor, rank: int, scaling: float) -> LoraFactors:
    Q, R = torch.linalg.qr(weight)
    return LoraFactors(R[:rank].clone(), Q[:, :rank].clone(), scaling)


def _lora_ga(gradient: Tensor, rank: int, scaling: float) -> LoraFactors:
    if 2 * rank > min(gradient.shape):
        raise ConfigError(
            f"lora.rank = {rank}: strategy.init-a = 'lora-ga' takes 2 r directions of a gradient, a layer of "
            f"{tuple(gradient.shape)} has {min(gradient.shape)}"
        )
    U, S, Vh = torch.linalg.svd(gradient, full_matrices=False)
    second = slice(rank, 2 * rank)
    B = U[:, second] * S[second] * (gradient.shape[0] ** 0.25 / GAMMA**0.5)
    return LoraFactors(Vh[:rank].clone(), B, scaling)


KINDS: Mapping[str, Callable[[Tensor, int, float], LoraFactors]] = {
    "pissa": _pissa,
    "olora": _olora,
    "lora-ga": _lora_ga,
}
"""By ``strategy.init-a``."""
