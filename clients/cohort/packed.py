"""Frozen linear layers through oneDNN, their weights laid out once for its kernels.

On a processor these products are four fifths of a training step. oneDNN multiplies float32 matrices in
float32, a rounding apart from torch's own product.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from fedlora.models.layers import LinearLayer, is_transposed

MOST_BYTES = 256 * 2**20
"""Weights of a model that are laid out at most: each is kept twice more, for either direction."""
ROWS = 512
"""Tokens of a pass for which the layout is chosen."""
Forward = Callable[[Tensor], Tensor]


def frozen_forwards(
    network: nn.Module, layers: dict[str, LinearLayer], *, pack: bool = True
) -> dict[str, Forward]:
    """The forward of each frozen layer, without hooks: packed where that may be and pays, else its own."""
    device = next(network.parameters()).device
    size = sum(layer.weight.nbytes for layer in layers.values())
    float32 = all(layer.weight.dtype == torch.float32 for layer in layers.values())
    if pack and device.type == "cpu" and float32 and size <= MOST_BYTES and has_onednn():
        return {
            name: _packed_forward(layer) if type(layer) in (nn.Linear, Conv1D) else _own_forward(layer)
            for name, layer in layers.items()
        }
    return {name: _own_forward(layer) for name, layer in layers.items()}


def has_onednn() -> bool:
    """Whether this torch has the products that are used here."""
    available: bool = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    return available and hasattr(torch.ops.mkldnn, "_linear_pointwise")


@dataclass(frozen=True, slots=True)
class Packed:
    """A frozen weight in oneDNN's layout.

    Attributes:
        source: the weight that it was made from, held so that no other can take its address.
        forth: for ``x W^T``.
        back: for ``g W``.
    """

    source: Tensor
    forth: Tensor
    back: Tensor


_packed: WeakKeyDictionary[nn.Module, Packed] = WeakKeyDictionary()


def packed(layer: LinearLayer) -> Packed:
    """The layer's weight, packed; anew only when the base has moved.

    Weights are never written in place (see `MovingBase`), so that another weight has another address.
    """
    found, weight = _packed.get(layer), layer.weight.detach()
    if found is None or found.source.data_ptr() != weight.data_ptr():
        matrix = weight.T if is_transposed(layer) else weight
        found = _packed[layer] = Packed(weight, _laid_out(matrix), _laid_out(matrix.T))
    return found


class PackedLinear(torch.autograd.Function):
    """``x W^T + b`` of a frozen layer; the gradient goes to x alone."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Packed, bias: Tensor | None) -> Tensor:
        ctx.back = weight.back
        return _product(x, weight.forth, bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        return _product(gradients[0].contiguous(), ctx.back, None), None, None


def _packed_forward(layer: LinearLayer) -> Forward:
    weight, bias = packed(layer), layer.bias

    def forward(x: Tensor) -> Tensor:
        if x.requires_grad:
            y: Tensor = PackedLinear.apply(x, weight, bias)  # type: ignore[no-untyped-call]
            return y
        return _product(x, weight.forth, bias)

    return forward


def _own_forward(layer: LinearLayer) -> Forward:
    def forward(x: Tensor) -> Tensor:
        y: Tensor = type(layer).forward(layer, x)
        return y

    return forward


def _laid_out(matrix: Tensor) -> Tensor:
    laid_out: Tensor = torch.ops.mkldnn._reorder_linear_weight(matrix.contiguous(), ROWS)
    return laid_out


def _product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    y: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return y
