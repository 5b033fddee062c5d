"""PiSSA: the adapter starts as the principal part of the base weight, which is taken out of the base.

Meng, Wang, Zhang, "PiSSA: Principal Singular Values and Singular Vectors Adaptation of Large Language
Models", NeurIPS 2024 (arXiv 2404.02948), Eqs. 2-4:

    W_0 = U S V^T;   B_0 = U_r S_r^(1/2) / sqrt(s),   A_0 = S_r^(1/2) V_r^T / sqrt(s),   W <- W_0 - s B_0 A_0

The model computes what it computed before. A client's update counts from the initial product, as everywhere
in this project: dW_k is measured from the effective weight. Needs no data, so it costs no privacy.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from fedlora.factors import LoraFactors, as_product, scale
from fedlora.threads import side_by_side
from fedlora.updates import Patch, Template


def principal(template: Template, weight_of: Callable[[str], Tensor]) -> Template:
    """The template with PiSSA's adapter and the patch ``-s B_0 A_0`` that belongs to it.

    Args:
        template: without an adapter of its own.
        weight_of: the base weight (out, in) of a module.
    """

    def of(name: str) -> LoraFactors:
        U, S, Vh = torch.linalg.svd(weight_of(name), full_matrices=False)
        root = (S[: template.rank] / template.scaling).sqrt()
        return LoraFactors(
            root[:, None] * Vh[: template.rank], U[:, : template.rank] * root, template.scaling
        )

    adapters = dict(zip(template.modules, side_by_side(of, template.modules), strict=True))
    taken = Patch({name: scale(-1.0, as_product(factors)) for name, factors in adapters.items()})
    return replace(template, adapters=adapters, base=taken)
